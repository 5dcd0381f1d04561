"""Flow matching of one prior over text and images: three tasks, each a conditional of one joint (5.5).

Rows by task, with clean text C, noisy text N, instruction P, image I: text ``[C][N]``, image ``[C][I][N]`` (the image
is noisy, and the text's blocks are an auxiliary loss), caption ``[P][I][C][N]`` (instruction and image are clean).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from cola_jax import rng
from cola_jax.fields import like, require, setting
from cola_jax.flow import prediction, schedule
from cola_jax.flow.path import PATHS, interpolate
from cola_jax.models.dit_layer import Before
from cola_jax.models.image_vae import to_float
from cola_jax.models.unified import with_before
from cola_jax.objectives import alignment, common, stage2
from cola_jax.objectives.alignment import Features
from cola_jax.objectives.stage2 import Stage2Config
from cola_jax.types import Key, Params, Term

TASKS = ("text", "image", "caption")


@dataclasses.dataclass(frozen=True)
class UnifiedStage2Config(Stage2Config):
    """The joint prior, with both VAEs frozen; the fields of `Stage2Config` are those of text."""

    image_weight: float = setting(1.0, "weight of the image's velocity error", at_least=0)
    auxiliary_weight: float = setting(
        1.0, "task 'image': weight of its text's velocity error; 0: no noisy text, which saves its time", at_least=0
    )
    caption_weight: float = setting(1.0, "task 'caption': weight of the velocity error", at_least=0)
    image_time_distribution: str = setting(
        "logit_normal", "of an image's flow time", choices=("logit_normal", "uniform")
    )
    image_time_loc: float = setting(0.0, "mean of its normal; larger images want more")
    image_time_scale: float = like(Stage2Config, "time_scale")
    image_noise_copies: int | None = setting(
        None, "noisy copies of an image for one clean pass of its text; None: noise_copies", at_least=1
    )
    alignment_weight: float = setting(
        0.0,
        "task 'image': weight of minus the cosine between a layer's states and features of the clean image (REPA)",
        at_least=0,
    )
    text_dropout: float = setting(
        0.1, "task 'image': share of the images that see no text, for guidance", at_least=0, at_most=1
    )

    def check_together(self, prefix: str) -> None:
        super().check_together(prefix)
        need = "'fix_vae': the joint prior is trained with both VAEs frozen"
        require(self.strategy == "fix_vae", f"{prefix}strategy", self.strategy, need)

    @property
    def image_times(self) -> schedule.Times:
        """The distribution of the images' flow times."""
        return schedule.Times(
            self.image_time_distribution, self.image_time_loc, self.image_time_scale, path=PATHS[self.path]
        )


def grid_of(model, images) -> tuple[int, int]:
    """Rows and columns of the latents of images [B, Y, X, C]."""
    return model.image_vae_config.grid(*images.shape[1:3])


def image_latents(model, params: Params, images: jax.Array) -> jax.Array:
    """Normalised latents [B, N, D] of uint8 images: the mean of their posterior."""
    return model.normalize_image(model.apply(params, to_float(images), method="encode_image").mean)


def text_before(model, params: Params, batch: dict) -> Before:
    """What stands before an image that is drawn for a text: the text, by the means of its latents.

    Args:
      model: a `UnifiedDLM`.
      params: its variables.
      batch: ``tokens`` and ``segment_ids`` [B, T], a whole text a row (with its end of text), or nothing.
    """
    return model.apply(params, *_text_latents(model, params, batch), method="text_before")


def _text_latents(model, params, rows: dict) -> tuple[jax.Array, jax.Array]:
    """Normalised means of the latents of rows of text, and their segments: 0 is padding."""
    ids = common.latent_segments(rows, model.vae_config.patch_size)
    inputs = common.encoder_tokens(rows, model.vae_config.vocab_size)
    return model.normalize(model.apply(params, inputs, ids, method="encode").mean), ids


def before_of(model, params: Params, batch: dict) -> Before:
    """What stands before the text of the task "caption": the instruction, if there is one, and the image.

    Args:
      model: a `UnifiedDLM`.
      params: its variables.
      batch: ``image`` [B, Y, X, 3] uint8 and, if there is one, ``instruction`` [B, M] with its segment ids.
    """
    pixels = batch["image"]
    picture = image_latents(model, params, pixels)
    return _before(model, params, batch, picture, grid_of(model, pixels))


def _before(model, params, batch, picture, grid) -> Before:
    if "instruction" not in batch:
        return model.apply(params, picture, grid, method="image_before")
    said = {"tokens": batch["instruction"], "segment_ids": batch["instruction_segment_ids"]}
    return model.apply(params, *_text_latents(model, params, said), picture, grid, method="joined")


def terms(
    model,
    stage: UnifiedStage2Config,
    params: Params,
    batch: dict,
    keys: Key,
    features: Features | None = None,
) -> dict[str, Term]:
    """Velocity errors of the batch's task, the other tasks' terms being empty.

    Args:
      model: a `UnifiedDLM`.
      stage: weights, times, dropout.
      params: variables; only the prior's have gradients.
      batch: ``tokens`` and ``segment_ids`` [B, T], ``image`` [B, Y, X, 3] uint8, ``task`` [B], the same index of
        `TASKS` for all; maybe ``instruction`` (`before_of`). Rows without text count nowhere.
      keys: [B].
      features: with ``alignment_weight``, what a layer's states are aligned with (`alignment.wanted`).

    Returns:
      "text_flow", "image_flow", "auxiliary_flow" (the text of the task "image"), "caption_flow", and "codes" and
      "alignment" where they have a weight.

    Raises:
      UserError: see `alignment.wanted`.
    """
    text_keys, flow_keys, picture_keys, image_keys = rng.split(keys, 4)
    segments = common.latent_segments(batch, model.vae_config.patch_size)
    inputs = common.encoder_tokens(batch, model.vae_config.vocab_size)
    posterior = jax.lax.stop_gradient(model.apply(params, inputs, segments, method="encode"))
    z = model.normalize(common.draw(posterior, text_keys))
    grid = grid_of(model, batch["image"])
    weights = {
        "text_flow": stage.flow_weight,
        "image_flow": stage.image_weight,
        "auxiliary_flow": stage.auxiliary_weight,
        "caption_flow": stage.caption_weight,
    }
    if stage.code_weight:
        weights["codes"] = stage.code_weight
    if stage.alignment_weight:
        weights["alignment"] = stage.alignment_weight
    nothing = jnp.zeros(z.shape[0])

    def encoded():
        """Posterior of the images, and a sample of it; a text alone needs none."""
        seen = jax.lax.stop_gradient(model.apply(params, to_float(batch["image"]), method="encode_image"))
        return seen, model.normalize_image(common.draw(seen, picture_keys))

    def text_terms(variables, mutable=()):
        return stage2.flow(model, stage, variables, z, segments, flow_keys, True, posterior, batch["tokens"], mutable)

    def filled(name, found, **more):
        """(value, weight) of all terms, of a task whose text's error is called ``name``."""
        found = {name if key == "flow" else key: term for key, term in found.items()} | more
        return {key: (*found[key][:2],) if key in found else (nothing, nothing) for key in weights}

    def text():
        return filled("text_flow", text_terms(params)[0])

    def image():
        seen, picture = encoded()
        if stage.auxiliary_weight:
            found, recorded = text_terms(params, ("kept",))
            (pair,) = recorded["kept"]["dit"]["keys_values"]
            before = Before(*pair, segments)
        else:
            found, before = {}, model.apply(params, z, segments, method="text_before")
        wanted = None
        if stage.alignment_weight:
            means = model.normalize_image(seen.mean)
            wanted = alignment.wanted(model.image_dit_config.alignment_size, batch["image"], grid, means, features)
        more = _image_terms(model, stage, params, picture, seen, grid, before, image_keys, wanted)
        return filled("auxiliary_flow", found, **more)

    def caption():
        before = _before(model, params, batch, encoded()[1], grid)
        return filled("caption_flow", text_terms(with_before(params, before))[0])

    found = jax.lax.switch(batch["task"][0], (text, image, caption))
    return {name: Term(*found[name], coefficient) for name, coefficient in weights.items()}


def _image_terms(
    model, stage: UnifiedStage2Config, params, picture, seen, grid, before: Before, keys: Key, wanted
) -> dict[str, Term]:
    """Velocity error of noisy copies of images (their posterior: ``seen``) that read a text or nothing each.

    With features ``wanted`` [B, N, F], also the error of their alignment.
    """
    noise_keys, time_keys, drop_keys = rng.split(keys, 3)
    (batch, length, channels), copies = picture.shape, stage.image_noise_copies or stage.noise_copies

    def for_copies(tree, axis: int = 0):
        """A row of each copy; an image's stand together."""
        return jax.tree.map(lambda x: jnp.repeat(x, copies, axis), tree)

    times = schedule.sample(stage.image_times, time_keys, copies)
    noise = rng.normal(noise_keys, (copies * length, channels)).reshape(-1, length, channels)
    path, times = PATHS[stage.path], times.reshape(-1, 1, 1)
    noisy, target = interpolate(path, for_copies(picture), noise, times)
    if stage.target == "posterior":
        mean, variance = model.normalize_image(seen.mean), jnp.exp(seen.logvar) * model.image_vae_config.scale**2
        target = prediction.posterior_velocity(path, noisy, times, for_copies(mean), for_copies(variance))
    dropped = rng.uniform(drop_keys, (copies,)) < stage.text_dropout
    ids = jnp.broadcast_to(jnp.where(dropped.reshape(-1, 1), -1, 1), noisy.shape[:2])
    read = Before(*for_copies(before.pair, 1), for_copies(before.ids))
    call = functools.partial(model.apply, params, noisy, times[:, 0, 0], grid, read, ids, method="image_velocity")

    def term(error, coefficient):
        error = error.reshape(batch, -1)
        real = jnp.any(before.ids > 0, axis=1, keepdims=True)
        return common.per_example(error, jnp.broadcast_to(real, error.shape).astype(error.dtype), coefficient)

    velocity, recorded = (call(), None) if wanted is None else call(mutable=["alignment"])
    out = {"image_flow": term(jnp.mean(jnp.square(velocity - target), axis=-1), stage.image_weight)}
    if wanted is not None:
        (found,) = recorded["alignment"]["image_dit"]["features"]
        out["alignment"] = term(alignment.error(found, for_copies(wanted)), stage.alignment_weight)
    return out
