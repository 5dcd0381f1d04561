"""Density of latents under the flow: the augmented ODE of a continuous normalizing flow (3.8-3.11, 10.23-10.25).

The flow runs from data (t = 0) to noise (t = 1): ``d/dt [z, l] = [v, div v]`` with ``l(0) = 0``, and
``log p(z_0) = log N(z_1; 0, I) + l(1)``. Noisy blocks do not see each other, so that one solve over a batch of
(sequence, block) pairs, each with its own step sizes, gives every ``log p(z^(b) | z^(<b))``.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cola_jax.likelihood.settings import SOLVERS, Settings
from cola_jax.models.cola import ColaDLM
from cola_jax.types import Key, Params

Velocity = Callable[[Array, Array], Array]

# Tangents that the exact divergence pushes through one block at a time.
_TANGENTS = 64


class Flow(NamedTuple):
    """Where the ODE ends, or ends for each of many.

    Attributes:
      end: z at the last time.
      change: the integral of the divergence, nats.
      ok: False where the solver gave up (too many steps) or the result is not finite.
      steps: solver steps, rejected ones included.
    """

    end: Float[Array, "*S K D"]
    change: Float[Array, "*S"]
    ok: Bool[Array, "*S"]
    steps: Int[Array, "*S"]


class Density(NamedTuple):
    """Log-density of each block of each sequence given its earlier blocks.

    Attributes:
      log_prob: nats; 0 for a block without a free position.
      noise: z_1, the latents carried to time 1; fixed positions as they were.
      ok, steps: see `Flow`.
    """

    log_prob: Float[Array, "B G"]
    noise: Float[Array, "B N D"]
    ok: Bool[Array, "B G"]
    steps: Int[Array, "B G"]


def divergence(push: Callable[[Array], Array], probes: Float[Array, "M K D"] | None, shape: tuple, dtype) -> Array:
    """Trace of a Jacobian that is given by its products with tangents.

    Args:
      push: tangent [K, D] to ``J @ tangent``.
      probes: of the Hutchinson estimator, the mean of ``e . J e``; None: the exact trace.
      shape: (K, D).
      dtype: of the tangents.
    """
    if probes is not None:
        return jnp.mean(jax.vmap(lambda e: jnp.sum(e * push(e)))(probes))
    size = math.prod(shape)

    def entry(i):
        unit = jax.nn.one_hot(i, size, dtype=dtype).reshape(shape)
        return jnp.sum(unit * push(unit))

    return jnp.sum(jax.lax.map(entry, jnp.arange(size), batch_size=min(size, _TANGENTS)))


def time_grid(settings: Settings, start: float, stop: float) -> Float[np.ndarray, " T"]:
    """Ends of the fixed steps, ``steps + 1`` times; finer near t = 0 for a power above 1."""
    ends = np.asarray([start, stop]) ** (1 / settings.power)
    grid = np.linspace(*ends, settings.steps + 1) ** settings.power
    grid[[0, -1]] = start, stop
    return grid


def transport(
    velocity: Velocity,
    z: Float[Array, "K D"],
    settings: Settings,
    start: float = 0.0,
    stop: float = 1.0,
    free: Bool[Array, " K"] | None = None,
    probes: Float[Array, "M K D"] | None = None,
) -> Flow:
    """Solves the augmented ODE for one block; `jax.vmap` over it keeps the step sizes of each.

    Args:
      velocity: ``(z [K, D], t []) -> [K, D]``.
      z: state at ``start``.
      settings: solver, steps or tolerances.
      start, stop: flow times; 0 to 1 carries data to noise, 1 to 0 noise to data.
      free: positions that move; the others keep their value and have no density. None: all.
      probes: for Hutchinson's divergence; None: the exact one.
    """
    moves = jnp.ones((z.shape[0], 1), bool) if free is None else free[:, None]
    if probes is not None:
        probes = jnp.where(moves[None], probes, 0.0)

    def field(t, state, _):
        value, push = jax.linearize(lambda x: jnp.where(moves, velocity(x, t), 0.0), state[0])
        return value, divergence(push, probes, z.shape, z.dtype)

    if settings.steps:
        controller = diffrax.StepTo(time_grid(settings, start, stop).astype(z.dtype))
    else:
        controller = diffrax.PIDController(rtol=settings.rtol, atol=settings.atol)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        SOLVERS[settings.solver](),
        t0=jnp.asarray(start, z.dtype),
        t1=jnp.asarray(stop, z.dtype),
        dt0=None,
        y0=(z, jnp.zeros((), z.dtype)),
        stepsize_controller=controller,
        adjoint=diffrax.ForwardMode(),  # nothing is differentiated through the solve
        max_steps=settings.max_steps,
        throw=False,
    )
    end, change = solution.ys[0][-1], solution.ys[1][-1]
    ok = (solution.result == diffrax.RESULTS.successful) & jnp.isfinite(change) & jnp.all(jnp.isfinite(end))
    return Flow(end, change, ok, solution.stats["num_steps"])


def draw_probes(key: Key, settings: Settings, shape: tuple[int, int]) -> Float[Array, "M K D"] | None:
    """The probes of one block, [M, K, D]; None where the divergence is exact."""
    if settings.divergence == "exact":
        return None
    draw = jax.random.rademacher if settings.probe == "rademacher" else jax.random.normal
    return draw(key, (settings.probes, *shape), dtype=jnp.dtype(settings.dtype))


def normal_log_prob(z: Float[Array, "K D"], free: Bool[Array, " K"]) -> Float[Array, ""]:
    """``log N(z; 0, I)`` over the free positions, nats."""
    each = -0.5 * (jnp.square(z) + math.log(2 * math.pi))
    return jnp.sum(jnp.where(free[:, None], each, 0.0))


def precise(model: ColaDLM, params: Params, settings: Settings) -> tuple[ColaDLM, Params]:
    """Model and parameters of the prior in float64 where the settings ask for it; else as they are."""
    if settings.dtype == "float32":
        return model, params
    model = model.clone(dtype=jnp.dtype("float64"))
    return model, {"params": jax.tree.map(lambda x: x.astype(jnp.float64), {"dit": params["params"]["dit"]})}


def block_velocity(
    model: ColaDLM,
    params: Params,
    cache: tuple[Array, Array],
    index: Array,
    real: Bool[Array, " K"],
    pinned: Bool[Array, " K"],
) -> Velocity:
    """The velocity of one block of one sequence, given its clean history.

    Args:
      model, params: the prior.
      cache: keys and values [layers, S, H, C] of the sequence's clean latents.
      index: of the block.
      real: positions that are not padding.
      pinned: positions that are data, at time 0.
    """
    size = model.dit_config.block_size
    cache = jax.tree.map(lambda x: x[:, None], cache)
    earlier = (jnp.arange(cache[0].shape[2]) < index * size)[None]
    positions = (index * size + jnp.arange(size))[None]

    def velocity(z, t):
        own = jnp.broadcast_to(real[None, None, :], (1, len(real), len(real)))
        v, _ = model.apply(params, z[None], t, positions, cache, earlier, own, pinned[None], method="extend")
        return v[0]

    return velocity


@functools.partial(jax.jit, static_argnums=(0, 3))
def log_prob(
    model: ColaDLM,
    params: Params,
    latents: Float[Array, "B N D"],
    settings: Settings,
    keys: Key | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
    pinned: Bool[Array, "B N"] | None = None,
) -> Density:
    """``log p(z^(b) | z^(<b))`` of every block b of every sequence, in one solve.

    Args:
      model: a `ColaDLM`.
      params: its variables; only the prior's are used.
      latents: normalised latents z_0, one document a row; N is a multiple of the block size K.
      settings: see `Settings`.
      keys: [B, G], one for each block (G = N / K), for Hutchinson's probes; None where the divergence is exact.
      segment_ids: 0 for padding, which follows the document; None: no padding. A block that the document ends
        inside has the density of its real positions alone.
      pinned: positions that are given, not scored: data at time 0, as generation keeps them after a prompt.

    Returns:
      A `Density`. A solve that fails has ``ok`` False; the others are not touched.
    """
    model, params = precise(model, params, settings)
    size, dtype = model.dit_config.block_size, jnp.dtype(settings.dtype)
    batch, length, channels = latents.shape
    blocks = length // size
    segments = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    pinned = jnp.zeros((batch, length), bool) if pinned is None else pinned
    latents = latents.astype(dtype)
    cache = model.apply(params, latents, segments, method="history")

    def one(cache, index, z, real, pinned, key):
        free = real & ~pinned
        probes = None if key is None else draw_probes(key, settings, (size, channels))
        velocity = block_velocity(model, params, cache, index, real, pinned)
        flow = transport(velocity, z, settings, free=free, probes=probes)
        return normal_log_prob(flow.end, free) + flow.change, flow

    per_block = jax.vmap(one, in_axes=(None, 0, 0, 0, 0, None if keys is None else 0))
    per_sequence = jax.vmap(per_block, in_axes=(1, None, 0, 0, 0, None if keys is None else 0))
    by_block = (batch, blocks, size)
    log_p, flow = per_sequence(
        cache,
        jnp.arange(blocks),
        latents.reshape(*by_block, channels),
        (segments > 0).reshape(by_block),
        pinned.reshape(by_block),
        keys,
    )
    return Density(log_p, flow.end.reshape(latents.shape), flow.ok, flow.steps)
