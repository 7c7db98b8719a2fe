"""A trained network as two files that are small enough to share: weights in half or full precision, and the config.

`model.safetensors` holds the EMA weights under PyTorch's names. `config.json` holds the config tree of the training and
the step. Training can be resumed from a run folder, but not from such a folder.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from hae_jax import weights
from hae_jax.data.presence import absence, is_there
from hae_jax.errors import UserError
from hae_jax.files import read_json, write_json
from hae_jax.torch_interop.files import read_state_dict, write_state_dict
from hae_jax.torch_interop.weights import load_torch_state, torch_state
from hae_jax.training import checkpoint
from hae_jax.training.checkpoint import Network
from hae_jax.training.state import abstract_network, network_config

WEIGHTS, CONFIG, CALIBRATION = "model.safetensors", "config.json", "calibration.json"
BEST = "best"  # in a run folder: the EMA weights with the best localization
SHIPPED = Path(weights.__file__).parent  # with a folder for each shipped network


def export_weights(run: str | Path, folder: str | Path) -> Network:
    """Writes the EMA weights of a run's newest intact checkpoint to `folder`, replacing earlier ones.

    Returns:
      The network that was written.

    Raises:
      UserError: the run has no intact checkpoint.
    """
    network = checkpoint.load_network(run)
    write_weights(folder, network.model, network.config, network.identity["step"])
    return network


def write_weights(
    folder: str | Path, model: nnx.Module, config: Mapping[str, Any], step: int, *, parameters: str | None = None
) -> None:
    """Writes a network's parameters and its config to `folder`, replacing earlier ones.

    Args:
      parameters: name of the parameters for the network's identity; they are written in full precision. None: EMA
        weights in half precision.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".new_{WEIGHTS}"  # the earlier network stays until the new weights are complete
    new.unlink(missing_ok=True)
    kind = np.float16 if parameters is None else np.float32
    write_state_dict(new, {name: value.astype(kind) for name, value in torch_state(model).items()})
    (folder / CONFIG).unlink(missing_ok=True)  # weights without it do not count as a network
    os.replace(new, folder / WEIGHTS)
    write_json(folder / CONFIG, {"step": step, "parameters": parameters, "config": config})


def trained_folder(path: str | Path) -> Path:
    """The folder itself or, if it does not exist, that of the shipped weights with this name."""
    shipped = SHIPPED / Path(path).name
    return shipped if not Path(path).exists() and str(path) == shipped.name and shipped.is_dir() else Path(path)


def load_trained(path: str | Path, *, ema: bool = True, forms: Mapping[str, str] | None = None) -> Network:
    """Reads a trained network from a run folder (`load_network`) or from a folder of `export_weights`.

    Args:
      path: the folder, or the name of shipped weights, such as "phantom".
      ema: read the EMA weights instead of the last parameters.

    Raises:
      UserError: there is no network, it is damaged, or it has only EMA weights and `ema` is False.
    """
    path = trained_folder(path)
    if (reason := absence(path)) == "missing":
        names = sorted(folder.parent.name for folder in SHIPPED.glob(f"*/{WEIGHTS}"))
        raise UserError(f"{path}: there is no such folder; give a run folder of train.py, a folder of exported "
                        f"weights, or shipped weights ({', '.join(names)})")
    if reason:  # a dead link, or a folder without permission
        raise UserError(f"{path}: {reason}")
    if not is_there(path / WEIGHTS):
        return checkpoint.load_network(path, ema=ema, forms=forms)
    if not ema:
        raise UserError(f"{path}: has only EMA weights; leave translation.ema at its default")
    return load_weights(path, forms)


def load_weights(folder: str | Path, forms: Mapping[str, str] | None = None) -> Network:
    """Reads a folder of `export_weights`. The parameters are converted to float32.

    Raises:
      UserError: a file is missing or damaged, or the weights do not fit the config.
    """
    path = Path(folder) / CONFIG
    described = read_json(path)
    try:
        config, step = described["config"], int(described["step"])
        rate = float(config["training"]["ema_rates"][0])
        graph, params = abstract_network(network_config(config, forms))
    except Exception as error:  # all that the network raises for impossible settings
        raise UserError(f"{path}: cannot be read as the config of a network ({type(error).__name__}: {error}); copy "
                        "the folder again") from error
    model, weights_file = nnx.merge(graph, params), path.with_name(WEIGHTS)
    state = read_state_dict(weights_file)
    try:
        load_torch_state(model, state)
    except UserError as error:
        raise UserError(f"{weights_file}: is of another network than {CONFIG} beside it; copy the folder again "
                        f"({error})") from error
    identity = {"path": str(Path(folder) / WEIGHTS), "step": step,
                "parameters": described.get("parameters") or f"ema {rate}, half precision"}
    return Network(config, model, identity)
