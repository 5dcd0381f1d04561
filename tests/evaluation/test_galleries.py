import sys

import numpy as np
import pytest
from PIL import Image

from cola_jax.evaluation import galleries
from cola_jax.types import UserError

IMAGES = np.random.default_rng(0).integers(0, 200, (5, 64, 64, 3)).astype(np.uint8)
CAPTIONS = [
    "a red circle",
    "",
    "a large blue square to the left of a small green triangle and much more of it",
    "b",
    "ü",
]


def cells(columns, line_height=0, count=5):
    """(top, left) of the enlarged images, 128 pixels and a margin of 6 apart."""
    return [(6 + n // columns * (134 + line_height), 6 + n % columns * 134) for n in range(count)]


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_a_sheet_holds_every_image_and_light_grey(columns):
    found = galleries.sheet(IMAGES, columns=columns)
    rows = -(-5 // columns)
    assert found.dtype == np.uint8 and found.shape == (6 + rows * 134, 6 + columns * 134, 3)
    rest = found.copy()
    for image, (top, left) in zip(IMAGES, cells(columns), strict=True):
        shown = found[top : top + 128, left : left + 128]
        for row in range(2):
            for column in range(2):
                np.testing.assert_array_equal(shown[row::2, column::2], image)
        rest[top : top + 128, left : left + 128] = 235
    assert np.all(rest == 235)


def test_a_sheet_is_no_wider_than_its_images():
    assert galleries.sheet(IMAGES[:2], columns=8).shape == (140, 274, 3)


def test_large_images_keep_their_size():
    assert galleries.sheet(np.zeros((1, 100, 130, 3), np.uint8)).shape == (112, 142, 3)


def test_captions_are_under_their_images():
    plain, found = galleries.sheet(IMAGES, columns=3), galleries.sheet(IMAGES, CAPTIONS, columns=3)
    places = cells(3, line_height=45)  # three lines of 15 pixels: the longest caption has them
    assert found.shape == (plain.shape[0] + 2 * 45, *plain.shape[1:])
    ink = []
    for image, (top, left) in zip(IMAGES, places, strict=True):
        np.testing.assert_array_equal(found[top : top + 128 : 2, left : left + 128 : 2], image)
        ink.append((found[top + 128 : top + 128 + 51, left : left + 134] < 128).any(-1))
    assert [mask.any() for mask in ink] == [True, False, True, True, True]
    assert ink[2][:15].any() and ink[2][15:30].any() and ink[2][30:45].any() and not ink[0][16:].any()
    assert ink[0].sum() > 3 * ink[3].sum()
    inside = sum(mask[:, :128].sum() for mask in ink)
    assert inside == sum(mask.sum() for mask in ink)  # none beyond the image's width


def test_long_captions_are_cut():
    lines = galleries._lines(" ".join(["word"] * 100), 128)
    assert len(lines) == 3 and lines[-1].endswith("…") and lines[0].startswith("word word")
    assert all(galleries._font().getlength(line) <= 128 for line in galleries._lines("W" * 90, 128))
    assert galleries._lines("two\nlines", 128) == ["two lines"]


def test_a_file_is_the_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")
    galleries.write(path, IMAGES, CAPTIONS, columns=2)
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.array(image), galleries.sheet(IMAGES, CAPTIONS, columns=2))
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")
    with pytest.raises(UserError):
        galleries.write(path, IMAGES, CAPTIONS[:2])
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("images", "captions", "columns", "message"),
    [
        (IMAGES.astype(np.float32), None, 8, r"float32\[5, 64, 64, 3\]: must be uint8 \[n, H, W, 3\]"),
        (IMAGES[..., :1], None, 8, r"uint8\[5, 64, 64, 1\]: must be"),
        (IMAGES[:0], None, 8, r"uint8\[0, 64, 64, 3\]: must be"),
        (IMAGES[0], None, 8, r"uint8\[64, 64, 3\]: must be"),
        (IMAGES, ["one"], 8, "1 captions for a sheet of 5 images: must be one for each"),
        (IMAGES, None, 0, "columns = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_a_sheet_is_refused(images, captions, columns, message):
    with pytest.raises(UserError, match=message):
        galleries.sheet(images, captions, columns)


def test_without_pillow_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"needs the package Pillow: pip install 'cola_jax\[images\]'"):
        galleries.write(tmp_path / "sheet.png", IMAGES)
