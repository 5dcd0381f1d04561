"""Block-causal diffusion transformer: the velocity of noisy latent blocks given clean earlier ones (SPEC 2, 9)."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax.config import DiTConfig
from cola_jax.nn import attention, embeddings, masks
from cola_jax.nn.blocks import LayerNorm, Linear, scan_layers

KV = tuple[Array, Array]


class _Stream(NamedTuple):
    """What one copy of the latents (noisy, or the clean history) brings to every layer.

    ``time`` holds one embedding for each of the M equal stretches of the sequence, ``pinned`` the positions
    that are clean data at time 0 instead (or None).
    """

    time: Array  # [B or 1, M, E]
    pinned: Array | None  # [B, N] bool
    angles: Array
    mask: Array  # self-attention [#B, N, N], or own blocks [#B, G, K, K] where there is a history
    history_mask: Array | None = None  # [#B, N, M]


class _Context(NamedTuple):
    noisy: _Stream
    clean: _Stream | None  # the clean copy whose keys and values are the history, in training
    time_zero: Array  # [1, 1, E], activation of the embedding of t = 0


class Modulation(nn.Module):
    """Linear maps of the time embedding, evaluated once per distinct time and spread over positions."""

    features: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, stream: _Stream, time_zero: Array, length: int) -> list[Array]:
        linear = Linear(self.features, ("time", None, "embed"), zero=True, dtype=self.dtype, name="linear")
        values = linear(stream.time)  # [B, M, parts, C]
        batch, distinct, parts, channels = values.shape
        spread = jnp.broadcast_to(values[:, :, None], (batch, distinct, length // distinct, parts, channels))
        spread = spread.reshape(batch, length, parts, channels)
        if stream.pinned is not None:
            spread = jnp.where(stream.pinned[:, :, None, None], linear(time_zero), spread)
        return [spread[:, :, part] for part in range(parts)]


class Layer(nn.Module):
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

    def __call__(self, carry, cache: KV | None, context: _Context):
        noisy, clean = carry
        if clean is not None:
            clean, cache = self._one(clean, None, context.clean, context.time_zero)
        noisy, kv = self._one(noisy, cache, context.noisy, context.time_zero)
        # Keys and values leave the scan only where a cache will take them.
        return (noisy, clean), (None if clean is not None else kv)

    def _one(self, x, history: KV | None, stream: _Stream, time_zero):
        length = x.shape[1]
        shift, scale = self.attention_modulation(stream, time_zero, length)
        (gate,) = self.attention_gate(stream, time_zero, length)
        attended, kv = self._attention(self.norm(x) * (1 + scale) + shift, history, stream)
        x = x + gate * attended
        shift, scale = self.mlp_modulation(stream, time_zero, length)
        (gate,) = self.mlp_gate(stream, time_zero, length)
        h = nn.gelu(self.mlp_in(self.norm(x) * (1 + scale) + shift), approximate=True)
        return x + gate * self.mlp_out(h), kv

    def _attention(self, x, history, stream: _Stream):
        qkv = self.qkv(x)
        q = embeddings.apply_rope(self.norm_q(qkv[:, :, 0]), stream.angles, interleaved=True)
        k = embeddings.apply_rope(self.norm_k(qkv[:, :, 1]), stream.angles, interleaved=True)
        v = qkv[:, :, 2]
        if history is None:
            y = attention.attend(q, k, v, stream.mask)
        else:
            y = attention.attend_history(q, k, v, history, stream.history_mask, stream.mask)
        return self.out(y.reshape(*x.shape[:2], -1)), (k, v)


class BlockCausalDiT(nn.Module):
    """Velocity field of the latent flow, factorised over blocks (3.3, 3.7)."""

    config: DiTConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self):
        config, dtype = self.config, self.dtype
        self.in_layer = Linear((config.dim,), ("latent", "embed"), dtype=dtype)
        self.time_in = Linear((config.dim,), (None, "time"), dtype=dtype)
        self.time_hidden = Linear((config.dim,), ("time", None), dtype=dtype)
        self.time_out = Linear((config.time_dim,), (None, "time"), dtype=dtype)
        self.layers = scan_layers(Layer, config.num_layers, config.remat, config.unroll)(config, dtype)
        self.out_norm = LayerNorm(config.norm_eps)
        self.out_modulation = Modulation((2, config.dim), dtype)
        self.out_layer = Linear((config.latent_dim,), ("embed", "latent"), zero=True, dtype=dtype)
        small = nn.initializers.normal(0.02)
        if config.block_position:
            init = nn.with_logical_partitioning(small, (None, "embed"))
            self.block_position = self.param("block_position", init, (config.block_size, config.dim))
        if config.no_history_vector:
            init = nn.with_logical_partitioning(small, ("embed",))
            self.no_history = self.param("no_history", init, (config.dim,))

    def _time(self, times: Float[Array, "B M"]):
        """Activated time embedding, [B, M, E]."""
        h = self.time_in(embeddings.time_features(times))
        return nn.silu(self.time_out(nn.silu(self.time_hidden(nn.silu(h)))))

    def _input(self, latents, positions, drop_history=None):
        x = self.in_layer(latents)
        if self.config.block_position:
            x = x + jnp.take(self.block_position.astype(x.dtype), positions % self.config.block_size, axis=0)
        if drop_history is not None:
            vector = self.no_history.astype(x.dtype)[None, None]
            x = x + jnp.where(drop_history[..., None], vector, 0)
        return x

    def _output(self, x, stream: _Stream, time_zero):
        shift, scale = self.out_modulation(stream, time_zero, x.shape[1])
        velocity = self.out_layer(self.out_norm(x) * (1 + scale) + shift)
        return velocity.astype(jnp.promote_types(velocity.dtype, jnp.float32))

    def _angles(self, positions):
        return embeddings.rope_angles(positions, self.config.rope_dim, self.config.rope_theta)

    def _zero(self):
        return self._time(jnp.zeros((1, 1)))

    def _blocks(self, per_block: Bool[Array, "B G"], length: int) -> Bool[Array, "B N"]:
        return jnp.repeat(per_block, length // per_block.shape[1], axis=1)

    def __call__(
        self,
        latents: Float[Array, "B N D"],
        times: Float[Array, "B M"],
        pinned: Bool[Array, "B N"] | None = None,
        segment_ids: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Velocity of a whole sequence under block-causal self-attention.

        Args:
          latents: normalised latents.
          times: flow times in [0, 1], M of them for M equal stretches of the sequence.
          pinned: positions that are data: their time is 0.
          segment_ids: document of each latent; latents see their own document only.
        """
        return self._sequence(latents, times, pinned, segment_ids)[0]

    def prefill(self, latents: Float[Array, "B N D"], segment_ids: Int[Array, "B N"]) -> KV:
        """Keys and values [layers, B, N, H, C] of clean latents: the start of a cache."""
        return self._sequence(latents, jnp.zeros((1, 1)), None, segment_ids)[1]

    def _sequence(self, latents, times, pinned, segment_ids):
        length = latents.shape[1]
        positions = jnp.arange(length)[None]
        mask = masks.block_causal(length, self.config.block_size)
        if segment_ids is not None:
            mask = mask & masks.same_segment(segment_ids, segment_ids)
        stream = _Stream(self._time(times), pinned, self._angles(positions), mask)
        context = _Context(stream, None, self._zero())
        (x, _), kv = self.layers((self._input(latents, positions), None), None, context)
        return self._output(x, stream, context.time_zero), kv

    def denoise(
        self,
        noisy: Float[Array, "B Q D"],
        times: Float[Array, "B M"],
        history: Float[Array, "B N D"],
        pinned: Bool[Array, "B Q"] | None = None,
        segment_ids: Int[Array, "B N"] | None = None,
        drop_history: Bool[Array, "B G"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """Velocity of noisy blocks, each against the clean blocks before it and itself (training layout).

        Args:
          noisy: one or several noisy copies of the sequence, one after another: Q = copies * N.
          times: flow times in [0, 1] of M equal stretches of ``noisy``; Q / K of them give each block its own.
          history: the clean latents; one pass over them serves all copies.
          pinned: positions of ``noisy`` that are data: their time is 0.
          segment_ids: document of each latent of ``history``.
          drop_history: noisy blocks, G = Q / K, that see no history and carry the no-history vector.
        """
        config, length, total = self.config, history.shape[1], noisy.shape[1]
        copies = total // length
        clean_mask = masks.block_causal(length, config.block_size)
        history_mask = masks.block_causal(length, config.block_size, strict=True)
        block_mask = jnp.ones((1, 1, config.block_size, config.block_size), bool)
        if segment_ids is not None:
            same = masks.same_segment(segment_ids, segment_ids)
            clean_mask, history_mask = clean_mask & same, history_mask & same
            by_block = segment_ids.reshape(segment_ids.shape[0], -1, config.block_size)
            block_mask = by_block[..., :, None] == by_block[..., None, :]
        block_mask = jnp.broadcast_to(
            block_mask, (block_mask.shape[0], length // config.block_size, *block_mask.shape[2:])
        )
        history_mask, block_mask = jnp.tile(history_mask, (1, copies, 1)), jnp.tile(block_mask, (1, copies, 1, 1))
        dropped = None
        if drop_history is not None:
            dropped = self._blocks(drop_history, total)
            history_mask = history_mask & ~dropped[:, :, None]
        positions = jnp.arange(length)[None]
        noisy_positions = jnp.tile(positions, (1, copies))
        zero = self._zero()
        clean_stream = _Stream(zero, None, self._angles(positions), clean_mask)
        stream = _Stream(self._time(times), pinned, self._angles(noisy_positions), block_mask, history_mask)
        carry = (self._input(noisy, noisy_positions, dropped), self._input(history, positions))
        (x, _), _ = self.layers(carry, None, _Context(stream, clean_stream, zero))
        return self._output(x, stream, zero)

    def extend(
        self,
        latents: Float[Array, "B N D"],
        times: Float[Array, "B M"],
        positions: Int[Array, "B N"],
        cache: KV,
        cache_mask: Bool[Array, "B S"],
        pinned: Bool[Array, "B N"] | None = None,
        drop_history: Bool[Array, " B"] | None = None,
        visible: Bool[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B N D"], KV]:
        """Velocity of one block per sequence against cached clean blocks, and the block's keys and values.

        Args:
          latents: one block (N = K), noisy, or clean with ``times`` 0 to obtain what a cache needs.
          positions: index of each latent in its sequence.
          cache: keys (after norm and RoPE) and values [layers, B, S, H, C] of clean latents.
          cache_mask: True where the cache holds a latent that the block may see.
          drop_history: sequences whose block carries the no-history vector, where the model has one
            (``cache_mask`` hides the history).
          visible: latents of the block that are not padding, in a text that ends inside it; None: all.
        """
        batch, length = latents.shape[:2]
        history_mask = jnp.broadcast_to(cache_mask[:, None, :], (batch, length, cache_mask.shape[1]))
        block_mask = jnp.ones((1, 1, length, length), bool)
        if visible is not None:
            block_mask = jnp.broadcast_to(visible[:, None, None, :], (batch, 1, length, length))
        stream = _Stream(self._time(times), pinned, self._angles(positions), block_mask, history_mask)
        context = _Context(stream, None, self._zero())
        dropped = None
        if drop_history is not None and self.config.no_history_vector:
            dropped = jnp.broadcast_to(drop_history[:, None], (batch, length))
        (x, _), kv = self.layers((self._input(latents, positions, dropped), None), cache, context)
        return self._output(x, stream, context.time_zero), kv
