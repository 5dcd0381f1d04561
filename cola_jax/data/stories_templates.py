"""Words and sentence templates of the synthetic stories, and their compiler.

The tables describe the language that `cola_jax.data.stories` generates:

* `SLOTS`: the slots of the global factor.  Each entry is one value of the slot and
  each of its words one *form* in which a sentence may show that value.
* `CHOICES`: the lists of words that are drawn locally, whatever the factor is.
* `NATURAL` and `ALIGNED`: the wordings of each sentence type, in narrative order.

A wording is plain text in which `{form}` stands for a form of a slot or for a list
of local choices.  The first letter of a sentence is made a capital when the grammar
is built.  Order matters in every table: a smaller grammar keeps the head of each
list, so genders alternate in `who` and the most useful wordings come first.

`compile_wordings` turns the tables into `Wording` objects, and `check_unambiguous`
makes sure that no sentence has two readings.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

# Forms that only show the gender of the hero.  All other forms must tell all values
# of their slot apart, which the grammar checks when it is built.
GENDER_FORMS = frozenset({"he", "his", "him", "child"})

# The slot that the gender forms belong to.
HERO_SLOT = "who"

_BOY = "he his him boy"
_GIRL = "she her her girl"

# Slot -> (its forms, one entry per value with the word of each form).
SLOTS = {
    "who": (
        "name he his him child",
        [
            name + ("/she/her/her/girl" if i % 2 else "/he/his/him/boy")
            for i, name in enumerate(
                "Tom Lily Ben Mia Sam Anna Max Rosa Leo Nora Jack Ella "
                "Finn Ruby Hugo Clara Owen Zoe Theo Ivy Noah Maya Oscar Emma".split()
            )
        ],
    ),
    "where": (
        "place feature",
        (
            "forest/trees garden/flowers village/houses castle/towers valley/hills "
            "cave/rocks market/stalls desert/dunes harbor/ships meadow/bushes "
            "barn/haystacks library/shelves"
        ).split(),
    ),
    "goal": (
        "goal use",
        (
            "kite/fly key/turn map/read lantern/light drum/play crown/wear ball/throw "
            "coin/spend ribbon/tie mirror/polish bell/ring whistle/blow wagon/pull "
            "puzzle/solve boat/sail seed/plant"
        ).split(),
    ),
    "mood": (
        "mood moodly feeling reacted",
        (
            "happy/happily/joy/smiled sad/sadly/sorrow/cried "
            "brave/bravely/courage/marched calm/calmly/peace/rested "
            "angry/angrily/anger/frowned proud/proudly/pride/cheered"
        ).split(),
    ),
    "ending": (
        "ended done outcome",
        (
            "kept/kept/treasure shared/shared/gift lost/lost/memory "
            "returned/returned/promise hid/hidden/secret sold/sold/bargain"
        ).split(),
    ),
}

CHOICES = {
    "time": "morning evening afternoon night",
    "weekday": "Monday Tuesday Friday Saturday Sunday",
    "weather": "sunny rainy windy cloudy snowy",
    "trait": "little clever kind young cheerful",
    "relative": "mother father sister brother uncle",
    "colour": "red blue green golden silver",
    "look": "shiny dusty muddy tiny",
    "manner": "slowly carefully quietly quickly",
    "number": "two three four seven",
    "size": "tall huge long thick",
    "barrier": "wall fence hedge gate",
    "gloom": "dark cold silent empty",
    "degree": "very rather quite truly",
    "inside": "heart mind head soul",
    "helper": "rabbit fox bird turtle mouse",
    "manners": "friendly wise gentle sleepy",
    "cover": "leaf stone basket blanket",
    "gust": "strong warm sudden cool",
    "food": "soup bread cake honey",
    "meal": "breakfast lunch dinner supper",
}

NATURAL = {
    "introduction": (
        "one {time}, {name} walked into the {place}.",
        "{name} was a {trait} {child} who lived in the {place}.",
        "on a {weather} day, {name} came to the {place}.",
        "once upon a time, a {trait} {child} called {name} lived in the {place}.",
        "in the {place}, among the old {feature}, lived {name}.",
        "{name} and {his} {relative} went to visit the {place}.",
    ),
    "wish": (
        "{he} wanted a {colour} {goal} more than anything else.",
        "{he} wished for a {goal} to {use}.",
        "{name} had always dreamed of owning a {colour} {goal}.",
        "more than toys or sweets, {he} needed a {goal}.",
        "{his} {relative} had told {him} about a wonderful {goal}.",
        "{name} thought it must be fun to {use} a {goal}.",
    ),
    "search": (
        "{he} looked for the {goal} behind the {feature}.",
        "{he} searched the whole {place} {manner} for the {goal}.",
        "a {size} {barrier} stood between {him} and the {goal}.",
        "for {number} hours, {he} hunted among the {feature}.",
        "nobody in the {place} had ever seen such a {goal}.",
        "the {place} was {gloom}, and the {goal} was nowhere to be found.",
    ),
    "feeling": (
        "{he} felt {degree} {mood}.",
        "{name} was {mood} and {reacted} for a while.",
        "{his} {inside} was full of {feeling}.",
        "{he} told {his} {relative} how {mood} {he} was.",
        "{feeling} filled {name}, and {he} {reacted}.",
        "without a word, {he} sat down and {reacted} {moodly}.",
    ),
    "turn": (
        "then a {manners} {helper} showed {him} the {goal}.",
        "suddenly {he} saw the {goal} under a {cover}.",
        "at last, the {goal} appeared between the {feature}.",
        "{name} followed a {helper} and found the {look} {goal}.",
        "a {gust} wind blew the {goal} right to {his} feet.",
        "when {he} stopped looking, a {helper} dropped the {goal} from above.",
    ),
    "ending": (
        "in the end, {he} {moodly} {ended} the {goal}.",
        "{name} {ended} the {goal} and went home {moodly}.",
        "the {goal} was {done}, and {name} {reacted} all the way home.",
        "so the {goal} became {his} {outcome}, and everybody ate {food}.",
        "{name} {ended} the {goal} just before {meal}.",
        "that {time}, {he} {moodly} told {his} friends the {goal} was {done}.",
    ),
}

# Exactly seven words each, and no mark but the full stop.
ALIGNED = {
    "introduction": (
        "one {time} {name} walked into the {place}.",
        "{name} was a {child} from the {place}.",
        "on {weekday} {name} came to the {place}.",
        "the {trait} {child} {name} loved the {place}.",
        "{name} and {his} {relative} visited the {place}.",
        "deep in the {place} there lived {name}.",
    ),
    "wish": (
        "{he} wanted to find a {colour} {goal}.",
        "{he} wished for a {goal} to {use}.",
        "{name} had always dreamed of a {goal}.",
        "{his} {relative} spoke of a {colour} {goal}.",
        "{name} hoped to {use} a {colour} {goal}.",
    ),
    "search": (
        "{he} sought the {goal} behind the {feature}.",
        "{he} searched the {place} for the {goal}.",
        "a {size} {barrier} hid the {goal} completely.",
        "nobody in the {place} saw the {goal}.",
        "{name} {manner} hunted among the {feature} alone.",
    ),
    "feeling": (
        "{he} felt {degree} {mood} for a while.",
        "{name} was {mood} and {reacted} all {time}.",
        "{his} {inside} was now full of {feeling}.",
        "{feeling} filled {name} and so {he} {reacted}.",
        "{he} told {his} {relative} about {his} {feeling}.",
    ),
    "turn": (
        "then a {helper} showed {him} the {goal}.",
        "at last {he} found the {look} {goal}.",
        "the {goal} lay hidden among the {feature}.",
        "{name} followed a {helper} to the {goal}.",
        "a {gust} wind brought {him} the {goal}.",
    ),
    "ending": (
        "{he} {moodly} {ended} the {goal} that {time}.",
        "{name} {ended} the {goal} and {reacted} {moodly}.",
        "the {goal} was {done} and {he} {reacted}.",
        "so the {goal} became {his} {outcome} forever.",
        "everyone {moodly} heard the {goal} was {done}.",
    ),
}

_FIELD = re.compile(r"\{(\w+)\}")


class Categorical:
    """A categorical with weights ``1 / (i + 4)`` over ``i = 0 .. size - 1``."""

    def __init__(self, size: int):
        weights = [1.0 / (i + 4) for i in range(size)]
        total = math.fsum(weights)
        self.probs = [w / total for w in weights]
        self.log_probs = [math.log(p) for p in self.probs]
        self.entropy = -math.fsum(p * math.log(p) for p in self.probs)
        # Without the last boundary, rounding can't lead past the last value.
        self._bounds = list(itertools.accumulate(self.probs))[:-1]

    def pick(self, uniform: float) -> int:
        """Maps a uniform draw from [0, 1) to a value."""
        return bisect.bisect_right(self._bounds, uniform)


@dataclasses.dataclass(frozen=True)
class Position:
    """One word of a wording: fixed, showing a slot, or chosen locally.

    Attributes:
      words: The words that can stand here, in the order of the values.
      slot: Index of the slot that is shown, or None.
      determines: Whether each value of the slot has its own word.
      choice: Distribution of a local choice, or None.
      masks: For a slot, word to the bit set of the values it allows.
      log_probs: For a local choice, word to its log-probability.
    """

    words: tuple[str, ...]
    slot: int | None = None
    determines: bool = False
    choice: Categorical | None = None
    masks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    log_probs: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Wording:
    """A compiled template; `prob` is its probability among those of its type."""

    type: str
    prob: float
    positions: tuple[Position, ...]

    @property
    def slots(self) -> frozenset[int]:
        """The slots whose value the sentence fully shows."""
        return frozenset(p.slot for p in self.positions if p.determines)

    @property
    def mentions(self) -> frozenset[int]:
        """The slots the sentence says anything about."""
        return frozenset(p.slot for p in self.positions if p.slot is not None)

    @property
    def choices(self) -> list[Categorical]:
        """The local choices of the sentence, in order."""
        return [p.choice for p in self.positions if p.choice is not None]

    @property
    def length(self) -> int:
        """Tokens of the sentence: words, commas and the full stop."""
        return sum(len(marks(p.words[0])) for p in self.positions)


def marks(word: str) -> list[str]:
    """Splits a word from the punctuation behind it."""
    return re.findall(r"[^,.]+|[,.]", word)


def _prefix(items: Sequence, kept: int) -> Sequence:
    return items[:kept] if kept else items


def slot_forms(values: int) -> dict[str, tuple[int, list[str]]]:
    """Returns form -> (slot index, word of each kept value); `values=0` keeps all."""
    forms = {}
    for slot, (names, rows) in enumerate(SLOTS.values()):
        columns = zip(*(row.split("/") for row in _prefix(rows, values)), strict=True)
        for name, words in zip(names.split(), columns, strict=True):
            forms[name] = (slot, list(words))
    return forms


def _compile_position(token: str, first: bool, forms: Mapping[str, tuple[int, list[str]]], kept: int) -> Position:
    """Compiles one word of a template; `kept` limits the lists of local choices."""

    def finish(words: Iterable[str]) -> tuple[str, ...]:
        filled = [_FIELD.sub(word, token) for word in words]
        return tuple(w[0].upper() + w[1:] if first else w for w in filled)

    field = _FIELD.search(token)
    if field is None:
        return Position(finish([""]))
    name = field[1]
    if name in forms:
        slot, fillers = forms[name]
        words = finish(fillers)
        masks: dict[str, int] = {}
        for value, word in enumerate(words):
            masks[word] = masks.get(word, 0) | 1 << value
        determines = name not in GENDER_FORMS
        if determines and len(masks) < len(words):
            raise ValueError(f"form {name!r}: two values share a word")
        return Position(words, slot=slot, determines=determines, masks=masks)
    words = finish(_prefix(CHOICES[name].split(), kept))
    choice = Categorical(len(words))
    log_probs = dict(zip(words, choice.log_probs, strict=True))
    if len(log_probs) < len(words):
        raise ValueError(f"choices {name!r}: a word is listed twice")
    return Position(words, choice=choice, log_probs=log_probs)


def compile_wordings(aligned: bool, values: int, variants: int, choices: int) -> dict[str, list[Wording]]:
    """Compiles the wordings of each sentence type, in narrative order.

    Args:
      aligned: Whether to use `ALIGNED` rather than `NATURAL`.
      values: Values kept per slot; 0 keeps all.
      variants: Wordings kept per sentence type; 0 keeps all.
      choices: Words kept per list of local choices; 0 keeps all.

    Raises:
      ValueError: If two values of a form or two words of a list look the same.
    """
    forms = slot_forms(values)
    result = {}
    for kind, templates in (ALIGNED if aligned else NATURAL).items():
        templates = _prefix(templates, variants)
        result[kind] = [
            Wording(
                kind,
                prob,
                tuple(_compile_position(token, i == 0, forms, choices) for i, token in enumerate(template.split())),
            )
            for template, prob in zip(templates, Categorical(len(templates)).probs, strict=True)
        ]
    return result


def structures(fewest: int, most: int) -> dict[tuple[str, ...], float]:
    """Returns the legal sequences of sentence types with their probabilities.

    Args:
      fewest: Fewest sentences of a story, 2 or more.
      most: Most sentences, `fewest` to the number of sentence types.
    """
    first, *middle, last = NATURAL
    counts = range(fewest, most + 1)
    result = {}
    for count in counts:
        share = 1.0 / (len(counts) * math.comb(len(middle), count - 2))
        for kept in itertools.combinations(middle, count - 2):
            result[(first, *kept, last)] = share
    return result


def check_unambiguous(wordings: Sequence[Wording]) -> None:
    """Checks that a text has at most one reading.

    Two wordings can't give the same sentence if their word counts differ or if no word
    can stand at the same place of both.  Within a wording each place has one reading
    by construction, and full stops separate sentences.

    Raises:
      ValueError: If two wordings may overlap, a full stop isn't exactly at the end, or
        an introduction doesn't name the hero (pronouns would then carry information
        that the entropy formulas leave out).
    """
    hero, opening = list(SLOTS).index(HERO_SLOT), next(iter(NATURAL))
    for wording in wordings:
        stops = [word.find(".") for p in wording.positions for word in p.words]
        last = [word.find(".") + 1 == len(word) for word in wording.positions[-1].words]
        if not all(last) or sum(s >= 0 for s in stops) != len(last):
            raise ValueError(f"{wording.type}: the full stop must be at the end only")
        if wording.type == opening and hero not in wording.slots:
            raise ValueError(f"{wording.type}: must name the hero")
    for one, two in itertools.combinations(wordings, 2):
        pairs = list(zip(one.positions, two.positions, strict=False))
        same_length = len(one.positions) == len(two.positions)
        if same_length and not any(set(a.words).isdisjoint(b.words) for a, b in pairs):
            words = " ".join(p.words[0] for p in one.positions)
            raise ValueError(f"{two.type}: a wording overlaps with {words!r}")
