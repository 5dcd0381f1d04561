"""A block from noise to latents: the guided flow against a cache of what was before (3.19-3.21, SPEC 5)."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cola_jax import rng
from cola_jax.flow import guidance, path, prediction, solve
from cola_jax.flow.path import PATHS, Path
from cola_jax.models.cola import ColaDLM
from cola_jax.nn import visibility
from cola_jax.nn.modulation import ModulationTables
from cola_jax.nn.visibility import BlockPlan
from cola_jax.sampling import cache as caches
from cola_jax.sampling.cache import Cache
from cola_jax.sampling.settings import Settings
from cola_jax.types import Params

# Of the random stream of a block: 0 is its noise, 1 its tokens (`blocks`).
_CHURN = 2


class Precomputed(NamedTuple):
    """The model's variables, and what the time grid makes of them once for all blocks (None off the grid)."""

    params: Params
    modulations: ModulationTables | None


class Plan(NamedTuple):
    """What a program is compiled for.

    ``model`` has its layers apart where that is faster; ``blocks`` are generated at most; ``capacity`` is how many
    latents a sequence has together with what was known, None: as many as the layout and all blocks.
    """

    model: ColaDLM
    settings: Settings
    blocks: int
    capacity: int | None = None

    @property
    def times(self) -> np.ndarray:
        return self.settings.times

    @property
    def guided(self) -> list[bool]:
        return self.settings.guided

    @property
    def path(self) -> Path:
        return PATHS[self.settings.path]


class NextBlock(NamedTuple):
    """The block that is generated next, of every sequence."""

    positions: Array  # [B, K]
    known: Array  # [B, K]
    data: Array  # [B, K, D]
    previous: Array  # [B, K, D]
    cache_mask: Array  # [B, S], history that attention may see
    keys: Array  # [B]


class GuidedPrior(NamedTuple):
    """The guided velocity of one block. The cache that it reads goes into its functions and comes out of `commit`.

    Attributes:
      plan, precomputed, block: see there.
      pinned: [B, K], positions that are data at time 0 and do not move.
    """

    plan: Plan
    precomputed: Precomputed
    block: NextBlock
    pinned: Array

    def _extend(self, cache: Cache, latents, time, positions, pinned, cache_mask, own_mask, guided: bool, estimate):
        """One pass, where ``guided`` with a copy of the last block without history behind the rest.

        Returns velocity and output of the last block, and the keys and values of all.
        """
        block, settings = self.plan.model.dit_config.block_size, self.plan.settings
        if guided:
            latents, positions, pinned = (
                jnp.concatenate([x, x[:, -block:]], axis=1) for x in (latents, positions, pinned)
            )
        if estimate is not None:  # of the block, in both branches; the block that is committed has none
            estimate = jnp.concatenate([estimate, estimate], axis=1) if guided else estimate
            estimate = jnp.pad(estimate, ((0, 0), (latents.shape[1] - estimate.shape[1], 0), (0, 0)))
        if settings.rotary_period is not None:
            positions = positions % settings.rotary_period
        found = self.plan.model.apply(
            self.precomputed.params, latents, time, positions, cache, cache_mask, own_mask, pinned,
            self.precomputed.modulations, estimate=estimate, method="extend",
        )  # fmt: skip
        if not guided:
            return found.velocity[:, -block:], found.output[:, -block:], found.keys_values
        has_history = jnp.any(self.block.cache_mask, axis=1)[:, None, None]  # else both branches coincide

        def guide(x):
            conditional, free = x[:, -2 * block : -block], x[:, -block:]
            return jnp.where(has_history, guidance.guide(free, conditional, settings.guidance_scale), conditional)

        return guide(found.velocity), guide(found.output), found.keys_values

    def _own(self, length: int):
        return visibility.block_causal(BlockPlan.equal(self.plan.model.dit_config.block_size), length)

    def velocity(self, cache: Cache, z, time, guided: bool, estimate=None):
        """(velocity, output) of the block at a time, or at the index of a time in the grid; v is zero where pinned.

        ``estimate``: of the means, from the step before; None: for a network that wants one, from a pass without.
        """
        if estimate is None and self.plan.model.dit_config.self_conditioning:
            _, estimate = self.velocity(cache, z, time, guided, self.no_estimate(z))
        b = self.block
        own = self._own(z.shape[1])
        v, output, _ = self._extend(cache, z, time, b.positions, self.pinned, b.cache_mask, own, guided, estimate)
        return jnp.where(self.pinned[..., None], 0.0, v), output

    def commit(self, cache: Cache, z=None, guided: bool = False):
        """The cache with the block before in it; with ``z``, the same pass gives `velocity` at the first time."""
        b, size = self.block, self.plan.model.dit_config.block_size
        positions, pinned = b.positions - size, jnp.ones_like(b.known)
        visible = _shifted(b.cache_mask, positions)
        latents = b.previous
        if z is not None:
            latents = jnp.concatenate([latents, z], axis=1)
            positions = jnp.concatenate([positions, b.positions], axis=1)
            pinned = jnp.concatenate([pinned, self.pinned], axis=1)
            visible = jnp.concatenate([visible, jnp.ones_like(visible)], axis=1)
        earlier = b.cache_mask & (jnp.arange(b.cache_mask.shape[1])[None] < positions[:, :1])
        own = self._own(latents.shape[1]) & visible[:, None, :]
        time = jnp.asarray(self.plan.times)[0] if self.precomputed.modulations is None else jnp.int32(0)
        estimate = self.no_estimate(latents if z is None else z)
        v, output, kv = self._extend(cache, latents, time, positions, pinned, earlier, own, guided, estimate)
        new = jax.tree.map(lambda x: x[..., :size, :], kv)
        cache = caches.commit(cache, new, positions[:, 0])
        return cache, (None if z is None else (jnp.where(self.pinned[..., None], 0.0, v), output))

    def no_estimate(self, z):
        """What the first step gives the network in place of an estimate of the step before."""
        return jnp.zeros_like(z) if self.plan.model.dit_config.self_conditioning else None


def _shifted(mask, positions):
    """mask[b, positions[b]], False at negative positions."""
    return caches.rows_at(mask, jnp.maximum(positions, 0)) & (positions >= 0)


def noised(along: Path, data, noise, time):
    """The point of a path between data and noise at one time."""
    return path.interpolate(along, data, noise, jnp.full((1, 1, 1), time))[0]


def carry(plan: Plan, precomputed: Precomputed, block: NextBlock, z, cache: Cache, estimates: bool):
    """A block from noise ``z`` to latents: (latents, cache, estimates of the latents at every step or None)."""
    settings, guided = plan.settings, plan.guided
    prior = GuidedPrior(plan, precomputed, block, block.known)
    times = jnp.asarray(plan.times)
    if not settings.on_grid:
        cache, _ = prior.commit(cache)
        return solve.integrate(_field(prior, cache), z, times, settings.solver), cache, None

    feeds_back = plan.model.dit_config.self_conditioning
    cache, first = prior.commit(cache, z, guided[0])

    def advance(carried, index, guided: bool, found=None):
        """((latents after the step, estimate of the means), estimate of the data before it)."""
        z, estimate = carried
        v, output = prior.velocity(cache, z, index, guided, estimate) if found is None else found
        estimate = output if feeds_back else None
        if settings.solver == "exponential":
            z_later = _follow(plan, block.keys, z, v, output, index)
            z_later = jnp.where(prior.pinned[..., None], z, z_later)
        else:
            z_later = solve.step(
                settings.solver,
                lambda z, _: prior.velocity(cache, z, index + 1, guided, estimate)[0],
                z, times[index], times[index + 1], v,
            )  # fmt: skip
        return (z_later, estimate), (path.to_data(plan.path, z, v, times[index]) if estimates else None)

    carried, guess = advance((z, None), jnp.int32(0), guided[0], first)
    guesses = [] if guess is None else [guess[None]]
    for stretch, group in itertools.groupby(range(1, settings.steps), key=lambda i: guided[i]):
        carried, more = jax.lax.scan(lambda c, i, on=stretch: advance(c, i, on), carried, jnp.array(list(group)))
        guesses += [] if more is None else [more]
    return carried[0], cache, (jnp.concatenate(guesses) if guesses else None)


def _follow(plan: Plan, keys, z, v, output, index):
    """A step of the exponential solver from the time of an index of the grid to the next.

    A model that predicts velocities is followed as one that predicts the data: latents of variance 0 around it.
    """
    settings, times, config = plan.settings, jnp.asarray(plan.times), plan.model.dit_config
    mean, variance = output, config.prediction_variance
    if config.prediction == "velocity":
        mean, variance = path.to_data(plan.path, z, v, times[index]), 0.0
    fresh = None
    if settings.churn:
        fresh = rng.normal(rng.fold_in(rng.fold_in(keys, _CHURN), index), z.shape[1:])
    return prediction.follow_mean(plan.path, z, mean, times[index], times[index + 1], variance, settings.churn, fresh)


def _field(prior: GuidedPrior, cache: Cache) -> solve.Velocity:
    """The guided velocity at any time, for solvers that leave the grid."""
    settings = prior.plan.settings
    needs, interval = settings.guidance_scale != 1.0, settings.guidance_interval

    def velocity(z, t):
        v, _ = prior.velocity(cache, z, t, needs)
        if not needs or interval == (0.0, 1.0):
            return v
        return jnp.where(guidance.acts(t, interval), v, prior.velocity(cache, z, t, False)[0])

    return velocity
