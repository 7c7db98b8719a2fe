"""The ablation: every row is measured, the page is written after each row, and errors are reported."""

import numpy as np
import pytest
from run_helpers import read_json

from hae_jax.data.store import open_store
from hae_jax.errors import UserError
from hae_jax.localization.map_threshold import ValidationSlice
from hae_jax.localization.measures import masks_dice, measure
from hae_jax.localization.methods import Intensity, IntensityThreshold
from hae_jax.pipeline import ablation


@pytest.fixture
def settings(config):
    config.translation.update({"method": "hae", "timesteps": (3, 6), "across_mm": 0.0, "batch_size": 8})
    return config


def test_each_row_is_measured(settings, prepared, toy_network, mesh_of, tmp_path):
    rows = [("as configured", {}), ("guidance off", {"guidance": 0.0}),
            ("components of any size", {"filters": "mm", "smallest_ml": 0.0})]
    store = open_store(prepared / "store")
    page = ablation.ablate(toy_network(0), settings, mesh_of(2), store, rows, slices=100, output=tmp_path / "out")
    found = read_json(tmp_path / "out" / "ablation.json")["rows"]
    assert [row["settings"] for row in found] == [
        "intensity itself", "as configured", "guidance off", "components of any size"]
    assert [row["passes"] for row in found] == [0, 4, 4, 4]
    assert found[3]["auprc"] == found[1]["auprc"]  # the same maps
    assert [row["masks_dice"] > 0.1 for row in found] == [True, False, False, True]  # 0.1 ml is much at 16 px
    assert found[0]["best_dice"] > 0.9  # the balls are bright
    assert found[1]["auprc"] != found[2]["auprc"]
    text = page.read_text()
    assert text.startswith("# Metrics of 7 validation slices\n")
    assert text.count("\n| ") == 2 + len(found)


def test_variations_change_one_setting_each(settings):
    settings.diffusion.steps = 1000
    settings.translation.timesteps = (50, 100, 150, 200, 250, 300)
    rows = ablation.variations(settings)
    assert rows[0] == ("as configured", {})
    assert len({name for name, _ in rows}) == len(rows)
    fields = set().union(*(changes for _, changes in rows))
    assert fields == {"timesteps", "guidance", "draws", "rounds", "rectify", "smoothing", "weights", "filters",
                      "across_mm", "head_erosion_mm", "median_mm", "smallest_ml"}
    assert max(max(changes.get("timesteps", (0,))) for _, changes in rows) == 600  # 1200 is beyond the schedule
    for name, changes in rows:
        settings.translation.update({"method": "residual"})
        own = settings.copy_and_resolve_references()
        own.translation.update(changes)
        assert ablation.make_method(own).name == "residual", name


def test_slices_of_one_class_are_refused(settings, prepared, toy_network, mesh_of, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "_blocks", lambda total, wanted: np.array([0, 1]))
    with pytest.raises(UserError, match="of one class"):
        ablation.ablate(toy_network(0), settings, mesh_of(1), open_store(prepared / "store"), [], slices=2,
                        output=tmp_path)


def test_blocks_of_neighbours():
    chosen = ablation._blocks(1000, 80)
    assert len(chosen) == 80
    assert (np.diff(chosen.reshape(10, 8)) == 1).all()
    assert list(chosen[::8] // 100) == list(range(10))
    heights = np.sort(chosen[::8] % 100)  # of ten subjects of 100 slices each
    assert heights[0] < 20
    assert np.diff(heights).max() < 20
    assert heights[-1] > 80
    assert len(ablation._blocks(5, 80)) == 5


def test_measures_against_their_definitions():
    rng = np.random.default_rng(0)
    truth = np.zeros((60, 12, 12), bool)
    truth[::2, 3:7, 3:7] = True
    maps = 0.2 * rng.random(truth.shape) + 0.5 * truth
    items = [(Intensity(map), ValidationSlice(int(mask.any()), mask, np.ones((12, 12), bool), i / 60, f"p{i % 6}"))
             for i, (map, mask) in enumerate(zip(maps, truth, strict=True))]
    found = measure(IntensityThreshold(), items)
    assert (found.auprc, found.slice_auc, found.slice_accuracy) == pytest.approx((1, 1, 1))
    assert found.best_dice == pytest.approx(1, abs=1e-6)
    assert found.mixture_dice > 0.95
    assert found.lesion_share == pytest.approx(16 / 144, rel=0.05)
    assert masks_dice(IntensityThreshold(), items) > 0.95
    blind = [(map, item._replace(truth=np.zeros((12, 12), bool))) for map, item in items]
    assert np.isnan(masks_dice(IntensityThreshold(), blind))
    blind = measure(IntensityThreshold(), blind)
    assert np.isnan([blind.auprc, blind.best_dice, blind.mixture_dice, blind.fpr_dice]).all()
    assert (blind.expected_dice, blind.slice_auc) == (found.expected_dice, found.slice_auc)
    flat = measure(IntensityThreshold(), [(Intensity(0 * map.map), item) for map, item in items])
    assert np.isnan(flat.expected_dice)
    assert (flat.mixture_dice, flat.fpr_dice) == pytest.approx((0, 0), abs=1e-6)
