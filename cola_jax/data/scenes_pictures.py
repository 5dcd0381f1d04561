"""Pictures of coloured shapes on a white ground: what a shape is, and how it is drawn.

A picture is a grid of 3 x 3 cells; a shape stands in the middle of its cell and never touches another one. Everything
is drawn in proportion to the picture, with edges that are softened over one pixel.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cola_jax.types import UserError

GRID = 3  # cells of a side
MIN_SIZE = 32  # pixels of a side: the arms of a small cross are 1.7 pixels wide there
WHITE = 255.0
KINDS = ("circle", "square", "triangle", "cross", "diamond")
COLOURS = {
    "red": (220, 40, 40),
    "green": (0, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 40),
    "purple": (150, 50, 180),
    "black": (30, 30, 30),
}
SIZES = {"small": 0.24, "large": 0.38}  # half the extent, in cells


class Shape(NamedTuple):
    """A shape of a picture.

    Attributes:
      kind: one of `KINDS`.
      colour: a name of `COLOURS`.
      size: a name of `SIZES`.
      column, row: its cell, from 0; row 0 is the top one.
    """

    kind: str
    colour: str
    size: str
    column: int
    row: int


def check_size(size: int, field: str) -> None:
    """Raises UserError for pictures that are too small to tell their shapes apart."""
    if size < MIN_SIZE:
        raise UserError(f"{field} = {size}: must be at least {MIN_SIZE} for pictures of shapes")


def half_extent(size: str, side: int) -> float:
    """Half the extent of a shape in pixels, in a picture of ``side`` x ``side``."""
    return SIZES[size] * side / GRID


def centroid_offset(kind: str, half: float) -> float:
    """How far below the middle of its extent the centre of mass of a shape lies."""
    return half / 3 if kind == "triangle" else 0.0


def coverage(kind: str, x: np.ndarray, y: np.ndarray, half: float) -> np.ndarray:
    """The share of each pixel that a shape covers, from 0 to 1.

    Args:
      kind: one of `KINDS`.
      x, y: pixels to the right of the middle of its extent, and below it; they broadcast.
      half: half its extent, in pixels.
    """
    across, down = np.abs(x), np.abs(y)
    # Distance from the edge, positive outside.
    if kind == "circle":
        distance = np.hypot(x, y) - half
    elif kind == "square":
        distance = np.maximum(across, down) - half
    elif kind == "diamond":
        distance = (across + down - half) / np.sqrt(2)
    elif kind == "triangle":  # the apex at the top, the base at the bottom of the extent
        distance = np.maximum((2 * across - y - half) / np.sqrt(5), y - half)
    elif kind == "cross":
        arm = half / 3
        upright = np.maximum(across - arm, down - half)
        distance = np.minimum(upright, np.maximum(across - half, down - arm))
    else:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    return np.clip(0.5 - distance, 0, 1)


def render(shapes: Iterable[Shape], size: int) -> np.ndarray:
    """The picture of some shapes.

    Args:
      shapes: in cells of their own.
      size: S, pixels of a side.

    Returns:
      uint8 [S, S, 3].

    Raises:
      UserError: the size is below `MIN_SIZE`.
    """
    check_size(size, "size")
    picture = np.full((size, size, 3), WHITE)
    pixels = np.arange(size) + 0.5
    for shape in shapes:
        x = pixels - (shape.column + 0.5) * size / GRID
        y = pixels - (shape.row + 0.5) * size / GRID
        part = coverage(shape.kind, x[None, :], y[:, None], half_extent(shape.size, size))[..., None]
        picture += part * (np.array(COLOURS[shape.colour], float) - picture)
    return np.rint(picture).astype(np.uint8)
