"""Texts under rules: the generators obey them, and the judges see every way to break them."""

import itertools
from collections import Counter

import numpy as np
import pytest

from cola_jax.data import structures
from cola_jax.data.structures import RULES, Sizes
from cola_jax.types import UserError

SIZES = Sizes()


def some(name: str, count: int, seed: int = 0, sizes: Sizes = SIZES) -> list[str]:
    return list(itertools.islice(structures.documents(RULES[name], sizes, seed), count))


@pytest.mark.parametrize("name", RULES)
def test_documents_obey_their_rule_and_no_other_text_near_them_does(name):
    rule, draw = RULES[name], np.random.default_rng(0)
    texts = some(name, 200)
    assert texts == some(name, 200) != some(name, 200, 1) and len(set(texts)) > 150
    for text in texts:
        words = text.split(" ")
        assert rule.valid(text) and rule.open(text) == 0
        assert not any(
            rule.valid(" ".join(words[:end])) for end in range(1, len(words)) if rule.open(" ".join(words[:end]))
        )
        assert not rule.valid(f"{text} {words[-1]}")
        if name != "json":  # where more white space is allowed
            assert not rule.valid(f" {text}") and not rule.valid(text.replace(" ", "  ", 1))
        other = list(words)
        place = int(draw.integers(len(words)))
        other[place] = "?"
        assert not rule.valid(" ".join(other))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dyck", ""),
        ("dyck", "(a b)"),
        ("dyck", "(a (b a) b)"),
        ("dyck", "a) (a"),
        ("dyck", "(a a) (b"),
        ("copy", "ba be = be ba"),
        ("copy", "ba be = ba"),
        ("copy", "ba be < be ba"),
        ("copy", "= "),
        ("copy", "xx = xx"),
        ("reverse", "ba be < ba be"),
        ("json", "{}"),
        ("json", '{"name": "Anna"'),
        ("json", '{"name": "Anna", "age": true, "pets": [], "home": {"number": 5, "rooms": []}}'),
        ("json", '{"name": "Anna", "age": 100, "pets": [], "home": {"number": 5, "rooms": []}}'),
        ("json", '{"name": "Anna", "age": 9, "pets": ["tiger"], "home": {"number": 5, "rooms": []}}'),
        ("json", '{"age": 9, "name": "Anna", "pets": [], "home": {"number": 5, "rooms": []}}'),
        ("json", '{"name": "Anna", "age": 9, "pets": [], "home": {"number": 5, "rooms": [{"room": "hall"}]}}'),
    ],
)
def test_a_text_that_breaks_its_rule_is_not_valid(name, text):
    assert not RULES[name].valid(text)


def test_shapes_of_brackets_are_drawn_equally():
    counts = Counter(text.replace(" ", "").replace("a", "") for text in some("dyck", 6000, sizes=Sizes(1, 3)))
    assert set(counts) == {"()()", "(())", "()()()", "(()())", "((()))", "(())()", "()(())"}
    expected = {shape: 6000 / (4 if len(shape) == 4 else 10) for shape in counts}
    chi_squared = sum((counts[shape] - mean) ** 2 / mean for shape, mean in expected.items())
    assert chi_squared < 22.5  # 6 degrees of freedom, p = 0.001


@pytest.mark.parametrize("name", RULES)
def test_prompts_leave_something_open_and_are_of_unknown_documents(name):
    known = set(some(name, 50))
    found = list(structures.prompts(RULES[name], SIZES, 0, known, 60))
    for begin, rest in found:
        assert RULES[name].open(begin) > 0 and RULES[name].valid(begin + rest) and begin + rest not in known
    assert len({RULES[name].open(begin) for begin, _ in found}) > 2
    assert RULES["dyck"].open("(a (b b) (c (d") == 3 and RULES["json"].open('{"home": {"rooms": [') == 3
    assert RULES["copy"].open("ba be bi = ba") == 2 and RULES["copy"].open("ba be") == 0


def test_a_corpus_of_everything_leaves_no_prompts():
    everything = set(some("dyck", 2000, sizes=Sizes(1, 2)))
    with pytest.raises(UserError, match="no document is left for a prompt"):
        next(structures.prompts(RULES["dyck"], Sizes(1, 2), 1, everything, 1))
