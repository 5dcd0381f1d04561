"""Block-wise generation with explicit caches (3.19-3.21, SPEC 5).

A prompt is encoded with the posterior mean; its complete blocks fill the caches of prior and decoder. Each
further block is noise that the guided flow carries to a latent, and is decoded. Both branches of guidance go
through the prior in one pass, and the pass that writes a finished block to the cache is also the first step of the
next block. Every sequence keeps its own position, so that a batch may mix prompts of all lengths.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cola_jax import rng
from cola_jax.models import dit
from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_layer import Before
from cola_jax.models.unified import with_before
from cola_jax.sampling import cache as caches
from cola_jax.sampling import choose, repaint, transport
from cola_jax.sampling.conditioning import Layout
from cola_jax.sampling.transport import NextBlock, Plan, Precomputed
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
    """A batch of sequences on their way. Every leaf begins with the batch, but stacked caches: see `places`."""

    layout: Layout
    data: Array  # [B, W / P, D], normalised latents of what the layout's tokens say
    keys: Array  # [B]
    block: Array  # [B], blocks generated so far
    previous: Array  # [B, K, D], the block before the next one, which the prior's cache does not hold yet
    prior: tuple  # the DiT's cache
    decoder: tuple  # the decoder's cache, [layers, B, H, S, C]
    tokens: Array  # [B, G, K * P]
    latents: Array  # [B, G, K, D]
    seen: Array  # [B, V], tokens generated so far
    done: Array  # [B]
    choice: choose.Choice | None = None  # of each sequence; None: the plan's
    before: Before | None = None  # of each sequence, what stands before it; None: what the variables say


def prepare(model: ColaDLM, params: Params) -> tuple[ColaDLM, Params]:
    """Model and parameters as the programs below want them: on a CPU, with the DiT's layers apart."""
    if jax.default_backend() != "cpu" or not model.stacked:
        return model, params
    return model.clone(stacked=False), _unstack(params, model.dit_config.num_layers)


_unstack = jax.jit(dit.unstack, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def tabulate(plan: Plan, params: Params) -> Precomputed:
    """The parameters with the modulations of the plan's times."""
    if not plan.settings.on_grid:
        return Precomputed(params, None)
    return Precomputed(params, plan.model.apply(params, jnp.asarray(plan.times), method="modulations"))


def _following(params: Params, before: Before | None) -> Params:
    """The variables for a batch that has something before its sequences, or has not."""
    return params if before is None else with_before(params, before)


@functools.partial(jax.jit, static_argnums=0)
def start(
    plan: Plan,
    params: Params,
    layout: Layout,
    keys: Key,
    choice: choose.Choice | None = None,
    before: Before | None = None,
) -> State:
    """The sequences' known latents, and caches that hold their history."""
    model, config, params = plan.model, plan.model.dit_config, _following(params, before)
    batch, block = layout.tokens.shape[0], config.block_size
    posterior = model.apply(params, layout.tokens, layout.visible.astype(jnp.int32), method="encode")
    data = model.normalize(posterior.mean)
    prior, decoder = model.apply(params, data, layout.visible.astype(jnp.int32), method="prefill")
    room = _room(plan, data.shape[1])
    last = (layout.first[:, None] - 1) * block + jnp.arange(block)[None]
    return State(
        layout=layout,
        data=data,
        keys=keys,
        block=jnp.zeros(batch, jnp.int32),
        previous=caches.rows_at(data, jnp.clip(last, 0, data.shape[1] - 1)),
        prior=caches.grow(prior, room),
        decoder=caches.grow(decoder, room),
        tokens=jnp.zeros((batch, plan.blocks, block * model.vae_config.patch_size), jnp.int32),
        latents=jnp.zeros((batch, plan.blocks, block, config.latent_dim)),
        seen=jnp.zeros((batch, model.vae_config.vocab_size), bool),
        done=jnp.zeros(batch, bool),
        choice=choice,
        before=before,
    )


def _room(plan: Plan, width: int) -> int:
    """Latents that the caches hold behind a layout of ``width`` latents."""
    return plan.blocks * plan.model.dit_config.block_size if plan.capacity is None else plan.capacity - width


def _next_block(plan: Plan, state: State) -> NextBlock:
    block, width = plan.model.dit_config.block_size, state.data.shape[1]
    positions = (state.layout.first + state.block)[:, None] * block + jnp.arange(block)[None]
    inside = jnp.minimum(positions, width - 1)
    attended = jnp.pad(state.layout.attended, ((0, 0), (0, _room(plan, width))), constant_values=True)
    return NextBlock(
        positions=positions,
        known=caches.rows_at(state.layout.known, inside) & (positions < width),
        data=caches.rows_at(state.data, inside),
        previous=state.previous,
        cache_mask=attended & (jnp.arange(attended.shape[1])[None] < positions[:, :1]),
        keys=rng.fold_in(state.keys, state.block),
    )


def _streams(keys: Key) -> tuple[Key, Key]:
    """Keys of a block's noise and of its tokens, from those of the block [B]."""
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]


def _latents(plan: Plan, precomputed: Precomputed, block: NextBlock, noise, cache, first: bool, estimates: bool):
    """What the prior makes of a block's noise: (latents, cache, estimates at every step or None)."""
    settings = plan.settings
    noised = transport.noised(plan.path, block.data, noise, plan.times[0])
    if settings.prior == "flow" and first and settings.conditioning == "repaint":
        return *repaint.repaint(plan, precomputed, block, noised, cache), None
    z = jnp.where(block.known[..., None], block.data, noised)
    if settings.prior == "flow":
        return transport.carry(plan, precomputed, block, z, cache, estimates)
    return z, cache, None


def _decoded(decode, guesses, wanted):
    """The most likely tokens of every guess at a block; where ``wanted`` is traced and False, zeros."""

    def all_of_them(guesses):
        return jax.lax.map(lambda guess: jnp.argmax(decode(guess), axis=-1).astype(jnp.int32), guesses)

    if isinstance(wanted, bool):
        return all_of_them(guesses)
    shape = jax.eval_shape(all_of_them, guesses).shape
    return jax.lax.cond(wanted, all_of_them, lambda _: jnp.zeros(shape, jnp.int32), guesses)


def advance(
    plan: Plan, precomputed: Precomputed, state: State, noise=None, first: bool = False, estimates: bool | Array = False
):
    """Generates the next block of every sequence that is not done.

    Args:
      noise: [B, G, K, D] in place of the keys'.
      first: all sequences are at their first block (only "repaint" needs to know).
      estimates: also decode what each step makes of the block; traced, the program can do either (zeros where not).

    Returns:
      The new state, and the estimates [steps, B, K * P], or None.
    """
    model, choice = plan.model, choose.choice_of(plan.settings, state.choice)
    size, patch = model.dit_config.block_size, model.vae_config.patch_size
    batch, per_block = state.done.shape[0], size * patch
    precomputed = precomputed._replace(params=_following(precomputed.params, state.before))
    rows = jnp.arange(batch)
    block = _next_block(plan, state)
    noise_keys, token_keys = _streams(block.keys)
    if noise is None:
        z = rng.normal(noise_keys, state.previous.shape[1:])
    else:
        z = noise[rows, jnp.minimum(state.block, noise.shape[1] - 1)]
    wanted = estimates if isinstance(estimates, bool) else True
    z, cache, guesses = _latents(plan, precomputed, block, z, state.prior, first, wanted)
    decode = functools.partial(model.apply, precomputed.params, method="decode_next")
    logits, kv = decode(z, state.decoder, block.cache_mask, block.positions)
    tokens = choose.next_tokens(logits, state.seen, token_keys, choice)
    if guesses is not None:
        guesses = _decoded(lambda g: decode(g, state.decoder, block.cache_mask, block.positions)[0], guesses, estimates)

    index = block.positions[:, :1] * patch + jnp.arange(per_block)[None]
    new = (index >= state.layout.begin[:, None]) & (index < state.layout.end[:, None])
    ended = jnp.any(new & choose.is_end(tokens, choice), axis=1)
    # A sequence that is done stays where it is: its last block is only computed again.
    at = jnp.minimum(state.block, plan.blocks - 1)

    def keep(now, before):
        return jnp.where(state.done.reshape(-1, *[1] * (now.ndim - 1)), before, now)

    return State(
        layout=state.layout,
        data=state.data,
        keys=state.keys,
        choice=state.choice,
        before=state.before,
        block=state.block + ~state.done,
        previous=keep(z, state.previous),
        prior=cache,
        decoder=caches.commit(state.decoder, kv, block.positions[:, 0]),
        tokens=keep(state.tokens.at[rows, at].set(tokens), state.tokens),
        latents=keep(state.latents.at[rows, at].set(z), state.latents),
        seen=keep(state.seen.at[rows[:, None], tokens].max(new), state.seen),
        done=state.done | ended | (index[:, -1] + 1 >= state.layout.end),
    ), guesses


advance_once = jax.jit(advance, static_argnums=0, static_argnames=("first", "estimates"), donate_argnums=2)


def begin(
    plan: Plan,
    precomputed: Precomputed,
    layout: Layout,
    keys: Key,
    choice: choose.Choice | None = None,
    before: Before | None = None,
) -> State:
    """`start`, and with "repaint" the first block too, which needs a program of its own."""
    state = start(plan, precomputed.params, layout, keys, choice, before)
    if plan.settings.conditioning == "repaint":
        state, _ = advance_once(plan, precomputed, state, first=True)
    return state


@functools.partial(jax.jit, static_argnums=0)
def run(plan: Plan, params: Params, layout: Layout, keys: Key, noise=None) -> Generation:
    """The whole generation in one program."""
    precomputed, state = tabulate(plan, params), start(plan, params, layout, keys)
    if plan.settings.conditioning == "repaint":
        state, _ = advance(plan, precomputed, state, noise, first=True)

    def going(state: State):
        return jnp.any(~state.done & (state.block < plan.blocks))

    state = jax.lax.while_loop(going, lambda state: advance(plan, precomputed, state, noise)[0], state)
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
    ends = choose.is_end(new, choose.choice_of(settings, state.choice))
    inside = inside & (jnp.cumsum(ends, axis=1) == 0)
    return Generation(jnp.where(inside, new, settings.pad_id or 0), jnp.sum(inside, axis=1), state.latents)
