"""Ablation: compares settings of the method `residual` on slices of the validation split.

Choose settings by expected Dice times slice AUC, which need image labels only. Test subjects are not used.
`hae_jax.commands.ablate` calls this module.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hae_jax import files, provenance
from hae_jax.data.store import Store
from hae_jax.errors import UserError
from hae_jax.localization.batched import IntensityReader, SliceTranslator
from hae_jax.localization.measures import Measures, masks_dice, measure
from hae_jax.localization.methods import IntensityThreshold, make_method
from hae_jax.localization.residual import Residual
from hae_jax.pipeline.calibrations import validation_results

_BLOCK = 8  # neighbouring slices in a block
_GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly
_HEADS = {"expected_dice": "expected Dice", "lesion_share": "lesion share", "slice_auc": "slice AUC",
          "slice_accuracy": "slice accuracy", "auprc": "lesion-slice AUPRC",
          "best_dice": "lesion-slice Dice at the best single threshold (upper bound)",
          "mixture_dice": "lesion-slice Dice, rule mixture", "fpr_dice": "lesion-slice Dice, rule healthy_fpr"}
# Fields that do not change what the network computes.
_FILTERS = {"filters", "across_mm", "head_erosion_mm", "median_mm", "smallest_ml"}


def variations(config: ml_collections.ConfigDict) -> list[tuple[str, dict[str, Any]]]:
    """The variants to compare: the config's settings, and variants that each change one of them."""
    wanted = config.translation
    times = tuple(wanted.timesteps)
    rows = [("as configured", {})]
    scaled = [tuple(round(t * factor) for t in times) for factor in (0.5, 2, 4)]
    rows += [(f"timesteps {', '.join(map(str, own))}", {"timesteps": own})
             for own in scaled if max(own) < config.diffusion.steps]
    rows += [(f"one timestep, {times[len(times) // 2]}", {"timesteps": times[len(times) // 2:len(times) // 2 + 1]})]
    rows += [("guidance off", {"guidance": 0.0})]
    rows += [(f"guidance {w:g}", {"guidance": w}) for w in (1.0, 4.0) if w != wanted.guidance]
    rows += [(f"{n} noise draws", {"draws": n}) for n in (2, 4) if n != wanted.draws]
    rows += [(f"{n} rounds", {"rounds": n}) for n in (2, 3) if n != wanted.rounds]
    rows += [("positive part before the mean", {"rectify": "before"}), ("absolute residual", {"rectify": "never"})]
    rows += [(f"smoothing {s:g} px", {"smoothing": s}) for s in (0.0, 1.0, 1.5) if s != wanted.smoothing]
    names = tuple(config.data.modalities)
    if len(names) > 1:
        rows += [(f"{name} alone", {"weights": tuple(float(other == name) * (-1 if name == "t1" else 1)
                                                     for other in names)}) for name in names if name != "t1ce"]
    rows += [("not smoothed across slices", {"filters": "mm", "across_mm": 0.0}),
             ("head eroded by 4 mm", {"filters": "mm", "head_erosion_mm": 4.0}),
             ("components of any size", {"filters": "mm", "smallest_ml": 0.0}),
             ("components from 1 ml", {"filters": "mm", "smallest_ml": 1.0}),
             ("median of 10 mm", {"filters": "mm", "median_mm": 10.0})]
    return rows


class _Row(NamedTuple):
    name: str
    passes: int
    values: Measures
    masks_dice: float
    seconds: float  # per slice; NaN: no network was run


def ablate(
    model: nnx.Module, config: ml_collections.ConfigDict, mesh: Mesh, store: Store, rows: Sequence[tuple[str, Mapping]],
    *, slices: int, output: Path,
) -> Path:
    """Measures each row on validation slices and writes ablation.md and ablation.json to `output`.

    Args:
      model: a network with classes.
      config: the config tree of its training.
      store: of which the validation split is used.
      rows: names, each with the fields of `config.translation` that it changes.
      slices: how many, in blocks of 8 neighbours.
      output: folder, made if absent.

    Returns:
      The page.

    Raises:
      UserError: if the validation split has not both classes of slices, or settings do not fit.
    """
    output.mkdir(parents=True, exist_ok=True)
    chosen = _blocks(len(store.split("val")), slices)
    if len(set(store.split("val").rows["labels"][chosen] > 0)) < 2:
        raise UserError(f"{store.root}: the chosen validation slices are of one class; prepare data with both classes, "
                        "or use more --slices")
    flair = IntensityThreshold.of(config)
    items = list(validation_results(IntensityReader(flair.intensity), store, config.data.scaling, chosen))
    found = [_Row("intensity itself", 0, measure(flair, items), masks_dice(flair, items), math.nan)]
    _write(output, config, found, len(chosen))
    unchanged = None  # the maps of the config's own settings
    for name, changes in rows:
        own = copy.deepcopy(config)
        own.translation.method = "residual"
        own.translation.update(changes)
        method = make_method(own)
        assert isinstance(method, Residual)  # as named above
        seconds, filters_alone = math.nan, set(changes) <= _FILTERS
        if not filters_alone or unchanged is None:
            translator = SliceTranslator(model, method, batch_size=own.translation.batch_size, seed=config.seed,
                                         mesh=mesh)
            translator.prepare(tuple(store.manifest["slice_shape"]))
            start = time.monotonic()
            items = list(validation_results(translator, store, config.data.scaling, chosen, name))
            seconds = (time.monotonic() - start) / len(chosen)
            unchanged = items if filters_alone else unchanged
        else:
            items = unchanged
        found.append(_Row(name, method.passes, measure(method, items), masks_dice(method, items), seconds))
        _write(output, config, found, len(chosen))
    return output / "ablation.md"


def _blocks(total: int, wanted: int) -> np.ndarray:  # [n] rising
    """Rows of a split in blocks of neighbouring slices, which smoothing across slices needs.

    Each block lies at another place of its part of the split. Equal distances could select the same heights of all
    subjects, for example their lowest slices.
    """
    count = max(1, min(wanted, total) // _BLOCK)
    place = np.arange(count) * _GOLDEN % 1
    starts = ((np.arange(count) + place) * total / count).astype(int)
    return np.unique(np.minimum(starts[:, None] + np.arange(_BLOCK), total - 1))


def _write(output: Path, config: ml_collections.ConfigDict, rows: Sequence[_Row], slices: int) -> None:
    """Writes the tables. It is called after each row, so that a stopped run keeps its results."""
    head = ["settings", "passes", *_HEADS.values(), "Dice of the final masks in lesion slices", "seconds per slice"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[row.name, str(row.passes), *(f"{value:.3f}" for value in (*row.values, row.masks_dice, row.seconds))]
              for row in rows]
    phantom = config.data.phantom is not None
    page = [f"# {'PHANTOM metrics' if phantom else 'Metrics'} of {slices} validation slices", "",
            *(f"| {' | '.join('-' if cell == 'nan' else cell for cell in line)} |" for line in lines), "",
            "Expected Dice, lesion share, slice AUC and slice accuracy come from image labels alone, the other columns "
            "from ground truth. Lesion-slice AUPRC counts all head pixels. Lesion-slice Dice is measured before the "
            "filters of masks. The final masks have passed the filters and are empty in slices that are called "
            "healthy. Thresholds are chosen on the same slices. Components are cut at the ends of blocks of "
            f"{_BLOCK} slices.", "", provenance.RESEARCH_USE, ""]
    with files.written_whole(output / "ablation.md") as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")
    files.write_json(output / "ablation.json", {
        "rows": [{"settings": row.name, "passes": row.passes} | {
            field: None if math.isnan(value) else value
            for field, value in (row.values._asdict() | {"masks_dice": row.masks_dice}).items()} for row in rows],
        "config": config.to_dict(), "made_by": provenance.record()})
