"""Short English stories whose distribution is known exactly.

A story is drawn in two steps.  First a global factor ``g`` (who, where, goal, mood,
ending) is drawn slot by slot; then its sentences are worded locally:

    p*(x) = sum over g of p*(g) p*(x | g)

The wordings are unambiguous, so a text fixes its sentence types, wordings, local
words and the slot values it shows.  That turns the sum over ``g`` into a product over
slots, and gives probabilities and entropies in closed form.  All of them are in nats.

Every categorical over ``n`` values (a slot, the wordings of a sentence type, a list
of local words) has weights proportional to ``1 / (i + 4)`` for ``i = 0 .. n - 1``.
The number of sentences is uniform; given it, each set of middle sentence types of
that size is equally likely.  A story always starts with an introduction, finishes
with an ending and keeps the narrative order in between.
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from cola_jax.config import StoriesConfig
from cola_jax.data import stories_templates as templates
from cola_jax.data.stories_reading import Parse, Sentence, build_lookup, split_sentences
from cola_jax.data.stories_templates import Categorical, Wording

_SLOTS = tuple(templates.SLOTS)


class _Match(NamedTuple):
    """Reading of one sentence: `masks` are bit sets of allowed values per slot."""

    wording: Wording
    masks: list[int]
    log_prob: float  # Of the wording and its local choices, given the type.


class _Reading(NamedTuple):
    """Reading of a text: `local` is log p*(text | g) for each g that `masks` allow."""

    parts: list[str]
    matches: list[_Match | None]
    masks: list[int]
    local: float


class Stories:
    """The distribution of stories: sampling, exact probabilities, and parsing.

    Instances hold no random state and are safe to share.

    Attributes:
      config: The difficulty.
      factors: Slot to its values and their probabilities.
      num_factors: Number of combinations of slot values.
    """

    def __init__(self, config: StoriesConfig | None = None):
        """Builds and checks the grammar.

        Args:
          config: Difficulty; the default is the full grammar.

        Raises:
          ValueError: If the tables would make the grammar ambiguous.
        """
        config = StoriesConfig() if config is None else config
        config.validate()
        self.config = config
        forms = templates.slot_forms(config.values)
        # The first form of a slot also serves as the public name of its values.
        heads = [names.split()[0] for names, _ in templates.SLOTS.values()]
        self._values = [forms[head][1] for head in heads]
        self._any = [(1 << len(values)) - 1 for values in self._values]
        self._slots = [Categorical(len(values)) for values in self._values]
        self.num_factors = math.prod(len(values) for values in self._values)
        self.factors: Mapping[str, Mapping[str, float]] = MappingProxyType(
            {
                slot: MappingProxyType(dict(zip(values, dist.probs, strict=True)))
                for slot, values, dist in zip(_SLOTS, self._values, self._slots, strict=True)
            }
        )
        self._wordings = templates.compile_wordings(config.aligned, config.values, config.variants, config.choices)
        self._all_wordings = list(itertools.chain(*self._wordings.values()))
        templates.check_unambiguous(self._all_wordings)
        self._pick_wording = {k: Categorical(len(w)) for k, w in self._wordings.items()}
        structures = templates.structures(config.min_sentences, config.max_sentences)
        self._structures = list(structures.items())
        self._log_structure = {k: math.log(p) for k, p in structures.items()}
        self._structure_bounds = list(itertools.accumulate(structures.values()))[:-1]
        # A structure, then a wording and its local choices for each sentence.
        widest = max(len(w.choices) for w in self._all_wordings)
        self._draws = 1 + config.max_sentences * (1 + widest)
        self._lookup = build_lookup(self._all_wordings)

    def _indices(self, factor: Mapping[str, str]) -> list[int]:
        if set(factor) != set(_SLOTS):
            raise ValueError(f"factor slots {sorted(factor)}: must be {sorted(_SLOTS)}")
        for slot, values in zip(_SLOTS, self._values, strict=True):
            if factor[slot] not in values:
                raise ValueError(f"{slot}={factor[slot]!r}: must be one of {values}")
        return [v.index(factor[s]) for s, v in zip(_SLOTS, self._values, strict=True)]

    # ---- sampling --------------------------------------------------------------

    def sample_factor(self, rng: np.random.Generator) -> dict[str, str]:
        """Draws g from p*(g); returns slot to value."""
        picks = self._pick_factor(rng)
        return {s: v[i] for s, v, i in zip(_SLOTS, self._values, picks, strict=True)}

    def sample_given(self, factor: Mapping[str, str], rng: np.random.Generator) -> str:
        """Draws a story from p*(x | g).

        Args:
          factor: A value for every slot.
          rng: Source of randomness.

        Returns:
          The story: sentences joined by single spaces.

        Raises:
          ValueError: If a slot is missing or unknown, or a value is not in the grammar.
        """
        return self._word(self._indices(factor), rng)

    def sample(self, rng: np.random.Generator) -> str:
        """Draws a story from p*(x): sentences joined by single spaces."""
        return self._word(self._pick_factor(rng), rng)

    def story(self, seed: int, index: int) -> str:
        """Returns story `index` of the endless sequence that `seed` names.

        Args:
          seed: 0 to 2**64 - 1.
          index: 0 to 2**64 - 1.

        Returns:
          A draw from p*(x) that is a pure function of both arguments.

        Raises:
          TypeError: If an argument is not an integer.
          ValueError: If an argument is out of range.
        """
        for name, value in (("seed", seed), ("index", index)):
            if not 0 <= operator.index(value) < 2**64:
                raise ValueError(f"{name}={value}: must be from 0 to 2**64 - 1")
        key = np.array([seed, index], dtype=np.uint64)
        return self.sample(np.random.Generator(np.random.Philox(key=key)))

    def _pick_factor(self, rng: np.random.Generator) -> list[int]:
        uniforms = rng.random(len(_SLOTS)).tolist()
        return [d.pick(u) for d, u in zip(self._slots, uniforms, strict=True)]

    def _word(self, values: Sequence[int], rng: np.random.Generator) -> str:
        # One call for all draws: a story may leave some of them unused.
        draws = iter(rng.random(self._draws).tolist())
        structure = bisect.bisect_right(self._structure_bounds, next(draws))
        words = []
        for kind in self._structures[structure][0]:
            pick = self._pick_wording[kind].pick(next(draws))
            for position in self._wordings[kind][pick].positions:
                if position.slot is not None:
                    words.append(position.words[values[position.slot]])
                elif position.choice is not None:
                    words.append(position.words[position.choice.pick(next(draws))])
                else:
                    words.append(position.words[0])
        return " ".join(words)

    # ---- exact quantities ------------------------------------------------------

    def log_prob(self, text: str) -> float:
        """Returns log p*(text) in nats; -inf outside the support."""
        return self._log_prob(self._read(text))

    def log_prob_given(self, text: str, factor: Mapping[str, str]) -> float:
        """Returns log p*(text | factor) in nats; -inf outside the support.

        Raises:
          ValueError: If a slot is missing or unknown, or a value is not in the grammar.
        """
        values = self._indices(factor)
        reading = self._read(text)
        fits = all(m >> i & 1 for m, i in zip(reading.masks, values, strict=True))
        return reading.local if fits else -math.inf

    def entropy(self) -> float:
        """Returns H(X) in nats.

        Shown slot values are independent of everything local, so they add
        P(slot is shown) H(slot) each to the entropy of the local draws.
        """
        shown = self._shown_probs()
        factor = math.fsum(p * d.entropy for p, d in zip(shown, self._slots, strict=True))
        return self.conditional_entropy() + factor

    def conditional_entropy(self) -> float:
        """Returns H(X | G) in nats; it is the same given any g."""
        parts = [-p * math.log(p) for _, p in self._structures]
        for kind, wordings in self._wordings.items():
            kept = self._kept_prob(kind)
            parts.append(kept * self._pick_wording[kind].entropy)
            for wording in wordings:
                local = math.fsum(choice.entropy for choice in wording.choices)
                parts.append(kept * wording.prob * local)
        return math.fsum(parts)

    def mean_tokens(self) -> float:
        """Returns the expected tokens (words, commas, full stops) of a story."""
        return math.fsum(self._kept_prob(w.type) * w.prob * w.length for w in self._all_wordings)

    def max_tokens(self) -> int:
        """Returns the most tokens (words, commas, full stops) a story can have."""
        longest = {k: max(w.length for w in ws) for k, ws in self._wordings.items()}
        return max(sum(longest[kind] for kind in kinds) for kinds, _ in self._structures)

    def vocabulary(self) -> list[str]:
        """Returns all distinct words and marks that can occur, sorted."""
        positions = itertools.chain(*(w.positions for w in self._all_wordings))
        words = itertools.chain(*(position.words for position in positions))
        return sorted({mark for word in words for mark in templates.marks(word)})

    def support(self) -> Iterator[tuple[str, float]]:
        """Yields every story once with its log-probability in nats.

        For small grammars only: the full one has far more stories than can be listed.
        """
        for kinds, prob in self._structures:
            for worded in itertools.product(*(self._wordings[k] for k in kinds)):
                log_prob = math.log(prob) + math.fsum(math.log(w.prob) for w in worded)
                yield from self._fill(worded, log_prob)

    def _fill(self, worded: Sequence[Wording], log_prob: float) -> Iterator[tuple[str, float]]:
        """Yields all ways to fill the wordings of a story."""
        shown = frozenset().union(*(w.slots for w in worded))
        # The value of a slot that isn't shown makes no difference to the text.
        ranges = [range(len(v) if i in shown else 1) for i, v in enumerate(self._values)]
        positions = list(itertools.chain(*(w.positions for w in worded)))
        for values in itertools.product(*ranges):
            log_values = log_prob + math.fsum(self._slots[slot].log_probs[values[slot]] for slot in shown)
            options = [
                [(p.words[values[p.slot]], 0.0)]
                if p.slot is not None
                else list(p.log_probs.items()) or [(p.words[0], 0.0)]
                for p in positions
            ]
            for picked in itertools.product(*options):
                words, logs = zip(*picked, strict=True)
                yield " ".join(words), log_values + math.fsum(logs)

    def _kept_prob(self, kind: str) -> float:
        return math.fsum(p for kinds, p in self._structures if kind in kinds)

    def _shown_probs(self) -> list[float]:
        """Returns for each slot the probability that a story shows its value."""
        result = []
        for slot in range(len(_SLOTS)):
            absent = {
                kind: math.fsum(w.prob for w in wordings if slot not in w.slots)
                for kind, wordings in self._wordings.items()
            }
            result.append(
                math.fsum(p * (1.0 - math.prod(absent[kind] for kind in kinds)) for kinds, p in self._structures)
            )
        return result

    # ---- parsing ---------------------------------------------------------------

    def parse(self, text: str) -> Parse:
        """Explains any string; never raises.

        White space around a sentence doesn't make that sentence invalid, but a story
        is coherent only if its sentences are joined by single spaces.
        """
        reading = self._read(text)
        sentences = tuple(
            Sentence(part, False, None, {})
            if match is None
            else Sentence(part, True, match.wording.type, self._mentions(match))
            for part, match in zip(reading.parts, reading.matches, strict=True)
        )
        candidates = self._named(reading.masks)
        known = {slot: min(v) for slot, v in candidates.items() if len(v) == 1}
        return Parse(
            sentences=sentences,
            valid_fraction=sum(s.valid for s in sentences) / max(1, len(sentences)),
            candidates=candidates,
            candidate_count=math.prod(len(v) for v in candidates.values()),
            factor=known if all(reading.masks) else None,
            log_prob=self._log_prob(reading),
        )

    def coherent_with_prompt(self, prompt: str, full: str) -> bool:
        """Whether `full` begins with `prompt` and is a coherent story."""
        return full.startswith(prompt) and self.log_prob(full) > -math.inf

    def first_sentence(self, text: str) -> str:
        """Returns the first sentence with its full stop; "" for a blank text."""
        return next(iter(split_sentences(text)), "")

    def _match(self, sentence: str) -> _Match | None:
        words = sentence.split(" ")
        tables = self._lookup.get(len(words))
        if tables is None:
            return None
        found = -1
        for table, word in zip(tables, words, strict=True):
            found &= table.get(word, 0)
        if not found:
            return None
        # At most one bit can be left, because no two wordings overlap.
        wording = self._all_wordings[found.bit_length() - 1]
        masks = list(self._any)
        log_prob = math.log(wording.prob)
        for position, word in zip(wording.positions, words, strict=True):
            if position.slot is not None:
                masks[position.slot] &= position.masks[word]
            elif position.choice is not None:
                log_prob += position.log_probs[word]
        return _Match(wording, masks, log_prob) if all(masks) else None

    def _read(self, text: str) -> _Reading:
        parts = split_sentences(text)
        matches = [self._match(part) for part in parts]
        valid = [match for match in matches if match is not None]
        masks = list(self._any)
        for match in valid:
            masks = [a & b for a, b in zip(masks, match.masks, strict=True)]
        # An invalid sentence leaves a sequence of types that may look legal.
        whole = len(valid) == len(parts) and " ".join(parts) == text
        order = self._log_structure.get(tuple(match.wording.type for match in valid))
        if not whole or order is None or not all(masks):
            return _Reading(parts, matches, masks, -math.inf)
        local = order + math.fsum(match.log_prob for match in valid)
        return _Reading(parts, matches, masks, local)

    def _log_prob(self, reading: _Reading) -> float:
        """Adds the probability of the slot values that are shown to the local part."""
        if reading.local == -math.inf:
            return -math.inf
        # A coherent story names its hero, so it shows each slot fully or not at all.
        return reading.local + math.fsum(
            dist.log_probs[mask.bit_length() - 1]
            for mask, full, dist in zip(reading.masks, self._any, self._slots, strict=True)
            if mask != full
        )

    def _named(self, masks: Sequence[int]) -> dict[str, frozenset[str]]:
        """Turns bit sets into the names of the values."""
        return {
            slot: frozenset(v for i, v in enumerate(values) if mask >> i & 1)
            for slot, values, mask in zip(_SLOTS, self._values, masks, strict=True)
        }

    def _mentions(self, match: _Match) -> dict[str, frozenset[str]]:
        named = self._named(match.masks)
        return {_SLOTS[i]: named[_SLOTS[i]] for i in sorted(match.wording.mentions)}
