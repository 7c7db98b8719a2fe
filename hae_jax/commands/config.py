"""Reading a configuration file and its overrides from a command line."""

from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from hae_jax import configs
from hae_jax.errors import UserError

_PRESETS = Path(configs.__file__).parent
DEFAULTS = str(_PRESETS / "default.py")
CONFIG_HELP = ("configuration file, or the name of a preset, such as brats_v2c; any field of it can be overridden, for "
               "example --config.training.steps=1000 "
               "(all fields are explained in configs/default.py)")


def read_config(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Runs a configuration file and applies overrides such as `--config.seed=1`.

    Raises:
      UserError: if the file is missing, or an override names no field or has the wrong type.
    """
    for argument in overrides:
        if not argument.startswith("--config."):
            raise UserError(f"{argument}: unknown argument; see --help")
    values = flags.FlagValues()
    argv = ["config", f"--config={_file(path)}", *overrides]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} {' '.join(overrides)}: {error}; see configs/default.py for the fields") from error
    return holder.value


def _file(path: str) -> Path:
    """The file itself, or the preset of this name; "configs/brats_v2c.py" is one everywhere."""
    given = Path(path)
    if given.is_file():
        return given
    if given.parent in (Path("."), Path("configs")) and (preset := _PRESETS / f"{given.stem}.py").is_file():
        return preset
    presets = sorted(file.stem for file in _PRESETS.glob("*.py") if file.stem != "__init__")
    raise UserError(f"--config {path}: no such file, and no preset of this name; presets are {', '.join(presets)}")
