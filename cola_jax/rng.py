"""Randomness as a pure function of (seed, stream, step, sample).

No key is ever carried in a training state: a run that resumes at step s draws what an uninterrupted run
would have drawn, and what a sample draws does not depend on the batch, device or microbatch it is in.
"""

import jax
import jax.numpy as jnp

from cola_jax.types import Key

# A stream's number is part of every result: append, never renumber.
STREAMS = ("init", "train", "evaluate", "sample", "likelihood")


def key(seed, stream: str, step=0, sample=None) -> Key:
    """The key of one draw, or of many.

    Args:
      seed: the run's seed, an integer; may be traced.
      stream: one of `STREAMS`; streams are independent of each other.
      step: training step, or 0; may be traced.
      sample: None for one key; an integer, or an integer array [B] for a key per sample.

    Returns:
      A typed key, or keys with the shape of ``sample``.

    Raises:
      ValueError: the stream is not one of `STREAMS`.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream {stream!r}: must be one of {STREAMS}")
    base = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
    base = jax.random.fold_in(base, step)
    if sample is None:
        return base
    return fold_in(base, sample)


def keys(seeds, stream: str, samples) -> Key:
    """The keys [B] of samples of several runs: that of sample i is ``key(seeds[i], stream, 0, samples[i])``.

    Args:
      seeds: [B], uint32; a seed counts modulo 2^32.
      stream: one of `STREAMS`.
      samples: [B], int32.
    """
    return jax.vmap(lambda seed, sample: key(seed, stream, 0, sample))(jnp.asarray(seeds), jnp.asarray(samples))


def fold_in(keys: Key, numbers) -> Key:
    """Keys with numbers folded in, elementwise; shapes broadcast against each other."""
    numbers = jnp.asarray(numbers)
    shape = jnp.broadcast_shapes(keys.shape, numbers.shape)
    pairs = (jnp.broadcast_to(x, shape).reshape(-1) for x in (keys, numbers))
    return jax.vmap(jax.random.fold_in)(*pairs).reshape(shape)


def split(keys: Key, num: int) -> tuple[Key, ...]:
    """Splits each of the keys [B] into ``num`` independent ones: a tuple of ``num`` arrays [B]."""
    return tuple(jax.vmap(lambda k: jax.random.split(k, num), out_axes=1)(keys))


def normal(keys: Key, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [B, *shape], each example from its own key."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def uniform(keys: Key, shape: tuple[int, ...]) -> jax.Array:
    """Uniform on [0, 1), [B, *shape], each example from its own key."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape))(keys)
