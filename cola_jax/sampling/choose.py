"""From logits to tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax.types import Key


class Choice(NamedTuple):
    """How tokens are chosen: numbers, with which a program is compiled, or arrays [B], one value for each sequence.

    Attributes:
      temperature, top_k, top_p: see `choose`.
      repetition_penalty: see `penalize_repetition`.
      eos_id: the token before which a sequence ends; None, and -1 in an array: there is none.
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    repetition_penalty: Any = 1.0
    eos_id: Any = None


def choice_of(settings, each: Choice | None = None) -> Choice:
    """The choice that a family's settings name, or that of ``each`` sequence where there is one."""
    if each is not None:
        return each
    return Choice(**{name: getattr(settings, name) for name in Choice._fields if hasattr(settings, name)})


def is_end(tokens: Int[Array, "*shape"], choice: Choice) -> Bool[Array, "*shape"]:
    """Where the end of text stands in ``tokens``, whose first axis is the batch."""
    if choice.eos_id is None:
        return jnp.zeros(tokens.shape, bool)
    return tokens == _each(choice.eos_id, tokens.ndim)


def _each(value, rank: int):
    """A value of every sequence [B], or one number, so that it meets an array of that rank."""
    return value.reshape(-1, *[1] * (rank - 1)) if isinstance(value, jax.Array) else value


def penalize_repetition(
    logits: Float[Array, "B T V"], seen: Bool[Array, "B V"], penalty: float | Float[Array, " B"]
) -> Float[Array, "B T V"]:
    """Logits of tokens that were generated before, divided by ``penalty`` if positive, multiplied if negative."""
    if not isinstance(penalty, jax.Array) and penalty == 1.0:
        return logits
    penalty = _each(penalty, 3)
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen[:, None], penalized, logits)


def truncate(logits: Float[Array, "B T V"], top_k: int, top_p: float) -> Float[Array, "B T V"]:
    """Logits with all but the most likely tokens at minus infinity.

    Args:
      logits: at the temperature of the draw.
      top_k: keeps this many; 0: all.
      top_p: keeps the fewest tokens whose probability together is at least this; the most likely one always.
    """
    vocabulary = logits.shape[-1]
    kept = min(top_k or vocabulary, vocabulary)
    if kept == vocabulary and top_p == 1.0:
        return logits
    values, _ = jax.lax.top_k(logits, kept)  # descending
    threshold = values[..., -1:]
    if top_p < 1.0:
        probabilities = jax.nn.softmax(values, axis=-1)  # of what top_k left
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.where(before < top_p, values, jnp.inf)
        threshold = jnp.maximum(threshold, jnp.min(smallest, axis=-1, keepdims=True))
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def choose(
    logits: Float[Array, "B T V"], keys: Key, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Int[Array, "B T"]:
    """The most likely token (temperature 0), or a draw from ``softmax(logits / temperature)``; keys [B].

    ``top_k`` and ``top_p`` restrict the draw; see `truncate`.
    """
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(lambda key, row: jax.random.categorical(key, row))
    return draw(keys, truncate(logits / temperature, top_k, top_p)).astype(jnp.int32)


def next_tokens(
    logits: Float[Array, "B T V"], seen: Bool[Array, "B V"], keys: Key, choice: Choice
) -> Int[Array, "B T"]:
    """Tokens of new positions, after the penalty for repetition; each sequence's depend on its own row alone."""
    logits = penalize_repetition(logits, seen, choice.repetition_penalty)
    if isinstance(choice.temperature, jax.Array):
        return _choose_each(logits, keys, choice)
    return choose(logits, keys, choice.temperature, choice.top_k, choice.top_p)


def _choose_each(logits, keys, choice: Choice):
    """`choose`, of every sequence with its own numbers; what no sequence asks for is not computed."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn, cut = choice.temperature > 0, (choice.top_k > 0) | (choice.top_p < 1.0)

    def draw(logits):
        scaled = logits / _each(jnp.where(drawn, choice.temperature, 1.0), 3)
        scaled = jax.lax.cond(jnp.any(drawn & cut), lambda x: _truncate_each(x, choice), lambda x: x, scaled)
        tokens = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
        return jnp.where(drawn[:, None], tokens, best)

    return jax.lax.cond(jnp.any(drawn), draw, lambda _: best, logits)


def _truncate_each(logits, choice: Choice):
    """`truncate`, of every sequence with its own numbers."""
    vocabulary = logits.shape[-1]
    kept = jnp.where(choice.top_k > 0, jnp.minimum(choice.top_k, vocabulary), vocabulary)
    values, _ = jax.lax.top_k(logits, vocabulary)  # descending
    inside = jnp.arange(vocabulary)[None, None] < _each(kept, 3)
    probabilities = jax.nn.softmax(jnp.where(inside, values, -jnp.inf), axis=-1)  # of what top_k left
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    enough = _each(choice.top_p, 3)
    inside = inside & ((before < enough) | (enough >= 1.0))
    threshold = jnp.min(jnp.where(inside, values, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
