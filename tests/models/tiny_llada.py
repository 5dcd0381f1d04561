"""A LLaDA model small enough to enumerate all its texts, and what its sampler draws from, in NumPy."""

import functools
import itertools
import math

import numpy as np
from models import tiny_autoregressive

from cola_jax.models import llada


def create(**changes):
    """(model, params) with no parameter at zero."""
    return tiny_autoregressive.create(make=llada.create, **changes)


def logits(config, params, text, masked) -> np.ndarray:
    """[T, V] of one document by NumPy."""
    read = [-1 if hidden else token for token, hidden in zip(text, masked, strict=True)]
    return tiny_autoregressive.network(config, params, read, causal=False)


def _log_probs(config, params, read: tuple[int, ...]) -> np.ndarray:
    """log p of every token at every position, [T, V]; -1 is masked."""
    found = tiny_autoregressive.network(config, params, read, causal=False)
    return found - np.log(np.exp(found).sum(axis=-1, keepdims=True))


def _log_probs(config, params, read: tuple[int, ...]) -> np.ndarray:
    """log p of every token at every position, [T, V]; -1 is masked."""
    found = tiny_autoregressive.network(config, params, read, causal=False)
    return found - np.log(np.exp(found).sum(axis=-1, keepdims=True))


class Enumerated:
    """What the model says of every text of ``length`` tokens of its vocabulary."""

    def __init__(self, config, params, length: int):
        self.length = length
        self._log_probs = functools.cache(functools.partial(_log_probs, config, params))
        self.texts = list(itertools.product(range(config.vocab_size), repeat=length))

    def hidden(self, text, masked) -> float:
        """``sum over masked tokens of log p(token | the others)``."""
        read = tuple(-1 if i in masked else token for i, token in enumerate(text))
        return sum(self._log_probs(read)[i, text[i]] for i in masked)

    def in_order(self, text, order) -> float:
        """log p of a text that is written token by token in an order."""
        total, left = 0.0, set(range(self.length))
        for i in order:
            read = tuple(-1 if j in left else token for j, token in enumerate(text))
            total += self._log_probs(read)[i, text[i]]
            left.remove(i)
        return total

    def log_prob(self, text) -> float:
        """Of the sampler that writes one token a pass, in a random order."""
        orders = list(itertools.permutations(range(self.length)))
        return math.log(np.mean([math.exp(self.in_order(text, order)) for order in orders]))

    def bound(self, text, given: int = 0) -> float:
        """``E_l E_masks[(L / l) sum of log p]``, of the tokens behind the first ``given`` ones."""
        places = range(given, self.length)
        values = []
        for size in range(1, len(places) + 1):
            sums = [self.hidden(text, set(some)) for some in itertools.combinations(places, size)]
            values.append(len(places) / size * np.mean(sums))
        return float(np.mean(values))
