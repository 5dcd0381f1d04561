"""Sheets of images with a caption under each, as PNG files: what reports show. Pillow draws the letters."""

import functools
import io
import textwrap
from collections.abc import Sequence

import numpy as np

from cola_jax import paths
from cola_jax.types import Place, UserError

_SMALLEST = 128  # pixels of a cell's width: smaller images are enlarged, so that captions can be read
_MARGIN, _FONT, _LINE, _LINES = 6, 12, 15, 3  # pixels; lines of a caption
_PAPER = 235  # light grey, from which white images can be told


def sheet(images: np.ndarray, captions: Sequence[str] | None = None, columns: int = 8) -> np.ndarray:
    """Images in rows, on light grey, each with its caption.

    Args:
      images: uint8 [n, H, W, 3], n at least 1. Small ones are enlarged by a whole factor, their pixels kept as squares.
      captions: one an image, broken into up to three lines, the rest of a longer one left out; None: no captions.
      columns: images in a row, at least 1.

    Returns:
      uint8 [height, width, 3].

    Raises:
      UserError: other images, not a caption for each, no Pillow.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        raise UserError(f"images of a sheet are {images.dtype}{list(images.shape)}: must be uint8 [n, H, W, 3], n > 0")
    if captions is not None and len(captions) != len(images):
        raise UserError(f"{len(captions)} captions for a sheet of {len(images)} images: must be one for each")
    if columns < 1:
        raise UserError(f"columns = {columns}: must be at least 1")
    factor = -(-_SMALLEST // images.shape[2])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = images.shape[1:3]
    lines = None if captions is None else [_lines(caption, width) for caption in captions]
    step_y = height + _MARGIN + (_LINE * max(map(len, lines)) if lines else 0)
    step_x, columns = width + _MARGIN, min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = np.full((rows * step_y + _MARGIN, columns * step_x + _MARGIN, 3), _PAPER, np.uint8)
    corners = [(_MARGIN + n // columns * step_y, _MARGIN + n % columns * step_x) for n in range(len(images))]
    for image, (top, left) in zip(images, corners, strict=True):
        canvas[top : top + height, left : left + width] = image
    return canvas if lines is None else _written(canvas, lines, [(left, top + height) for top, left in corners])


def write(path: Place, images: np.ndarray, captions: Sequence[str] | None = None, columns: int = 8) -> None:
    """Writes a `sheet` as a PNG file, whole or not at all.

    Raises:
      UserError: as of `sheet`.
    """
    image, _, _ = _pillow()
    buffer = io.BytesIO()
    image.fromarray(sheet(images, captions, columns)).save(buffer, format="PNG", optimize=True)
    paths.write_atomically(path, buffer.getvalue())


def check(path: Place, field: str) -> None:
    """Raises UserError if no sheet can be written there: no Pillow, no such directory. Before images are made."""
    _pillow()
    if not path.parent.is_dir():
        raise UserError(f"{field} = {path}: must be in a directory that exists")


def _pillow():
    """(Image, ImageDraw, ImageFont) of Pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise UserError("a sheet of images needs the package Pillow: pip install 'cola_jax[images]'") from error
    return Image, ImageDraw, ImageFont


@functools.cache
def _font():
    return _pillow()[2].load_default(_FONT)


def _lines(caption: str, width: int) -> list[str]:
    """A caption in lines that are no wider than the image."""
    font, words = _font(), " ".join(caption.split())
    letters = len(words)
    while True:  # the letters of a line that fit are found from above: their widths differ
        lines = textwrap.wrap(words, max(letters, 1), max_lines=_LINES, placeholder=" …") if words else []
        if letters <= 2 or all(font.getlength(line) <= width for line in lines):
            return lines
        letters -= 1


def _written(canvas: np.ndarray, captions: list[list[str]], places: list[tuple[int, int]]) -> np.ndarray:
    """The canvas with lines of text, whose upper left corners are at (x, y)."""
    image, draw, _ = _pillow()
    picture = image.fromarray(canvas)
    pen = draw.Draw(picture)
    for lines, (x, y) in zip(captions, places, strict=True):
        for number, line in enumerate(lines):
            pen.text((x, y + 1 + number * _LINE), line, fill=(0, 0, 0), font=_font())
    return np.array(picture)
