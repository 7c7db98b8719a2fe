"""Folders of results and of runs, as the commands write them, made quickly for tests of the report page."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from run_helpers import AFFINE, SHAPE, write_case

THRESHOLD = 0.4
SLICES = list(range(1, SHAPE[2] - 1))
LESION = (slice(6, 13), slice(8, 15), slice(3, 6))  # in the file's axes, as in write_case


def write_results(root: Path, names=("a", "b"), *, volumes=True) -> Path:
    """Writes translated cases to root/out, the first one with a lesion. Their images are in root/in.

    Args:
      root: an empty folder.
      names: names of the cases.
      volumes: False writes only rows and scores.
    """
    out = root / "out"
    (out / "slices").mkdir(parents=True)
    (out / "records").mkdir()
    rows = []
    for i, name in enumerate(names):
        lesion = i == 0
        scores = [round(0.1 + 0.01 * i + (0.6 if lesion and 3 <= z < 6 else 0.02 * z), 4) for z in SLICES]
        if volumes:
            write_case(root / "in", name, seed=i, lesion=lesion)
            _write_volumes(out, name, lesion)
        _write_slices(out, root / "in", name, scores, lesion)
        rows.append({"case": name, "volume_ml": 1.06 if lesion else 0.0, "true_volume_ml": 1.06 if lesion else 0.0,
                     "dice": 0.9 if lesion else 1.0, "iou": 0.8, "slices": len(SLICES),
                     "lesion_slices": 3 if lesion else 0, "anomaly_score": max(scores), "seconds": 1.0})
        record = {"row": rows[-1], "failed": None, "files": [], "folder": str(root / "in" / name)}
        (out / "records" / f"{name}.json").write_text(json.dumps(record))
    with (out / "cases.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _write_tables(root, out)
    return out


def write_run(folder: Path, *, steps=6, samples=2) -> Path:
    """A run in progress. The log's last line is incomplete."""
    (folder / "samples").mkdir(parents=True)
    (folder / "checkpoints" / "4").mkdir(parents=True)
    lines = [{"step": step, "loss": 1 / step, "loss_t1of4": 2 / step, "learning_rate": 1e-3, "images_per_second": 9.0,
              "input_wait_share": 0.01} | ({"localization_dice": step / 10} if step % 2 == 0 else {})
             for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')
    (folder / "config.json").write_text(json.dumps({"seed": 0, "training": {"steps": 100}, "data": {"root": "data/x"}}))
    (folder / "run.json").write_text(json.dumps({"command": ["train.py", "--workdir", str(folder)], "versions": {}}))
    for i in range(samples):
        Image.new("L", (40, 30), 80 * i + 40).save(folder / "samples" / f"step_{i + 1:07}.png")
    return folder


def _write_volumes(out: Path, name: str, lesion: bool) -> None:
    mask, anomaly = np.zeros(SHAPE, np.uint8), np.full(SHAPE, 0.05, np.float32)
    if lesion:
        mask[LESION], anomaly[LESION] = 1, 0.7
    healthy = np.full(SHAPE, 70, np.float32)
    for kind, values in (("mask", mask), ("map", anomaly), ("healthy_flair", healthy)):
        image = nib.Nifti1Image(values, AFFINE)
        nib.save(image, out / f"{name}_{kind}.nii.gz")


def _write_slices(out: Path, cases: Path, name: str, scores: list[float], lesion: bool) -> None:
    images = [{"modality": modality, "path": str(cases / name / f"{name}_{modality}.nii.gz"), "volume": None,
               "volumes": 1} for modality in ("flair", "t1", "t1ce", "t2")]
    (out / "slices" / f"{name}.json").write_text(json.dumps({
        "images": images, "segmentation": str(cases / name / f"{name}_seg.nii.gz"), "warnings": [], "slice": SLICES,
        "anomaly_score": scores, "lesion": [score >= THRESHOLD for score in scores],
        "truth": [lesion and 3 <= z < 6 for z in SLICES]}))


def _write_tables(root: Path, out: Path) -> None:
    identity = {"path": str(root / "runs/a/model.safetensors"), "step": 8000, "parameters": "ema", "sha256": "0" * 64}
    (out / "calibration.json").write_text(json.dumps({
        "method": "residual", "rule": "healthy_fpr", "labels": "image labels", "threshold": THRESHOLD,
        "slice_threshold": THRESHOLD, "slice_errors": 1, "slice_auc": 0.97, "healthy_slices": 3, "lesion_slices": 2,
        "made_with": {"data": {"root": str(root / "data")}},
        "slice_scores": {"edges": [0, 0.3, 0.6, 0.9], "healthy": [2, 1, 0], "lesion": [0, 1, 1]}}))
    dice = {"mean": 0.9, "low": 0.8, "high": 0.95, "cases": 1}
    (out / "metrics.json").write_text(json.dumps({
        "results": {"volumes": {"dice": dice}}, "baselines": {"threshold": {"volumes": {"dice": dice}}},
        "method": "residual", "rule": "healthy_fpr", "labels": "image labels", "image_size": 64, "phantom": True,
        "definitions": {"volumes": {"dice": "volume Dice, over the lesion cases"}}}))
    (out / "manifest.json").write_text(json.dumps({
        "created": "2026-01-01T00:00:00+00:00", "command": ["translate.py", "--input", str(root / "in")],
        "checkpoint": identity, "seconds": 12.0, "seed": 0, "phantom": True, "versions": {"jax": "0.10.2"},
        "failed": {"z": f"{root / 'in' / 'z' / 'z_t1.nii.gz'}: missing, copy it again"},
        "config": {"data": {"modalities": ["flair", "t1", "t1ce", "t2"]}}}))
