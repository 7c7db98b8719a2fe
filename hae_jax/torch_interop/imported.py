"""Conversion of a PyTorch run to a checkpoint that `train.py` can resume and `translate.py` can use.

`torch_interop.run` reads the files. `write_run` writes the files that `training.loop` would have written at that step.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from hae_jax.errors import UserError
from hae_jax.files import folder_written_whole, write_json
from hae_jax.model import UNetConfig
from hae_jax.provenance import record
from hae_jax.torch_interop.files import AdamW
from hae_jax.torch_interop.guess import guess_network
from hae_jax.torch_interop.run import Source, State, Weights, rate_in_name, shapes
from hae_jax.torch_interop.weights import load_torch_state, torch_state
from hae_jax.training.checkpoint import Checkpoints
from hae_jax.training.mesh import make_mesh, replicated
from hae_jax.training.state import (
    TrainState,
    abstract_network,
    initial_state,
    make_optimizer,
    network_config,
    remembered_timesteps,
)


def write_run(
    weights: Weights,
    config: ml_collections.ConfigDict,
    output: str | Path,
    *,
    config_name: str | None = None,
    config_text: str | None = None,
    verify: bool = False,
) -> list[str]:
    """Writes a run's folder: checkpoint, config.json, and imported.json with its origin.

    Missing EMA weights start as the parameters, and missing moments as zeros, as at the start of a training.

    Args:
      config: the config tree with which the run will be resumed.
      output: the folder, which must be new or empty. It appears when it is complete.
      config_name: name of the config in messages; None: it was guessed.
      config_text: text that is written to config.py.
      verify: read the checkpoint again and compare every array with the files.

    Returns:
      Lines that describe the written files.

    Raises:
      UserError: weights and config do not fit, the folder is in use, or the comparison fails. Nothing is written then.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not empty; give another folder")
    sources, notes = _ema_sources(weights, tuple(config.training.ema_rates))
    state = _state(weights, sources, config, config_name or "the guessed config")
    notes += _optimizer_notes(weights.adamw, config.training)
    with folder_written_whole(output) as folder:
        _write(folder, state, config.to_dict(), weights, config_text)
        if verify:
            notes.append(_verified(folder, state, network_config(config.to_dict()), sources, weights))
    return [f"step {weights.step}, {sum(a.size for a in weights.params.state.values())} parameters", *notes]


def _ema_sources(weights: Weights, rates: tuple[float, ...]) -> tuple[list[Source], list[str]]:
    """The source of each set of EMA weights of the config, and notes for the user."""
    given = dict(weights.ema)
    if None in given and len(given) == len(rates) == 1:
        given = {rates[0]: given[None]}
    if strange := [str(source.path) for rate, source in given.items() if rate not in rates]:
        raise UserError(f"{', '.join(strange)}: EMA rate not in the config, training.ema_rates is {rates}; give "
                        "--config.training.ema_rates=RATE, or name the file ema_RATE_STEP.pt")
    sources = [given.get(rate, weights.params) for rate in rates]
    notes = [f"EMA weights {rate}: {source.path}{'' if rate in given else ', a copy of the parameters'}"
             for rate, source in zip(rates, sources, strict=True)]
    if rate_in_name(weights.params.path) is not None:
        notes.append(f"parameters: {weights.params.path}, EMA weights; training continues from them")
    return sources, notes


def _state(
    weights: Weights, sources: list[Source], config: ml_collections.ConfigDict, config_name: str
) -> TrainState:
    """The state of the run after `weights.step` steps."""
    network = network_config(config.to_dict())
    params = _fitted(weights.params, network, config_name)
    ema = tuple(params if source is weights.params else _fitted(source, network, config_name) for source in sources)
    opt_state = _optimizer_state(make_optimizer(config.training), params, weights, network)
    return initial_state(params, opt_state, ema, remembered_timesteps(config), int(weights.step))


def _placed(state: State, network: UNetConfig) -> nnx.State:
    """A state dict's arrays in the network's layouts. It uses a new network, since merged ones share variables."""
    model = nnx.merge(*abstract_network(network))
    load_torch_state(model, state)
    return nnx.state(model, nnx.Param)


def _fitted(source: Source, network: UNetConfig, config_name: str) -> nnx.State:
    """The parameters of a file; an error names the settings that differ."""
    try:
        return _placed(source.state, network)
    except UserError as error:
        differing = _differing(source, network)
        if not differing:
            raise UserError(f"{source.path}: {error}") from error
        raise UserError(f"{source.path} does not fit {config_name}: {'; '.join(differing)}; set these, or leave "
                        "--config out") from error


def _differing(source: Source, network: UNetConfig) -> list[str]:
    """The settings in which a network differs from that of the weights, according to the shapes."""
    try:
        theirs = guess_network(shapes(source.state))
    except UserError:
        return []
    own = guess_network(_shapes_of(network))
    return [f"model.{name} is {own.get(name)!r}, that of the weights {value!r}"
            for name, value in theirs.items() if own.get(name) != value]


def _shapes_of(network: UNetConfig) -> dict[str, tuple[int, ...]]:
    """PyTorch's names and shapes of a network, in the state dict's order."""
    graph, abstract = abstract_network(network)
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    return shapes(torch_state(nnx.merge(graph, empty)))


def _optimizer_state(
    optimizer: optax.GradientTransformation, params: nnx.State, weights: Weights, network: UNetConfig
) -> Any:
    """The optimiser's state after `weights.step` steps, with AdamW's moments if they were given."""
    adam, adamw = {}, weights.adamw
    if adamw is not None:
        known = _shapes_of(network)
        adam = {"count": jnp.asarray(adamw.step, jnp.int32),
                "mu": _placed_moments(adamw, adamw.exp_avg, known, network),
                "nu": _placed_moments(adamw, adamw.exp_avg_sq, known, network)}

    def replaced(part):
        if isinstance(part, optax.ScaleByAdamState):
            return part._replace(**adam)
        if isinstance(part, optax.ScaleByScheduleState):
            return part._replace(count=jnp.asarray(weights.step, jnp.int32))
        return part

    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    return jax.tree.map(replaced, optimizer.init(params), is_leaf=lambda part: isinstance(part, kinds))


def _placed_moments(
    adamw: AdamW, arrays: list[np.ndarray | None], known: dict[str, tuple[int, ...]], network: UNetConfig
) -> nnx.State:
    """Moments in the parameters' layouts."""
    if len(arrays) != len(known):
        raise UserError(f"{adamw.path}: moments of {len(arrays)} parameters, the network has {len(known)}; give the "
                        "file of the same run (one of a float16 run keeps them in one piece, which is not read)")
    try:
        return _placed(_named_moments(arrays, known), network)
    except UserError as error:
        raise UserError(f"{adamw.path}: moments of another network: {error}") from error


def _named_moments(arrays: list[np.ndarray | None], known: dict[str, tuple[int, ...]]) -> State:
    """Moments by name. PyTorch numbers them in the state dict's order. Without a gradient, they are zero."""
    return {name: np.zeros(shape, np.float32) if array is None else array
            for (name, shape), array in zip(known.items(), arrays, strict=True)}


def _optimizer_notes(adamw: AdamW | None, training: Any) -> list[str]:
    if adamw is None:
        return ["AdamW: no moments given, they begin at zero"]
    wanted = {"lr": training.learning_rate, "weight_decay": training.weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
    differing = [f"{name} was {adamw.settings[name]}, is {value}" for name, value in wanted.items()
                 if name in adamw.settings and not np.allclose(adamw.settings[name], value, rtol=1e-6, atol=0)]
    without = sum(array is None for array in adamw.exp_avg)
    return [f"AdamW: moments of step {adamw.step} from {adamw.path}"
            + (f"; {without} parameters never had a gradient, theirs are zero" if without else "")
            + (f"; {'; '.join(differing)} in the config" if differing else "")]


def _write(folder: Path, state: TrainState, tree: dict[str, Any], weights: Weights, config_text: str | None) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(state, tree)
    checkpoints.close()
    files = []
    for path in weights.files:
        with path.open("rb") as file:
            files.append({"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
    write_json(folder / "config.json", tree)
    write_json(folder / "imported.json", record() | {"files": files, "step": weights.step, "seed": tree["seed"]})
    if config_text:
        (folder / "config.py").write_text(config_text, encoding="utf-8")


def _verified(folder: Path, state: TrainState, network: UNetConfig, sources: list[Source], weights: Weights) -> str:
    """Reads the checkpoint and compares it, in PyTorch's layouts, with the arrays of the files."""
    checkpoints = Checkpoints(folder)
    sharding = replicated(make_mesh())
    found = checkpoints.restore(weights.step, state, jax.tree.map(lambda _: sharding, state))
    checkpoints.close()
    pairs = [("parameters", found.params, weights.params.state)]
    pairs += [(f"EMA weights {i}", tree, source.state)
              for i, (tree, source) in enumerate(zip(found.ema, sources, strict=True))]
    if weights.adamw:
        known = _shapes_of(network)
        pairs += [(key, optax.tree_utils.tree_get(found.opt_state, key), _named_moments(given, known))
                  for key, given in (("mu", weights.adamw.exp_avg), ("nu", weights.adamw.exp_avg_sq))]
    graph, _ = abstract_network(network)
    wrong, count = [], 0
    for what, tree, expected in pairs:
        written = torch_state(nnx.merge(graph, tree))
        wrong += [f"{name} ({what})" for name, value in expected.items()
                  if not np.array_equal(written[name], value, equal_nan=True)]
        count += len(expected)
    if wrong:
        raise UserError(f"{weights.params.path}: {len(wrong)} of {count} arrays were written wrongly, first "
                        f"{wrong[0]}; nothing was kept, try again on another disk")
    return f"verified: {count} arrays read back, each equal to the file's"
