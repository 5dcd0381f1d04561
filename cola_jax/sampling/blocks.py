"""Block-wise generation with explicit caches (3.19-3.21, SPEC 5).

A prompt is encoded with the posterior mean; its complete blocks fill the caches of prior and decoder. Each
further block is noise that the guided flow carries to a latent, and is decoded. Both branches of guidance go
through the prior in one pass, and the pass that writes a finished block to the cache is also the first step of the
next block. Every sequence keeps its own position, so that a batch may mix prompts of all lengths.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cola_jax import sharding
from cola_jax.flow import path, solve
from cola_jax.models import dit
from cola_jax.models.cola import ColaDLM
from cola_jax.nn import masks
from cola_jax.sampling import choose
from cola_jax.sampling.conditioning import Layout
from cola_jax.sampling.settings import Settings
from cola_jax.types import Key, Params


class Generation(NamedTuple):
    """What `run` returns.

    Attributes:
      tokens: new tokens only; 0 (or ``pad_id``) behind the end of a sequence.
      lengths: new tokens before the end of text.
      latents: latents of the generated blocks, normalised, with those that were known in their places.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, " B"]
    latents: Float[Array, "B G K D"]


class State(NamedTuple):
    """A batch of sequences on their way. Every leaf begins with the batch, but for those of the decoder's cache."""

    layout: Layout
    data: Array  # [B, W / P, D], normalised latents of what the layout's tokens say
    keys: Array  # [B]
    block: Array  # [B], blocks generated so far
    previous: Array  # [B, K, D], the block before the next one, which the prior's cache does not hold yet
    prior: tuple  # the DiT's cache
    decoder: tuple  # the decoder's cache, [layers, B, S, H, C]
    tokens: Array  # [B, G, K * P]
    latents: Array  # [B, G, K, D]
    seen: Array  # [B, V], tokens generated so far
    done: Array  # [B]


class Weights(NamedTuple):
    """The model's variables, and what the time grid makes of them once for all blocks (None off the grid)."""

    params: Params
    modulations: dit.Modulations | None


class Plan(NamedTuple):
    """What a program is compiled for.

    ``model`` has its layers apart where that is faster; ``blocks`` are generated at most.
    """

    model: ColaDLM
    settings: Settings
    blocks: int

    @property
    def times(self) -> np.ndarray:
        return solve.time_grid(self.settings.steps, self.settings.time_shift, self.settings.start_time)

    @property
    def guided(self) -> list[bool]:
        """For each step, whether the unconditional branch is needed."""
        low, high = self.settings.guidance_interval
        return [self.settings.guidance_scale != 1.0 and bool(low <= t <= high) for t in self.times[:-1]]


def prepare(model: ColaDLM, params: Params) -> tuple[ColaDLM, Params]:
    """Model and parameters as the programs below want them: on a CPU, with the DiT's layers apart."""
    if jax.default_backend() != "cpu" or not model.stacked:
        return model, params
    return model.clone(stacked=False), _unstack(params, model.dit_config.num_layers)


_unstack = jax.jit(dit.unstack, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def tabulate(plan: Plan, params: Params) -> Weights:
    """The parameters with the modulations of the plan's times."""
    if plan.settings.solver not in solve.STEPPERS:
        return Weights(params, None)
    return Weights(params, plan.model.apply(params, jnp.asarray(plan.times), method="modulations"))


def _rows(x: Array, index: Array) -> Array:
    """x[b, index[b]] for every sequence."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(x, index)


def _write(cache, new, start: Array):
    """``new`` [..., B, n, H, C] into ``cache`` [..., B, S, H, C] at each sequence's own ``start`` [B]."""

    def leaf(c, n):
        axis = c.ndim - 4
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
        return jax.vmap(lambda c, n, s: update(c, n, s), in_axes=(axis, axis, 0), out_axes=axis)(c, n, start)

    return jax.tree.map(leaf, cache, new)


def _constrain_cache(cache):
    """Heads over the mesh axis "tensor", sequences over the others."""
    names = (None, "batch", "length", "heads", "kv")
    return jax.tree.map(lambda x: sharding.constrain(x, *names[-x.ndim :]), cache)


@functools.partial(jax.jit, static_argnums=0)
def start(plan: Plan, params: Params, layout: Layout, keys: Key) -> State:
    """The sequences' known latents, and caches that hold their history."""
    model, config = plan.model, plan.model.dit_config
    batch, block = layout.tokens.shape[0], config.block_size
    posterior = model.apply(params, layout.tokens, layout.visible.astype(jnp.int32), method="encode")
    data = model.normalize(posterior.mean)
    prior, decoder = model.apply(params, data, layout.visible.astype(jnp.int32), method="prefill")
    room = plan.blocks * block
    grow = functools.partial(jax.tree.map, lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, room), (0, 0), (0, 0)]))
    before = (layout.first[:, None] - 1) * block + jnp.arange(block)[None]
    return State(
        layout=layout,
        data=data,
        keys=keys,
        block=jnp.zeros(batch, jnp.int32),
        previous=_rows(data, jnp.clip(before, 0, data.shape[1] - 1)),
        prior=_constrain_cache(grow(prior)),
        decoder=_constrain_cache(grow(decoder)),
        tokens=jnp.zeros((batch, plan.blocks, block * model.vae_config.patch_size), jnp.int32),
        latents=jnp.zeros((batch, plan.blocks, block, config.latent_dim)),
        seen=jnp.zeros((batch, model.vae_config.vocab_size), bool),
        done=jnp.zeros(batch, bool),
    )


class _Block(NamedTuple):
    """The block that is generated next, of every sequence."""

    positions: Array  # [B, K]
    known: Array  # [B, K]
    data: Array  # [B, K, D]
    previous: Array  # [B, K, D]
    cache_mask: Array  # [B, S], history that attention may see
    keys: Array  # [B]


def _next_block(plan: Plan, state: State) -> _Block:
    block, width = plan.model.dit_config.block_size, state.data.shape[1]
    positions = (state.layout.first + state.block)[:, None] * block + jnp.arange(block)[None]
    inside = jnp.minimum(positions, width - 1)
    attended = jnp.pad(state.layout.attended, ((0, 0), (0, plan.blocks * block)), constant_values=True)
    return _Block(
        positions=positions,
        known=_rows(state.layout.known, inside) & (positions < width),
        data=_rows(state.data, inside),
        previous=state.previous,
        cache_mask=attended & (jnp.arange(attended.shape[1])[None] < positions[:, :1]),
        keys=jax.vmap(jax.random.fold_in)(state.keys, state.block),
    )


class _Prior:
    """The guided velocity of one block, and the cache that it reads."""

    def __init__(self, plan: Plan, weights: Weights, block: _Block, cache: tuple, pinned: Array):
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
        return masks.block_causal(length, self._size)

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
        self.cache = _constrain_cache(_write(self.cache, new, positions[:, 0]))
        return None if z is None else jnp.where(self._pinned[..., None], 0.0, v)


def _shifted(mask, positions):
    """mask[b, positions[b]], False at negative positions."""
    return _rows(mask, jnp.maximum(positions, 0)) & (positions >= 0)


def _streams(keys: Key) -> tuple[Key, Key]:
    """Keys of a block's noise and of its tokens, from those of the block [B]."""
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]


def _normal(keys: Key, shape) -> Array:
    """Standard normal draws [B, *shape], one of each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _noised(data, noise, time):
    """The point of the path between data and noise at one time."""
    return path.interpolate(data, noise, jnp.full((1, 1, 1), time))[0]


def _transport(plan: Plan, weights: Weights, block: _Block, z, cache, estimates: bool):
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


def _repaint(plan: Plan, weights: Weights, block: _Block, z, cache):
    """As `_transport`, with known positions noised to the current time instead of pinned, in the early steps."""
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
        noised = _noised(block.data, _normal(keys[:, 0], z.shape[1:]), now)
        z = jnp.where(known & (index < early), noised, z)
        v = velocity(z, index, index)
        z = solve.step(settings.solver, lambda z, _: velocity(z, index + 1, index), z, now, later, v)
        # Back to the time before: z_t given z_s for s < t, of the interpolant.
        keep = (1 - now) / (1 - later)
        spread = jnp.sqrt(jnp.maximum(now**2 - (keep * later) ** 2, 0.0))
        back = keep * z + spread * _normal(keys[:, 1], z.shape[1:])
        again = (index < early) & (cycle < settings.repaint_cycles - 1)
        return jnp.where(again, back, z), None

    columns = [jnp.array(column, jnp.int32) for column in zip(*turns, strict=True)]
    z, _ = jax.lax.scan(turn, z, (*columns, jnp.arange(len(turns))))
    return (jnp.where(known, block.data, z) if early == settings.steps else z), prior.cache


def advance(plan: Plan, weights: Weights, state: State, noise=None, first: bool = False, estimates: bool = False):
    """Generates the next block of every sequence that is not done.

    Args:
      noise: [B, G, K, D] in place of the keys'.
      first: all sequences are at their first block (only "repaint" needs to know).
      estimates: also decode what each step makes of the block.

    Returns:
      The new state, and the estimates [steps, B, K * P], or None.
    """
    model, settings = plan.model, plan.settings
    size, patch = model.dit_config.block_size, model.vae_config.patch_size
    batch, per_block = state.done.shape[0], size * patch
    rows = jnp.arange(batch)
    block = _next_block(plan, state)
    noise_keys, token_keys = _streams(block.keys)
    if noise is None:
        z = _normal(noise_keys, state.previous.shape[1:])
    else:
        z = noise[rows, jnp.minimum(state.block, noise.shape[1] - 1)]
    z = jnp.where(block.known[..., None], block.data, _noised(block.data, z, plan.times[0]))
    guesses, cache = None, state.prior
    if settings.prior == "flow" and first and settings.conditioning == "repaint":
        z, cache = _repaint(plan, weights, block, z, cache)
    elif settings.prior == "flow":
        z, cache, guesses = _transport(plan, weights, block, z, cache, estimates)

    decode = functools.partial(model.apply, weights.params, method="decode_next")
    logits, kv = decode(z, state.decoder, block.cache_mask, block.positions)
    logits = choose.penalize_repetition(logits, state.seen, settings.repetition_penalty)
    tokens = choose.choose(logits, token_keys, settings.temperature, settings.top_k, settings.top_p)
    if guesses is not None:
        guesses = jax.lax.map(
            lambda g: jnp.argmax(decode(g, state.decoder, block.cache_mask, block.positions)[0], axis=-1), guesses
        )

    index = block.positions[:, :1] * patch + jnp.arange(per_block)[None]
    new = (index >= state.layout.begin[:, None]) & (index < state.layout.end[:, None])
    ended = jnp.zeros_like(state.done)
    if settings.eos_id is not None:
        ended = jnp.any(new & (tokens == settings.eos_id), axis=1)
    # A sequence that is done stays where it is: its last block is only computed again.
    at = jnp.minimum(state.block, plan.blocks - 1)

    def keep(now, before):
        return jnp.where(state.done.reshape(-1, *[1] * (now.ndim - 1)), before, now)

    return State(
        layout=state.layout,
        data=state.data,
        keys=state.keys,
        block=state.block + ~state.done,
        previous=keep(z, state.previous),
        prior=cache,
        decoder=_constrain_cache(_write(state.decoder, kv, block.positions[:, 0])),
        tokens=keep(state.tokens.at[rows, at].set(tokens), state.tokens),
        latents=keep(state.latents.at[rows, at].set(z), state.latents),
        seen=keep(state.seen.at[rows[:, None], tokens].max(new), state.seen),
        done=state.done | ended | (index[:, -1] + 1 >= state.layout.end),
    ), guesses


@functools.partial(jax.jit, donate_argnums=0)
def insert(state: State, new: State, rows: Int[Array, " R"]) -> State:
    """Puts R new sequences in the places ``rows`` of a batch."""

    def leaf(old, new):
        axis = 1 if old.ndim == 5 else 0  # caches of stacked layers
        return old.at[(slice(None),) * axis + (rows,)].set(new)

    return jax.tree.map(leaf, state, new)


advance_once = jax.jit(advance, static_argnums=0, static_argnames=("first", "estimates"), donate_argnums=2)


@functools.partial(jax.jit, static_argnums=0)
def run(plan: Plan, params: Params, layout: Layout, keys: Key, noise=None) -> Generation:
    """The whole generation in one program."""
    weights, state = tabulate(plan, params), start(plan, params, layout, keys)
    if plan.settings.conditioning == "repaint":
        state, _ = advance(plan, weights, state, noise, first=True)

    def going(state: State):
        return jnp.any(~state.done & (state.block < plan.blocks))

    state = jax.lax.while_loop(going, lambda state: advance(plan, weights, state, noise)[0], state)
    return cut(plan, state)


def cut(plan: Plan, state: State) -> Generation:
    """New tokens only, from begin to end, up to the end of text."""
    settings, layout = plan.settings, state.layout
    per_block = state.tokens.shape[2]
    tokens = state.tokens.reshape(state.tokens.shape[0], -1)
    tail = layout.begin - layout.first * per_block
    length = min(settings.max_new_tokens, tokens.shape[1])
    index = jnp.arange(length)[None]
    new = jnp.take_along_axis(tokens, jnp.minimum(tail[:, None] + index, tokens.shape[1] - 1), axis=1)
    inside = index < jnp.minimum(tokens.shape[1] - tail, layout.end - layout.begin)[:, None]
    if settings.eos_id is not None:
        inside = inside & (jnp.cumsum(new == settings.eos_id, axis=1) == 0)
    return Generation(jnp.where(inside, new, settings.pad_id or 0), jnp.sum(inside, axis=1), state.latents)
