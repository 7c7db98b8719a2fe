"""The drawing of the networks is a readable file, and the table in the documentation equals the code's counts."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.patches import FancyBboxPatch

from hae_jax.commands.draw_models import main
from hae_jax.model import UNetConfig
from hae_jax.model.drawing import models_figure

ROOT = Path(__file__).resolve().parents[2]
PIXEL = 1.0


def test_no_text_meets_another_or_leaves_its_box():
    figure = models_figure(UNetConfig(channel_mult=(1, 1, 2, 3, 4), num_classes=2))
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [p.get_window_extent() for p in axes.patches if isinstance(p, FancyBboxPatch)]
    texts = [(t.get_text(), t.get_window_extent()) for t in axes.texts if t.get_text()]
    assert len(boxes) > 40
    for (first, a), (second, b) in itertools.combinations(texts, 2):
        assert not a.overlaps(b), (first, second)
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)
    for text, extent in texts:
        assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1, text
        for box in boxes:
            if box.overlaps(extent):
                assert box.x0 + PIXEL < extent.x0 < extent.x1 < box.x1 - PIXEL, text
                assert box.y0 + PIXEL < extent.y0 < extent.y1 < box.y1 - PIXEL, text


def test_the_drawing_names_the_sizes_of_its_config():
    figure = models_figure(UNetConfig(image_size=64, channel_mult=(1, 2, 3), attention_resolutions=(4,), num_classes=2))
    said = "\n".join(text.get_text() for text in figure.axes[0].texts)
    assert "16 x 16 px, 384 channels\n2 x (ResBlock, AttentionBlock)" in said
    assert "32 x 32 px, 256 channels\n2 x ResBlock" in said


def test_the_same_drawing_is_the_same_file(tmp_path):
    main(["--output", str(tmp_path / "a.svg")])
    main(["--output", str(tmp_path / "b.svg")])
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert drawn.startswith(b"<?xml")


def test_the_table_in_the_documentation_is_what_the_command_prints(capsys):
    main(["--table"])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "models.md").read_text()


def test_the_front_door_explains_itself_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "draw_models.py"), "--help"], cwd=tmp_path,
                          capture_output=True, text=True, check=True)
    assert "--table" in done.stdout


def test_another_format_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "models.txt")])
    assert stop.value.code == 2
    assert "must end in .svg, .png or .pdf" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
