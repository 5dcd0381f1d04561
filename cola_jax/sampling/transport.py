"""A block from noise to latents: the guided flow against a cache of what was before (3.19-3.21, SPEC 5)."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cola_jax import sharding
from cola_jax.flow import path, solve
from cola_jax.models.cola import ColaDLM
from cola_jax.nn import visibility
from cola_jax.nn.modulation import ModulationTables
from cola_jax.nn.visibility import BlockPlan
from cola_jax.sampling.settings import Settings
from cola_jax.types import Key, Params


class Weights(NamedTuple):
    """The model's variables, and what the time grid makes of them once for all blocks (None off the grid)."""

    params: Params
    modulations: ModulationTables | None


class Plan(NamedTuple):
    """What a program is compiled for.

    ``model`` has its layers apart where that is faster; ``blocks`` are generated at most.
    """

    model: ColaDLM
    settings: Settings
    blocks: int

    @property
    def times(self) -> np.ndarray:
        return self.settings.times

    @property
    def guided(self) -> list[bool]:
        return self.settings.guided


def rows_at(x: Array, index: Array) -> Array:
    """x[b, index[b]] for every sequence."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(x, index)


def write(cache, new, start: Array):
    """``new`` [..., B, n, H, C] into ``cache`` [..., B, S, H, C] at each sequence's own ``start`` [B]."""

    def leaf(c, n):
        axis = c.ndim - 4
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
        return jax.vmap(lambda c, n, s: update(c, n, s), in_axes=(axis, axis, 0), out_axes=axis)(c, n, start)

    return jax.tree.map(leaf, cache, new)


def constrain_cache(cache):
    """Heads over the mesh axis "tensor", sequences over the others."""
    names = (None, "batch", "length", "heads", "kv")
    return jax.tree.map(lambda x: sharding.constrain(x, *names[-x.ndim :]), cache)


class Block(NamedTuple):
    """The block that is generated next, of every sequence."""

    positions: Array  # [B, K]
    known: Array  # [B, K]
    data: Array  # [B, K, D]
    previous: Array  # [B, K, D]
    cache_mask: Array  # [B, S], history that attention may see
    keys: Array  # [B]


class _Prior:
    """The guided velocity of one block, and the cache that it reads."""

    def __init__(self, plan: Plan, weights: Weights, block: Block, cache: tuple, pinned: Array):
        self._plan, self._block, self.cache, self._pinned = plan, block, cache, pinned
        self._params, self._table = weights
        self._size = plan.model.dit_config.block_size
        self.times = jnp.asarray(plan.times)
        self._guidable = jnp.any(block.cache_mask, axis=1)[:, None, None]  # else both branches coincide

    def _extend(self, latents, time, positions, pinned, cache_mask, own_mask, alone: bool):
        """One pass, with ``alone`` a copy of the last block without history behind the rest."""
        block, period = self._size, self._plan.settings.rotary_period
        if alone:
            latents, positions, pinned = (
                jnp.concatenate([x, x[:, -block:]], axis=1) for x in (latents, positions, pinned)
            )
        positions = positions if period is None else positions % period
        velocity, kv = self._plan.model.apply(
            self._params, latents, time, positions, self.cache, cache_mask, own_mask, pinned, self._table,
            method="extend",
        )  # fmt: skip
        if not alone:
            return velocity[:, -block:], kv
        conditional, free = velocity[:, -2 * block : -block], velocity[:, -block:]
        guided = free + self._plan.settings.guidance_scale * (conditional - free)
        return jnp.where(self._guidable, guided, conditional), kv

    def _own(self, length: int):
        return visibility.block_causal(BlockPlan.equal(self._size), length)

    def velocity(self, z, time, alone: bool):
        """Velocity of the block at a time, or at the index of a time in the grid; zero where it is pinned."""
        b = self._block
        v, _ = self._extend(z, time, b.positions, self._pinned, b.cache_mask, self._own(self._size), alone)
        return jnp.where(self._pinned[..., None], 0.0, v)

    def commit(self, z=None, alone: bool = False):
        """Writes the block before to the cache; with ``z``, the same pass gives the velocity at the first time."""
        b, size = self._block, self._size
        positions, pinned = b.positions - size, jnp.ones_like(b.known)
        visible = _shifted(b.cache_mask, positions)
        latents = b.previous
        if z is not None:
            latents = jnp.concatenate([latents, z], axis=1)
            positions = jnp.concatenate([positions, b.positions], axis=1)
            pinned = jnp.concatenate([pinned, self._pinned], axis=1)
            visible = jnp.concatenate([visible, jnp.ones_like(visible)], axis=1)
        earlier = b.cache_mask & (jnp.arange(b.cache_mask.shape[1])[None] < positions[:, :1])
        own = self._own(latents.shape[1]) & visible[:, None, :]
        time = self.times[0] if self._table is None else jnp.int32(0)
        v, kv = self._extend(latents, time, positions, pinned, earlier, own, alone)
        new = jax.tree.map(lambda x: x[..., :size, :, :], kv)
        self.cache = constrain_cache(write(self.cache, new, positions[:, 0]))
        return None if z is None else jnp.where(self._pinned[..., None], 0.0, v)


def _shifted(mask, positions):
    """mask[b, positions[b]], False at negative positions."""
    return rows_at(mask, jnp.maximum(positions, 0)) & (positions >= 0)


def normal(keys: Key, shape) -> Array:
    """Standard normal draws [B, *shape], one of each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def noised(data, noise, time):
    """The point of the path between data and noise at one time."""
    return path.interpolate(data, noise, jnp.full((1, 1, 1), time))[0]


def carry(plan: Plan, weights: Weights, block: Block, z, cache, estimates: bool):
    """A block from noise ``z`` to latents: (latents, cache, estimates of the latents at every step or None)."""
    settings = plan.settings
    prior = _Prior(plan, weights, block, cache, block.known)
    guided, steps = plan.guided, settings.steps
    if settings.solver not in solve.STEPPERS:
        prior.commit()
        low, high = settings.guidance_interval
        needs = settings.guidance_scale != 1.0

        def velocity(z, t):
            v = prior.velocity(z, t, needs)
            if not needs or (low, high) == (0.0, 1.0):
                return v
            return jnp.where((low <= t) & (t <= high), v, prior.velocity(z, t, False))

        return solve.integrate(velocity, z, prior.times, settings.solver), prior.cache, None

    times = prior.times

    def one(z, index, alone: bool, v=None):
        """(latents after the step, estimate of the data before it)."""
        v = prior.velocity(z, index, alone) if v is None else v
        now, later = times[index], times[index + 1]
        z_later = solve.step(settings.solver, lambda z, _: prior.velocity(z, index + 1, alone), z, now, later, v)
        return z_later, (path.to_data(z, v, now) if estimates else None)

    v = prior.commit(z, guided[0])
    z, first = one(z, jnp.int32(0), guided[0], v)
    guesses = [] if first is None else [first[None]]
    for alone, group in itertools.groupby(range(1, steps), key=lambda i: guided[i]):
        z, more = jax.lax.scan(lambda z, i, alone=alone: one(z, i, alone), z, jnp.array(list(group)))
        guesses += [] if more is None else [more]
    return z, prior.cache, (jnp.concatenate(guesses) if guesses else None)


def repaint(plan: Plan, weights: Weights, block: Block, z, cache):
    """As `carry`, with known positions noised to the current time instead of pinned, in the early steps."""
    settings = plan.settings
    prior = _Prior(plan, weights, block, cache, jnp.zeros_like(block.known))
    prior.commit()
    early = round(settings.repaint_fraction * settings.steps)
    turns = [(i, cycle) for i in range(settings.steps) for cycle in range(settings.repaint_cycles if i < early else 1)]
    times, known, guided = prior.times, block.known[..., None], jnp.array(plan.guided)

    def velocity(z, index, step):
        v = prior.velocity(z, index, any(plan.guided))
        if len(set(plan.guided)) == 1:
            return v
        return jnp.where(guided[step], v, prior.velocity(z, index, False))

    def turn(z, values):
        index, cycle, count = values
        now, later = times[index], times[index + 1]
        keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, count)))(block.keys)
        at_now = noised(block.data, normal(keys[:, 0], z.shape[1:]), now)
        z = jnp.where(known & (index < early), at_now, z)
        v = velocity(z, index, index)
        z = solve.step(settings.solver, lambda z, _: velocity(z, index + 1, index), z, now, later, v)
        # Back to the time before: z_t given z_s for s < t, of the interpolant.
        keep = (1 - now) / (1 - later)
        spread = jnp.sqrt(jnp.maximum(now**2 - (keep * later) ** 2, 0.0))
        back = keep * z + spread * normal(keys[:, 1], z.shape[1:])
        again = (index < early) & (cycle < settings.repaint_cycles - 1)
        return jnp.where(again, back, z), None

    columns = [jnp.array(column, jnp.int32) for column in zip(*turns, strict=True)]
    z, _ = jax.lax.scan(turn, z, (*columns, jnp.arange(len(turns))))
    return (jnp.where(known, block.data, z) if early == settings.steps else z), prior.cache
