"""Reading of PyTorch's files as NumPy arrays, and writing. `torch_interop.weights` assigns the arrays to parameters.

A .pt file is a pickle, which can run any code when it is loaded. It is only read with PyTorch's `weights_only=True`,
which accepts arrays, numbers and containers and refuses everything else. A .safetensors file needs no PyTorch.
"""

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from hae_jax.data.presence import absence
from hae_jax.errors import UserError
from hae_jax.files import written_whole

_LOG = logging.getLogger(__name__)
NESTED = ("state_dict", "model", "ema")  # usual keys of a state dict in a file, tried in this order
_DEPTH = 5  # number of nested keys, at most
_SAFETENSORS_FLOATS = {"F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64}


class AdamW(NamedTuple):
    """The state of a `torch.optim.AdamW`. Parameters are in the order in which they were given to it."""

    path: Path
    step: int  # the largest step of all parameters
    exp_avg: list[np.ndarray | None]  # None for a parameter that never had a gradient
    exp_avg_sq: list[np.ndarray | None]
    settings: dict[str, Any]  # lr, weight_decay, betas, eps


def read_state_dict(path: str | Path, nested: Sequence[str] = NESTED) -> dict[str, np.ndarray]:
    """Reads names and arrays from a .safetensors file or from a file of `torch.save`.

    Args:
      path: the file. Its kind is recognised by its content and not by its extension. The state dict may be nested under
        a usual key, and its names may have a wrapper's prefix (`module.`, `model.`, `net.`). Both are removed.
      nested: the keys, the preferred one first.

    Returns:
      float32 arrays, in the file's order.

    Raises:
      UserError: the file is missing or damaged, is a pickle with more than arrays, has no state dict, or weights are
        not finite.
    """
    path = _existing(path)
    if _is_safetensors(path):
        return _checked_finite(path, _without_prefix(_read_safetensors(path)))
    found = _load(path)
    if isinstance(found, Mapping) and {"state", "param_groups"} <= found.keys():
        raise UserError(f"{path}: is the state of an optimizer; give it with --optimizer, and the weights (model*.pt, "
                        "ema_*.pt) with --checkpoint")
    for _ in range(_DEPTH):  # limited, since a pickle can contain itself
        if not isinstance(found, Mapping) or not (keys := [k for k in nested if isinstance(found.get(k), Mapping)]):
            break
        if keys[0] != "ema" and "ema" in keys:
            _LOG.info("%s: reads the weights under %s; those under ema are read with --ema %s", path, keys[0], path)
        found = found[keys[0]]
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path}: no state dict in it, neither plain nor under {', '.join(nested)}; save one with "
                        "torch.save(model.state_dict(), ...)")
    return _checked_finite(
        path, _without_prefix({str(name): _as_array(path, name, value) for name, value in found.items()}))


def read_adamw(path: str | Path) -> AdamW:
    """Reads the file of `torch.save(optimizer.state_dict(), path)` for an AdamW.

    Raises:
      UserError: the file cannot be read, belongs to another optimiser, or has several parameter groups.
    """
    path = _existing(path)
    found = _load(path)
    if not isinstance(found, Mapping) or not {"state", "param_groups"} <= found.keys():
        raise UserError(f"{path}: not the state dict of an optimiser (it has no state and param_groups); give opt*.pt")
    try:
        return _adamw(path, found["param_groups"], found["state"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not the state of AdamW ({type(error).__name__}: {error}); leave --optimizer "
                        "out") from error


def _adamw(path: Path, groups: Any, state: Any) -> AdamW:
    if len(groups) != 1:
        raise UserError(f"{path}: {len(groups)} parameter groups, so that the order of the parameters is not known; "
                        "leave --optimizer out")
    entries = [state.get(number) for number in groups[0]["params"]]
    seen = [entry for entry in entries if entry is not None]
    if not seen or any(not {"step", "exp_avg", "exp_avg_sq"} <= entry.keys() for entry in seen):
        raise UserError(f"{path}: no moments of Adam or AdamW in it (step, exp_avg, exp_avg_sq); leave --optimizer out")
    moments = [[None if entry is None else _as_array(path, f"{name} of parameter {i}", entry[name])
                for i, entry in enumerate(entries)] for name in ("exp_avg", "exp_avg_sq")]
    for name, arrays in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        _checked_finite(path, {f"{name} of parameter {i}": a for i, a in enumerate(arrays) if a is not None})
    settings = {name: groups[0][name] for name in ("lr", "weight_decay", "betas", "eps") if name in groups[0]}
    return AdamW(path, max(int(entry["step"]) for entry in seen), moments[0], moments[1], settings)


def write_state_dict(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that PyTorch can load: .pt with `torch.save`, .safetensors without PyTorch.

    Args:
      path: the file, which must not exist.
      state: the result of `torch_state`.

    Raises:
      UserError: the file exists, or has another extension.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: exists already; name another file, or remove it")
    if path.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{path}: must end in .pt or .safetensors")
    if path.suffix == ".pt":
        torch = _torch(path)
        with written_whole(path) as temporary:
            torch.save({name: torch.from_numpy(value) for name, value in state.items()}, temporary)
    else:
        with written_whole(path) as temporary:
            safetensors.numpy.save_file(dict(state), temporary)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if reason := "is a folder" if path.is_dir() else absence(path):
        raise UserError(f"{path}: {'no such file' if reason == 'missing' else reason}")
    return path


def _is_safetensors(path: Path) -> bool:
    """Checks the content for the length of a JSON header and the header. A .pt is a zip file or a plain pickle."""
    with path.open("rb") as file:
        beginning = file.read(9)
    return (beginning[8:] == b"{" and beginning[:2] != b"PK") or path.suffix.lower() == ".safetensors"


def _torch(path: Path) -> Any:
    try:
        import torch  # optional; training and translation do not need it
    except ImportError as error:
        raise UserError(f"{path}: .pt files need PyTorch; pip install torch, or use .safetensors") from error
    return torch


def _load(path: Path) -> Any:
    if _is_safetensors(path):
        raise UserError(f"{path}: a .safetensors file holds no optimiser; give opt*.pt")
    torch = _torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; torch.load refuses those files
            return torch.load(path, map_location="cpu", weights_only=True)
    # Depending on its bytes, a damaged file makes PyTorch raise EOFError, KeyError, OSError, ...
    except Exception as error:
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{path}: refused, since loading it would run code ({wanted[1]}); it may hold arrays only: "
                            "save it anew with torch.save(model.state_dict(), ...)") from error
        raise UserError(f"{path}: damaged or truncated, or not written by torch.save ({type(error).__name__}); nothing "
                        "in it was run; copy it again") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    if len(content) > 9 and content[8:9] != b"{" and (content[:2] == b"PK" or content[:1] == b"\x80"):
        raise UserError(f"{path}: was written by torch.save, although its name says safetensors; rename it to "
                        f"{path.stem}.pt")
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated ({error}); copy it again") from error
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in _SAFETENSORS_FLOATS:
            raise UserError(f"{path}: {name} is of type {entry['dtype']}; only floating-point arrays are weights here")
        values = np.frombuffer(entry["data"], _SAFETENSORS_FLOATS[entry["dtype"]])
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, which is refused
            arrays[name] = values.reshape(entry["shape"]).astype(np.float32)
    return arrays


def _as_array(path: Path, name: Any, value: Any) -> np.ndarray:
    torch = _torch(path)
    if not torch.is_tensor(value) or not value.is_floating_point():
        kind = value.dtype if torch.is_tensor(value) else type(value).__name__
        raise UserError(f"{path}: {name} is of type {kind}; only floating-point arrays are weights here")
    if value.layout is not torch.strided or value.device.type != "cpu":
        raise UserError(f"{path}: {name} is {'sparse' if value.device.type == 'cpu' else 'without values'}; save the "
                        "weights as dense arrays")
    return value.detach().float().numpy()  # NumPy has no bfloat16


def _without_prefix(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes a prefix of all names, which wrappers add (DataParallel, torch.compile, Lightning).

    The names of a network itself never have a common prefix.
    """
    while len(first := {name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        state = {name.removeprefix(f"{min(first)}."): value for name, value in state.items()}
    return state


def _checked_finite(path: Path, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays if all values are finite."""
    bad = {name: count for name, value in state.items() if (count := int((~np.isfinite(value)).sum()))}
    if bad:
        name = next(iter(bad))
        raise UserError(f"{path}: {len(bad)} of {len(state)} arrays hold NaN or infinite values, first {name} "
                        f"({bad[name]} of {state[name].size}); the training had diverged, take an earlier file")
    return state
