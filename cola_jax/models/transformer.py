"""The LLaMA-style transformer of the token models: tokens to states, and those to logits (SPEC 7, Table 9).

Who sees whom is the caller's: causal for the autoregressive model, everything for LLaDA. Both have one learned vector
more than the vocabulary: what is read before the first token of a document, or in place of a masked token.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cola_jax import sharding
from cola_jax.fields import setting
from cola_jax.models.vocabulary_head import VocabularyHead
from cola_jax.nn import attention, embeddings
from cola_jax.nn.layers import LayerNorm, Linear, scan_layers, unstack_axis
from cola_jax.types import Params

KV = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Pre-norm decoder with RoPE and SwiGLU, linear maps without biases, input and output embeddings not tied."""

    vocab_size: int = setting(0, "V; 0: the tokenizer's", at_least=0)
    dim: int = setting(128, "width of the residual stream", at_least=1)
    ffn_dim: int = setting(512, "width of the value, and of the gate, of the SwiGLU", at_least=1)
    num_heads: int = setting(4, "attention heads", at_least=1)
    head_dim: int = setting(32, "channels of a head", at_least=2, where=(lambda n: n % 2 == 0, "an even number"))
    num_layers: int = setting(4, "layers", at_least=1)
    norm: str = setting("rmsnorm", "of the layers and the output", choices=("rmsnorm", "layernorm"))
    norm_eps: float = setting(1e-6, "added to the variance", above=0)
    rope_theta: float = setting(500_000.0, "base of the rotary frequencies", above=0)
    qk_norm: bool = setting(False, "normalise each head's queries and keys, before RoPE")
    attention_kernel: str = setting("auto", "auto: splash where it suits", choices=attention.KERNELS)
    remat: str = setting("none", "what the backward pass computes again", choices=("none", "full", "attention", "dots"))
    unroll: int = setting(1, "layers compiled one after another", at_least=1)
    logit_chunk: int = setting(
        64, "positions of each sequence whose logits exist at one time in training; 0: all", at_least=0
    )
    logit_rows: int = setting(
        1024, "and more of them, until a device has so many positions of all its sequences; 0: not more", at_least=0
    )


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32 (or wider), returned in the input's type."""

    eps: float
    name_of_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (self.name_of_axis,))
        scale = self.param("scale", init, (x.shape[-1],))
        return (y * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def _norm(config: TransformerConfig, name: str | None = None, axis: str | None = None) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.norm_eps, axis, name=name)
    return LayerNorm(config.norm_eps, name_of_axis=axis, name=name)


class TransformerContext(NamedTuple):
    """What all layers share: rotation angles, and who sees whom: a layout, or masks where there is a cache."""

    angles: Array
    layout: attention.RowLayout | None = None
    own_mask: Array | None = None
    history_mask: Array | None = None


class TransformerLayer(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to the residual stream."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], history: KV | None, context: TransformerContext):
        attended, kv = self._attention(_norm(self.config, "norm_attention")(x), history, context)
        x = sharding.constrain(x + attended, "batch", "length", None)
        return x + self._mlp(_norm(self.config, "norm_mlp")(x)), kv

    def _linear(self, name: str, features, names):
        return Linear(features, names, use_bias=False, dtype=self.dtype, name=name)

    def _attention(self, x, history, context: TransformerContext):
        config, heads = self.config, (self.config.num_heads, self.config.head_dim)
        qkv = self._linear("qkv", (3, *heads), ("embed", None, "heads", "kv"))(x)
        q, k, v = unstack_axis(sharding.constrain(qkv, "batch", "length", None, "heads", "kv"), 2)
        if config.qk_norm:
            q, k = _norm(config, "norm_q", "kv")(q), _norm(config, "norm_k", "kv")(k)
        q = embeddings.apply_rope(q, context.angles, interleaved=False)
        k = embeddings.apply_rope(k, context.angles, interleaved=False)
        if history is None:
            y = attention.attend_row(q, k, v, context.layout)
        else:
            y = attention.attend_cached(q, k, v, history, context.history_mask, context.own_mask)
        out = self._linear("out", (config.dim,), ("heads", "embed"))
        return out(y.reshape(*x.shape[:2], math.prod(heads))), attention.kept(k, v)

    def _mlp(self, x):
        config = self.config
        value, gate = unstack_axis(self._linear("mlp_in", (2, config.ffn_dim), ("embed", None, "mlp"))(x), 2)
        h = sharding.constrain(value * nn.silu(gate), "batch", "length", "mlp")
        return self._linear("mlp_out", (config.dim,), ("mlp", "embed"))(h)


class Transformer(nn.Module):
    """Token ids to hidden states, and those to logits; V, one more than the last id, is the learned vector ``extra``.

    Attributes:
      config: sizes and options.
      dtype: of the computation.
      extra: name of the vector.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    extra: str

    def setup(self):
        config, init = self.config, nn.initializers.normal(1.0)
        table = nn.with_logical_partitioning(init, ("vocab", "embed"))
        self.wte = self.param("wte", table, (config.vocab_size, config.dim))
        init = nn.with_logical_partitioning(init, ("embed",))
        self.extra_vector = self.param(self.extra, init, (config.dim,))
        self.layers = scan_layers(TransformerLayer, config.num_layers, config.remat, config.unroll)(config, self.dtype)
        self.final_norm = _norm(config)
        chunk = (config.logit_chunk, config.logit_rows)
        self.head = VocabularyHead(config.dim, config.vocab_size, False, self.dtype, *chunk)

    def hidden(self, ids: Int[Array, "B N"], context: TransformerContext, cache: KV | None = None):
        """Normalised states [B, N, C], and keys and values [layers, B, H, N, C] of the positions."""
        is_extra = (ids == self.config.vocab_size)[..., None]
        x = jnp.take(self.wte.astype(self.dtype), jnp.minimum(ids, self.config.vocab_size - 1), axis=0)
        x = jnp.where(is_extra, self.extra_vector.astype(self.dtype)[None, None], x)
        x, kv = self.layers(sharding.constrain(x, "batch", "length", None), cache, context)
        return self.final_norm(x), kv

    def logits(self, hidden: Float[Array, "B N C"]) -> Float[Array, "B N V"]:
        """Logits of every token, float32."""
        return self.head(hidden)

    def reduced_logits(self, hidden, tokens, reduce):
        """``reduce(logits(hidden), tokens)``, without all logits at once."""
        return self.head.reduced(hidden, tokens, reduce)


class Parameters(NamedTuple):
    """Numbers of parameters as Table 9 counts them.

    Attributes:
      core: matrices of the layers.
      embeddings: input and output embeddings.
      rest: what the paper does not count: norms, and the extra vector.
    """

    core: int
    embeddings: int
    rest: int


def count_parameters(params: Params) -> Parameters:
    """The `Parameters` of the model's variables, or of their shapes from `jax.eval_shape`."""
    counts = dict.fromkeys(Parameters._fields, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(params)):
        names = [entry.key for entry in path]
        if "layers" in names and names[-1] == "kernel":
            kind = "core"
        else:
            kind = "embeddings" if names[-1] in ("wte", "kernel") else "rest"
        counts[kind] += math.prod(leaf.shape)
    return Parameters(**counts)


def forward_flops(config: TransformerConfig, length: int, causal: bool = True) -> float:
    """Model FLOPs of the forward pass per token of a row.

    2 for each weight of a matrix that a position passes through; attention adds ``4 * S * width`` a layer, where a
    position sees S others: T, or half of them if attention is causal. Norms, softmax and looking up embeddings are left
    out.

    Args:
      config: with ``vocab_size`` known.
      length: T, tokens in a row.
      causal: whether a position sees only earlier ones.
    """
    width = config.num_heads * config.head_dim
    seen = length / 2 if causal else length
    layer = 2 * (4 * config.dim * width + 3 * config.dim * config.ffn_dim) + 4 * seen * width
    return float(config.num_layers * layer + 2 * config.dim * config.vocab_size)
