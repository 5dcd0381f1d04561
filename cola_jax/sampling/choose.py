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


def choose(logits: Float[Array, "B T V"], keys: Key, temperature: float) -> Int[Array, "B T"]:
    """The most likely token (temperature 0), or a draw from ``softmax(logits / temperature)``; keys [B]."""
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(lambda key, row: jax.random.categorical(key, row / temperature))
    return draw(keys, logits).astype(jnp.int32)
