"""The image stream of the joint prior: velocity of an image's latents beside a block-causal text DiT (5.5).

Text and images are two streams of one transformer (MMDiT). They meet in attention alone: an image is one block, which
reads the keys and values of what stands before it, and leaves its own. In the first layers images have weights of their
own; in the later ones they share those of the text, under modulations of their own.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cola_jax.fields import check, like, setting
from cola_jax.flow import prediction
from cola_jax.flow.path import PATHS
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.dit_layer import Before, DiTContext, DiTLayer, LayerModulations
from cola_jax.nn import attention, embeddings
from cola_jax.nn.layers import LayerNorm, Linear, apply_scanned, scan_layers, unstack_axis
from cola_jax.nn.modulation import Modulation
from cola_jax.nn.visibility import BlockPlan, clean_place, visible
from cola_jax.types import Params


@dataclasses.dataclass(frozen=True)
class ImageDiTConfig:
    """What images have of their own in the joint prior; widths, heads and depth are those of `DiTConfig`."""

    latent_dim: int = setting(16, "channels of an image's latent; image_vae.latent_dim", at_least=1)
    dual_layers: int = setting(
        1,
        "first layers in which images have their own weights; later ones share the text's (paper: a third)",
        at_least=0,
    )
    prediction: str = setting(
        "velocity", "what the output is; mean: of the latents' means [ours]", choices=("velocity", "mean")
    )
    prediction_variance: float | None = setting(
        None, "'mean': variance of normalised latents around their means; None: that of image_vae.logsnr", above=0
    )
    path: str = setting("linear", "'mean': the path of the flow; stage2.path", choices=tuple(PATHS))
    time_frequency: float = like(DiTConfig, "time_frequency")
    position_sines: bool = setting(
        False,
        "sines of row and column are added to the first layer's input: rotary positions tell distances alone [ours]",
    )
    alignment_size: int = setting(
        0, "features of a position that images are aligned with (stage2.alignment_weight); 0: no such head", at_least=0
    )
    alignment_layer: int = setting(
        0, "the layer behind which images are aligned, from 1; 0: the last of the first third", at_least=0
    )

    def validate(self) -> None:
        check(self, "config.image_dit.")

    def deviation(self, t: Array) -> Array:
        """Of z_t around its mean, at a flow time; 1 where the network predicts velocities (`DiTConfig.deviation`)."""
        if self.prediction == "velocity":
            return jnp.ones_like(t)
        return jnp.sqrt(prediction.spread(PATHS[self.path], t, self.prediction_variance))


class AlignmentHead(nn.Module):
    """From states of an image's positions to features that another network makes of the image (REPA)."""

    size: int
    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N F"]:
        h = nn.silu(Linear((self.dim,), ("embed", "mlp"), dtype=self.dtype, name="layer_in")(x))
        h = nn.silu(Linear((self.dim,), ("mlp", "embed"), dtype=self.dtype, name="hidden")(h))
        return Linear((self.size,), ("embed", None), dtype=self.dtype, name="layer_out")(h)


class ImageStream(nn.Module):
    """Velocity of the latents of images; ``text`` in its methods is the stacked layers' parameters of the text DiT.

    Where "alignment" is mutable, `velocity` leaves "features" there: the alignment head's, of the states behind the
    layer that the config names.

    Attributes:
      config: what images have of their own.
      dit: of the text DiT.
      dtype: of the computation.
    """

    config: ImageDiTConfig
    dit: DiTConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self):
        dit, dtype = self.dit, self.dtype
        self.in_layer = Linear((dit.dim,), ("latent", "embed"), dtype=dtype)
        self.time_in = Linear((dit.dim,), (None, "time"), dtype=dtype)
        self.time_hidden = Linear((dit.dim,), ("time", None), dtype=dtype)
        self.time_out = Linear((dit.time_dim,), (None, "time"), dtype=dtype)
        dual = self.config.dual_layers
        if dual:
            self.dual = scan_layers(DiTLayer, dual)(dit, dtype)
        if dual < dit.num_layers:
            self.modulations = scan_layers(LayerModulations, dit.num_layers - dual, methods=("modulations",))(
                dit, dtype
            )
        self.out_norm = LayerNorm(dit.norm_eps)
        self.out_modulation = Modulation((2, dit.dim), dtype)
        self.out_layer = Linear((self.config.latent_dim,), ("embed", "latent"), zero=True, dtype=dtype)
        if self.config.alignment_size:
            self.alignment = AlignmentHead(self.config.alignment_size, dit.dim, dtype)

    def velocity(
        self,
        latents: Float[Array, "B N D"],
        times: Float[Array, " #B"],
        grid: tuple[int, int],
        text: Params,
        before: Before | None = None,
        ids: Int[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Before]:
        """Velocity of noisy latents of one image each, and their keys and values: an image's own at t = 0.

        Args:
          latents: row by row of the image.
          times: flow times in [0, 1]; one for all is embedded once.
          grid: rows and columns of latents.
          text: see the class.
          before: what the image reads besides itself.
          ids: document of the image, for those of ``before``; None: 1. An image with an id of its own reads nothing.
        """
        batch, length = latents.shape[:2]
        ids = jnp.ones((batch, length), jnp.int32) if ids is None else ids
        time = self._embed(jnp.stack([jnp.zeros_like(times), times], axis=1))
        layout = attention.RowLayout(
            length, BlockPlan.equal(length), ids, self.dit.attention_kernel, None if before is None else before.ids
        )
        context = DiTContext(time, None, None, image_angles(self.dit, grid), layout)
        x, keys_values = self._apply(self._read(latents, grid), context, text, before)
        shift, scale = unstack_axis(self.out_modulation(time[:, 1:]), 2)
        output = self.out_layer(self.out_norm(x) * (1 + scale) + shift)
        output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
        return self._as_velocity(output, latents, times[:, None, None]), Before(*keys_values, ids)

    def _read(self, latents, grid: tuple[int, int]):
        """Input of the first layer."""
        x = self.in_layer(latents)
        return x + image_sines(self.dit.dim, grid).astype(x.dtype) if self.config.position_sines else x

    def _as_velocity(self, output, latents, times):
        config = self.config
        if config.prediction == "velocity":
            return output
        skip, gate = prediction.mean_coefficients(PATHS[config.path], times, config.prediction_variance)
        return skip * latents + gate * output

    def _embed(self, times: Float[Array, "B M"]):
        h = self.time_in(embeddings.time_features(times, top=self.config.time_frequency))
        return nn.silu(self.time_out(nn.silu(self.time_hidden(nn.silu(h)))))

    def _apply(self, x, context: DiTContext, text: Params, before: Before | None):
        """All layers: (the image's positions, keys and values [layers, B, H, N, C])."""
        if self.is_initializing():
            x, pairs = self.dual(x, None, context) if self.config.dual_layers else (x, None)
            if self.config.dual_layers < self.dit.num_layers:
                self.modulations.modulations(None, None, context.time)
            if self.config.alignment_size:
                self.alignment(x)
            shape = (self.dit.num_layers, x.shape[0], self.dit.num_heads, x.shape[1], self.dit.head_dim)
            return x, (jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype))
        layer, found = DiTLayer(self.dit, self.dtype, parent=None), []
        aligned = aligned_layer(self.config, self.dit) if self.is_mutable_collection("alignment") else 0
        for begin, end, weights in _cut(self._weights(text), aligned):
            pair = None if before is None else jax.tree.map(lambda part: part[begin:end], before.pair)  # noqa: B023
            inputs, dit = pair and (pair, None), self.dit
            x, pairs = apply_scanned(layer, weights, x, inputs, context, dit.remat, min(dit.unroll, end - begin))
            found.append(pairs)
            if end == aligned:
                self.sow("alignment", "features", self.alignment(x))
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    def _weights(self, text: Params) -> list[tuple[int, int, Params]]:
        """(first layer, last, the parameters of `DiTLayer` for images, stacked), for own layers and for shared ones."""
        dual, layers = self.config.dual_layers, self.dit.num_layers
        own, found = self.variables["params"], []
        if dual:
            found.append((0, dual, own["dual"]))
        if dual < layers:
            shared = jax.tree.map(lambda x: x[dual:], text)
            found.append((dual, layers, {**shared, **own["modulations"]}))
        return found

    def joined(
        self,
        words: Float[Array, "B M W"],
        words_time: Float[Array, "1 1 E"],
        words_angles: Array,
        words_ids: Int[Array, "B M"],
        latents: Float[Array, "B N D"],
        grid: tuple[int, int],
        text: Params,
        before: Before | None = None,
    ) -> Before:
        """Keys and values of a clean block of text and an image that see each other.

        Args:
          words: input of the text stream's first layer.
          words_time: its embedding of t = 0.
          words_angles: rotations of its positions.
          words_ids: 0 for padding.
          latents: of the image.
          grid, text, before: see `velocity`.
        """
        layer = DiTLayer(self.dit, self.dtype, parent=None)
        ids = jnp.concatenate([words_ids, jnp.ones((latents.shape[0], latents.shape[1]), jnp.int32)], axis=1)
        mask = _clean_mask(ids, before)
        times = (words_time, self._embed(jnp.zeros((1, 1))))
        angles = (words_angles, image_angles(self.dit, grid))

        def body(streams, given):
            *weights, pair = given
            values = [_clean_values(layer, w, time) for w, time in zip(weights, times, strict=True)]
            projected = [
                layer.apply({"params": w}, x, *v[:2], a, method="project")
                for w, x, v, a in zip(weights, streams, values, angles, strict=True)
            ]
            q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*projected, strict=True))
            own = attention.kept(k, v)
            if pair is not None:
                k, v = (jnp.concatenate([b, x], axis=1) for b, x in zip(attention.kept(*pair), (k, v), strict=True))
            y = jnp.split(attention.attend(q, k, v, mask), [words.shape[1]], axis=1)
            streams = [
                layer.apply({"params": w}, x, part, *v[2:], method="finish")
                for w, x, part, v in zip(weights, streams, y, values, strict=True)
            ]
            return tuple(streams), own

        streams, found = (words, self._read(latents, grid)), []
        for begin, end, weights in self._weights(text):
            cut = lambda tree: jax.tree.map(lambda x: x[begin:end], tree)  # noqa: B023, E731
            inputs = (cut(text), weights, None if before is None else cut(before.pair))
            streams, pairs = jax.lax.scan(body, streams, inputs, unroll=min(self.dit.unroll, end - begin))
            found.append(pairs)
        return Before(*jax.tree.map(lambda *parts: jnp.concatenate(parts), *found), ids)


def aligned_layer(config: ImageDiTConfig, dit: DiTConfig) -> int:
    """The number of layers before the states that the alignment head reads."""
    return config.alignment_layer or -(-dit.num_layers // 3)


def _cut(parts: list[tuple[int, int, Params]], at: int) -> list[tuple[int, int, Params]]:
    """Stretches of layers (first, last, stacked parameters), of which one ends with layer ``at``."""
    found = []
    for begin, end, weights in parts:
        if begin < at < end:
            low, high = (
                jax.tree.map(lambda x, part=part: x[part], weights)
                for part in (slice(at - begin), slice(at - begin, None))
            )
            found += [(begin, at, low), (at, end, high)]
        else:
            found.append((begin, end, weights))
    return found


def _clean_mask(ids, before: Before | None):
    """Who sees whom in one clean block behind what stands before it."""
    own = clean_place(jnp.zeros((1, ids.shape[1]), jnp.int32), ids)
    if before is None:
        return visible(own, own)
    earlier = clean_place(jnp.full((1, before.ids.shape[1]), -1), before.ids)
    return jnp.concatenate([visible(own, earlier), visible(own, own)], axis=2)


def _clean_values(layer: DiTLayer, weights: Params, time):
    """Shift, scale, gate, shift, scale, gate of a layer at one time, [1, 1, C] each."""
    _, values = layer.apply({"params": weights}, None, None, time, method="modulations")
    return [part for value in values for part in unstack_axis(value, 2)]


def image_sines(dim: int, grid: tuple[int, int]) -> Float[Array, "1 N C"]:
    """Sines and cosines of an image's rows, then of its columns, both from 0: where a latent stands."""
    places = [x.reshape(1, -1).astype(jnp.float32) for x in jnp.indices(grid)]
    sines = jnp.concatenate([embeddings.time_features(x, 2 * (dim // 4), top=1.0) for x in places], axis=-1)
    return jnp.pad(sines, ((0, 0), (0, 0), (0, dim - sines.shape[-1])))


def image_angles(dit: DiTConfig, grid: tuple[int, int]) -> Float[Array, "1 N C"]:
    """Rotations of an image's positions. Text begins at 0; the image stands before it, whichever is written first."""
    rows, columns = (x.reshape(1, -1) - max(grid) for x in jnp.indices(grid))
    return embeddings.rope_angles_2d(rows, columns, dit.rope_dim, dit.rope_theta)
