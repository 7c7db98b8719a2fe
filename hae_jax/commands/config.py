"""Reading a configuration file and its overrides from a command line."""

import sys
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from hae_jax.errors import UserError

_REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_HELP = ("configuration file; any field of it can be overridden, for example --config.training.steps=1000 "
               "(all fields are explained in configs/default.py)")


def read_config(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Runs a configuration file and applies overrides such as `--config.seed=1`.

    Raises:
      UserError: if the file is missing, or an override names no field or has the wrong type.
    """
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file")
    for argument in overrides:
        if not argument.startswith("--config."):
            raise UserError(f"{argument}: unknown argument; see --help")
    if str(_REPOSITORY) not in sys.path:
        sys.path.insert(0, str(_REPOSITORY))  # configuration files start from configs.default
    values = flags.FlagValues()
    argv = ["config", f"--config={path}", *overrides]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} {' '.join(overrides)}: {error}; see configs/default.py for the fields") from error
    return holder.value
