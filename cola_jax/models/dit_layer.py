"""One layer of the diffusion transformer: attention and MLP under adaptive norms (SPEC 2, 9)."""

import flax
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cola_jax import sharding
from cola_jax.models.dit_config import DiTConfig
from cola_jax.nn import attention, embeddings
from cola_jax.nn.layers import LayerNorm, Linear, unstack_axis
from cola_jax.nn.modulation import Modulation, spread, table_rows


@flax.struct.dataclass
class Before:
    """What stands before a row and is read like an earlier block: other turns, pictures (`models.unified`).

    A model finds it among its variables: ``{"params": .., "before": {"dit": {"is": Before(..)}}}``, see `given`.

    Attributes:
      keys, values: of clean positions, after norm and RoPE.
      ids: document of each; 0: nothing is there.
    """

    keys: Float[Array, "layers B H S C"]
    values: Float[Array, "layers B H S C"]
    ids: Int[Array, "B S"]

    @property
    def pair(self) -> tuple[Array, Array]:
        """Keys and values, as a cache is."""
        return self.keys, self.values

    def join(self, other: "Before") -> "Before":
        """This, then the other."""
        keys, values = (jnp.concatenate(x, axis=3) for x in zip(self.pair, other.pair, strict=True))
        return Before(keys, values, jnp.concatenate([self.ids, other.ids], axis=1))

    def cached(self, cache, mask):
        """A cache and what it holds [B, S], with this in front; where layers are apart, a pair for each."""
        if isinstance(cache[0], tuple):
            pairs = zip(self.keys, self.values, strict=True)
            cache = tuple(_joined(own, pair, 2) for own, pair in zip(pairs, cache, strict=True))
        else:
            cache = _joined(self.pair, cache, 3)
        held = jnp.broadcast_to(self.ids > 0, (mask.shape[0], self.ids.shape[1]))
        return cache, jnp.concatenate([held, mask], axis=1)


def _joined(first, second, axis: int):
    return tuple(jnp.concatenate(pair, axis=axis) for pair in zip(first, second, strict=True))


@flax.struct.dataclass
class DiTContext:
    """What the layers share about a row of latents: the clean copy and its noisy copies in training, else one.

    ``time`` holds the embedding of t = 0, then that of each of M stretches; in training the stretches are
    those of the noisy copies, and the clean copy has t = 0, as ``pinned`` positions have. With a layout, keys and
    values that a layer is given are those of a context before the row; without one, of a cache.
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
    keeps: bool = flax.struct.field(pytree_node=False, default=False)  # the clean copy's keys and values, too


class LayerModulations(nn.Module):
    """Shifts, scales and gates of a layer; all start at zero."""

    config: DiTConfig
    dtype: jnp.dtype

    def setup(self):
        self.attention_modulation = Modulation((2, self.config.dim), self.dtype)
        self.attention_gate = Modulation((1, self.config.dim), self.dtype)
        self.mlp_modulation = Modulation((2, self.config.dim), self.dtype)
        self.mlp_gate = Modulation((1, self.config.dim), self.dtype)

    def modulations(self, carry, inputs, time: Array):
        """(carry, modulations of the layer for ``time`` [B, M, E]): each [B, M, parts, C]."""
        linears = (self.attention_modulation, self.attention_gate, self.mlp_modulation, self.mlp_gate)
        return carry, tuple(linear(time) for linear in linears)


class DiTLayer(LayerModulations):
    """Attention and MLP under AdaLN with gates that start at zero."""

    def setup(self):
        super().setup()
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
        q, k, v = self.project(x, shift, scale, context.angles)
        if context.layout is None:
            y = attention.attend_cached(q, k, v, cache, context.history_mask, context.own_mask)
        else:
            y = attention.attend_row(q, k, v, context.layout, cache)
        # Of the clean copy nobody reads more of the last layer than its keys and values.
        x, y, *rest = (part[:, clean if last else 0 :] for part in (x, y, *rest))
        # Keys and values leave the scan only where a cache will take them.
        kept = None if clean and not context.keeps else attention.kept(*(part[:, : clean or None] for part in (k, v)))
        return self.finish(x, y, *rest), kept

    def project(self, x, shift, scale, angles):
        """Queries, keys and values [B, R, H, C] of positions, normalised and turned."""
        qkv = sharding.constrain(self.qkv(self.norm(x) * (1 + scale) + shift), "batch", "length", None, "heads", "kv")
        q, k, v = unstack_axis(qkv, 2)
        q, k = (embeddings.apply_rope(y, angles, interleaved=True) for y in (self.norm_q(q), self.norm_k(k)))
        return q, k, v

    def finish(self, x, attended, gate, mlp_shift, mlp_scale, mlp_gate):
        """The positions after the layer, from what they attended to [B, R, H, C]."""
        attended = attended.reshape(*attended.shape[:2], -1)
        x = sharding.constrain(x + gate * self.out(attended), "batch", "length", None)
        h = nn.gelu(self.mlp_in(self.norm(x) * (1 + mlp_scale) + mlp_shift), approximate=True)
        h = sharding.constrain(h, "batch", "length", "mlp")
        return x + mlp_gate * self.mlp_out(h)


def clean_positions(x: Array, context: DiTContext) -> int:
    """How many positions of a row are the clean copy that noisy ones follow."""
    return context.layout.length if context.layout and x.shape[1] > context.layout.length else 0
