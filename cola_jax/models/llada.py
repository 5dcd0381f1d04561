"""LLaDA: a transformer that sees the whole text and predicts the tokens that are masked in it (SPEC 7, Table 9, 11.13).

The network is that of the autoregressive model but for who sees whom: every position sees every position of its
document. A masked token is read as a learned vector, "mask".
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax.models.transformer import Transformer, TransformerConfig, TransformerContext
from cola_jax.nn import attention, embeddings
from cola_jax.nn.visibility import BlockPlan


class LLaDA(nn.Module):
    """Apply its methods by name: ``model.apply(params, tokens, masked, method="logits")``."""

    config: TransformerConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self):
        self.transformer = Transformer(self.config, self.dtype, "mask")

    def _read(self, tokens, masked, segment_ids):
        config, length = self.config, tokens.shape[1]
        angles = embeddings.rope_angles(jnp.arange(length)[None], config.head_dim, config.rope_theta)
        # One block of all positions: each sees all of its segment.
        layout = attention.RowLayout(length, BlockPlan.of_sizes((length,)), segment_ids, config.attention_kernel)
        seen = jnp.where(masked, config.vocab_size, tokens)
        return self.transformer.hidden(seen, TransformerContext(angles, layout))[0]

    def logits(
        self,
        tokens: Int[Array, "B T"],
        masked: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits of the token at each position given those that are not masked in its segment, float32.

        Args:
          tokens: ids in [0, V); those that are masked are not read.
          masked: which are.
          segment_ids: document of each position, 0 for padding. None: one document.
          positions: those whose logits are wanted; None: all.
        """
        hidden = self._read(tokens, masked, segment_ids)
        if positions is not None:
            hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        return self.transformer.logits(hidden)

    def logits_reduced(
        self,
        tokens: Int[Array, "B T"],
        masked: Bool[Array, "B T"],
        reduce: Callable[[Float[Array, "B C V"], Int[Array, "B C"]], Any],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Any:
        """``reduce(logits(tokens, masked), tokens)`` in chunks; see `Autoregressive.logits_reduced`."""
        return self.transformer.reduced_logits(self._read(tokens, masked, segment_ids), tokens, reduce)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Touches every parameter; for initialisation."""
        return self.logits(tokens, jnp.ones(tokens.shape, bool))


def create(config: TransformerConfig, dtype="float32") -> LLaDA:
    """The model; ``config.vocab_size`` must be known."""
    return LLaDA(config, jnp.dtype(dtype))
