"""Prompts as rows of tokens, and batches of them: what the families without latents share.

Prompts stand at the start of their rows, so that a batch may mix prompts of all lengths. What is drawn is a pure
function of (key, sample id, position): a sample depends neither on its batch nor on its place there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from cola_jax import rng, sharding
from cola_jax.types import Key, UserError

Ids = Sequence[int]


class Generation(NamedTuple):
    """New tokens of a batch.

    Attributes:
      tokens: new tokens only; 0 (or ``pad_id``) behind the end of a sequence.
      lengths: new tokens before the end of text.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, " B"]


class Piece(NamedTuple):
    """More tokens of every sequence, from a stream; an empty list for one that is done."""

    tokens: list[list[int]]


class Prompts(NamedTuple):
    """Rows of W tokens, each prompt at the start of its own."""

    tokens: np.ndarray | jax.Array  # [B, W]
    lengths: np.ndarray | jax.Array  # [B]


def check_prompts(vocabulary: int, prompts: Sequence[Ids], settings) -> None:
    """Raises UserError for settings out of range and prompts that cannot be continued."""
    settings.validate()
    if not len(prompts):
        raise UserError("prompts: none given; at least one is needed")
    for index, prompt in enumerate(prompts):
        if settings.context is not None and len(prompt) + settings.max_new_tokens > settings.context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens: must be at most {settings.context} (context) "
                f"minus {settings.max_new_tokens} (max_new_tokens)"
            )
        check_ids(vocabulary, prompt, f"prompt {index}")


def check_ids(vocabulary: int, ids: Ids, name: str) -> None:
    """Raises UserError for a token that is not of the vocabulary."""
    if len(ids) and not (0 <= min(ids) and max(ids) < vocabulary):
        raise UserError(f"{name} has a token outside the vocabulary, must be 0 to {vocabulary - 1}")


def width_for(prompts: Sequence[Ids], settings) -> int:
    """Of rows that hold the prompts: all that the context leaves them, or a power of two; few programs compile."""
    if settings.context is not None:
        return max(settings.context - settings.max_new_tokens, 1)
    return max(16, 2 ** (max(map(len, prompts)) - 1).bit_length())


def stack(prompts: Sequence[Ids], width: int) -> Prompts:
    """Prompts as rows of ``width`` tokens."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return Prompts(tokens, np.array([len(prompt) for prompt in prompts], np.int32))


def keys_for(key: Key | None, drawn: str, count: int, sample_ids: Sequence[int] | None) -> Key:
    """The key of each of ``count`` samples; ``drawn``: the setting that draws and so needs one; "": none does."""
    if sample_ids is not None and len(sample_ids) != count:
        raise UserError(f"sampling sample_ids: {len(sample_ids)} given, must be one for each of {count} prompts")
    if key is None:
        if drawn:
            raise UserError(f"sampling key = None: must be a key where {drawn}")
        key = jax.random.key(0)
    ids = jnp.arange(count) if sample_ids is None else jnp.asarray(sample_ids)
    return rng.fold_in(key, ids)


def run(program: Callable[..., Generation], rows: Any, keys: Key, mesh: Mesh | None) -> Generation:
    """``program(rows, keys)``, on a mesh with the sequences over its axes data and fsdp.

    Raises:
      UserError: the mesh does not divide the sequences.
    """
    if mesh is None:
        return program(rows, keys)
    count, parts = len(keys), math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    if count % parts:
        raise UserError(f"prompts: {count} given, must be a multiple of {parts} (mesh data * fsdp)")
    rows, keys = jax.device_put((rows, keys), sharding.batch_sharding(mesh))
    with sharding.activate(mesh):
        return program(rows, keys)


def cut(tokens: Int[Array, "B L"], inside: Array, ends: Array | None, pad_id: int | None) -> Generation:
    """New tokens up to the end of text.

    Args:
      tokens: generated.
      inside: [B, L], those that count.
      ends: [B, L], those that end a text; None: none of them.
      pad_id: what stands behind it; None: 0.
    """
    if ends is not None:
        inside = inside & (jnp.cumsum(ends, axis=1) == 0)
    return Generation(jnp.where(inside, tokens, pad_id or 0), jnp.sum(inside, axis=1))


def check_batch_size(batch_size: int) -> None:
    """Raises UserError for one below 1."""
    if batch_size < 1:
        raise UserError(f"sampling batch_size = {batch_size}: must be at least 1")


def batches(
    generate: Callable[[Sequence[Ids], Sequence[int]], Generation], prompts: Sequence[Ids], size: int
) -> Iterator[tuple[int, list[int]]]:
    """Continuations in order, batch by batch: (index of the prompt, its new tokens).

    Args:
      generate: (prompts, their sample ids) -> their continuations.
      prompts: any number.
      size: of a batch; the last one is filled up, so that it needs no program of its own.
    """
    for begin in range(0, len(prompts), size):
        chunk = list(prompts[begin : begin + size])
        out = generate(chunk + [chunk[-1]] * (size - len(chunk)), range(begin, begin + size))
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        for row in range(len(chunk)):
            yield begin + row, tokens[row, : lengths[row]].tolist()
