"""A trained network in a folder: its config, its model, its identity, and the calibrations that were made with it."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from hae_jax.configs import default
from hae_jax.errors import UserError
from hae_jax.localization.methods import Method, make_method
from hae_jax.pipeline.cache_key import calibration_key, weights_hash
from hae_jax.pipeline.calibrations import fits, given, load_calibration, newest_for_other_data
from hae_jax.training.weights import CALIBRATION, SHIPPED, load_trained, trained_folder


class TrainedRun(NamedTuple):
    """A trained network.

    Attributes:
      model: the network; None if the method of a command needs none.
      config: config of its training; fields that are newer than the run have their defaults.
      identity: path, step, EMA weights or parameters, and the weights hash (SHA-256).
      folder: the run folder.
    """

    model: Any
    config: ml_collections.ConfigDict
    identity: dict[str, Any]
    folder: Path

    @property
    def results(self) -> Path:
        """Default folder for results: the run folder, or results/NAME for shipped weights."""
        return Path("results") / self.folder.name if self.folder.parent == SHIPPED else self.folder

    @property
    def calibrations(self) -> Path:
        """Folder for calibrations that are made with this network."""
        return self.results / "calibrations"

    @property
    def shipped_calibration(self) -> Path:
        """File of the calibration that came with the weights. It need not exist."""
        return self.folder / CALIBRATION

    @property
    def method(self) -> Method:
        """The method that `config.translation` describes."""
        return make_method(self.config)

    def calibration(self) -> Any | None:
        """The calibration of `translation.calibration`, else that which came with the weights, else the newest one of
        this run with the same settings.

        Raises:
          UserError: that of `translation.calibration` does not fit (`calibrations.given`).
        """
        method = self.method
        if (found := given(self.config, method, self.identity)) is not None:
            return found
        wanted = calibration_key(self.config, None, method, self.identity)
        for find in (lambda: self.shipped_calibration,
                     lambda: newest_for_other_data(method, self.calibrations, wanted)):
            with contextlib.suppress(UserError):
                found = load_calibration(method, find())
                if fits(found, wanted):
                    return found
        return None


def load_run(run: str | Path, settings: Mapping[str, Any] | None = None) -> TrainedRun:
    """Loads a trained network.

    Args:
      run: run folder of `train.py`, folder of exported weights, or name of shipped weights ("phantom").
      settings: fields of `config.translation` to change. With ema=False, the parameters of the last step are loaded
        instead of the EMA weights.

    Raises:
      UserError: there is no network, it is damaged, or a setting does not exist or has the wrong type.
    """
    network = load_trained(run)
    config = completed_config(network.config)
    for name, value in (settings or {}).items():
        if name not in config.translation:
            raise UserError(f"translation.{name}: no such setting; see configs/default.py for the fields")
        try:
            config.translation[name] = value
        except TypeError as error:
            raise UserError(f"translation.{name} is {value!r}: {error}") from error
    if not config.translation.ema:
        network = load_trained(run, ema=False)
    identity = {**network.identity, "sha256": weights_hash(network.model, config)}
    return TrainedRun(network.model, config, identity, trained_folder(run))


def completed_config(tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config that a network was saved with. Fields that are newer than the network have their defaults.

    Raises:
      UserError: `tree` is not a config.
    """
    config = default.get_config()
    try:
        with config.unlocked():
            config.update(as_config(tree))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"the config of the network is damaged ({error}); copy its folder again, or use another "
                        "checkpoint") from error
    return config


def as_config(value: Any) -> Any:
    """Converts JSON values to the types of a config: dictionaries to ConfigDict, lists to tuples."""
    if isinstance(value, Mapping):
        return ml_collections.ConfigDict({name: as_config(item) for name, item in value.items()})
    return tuple(map(as_config, value)) if isinstance(value, list | tuple) else value
