"""Lesion localization in arrays, for one volume or a stack of slices, without reading or writing files.

`translate.py` gives the same results for folders of NIfTI files, since both call the same functions for a case.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hae_jax.data.cases import Case
from hae_jax.data.nifti import Grid
from hae_jax.data.slices import (
    SlicedCase,
    SliceGrid,
    from_model_range,
    intensity_scales,
    normalise_volumes,
    resize,
    sliced,
    slices_to_volume,
    to_model_range,
)
from hae_jax.diffusion.process import Process
from hae_jax.errors import UserError
from hae_jax.localization import probability
from hae_jax.localization.batched import IntensityReader, Slice, SliceTranslator
from hae_jax.localization.calibration import Calibration, MapThreshold
from hae_jax.localization.denoisers import Denoisers, GivenDenoisers
from hae_jax.localization.map_threshold import Masks, ValidationSlice, stacked, without_mm
from hae_jax.localization.methods import Method
from hae_jax.localization.residual import Residual, ResidualSettings


class Localized(NamedTuple):
    """Results for a volume [X, Y, Z, C] or for slices [S, H, W, C], on the grid of the input.

    Attributes:
      mask: [X, Y, Z] or [S, H, W] bool, the lesion mask.
      anomaly_map: the same shape, float32; high where there is a lesion.
      pseudo_healthy: the pseudo-healthy reconstruction, the same shape with a last axis of M channels, in the input's
        intensities; None for methods without one.
      slice_scores: [N] float64, the anomaly score of each axial slice, or of each of the S slices.
      lesion_slices: [N] bool, whether the slice is called a lesion slice.
      slice_index: [N] int, position of these slices along the volume's axis from inferior to superior, or 0 .. S-1.
      modality: the M channels of `pseudo_healthy`.
      probability: as `anomaly_map`, in [0, 1]: the probability that the voxel is lesion (`probability.MEANINGS`);
        None if the calibration has no probability curves, and for slices.
      uncertainty: standard deviation of the probability over noise (likewise); None with a single
        noise draw.
    """

    mask: np.ndarray
    anomaly_map: np.ndarray
    pseudo_healthy: np.ndarray | None
    slice_scores: np.ndarray
    lesion_slices: np.ndarray
    slice_index: np.ndarray
    modality: tuple[int, ...]
    probability: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


class Localizer:
    """Finds lesions in arrays with a trained network.

    Example:
      >>> import numpy as np
      >>> from hae_jax import Localizer
      >>> localizer = Localizer.load("phantom", batch_size=4)  # or a run folder, or a folder of exported weights
      >>> volume = np.zeros((64, 64, 4, 4), np.float32)  # X, Y, Z; flair, t1, t1ce, t2
      >>> volume[8:56, 8:56] = 400 + 100 * np.random.default_rng(0).random((48, 48, 4, 4))
      >>> found = localizer(volume, affine=np.diag([-3.0, -3.0, 3.0, 1.0]))
      >>> found.mask.shape, found.slice_scores.shape
      ((64, 64, 4), (4,))

    Attributes:
      method: the method that finds lesions.
      calibration: the thresholds that turn maps into masks; None before `calibrate`.
    """

    def __init__(
        self,
        denoisers: Denoisers | nnx.Module,
        process: Process,
        calibration: MapThreshold | None = None,
        settings: ResidualSettings | None = None,
        *,
        image_size: int,
        channels: int,
        scaling: str = "volume",
        method: Method | None = None,
        seed: int = 0,
        batch_size: int = 32,
        max_memory_gb: float | None = None,
    ):
        """Makes a localizer from any network. For a trained run, use `load`.

        Args:
          denoisers: functions for the network's output under the null condition and under "healthy" (`Denoisers`;
            `numpy_denoisers` for a network outside JAX), or a module with the call signature of `hae_jax.UNet`.
          process: the diffusion process of its training.
          calibration: an existing calibration; None: call `calibrate` before the first use.
          settings: settings of the method `residual`; None: its defaults, with lesions bright in the first channel.
          image_size: height and width of the network's input, pixels.
          channels: number of channels of the network's input.
          scaling: how slices were scaled to [-1, 1] in its training, "slice" or "volume" (`to_model_range`).
          method: another method than `residual`; `process` and `settings` are then ignored.
          seed: seed of the noise.
          batch_size: slices per batch.
          max_memory_gb: use the largest batch that needs at most this memory, instead of `batch_size`.
        """
        # Any: only a method with a network can be called, and only one without has `intensity`.
        chosen: Any = method or Residual(process, settings or ResidualSettings())
        self.method: Method = chosen
        self.calibration: Calibration | MapThreshold | None = calibration
        self._image_size, self._channels, self._scaling = image_size, channels, scaling
        if not self.method.network:
            self._translator = IntensityReader(chosen.intensity)
            return
        model = GivenDenoisers(denoisers) if isinstance(denoisers, Denoisers) else denoisers
        conditional = getattr(getattr(model, "config", None), "num_classes", 2) is not None
        mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
        self._translator = SliceTranslator(model, chosen, batch_size=batch_size, seed=seed, mesh=mesh,
                                           conditional=conditional, max_memory_gb=max_memory_gb)

    @classmethod
    def load(cls, run: str | Path, **settings: Any) -> "Localizer":
        """Loads a trained network with its settings and, if there is one, its calibration.

        Args:
          run: run folder of `train.py`, folder of exported weights, or name of shipped weights ("phantom").
          settings: fields of `config.translation` to change, such as guidance=3.0.

        Raises:
          UserError: there is no network, or a setting does not exist or does not fit.
        """
        from hae_jax.runs import load_run  # avoids a circular import

        loaded = load_run(run, settings)
        config = loaded.config
        process = Process.of(config.diffusion)
        return cls(loaded.model, process, loaded.calibration(), image_size=config.model.image_size,
                   channels=config.model.in_channels, scaling=config.data.scaling, method=loaded.method,
                   seed=config.seed, batch_size=config.translation.batch_size,
                   max_memory_gb=config.translation.max_memory_gb)

    def __call__(
        self,
        images: np.ndarray | Sequence[np.ndarray],  # [X, Y, Z, C], C times [X, Y, Z], or [S, H, W, C]
        affine: np.ndarray | None = None,  # [4, 4]
        *,
        spacing: tuple[float, float, float] | None = None,
        name: str = "",
    ) -> Localized:
        """Finds lesions in a volume or in slices.

        Args:
          images: with an affine, a volume in any orientation, or a list of its channels; without one, axial slices in
            order. Raw intensities with background 0. The channels have the order of the training.
          affine: voxel to mm (RAS+, as nibabel gives it) of a volume; None: `images` are slices.
          spacing: (x, y, z) mm between pixels and between slices, if `images` are slices; None: filters in mm are
            skipped.
          name: part of the seed of the noise, with the position of a slice; `translate.py` uses the name of the case.

        Raises:
          UserError: for an array that does not fit, or without a calibration.
        """
        if self.calibration is None:
            raise UserError("the localizer is not calibrated: call calibrate(slices, labels) with validation slices, "
                            "or load a run that was calibrated")
        volumes = self._checked(images)
        if affine is not None:
            return self._of_volume(volumes, affine, name)
        return self._of_slices(volumes, spacing, name)

    def calibrate(
        self,
        slices: np.ndarray,  # [S, H, W, C] raw intensities
        labels: Sequence[int],  # [S]
        *,
        patients: Sequence[str] | None = None,
        heights: Sequence[float] | None = None,
        masks: np.ndarray | None = None,  # [S, H, W]
        spacing: tuple[float, float, float] | None = None,
    ) -> Calibration | MapThreshold:
        """Chooses the thresholds on validation slices and stores them in `calibration`.

        Args:
          slices: the slices of all validation cases.
          labels: label of each slice; 1: it has a lesion.
          patients: patient of each slice; slices of one patient follow each other and are normalised together. None:
            all slices belong to one patient.
          heights: position of each slice in its head, from 0 (bottom) to 1 (top); None: healthy and lesion slices are
            not matched by height.
          masks: ground truth, only for the rule "dice"; pixels above 0.5 are lesion.
          spacing: (x, y, z) mm between pixels and slices of the input; None: filters in mm are skipped.

        Raises:
          UserError: arrays that do not fit, or slices that are not what the rule needs.
        """
        slices = self._checked(slices)
        count = len(slices)
        patients = ["patient"] * count if patients is None else [str(patient) for patient in patients]
        heights = [0.5] * count if heights is None else heights
        for what, values in (("labels", labels), ("patients", patients), ("heights", heights),
                             ("masks", range(count) if masks is None else masks)):
            if len(values) != count:
                raise UserError(f"{what}: {len(values)} for {count} slices; give one for each slice")
        known, rows = [], []
        for patient in dict.fromkeys(patients):
            own = [i for i, other in enumerate(patients) if other == patient]
            try:
                scales = intensity_scales(slices[own])
            except ValueError as error:
                raise UserError(f"slices of {patient}: {error}; give images with positive intensities") from error
            images, inputs = self._inputs(slices[own], scales)
            rows += _rows(inputs, images, patient)
            truth = np.zeros(images.shape[:3]) if masks is None else resize(
                (np.asarray(masks)[own] > 0.5).astype(np.float32), self._image_size)
            pixels = self._pixel_spacing(spacing, slices.shape[1:3])
            known += [ValidationSlice(int(labels[i]), truth[k] > 0.5, np.any(images[k], axis=-1), float(heights[i]),
                                      patient, patient, k, pixels) for k, i in enumerate(own)]
        method: Method = self.method if spacing is not None else without_mm(self.method)
        self.calibration = method.calibrate(zip(self._translated(rows), known, strict=True), {})
        return self.calibration

    def _of_volume(self, volumes: np.ndarray, affine: np.ndarray, name: str) -> Localized:
        affine = np.asarray(affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
            raise UserError(f"affine: has shape {affine.shape} or cannot be inverted; give the [4, 4] matrix from "
                            "voxels to mm")
        grid = Grid(volumes.shape[:3], affine, nib.Nifti1Header())
        turned = np.stack([grid.reorient(volume) for volume in np.moveaxis(volumes, -1, 0)], axis=-1)
        case = sliced(Case(name, turned, grid.reoriented_affine, grid, None), self._image_size, self._scaling)
        results = stacked(self._translated(_rows(case.inputs, case.slices.images, name, case.slices.index)))
        masks = self.method.masks(results, self.calibration, case.heads, case.slice_grid)
        mask, anomaly = (grid.restore(values) for values in (case.mask_volume(masks.mask), case.volume(masks.map)))
        healthy = self.method.healthy(results)
        maps = ()
        if getattr(self.calibration, "probability", None):
            found = probability.volumes(case, self.method, results, masks, self.calibration)
            maps = (None if values is None else grid.restore(values) for values in found)
        return Localized(mask, anomaly, None if healthy is None else self._healthy(healthy, case), masks.score,
                         masks.lesion, case.slices.index, self.method.modality, *maps)

    def _healthy(self, healthy: np.ndarray, case: SlicedCase) -> np.ndarray:  # [X, Y, Z, M]
        return np.stack([case.grid.restore(case.healthy_volume(healthy[..., m], channel))
                         for m, channel in enumerate(self.method.modality)], axis=-1)

    def _of_slices(self, slices: np.ndarray, spacing: tuple[float, float, float] | None, name: str) -> Localized:
        scales = intensity_scales(slices)
        images, inputs = self._inputs(slices, scales)
        results = stacked(self._translated(_rows(inputs, images, name)))
        heads, shape = np.any(images, axis=-1), slices.shape[1:3]
        grid = SliceGrid(np.arange(len(slices)), self._pixel_spacing(spacing, shape))
        method = self.method if spacing is not None else without_mm(self.method)
        masks: Masks = method.masks(results, self.calibration, heads, grid)
        everywhere = slices.any(axis=-1)
        index, healthy = np.arange(len(slices)), self.method.healthy(results)

        def restored(values: np.ndarray) -> np.ndarray:  # [S, h, w] -> [S, H, W]
            return slices_to_volume(values, index, (*shape, len(index))).transpose(2, 0, 1)

        if healthy is not None:
            channels = list(self.method.modality)
            normalised = from_model_range(healthy, images[..., channels], self._scaling)
            healthy = np.stack([restored(normalised[..., m]) * scales[channel] * everywhere
                                for m, channel in enumerate(channels)], axis=-1)
        return Localized((restored(masks.mask.astype(np.float32)) > 0.5) & everywhere, restored(masks.map) * everywhere,
                         healthy, masks.score, masks.lesion, index, self.method.modality)

    def _checked(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:  # [., ., ., C] float32
        if isinstance(images, list | tuple):
            channels = [np.asarray(channel) for channel in images]
            if len(shapes := {channel.shape for channel in channels}) > 1:
                raise UserError(f"images: the channels have different shapes, {sorted(shapes)}; bring them to one grid")
            images = np.stack(channels, axis=-1) if channels else np.empty(0)
        images = np.asarray(images)
        if not np.issubdtype(images.dtype, np.number) and images.dtype != bool:
            raise UserError("images: hold objects, not numbers; give arrays, of nibabel images get_fdata()")
        if images.ndim != 4 or images.shape[-1] != self._channels or not images.size:
            raise UserError(f"images: have shape {images.shape}, the network takes [X, Y, Z, {self._channels}] or "
                            f"[S, H, W, {self._channels}]")
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise UserError("images: hold NaN or infinite values; replace them")
        if not (images > 0).any(axis=(0, 1, 2)).all():
            raise UserError("images: a channel has no positive value; give raw intensities with background 0")
        return images

    def _inputs(self, slices: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [S, h, w, C] each
        """Slices normalised together and resized, and the same slices in the range of the network's input."""
        images = normalise_volumes(slices, scales).transpose(0, 3, 1, 2)
        images = resize(images, self._image_size).transpose(0, 2, 3, 1)
        return images, to_model_range(images, self._scaling)

    def _translated(self, rows: Iterable[Slice]) -> list[NamedTuple]:
        return [result for _, result in self._translator(rows)]

    def _pixel_spacing(
        self, spacing: tuple[float, float, float] | None, shape: tuple[int, int]
    ) -> tuple[float, float, float] | None:
        """The spacing of the network's pixels, from that of the input's pixels."""
        if spacing is None:
            return None
        x, y, z = spacing
        return x * shape[0] / self._image_size, y * shape[1] / self._image_size, z


def _rows(
    inputs: np.ndarray,  # [S, h, w, C] in the range of the network's input
    images: np.ndarray,  # [S, h, w, C] normalised
    name: str,
    index: Iterable[int] | None = None,  # [S] positions in the volume; None: 0, 1, ...
) -> list[Slice]:
    """The slices of one case or patient, as the translator takes them."""
    positions = range(len(inputs)) if index is None else index
    return [Slice(image, name, int(position), intensity)
            for image, intensity, position in zip(inputs, images, positions, strict=True)]


def numpy_denoisers(denoise: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]) -> Denoisers:
    """Denoisers of a network outside JAX, such as one in PyTorch.

    Args:
      denoise: (x [B, H, W, C] float32, t [B] int32 original timesteps, y [B] int32 class labels or None for the null
        condition) -> the network's output [B, H, W, C].
    """
    def call(x, t, y):
        t = jnp.broadcast_to(t, x.shape[:1])

        def outside(x, t):
            return np.asarray(denoise(np.asarray(x), np.asarray(t, np.int32), y and np.zeros(len(x), np.int32)),
                              np.float32)

        return jax.pure_callback(outside, jax.ShapeDtypeStruct(x.shape, jnp.float32), x, t)

    return Denoisers(lambda x, t: call(x, t, None), lambda x, t: (call(x, t, True), call(x, t, None)))
