"""Helpers for tests of whole runs."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from hae_jax.data.cases import MODALITIES

IDENTITY = {"path": "runs/a/1", "step": 1, "parameters": "params"}
SHAPE = (20, 24, 9)
AFFINE = np.array([[-1.5, 0.1, 0, 12], [0.1, -1.2, 0, 30.5], [0, 0, 4, -20], [0, 0, 0, 1]])


def read_json(path: Path):
    return json.loads(path.read_text())


def read_volume(path: Path):
    return np.asarray(nib.load(path).dataobj).copy()


def write_case(folder, name, seed, lesion=True, affine=AFFINE, segmented=True):
    """Writes a bright ball in noise as a BraTS 2021 case. The lowest and highest slices are empty."""
    rng = np.random.default_rng(seed)
    volumes = rng.integers(50, 100, (4, *SHAPE)).astype(np.int16)
    volumes[..., [0, -1]] = 0
    truth = np.zeros(SHAPE, np.uint8)
    if lesion:
        truth[6:13, 8:15, 3:6] = 2
    volumes[:, truth > 0] += np.int16(150)
    (folder / name).mkdir(parents=True)
    for suffix, data in zip((*MODALITIES, "seg"), (*volumes, truth), strict=True):
        if suffix != "seg" or segmented:
            image = nib.Nifti1Image(data, affine)
            image.set_qform(affine, 1)
            image.set_sform(affine, 4)
            image.header.set_xyzt_units("mm", "sec")
            nib.save(image, folder / name / f"{name}_{suffix}.nii.gz")
