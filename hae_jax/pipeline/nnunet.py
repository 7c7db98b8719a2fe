"""Export of a run's masks as a training set for nnU-Net, to train a segmentation network without manual masks."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hae_jax.data.cases import CaseFiles, read_case
from hae_jax.data.nifti import read_volume, write_volume
from hae_jax.errors import UserError
from hae_jax.files import folder_written_whole, write_json
from hae_jax.pipeline.results_folder import read_manifest
from hae_jax.provenance import RESEARCH_USE
from hae_jax.report.cases import translated_files

ORDER = "sure_cases.csv"
_ML = 1000.0  # mm^3


class _Ranked(NamedTuple):
    case: CaseFiles
    sureness: float
    lesion_ml: float


def export_nnunet(results: str | Path, folder: str | Path, cases: int | None = None) -> list[str]:
    """Writes imagesTr, labelsTr, dataset.json and `ORDER`, whole or not at all.

    Cases are ordered by the certainty of their masks, the most certain first. The certainty is the Dice that the
    probability map predicts: (2 sum of p in the mask + 1 ml) / (volume of the mask + sum of p + 1 ml). It is near 1 for
    an empty mask if all probabilities are low.

    Args:
      results: folder of a finished run with `save_probability`.
      folder: the dataset, such as nnUNet_raw/Dataset501_Lesion; not there yet or empty.
      cases: how many of the most certain ones to take; None: all.

    Returns:
      The names of the cases, the most certain first.

    Raises:
      UserError: the run is not finished or has no probabilities, an image is not there any more, or the folder is not
        empty.
    """
    results = Path(results)
    manifest = _manifest(results)
    modalities = tuple(manifest["config"]["data"]["modalities"])
    if cases is not None and cases < 1:
        raise UserError(f"--cases {cases}: give at least 1, or leave it out to take all")
    ranked = sorted((_ranked(results, case) for case in _cases(results, manifest)),
                    key=lambda found: -found.sureness)[:cases]
    try:
        with folder_written_whole(folder) as temporary:
            for found in ranked:
                _write_case(temporary, results, found.case)
            _write_order(temporary / ORDER, ranked)
            write_json(temporary / "dataset.json", {
                "channel_names": {str(i): name for i, name in enumerate(modalities)},
                "labels": {"background": 0, "lesion": 1}, "numTraining": len(ranked), "file_ending": ".nii.gz",
                "name": Path(folder).name, "description": "Labels are masks found by HAE-JAX, not drawn by hand. "
                f"{RESEARCH_USE}", "checkpoint": manifest.get("checkpoint")})
    except FileExistsError as error:
        raise UserError(f"{folder}: is not empty; give a new folder") from error
    return [found.case.name for found in ranked]


def _manifest(results: Path) -> dict[str, Any]:
    found = read_manifest(results)
    finished = {name: facts for name, facts in found["cases"].items() if f"{name}_mask.nii.gz" in facts["files"]}
    if not finished:
        raise UserError(f"{results}: has no finished case")
    if lacking := [name for name, facts in finished.items() if f"{name}_probability.nii.gz" not in facts["files"]]:
        raise UserError(f"{results}: has no probability map of {lacking[0]}, which is needed to rank the cases; run "
                        "translate.py again with --save-probability")
    return {**found, "cases": finished}


def _cases(results: Path, manifest: Mapping[str, Any]) -> list[CaseFiles]:
    found = []
    for name in manifest["cases"]:
        case = translated_files(results, name)
        if case is None:
            raise UserError(f"{results}: slices/{name}.json is missing or damaged; run translate.py again with "
                            "--overwrite")
        if lost := [image.path for image in case.images if not image.path.is_file()]:
            raise UserError(f"{lost[0]}: no longer exists, so {name} cannot be exported")
        found.append(case)
    return found


def _ranked(results: Path, case: CaseFiles) -> _Ranked:
    probability, grid = read_volume(results / f"{case.name}_probability.nii.gz")
    mask = read_volume(results / f"{case.name}_mask.nii.gz")[0] > 0
    ml = abs(np.linalg.det(grid.affine[:3, :3])) / _ML
    inside, expected, volume = (ml * float(values.sum(dtype=np.float64))
                                for values in (probability[mask], probability, mask))
    return _Ranked(case, (2 * inside + 1) / (volume + expected + 1), volume)


def _write_case(folder: Path, results: Path, files: CaseFiles) -> None:
    """Writes all channels and the label on one grid, with the same header, as nnU-Net requires."""
    case = read_case(files)
    for channel in range(case.volumes.shape[-1]):
        write_volume(folder / "imagesTr" / f"{case.name}_{channel:04d}.nii.gz", case.volumes[..., channel], case.grid,
                     "image, written by HAE-JAX")
    label, _ = read_volume(results / f"{case.name}_mask.nii.gz")
    write_volume(folder / "labelsTr" / f"{case.name}.nii.gz", (label > 0).astype(np.uint8), case.grid,
                 "lesion mask, HAE-JAX, research use only")


def _write_order(path: Path, ranked: list[_Ranked]) -> None:
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["case", "sureness", "lesion_ml"])
        writer.writerows([found.case.name, f"{found.sureness:.4f}", f"{found.lesion_ml:.3f}"] for found in ranked)
