"""Export of a trained network as a folder for the Hugging Face Hub: weights, config, calibration and a model card.

`Localizer.load`, `translate.py --checkpoint` and `hae-bids --checkpoint` accept this folder.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hae_jax import __version__
from hae_jax.data.store import MANIFEST
from hae_jax.errors import UserError
from hae_jax.files import folder_written_whole, read_json, write_json
from hae_jax.provenance import RESEARCH_USE
from hae_jax.runs import TrainedRun, load_run
from hae_jax.training.weights import CALIBRATION, CONFIG, WEIGHTS, write_weights

CARD = "README.md"
_SHOWN = (  # part of the metrics, metric, its title in the card
    ("lesion_slices", "dice", "lesion-slice Dice"), ("all_slices", "dice", "all-slice Dice"),
    ("lesion_slices", "auprc", "lesion-slice AUPRC"), ("slice_level", "accuracy", "slice accuracy"),
    ("volumes", "dice", "volume Dice"), ("volumes", "hd95_mm", "HD95, mm"),
    ("volumes", "healthy_volume_ml", "false-positive volume in healthy subjects, ml (mean)"))
_LIMITS = """\
- The network was trained with one label per slice, lesion yes or no. It does not distinguish kinds of lesions.
- The input must be skull-stripped axial slices of the modalities above, registered to each other. Images of other
  scanners, sequences or preprocessing may need a new calibration or a new training.
- Masks depend on the threshold in `calibration.json`. Probabilities depend on the share of lesion slices among the
  validation slices.
- The metrics are valid for the named data only. Subgroups of patients were not evaluated."""


def export_network(
    source: str | Path, folder: str | Path, *, license_id: str = "unknown", results: str | Path | None = None,
    half: bool = False,
) -> list[str]:
    """Writes the folder, whole or not at all.

    Args:
      source: a run folder, a folder of exported weights, or the name of shipped ones.
      folder: the folder to write, which must be new or empty.
      license_id: licence of the weights in the Hub's notation, such as "apache-2.0".
      results: results of `translate.py` with this network, whose metrics are added to the card; None: no metrics.
      half: write the weights in half precision. If they are not yet, the calibration does not fit them and is left
        out.

    Returns:
      Lines for the user.

    Raises:
      UserError: there is no network, the folder is not empty, or the results are from another network.
    """
    run = load_run(source)
    metrics = None if results is None else _metrics(Path(results), run)
    said = []
    try:
        with folder_written_whole(folder) as temporary:
            exported = (run.folder / WEIGHTS).is_file()
            rounded = half and not (exported and read_json(run.folder / CONFIG).get("parameters") is None)
            if exported and not rounded:
                for name in (WEIGHTS, CONFIG):
                    shutil.copyfile(run.folder / name, temporary / name)
            else:
                config = json.loads(json.dumps(run.config.to_dict()))
                write_weights(temporary, run.model, config, run.identity["step"],
                              parameters=None if half else run.identity["parameters"])
            calibration = None if rounded else run.calibration()
            if calibration is None:
                said.append("the folder has no calibration: " + (
                    "half precision changes the weights" if rounded else "this network has none with its settings")
                    + "; users must calibrate on validation slices, or give a calibration with --calibration")
            else:
                write_json(temporary / CALIBRATION, dataclasses.asdict(calibration))
            (temporary / CARD).write_text("\n".join(_card(run, calibration, license_id, metrics)), encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"{folder}: is not empty; give a new folder") from error
    return said


def _metrics(results: Path, run: TrainedRun) -> dict[str, Any]:
    path = results / "metrics.json"
    try:
        found = read_json(path)
        weights = found["checkpoint"].get("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a folder that translate.py has finished") from error
    if weights != run.identity["sha256"]:
        raise UserError(f"{path}: was made with another network; run translate.py --checkpoint {run.folder}, or leave "
                        "--results out")
    return found


def _card(run: TrainedRun, calibration: Any, license_id: str, metrics: Mapping[str, Any] | None) -> Iterator[str]:
    config = run.config
    yield from ["---", "library_name: hae-jax", f"license: {license_id}", "pipeline_tag: image-segmentation",
                "tags: [medical, mri, brain, anomaly-detection, diffusion, jax]",
                *(["metrics: [dice]"] if metrics else []), "---", "",
                f"# {config.model.variant}, {config.model.image_size} px, {', '.join(config.data.modalities)}", "",
                "A class-conditional diffusion U-Net that finds lesions in brain MRI, for HAE-JAX.", "",
                RESEARCH_USE, "", "## Use", "", "In a clone of HAE-JAX:", "", "    pip install .",
                "    hae-translate --checkpoint THIS_FOLDER --input CASES --output RESULTS", "",
                "or `hae_jax.Localizer.load(\"THIS_FOLDER\")(volume, affine)` in Python.", "",
                "## Training data", "", *_training(config), "", "## Training", ""]
    training = config.training
    yield from [f"- Step {run.identity['step']} of {training.steps}, batch {training.batch_size}, "
                f"{run.identity['parameters']}, seed {config.seed}, written by HAE-JAX {__version__}.",
                f"- Weights: SHA-256 `{run.identity['sha256']}` (weights and their use).", "", "## Calibration", ""]
    yield ("None. Calibrate on validation slices with image labels." if calibration is None else
           f"`calibration.json`: method `{config.translation.method}`, "
           + (calibration.described() if hasattr(calibration, "described") else "as published") + ".")
    yield from ["", "## Metrics", "", *_table(metrics), "", "## Limits", "", _LIMITS, ""]


def _training(config: Any) -> Iterator[str]:
    """Yields the lines about the training data. The size is given only if the prepared dataset is available."""
    data = config.data
    what = Path(data.root).name if data.phantom is None else "phantom: template anatomy with drawn lesions, no patients"
    yield f"- Dataset: {what}. Modalities: {', '.join(data.modalities)}. Labels: one per slice, lesion yes or no."
    try:
        split = read_json(Path(data.root) / MANIFEST)["split"]
        yield "- " + ", ".join(f"{name}: {len(cases)} cases" for name, cases in split.items()) + "."
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield "- The prepared dataset was not available when this card was written; add its size and origin."


def _table(metrics: Mapping[str, Any] | None) -> Iterator[str]:
    if metrics is None:
        yield "None were measured when this card was written (`hae-export --results FOLDER` adds them)."
        return
    yield (f"{'PHANTOM metrics' if metrics['phantom'] else 'Metrics'} from {metrics['cases']} cases, method "
           f"`{metrics['method']}`, threshold by the rule `{metrics['rule']}`, which has seen {metrics['labels']}; "
           "95 % bootstrap interval over patients.")
    yield from ["", "| metric | mean | 95 % interval | cases |", "|---|---:|---:|---:|"]
    for part, name, title in _SHOWN:
        found = metrics["results"].get(part, {}).get(name)
        if found and found.get("mean") is not None:
            yield f"| {title} | {found['mean']:.3f} | {_interval(found)} | {found['cases']} |"


def _interval(found: Mapping[str, Any]) -> str:
    return "-" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
