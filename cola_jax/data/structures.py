"""Texts under a rule that reaches far, and whether a text obeys it: brackets, JSON of a schema, copies, reversals.

Documents are drawn from a generator, so that a corpus is a function of a seed; whether a text is valid is decided
exactly. A prompt is the beginning of a document that leaves something open: brackets that must be closed in order,
objects and lists, words that must come again. `launch/structures.py` writes corpora and prompts; the tasks of these
names judge what a model writes behind them.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cola_jax.types import UserError

_NAMES = "Anna Ben Carl Dora Emil Frida Gus Hanna Ivo Jana".split()
_ANIMALS = "cat dog hen cow goat mouse".split()
_ROOMS = "kitchen hall attic cellar bath study".split()
_SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
_ATTEMPTS = 1000


class Sizes(NamedTuple):
    """How large documents are.

    Attributes:
      kinds: of brackets, at most 676: the k of Dyck-k.
      longest: pairs of brackets of a document, words that are copied: from 2 to so many, each number as often.
    """

    kinds: int = 32
    longest: int = 12


class Rule(NamedTuple):
    """A rule that texts obey.

    Attributes:
      document: (generator, sizes) -> a text that obeys it. Words are divided by single spaces.
      valid: whether a text obeys it, and ends where it may.
      open: what a beginning leaves open: brackets, levels of JSON, words; 0: nothing that must come back.
    """

    document: Callable[[np.random.Generator, Sizes], str]
    valid: Callable[[str], bool]
    open: Callable[[str], int]


def _kind(index: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters[index % 26] + (letters[index // 26 - 1] if index >= 26 else "")


def _dyck(draw: np.random.Generator, sizes: Sizes) -> str:
    """A word of brackets, uniform over the shapes with its number of pairs, each pair of any kind."""
    pairs = int(draw.integers(2, sizes.longest + 1))
    left, stack, words = pairs, [], []
    while left or stack:
        depth = len(stack)
        # Of the ways to go on with `left` opening and left + depth closing brackets, the share that opens next.
        opens = left * (depth + 2) / ((depth + 1) * (2 * left + depth))
        if draw.random() < opens:
            stack.append(_kind(int(draw.integers(sizes.kinds))))
            words.append(f"({stack[-1]}")
            left -= 1
        else:
            words.append(f"{stack.pop()})")
    return " ".join(words)


def _brackets(text: str) -> list[str] | None:
    """The kinds that are open at the end of a text, or None where it is no beginning of a word of brackets."""
    stack: list[str] = []
    for word in text.split(" ") if text else ():
        if re.fullmatch(r"\([a-z]{1,2}", word):
            stack.append(word[1:])
        elif not re.fullmatch(r"[a-z]{1,2}\)", word) or not stack or stack.pop() != word[:-1]:
            return None
    return stack


def _json(draw: np.random.Generator, sizes: Sizes) -> str:
    def some(words, most: int) -> list[str]:
        return [words[int(i)] for i in draw.integers(0, len(words), draw.integers(0, most + 1))]

    def number() -> int:
        return int(draw.integers(1, 100))

    rooms = [{"room": room, "windows": int(draw.integers(0, 10))} for room in some(_ROOMS, 2)]
    home = {"number": number(), "rooms": rooms}
    found = {"name": _NAMES[int(draw.integers(len(_NAMES)))], "age": number(), "pets": some(_ANIMALS, 3), "home": home}
    return json.dumps(found)


def _is_number(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _has(value: Any, **checks: Callable[[Any], bool]) -> bool:
    """Whether a value is an object of exactly these fields, in this order, each of which passes."""
    same = isinstance(value, dict) and list(value) == list(checks)
    return same and all(check(value[name]) for name, check in checks.items())


def _is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _obeys_schema(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False

    def room(value) -> bool:
        return _has(value, room=_ROOMS.__contains__, windows=lambda v: _is_number(v, 0, 9))

    def home(value) -> bool:
        return _has(value, number=lambda v: _is_number(v, 1, 99), rooms=lambda v: _is_list(v, room))

    return _has(
        value,
        name=_NAMES.__contains__,
        age=lambda v: _is_number(v, 1, 99),
        pets=lambda v: _is_list(v, _ANIMALS.__contains__),
        home=home,
    )


def _levels(text: str) -> int:
    """Objects and lists that are open at the end of a beginning of JSON."""
    outside = re.sub(r'"[^"]*("|$)', "", text)
    return sum(outside.count(sign) for sign in "[{") - sum(outside.count(sign) for sign in "]}")


def _twice(sign: str, backwards: bool) -> Rule:
    """Words, a sign, and the same words again, perhaps backwards."""

    def document(draw: np.random.Generator, sizes: Sizes) -> str:
        words = [_SYLLABLES[int(i)] for i in draw.integers(0, len(_SYLLABLES), draw.integers(2, sizes.longest + 1))]
        return " ".join([*words, sign, *(words[::-1] if backwards else words)])

    def halves(text: str) -> tuple[list[str], list[str]]:
        first, _, second = text.partition(f" {sign}")
        return first.split(), second.split()

    def valid(text: str) -> bool:
        first, second = halves(text)
        known = bool(first) and set(first) <= set(_SYLLABLES)
        return known and text == " ".join([*first, sign, *second]) and second == (first[::-1] if backwards else first)

    def still_open(text: str) -> int:
        first, second = halves(text)
        return len(first) - len(second) if f" {sign}" in text else 0

    return Rule(document, valid, still_open)


RULES: dict[str, Rule] = {
    "dyck": Rule(_dyck, lambda text: bool(text) and _brackets(text) == [], lambda text: len(_brackets(text) or ())),
    "json": Rule(_json, _obeys_schema, _levels),
    "copy": _twice("=", backwards=False),
    "reverse": _twice("<", backwards=True),
}


def documents(rule: Rule, sizes: Sizes, seed: int) -> Iterator[str]:
    """Documents without end, a function of the seed."""
    draw = np.random.default_rng(seed)
    while True:
        yield rule.document(draw, sizes)


def prompts(rule: Rule, sizes: Sizes, seed: int, known: set[str], count: int) -> Iterator[tuple[str, str]]:
    """Beginnings of documents that are not in ``known``, and what stands behind them in these.

    A beginning leaves something open; each such place of its document is as likely.

    Raises:
      UserError: nearly all documents are known.
    """
    drawn = documents(rule, sizes, seed)
    draw = np.random.default_rng(seed + 1)
    for _ in range(count):
        document = next((text for text in itertools.islice(drawn, _ATTEMPTS) if text not in known), None)
        if document is None:
            raise UserError(
                f"no document is left for a prompt: {_ATTEMPTS} in a row are in the corpus; must be smaller"
            )
        words = document.split(" ")
        begins = [begin for end in range(1, len(words)) if rule.open(begin := " ".join(words[:end]))]
        begin = begins[int(draw.integers(len(begins)))]
        yield begin, document[len(begin) :]
