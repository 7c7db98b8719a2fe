"""Volumes as pictures for a page: sheets of axial slices with 8 bits, as data URLs.

The page restores the volume from the sheets and shows slices in any plane. X, Y, Z: the axes of LPS.
"""

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

_BLOCK = 8  # pixels; edge of JPEG's blocks, which slices must not share
_SHEET = 4096  # pixels; the longest edge of a sheet, which all browsers can draw
_QUALITY = 82  # of JPEG
_MARGIN = 2  # voxels around the head
_THUMBNAIL = 112  # pixels; height of a thumbnail
_MASK = (230, 159, 0)  # orange of Okabe and Ito, as in style.css


class Layout(NamedTuple):
    """The arrangement of slices on sheets, in rows."""

    tile: tuple[int, int]  # width and height in pixels
    columns: int
    per_sheet: int


def layout(
    shape: tuple[int, int, int],  # of the volume
) -> Layout:
    """The layout of volumes of this shape."""
    width, height = (-(-size // _BLOCK) * _BLOCK for size in shape[:2])
    columns = min(shape[2], max(1, _SHEET // width))
    return Layout((width, height), columns, columns * max(1, _SHEET // height))


def sheets(
    volume: np.ndarray,  # [X, Y, Z] uint8
    *,
    exact: bool = False,
) -> list[str]:  # data URLs
    """Draws the slices of a volume on one or more sheets.

    Args:
      volume: the volume.
      exact: use PNG, for labels; else JPEG, which is slightly lossy and several times smaller.
    """
    (width, height), columns, per_sheet = layout(volume.shape)
    drawn = []
    for start in range(0, volume.shape[2], per_sheet):
        tiles = volume[:, :, start:start + per_sheet].transpose(2, 1, 0)
        sheet = np.zeros((-(-len(tiles) // columns) * height, columns * width), np.uint8)
        for i, tile in enumerate(tiles):
            row, column = divmod(i, columns)
            sheet[row * height:row * height + tile.shape[0], column * width:column * width + tile.shape[1]] = tile
        drawn.append(data_url(Image.fromarray(sheet), exact=exact))
    return drawn


def data_url(image: Image.Image, *, exact: bool = False, quality: int = _QUALITY) -> str:
    """A picture as a data URL for an <img> element."""
    stream = io.BytesIO()
    if exact:
        image.save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "JPEG", quality=quality, subsampling=0)
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(stream.getvalue()).decode()}"


def to_bytes(
    values: np.ndarray,
    low: float,
    high: float,
) -> np.ndarray:  # uint8, of the same shape
    """Applies the grey window from `low` (0) to `high` (255). Values outside are clipped."""
    span = high - low if high > low else 1.0
    return np.clip((values - low) * (255 / span) + 0.5, 0, 255).astype(np.uint8)


def window(
    volume: np.ndarray,  # [X, Y, Z] raw intensities, background 0
) -> tuple[float, float]:
    """Ends of a grey window. The few brightest voxels (vessels) are clipped, so that the others are not too dark."""
    shown = volume[volume != 0]
    if not shown.size:
        return 0.0, 1.0
    low, high = np.percentile(shown, [0.2, 99.8])
    return min(0.0, float(low)), float(high)


def head_box(
    shown: np.ndarray,  # [X, Y, Z] bool
) -> tuple[slice, ...]:
    """The bounding box of all True voxels with a margin; the whole volume if there are none."""
    found = ndimage.find_objects(shown.astype(np.uint8))
    if not found:
        return tuple(slice(0, size) for size in shown.shape)
    return tuple(slice(max(0, side.start - _MARGIN), min(size, side.stop + _MARGIN))
                 for side, size in zip(found[0], shown.shape, strict=True))


def thumbnail(
    image: np.ndarray,  # [X, Y] uint8
    mask: np.ndarray,  # [X, Y] bool
    spacing: tuple[float, float],  # mm
) -> str:
    """A small picture of one slice with the outline of its mask, as a data URL."""
    width = max(1, round(_THUMBNAIL * image.shape[0] * spacing[0] / (image.shape[1] * spacing[1])))
    size = (width, _THUMBNAIL)
    grey = np.asarray(Image.fromarray(image.T.copy()).resize(size, Image.Resampling.BILINEAR))
    large = np.asarray(Image.fromarray(mask.T.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 127
    colour = np.repeat(grey[..., None], 3, axis=-1)
    colour[large & ~ndimage.binary_erosion(large)] = _MASK
    return data_url(Image.fromarray(colour), quality=80)
