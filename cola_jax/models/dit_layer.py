"""One layer of the diffusion transformer: attention and MLP under adaptive norms (SPEC 2, 9)."""

import flax
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from cola_jax import sharding
from cola_jax.models.dit_config import DiTConfig
from cola_jax.nn import attention, embeddings
from cola_jax.nn.layers import LayerNorm, Linear, unstack_axis
from cola_jax.nn.modulation import Modulation, spread, table_rows

KV = tuple[Array, Array]


@flax.struct.dataclass
class DiTContext:
    """What the layers share about a row of latents: the clean copy and its noisy copies in training, else one.

    ``time`` holds the embedding of t = 0, then that of each of M stretches; in training the stretches are
    those of the noisy copies, and the clean copy has t = 0, as ``pinned`` positions have.
    """

    time: Array | None  # [B or 1, 1 + M, E]; None: a row of the layer's modulation table serves all
    coefficients: Array | None  # [B or 1, 1 + M, parts, 1] (`flow.prediction`); None: there are none
    pinned: Array | None  # [B, R] bool
    angles: Array
    layout: attention.RowLayout | None = None  # None: with a cache, and these masks
    own_mask: Array | None = None  # [#B, G, K, K]
    history_mask: Array | None = None  # [#B, N, M]
    index: Array | None = None  # row of the modulation tables
    stretches: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)  # None: equal ones


class DiTLayer(nn.Module):
    """Attention and MLP under AdaLN with gates that start at zero."""

    config: DiTConfig
    dtype: jnp.dtype

    def setup(self):
        config, dtype = self.config, self.dtype
        self.qkv = Linear(
            (3, config.num_heads, config.head_dim), ("embed", None, "heads", "kv"), config.qkv_bias, dtype=dtype
        )
        self.norm_q = LayerNorm(config.norm_eps, name_of_axis="kv")
        self.norm_k = LayerNorm(config.norm_eps, name_of_axis="kv")
        self.out = Linear((config.dim,), ("heads", "embed"), config.qkv_bias, dtype=dtype)
        self.mlp_in = Linear((config.mlp_ratio * config.dim,), ("embed", "mlp"), dtype=dtype)
        self.mlp_out = Linear((config.dim,), ("mlp", "embed"), dtype=dtype)
        self.norm = LayerNorm(config.norm_eps, affine=False)
        self.attention_modulation = Modulation((2, config.dim), dtype)
        self.attention_gate = Modulation((1, config.dim), dtype)
        self.mlp_modulation = Modulation((2, config.dim), dtype)
        self.mlp_gate = Modulation((1, config.dim), dtype)

    def __call__(self, x, inputs, context: DiTContext, last: bool = False):
        """(the row after the layer, keys and values); ``last``: of a row of copies, without the clean one."""
        cache, table = (None, None) if inputs is None else inputs
        if table is None:
            _, values = self.modulations(None, None, context.time)
        else:
            values = tuple(table_rows(v, context.index) for v in table)
        clean = clean_positions(x, context)
        sizes = (x.shape[1] - clean, clean, context.stretches)
        shift, scale, *rest = (part for v in values for part in spread(v, context.pinned, *sizes))
        attended, kv = self._attention(self.norm(x) * (1 + scale) + shift, cache, context)
        # Of the clean copy nobody reads more of the last layer than its keys and values.
        x, attended, gate, mlp_shift, mlp_scale, mlp_gate = (y[:, clean if last else 0 :] for y in (x, attended, *rest))
        x = sharding.constrain(x + gate * self.out(attended), "batch", "length", None)
        h = nn.gelu(self.mlp_in(self.norm(x) * (1 + mlp_scale) + mlp_shift), approximate=True)
        h = sharding.constrain(h, "batch", "length", "mlp")
        # Keys and values leave the scan only where a cache will take them.
        return x + mlp_gate * self.mlp_out(h), (None if clean else kv)

    def modulations(self, carry, inputs, time: Array):
        """(carry, modulations of the layer for ``time`` [B, M, E]): each [B, M, parts, C]."""
        linears = (self.attention_modulation, self.attention_gate, self.mlp_modulation, self.mlp_gate)
        return carry, tuple(linear(time) for linear in linears)

    def _attention(self, x, cache: KV | None, context: DiTContext):
        qkv = sharding.constrain(self.qkv(x), "batch", "length", None, "heads", "kv")
        q, k, v = unstack_axis(qkv, 2)
        q = embeddings.apply_rope(self.norm_q(q), context.angles, interleaved=True)
        k = embeddings.apply_rope(self.norm_k(k), context.angles, interleaved=True)
        if cache is None:
            y = attention.attend_row(q, k, v, context.layout)
        else:
            y = attention.attend_cached(q, k, v, cache, context.history_mask, context.own_mask)
        return y.reshape(*x.shape[:2], -1), attention.kept(k, v)


def clean_positions(x: Array, context: DiTContext) -> int:
    """How many positions of a row are the clean copy that noisy ones follow."""
    return context.layout.length if context.layout and x.shape[1] > context.layout.length else 0
