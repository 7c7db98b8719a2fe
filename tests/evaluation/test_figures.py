"""Figures: positions and orientation of their parts, and no global state. Their appearance is not tested."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from hae_jax.evaluation import figures

CHANNELS = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def head():
    """[S, H, W, C] ellipses: longer from front to back (axis 1) than from side to side (axis 0)."""
    x, y = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 48), indexing="ij")
    inside = (x / 0.6) ** 2 + (y / 0.9) ** 2 < 1
    return np.repeat(np.where(inside, 0.0, -1.0)[None, ..., None], 2, axis=0).repeat(4, axis=-1).astype(np.float32)


def _pixels(path):
    return matplotlib.image.imread(path)[..., :3]


def test_front_is_up_and_left_is_right(tmp_path):
    image = np.full((1, 1, 40, 40, 1), -1.0, np.float32)
    image[0, 0, 2:10, 2:16] = 1  # small x: the patient's right; small y: the front
    image[0, 0, 36:, 36:] = -0.5  # grey, in the opposite corner, so that the crop includes it
    figures.sample_grid(tmp_path / "a.png", image, [2])
    white = _pixels(tmp_path / "a.png").min(axis=-1) > 0.99
    height, width = white.shape
    block = white[int(0.2 * height):int(0.85 * height)]  # without the names and the note
    rows, columns = np.nonzero(block)
    assert rows.mean() < block.shape[0] / 2
    assert columns.mean() < width / 2
    assert np.ptp(rows) > np.ptp(columns)  # 14 along y against 8 along x


def test_tiles_read_like_text(tmp_path):
    image = np.stack([np.full((8, 6), c, np.float32) for c in range(4)], axis=-1)
    sheet = figures._tiles(image).T  # as shown
    assert sheet.shape == (12, 16)
    assert [sheet[0, 0], sheet[0, -1], sheet[-1, 0], sheet[-1, -1]] == [0, 1, 2, 3]
    three = figures._tiles(image[..., :3]).T
    assert [three[-1, 0], three[-1, -1]] == [2, -1]
    assert figures._tiles(image[..., :1]).shape == (8, 6)


def test_overlay_outlines_mask_and_truth(tmp_path, head):
    masks = np.zeros((2, 48, 48), bool)
    masks[0, 18:26, 20:30] = True
    arguments = {"channels": CHANNELS, "modality": (0, 3), "title": "case", "row_titles": ["slice 3", "slice 9"]}

    def coloured(path, colour):
        wanted = matplotlib.colors.to_rgb(colour)
        return int((np.abs(_pixels(path) - wanted).max(axis=-1) < 0.1).sum())

    maps = np.zeros((2, 48, 48), np.float32)
    figures.overlay_figure(tmp_path / "a.png", head, head[..., :2], maps, masks, masks, **arguments)
    figures.overlay_figure(tmp_path / "b.png", head, head[..., :2], maps, masks, None, **arguments)
    figures.overlay_figure(tmp_path / "c.png", head, head[..., :2], maps, masks & False, None, **arguments)
    assert coloured(tmp_path / "a.png", figures._PREDICTED) > 50
    assert coloured(tmp_path / "a.png", figures._TRUTH) > 50
    assert coloured(tmp_path / "b.png", figures._PREDICTED) > 50
    assert coloured(tmp_path / "b.png", figures._TRUTH) == 0
    assert coloured(tmp_path / "c.png", figures._PREDICTED) == 0
    assert _pixels(tmp_path / "a.png").shape[1] > _pixels(tmp_path / "b.png").shape[1]  # one column more


_NAME = "pat$1_$2^"  # text between two $ is not a formula


def test_names_with_dollar_signs_are_names(tmp_path, head):
    maps, masks = np.zeros((2, 48, 48), np.float32), np.zeros((2, 48, 48), bool)
    figures.overlay_figure(tmp_path / "a.png", head, head[..., :2], maps, masks, channels=[_NAME] * 4, modality=(0, 3),
                           title=_NAME, row_titles=[_NAME] * 2)
    figures.sample_grid(tmp_path / "b.png", head[None], [2], row_titles=[_NAME] * 2, channels=[_NAME] * 4, title=_NAME)
    figures.comparison_figure(tmp_path / "c.png", [(_NAME, _NAME, _results(0.5), None)], _NAME)
    figures.steps_figure(tmp_path / "d.png", [5, 20], {_NAME: [_figure(0.5), _figure(0.6)]}, _NAME)
    assert len(list(tmp_path.iterdir())) == 4


def test_an_overlay_needs_a_slice(tmp_path, head):
    none = head[:0]
    with pytest.raises(ValueError, match="no slice to draw"):
        figures.overlay_figure(tmp_path / "a.png", none, none, none[..., 0], none[..., 0] > 0, channels=CHANNELS,
                               modality=(0, 3))
    assert not list(tmp_path.iterdir())


def test_black_borders_are_cropped_alike_in_all_slices(head):
    rows, columns = figures._crop(head)
    inside = np.argwhere(head[0, ..., 0] > -0.95)
    assert rows.start <= inside[:, 0].min()
    assert rows.stop > inside[:, 0].max()
    assert columns.start <= inside[:, 1].min()
    assert columns.stop > inside[:, 1].max()
    assert head[0][rows, columns].shape[0] < 40
    assert head[0][figures._crop(np.full_like(head, -1))].shape == (48, 48, 4)


def test_loss_curve(tmp_path):
    for name, values in (("few", [3.0, 2.0, 1.0]), ("many", np.linspace(2, 1, 200)), ("odd", [1.0, 0.0, np.nan])):
        figures.loss_curve(tmp_path / f"{name}.png", np.arange(len(values)), values)
        assert np.ptp(_pixels(tmp_path / f"{name}.png")) > 0.5
    assert len(list(tmp_path.iterdir())) == 3


def _pixels_of(path, colour):
    return np.argwhere(np.abs(_pixels(path) - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.05)


def _figure(mean, low=None, high=None):
    return {"mean": mean, "low": low, "high": high, "cases": 4}


def _results(dice, low=None, high=None):
    return {"all_slices": {"auprc": _figure(0.5)}, "lesion_slices": {"dice": _figure(dice)},
            "volumes": {"dice": _figure(dice, low, high)}}


@pytest.mark.filterwarnings("error")
def test_comparison_figure_draws_what_there_is(tmp_path):
    def width(row):
        """The width in pixels of the volume Dice's marker and interval, below the legend."""
        figures.comparison_figure(tmp_path / "a.png", [row], "title")
        columns = [x for y, x in _pixels_of(tmp_path / "a.png", figures._BLUE) if y > 90]
        return max(columns) - min(columns) if columns else 0

    narrow, wide, alone = (width(("HAE", "20 steps", _results(0.5, *ends), 1.0))
                           for ends in ((0.45, 0.55), (0.2, 0.8), (None, None)))
    assert wide > 3 * narrow > 3 * alone > 0
    assert width(("HAE", "", _results(0.7, 0.7 + 1e-16, 0.7 + 1e-16), None)) > 0  # rounded past the mean
    assert width(("HAE", "", {"all_slices": {"auprc": _figure(0.5)}}, None)) == 0
    assert width(("HAE", "", _results(None), None)) == 0

    figures.comparison_figure(tmp_path / "two.png", [("HAE", "w = 2", _results(0.5, 0.4, 0.6), 1.0)] * 2, "title")
    assert _pixels(tmp_path / "two.png").shape[0] > _pixels(tmp_path / "a.png").shape[0]


@pytest.mark.filterwarnings("error")
def test_steps_figure(tmp_path):
    steps, dice = [100, 5, 20], [_figure(0.7), _figure(0.4, 0.2, 0.5), _figure(0.6)]
    auprc = [_figure(0.5), None, _figure(0.4)]
    figures.steps_figure(tmp_path / "a.png", steps, {"Dice": dice, "AUPRC": auprc}, "title")
    ordered = {"Dice": [dice[1], dice[2], dice[0]], "AUPRC": [auprc[1], auprc[2], auprc[0]]}
    figures.steps_figure(tmp_path / "b.png", sorted(steps), ordered, "title")
    assert len(_pixels_of(tmp_path / "a.png", figures._ORANGE)) > 50
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png"))
    more = {name: [_figure(0.5)] for name in "abcdef"}  # more than there are colours
    figures.steps_figure(tmp_path / "c.png", [20], more, "title")


def test_figures_leave_pyplot_alone():
    code = "import sys; from hae_jax.evaluation import figures; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
