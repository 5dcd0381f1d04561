"""Text VAE: tokens to a diagonal Gaussian over latents, and latents to logits (SPEC 2, 9)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax import sharding
from cola_jax.fields import check, require, setting
from cola_jax.models import posterior
from cola_jax.models.vocabulary_head import VocabularyHead
from cola_jax.nn import attention, embeddings, visibility
from cola_jax.nn.attention import KERNELS
from cola_jax.nn.layers import LayerNorm, Linear, scan_layers, unstack_axis
from cola_jax.nn.visibility import BlockPlan
from cola_jax.types import Posterior


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Text VAE (SPEC 2, 9). Options that the released checkpoints have keep their meaning and default."""

    vocab_size: int = setting(
        0,
        "entries of the vocabulary, V; 0: the tokenizer's. The embedding has one more row, the mask token",
        at_least=0,
    )
    dim: int = setting(64, "width of the residual stream", at_least=1)
    ffn_dim: int = setting(256, "hidden width; activation 'swiglu': value and gate together", at_least=1)
    num_heads: int = setting(4, "heads of attention", at_least=1)
    encoder_layers: int = setting(1, "layers of the encoder", at_least=1)
    decoder_layers: int = setting(1, "layers of the decoder", at_least=1)
    latent_dim: int = setting(16, "channels of a latent, D", at_least=1)
    patch_size: int = setting(1, "tokens of a latent, P", at_least=1)
    block_size: int = setting(8, "latents of a block, K, for block-causal attention", at_least=1)
    attention: str = setting("causal", "who sees whom", choices=("causal", "block_causal"))
    post_norm: bool = setting(True, "norms stand after attention and MLP, not before")
    qk_norm: bool = setting(True, "norm of queries and keys, over the whole width, before heads are split")
    qk_norm_affine: bool = setting(True, "with scale and bias")
    qkv_bias: bool = setting(False, "of queries, keys and values")
    bias: bool = setting(True, "of the other linear layers; those that make and undo patches always have one")
    activation: str = setting("swiglu", "of the MLP", choices=("swiglu", "silu", "gelu"))
    clip_qkv: float | None = setting(None, "largest magnitude of queries, keys and values; None: any", above=0)
    norm_affine: bool = setting(True, "of the norm at the attention; the others always have scale and bias")
    norm_eps: float = setting(1e-6, "added to the variance in norms", above=0)
    rope_theta: float = setting(500_000.0, "base of the rotary frequencies", above=0)
    rope_full_precision: bool = setting(True, "rotations in float32; else in the compute type")
    normalize_mean: bool = setting(True, "LayerNorm without affine on the posterior mean")
    variational: bool = setting(
        True, "else no variance head: a deterministic autoencoder, always with the norm of the mean"
    )
    logsnr: float | None = setting(None, "log(E[mean^2] / E[variance]), fixed (16.2); None: learnable")
    attention_kernel: str = setting("auto", "splash is for TPUs; auto: where it suits", choices=KERNELS)
    logit_chunk: int = setting(
        64, "positions of each row whose logits exist at one time in training; 0: all", at_least=0
    )
    logit_rows: int = setting(
        1024, "and more of them, until a device has so many positions of all its rows; 0: not more", at_least=0
    )
    shift: float = setting(0.0, "latents are normalised as (z - shift) * scale")
    scale: float = setting(1.0, "see shift", where=(bool, "a number that is not 0"))

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def posterior_outputs(self) -> int:
        """Numbers for each channel of a latent: a mean, and a log-variance where that is learned."""
        return 2 if self.variational and self.logsnr is None else 1

    def validate(self) -> None:
        check(self, "config.vae.")

    def check_together(self, prefix: str) -> None:
        name, heads = f"{prefix}num_heads", self.num_heads
        require(self.dim % heads == 0, name, heads, f"a divisor of dim = {self.dim}")
        require(self.head_dim % 2 == 0, name, heads, "one that makes dim / num_heads even")
        halves = self.activation != "swiglu" or self.ffn_dim % 2 == 0
        require(halves, f"{prefix}ffn_dim", self.ffn_dim, "an even number (value and gate)")
        if self.logsnr is not None:
            require(self.normalize_mean, f"{prefix}normalize_mean", False, "True where logsnr is fixed")
            require(self.variational, f"{prefix}variational", False, "True where logsnr is fixed")


KV = tuple[Array, Array]

_ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=False)}


def forward_flops(config: VAEConfig, latents: int) -> tuple[float, float, float]:
    """Forward FLOPs per token of encoder, decoder without its head, and head, for rows of ``latents`` latents.

    2 for each weight that a position passes through, and causal attention over half of the pairs.
    """
    hidden = config.ffn_dim // 2 if config.activation == "swiglu" else config.ffn_dim
    mlp = config.dim * (config.ffn_dim + hidden)
    layer = 2 * (4 * config.dim**2 + mlp) + 2 * latents * config.dim
    patch = 2 * config.patch_size * config.dim**2
    encoder = config.encoder_layers * layer + patch + 2 * config.dim * config.posterior_outputs * config.latent_dim
    decoder = config.decoder_layers * layer + 2 * config.latent_dim * config.dim + patch
    return encoder / config.patch_size, decoder / config.patch_size, 2.0 * config.dim * config.vocab_size


class VAEContext(NamedTuple):
    """What all layers share: rotation angles, and who sees whom: a layout, or masks where there is a cache."""

    angles: Array
    layout: attention.RowLayout | None = None
    own_mask: Array | None = None
    history_mask: Array | None = None


class VAELayer(nn.Module):
    """Attention and gated MLP; ``post_norm`` normalises after attention, not before (SPEC 9)."""

    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], history: KV | None, context: VAEContext):
        config = self.config
        norm_attention = LayerNorm(config.norm_eps, config.norm_affine, name="norm_attn")
        norm_mlp = LayerNorm(config.norm_eps, name="norm_ffn")
        attended, kv = self._attention(x if config.post_norm else norm_attention(x), history, context)
        x = sharding.constrain((norm_attention(x) if config.post_norm else x) + attended, "batch", "length", None)
        y = self._mlp(x if config.post_norm else norm_mlp(x))
        return x + (norm_mlp(y) if config.post_norm else y), kv

    def _attention(self, x, history, context):
        config, shape = self.config, (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        qkv = Linear(
            (3, config.dim), ("embed", None, "heads"), use_bias=config.qkv_bias, dtype=self.dtype, name="qkv_proj"
        )(x)
        qkv = sharding.constrain(qkv, "batch", "length", None, "heads")
        if config.clip_qkv is not None:
            qkv = jnp.clip(qkv, -config.clip_qkv, config.clip_qkv)
        q, k, v = unstack_axis(qkv, 2)
        if config.qk_norm:
            q = LayerNorm(config.norm_eps, config.qk_norm_affine, "heads", name="q_norm")(q)
            k = LayerNorm(config.norm_eps, config.qk_norm_affine, "heads", name="k_norm")(k)
        full = config.rope_full_precision
        q = embeddings.apply_rope(q.reshape(shape), context.angles, interleaved=False, full_precision=full)
        k = embeddings.apply_rope(k.reshape(shape), context.angles, interleaved=False, full_precision=full)
        v = v.reshape(shape)
        if history is None:
            y = attention.attend_row(q, k, v, context.layout)
        else:
            y = attention.attend_cached(q, k, v, history, context.history_mask, context.own_mask)
        out = Linear((config.dim,), ("heads", "embed"), use_bias=config.bias, dtype=self.dtype, name="attn_out_proj")
        return out(y.reshape(x.shape)), attention.kept(k, v)

    def _mlp(self, x):
        config, gated = self.config, self.config.activation == "swiglu"
        parts = 2 if gated else 1  # value, gate
        features, names = (parts, config.ffn_dim // parts), ("embed", None, "mlp")
        h = Linear(features, names, use_bias=config.bias, dtype=self.dtype, name="ffn_proj")(x)
        value, *gate = unstack_axis(h, 2)
        h = value * nn.silu(*gate) if gated else _ACTIVATIONS[config.activation](value)
        h = sharding.constrain(h, "batch", "length", "mlp")
        return Linear((config.dim,), ("mlp", "embed"), use_bias=config.bias, dtype=self.dtype, name="ffn_out")(h)


def _context(config: VAEConfig, length: int, segment_ids, plan: BlockPlan | None) -> VAEContext:
    positions = jnp.arange(length)[None]
    layout = attention.RowLayout(length, plan or _plan(config), segment_ids, config.attention_kernel)
    return VAEContext(embeddings.rope_angles(positions, config.head_dim, config.rope_theta), layout)


def _plan(config: VAEConfig) -> BlockPlan:
    return BlockPlan.equal(1 if config.attention == "causal" else config.block_size)


class Encoder(nn.Module):
    """Tokens to the posterior of their latents."""

    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B N"] | None = None, plan: BlockPlan | None = None
    ) -> Posterior:
        config, patch = self.config, self.config.patch_size
        batch, length = tokens.shape[0], tokens.shape[1] // patch
        table = self.param(
            "wte",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            (config.vocab_size + 1, config.dim),
        )
        x = jnp.take(table.astype(self.dtype), tokens, axis=0).reshape(batch, length, patch * config.dim)
        x = Linear((config.dim,), (None, "embed"), dtype=self.dtype, name="patch_embedder")(x)
        layers = scan_layers(VAELayer, config.encoder_layers)(config, self.dtype, name="layers")
        x, _ = layers(x, None, _context(config, length, segment_ids, plan))
        shape, names = (config.posterior_outputs, config.latent_dim), ("embed", None, "latent")
        x = Linear(shape, names, use_bias=config.bias, dtype=self.dtype, name="final_layer")(x).astype(jnp.float32)
        normed = config.normalize_mean or not config.variational
        norm = LayerNorm(config.norm_eps, affine=False, name="last_norm") if normed else None
        return posterior.gaussian(x, norm, config.logsnr)


class Decoder(nn.Module):
    """Normalised latents to logits over tokens; with a cache, the next latents of a sequence.

    With ``tokens`` [B, T] and ``reduce``, what this makes of the logits in their place (`VocabularyHead.reduced`).
    """

    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B N D"],
        context: VAEContext,
        cache: KV | None = None,
        tokens: Int[Array, "B T"] | None = None,
        reduce: Callable | None = None,
    ):
        config, patch = self.config, self.config.patch_size
        batch, length = latents.shape[:2]
        bias = config.bias
        x = Linear((config.dim,), ("latent", "embed"), use_bias=bias, dtype=self.dtype, name="in_layer")(latents)
        x, kv = scan_layers(VAELayer, config.decoder_layers)(config, self.dtype, name="layers")(x, cache, context)
        # Outputs are laid out channel-major: channel, then position in the patch (SPEC 9).
        x = Linear((config.dim, patch), ("embed", None, None), dtype=self.dtype, name="unpatch_layer")(x)
        x = x.transpose(0, 1, 3, 2).reshape(batch, length * patch, config.dim)
        x = LayerNorm(config.norm_eps, name="final_norm")(x)
        chunk = (config.logit_chunk, config.logit_rows)
        head = VocabularyHead(config.dim, config.vocab_size, bias, self.dtype, *chunk, name="final_layer")
        return (head(x) if reduce is None else head.reduced(x, tokens, reduce)), kv


class TextVAE(nn.Module):
    """Encoder and decoder. Latents go to `decode` normalised as ``(z - shift) * scale``."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B N"] | None = None, plan: BlockPlan | None = None
    ) -> Posterior:
        """The posterior of each latent, before normalisation.

        Args:
          tokens: ids in [0, V]; V is the mask token. T is a multiple of the patch size.
          segment_ids: document of each latent; latents see their own document only.
          plan: blocks of attention; None: as the config says, equal ones, or of one latent where it is causal.
        """
        return self.encoder(tokens, segment_ids, plan)

    def decode(
        self,
        latents: Float[Array, "B N D"],
        segment_ids: Int[Array, "B N"] | None = None,
        plan: BlockPlan | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the P tokens of every latent, float32; arguments as in `encode`."""
        return self.decoder(latents, _context(self.config, latents.shape[1], segment_ids, plan))[0]

    def decode_reduced(
        self,
        latents: Float[Array, "B N D"],
        tokens: Int[Array, "B T"],
        reduce: Callable[[Float[Array, "B C V"], Int[Array, "B C"]], Any],
        segment_ids: Int[Array, "B N"] | None = None,
        plan: BlockPlan | None = None,
    ) -> Any:
        """``reduce(decode(latents), tokens)`` in chunks (``config.logit_chunk``, ``logit_rows``).

        The logits of a whole batch, the largest array of a training step by far, never exist.

        Args:
          latents: normalised.
          tokens: the target at each position, handed to ``reduce``.
          reduce: ``(logits [B, C, V], tokens [B, C]) -> tree of arrays [B, C]``, each position for itself.
          segment_ids, plan: as in `encode`.

        Returns:
          What ``reduce`` returns, of arrays [B, T].
        """
        context = _context(self.config, latents.shape[1], segment_ids, plan)
        return self.decoder(latents, context, None, tokens, reduce)[0]

    def decode_prompt(
        self, latents: Float[Array, "B N D"], segment_ids: Int[Array, "B N"], plan: BlockPlan | None = None
    ) -> KV:
        """Keys and values [layers, B, H, N, C] of a sequence's first latents: the start of a cache."""
        return self.decoder(latents, _context(self.config, latents.shape[1], segment_ids, plan))[1]

    def decode_next(
        self,
        latents: Float[Array, "B N D"],
        cache: KV,
        cache_mask: Bool[Array, "B S"],
        positions: Int[Array, "B N"],
        plan: BlockPlan | None = None,
    ) -> tuple[Float[Array, "B T V"], KV]:
        """Logits of the next latents of sequences whose earlier ones are cached, and their keys and values.

        Args:
          latents: normalised; whole blocks.
          cache: keys and values [layers, B, H, S, C] of earlier latents.
          cache_mask: True where the cache holds an earlier latent.
          positions: index of each latent in its sequence.
          plan: blocks of these latents; None: as in `encode`.
        """
        config, length = self.config, latents.shape[1]
        angles = embeddings.rope_angles(positions, config.head_dim, config.rope_theta)
        own_mask = visibility.block_causal(plan or _plan(config), length)[:, None]
        history_mask = visibility.of_cache(cache_mask, length)
        return self.decoder(latents, VAEContext(angles, None, own_mask, history_mask), cache)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter; for initialisation."""
        return self.decode(self.encode(tokens).mean)
