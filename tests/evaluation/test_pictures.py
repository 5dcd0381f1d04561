"""Measures of pictures against numpy."""

import math

import numpy as np
import pytest

from cola_jax.evaluation import pictures


def test_errors_of_reconstruction():
    real = np.full((3, 4, 4, 3), 100, np.uint8)
    decoded = real.copy()
    decoded[1] += 51  # a fifth of the range everywhere
    decoded[2, :2] += 51  # in half of the picture
    found = pictures.reconstruction(real, decoded)
    assert found["absolute"].mean == pytest.approx((0 + 0.2 + 0.1) / 3)
    assert found["absolute"].error == pytest.approx(np.std([0, 0.2, 0.1], ddof=1) / math.sqrt(3))
    flawless = -10 * math.log10(1 / 255**2 / 48)  # a perfect copy counts as one level of one value
    assert found["psnr"].mean == pytest.approx((flawless - 10 * math.log10(0.04) - 10 * math.log10(0.02)) / 3)


def test_words_of_captions():
    captions = ["flat red heart.", "Round cat", "flat cat", "a catalogue"]
    wanted = pictures.word_of(captions, ["flat", "round", "heart"])
    assert wanted.tolist() == [-1, 1, 0, -1]  # both of two; none
    assert tuple(pictures.told_apart(np.array([0, 1, 1, -1]), wanted)) == (1, 2)
