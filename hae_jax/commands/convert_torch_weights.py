"""tools/convert_torch_weights.py: weights of the PyTorch code -> a run of this project, and back."""

import argparse
import shlex
from collections.abc import Sequence

from hae_jax.commands.common import CommandParser, as_called, entry_point
from hae_jax.commands.config import CONFIG_HELP, DEFAULTS, read_config

_DESCRIPTION = """\
Import the weights of a PyTorch run. The output is a run folder: translate.py --checkpoint uses it, and train.py
--workdir continues it. With --to-torch, write the weights of a run for PyTorch instead. Nothing is written unless all
names and shapes fit. Code in .pt files is never executed."""
_EPILOG = """\
examples:
  python tools/convert_torch_weights.py --checkpoint model210000.pt --ema ema_0.9999_210000.pt \\
      --optimizer opt210000.pt --config configs/brats_v2c.py --output runs/imported --verify
  python train.py --config configs/brats_v2c.py --workdir runs/imported --config.training.steps=250000
  python tools/convert_torch_weights.py --checkpoint ema_0.9999_210000.pt --output runs/imported
  python tools/convert_torch_weights.py --to-torch runs/imported model.pt"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="state dict: .pt (plain or nested under state_dict, model or ema) or "
        ".safetensors; a file named ema_RATE_STEP.pt is used both as parameters and as EMA weights")
    add("--optimizer", metavar="FILE", help="state of AdamW, such as opt210000.pt; default: moments start at zero")
    add("--ema", metavar="FILE", nargs="?", const="", action="append", default=[],
        help="EMA weights, such as ema_0.9999_210000.pt; once per rate; default: a copy of the parameters. With "
             "--to-torch and without a FILE: write the first EMA weights, not the parameters")
    add("--config", metavar="FILE", help=f"{CONFIG_HELP}; default: configs/default.py with the network that names "
        "and shapes imply, also written to config.py for train.py")
    add("--output", metavar="FOLDER", help="run folder to write, new or empty")
    add("--verify", action="store_true", help="read the checkpoint again and compare every array with the files")
    add("--to-torch", metavar=("RUN", "FILE"), nargs=2, help="write the parameters of a run's newest checkpoint (or "
        "the EMA weights of exported or shipped weights, such as phantom) as a .pt file for "
        "load_state_dict(strict=True), or as .safetensors")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and converts."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.to_torch:
        others = (overrides, arguments.checkpoint, arguments.optimizer, arguments.output, arguments.config,
                  arguments.verify, *arguments.ema)
        if any(others):
            parser.error("--to-torch RUN FILE can be combined only with --ema (without a file)")
        _export(*arguments.to_torch, ema=bool(arguments.ema))
    elif not arguments.checkpoint or not arguments.output or "" in arguments.ema:
        parser.error("give --checkpoint FILE and --output FOLDER (and each --ema its FILE), or --to-torch RUN FILE")
    elif overrides and not arguments.config:
        parser.error(f"{overrides[0]}: unknown argument, or one that needs --config, such as configs/default.py")
    else:
        _import(arguments, overrides)


def _import(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from hae_jax.torch_interop import imported  # after parsing: --help needs no JAX
    from hae_jax.torch_interop import run as torch_run

    config, text = read_config(arguments.config or DEFAULTS, overrides), None
    if not any(override.startswith("--config.translation.method") for override in overrides):
        config.translation.method = "hae"  # what published weights were tuned for
    weights = torch_run.read_weights(arguments.checkpoint, arguments.optimizer, arguments.ema)
    if not arguments.config:
        settings = torch_run.guessed_settings(weights, config)
        config.update_from_flattened_dict(settings)
        text = torch_run.config_file(settings, weights)
    lines = imported.write_run(weights, config, arguments.output, config_name=arguments.config, config_text=text,
                               verify=arguments.verify)
    print("\n".join([*torch_run.network_lines(config), *lines]))
    run, source = arguments.output, arguments.config or f"{arguments.output}/config.py"
    print(f"to translate: {as_called('python translate.py')} {shlex.join(['--checkpoint', run])} --input FOLDER")
    if len(config.data.modalities) != config.model.in_channels:
        print("to continue its training: import again with --config and the network's channels in "
              "--config.data.modalities")
        return
    same = shlex.join(["--config", source, *overrides, "--workdir", run])
    print(f"to continue: {as_called('python train.py')} {same}"
          + (f" --config.training.steps=N (above {weights.step})" if weights.step >= config.training.steps else ""))


def _export(run: str, file: str, ema: bool) -> None:
    from hae_jax.data.presence import is_there
    from hae_jax.torch_interop.files import write_state_dict
    from hae_jax.torch_interop.weights import torch_state
    from hae_jax.training.weights import WEIGHTS, load_trained, trained_folder

    exported = is_there(trained_folder(run) / WEIGHTS)  # it contains only EMA weights
    network = load_trained(run, ema=ema or exported)
    state = torch_state(network.model)
    write_state_dict(file, state)
    print(f"{file}: {len(state)} arrays, {network.identity['parameters']} of {network.identity['path']}")
