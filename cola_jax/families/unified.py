"""The family "unified": one block-causal prior over the latents of text and images (5.5).

It is the family "cola" with an image VAE (trained beside the Text VAE in stage 1) and an image stream of the prior.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cola_jax.config import Config, DataConfig
from cola_jax.data import packing
from cola_jax.families import cola
from cola_jax.families.cola import ColaConfig
from cola_jax.families.interface import Engine, Family, Group, Pictures, Stage
from cola_jax.fields import like, require
from cola_jax.models import dit_config, image_vae, text_vae
from cola_jax.models.dit_layer import Before
from cola_jax.models.image_dit import ImageDiTConfig
from cola_jax.models.image_vae import ImageVAEConfig
from cola_jax.models.unified import UnifiedDLM
from cola_jax.objectives import alignment as objective
from cola_jax.objectives import image_stage, stage1, unified
from cola_jax.objectives.alignment import Features
from cola_jax.objectives.image_stage import ImageStageConfig
from cola_jax.objectives.unified import TASKS, UnifiedStage2Config
from cola_jax.sampling import block_engine, image_engine, images
from cola_jax.sampling.images import ImageSettings
from cola_jax.sampling.jobs import Job
from cola_jax.types import Params


@dataclasses.dataclass(frozen=True)
class UnifiedConfig(ColaConfig):
    """A run of the joint model of text and images."""

    family: str = like(Config, "family", "unified")
    data: DataConfig = DataConfig(
        corpus="scenes", packing="pad", image_size=64, instruction_length=16, task_shares=(0.15, 0.5, 0.35)
    )
    image_vae: ImageVAEConfig = ImageVAEConfig()
    image_dit: ImageDiTConfig = ImageDiTConfig()
    image_stage1: ImageStageConfig = ImageStageConfig()
    stage2: UnifiedStage2Config = UnifiedStage2Config()
    image_sample: ImageSettings = ImageSettings()

    def check_together(self, prefix: str) -> None:
        super().check_together(prefix)
        data, vae = self.data, self.image_vae
        require(data.image_size > 0, f"{prefix}data.image_size", data.image_size, "above 0: this family needs images")
        need = f"a multiple of image_vae.downsampling = {vae.downsampling}"
        require(data.image_size % vae.downsampling == 0, f"{prefix}data.image_size", data.image_size, need)
        need = f"image_vae.latent_dim = {vae.latent_dim}"
        require(
            self.image_dit.latent_dim == vae.latent_dim,
            f"{prefix}image_dit.latent_dim",
            self.image_dit.latent_dim,
            need,
        )
        need = f"at most dit.num_layers = {self.dit.num_layers}"
        for name in ("dual_layers", "alignment_layer"):
            value = getattr(self.image_dit, name)
            require(value <= self.dit.num_layers, f"{prefix}image_dit.{name}", value, need)
        ok = self.image_dit.alignment_size > 0 or not self.stage2.alignment_weight
        need = "at least 1 where stage2.alignment_weight > 0: the number of features"
        require(ok, f"{prefix}image_dit.alignment_size", self.image_dit.alignment_size, need)
        shares = data.task_shares
        need = f"a share for each of the tasks {', '.join(TASKS)}"
        require(len(shares) == len(TASKS), f"{prefix}data.task_shares", shares, need)
        need = f"a multiple of vae.patch_size = {self.vae.patch_size}"
        length = data.instruction_length
        require(length % self.vae.patch_size == 0, f"{prefix}data.instruction_length", length, need)
        if self.image_dit.prediction == "mean":
            path = self.image_dit.path
            require(path == self.stage2.path, f"{prefix}image_dit.path", path, f"stage2.path = {self.stage2.path!r}")
            known = self.image_dit.prediction_variance is not None or vae.logsnr is not None
            need = "a number where image_dit.prediction = 'mean' and image_vae.logsnr is not fixed"
            require(known, f"{prefix}image_dit.prediction_variance", None, need)


def resolve(config: UnifiedConfig, vocab_size: int) -> UnifiedConfig:
    """The config with what it leaves open; see `cola.resolve`."""
    config = cola.resolve(config, vocab_size)
    image, vae = config.image_dit, config.image_vae
    if image.prediction == "mean" and image.prediction_variance is None:
        image = dataclasses.replace(image, prediction_variance=vae.scale**2 * math.exp(-vae.logsnr))
    return dataclasses.replace(config, image_dit=image)


def make_model(config: UnifiedConfig) -> UnifiedDLM:
    """The networks of a resolved config."""
    return UnifiedDLM(
        config.vae,
        config.dit,
        jnp.dtype(config.train.compute_dtype),
        image_vae_config=config.image_vae,
        image_dit_config=config.image_dit,
    )


def make_init(model: UnifiedDLM, config: UnifiedConfig):
    """A function from a key to the variables."""
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    side = config.data.image_size
    images = jnp.zeros((1, side, side, config.image_vae.channels))
    return lambda key: model.init(key, tokens, images)


def make_stages(
    model: UnifiedDLM | None,
    config: UnifiedConfig,
    perceptual: image_stage.Features | None = None,
    alignment: Features | None = None,
) -> tuple[Stage, Stage]:
    """Stage 1, both VAEs, each with its own loss; stage 2, the joint prior with both frozen.

    Args:
      model, config: of the family.
      perceptual, alignment: see `with_features`.

    Raises:
      UserError: features that do not fit the config.
    """
    if model is not None and config.stage2.alignment_weight:
        _check_alignment(config, alignment)

    def first(params, batch, keys, frozen):
        del frozen
        found = stage1.terms(model, config.stage1, params, batch, keys)
        codec = image_vae.ImageVAE(config.image_vae, model.dtype)
        variables = {"params": params["params"]["image_vae"]}
        real = jnp.any(batch["segment_ids"] > 0, axis=1)
        pictures = image_stage.terms(codec, config.image_stage1, variables, batch, keys, real, perceptual)
        return found | {f"image_{name}": term for name, term in pictures.items()}

    def second(params, batch, keys, frozen):
        del frozen
        return unified.terms(model, config.stage2, params, batch, keys, alignment)

    codecs, prior = cola.stages_with_terms(config, first, second)
    codecs = codecs._replace(
        groups=("vae", "image_vae"),
        trained={"vae": Group(), "image_vae": Group()},
        flops_per_token=flops_per_token(config, 1),
    )
    prior = prior._replace(
        groups=("vae", "image_vae", "dit", "image_dit"),
        trained={"dit": Group(), "image_dit": Group()},
        flops_per_token=flops_per_token(config, 2),
        begin=cola.begin_stage2(model, config),
    )
    return codecs, prior


def _check_alignment(config: UnifiedConfig, features: Features | None) -> None:
    """Raises UserError for features that do not fit; before anything is trained."""
    side, vae = config.data.image_size, config.image_vae
    grid = vae.grid(side, side)
    images = jax.ShapeDtypeStruct((1, side, side, vae.channels), jnp.uint8)
    means = jax.ShapeDtypeStruct((1, grid[0] * grid[1], vae.latent_dim), jnp.float32)
    size = config.image_dit.alignment_size
    jax.eval_shape(lambda pixels, means: objective.wanted(size, pixels, grid, means, features), images, means)


def with_features(perceptual: image_stage.Features | None = None, alignment: Features | None = None) -> Family:
    """The family, whose runs are trained with features of images: ``loop.train(config, directory, family=...)``.

    Args:
      perceptual: what should look alike of an image and its reconstruction (`image_stage1.perceptual_weight`).
      alignment: what a layer's states are aligned with (`stage2.alignment_weight`); None: the latents' means.
    """
    return FAMILY._replace(stages=functools.partial(make_stages, perceptual=perceptual, alignment=alignment))


def flops_per_token(config: UnifiedConfig, stage: int) -> float:
    """`cola.flops_per_token`, and an image's share of a row's tokens: a mean over the tasks.

    Features of images that are given are left out.
    """
    side, length = config.data.image_size, config.data.sequence_length
    encoder, decoder = image_vae.forward_flops(config.image_vae, side, side)
    found = cola.flops_per_token(config, stage)
    if stage == 1:
        return found + 3 * (encoder + decoder) / length
    latents, patch, stage2 = (side // config.image_vae.downsampling) ** 2, config.vae.patch_size, config.stage2
    shares = {
        task: share / sum(config.data.task_shares) for task, share in zip(TASKS, config.data.task_shares, strict=True)
    }
    if not stage2.auxiliary_weight:  # the text of a drawn image is clean alone
        plain = dataclasses.replace(config.dit, prediction="velocity", num_codes=0)
        clean = 3 * dit_config.forward_flops(plain, length // patch, 1, 1) / patch
        codec = text_vae.forward_flops(config.vae, length // patch)[0]
        found = (1 - shares["image"]) * found + shares["image"] * (codec + clean)
    copies = stage2.image_noise_copies or stage2.noise_copies
    rows = {"image": (latents, copies), "caption": (latents + config.data.instruction_length // patch, 1)}
    prior = encoder
    for task, (positions, times) in rows.items():
        whole = dataclasses.replace(config.dit, block_size=positions, prediction="velocity", num_codes=0)
        cost = positions * dit_config.forward_flops(whole, positions, 1, 2, clean=False)
        prior += 3 * shares[task] * times * cost
    return found + prior / length


def pictures(config: UnifiedConfig, tokenizer) -> Pictures:
    """How the pictures of a run with this config stand beside its texts."""
    data = config.data
    words = lambda text: packing.document_tokens(text, tokenizer, data.align).tolist()  # noqa: E731
    size, length = {"size": data.image_size}, {"length": data.sequence_length}
    return Pictures(
        **size,
        words=words,
        **length,
        instruction=words(data.instructions[0]) if data.instruction_length else [],
        instruction_length=data.instruction_length,
        settings=config.image_sample,
        texts=cola.ENGINE._replace(
            prepare=functools.partial(_prepare_texts, **size, instruction_length=data.instruction_length)
        ),
        images=Engine(
            unit=lambda model, settings: 1,
            prepare=functools.partial(image_engine.prepare, **size, **length),
            start=image_engine.start,
            rename=lambda program, state, asked: None,
            advance=image_engine.advance,
            own=("steps", "guidance_scale"),
        ),
    )


def _prepare_texts(model: UnifiedDLM, params: Params, settings, size: int, instruction_length: int):
    """`block_engine.prepare` for texts that may follow a picture of that size."""

    def before(asked: Sequence[Job]) -> Before:
        seen = [job.picture for job in asked]
        said = [() if picture is None else picture.said for picture in seen]
        rows = images.rows(said, instruction_length, "instruction") if instruction_length else None
        pixels = [None if picture is None else picture.pixels for picture in seen]
        return images.before(model, params, pixels, size, rows)

    return block_engine.prepare(model, params, settings)._replace(before=before)


FAMILY = cola.FAMILY._replace(
    name="unified",
    config=UnifiedConfig,
    resolve=resolve,
    model=make_model,
    init=make_init,
    stages=make_stages,
    pictures=pictures,
)
