"""Images for a batch whose sequences come and go (`families.interface.Engine`): the unit is a step of the solver.

Each image has its own number of steps and its own guidance, so that no choice of a request has to be compiled.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cola_jax import rng
from cola_jax.flow import guidance, solve
from cola_jax.models.dit_layer import Before
from cola_jax.models.image_vae import to_uint8
from cola_jax.models.unified import UnifiedDLM
from cola_jax.sampling import images, jobs
from cola_jax.sampling.images import ImageSettings
from cola_jax.sampling.jobs import Job, Progress
from cola_jax.types import Key, Params


class Plan(NamedTuple):
    """What a program is compiled for: ``size`` pixels on a side, texts of at most ``length`` tokens.

    Of the settings steps and guidance_scale are those of jobs that have none of their own.
    """

    model: UnifiedDLM
    settings: ImageSettings
    size: int
    length: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latents."""
        return self.model.image_vae_config.grid(self.size, self.size)


class Program(NamedTuple):
    """What `prepare` makes."""

    plan: Plan
    params: Params


class State(NamedTuple):
    """Images on their way; every leaf begins with the batch, but what stands before: see `places`."""

    latents: Float[Array, "B N D"]
    before: Before  # their texts
    step: Int[Array, " B"]  # steps that are done
    steps: Int[Array, " B"]
    scale: Float[Array, " B"]  # of guidance


def prepare(model: UnifiedDLM, params: Params, settings: ImageSettings, size: int, length: int) -> Program:
    """A program for images of ``size`` pixels on a side, for texts of at most ``length`` tokens."""
    settings.validate()
    return Program(Plan(model, settings, size, length), params)


def start(program: Program, asked: Sequence[Job]) -> State:
    """The batch of these images, all of them noise."""
    plan = program.plan
    wanted = [job.drawing or plan.settings for job in asked]
    before = images.text_before(plan.model, program.params, images.rows([job.prompt for job in asked], plan.length))
    steps = np.array([settings.steps for settings in wanted], np.int32)
    scale = np.array([settings.guidance_scale for settings in wanted], np.float32)
    return _start(plan, jobs.keys(asked), before, steps, scale)


@functools.partial(jax.jit, static_argnums=0)
def _start(plan: Plan, keys: Key, before: Before, steps, scale) -> State:
    rows, columns = plan.grid
    noise = rng.normal(keys, (rows * columns, plan.model.image_dit_config.latent_dim))
    return State(noise, before, jnp.zeros_like(steps), steps, scale)


def advance(program: Program, state: State, more: bool):
    """The next step of every image: (state, `Progress` with the pictures that are done, None)."""
    del more
    return *_advance(program.plan, program.params, state), None


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(plan: Plan, params: Params, state: State):
    settings, grid = plan.settings, plan.grid
    after = jnp.minimum(state.step + 1, state.steps)  # an image that is done stays as it is
    now, later = (solve.Grid(settings.shift).at(1 - step / state.steps) for step in (state.step, after))

    def velocity(z, share):
        """By the share of the step that is done: images are at different times."""
        times = now + share * (later - now)
        scale = jnp.where(guidance.acts(times, settings.guidance_interval), state.scale, 1.0)[:, None, None]
        v = images.guided_velocity(plan.model, params, z, times, grid, state.before, scale)
        return (later - now)[:, None, None] * v

    z = solve.integrate(velocity, state.latents, np.array([0.0, 1.0], np.float32), settings.solver)
    done = after == state.steps

    def decoded():
        return to_uint8(plan.model.apply(params, z, grid, method="decode_image"))

    def nothing():
        found = jax.eval_shape(decoded)
        return jnp.zeros(found.shape, found.dtype)

    pictures = jax.lax.cond(jnp.any(done & (state.step < state.steps)), decoded, nothing)
    none = jnp.zeros((len(done), 0), jnp.int32)
    state = state._replace(latents=z, step=after)
    return state, Progress(none, jnp.zeros(len(done), jnp.int32), done, pictures=pictures)
