"""Reading a configuration file and its overrides from a command line."""

import math
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from hae_jax import configs
from hae_jax.configs import default
from hae_jax.errors import UserError

_PRESETS = Path(configs.__file__).parent
DEFAULTS = str(_PRESETS / "default.py")
_SEEDS = 2**32  # JAX's keys and the noise use 32 bits
CONFIG_HELP = ("configuration file, or name of a preset such as brats_v2c; --config.FIELD=VALUE sets a single field, "
               "such as --config.seed=1; None unsets a field that may be None (configs/default.py explains all fields)")


def read_config(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Runs a configuration file and applies overrides such as `--config.seed=1`.

    Raises:
      UserError: the file is missing, fails, or gives no complete configuration (the message gives file, line and
        mistake); or an override names no field or has the wrong type.
    """
    for argument in overrides:
        if not argument.startswith("--config."):
            raise UserError(f"{argument}: unknown argument; see --help")
    return overridden(_checked(path, _run(_file(path))), overrides, path)


def overridden(
    config: ml_collections.ConfigDict, overrides: Sequence[str], path: str = ""
) -> ml_collections.ConfigDict:
    """The config with overrides, locked. `path` is the file of the config, for messages.

    Raises:
      UserError: an override names no field or has the wrong type.
    """
    values = flags.FlagValues()
    last = {argument.partition("=")[0]: argument for argument in overrides}  # the last override of each field
    # absl and ml_collections have no way to write None.
    optional = {f"--config.{name}" for name, value in fields(default.get_config()).items()
                if value is None or name == "model.num_classes"}
    unset = {flag for flag, argument in last.items() if flag in optional and argument == f"{flag}=None"}
    config.update_from_flattened_dict({flag.removeprefix("--config."): None for flag in unset})
    argv = ["config", *(argument for flag, argument in last.items() if flag not in unset)]
    try:
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=argv)
        values(argv)
    except Exception as error:  # absl, ml_collections and parsers of values raise errors of many types
        raise UserError(" ".join([*filter(None, [path]), *overrides])
                        + f": {error}; see configs/default.py for the fields") from error
    _check_values(holder.value)
    return holder.value


def _check_values(config: ml_collections.ConfigDict) -> None:
    usual = fields(default.get_config())
    for name, value in fields(config).items():
        several = isinstance(value, list | tuple)
        numbers = value if several else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{name} is {value}: it must be finite")
        if several and name in usual:
            kinds, what = _elements(usual[name])
            if any(isinstance(element, bool) or not isinstance(element, kinds) for element in value):
                raise UserError(f"{name} is {value}: give {what}")
    names = config.get("data", {}).get("modalities", ())
    if any("," in name for name in names):  # flair,t1 without quotes is one name
        parts = ",".join(repr(part.strip()) for name in names for part in name.split(","))
        raise UserError(f"data.modalities is {tuple(names)}: write --config.data.modalities=\"({parts})\"")
    seed = config.get("seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise UserError(f"seed is {seed}: give a whole number from 0 to 2^32 - 1")


def _elements(usual: Sequence[Any] | None) -> tuple[type | tuple[type, ...], str]:
    """The types of a tuple's elements, by the default of its field, and what they are called."""
    if usual and isinstance(usual[0], str):
        return str, "names in quotes"
    if usual and all(isinstance(element, int) for element in usual):
        return int, "whole numbers"
    return (int, float), "numbers"


def fields(config: ml_collections.ConfigDict, above: str = "") -> dict[str, Any]:
    """All fields by their dotted names, without the sections that hold them."""
    found = {}
    for name, value in config.items():
        inside = isinstance(value, ml_collections.ConfigDict)
        found |= fields(value, f"{above}{name}.") if inside else {above + name: value}
    return found


def _run(file: Path) -> Any:
    """The return value of `get_config` of a file. The file is run at each call."""
    if file.suffix != ".py":
        raise UserError(f"--config {file}: a configuration file is a .py file with a function get_config (see "
                        "configs/phantom.py); for the config of a trained network give --checkpoint")
    try:
        namespace = runpy.run_path(str(file), run_name="hae_jax_config")
        get_config = namespace.get("get_config")
        if not callable(get_config):
            raise UserError(f"--config {file}: defines no function get_config; see configs/phantom.py for an "
                            "example")
        return get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--config {file}{_line(file, error)}: {type(error).__name__}: {error}; correct the "
                        "file") from error


def _line(file: Path, error: BaseException) -> str:
    """", line N" if the error arose in this file, otherwise empty."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines and lines[-1] else ""


def _checked(path: str, config: Any) -> ml_collections.ConfigDict:
    """The config. It must have the fields of the default config, with values of the same types."""
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config {path}: its get_config returns {type(config).__name__}, not a ConfigDict; end it "
                        "with return config")
    usual = default.get_config()
    own, known = ({name: value for name, value in fields(tree).items() if not name.startswith("data.phantom")}
                  for tree in (config, usual))
    for names, what in ((own.keys() - known.keys(), "has an unknown field"),
                        (known.keys() - own.keys(), "lacks a field")):
        if names:
            raise UserError(f"--config {path}: {what}, {min(names)}; see configs/default.py for the fields")
    for name, value in own.items():
        try:
            usual.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"--config {path}: {name} is {value!r}; {error}") from error
    return config


def _file(path: str) -> Path:
    """The file, or the preset of this name. "configs/brats_v2c.py" names a preset in every folder."""
    given = Path(path)
    if given.is_file():
        return given
    if given.parent in (Path("."), Path("configs")) and (preset := _PRESETS / f"{given.stem}.py").is_file():
        return preset
    presets = sorted(file.stem for file in _PRESETS.glob("*.py") if file.stem != "__init__")
    raise UserError(f"--config {path}: no such file or preset; presets are {', '.join(presets)}")
