"""What a picture of coloured shapes shows, decided by a program.

Connected parts that are not white are compared with every shape that there is: a part is the shape that it overlaps
best with, if it overlaps well enough. Pictures that are a little noisy (a standard deviation of 8 of 255) or blurred
(by about a pixel) are read like sharp ones.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from cola_jax.data.scenes_pictures import (
    COLOURS,
    GRID,
    KINDS,
    SIZES,
    WHITE,
    Shape,
    centroid_offset,
    check_size,
    coverage,
    half_extent,
)

MAX_SHAPES = 4
_WORKING_SIDE = 64  # larger pictures are averaged down to this side or a little more
_PART = 70.0  # distance from white, in RGB, from which on a pixel belongs to a shape: a quarter of a colour's
_STAIN, _MOST_STAINED = 60.0, 0.005  # distance of a pixel that is not clean, and the share of such beside the shapes
_SPECK = 0.15  # of the area of the smallest shape: parts below are specks, and so much in all is overlooked
_COLOUR_DISTANCE = 75.0  # of the colour of a shape from its name's
_COLOUR_SHARE = 0.8  # of the pixels of a shape that have its colour
_OVERLAP = 0.8  # of a part and its shape: intersection over union
_BLURS = (0.0, 0.8, 1.4)  # of the shapes that a part is compared with, in pixels
_MARGIN = 2  # pixels around a part where its edge may fade
_CONNECTED = np.ones((3, 3), bool)
_AWAY = WHITE - np.array(list(COLOURS.values()), float)  # from each colour to white


class Seen(NamedTuple):
    """What a picture shows.

    Attributes:
      shapes: those that were recognised, from the top left to the bottom right.
      valid: whether all that is in the picture is 1 to 4 such shapes, in cells of their own, on a clean ground.
    """

    shapes: tuple[Shape, ...]
    valid: bool


def see(image: np.ndarray) -> Seen:
    """Reads a picture.

    Args:
      image: uint8 [S, S, 3], S at least `scenes_pictures.MIN_SIZE`.

    Raises:
      ValueError: it is no such array.
      UserError: it is too small.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"image of type {image.dtype} and shape {image.shape}: must be uint8 [S, S, 3]")
    check_size(len(image), "size of the image")
    pixels = WHITE - _reduced(image.astype(float))  # white is 0
    strength = np.linalg.norm(pixels, axis=-1)
    marked = strength > _PART
    labels, count = ndimage.label(marked, _CONNECTED)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    least = _SPECK * 2 * half_extent("small", len(pixels)) ** 2  # a diamond or a triangle has 2 half²
    parts = [part for part in range(1, count + 1) if areas[part] >= least]
    specks = areas[1:].sum() - sum(areas[part] for part in parts)
    clean = specks < least and _is_clean(strength, marked)
    # More parts than a picture can have need not be told apart.
    found = [_recognise(pixels, strength, labels, part) for part in parts[: 2 * GRID**2]]
    shapes = sorted((shape for shape in found if shape is not None), key=lambda shape: (shape.row, shape.column))
    cells = {(shape.column, shape.row) for shape in shapes}
    valid = clean and 1 <= len(parts) <= MAX_SHAPES and len(cells) == len(parts)
    return Seen(tuple(shapes), bool(valid))


def _reduced(image: np.ndarray) -> np.ndarray:
    """The picture, averaged over squares of pixels where it is large."""
    side = len(image)
    by = max(k for k in range(1, side + 1) if k == 1 or (side % k == 0 and side // k >= _WORKING_SIDE))
    return image.reshape(side // by, by, side // by, by, 3).mean((1, 3))


def _is_clean(strength: np.ndarray, marked: np.ndarray) -> bool:
    """Whether the ground is white but for noise."""
    ground = strength[~ndimage.binary_dilation(marked, _CONNECTED, iterations=_MARGIN)]
    return not len(ground) or bool(np.mean(ground > _STAIN) <= _MOST_STAINED and ground.mean() < _STAIN / 2)


def _recognise(pixels: np.ndarray, strength: np.ndarray, labels: np.ndarray, part: int) -> Shape | None:
    """The shape that a connected part is; None for one that is none."""
    inside = labels == part
    colour = _colour(pixels[inside & (strength >= 0.75 * np.percentile(strength[inside], 90))])
    if colour is None:
        return None
    away = _AWAY[list(COLOURS).index(colour)]
    around = ndimage.binary_dilation(inside, _CONNECTED, iterations=_MARGIN) & (inside | (labels == 0))
    covered = np.clip(pixels @ away / (away @ away), 0, 1) * around
    covered[covered < 0.12] = 0  # noise
    rows, columns = np.nonzero(around)
    covered = covered[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    mass = covered.sum()
    y, x = (np.arange(length) + 0.5 for length in covered.shape)
    x_mean, y_mean = covered.sum(0) @ x / mass, covered.sum(1) @ y / mass
    side = len(pixels)
    kind, size, overlap = _best_fit(covered, x - x_mean, y - y_mean, side)
    if overlap < _OVERLAP:
        return None
    x_middle = columns.min() + x_mean
    y_middle = rows.min() + y_mean - centroid_offset(kind, half_extent(size, side))
    column, row = (min(GRID - 1, max(0, int(middle * GRID / side))) for middle in (x_middle, y_middle))
    return Shape(kind, colour, size, column, row)


def _colour(pixels: np.ndarray) -> str | None:
    """The name of the colour that nearly all of some pixels [n, 3] have."""
    distances = np.linalg.norm(np.median(pixels, axis=0) - _AWAY, axis=-1)
    nearest = int(distances.argmin())
    # A pixel at an edge is paler, so that only its direction from white counts.
    alike = pixels @ (_AWAY / np.linalg.norm(_AWAY, axis=-1, keepdims=True)).T
    share = np.mean(alike.argmax(-1) == nearest)
    return list(COLOURS)[nearest] if distances[nearest] <= _COLOUR_DISTANCE and share >= _COLOUR_SHARE else None


@functools.cache
def _mass(kind: str, size: str, side: int) -> float:
    """The area of a shape in pixels."""
    pixels = np.arange(side) + 0.5 - side / 2
    return float(coverage(kind, pixels[None, :], pixels[:, None], half_extent(size, side)).sum())


def _best_fit(covered: np.ndarray, x: np.ndarray, y: np.ndarray, side: int) -> tuple[str, str, float]:
    """Kind, size and overlap of the shape that fits best.

    Args:
      covered: the share of each pixel that the part covers [h, w].
      x, y: pixels to the right of its centre of mass [w], and below it [h].
      side: of the picture, in pixels.
    """
    best = ("", "", 0.0)
    mass = covered.sum()
    for size in SIZES:
        half = half_extent(size, side)
        for kind in KINDS:
            # Masses that differ by so much cannot overlap enough.
            if not 0.5 < mass / _mass(kind, size, side) < 2:
                continue
            sharp = coverage(kind, x[None, :], y[:, None] + centroid_offset(kind, half), half)
            for blur in _BLURS:
                shape = ndimage.gaussian_filter(sharp, blur, mode="constant") if blur else sharp
                # What lies beyond the part's surroundings counts as well.
                union = np.maximum(shape, covered).sum() + max(0.0, _mass(kind, size, side) - shape.sum())
                overlap = np.minimum(shape, covered).sum() / union
                if overlap > best[2]:
                    best = (kind, size, float(overlap))
    return best
