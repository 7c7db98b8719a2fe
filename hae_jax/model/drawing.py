"""A drawing of the five networks: the common U-Net with a config's sizes, and the kinds of decoder blocks.

`tools/draw_models.py` makes it for `docs/models.md`. Lengths are in tenths of an inch; y points up.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from hae_jax.files import written_whole
from hae_jax.model.config import HYBRID_HEADS, UNetConfig

_WIDTH, _HEIGHT = 112.0, 148.0
_CONV, _ATTENTION, _HYBRID, _CONDITION, _PLAIN = "#dbe9f6", "#fde3c8", "#d5efd3", "#e8def2", "#f2f2f2"
_LINE = "#444444"


class Box(NamedTuple):
    """The position and size of a box."""

    x: float  # left edge
    y: float  # lower edge
    width: float
    height: float

    @property
    def middle(self) -> float:
        """The horizontal centre."""
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        """The upper edge."""
        return self.y + self.height


class _Sheet:
    """A page with boxes, arrows and notes."""

    def __init__(self):
        self.figure = Figure(figsize=(_WIDTH / 10, _HEIGHT / 10))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, _WIDTH), ylim=(0, _HEIGHT))
        self.axes.axis("off")

    def box(self, box: Box, text: str, colour: str) -> Box:
        self.axes.add_patch(FancyBboxPatch(
            box[:2], box.width, box.height, boxstyle="round,pad=0,rounding_size=0.7", facecolor=colour,
            edgecolor=_LINE, linewidth=0.8))
        self.note(box.middle, box.y + box.height / 2, text)
        return box

    def note(self, x: float, y: float, text: str, size: float = 9.0, weight: str = "normal") -> None:
        self.axes.text(x, y, text, ha="center", va="center", fontsize=size, weight=weight, linespacing=1.25)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draws a line through the points with an arrowhead at the last."""
        *_, before, end = points
        if len(points) > 2:
            self.axes.plot(*zip(*points[:-1], strict=True), color=_LINE, linewidth=0.9, solid_joinstyle="miter")
        self.axes.annotate("", end, before, arrowprops={
            "arrowstyle": "-|>", "color": _LINE, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9})

    def down(self, upper: Box, lower: Box) -> None:
        """Draws a vertical arrow between two boxes, at the centre of the narrower one."""
        x = min(upper, lower, key=lambda box: box.width).middle
        self.arrow((x, upper.y), (x, lower.top))

    def chain(self, x: float, top: float, width: float, parts: Sequence[tuple[str, str, float]]) -> list[Box]:
        """Draws boxes (text, colour, height) below each other, connected by arrows."""
        boxes = []
        for text, colour, height in parts:
            boxes.append(self.box(Box(x, top - height, width, height), text, colour))
            if len(boxes) > 1:
                self.down(boxes[-2], boxes[-1])
            top -= height + 2.0
        return boxes


def draw_models(config: UNetConfig, path: str | os.PathLike) -> None:
    """Writes the drawing in the format of the path's suffix (.svg, .png, .pdf).

    Args:
      config: the network whose sizes are shown, with hybrid blocks.
    """
    figure = models_figure(config)
    # With a fixed salt and no date, equal drawings give equal files.
    with written_whole(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "hae-jax"}):
        figure.savefig(temporary, dpi=110, metadata={"Date": None} if temporary.suffix == ".svg" else None)


def models_figure(config: UNetConfig) -> Figure:
    """The drawing as a figure; there is room for five levels."""
    sheet = _Sheet()
    FigureCanvasAgg(sheet.figure)
    sheet.note(56, 146, "The U-Net that all five share", 12, "bold")
    _network(sheet, config)
    _conditioning(sheet, config)
    sheet.note(56, 60.5, "The hybrid blocks (C channels in and out; r is bottleneck_ratio)", 12, "bold")
    _joint_block(
        sheet, 1.5, "hae", "joint attention, one Linear per patch size",
        "each pixel is a token; each patch\nof 4 x 4 and of 8 x 8 pixels too,\nby the Linear of its size",
        "a + MLP(LayerNorm(a))\nMLP: C, 4C, C", "concatenate; 1 x 1 conv")
    _joint_block(
        sheet, 38.5, "hae_lite, hae_v2", "joint attention, one shared projection",
        "shared 1 x 1 conv;\neach pixel is a token; each mean\nof 4 x 4 and of 8 x 8 pixels too",
        "a + MLP(LayerNorm(a)), MLP:\nlite C, 4C, C; v2 C, rC, C", "mean of the two; 1 x 1 conv")
    _per_scale_block(sheet, 75.5)
    sheet.note(56, 1.2, "SiLU*: missing in fpdm and hae, and so is that behind the first norm of their ResBlocks")
    return sheet.figure


def _network(sheet: _Sheet, config: UNetConfig) -> None:
    """Draws the U-Net, with the encoder on the left and the decoder on the right."""
    size = config.image_size
    above_left = sheet.box(Box(4, 140.5, 40, 3.4), f"x_t, {size} x {size} x {config.in_channels}; 3 x 3 conv", _CONV)
    above_right = sheet.box(Box(68, 140.5, 40, 3.4), "GroupNorm, SiLU*, 3 x 3 conv; eps", _CONV)
    for level in range(len(config.widths)):
        y = 129 - 12 * level
        encoder, decoder = _level(sheet, config, level, y)
        sheet.down(above_left, encoder)
        top = decoder
        if level:
            sheet.note(32, encoder.top + 2, "Downsample")
            sheet.note(96, encoder.top + 2, "Upsample")
            top = sheet.box(Box(68, y + 4.9, 40, 3.1), "hybrid block (none in fpdm)", _HYBRID)
            sheet.arrow((88, decoder.top), (88, top.y))
        sheet.arrow((88, top.top), (88, above_right.y))
        above_left, above_right = encoder, decoder
    centre = above_left.y - 4.2
    middle = sheet.box(Box(37, centre - 1.8, 38, 3.6), "ResBlock, AttentionBlock, ResBlock", _ATTENTION)
    sheet.arrow((24, above_left.y), (24, centre), (middle.x, centre))
    sheet.arrow((75, centre), (88, centre), (88, above_right.y))


def _level(sheet: _Sheet, config: UNetConfig, level: int, y: float) -> tuple[Box, Box]:
    """Draws the blocks of one resolution in encoder and decoder, and the skip connections between them."""
    title = f"{config.image_size >> level} x {config.image_size >> level} px, {config.widths[level]} channels"
    if 2**level in config.attention_resolutions:
        colour, blocks = _ATTENTION, "(ResBlock, AttentionBlock)"
    else:
        colour, blocks = _CONV, "ResBlock"
    encoder = sheet.box(Box(4, y, 40, 8), f"{title}\n{config.num_res_blocks} x {blocks}", colour)
    decoder = sheet.box(Box(68, y, 40, 3.6 if level else 8), f"{config.num_res_blocks + 1} x {blocks}", colour)
    sheet.arrow((44, y + 1.8), (68, y + 1.8))
    sheet.note(56, y + 3.2, "skips, concatenated")
    return encoder, decoder


def _conditioning(sheet: _Sheet, config: UNetConfig) -> None:
    """Draws the conditioning of the blocks."""
    e = config.embedding_width
    sheet.box(Box(4, 69.2, 34, 3.4), "time t: sinusoid, Linear, SiLU, Linear", _CONDITION)
    label = sheet.box(Box(4, 64.2, 34, 3.4), "class y: Embedding, Linear, SiLU, Linear", _CONDITION)
    sheet.box(Box(46, 69.2, 62, 3.4), f"emb = time + c, {e} numbers: to every ResBlock and hybrid block", _CONDITION)
    sheet.box(Box(46, 64.2, 62, 3.4), f"context c c^T, {e} tokens: to every AttentionBlock (null: c = 0)", _CONDITION)
    sheet.arrow((38, 70.9), (46, 70.9))
    sheet.arrow((38, 65.9), (46, 65.9))
    sheet.arrow((label.x + 34, 66.5), (42, 66.5), (42, 70.2), (46, 70.2))


def _titles(sheet: _Sheet, x: float, name: str, subtitle: str) -> None:
    sheet.note(x + 17.5, 57.6, name, 10, "bold")
    sheet.note(x + 17.5, 55.4, subtitle, 8.5)


def _joint_block(sheet: _Sheet, x: float, name: str, subtitle: str, tokens: str, mlp: str, fusion: str) -> None:
    """Draws the joint block: convolutions, and one attention over the tokens of all patch sizes."""
    _titles(sheet, x, name, subtitle)
    start = sheet.box(Box(x, 50.2, 35, 3.4), "x' = x + Linear(SiLU(emb))", _CONDITION)
    chain = sheet.chain(x + 10, 47.8, 25, (
        (tokens, _CONV, 6.6),
        ("LayerNorm for each kind of token;\none sequence", _PLAIN, 4.8),
        (f"attention, {HYBRID_HEADS} heads, sparse;\nthe pixels' part of it is a", _ATTENTION, 4.8),
        (mlp, _CONV, 4.8),
        ("+ x'", _PLAIN, 2.8),
    ))
    conv = sheet.box(Box(x, 28, 8.5, 10), "GroupNorm\nSiLU\n3 x 3 conv\n(all twice)", _CONV)
    fused = sheet.box(Box(x, 9, 35, 3.4), fusion, _CONV)
    end = sheet.box(Box(x, 3.6, 35, 3.2), "+ x", _PLAIN)
    for upper, lower in ((start, chain[0]), (start, conv), (chain[-1], fused), (conv, fused), (fused, end)):
        sheet.down(upper, lower)


def _per_scale_block(sheet: _Sheet, x: float) -> None:
    """Draws the per-scale block: a ResBlock, and one attention per patch size on its output."""
    _titles(sheet, x, "hae_v2c", f"one attention per scale, {HYBRID_HEADS} heads, sparse above 64 tokens")
    start = sheet.box(Box(x, 50.2, 35, 3.4), "h = ResBlock(x, emb)", _CONV)
    shared = sheet.chain(x, 31.2, 31, (
        ("+ MLP(LayerNorm), C, rC, C:\nthis MLP and both LayerNorms\nare shared by the scales", _CONV, 6.6),
        ("bilinear, back to H x W", _PLAIN, 3.0),
        ("concatenate the scales; Linear 3C to C", _CONV, 3.0),
    ))
    for i, scale in enumerate(("pixels", "4 x 4\nmeans", "8 x 8\nmeans")):
        columns = sheet.chain(x + 10.7 * i, 47.8, 9.6, (
            (scale, _PLAIN, 4.8), ("+ its own\nattention\n(LayerNorm)", _ATTENTION, 6.6)))
        sheet.down(start, columns[0])
        sheet.down(columns[-1], shared[0])
    fused = sheet.box(Box(x, 9, 35, 3.4), "concatenate with h; 1 x 1 conv", _CONV)
    end = sheet.box(Box(x, 3.6, 35, 3.2), "GroupNorm of 8 groups, SiLU", _PLAIN)
    sheet.arrow((x + 33, start.y), (x + 33, fused.top))
    sheet.down(shared[-1], fused)
    sheet.down(fused, end)
