"""Reading of a PyTorch run's files: its parameters, step and EMA weights, and the settings that these imply.

`imported` converts them to a run of this project.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from hae_jax.errors import UserError
from hae_jax.model import VARIANTS
from hae_jax.model.config import DEFAULT_CHANNEL_MULT
from hae_jax.torch_interop.files import NESTED, AdamW, read_adamw, read_state_dict
from hae_jax.torch_interop.guess import UNKNOWN_FIELDS, guess_network, usual_image_size
from hae_jax.training.state import network_config

_FILE_NAME = re.compile(r"(?:model|opt|ema_(?P<rate>\d*\.\d+)_)(?P<step>\d+)")  # model210000, ema_0.9999_210000

State = dict[str, np.ndarray]  # under PyTorch's names, in its layouts, float32


class Source(NamedTuple):
    """A state dict and its file."""

    path: Path
    state: State


class Weights(NamedTuple):
    """The contents of PyTorch's files."""

    params: Source
    ema: dict[float | None, Source]  # by rate; None: the file's name does not give it
    adamw: AdamW | None
    files: tuple[Path, ...]
    step: int  # optimisation steps done


def read_weights(
    checkpoint: str | Path, optimizer: str | Path | None = None, ema: Sequence[str | Path] = ()
) -> Weights:
    """Reads the parameters and, if given, optimiser and EMA weights of the same step.

    The step is that of the files' names (model210000.pt, ema_0.9999_210000.pt, opt210000.pt), else the optimiser's,
    else 0. Where the parameters come from a file that is named as an average, they are this average, too.

    Args:
      checkpoint: the parameters, .pt or .safetensors.
      optimizer: the state of AdamW, .pt.
      ema: averages of the parameters; the rate is read from the name.

    Raises:
      UserError: for a file that cannot be read, for names of different steps, for two averages of one rate.
    """
    params = Source(Path(checkpoint), read_state_dict(checkpoint))
    averages: dict[float | None, Source] = {}
    for path in map(Path, ema):
        if (rate := rate_in_name(path)) in averages:
            raise UserError(f"{path}: EMA weights of the same rate as {averages[rate].path}; give each rate once")
        averages[rate] = Source(path, read_state_dict(path, ("ema", *(key for key in NESTED if key != "ema"))))
    own_rate = rate_in_name(params.path)
    if own_rate is not None and not averages:
        averages[own_rate] = params
    adamw = None if optimizer is None else read_adamw(optimizer)
    files = tuple(dict.fromkeys(map(Path, (checkpoint, *ema, *([] if optimizer is None else [optimizer])))))
    steps = {path: int(found["step"]) for path in files if (found := _FILE_NAME.fullmatch(path.stem))}
    if len(set(steps.values())) > 1:
        raise UserError(f"{', '.join(map(str, steps))}: files of different steps; give those of one step")
    step = next(iter(steps.values()), adamw.step if adamw else 0)
    return Weights(params, averages, adamw, files, step)


def guessed_settings(weights: Weights, defaults: ml_collections.ConfigDict) -> dict[str, Any]:
    """The settings, such as "model.variant", in which the run of these weights differs from the defaults.

    Raises:
      UserError: if the weights are of none of the five networks.
    """
    try:
        model = guess_network(shapes(weights.params.state))
    except UserError as error:
        raise UserError(f"{weights.params.path}: {error}") from error
    size = usual_image_size(model["channel_mult"])
    model["image_size"] = size
    if DEFAULT_CHANNEL_MULT.get(size) == model["channel_mult"]:
        model["channel_mult"] = None
    settings = {}
    if model["out_channels"] == 2 * model["in_channels"]:
        settings["diffusion.variance"] = "learned_range"
    if model["out_channels"] in (model["in_channels"], 2 * model["in_channels"]):
        model["out_channels"] = None
    if rates := tuple(sorted((rate for rate in weights.ema if rate is not None), reverse=True)):
        settings["training.ema_rates"] = rates
    settings |= {f"model.{name}": value for name, value in model.items()}
    if model["variant"] == "fpdm":
        del settings["model.use_hae"]  # has no effect there
    usual = defaults.to_dict()
    return {name: value for name, value in settings.items() if _at(usual, name) != value}


def config_file(settings: Mapping[str, Any], weights: Weights) -> str:
    """A configuration file, as in configs/, with the guessed settings."""
    head = f'"""The network of {weights.params.path.name}; what its weights do not tell is as in configs/default.py."""'
    lines = [f"    config.{name} = {value!r}" for name, value in settings.items()]
    return "\n".join([head, "", "from hae_jax.configs import default", "", "", "def get_config():",
                      "    config = default.get_config()", *lines, "    return config", ""])


def network_lines(config: ml_collections.ConfigDict) -> list[str]:
    """Describes the network, and the settings that come from the config, since the weights do not imply them."""
    network = network_config(config.to_dict())
    known = [f"{name} {getattr(network, name)}" for name in (
        "variant", "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks",
        "attention_resolutions", "num_classes", "use_scale_shift_norm", "resblock_updown", "conv_resample", "use_hae",
        "bottleneck_ratio")]
    lines = [f"network: {', '.join(known)}",
             "not in the weights, taken from the config: "
             + ", ".join(f"{name} {getattr(network, name)}" for name in UNKNOWN_FIELDS)]
    if len(names := config.data.modalities) != network.in_channels:
        lines.append(f"data.modalities names {len(names)} channels ({', '.join(names)}), but the network has "
                     f"{network.in_channels}; give translate.py --config.data.modalities=\"('NAME','NAME')\"")
    if network.variant == "fpdm" or not network.use_hae:
        lines.append("no hybrid blocks: these weights could also be of another variant with use_hae=False, and "
                     "hae_lite, hae_v2 and hae_v2c have other activations then")
    elif VARIANTS[network.variant].hybrid and network.sparse_pattern != "trained":
        lines.append(f"model.sparse_pattern is {network.sparse_pattern!r}; the PyTorch code trained with its random "
                     "pattern, which is 'trained' here")
    return lines


def rate_in_name(path: Path) -> float | None:
    """The EMA rate in a file's name, if there is one."""
    found = _FILE_NAME.fullmatch(path.stem)
    return float(found["rate"]) if found and found["rate"] else None


def shapes(state: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict, in its order."""
    return {name: tuple(value.shape) for name, value in state.items()}


def _at(tree: Mapping[str, Any], name: str) -> Any:
    room, field = name.split(".")
    return tree[room][field]
