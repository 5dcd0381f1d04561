"""Pictures of one to four coloured shapes with captions from a grammar, whose distribution is known exactly.

A scene is drawn in two steps, everything uniformly. First the shapes: how many, which kinds and colours (no two shapes
of a scene share both), their sizes, and their cells of a 3 x 3 grid. Then what the caption says: the order in which it
names the shapes, whether it says the size of each (a toss), how they are put into clauses, and for a clause of two
shapes one of the relations that hold between them. A clause of one shape says where it is.

    A small red circle left of a green square and a large blue cross at the top.

A caption names every shape with its colour. Captions have at most one reading, so that their probabilities and
entropies have closed forms; all are in nats. A caption of the grammar contradicts no other part of itself: its
probability is positive.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cola_jax.config import ScenesConfig
from cola_jax.data import scenes_captions as captions
from cola_jax.data import scenes_pictures
from cola_jax.data.scenes_pictures import COLOURS, GRID, KINDS, SIZES, Shape
from cola_jax.data.scenes_reading import Seen, see

# How many shapes each clause names, by the number of shapes.
_CLAUSES = {1: ((1,),), 2: ((2,),), 3: ((2, 1), (1, 2)), 4: ((2, 2),)}
_CELLS = tuple((column, row) for row in range(GRID) for column in range(GRID))


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture and what its caption says.

    Attributes:
      shapes: in the order in which the caption names them.
      facts: what the caption says.
      opening: index of `scenes_captions.OPENINGS`.
    """

    shapes: tuple[Shape, ...]
    facts: captions.Facts
    opening: int


def _says(width: int, cells: tuple) -> tuple[str, ...]:
    """What a clause of so many shapes may say of shapes in these cells."""
    return captions.holding_in(*cells) if width == 2 else (captions.PLACES[cells[0][1]][cells[0][0]],)


@functools.cache
def _clauses(widths: tuple[int, ...]) -> tuple[Mapping[tuple[str, ...], float], float]:
    """Probabilities of what clauses of so many shapes say, and their mean entropy given the cells."""
    probs, entropy = Counter(), 0.0
    placements = list(itertools.permutations(_CELLS, sum(widths)))
    for cells in placements:
        rest = iter(cells)
        options = [_says(width, tuple(itertools.islice(rest, width))) for width in widths]
        number = math.prod(map(len, options))
        entropy += math.log(number) / len(placements)
        for said in itertools.product(*options):
            probs[said] += 1 / (number * len(placements))
    return probs, entropy


def _pick(draws: Iterator[float], options: Sequence):
    """One of some options."""
    return options[int(next(draws) * len(options))]


def _distinct(draws: Iterator[float], options: Sequence, count: int) -> list:
    """Different ones of some options, in any order."""
    left = list(options)
    return [left.pop(int(next(draws) * len(left))) for _ in range(count)]


class Scenes:
    """The distribution of scenes: sampling, drawing, exact probabilities, and judging.

    Instances hold no random state and are safe to share.
    """

    def __init__(self, config: ScenesConfig | None = None):
        """Args:
          config: Difficulty; the default is the full grammar.

        Raises:
          UserError: The config is out of range.
        """
        self.config = ScenesConfig() if config is None else config
        self.config.validate()
        self.kinds, self.colours = KINDS[: self.config.kinds], tuple(COLOURS)[: self.config.colours]
        self._looks = [(colour, kind) for colour in self.colours for kind in self.kinds]
        self._sizes = tuple(SIZES) if self.config.sizes else ("large",)

    def _patterns(self, count: int) -> tuple[tuple[int, ...], ...]:
        return _CLAUSES[count] if self.config.relations else ((1,) * count,)

    # ---- sampling --------------------------------------------------------------

    def scene(self, seed: int, number: int) -> Scene:
        """Returns scene `number` of the endless sequence that `seed` names, a pure function of both.

        Args:
          seed: 0 to 2**64 - 1.
          number: 0 to 2**64 - 1.

        Raises:
          ValueError: If an argument is out of range.
        """
        for name, value in (("seed", seed), ("number", number)):
            if not 0 <= operator.index(value) < 2**64:
                raise ValueError(f"{name}={value}: must be from 0 to 2**64 - 1")
        key = np.array([seed, number], dtype=np.uint64)
        return self.sample(np.random.Generator(np.random.Philox(key=key)))

    def sample(self, rng: np.random.Generator) -> Scene:
        """Draws a scene."""
        draws = iter(rng.random(24).tolist())  # a scene may leave some of them unused
        count = _pick(draws, range(1, self.config.max_shapes + 1))
        looks, cells = _distinct(draws, self._looks, count), _distinct(draws, _CELLS, count)
        sizes = [_pick(draws, self._sizes) for _ in range(count)]
        shapes = tuple(
            Shape(kind, colour, size, *cell) for (colour, kind), size, cell in zip(looks, sizes, cells, strict=True)
        )
        named = tuple(captions.Named(_pick(draws, (shape.size, None)), shape.colour, shape.kind) for shape in shapes)
        if not self.config.sizes:
            named = tuple(each._replace(size=None) for each in named)
        clauses, first = [], 0
        for width in _pick(draws, self._patterns(count)):
            options = _says(width, tuple(cells[first : first + width])) if self.config.relations else ("",)
            clauses.append(captions.Clause(first, _pick(draws, options)))
            first += width
        return Scene(shapes, captions.Facts(named, tuple(clauses)), _pick(draws, range(len(captions.OPENINGS))))

    def caption(self, scene: Scene) -> str:
        """The caption of a scene: an English sentence."""
        return captions.word(scene.facts, scene.opening)

    def render(self, scene: Scene, size: int) -> np.ndarray:
        """The picture of a scene, uint8 [size, size, 3] (`scenes_pictures.render`)."""
        return scenes_pictures.render(scene.shapes, size)

    # ---- exact quantities ------------------------------------------------------

    def log_prob(self, caption: str) -> float:
        """Returns the log-probability of a caption in nats, over all scenes; -inf outside the grammar."""
        facts = self.parse(caption)
        if facts is None:
            return -math.inf
        count, said = len(facts.shapes), tuple(clause.says for clause in facts.clauses)
        log_prob = -self._log_choices(count) - math.log(self.config.max_shapes) - self._log_looks(count)
        if self.config.sizes:
            log_prob -= math.log(2) * sum(each.size is not None for each in facts.shapes)
        if self.config.relations:
            log_prob += math.log(_clauses(captions.widths_of(facts))[0][said])
        return log_prob

    def log_prob_given(self, caption: str, scene: Scene) -> float:
        """Returns the log-probability of a caption given the shapes of a scene; -inf where it says another thing."""
        facts = self.parse(caption)
        if facts is None or len(facts.shapes) != len(scene.shapes) or not captions.judge(facts, scene.shapes).all:
            return -math.inf
        count, found = len(facts.shapes), captions.find(facts, scene.shapes)
        log_prob = -self._log_choices(count) - math.lgamma(count + 1)
        for clause, width in zip(facts.clauses, captions.widths_of(facts), strict=True):
            if width == 2:
                log_prob -= math.log(len(captions.holding(found[clause.first], found[clause.first + 1])))
        return log_prob

    def entropy(self) -> float:
        """Returns the entropy of the captions in nats."""
        total = math.log(self.config.max_shapes)
        for count in range(1, self.config.max_shapes + 1):
            own = self._log_choices(count) + self._log_looks(count)
            if self.config.sizes:
                own += count * math.log(2) / 2  # of those that are said: every other one
            if self.config.relations:
                probs = _clauses(self._patterns(count)[0])[0].values()
                own -= math.fsum(p * math.log(p) for p in probs)
            total += own / self.config.max_shapes
        return total

    def conditional_entropy(self) -> float:
        """Returns the entropy of a caption given the picture, in nats."""
        total = 0.0
        for count in range(1, self.config.max_shapes + 1):
            relations = _clauses(self._patterns(count)[0])[1] if self.config.relations else 0.0
            total += (self._log_choices(count) + math.lgamma(count + 1) + relations) / self.config.max_shapes
        return total

    def _log_choices(self, count: int) -> float:
        """What is drawn for a caption of so many shapes, whatever they are: its opening, its clauses, sizes said."""
        said = count * math.log(2) if self.config.sizes else 0.0
        return math.log(len(captions.OPENINGS)) + math.log(len(self._patterns(count))) + said

    def _log_looks(self, count: int) -> float:
        """The log-number of ordered choices of colours and kinds."""
        return math.fsum(math.log(len(self._looks) - i) for i in range(count))

    def vocabulary(self) -> list[str]:
        """Returns all words that captions of the full grammar can have, in lower case, sorted; and the full stop."""
        said = (*captions.OPENINGS, *itertools.chain(*captions.PLACES), *captions.RELATIONS)
        texts = (*said, *SIZES, *COLOURS, *KINDS, "a", "and", ".")
        return sorted({word.lower() for text in texts for word in text.split()})

    # ---- parsing and judging ---------------------------------------------------

    def parse(self, caption: str) -> captions.Facts | None:
        """What a caption says; None for any text that the grammar cannot produce."""
        for opening, words in enumerate(captions.OPENINGS):
            body = caption.removesuffix(".")
            body = body.removeprefix(f"{words} ") if words else body[:1].lower() + body[1:]
            facts = captions.read(body)
            if facts is not None and captions.word(facts, opening) == caption:
                return facts if self._allows(facts) else None
        return None

    def _allows(self, facts: captions.Facts) -> bool:
        """Whether the grammar of this difficulty says such things."""
        looks = [(each.colour, each.kind) for each in facts.shapes]
        if len(looks) > self.config.max_shapes or len(set(looks)) < len(looks) or not set(looks) <= set(self._looks):
            return False
        widths = captions.widths_of(facts)
        if widths not in self._patterns(len(looks)):
            return False
        tables = self.config.relations and tuple(clause.says for clause in facts.clauses) not in _clauses(widths)[0]
        said = any(clause.says for clause in facts.clauses) and not self.config.relations
        sized = any(each.size for each in facts.shapes) and not self.config.sizes
        return not (tables or said or sized)

    def see(self, image: np.ndarray) -> Seen:
        """What a picture shows (`scenes_reading.see`)."""
        return see(image)

    def shows(self, image: np.ndarray, caption: str) -> captions.Verdict:
        """Whether a picture, uint8 [S, S, 3], shows what a caption says, and nothing else."""
        seen, facts = see(image), self.parse(caption)
        if facts is None:
            return captions.Verdict(*[False] * 6)
        verdict = captions.judge(facts, seen.shapes)
        return verdict._replace(valid=seen.valid, all=seen.valid and verdict.all)

    def is_true(self, caption: str, image: np.ndarray) -> bool:
        """Whether nothing that a caption says of a valid picture is wrong; it may leave shapes out."""
        seen, facts = see(image), self.parse(caption)
        if facts is None or not seen.valid or not captions.names(facts) <= captions.looks(seen.shapes):
            return False
        verdict = captions.judge(facts, seen.shapes)
        return verdict.sizes and verdict.relations

    def is_complete(self, caption: str, image: np.ndarray) -> bool:
        """Whether a caption names every shape of a valid picture, with its colour; it may name others."""
        seen, facts = see(image), self.parse(caption)
        return facts is not None and seen.valid and captions.looks(seen.shapes) <= captions.names(facts)
