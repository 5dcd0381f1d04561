"""Images from a joint prior of text and images, and texts that follow images (5.5).

`draw` carries noise to one image for each context; `images` does so for texts. `captions` writes texts for images:
generation as of any text, with the image among the variables (`models.unified.with_before`). `caption_batches` does so
for any number of texts, of which some may have no image.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cola_jax import rng
from cola_jax.fields import check, require, setting
from cola_jax.flow import guidance, solve
from cola_jax.models.dit_layer import Before
from cola_jax.models.image_vae import to_uint8
from cola_jax.models.unified import UnifiedDLM, with_before
from cola_jax.nn.visibility import AnyArray
from cola_jax.objectives import unified
from cola_jax.sampling.conditioning import Ids
from cola_jax.sampling.generate import Generation, generate, generate_batches
from cola_jax.sampling.settings import Settings
from cola_jax.types import Key, Params, UserError


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How an image is drawn."""

    steps: int = setting(16, "steps of the solver", at_least=1)
    solver: str = setting("euler", "of the flow", choices=tuple(solve.SOLVERS))
    guidance_scale: float = setting(2.0, "1: none; above 1: nearer to what the text says")
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0), "flow times in which guidance acts", at_least=0, at_most=1
    )
    shift: float = setting(1.0, "above 1: more steps near the noise (`flow.solve.Grid`)", above=0)

    def validate(self) -> None:
        check(self, "images ")

    def check_together(self, prefix: str) -> None:
        low, high = self.guidance_interval
        require(low <= high, f"{prefix}guidance_interval", self.guidance_interval, "a low time and a high one")


class Drawn(NamedTuple):
    """Images of `draw`.

    Attributes:
      images: pixels.
      latents: normalised.
    """

    images: UInt8[Array, "B Y X C"]
    latents: Float[Array, "B N D"]


def guided_velocity(
    model: UnifiedDLM,
    params: Params,
    z: Float[Array, "B N D"],
    times: Float[Array, " #B"],
    grid: tuple[int, int],
    before: Before,
    scale: float | Float[Array, "B 1 1"],
) -> Float[Array, "B N D"]:
    """The velocity of images that is led away from that of images which read nothing: both branches in one pass."""
    count = z.shape[0]
    alone = jnp.full(z.shape[:2], -1)
    both = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), before.pair)
    twice = Before(*both, jnp.concatenate([before.ids, before.ids]))
    times = times if times.shape[0] == 1 else jnp.concatenate([times, times])
    ids = jnp.concatenate([-alone, alone])
    v = model.apply(params, jnp.concatenate([z, z]), times, grid, twice, ids, method="image_velocity")
    return guidance.guide(v[count:], v[:count], scale)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def draw(
    model: UnifiedDLM, params: Params, keys: Key, grid: tuple[int, int], settings: ImageSettings, before: Before | None
) -> Drawn:
    """One image for each key.

    Args:
      model, params: the joint model.
      keys: [B]; an image depends on its key and what is before it alone.
      grid: rows and columns of latents.
      settings: see `ImageSettings`.
      before: what the images read (`UnifiedDLM.text_before`), or None. Guidance leads away from what reads nothing.
    """
    guided = settings.guidance_scale != 1.0 and before is not None
    noise = rng.normal(keys, (grid[0] * grid[1], model.image_dit_config.latent_dim))

    def plain(z, t):
        return model.apply(params, z, jnp.full(1, t), grid, before, method="image_velocity")

    def guide(z, t):
        return guided_velocity(model, params, z, jnp.full(1, t), grid, before, settings.guidance_scale)

    def velocity(z, t):
        if not guided:
            return plain(z, t)
        if settings.guidance_interval == (0.0, 1.0):
            return guide(z, t)
        return jax.lax.cond(guidance.acts(t, settings.guidance_interval), guide, plain, z, t)

    times = solve.Grid(settings.shift).times(settings.steps)
    z = solve.integrate(velocity, noise, times, settings.solver)
    return Drawn(to_uint8(model.apply(params, z, grid, method="decode_image")), z)


@functools.partial(jax.jit, static_argnums=0)
def text_before(model: UnifiedDLM, params: Params, batch: dict) -> Before:
    """What images read that are drawn, or scored, for texts: of each of their `rows`."""
    return unified.text_before(model, params, batch)


def rows(prompts: Sequence[Ids], length: int, what: str = "text") -> dict[str, AnyArray]:
    """Token ids as rows of a batch, filled up with padding.

    Raises:
      UserError: a text is longer than a row.
    """
    tokens, segments = (np.zeros((len(prompts), length), np.int32) for _ in range(2))
    for index, ids in enumerate(prompts):
        if len(ids) > length:
            raise UserError(f"{what} {index} has {len(ids)} tokens: must be at most {length}")
        tokens[index, : len(ids)], segments[index, : len(ids)] = ids, 1
    return {"tokens": tokens, "segment_ids": segments}


def images(
    model: UnifiedDLM,
    params: Params,
    prompts: Sequence[Ids],
    settings: ImageSettings,
    key: Key,
    size: int,
    length: int,
    sample_ids: Sequence[int] | None = None,
) -> Drawn:
    """An image for each text; an empty text has nothing to say of its image.

    Args:
      model, params: the joint model.
      prompts: token ids of whole texts, as they were trained on (with their end of text).
      settings: see `ImageSettings`.
      key: source of the noise; image i depends on (key, its id, its text) alone.
      size: pixels on a side; what the image VAE divides.
      length: tokens of a row, at least those of the longest text: a multiple of a block's.
      sample_ids: identity of each image in the random stream; its index by default.

    Raises:
      UserError: a setting, a size or a text that cannot be used.
    """
    settings.validate()
    grid = model.image_vae_config.grid(size, size)
    ids = jnp.arange(len(prompts)) if sample_ids is None else jnp.asarray(sample_ids)
    before = text_before(model, params, rows(prompts, length))
    return draw(model, params, rng.fold_in(key, ids), grid, settings, before)


@functools.partial(jax.jit, static_argnums=0)
def _before_of(model: UnifiedDLM, params: Params, batch: dict, there) -> Before:
    """What stands before each row of a batch, nothing where ``there`` [B] is False: no cost where it is never True."""

    def found():
        before = unified.before_of(model, params, batch)
        return *before.pair, jnp.where(there[:, None], before.ids, 0)

    def nothing():
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(found))

    return Before(*jax.lax.cond(jnp.any(there), found, nothing))


def before(
    model: UnifiedDLM,
    params: Params,
    pictures: Sequence[UInt8[AnyArray, "Y X C"] | None],
    size: int,
    instructions: dict[str, AnyArray] | None = None,
) -> Before:
    """What stands before each of several texts: a picture, or nothing.

    Args:
      model, params: the joint model.
      pictures: pixels; None: there is nothing before this text.
      size: pixels on a side, of all.
      instructions: `rows` of what is said before each picture; None: nothing.

    Raises:
      UserError: a picture of another size.
    """
    blank = np.zeros((size, size, model.image_vae_config.channels), np.uint8)
    for index, picture in enumerate(pictures):
        if picture is not None and picture.shape != blank.shape:
            raise UserError(f"picture {index} is {list(picture.shape)}: must be {list(blank.shape)}")
    pixels = np.stack([blank if picture is None else picture for picture in pictures])
    there = np.array([picture is not None for picture in pictures])
    return _before_of(model, params, _batch(pixels, instructions), there)


def _batch(pictures, instructions: dict[str, AnyArray] | None) -> dict:
    """Pictures, and what is said before them, as a batch of the task "caption"."""
    said = instructions or {}
    return {"image": pictures} | {f"instruction{_ENDS[name]}": value for name, value in said.items()}


_ENDS = {"tokens": "", "segment_ids": "_segment_ids"}


def conditioned(
    model: UnifiedDLM,
    params: Params,
    pictures: UInt8[AnyArray, "B Y X C"],
    instructions: dict[str, AnyArray] | None = None,
) -> Params:
    """The variables with which text i follows picture i: for generation, and for likelihood of the same batch.

    Args:
      model, params: the joint model.
      pictures: pixels.
      instructions: `rows` of what is said before the pictures; None: nothing.
    """
    there = np.ones(len(pictures), bool)
    return with_before(params, _before_of(model, params, _batch(pictures, instructions), there))


def captions(
    model: UnifiedDLM,
    params: Params,
    pictures: UInt8[AnyArray, "B Y X C"],
    settings: Settings,
    key: Key,
    instructions: dict[str, AnyArray] | None = None,
    prompts: Sequence[Ids] | None = None,
    sample_ids: Sequence[int] | None = None,
) -> Generation:
    """A text for each picture, or its continuation.

    Args:
      model, params, pictures, instructions: see `conditioned`.
      settings, key, sample_ids: see `sampling.generate`.
      prompts: how the texts begin; None: with nothing.
    """
    variables = conditioned(model, params, pictures, instructions)
    prompts = [[]] * len(pictures) if prompts is None else prompts
    return generate(model, variables, prompts, settings, key=key, sample_ids=sample_ids)


def caption_batches(
    model: UnifiedDLM,
    params: Params,
    pictures: Sequence[UInt8[AnyArray, "Y X C"] | None],
    settings: Settings,
    key: Key,
    instructions: dict[str, AnyArray] | None = None,
    prompts: Sequence[Ids] | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[int, list[int]]]:
    """A text for each of any number of pictures, as they come; a text may have none.

    Text i is that of `captions` with the same key, or, where it has no picture, of `sampling.generate`. What stands
    before a text is found when it is the text's turn.

    Args:
      model, params: the joint model.
      pictures: pixels, of one size; None: this text follows nothing.
      settings, key, batch_size: see `sampling.generate_batches`.
      instructions: `rows` of what is said before each picture; None: nothing.
      prompts: how the texts begin; None: with nothing.

    Returns:
      Pairs, in order: the index of a picture, and the tokens of its text.

    Raises:
      UserError: as `sampling.generate_batches`, pictures of several sizes, or not as many prompts.
    """
    prompts = [[]] * len(pictures) if prompts is None else prompts
    if len(prompts) != len(pictures):
        raise UserError(f"{len(prompts)} prompts for {len(pictures)} pictures: must be one for each")
    sizes = sorted({picture.shape[0] for picture in pictures if picture is not None})
    if len(sizes) > 1:
        raise UserError(f"pictures have {sizes} pixels on a side: must be of one size")

    def earlier(indices: Sequence[int]) -> Before:
        said = {name: value[np.asarray(indices)] for name, value in (instructions or {}).items()}
        return before(model, params, [pictures[index] for index in indices], sizes[0], said or None)

    return generate_batches(model, params, prompts, settings, key, batch_size, earlier if sizes else None)
