"""Density of a model's latents under its prior: ``log p(z^(b) | z^(<b))`` of all blocks at once (3.8-3.11).

Noisy blocks do not see each other, so that one solve of the augmented ODE (`flow.density`) over a batch of (sequence,
block) pairs, each with its own step sizes, gives the density of every block given its history.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax.flow import density as flow_density
from cola_jax.flow.solve import Velocity
from cola_jax.likelihood.settings import Settings
from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_layer import Before
from cola_jax.types import Key, Params


class Density(NamedTuple):
    """Log-density of each block of each sequence given its earlier blocks.

    Attributes:
      log_prob: nats; 0 for a block without a free position.
      noise: z_1, the latents carried to time 1; fixed positions as they were.
      ok, steps: see `flow.density.Flow`.
    """

    log_prob: Float[Array, "B G"]
    noise: Float[Array, "B N D"]
    ok: Bool[Array, "B G"]
    steps: Int[Array, "B G"]


def precise(
    model: ColaDLM, params: Params, settings: Settings, groups: Sequence[str] = ("dit",)
) -> tuple[ColaDLM, Params]:
    """Model and parameters (of the prior alone) that compute in the settings' dtype, whatever the model's own is."""
    dtype = jnp.dtype(settings.dtype)
    prior = {**params, "params": {name: params["params"][name] for name in groups}}
    return model.clone(dtype=dtype), jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, prior)


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _befores(params: Params, rows: int) -> tuple | None:
    """The parts of what stands before each of ``rows`` rows (`Before`): samples of as many texts as it has."""
    if "before" not in params:
        return None
    before = params["before"]["dit"]["is"]
    count = rows // before.ids.shape[0]
    keys, values = (jnp.repeat(x, count, axis=1) for x in before.pair)
    return keys, values, jnp.repeat(before.ids, count, axis=0)


def _with(params: Params, parts: tuple | None) -> Params:
    """The variables with what stands before a batch of rows, or before one: then without its axis."""
    if parts is None:
        return params
    keys, values, ids = parts if parts[2].ndim == 2 else (parts[0][:, None], parts[1][:, None], parts[2][None])
    return {**params, "before": {"dit": {"is": Before(keys, values, ids)}}}


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
      cache: keys and values [layers, H, S, C] of the sequence's clean latents.
      index: of the block.
      real: positions that are not padding.
      pinned: positions that are data, at time 0.
    """
    size = model.dit_config.block_size
    cache = jax.tree.map(lambda x: x[:, None], cache)
    earlier = (jnp.arange(cache[0].shape[-2]) < index * size)[None]
    positions = (index * size + jnp.arange(size))[None]

    def velocity(z, t):
        own = jnp.broadcast_to(real[None, None, :], (1, len(real), len(real)))
        v = model.apply(params, z[None], t, positions, cache, earlier, own, pinned[None], method="extend")[0]
        return v[0]

    return velocity


def draw_probes(key: Key, settings: Settings, shape: tuple[int, int]) -> Float[Array, "M K D"] | None:
    """The probes of one block that the settings ask for; None where the divergence is exact."""
    if settings.divergence == "exact":
        return None
    return flow_density.draw_probes(key, shape, settings.probe, settings.probes, settings.dtype)


@functools.partial(jax.jit, static_argnums=(0, 3), static_argnames="start")
def log_prob(
    model: ColaDLM,
    params: Params,
    latents: Float[Array, "B N D"],
    settings: Settings,
    keys: Key | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
    pinned: Bool[Array, "B N"] | None = None,
    states: Float[Array, "B N D"] | None = None,
    start: float = 0.0,
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
      states: of the flow at time ``start``, whose density there is asked for, given the latents of earlier blocks;
        None: the latents.
      start: flow time of the states, below 1.

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
    states = latents if states is None else states.astype(dtype)
    befores = _befores(params, batch)
    cache = model.apply(_with(params, befores), latents, segments, method="history")
    scale = model.dit_config.deviation

    def block_log_prob(cache, before, index, z, real, pinned, key):
        free = real & ~pinned
        probes = None if key is None else draw_probes(key, settings, (size, channels))
        velocity = block_velocity(model, _with(params, before), cache, index, real, pinned)
        flow = flow_density.transport(velocity, z, settings.method, start, free=free, probes=probes, scale=scale)
        return flow_density.log_prob(flow, free), flow

    per_block = jax.vmap(block_log_prob, in_axes=(None, None, 0, 0, 0, 0, None if keys is None else 0))
    of_before = None if befores is None else (1, 1, 0)
    per_sequence = jax.vmap(per_block, in_axes=(1, of_before, None, 0, 0, 0, None if keys is None else 0))
    by_block = (batch, blocks, size)
    log_p, flow = per_sequence(
        cache,
        befores,
        jnp.arange(blocks),
        states.reshape(*by_block, channels),
        (segments > 0).reshape(by_block),
        pinned.reshape(by_block),
        keys,
    )
    return Density(log_p, flow.end.reshape(latents.shape), flow.ok, flow.steps)
