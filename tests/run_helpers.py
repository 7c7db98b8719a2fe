"""What tests of whole runs share."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

IDENTITY = {"path": "runs/a/1", "step": 1, "parameters": "params"}


def read_json(path: Path):
    return json.loads(path.read_text())


def read_volume(path: Path):
    return np.asarray(nib.load(path).dataobj).copy()
