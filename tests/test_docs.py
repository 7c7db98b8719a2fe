"""The Python code in the docs runs, in the order of the page."""

import re
from pathlib import Path

import numpy as np
import pytest

from hae_jax.configs import default
from hae_jax.data import layout_rules
from hae_jax.localization import methods
from hae_jax.model import config as model_config

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def page(monkeypatch):
    """The names that a page's code defines. Its changes to tables are undone after the test."""
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    for name, value in dict(model_config.VARIANTS).items():
        monkeypatch.setitem(model_config.VARIANTS, name, value)
    before = set(model_config.VARIANTS)

    def run(name):
        found = {}
        for block in re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.M | re.S):
            exec(compile(block, name, "exec"), found)
        return found

    yield run
    for name in set(model_config.VARIANTS) - before:
        del model_config.VARIANTS[name]


def test_extending(page, tmp_path):
    found = page("extending.md")
    config = default.get_config()
    config.translation.method = "one-step"
    method = methods.make_method(config)
    assert (method.name, method.rule, method.timestep) == ("one-step", "healthy_fpr", 50)
    localizer, slices = found["localizer"], np.random.default_rng(0).random((8, 16, 16, 4)).astype(np.float32)
    assert localizer.calibrate(slices, [0] * 4 + [1] * 4, masks=slices[..., 0] > 0.9).method == "one-step"
    result = localizer(slices)
    assert result.mask.shape == result.anomaly_map.shape == (8, 16, 16)
    assert result.pseudo_healthy.shape == (8, 16, 16, 1)
    assert found["model"].config.variant == "hae_v2c_wide"
    for name in ("flair/a", "t1/a", "flair/b", "t1/b", "lesion/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    cases = found["by_modality_folder"](layout_rules.Folder(tmp_path, {}, True), ("flair", "t1"))
    assert [(case.name, case.segmentation) for case in cases] == [
        ("a", None), ("b", tmp_path / "lesion" / "b.nii.gz")]
