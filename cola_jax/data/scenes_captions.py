"""Captions of pictures of coloured shapes: what they say, how it is worded, and whether a picture shows it."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from cola_jax.data.scenes_pictures import COLOURS, KINDS, SIZES, Shape

OPENINGS = ("", "There is", "Here is", "The picture shows")
PLACES = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)
RELATIONS = ("left of", "right of", "above", "below")
_NAMED = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
_PLACES = "|".join(itertools.chain(*PLACES))
_CLAUSE = re.compile(rf"{_NAMED}(?: ({'|'.join(RELATIONS)}) {_NAMED}| ({_PLACES}))?")


class Named(NamedTuple):
    """What a caption says of one shape; ``size`` is None where it does not say it."""

    size: str | None
    colour: str
    kind: str


class Clause(NamedTuple):
    """What a caption says of where shapes are.

    Attributes:
      first: index of a shape of the caption.
      says: one of `RELATIONS`, in which it stands to the next shape; one of `PLACES`; "" for nothing.
    """

    first: int
    says: str


class Facts(NamedTuple):
    """What a caption says: its shapes in their order, and its clauses."""

    shapes: tuple[Named, ...]
    clauses: tuple[Clause, ...]


class Verdict(NamedTuple):
    """Whether a picture shows what a caption says.

    Attributes:
      valid: the picture is a legal one (`scenes_reading.Seen`), and the caption one of the grammar.
      shapes: it has the kinds that the caption names, each as often, and no others.
      colours: likewise the colours.
      sizes: each shape that the caption gives a size is there, with its kind and colour, and has it.
      relations: what each clause says holds for shapes of these kinds and colours.
      all: it is valid, kinds and colours belong together as the caption says, and all of the above holds.
    """

    valid: bool
    shapes: bool
    colours: bool
    sizes: bool
    relations: bool
    all: bool


def holding(first: Shape, second: Shape) -> tuple[str, ...]:
    """The relations in which the first shape stands to the second."""
    return holding_in((first.column, first.row), (second.column, second.row))


def holding_in(first: tuple[int, int], second: tuple[int, int]) -> tuple[str, ...]:
    """`holding`, of shapes in these cells (column, row)."""
    pairs = zip(first, second, (RELATIONS[:2], RELATIONS[2:]), strict=True)
    return tuple(names[int(a > b)] for a, b, names in pairs if a != b)


def widths_of(facts: Facts) -> tuple[int, ...]:
    """How many shapes each clause names."""
    firsts = [*(clause.first for clause in facts.clauses), len(facts.shapes)]
    return tuple(stop - start for start, stop in itertools.pairwise(firsts))


def word(facts: Facts, opening: int) -> str:
    """The text of a caption."""
    names = [" ".join(filter(None, ("a", *each))) for each in facts.shapes]
    parts = []
    for clause, width in zip(facts.clauses, widths_of(facts), strict=True):
        words = [names[clause.first], clause.says, names[clause.first + 1] if width == 2 else ""]
        parts.append(" ".join(filter(None, words)))
    text = " ".join(filter(None, [OPENINGS[opening], " and ".join(parts)]))
    return f"{text[0].upper()}{text[1:]}."


def read(body: str) -> Facts | None:
    """What the clauses of a caption say; None for other text."""
    shapes, clauses = [], []
    for part in body.split(" and "):
        found = _CLAUSE.fullmatch(part)
        if found is None:
            return None
        size, colour, kind, relation, *second, place = found.groups()
        clauses.append(Clause(len(shapes), relation or place or ""))
        shapes.append(Named(size, colour, kind))
        if relation:
            shapes.append(Named(*second))
    return Facts(tuple(shapes), tuple(clauses))


def looks(shapes: tuple[Shape, ...]) -> Counter:
    """How often each (colour, kind) is there."""
    return Counter((shape.colour, shape.kind) for shape in shapes)


def names(facts: Facts) -> Counter:
    """How often a caption names each (colour, kind)."""
    return Counter((each.colour, each.kind) for each in facts.shapes)


def find(facts: Facts, shapes: tuple[Shape, ...]) -> list[Shape | None]:
    """The shape that each name of a caption means; None where none has its kind and colour, or several do."""
    counts = looks(shapes)
    known = {(shape.colour, shape.kind): shape for shape in shapes if counts[shape.colour, shape.kind] == 1}
    return [known.get((each.colour, each.kind)) for each in facts.shapes]


def _clause_holds(clause: Clause, found: list[Shape | None]) -> Iterator[bool]:
    """Whether the shapes of a clause are there, and are where it says."""
    first = found[clause.first]
    yield first is not None
    if clause.says in RELATIONS:
        second = found[clause.first + 1]
        yield second is not None and first is not None and clause.says in holding(first, second)
    elif clause.says:
        yield first is not None and PLACES[first.row][first.column] == clause.says


def judge(facts: Facts, shapes: tuple[Shape, ...]) -> Verdict:
    """The verdict on shapes that are there, taken for a valid picture."""
    found = find(facts, shapes)
    kinds = Counter(shape.kind for shape in shapes) == Counter(each.kind for each in facts.shapes)
    colours = Counter(shape.colour for shape in shapes) == Counter(each.colour for each in facts.shapes)
    sizes = all(
        each.size is None or (shape is not None and shape.size == each.size)
        for each, shape in zip(facts.shapes, found, strict=True)
    )
    relations = all(itertools.chain(*(_clause_holds(clause, found) for clause in facts.clauses)))
    together = looks(shapes) == names(facts)
    return Verdict(True, kinds, colours, sizes, relations, together and kinds and colours and sizes and relations)
