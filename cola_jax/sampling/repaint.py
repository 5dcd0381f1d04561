"""Repaint: known positions of a block follow the noise instead of being pinned (17.1, SPEC 5)."""

import jax
import jax.numpy as jnp

from cola_jax import rng
from cola_jax.flow import path, solve
from cola_jax.sampling.cache import Cache
from cola_jax.sampling.transport import GuidedPrior, NextBlock, Plan, Precomputed, noised


def repaint(plan: Plan, precomputed: Precomputed, block: NextBlock, z, cache: Cache):
    """As `transport.carry`, with known positions noised to the current time instead of pinned, in the early steps.

    Args:
      plan, precomputed, block, cache: see there.
      z: the block at the first time, in its known positions too: without early steps they stay what the flow makes.
    """
    settings = plan.settings
    prior = GuidedPrior(plan, precomputed, block, jnp.zeros_like(block.known))
    cache, _ = prior.commit(cache)
    early = round(settings.repaint_fraction * settings.steps)
    steps = [(i, cycle) for i in range(settings.steps) for cycle in range(settings.repaint_cycles if i < early else 1)]
    times, known, guided = jnp.asarray(plan.times), block.known[..., None], jnp.array(plan.guided)

    def velocity(z, index, step):
        v, _ = prior.velocity(cache, z, index, any(plan.guided))
        if len(set(plan.guided)) == 1:
            return v
        return jnp.where(guided[step], v, prior.velocity(cache, z, index, False)[0])

    def denoise_and_renoise(z, values):
        index, cycle, count = values
        now, later = times[index], times[index + 1]
        keys = jax.vmap(jax.random.split)(rng.fold_in(block.keys, count))
        at_now = noised(plan.path, block.data, rng.normal(keys[:, 0], z.shape[1:]), now)
        z = jnp.where(known & (index < early), at_now, z)
        v = velocity(z, index, index)
        z = solve.step(settings.solver, lambda z, _: velocity(z, index + 1, index), z, now, later, v)
        ratio, spread = path.renoise(plan.path, now, later)
        back = ratio * z + spread * rng.normal(keys[:, 1], z.shape[1:])
        again = (index < early) & (cycle < settings.repaint_cycles - 1)
        return jnp.where(again, back, z), None

    columns = [jnp.array(column, jnp.int32) for column in zip(*steps, strict=True)]
    z, _ = jax.lax.scan(denoise_and_renoise, z, (*columns, jnp.arange(len(steps))))
    return (jnp.where(known, block.data, z) if early == settings.steps else z), cache
