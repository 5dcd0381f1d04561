"""LLaMA-style autoregressive language model: the density of a document, token by token (SPEC 7, Table 9).

The network reads the token before each position, so that the logits at a position are those of its own token:
``log p(x) = sum_t log p(x_t | x_<t)``. Before the first token of a document it reads a learned vector, "begin": the
first token is predicted too, and log p(x) is a density over whole documents. A document that packing cuts continues in
the next row as a segment of its own, and is predicted from "begin" there as well.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax.models.transformer import KV, Transformer, TransformerConfig, TransformerContext
from cola_jax.nn import attention, embeddings, visibility
from cola_jax.nn.visibility import BlockPlan


class Autoregressive(nn.Module):
    """Apply its methods by name: ``model.apply(params, tokens, method="logits")``."""

    config: TransformerConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self):
        self.transformer = Transformer(self.config, self.dtype, "begin")

    def _read(self, tokens, segment_ids):
        """States and keys and values of a row, each position reading the token before it."""
        config, length = self.config, tokens.shape[1]
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=config.vocab_size)
        if segment_ids is not None:
            goes_on = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1) == segment_ids
            before = jnp.where(goes_on, before, config.vocab_size)
        # Positions count from the start of the row: rotations only tell distances inside a segment.
        angles = embeddings.rope_angles(jnp.arange(length)[None], config.head_dim, config.rope_theta)
        layout = attention.RowLayout(length, BlockPlan.equal(1), segment_ids, config.attention_kernel)
        return self.transformer.hidden(before, TransformerContext(angles, layout))

    def logits(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Logits of the token at each position, given those before it in its segment, float32.

        Args:
          tokens: ids in [0, V).
          segment_ids: document of each position, 0 for padding; a new segment begins from "begin". None: one document.
        """
        return self.transformer.logits(self._read(tokens, segment_ids)[0])

    def logits_reduced(
        self,
        tokens: Int[Array, "B T"],
        reduce: Callable[[Float[Array, "B C V"], Int[Array, "B C"]], Any],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Any:
        """``reduce(logits(tokens), tokens)`` in chunks (``config.logit_chunk``, ``logit_rows``).

        The logits of a whole batch, the largest array of a training step by far, never exist.

        Args:
          tokens: as in `logits`; also the targets, handed to ``reduce``.
          reduce: ``(logits [B, C, V], tokens [B, C]) -> tree of arrays [B, C]``, each position for itself.
          segment_ids: as in `logits`.

        Returns:
          What ``reduce`` returns, of arrays [B, T].
        """
        hidden = self._read(tokens, segment_ids)[0]
        return self.transformer.reduced_logits(hidden, tokens, reduce)

    def prefill(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> KV:
        """Keys (after RoPE) and values [layers, B, H, T, C] of the positions of prompts: the start of a cache.

        The last token of a prompt is read by the position behind it, the first one of `extend`.

        Args:
          tokens: prompts, each from the start of its row.
          segment_ids: 1 for the prompt, 0 for padding behind it.
        """
        return self._read(tokens, segment_ids)[1]

    def extend(
        self,
        before: Int[Array, "B N"],
        positions: Int[Array, "B N"],
        cache: KV,
        cache_mask: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B N V"], KV]:
        """Logits of the next tokens of sequences whose earlier positions are cached, and their keys and values.

        Args:
          before: the token before each position; V at the start of a sequence.
          positions: index of each in its sequence.
          cache: keys and values [layers, B, H, S, C] of earlier positions.
          cache_mask: True where the cache holds an earlier position of the sequence.
        """
        config, length = self.config, before.shape[1]
        angles = embeddings.rope_angles(positions, config.head_dim, config.rope_theta)
        own_mask = visibility.block_causal(BlockPlan.equal(1), length)[:, None]
        context = TransformerContext(angles, None, own_mask, visibility.of_cache(cache_mask, length))
        hidden, kv = self.transformer.hidden(before, context, cache)
        return self.transformer.logits(hidden), kv

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Touches every parameter; for initialisation."""
        return self.logits(tokens)


def create(config: TransformerConfig, dtype="float32") -> Autoregressive:
    """The model; ``config.vocab_size`` must be known."""
    return Autoregressive(config, jnp.dtype(dtype))
