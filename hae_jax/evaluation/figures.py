"""Pictures of slices (input, pseudo-healthy reconstruction, map, mask, ground truth), sample grids, and charts.

The functions take arrays only. Slices are [X, Y] of volumes in LPS. They are shown in radiological convention: anterior
at the top, the patient's left on the right. Figures are made with matplotlib's objects instead of pyplot, so that there
is no global state in a training run or a server.
"""

import itertools
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter
from scipy import ndimage

from hae_jax import files
from hae_jax.provenance import RESEARCH_USE

_BLACK, _TEXT, _FAINT = "black", "0.92", "0.55"
_PREDICTED, _TRUTH = "#ff4d4d", "#3ddc84"
_LINES = _BLUE, _ORANGE, _GREEN, _PURPLE = "#1f5fa8", "#d9782d", "#2a9d78", "#8a4fa8"
_DPI = 150
_PLAIN: dict[str, Any] = {"parse_math": False}  # for names, since matplotlib reads text between two $ as a formula


def overlay_figure(
    path: str | os.PathLike,
    inputs: np.ndarray,  # [S, H, W, C]
    healthy: np.ndarray,  # [S, H, W, M]
    maps: np.ndarray,  # [S, H, W]
    masks: np.ndarray,  # [S, H, W] bool
    truth: np.ndarray | None = None,  # [S, H, W] bool
    *,
    channels: Sequence[str],  # C names
    modality: Sequence[int],  # M channels that `healthy` shows
    title: str = "",
    row_titles: Sequence[str] | None = None,
) -> None:
    """Writes a PNG with a row for each slice: input modalities, pseudo-healthy reconstruction, map, mask, ground truth.

    A reconstruction has the grey window of its input, and all maps have one colour scale, so they can be compared. The
    outlines of mask and ground truth are drawn on the first of the modalities.

    Raises:
      ValueError: if there is no slice.
    """
    if not len(inputs):
        raise ValueError("there is no slice to draw")
    names = [*channels, *(f"healthy {channels[m]}" for m in modality), "anomaly map", "mask"]
    names += [] if truth is None else ["ground truth"]
    crop = _crop(inputs)
    figure, axes = _panels(len(inputs), names, _aspect(inputs[0][crop]), title)
    hottest = float(np.quantile(maps, 0.999)) or 1.0
    for s, row in enumerate(axes):
        outlines = [(masks[s], _PREDICTED)] + ([] if truth is None else [(truth[s], _TRUTH)])
        coloured = _overlay_row(row, crop, inputs[s], healthy[s], maps[s], outlines, modality, hottest)
        if row_titles is not None:
            row[0].set_ylabel(row_titles[s], color=_TEXT, fontsize=8, **_PLAIN)
    _colour_bar(figure, axes[-1][len(channels) + len(modality)], coloured)
    _save(figure, path)


def _overlay_row(
    row: np.ndarray,  # axes, one for each panel
    crop: tuple[slice, ...],
    image: np.ndarray,  # [H, W, C]
    healthy: np.ndarray,  # [H, W, M]
    map: np.ndarray,  # [H, W]
    outlines: Sequence[tuple[np.ndarray, str]],  # mask [H, W] and its colour
    modality: Sequence[int],
    hottest: float,
) -> AxesImage:
    """Draws one slice. Returns its map's image for the colour bar."""
    panels = iter(row)
    whites = [_white(image[..., c]) for c in range(image.shape[-1])]
    for c, white in enumerate(whites):
        _show(next(panels), image[..., c][crop], -1, white)
    for i, m in enumerate(modality):
        _show(next(panels), healthy[..., i][crop], -1, whites[m])
    coloured = _show(next(panels), map[crop], 0, hottest, cmap="inferno")
    for mask, colour in outlines:
        axis = next(panels)
        _show(axis, image[..., modality[0]][crop], -1, whites[modality[0]])
        _outline(axis, mask[crop], colour)
    return coloured


def sample_grid(
    path: str | os.PathLike,
    images: np.ndarray,  # [N, R, H, W, C]
    strengths: Sequence[float],  # N guidance strengths
    *,
    row_titles: Sequence[str] | None = None,  # R
    channels: Sequence[str] = (),  # C names
    title: str = "",
) -> None:
    """Writes a PNG with a row for each sample and a column for each guidance strength.

    A cell shows all channels of one sample as tiles, row by row.
    """
    crop = _crop(images.reshape(-1, *images.shape[2:]))
    rows = [[_tiles(image[crop]) for image in row] for row in np.moveaxis(images, 0, 1)]
    names = [f"w = {strength:g}" for strength in strengths]
    figure, axes = _panels(len(rows), names, _aspect(rows[0][0]), title, width=1.8,
                           note=f"Tiles: {', '.join(channels)}." if len(channels) > 1 else "")
    for r, row in enumerate(axes):
        for axis, tile in zip(row, rows[r], strict=True):
            _show(axis, tile, -1, 1)
        if row_titles is not None:
            row[0].set_ylabel(row_titles[r], color=_TEXT, fontsize=8, **_PLAIN)
    _save(figure, path)


def loss_curve(
    path: str | os.PathLike,
    steps: Sequence[int] | np.ndarray,
    values: Sequence[float | None] | np.ndarray,
    validation: tuple[Sequence[int], Sequence[float | None]] | None = None,  # steps and values
) -> None:
    """Writes a PNG of the training loss over the steps, with its running mean once there are enough points.

    The validation loss lies over it, if there is one. A None is a gap.
    """
    steps, values = np.asarray(steps), np.asarray(values, float)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.add_subplot()
    span = len(values) // 20
    smooth = span > 1 and np.isfinite(values).all()
    axis.plot(steps, values, color="#9db8d9" if smooth else _BLUE, linewidth=1, label="training")
    if smooth:
        axis.plot(steps, ndimage.uniform_filter1d(values, span, mode="nearest"), color=_BLUE, linewidth=1.8,
                  label=f"training, mean of {span} lines")
    if validation is not None:
        axis.plot(validation[0], np.asarray(validation[1], float), color=_ORANGE, linewidth=1.8, marker="o",
                  markersize=3, label="validation, EMA weights")
    if smooth or validation is not None:
        axis.legend(frameon=False, fontsize=9)
    if (values > 0).all():
        axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set(xlabel="step", ylabel="loss")
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def comparison_figure(
    path: str | os.PathLike,
    rows: Sequence[Sequence[Any]],  # as for `report.write_comparison`
    title: str,
) -> None:
    """Writes a PNG with a line for each method, and on it a dot each for volume Dice, lesion-slice Dice and AUPRC.

    A bar is the 95% interval over patients. Missing metrics of a method are not drawn.
    """
    figure = Figure(figsize=(7.2, 1.6 + 0.62 * len(rows)), layout="constrained")
    axis = figure.add_subplot()
    lines = np.arange(len(rows))
    for offset, (name, marker, colour, *place) in zip((-0.22, 0, 0.22), _COMPARED, strict=True):
        setting, figure_name = place
        mean, bars = _bars([results.get(setting, {}).get(figure_name) for _, _, results, *_ in rows])
        axis.errorbar(mean, lines + offset, xerr=bars, fmt=marker, color=colour, markersize=5.5, linewidth=1.4,
                      capsize=3, label=name)
    axis.set_yticks(lines, ["\n".join([method, *textwrap.wrap(settings, 44)]) for method, settings, *_ in rows],
                    fontsize=8.5, **_PLAIN)
    axis.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5))
    axis.hlines(lines[1:] - 0.5, -0.02, 1.02, color="0.85", linewidth=0.8)
    axis.tick_params(axis="y", length=0)
    _finish_chart(figure, axis, title, columns=3)
    _save(figure, path)


_COMPARED = (  # name, marker, colour, where it is in a method's results
    ("volume Dice", "o", _BLUE, "volumes", "dice"),
    ("lesion-slice Dice", "s", _ORANGE, "lesion_slices", "dice"),
    ("lesion-slice AUPRC", "D", _GREEN, "lesion_slices", "auprc"),
)


def _bars(
    values: Sequence[Mapping[str, Any] | None],  # of `bootstrap.figure`
) -> tuple[np.ndarray, np.ndarray]:  # [N] and [2, N]
    """The means, and the distances of their intervals' ends from them; NaN for missing values."""
    mean, low, high = np.array([[(value or {}).get(key) for key in ("mean", "low", "high")] for value in values],
                               float).reshape(-1, 3).T
    return mean, np.maximum((mean - low, high - mean), 0)  # rounding may put an end past the mean


def steps_figure(
    path: str | os.PathLike,
    steps: Sequence[int],
    series: Mapping[str, Sequence[Mapping[str, Any] | None]],  # of `bootstrap.figure`, one for each of `steps`
    title: str,
) -> None:
    """Writes a PNG of quality against the number of steps: a line for each figure of `series`, all on one axis.

    The steps are on a logarithmic scale. A bar is the 95% interval over patients, beside those of the other lines.
    None is a gap.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.add_subplot()
    order = np.argsort(steps)
    beside = 1.02 ** (np.arange(len(series)) - (len(series) - 1) / 2)  # else bars would overlap
    for (name, values), shift, marker, colour in zip(series.items(), beside, itertools.cycle("osD^"),
                                                     itertools.cycle(_LINES)):
        mean, bars = _bars(values)
        axis.errorbar(np.asarray(steps)[order] * shift, mean[order], yerr=bars[:, order], marker=marker, color=colour,
                      markersize=5, linewidth=1.6, elinewidth=0.9, capsize=2.5, label=name)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(steps))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set(xlabel="steps")
    axis.grid(axis="y", alpha=0.25)
    _finish_chart(figure, axis, title, columns=4)
    _save(figure, path)


def _finish_chart(figure: Figure, axis: Axes, title: str, columns: int) -> None:
    """Adds title, legend, grid and the note on research use to a chart."""
    legend = figure.legend(title=title, title_fontsize=10.5, frameon=False, fontsize=8.5, ncols=columns,
                           loc="outside upper center")
    for text in (legend.get_title(), *legend.get_texts()):
        text.set(**_PLAIN)
    legend.get_title().set(multialignment="center")
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(RESEARCH_USE, fontsize=6.5, color=_FAINT)


def _panels(rows: int, names: Sequence[str], aspect: float, title: str, width: float = 1.25,
            note: str = "") -> tuple[Figure, np.ndarray]:
    """A black figure with rows x names empty axes, the names at the top and the note at the bottom."""
    left, right, head, foot = 0.3, 0.1, 0.28 + 0.3 * bool(title), 0.42
    size = (left + right + width * len(names), head + foot + width * aspect * rows)
    figure = Figure(figsize=size, facecolor=_BLACK)
    axes = figure.subplots(rows, len(names), squeeze=False, gridspec_kw={
        "left": left / size[0], "right": 1 - right / size[0], "bottom": foot / size[1], "top": 1 - head / size[1],
        "wspace": 0.03, "hspace": 0.03})
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, color=_TEXT, fontsize=9, pad=4, **_PLAIN)
    for axis in axes.flat:
        axis.set(facecolor=_BLACK, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    if title:
        figure.text(left / size[0], 1 - 0.1 / size[1], title, color=_TEXT, fontsize=11, va="top", **_PLAIN)
    small_print = f"{note} {RESEARCH_USE}".strip().replace("$", r"\$")  # wrapped text ignores parse_math
    figure.text(left / size[0], 0.08 / size[1], small_print, color=_FAINT, fontsize=6.5, wrap=True)
    return figure, axes


def _show(axis: Axes, image: np.ndarray, low: float, high: float, cmap: str = "gray") -> AxesImage:
    return axis.imshow(image.T, cmap=cmap, vmin=low, vmax=high, interpolation="bilinear", aspect="auto")


def _outline(axis: Axes, mask: np.ndarray, colour: str) -> None:
    if mask.any():
        axis.contour(np.asarray(mask, float).T, levels=[0.5], colors=[colour], linewidths=1.1)


def _colour_bar(figure: Figure, axis: Axes, coloured: AxesImage) -> None:
    """Draws a thin colour bar below the column of maps."""
    box, height = axis.get_position(), figure.get_figheight()
    scale = figure.add_axes((box.x0, box.y0 - 0.11 / height, box.width, 0.05 / height))
    bar = figure.colorbar(coloured, cax=scale, orientation="horizontal", ticks=[0, coloured.norm.vmax])
    bar.outline.set_visible(False)
    bar.ax.set_xticklabels(["0", f"{coloured.norm.vmax:.2g}"])
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    bar.ax.tick_params(colors=_FAINT, labelsize=6, length=0, pad=2)


def _crop(inputs: np.ndarray, margin: int = 3) -> tuple[slice, ...]:
    """The bounding box of the head in all slices, to crop black borders."""
    head = np.any(inputs > -0.95, axis=(0, 3))
    if not head.any():
        return slice(None), slice(None)
    ends = (np.flatnonzero(head.any(axis=axis))[[0, -1]] for axis in (1, 0))
    return tuple(slice(max(int(first) - margin, 0), int(last) + margin + 1) for first, last in ends)


def _aspect(image: np.ndarray) -> float:
    """Height / width of the image as it is shown, which is transposed."""
    return image.shape[1] / image.shape[0]


def _white(image: np.ndarray) -> float:
    """The grey window's upper end. The brightest pixels (vessels) are clipped, so that the others are not too dark."""
    return max(float(np.quantile(image, 0.998)), -0.5)


def _tiles(image: np.ndarray) -> np.ndarray:
    """[H, W, C] -> the channels as tiles in a nearly square grid, in row order as shown."""
    channels = image.shape[-1]
    columns = int(np.ceil(np.sqrt(channels)))
    height, width = image.shape[:2]
    sheet = np.full((columns * height, -(-channels // columns) * width), -1, image.dtype)
    for c in range(channels):
        row, column = divmod(c, columns)
        sheet[column * height:(column + 1) * height, row * width:(row + 1) * width] = image[..., c]
    return sheet


def _save(figure: Figure, path: str | os.PathLike) -> None:
    FigureCanvasAgg(figure)
    with files.written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, facecolor=figure.get_facecolor())
