"""The methods that find lesions, behind one interface: the forward process and what people compare it with.

`make_method` makes one from the configuration; `batched.py` runs it, `validation.py` calibrates it, `per_case.py` asks
it for masks.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np

from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.translation.calibration import Calibration, calibrate
from hae_jax.translation.counterparts import AnoDdpm, Ddib
from hae_jax.translation.fixed_threshold import FixedThreshold, FixedThresholdMethod
from hae_jax.translation.forward_process import (
    Denoisers,
    ForwardSettings,
    Translation,
    check_choice,
    check_modality,
    forward_process,
    step_noise,
)
from hae_jax.translation.masks import Masks, make_masks

_FLAIR = "flair"


class Method(Protocol):
    """What every method offers. A method with a network is called; one without has `intensity` instead.

    `__call__(denoisers, x0 [B, H, W, C] in [-1, 1], keys [B])` is pure and gives a NamedTuple of arrays [B, ...];
    `intensity(images [S, H, W, C], normalised by volume)` gives the same from the slices alone.

    Attributes:
      name: as on the command line.
      network: whether it needs one.
      similarity: whether the score of a slice is a similarity (`calibration.similarity`).
    """

    name: str
    network: bool
    similarity: bool

    def calibrate(
        self, results: Iterable[tuple[Any, int, np.ndarray]], made_with: Mapping[str, Any]
    ) -> Calibration | FixedThreshold:
        """What turns maps into masks, from the result, the label and the mask [H, W] of each validation slice."""

    def load_calibration(self, path: str | os.PathLike) -> Calibration | FixedThreshold:
        """Reads what the result of `calibrate` saved."""

    def masks(
        self, results: Any, calibration: Any, *, median: bool, remove_up_to: int, positions: np.ndarray | None
    ) -> Masks:
        """The masks of stacked results [S, ...]; see `masks.make_masks` for the filters."""

    def healthy(self, results: Any) -> np.ndarray | None:
        """The healthy counterparts of stacked results, [S, H, W, M] in [-1, 1]; None: the method makes none."""


@dataclasses.dataclass(frozen=True)
class Hae:
    """The forward process: see `forward_process`, `calibration` and `masks`."""

    process: Process
    settings: ForwardSettings

    name: ClassVar[str] = "hae"
    network: ClassVar[bool] = True
    similarity: ClassVar[bool] = True

    def __call__(
        self,
        denoisers: Denoisers,
        x0: jax.Array,  # [B, H, W, C] in [-1, 1]
        keys: jax.Array,  # [B], of each slice's noise
    ) -> Translation:
        """Walks the forward process with a batch."""
        return forward_process(self.process, denoisers, x0, step_noise(keys, x0.shape[1:]), self.settings)

    def calibrate(
        self, results: Iterable[tuple[Translation, int, np.ndarray]], made_with: Mapping[str, Any]
    ) -> Calibration:
        """The slice threshold and the peaks of the diff curve; masks are not looked at, and only curves are kept.

        Raises:
          UserError: if there is no healthy or no lesion slice, or a curve is not finite.
        """
        curves, labels = [], []
        for result, label, _ in results:
            curves.append((result.mse, result.ref, result.diff))
            labels.append(label)
        shape = (0, self.settings.steps, len(self.settings.modality))
        mse, ref, diff = map(np.stack, zip(*curves, strict=True)) if curves else [np.zeros(shape)] * 3
        return calibrate(mse, ref, diff, np.array(labels, int), modality=self.settings.modality, made_with=made_with)

    def load_calibration(self, path: str | os.PathLike) -> Calibration:
        """Reads a calibration."""
        return Calibration.load(path)

    def masks(
        self, results: Translation, calibration: Calibration, *, median: bool, remove_up_to: int = 0,
        positions: np.ndarray | None = None,
    ) -> Masks:
        """See `make_masks`."""
        return make_masks(results.mse, results.ref, results.diff, results.map, calibration, median=median,
                          remove_up_to=remove_up_to, positions=positions)

    def healthy(self, results: Translation) -> np.ndarray:  # [S, H, W, M] in [-1, 1]
        """The guided predictions at t_e."""
        return results.healthy


class Intensity(NamedTuple):
    """What the trivial competitor makes of slices."""

    map: np.ndarray  # [S, H, W]


@dataclasses.dataclass(frozen=True)
class IntensityThreshold(FixedThresholdMethod):
    """The trivial competitor: everything bright on flair is lesion. The map is flair itself, never filtered.

    Its threshold is a multiple of the 99th percentile of the case's positive voxels.

    Attributes:
      channel: that it looks at.
    """

    channel: int = 0

    name: ClassVar[str] = "threshold"
    network: ClassVar[bool] = False
    median: ClassVar[bool] = False
    candidates: ClassVar[np.ndarray] = np.arange(15, 101) / 50  # 0.3 to 2 times the 99th percentile

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "IntensityThreshold":
        """On flair, or on the first channel where there is no flair."""
        names = tuple(config.data.modalities)
        return cls(names.index(_FLAIR) if _FLAIR in names else 0)

    def intensity(
        self,
        images: np.ndarray,  # [S, H, W, C] normalised, not scaled to [-1, 1]
    ) -> Intensity:
        """The maps of slices."""
        return Intensity(images[..., self.channel].copy())  # a view would keep the other channels

    def masks(
        self, results: Intensity, calibration: FixedThreshold, *, median: bool = False, remove_up_to: int = 0,
        positions: np.ndarray | None = None,
    ) -> Masks:
        """As for every fixed threshold, but without the median filter, whatever is asked for."""
        return super().masks(results, calibration, median=False, remove_up_to=remove_up_to, positions=positions)

    def healthy(self, results: Intensity) -> None:
        """There is none."""


def make_method(config: ml_collections.ConfigDict) -> Method:
    """The method that `config.translation` describes, for the network of `config.model` and `config.diffusion`.

    `forward_steps`, `ddib_steps` and `anoddpm_steps` count original steps: of a respaced schedule, those retained below
    them are walked.

    Raises:
      UserError: for values that cannot be, or a network that does not fit the method.
    """
    wanted = config.translation
    check_choice("method", wanted.method, METHODS)
    check_choice("clipping", wanted.clipping, ("static", "dynamic", "none"))
    modality = tuple(wanted.modality)
    check_modality(modality)
    if max(modality) >= config.model.in_channels:
        channels = config.model.in_channels
        raise UserError(f"translation.modality is {modality}: the network has {channels} channel"
                        f"{'s' if channels > 1 else ''}, from 0 to {channels - 1}")
    if wanted.method in _NEED_CLASSES and config.model.num_classes is None:
        raise UserError(f"translation.method is {wanted.method!r}: it needs a network with classes, and "
                        "model.num_classes is None; use anoddpm-simplex or anoddpm-gaussian with this one")
    return _MAKERS[wanted.method](config)


def _hae(config: ml_collections.ConfigDict) -> Hae:
    wanted = config.translation
    process, steps = _walk(config, "forward_steps")
    return Hae(process, ForwardSettings(
        steps, wanted.guidance, wanted.reference, wanted.d_reverse, tuple(wanted.modality), wanted.maps,
        wanted.t_e_ratio, wanted.last_step_only, wanted.every))


def _ddib(config: ml_collections.ConfigDict) -> Ddib:
    wanted = config.translation
    process, steps = _walk(config, "ddib_steps")
    return Ddib(process, steps, wanted.guidance, wanted.ddib_start, tuple(wanted.modality), wanted.median)


def _anoddpm(noise: str) -> Callable[[ml_collections.ConfigDict], AnoDdpm]:
    def make(config):
        process, steps = _walk(config, "anoddpm_steps")
        return AnoDdpm(process, steps, noise, tuple(config.translation.modality), config.translation.median)

    return make


def _walk(config: ml_collections.ConfigDict, field: str) -> tuple[Process, int]:
    """The process, respaced for translation, and how many of its steps lie below `translation.<field>`."""
    diffusion, wanted = config.diffusion, config.translation
    if not 1 <= wanted[field] <= diffusion.steps:
        raise UserError(f"translation.{field} is {wanted[field]}: it must be in 1..{diffusion.steps} (diffusion.steps)")
    schedule = make_schedule(diffusion.schedule, diffusion.steps, wanted.respacing)
    process = Process(schedule, diffusion.predicts, diffusion.variance, wanted.clipping)
    return process, int(np.count_nonzero(schedule.timesteps < wanted[field]))


_NEED_CLASSES = ("hae", "ddib")
_MAKERS: dict[str, Callable[[ml_collections.ConfigDict], Method]] = {
    "hae": _hae,
    "ddib": _ddib,
    "anoddpm-simplex": _anoddpm("simplex"),
    "anoddpm-gaussian": _anoddpm("gaussian"),
    "threshold": IntensityThreshold.of,
}
METHODS = tuple(_MAKERS)
