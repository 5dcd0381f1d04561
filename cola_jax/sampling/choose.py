"""From logits to tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax.types import Key


def penalize_repetition(
    logits: Float[Array, "B T V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B T V"]:
    """Logits of tokens that were generated before, divided by ``penalty`` if positive, multiplied if negative."""
    if penalty == 1.0:
        return logits
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
