"""Text that is never taken back."""

import numpy as np
import pytest

from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.serving.text import TextStream

DECODE = ByteTokenizer().decode


def pieces(text: bytes, cuts, stops=()):
    """(what each group of bytes gave, whether a stop was found)."""
    stream, found, edges = TextStream(DECODE, stops), [], [0, *sorted(cuts), len(text)]
    for begin, end in zip(edges, edges[1:], strict=False):
        found.append(stream.add(list(text[begin:end]), end == len(text)))
    return found, stream.stopped


def test_a_character_comes_when_it_is_whole():
    text = "aé😀b".encode()
    assert pieces(text, range(1, len(text)))[0] == ["a", "", "é", "", "", "", "😀", "b"]
    assert pieces("aé".encode()[:-1], [1])[0] == ["a", "\ufffd"]  # it never was


def test_the_beginning_of_a_stop_text_is_held_back():
    assert pieces(b"one END", range(1, 7), ["END"]) == (["o", "n", "e", " ", "", "", ""], True)
    assert pieces(b"one ENough", range(1, 10), ["END"])[0] == ["o", "n", "e", " ", "", "", "ENo", "u", "g", "h"]
    assert pieces(b"one EN", range(1, 6), ["END"])[0][-1] == "EN"


def test_nothing_comes_behind_a_stop_text():
    stream = TextStream(DECODE, ["x"])
    assert stream.add(list(b"axb"), False) == "a" and stream.stopped
    assert stream.add(list(b"more"), True) == ""


@pytest.mark.parametrize("seed", range(40))
def test_the_text_does_not_depend_on_how_tokens_were_grouped(seed):
    draw = np.random.default_rng(seed)
    text = "".join(draw.choice(["a", "b", "é", "ab", "😀"], 12)).encode()
    stops = ["".join(draw.choice(["a", "b", "é"], draw.integers(1, 4))) for _ in range(draw.integers(0, 4))]
    whole, stopped = pieces(text, [], stops)
    if not stopped:
        assert whole == [text.decode()]
    for _ in range(10):
        cuts = draw.choice(np.arange(1, len(text)), draw.integers(0, len(text) - 1), replace=False).tolist()
        found, also = pieces(text, cuts, stops)
        assert "".join(found) == whole[0] and also == stopped
