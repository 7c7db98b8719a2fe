"""The methods that find lesions, with one interface: ours, the published forward process, and the baselines.

`make_method` makes a method from the configuration. `batched.py` runs it, `pipeline.calibrations` calibrates it, and
`pipeline.per_case` makes masks with it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import ml_collections
import numpy as np

from hae_jax.data.slices import VOLUME_RANGE, SliceGrid
from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.localization import rules
from hae_jax.localization.calibration import Calibration, MapThreshold
from hae_jax.localization.counterparts import AnoDdpm, ClassifierGuidance, Dae, Ddib
from hae_jax.localization.denoisers import check_choice, check_modality
from hae_jax.localization.forward_process import ForwardSettings
from hae_jax.localization.map_threshold import (
    NO_FILTERS,
    Filters,
    MapThresholdMethod,
    Masks,
    PhysicalFilters,
    ValidationSlice,
)
from hae_jax.localization.published import Hae, PixelFilters
from hae_jax.localization.residual import Residual, ResidualSettings

# The weight of a modality in the residual: positive if lesions are bright in it, negative if they are dark.
_WEIGHTS = {"flair": 1.0, "t1": -0.5, "t1ce": 0.0, "t2": 0.5}


class Method(Protocol):
    """The interface of all methods. A method with a network is callable; one without has `intensity` instead.

    `__call__(denoisers, x0 [B, H, W, C] in [-1, 1], keys [B])` is pure and returns a NamedTuple of arrays [B, ...].
    `intensity(images [S, H, W, C], normalised by volume)` returns the same from the slices only.

    Attributes:
      name: name on the command line.
      network: whether it needs a network.
      rule: the rule that chooses the threshold (`rules.LABELS`).
      modality: channels of the pseudo-healthy reconstruction.
      passes: network passes per slice.
    """

    name: str
    network: bool
    rule: str
    modality: tuple[int, ...]
    passes: int
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # methods are dataclasses

    def calibrate(
        self, results: Iterable[tuple[Any, ValidationSlice]], made_with: Mapping[str, Any]
    ) -> Calibration | MapThreshold:
        """Calibrates the method on validation slices, each with its result."""
        ...

    def read_calibration(self, fields: Any) -> Calibration | MapThreshold:
        """Reads a result of `calibrate` from a JSON object with its fields."""
        ...

    def masks(self, results: Any, calibration: Any, heads: np.ndarray, grid: SliceGrid) -> Masks:
        """The masks of a case's stacked results [S, ...] in its heads [S, H, W] bool."""
        ...

    def healthy(self, results: Any) -> np.ndarray | None:
        """The pseudo-healthy reconstructions, [S, H, W, M] in [-1, 1]; None if the method makes none."""


class Intensity(NamedTuple):
    """The result of the intensity threshold for slices."""

    map: np.ndarray  # [S, H, W]


@dataclasses.dataclass(frozen=True)
class IntensityThreshold(MapThresholdMethod, Method):
    """The trivial baseline: bright pixels on flair are lesion. Without flair, bright or dark pixels on another channel.

    The map is the normalised intensity, inverted if lesions are dark. It is never filtered by a median. Slices that are
    called healthy keep their masks, since the score of a threshold is too uncertain to remove them.

    Attributes:
      channel: the channel with the threshold.
      dark: whether lesions are dark in it.
    """

    channel: int = 0
    dark: bool = False
    filters: Filters = dataclasses.field(default=NO_FILTERS, kw_only=True)

    name: ClassVar[str] = "threshold"
    network: ClassVar[bool] = False
    passes: ClassVar[int] = 0
    gated: ClassVar[bool] = False

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "IntensityThreshold":
        """Makes the method for flair, or else for the channel with the largest weight in the residual."""
        names = tuple(config.data.modalities)
        filters = _filters(config, "pixels")
        if isinstance(filters, PixelFilters):
            filters = dataclasses.replace(filters, median=False)
        common = {"rule": _rule(config, "dice"), "healthy_fpr": config.translation.healthy_fpr, "filters": filters}
        if "flair" in names:
            return cls(names.index("flair"), **common)
        weights = config.translation.weights or [_WEIGHTS.get(name, 1.0) or 1.0 for name in names]
        channel = int(np.argmax(np.abs(weights)))
        return cls(channel, weights[channel] < 0, **common)

    @property
    def modality(self) -> tuple[int, ...]:
        """The channel with the threshold."""
        return (self.channel,)

    def intensity(
        self,
        images: np.ndarray,  # [S, H, W, C] normalised, not scaled to [-1, 1]
    ) -> Intensity:
        """The maps of slices."""
        image = images[..., self.channel]
        return Intensity(np.maximum(VOLUME_RANGE - image, 0) if self.dark else image.copy())  # not a view of all


def make_method(config: ml_collections.ConfigDict) -> Method:
    """The method that `config.translation` describes, for the network of `config.model` and `config.diffusion`.

    `forward_steps`, `ddib_steps`, `anoddpm_steps` and `classifier_steps` count original steps: of a respaced schedule,
    those retained below them are walked.

    Raises:
      UserError: for values that cannot be, or a network that does not fit the method.
    """
    wanted = config.translation
    check_choice("method", wanted.method, tuple(METHODS))
    check_choice("clipping", wanted.clipping, ("static", "dynamic", "none"))
    if wanted.rule is not None:
        check_choice("rule", wanted.rule, tuple(rules.LABELS))
    modality = tuple(wanted.modality)
    check_modality(modality)
    if max(modality) >= config.model.in_channels:
        channels = config.model.in_channels
        raise UserError(f"translation.modality is {modality}: the network has {channels} channel"
                        f"{'s' if channels > 1 else ''}, from 0 to {channels - 1}")
    if wanted.method in _NEED_CLASSES and config.model.num_classes is None:
        raise UserError(f"translation.method is {wanted.method!r}: it needs a network with classes, and "
                        "model.num_classes is None; use anoddpm-simplex or anoddpm-gaussian with this one")
    return METHODS[wanted.method](config)


def _rule(config: ml_collections.ConfigDict, own: str) -> str:
    return config.translation.rule or own


def _filters(config: ml_collections.ConfigDict, own: str) -> Filters:
    wanted = config.translation
    kind = wanted.filters or own
    check_choice("filters", kind, ("pixels", "mm"))
    if kind == "mm":
        return PhysicalFilters(wanted.across_mm, wanted.head_erosion_mm, wanted.median_mm, wanted.smallest_ml)
    return PixelFilters(wanted.median, wanted.components, wanted.filter_dimensions)


def _of_every_method(config: ml_collections.ConfigDict, rule: str, filters: str) -> dict[str, Any]:
    return {"rule": _rule(config, rule), "healthy_fpr": config.translation.healthy_fpr,
            "filters": _filters(config, filters)}


def channel_weights(config: ml_collections.ConfigDict) -> tuple[float, ...]:
    """The weight of each channel in the residual, with the sign that a lesion has in it.

    Raises:
      UserError: not one for each channel, all 0, or a channel of unknown sign.
    """
    names, given = tuple(config.data.modalities), config.translation.weights
    if given is None:
        if unknown := [name for name in names if name not in _WEIGHTS]:
            raise UserError(f"translation.weights is None, and the sign of a lesion in {', '.join(unknown)} is not "
                            f"known; give {len(names)} numbers, above 0 where lesions are bright and below where dark")
        given = tuple(_WEIGHTS[name] for name in names)
    if len(given) != len(names) or not any(given):
        raise UserError(f"translation.weights is {tuple(given)}: give {len(names)} numbers, one for each of "
                        f"{', '.join(names)}, not all 0")
    return tuple(given)


def residual_method(config: ml_collections.ConfigDict) -> Residual:
    """The method `residual` of `config.translation`, whatever method that names.

    Raises:
      UserError: for values that cannot be.
    """
    wanted = config.translation
    weights = channel_weights(config)
    modality = tuple(i for i, weight in enumerate(weights) if weight)
    if max(wanted.timesteps, default=0) >= config.diffusion.steps:
        raise UserError(f"translation.timesteps is {tuple(wanted.timesteps)}: they must be below diffusion.steps, "
                        f"{config.diffusion.steps}")
    # The process is not respaced, since the residual uses only the chosen timesteps.
    process = Process.of(config.diffusion, clipping=wanted.clipping)
    settings = ResidualSettings(wanted.timesteps, wanted.guidance, wanted.draws, wanted.rounds, modality,
                                tuple(weights[i] for i in modality), wanted.smoothing, wanted.rectify)
    return Residual(process, settings, **_of_every_method(config, "healthy_fpr", "mm"))


def _hae(config: ml_collections.ConfigDict) -> Hae:
    wanted = config.translation
    process, steps = _walk(config, "forward_steps")
    return Hae(process, ForwardSettings(
        steps, wanted.guidance, wanted.reference, wanted.d_reverse, tuple(wanted.modality), wanted.maps,
        wanted.t_e_ratio, wanted.last_step_only, wanted.every, wanted.inversion),
        **_of_every_method(config, "quantile", "pixels"))


def _ddib(config: ml_collections.ConfigDict) -> Ddib:
    wanted = config.translation
    process, steps = _walk(config, "ddib_steps")
    return Ddib(process, steps, wanted.guidance, wanted.ddib_start, tuple(wanted.modality),
                **_of_every_method(config, "dice", "pixels"))


def _anoddpm(noise: str) -> Callable[[ml_collections.ConfigDict], AnoDdpm]:
    def make(config):
        process, steps = _walk(config, "anoddpm_steps")
        return AnoDdpm(process, steps, noise, tuple(config.translation.modality),
                       **_of_every_method(config, "dice", "pixels"))

    return make


def _classifier(config: ml_collections.ConfigDict) -> ClassifierGuidance:
    process, steps = _walk(config, "classifier_steps")
    return ClassifierGuidance(process, steps, config.translation.classifier_scale, tuple(config.translation.modality),
                              **_of_every_method(config, "dice", "pixels"))


def _dae(config: ml_collections.ConfigDict) -> Dae:
    process = Process.of(config.diffusion, clipping=config.translation.clipping)
    return Dae(process, tuple(config.translation.modality), **_of_every_method(config, "dice", "pixels"))


def _walk(config: ml_collections.ConfigDict, field: str) -> tuple[Process, int]:
    """The process, respaced for translation, and the number of its steps below `translation.<field>`."""
    diffusion, wanted = config.diffusion, config.translation
    if not 1 <= wanted[field] <= diffusion.steps:
        raise UserError(f"translation.{field} is {wanted[field]}: it must be in 1..{diffusion.steps} (diffusion.steps)")
    process = Process.of(diffusion, wanted.respacing, wanted.clipping)
    return process, int(np.count_nonzero(process.schedule.timesteps < wanted[field]))


_NEED_CLASSES = ("residual", "hae", "ddib")
# By name on the command line. The type is Any and not `Method`, since some fields are properties or class variables.
METHODS: dict[str, Callable[[ml_collections.ConfigDict], Any]] = {
    "residual": residual_method,
    "hae": _hae,
    "ddib": _ddib,
    "anoddpm-simplex": _anoddpm("simplex"),
    "anoddpm-gaussian": _anoddpm("gaussian"),
    "classifier": _classifier,
    "dae": _dae,
    "threshold": IntensityThreshold.of,
}
