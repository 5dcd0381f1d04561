"""Block-wise generation with explicit caches (3.19-3.21, SPEC 5).

A prompt is encoded with the posterior mean; its complete blocks fill the caches of prior and decoder. Each
further block is noise that the guided flow carries to a latent, is decoded, and is committed to both caches.
Positions of the first block that the prompt already fills stay pinned to their latents at time 0 ("clean"
conditioning). Every sequence keeps its own position, so that a batch may mix prompts of all lengths.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cola_jax.flow import solve
from cola_jax.models.cola import ColaDLM
from cola_jax.sampling import choose
from cola_jax.types import Key, Params, UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
      steps: Euler steps a block.
      guidance_scale: s of ``v_uncond + s (v_cond - v_uncond)``; 1 is no guidance. A block without history is
        not guided.
      max_new_tokens: budget of new tokens; the prompt does not count.
      temperature: 0 takes the most likely token of each position.
      repetition_penalty: 1 is none; over tokens that earlier blocks generated.
      eos_id: a sequence ends before its first such token; None: it never ends early.
      pad_id: None: padding of a prompt's last block is masked. An id: the padding is that token and visible
        to the encoder, as in the released code.
      context: most tokens of prompt and output together; None: no limit.
      prior: "flow" (the DiT), or "normal": latents are the noise itself, what the decoder makes of no prior.
    """

    steps: int = 16
    guidance_scale: float = 7.0
    max_new_tokens: int = 32
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    eos_id: int | None = None
    pad_id: int | None = None
    context: int | None = None
    prior: str = "flow"

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        checks = {
            "steps": (self.steps >= 1, "at least 1"),
            "guidance_scale": (self.guidance_scale >= 0, "at least 0"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "repetition_penalty": (self.repetition_penalty > 0, "a positive number"),
            "prior": (self.prior in ("flow", "normal"), "'flow' or 'normal'"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise UserError(f"sampling {name} = {getattr(self, name)!r}: allowed is {allowed}")


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: new tokens only; 0 (or ``pad_id``) behind the end of a sequence.
      lengths: new tokens before the end of text.
      latents: latents of the generated blocks, normalised; in the first block with what the prompt filled.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, " B"]
    latents: Float[Array, "B G K D"]


class _Prompts(NamedTuple):
    """Prompts as arrays, in whole blocks of K latents."""

    tokens: Array  # [B, T]
    segment_ids: Array  # [B, N]; 0: padding
    blocks: Array  # [B], complete blocks
    tail: Array  # [B], tokens beyond them


class _State(NamedTuple):
    block: Array
    caches: tuple  # ((k, v) of the DiT, (k, v) of the decoder), each [layers, B, S, H, C]
    tokens: Array  # [B, G, K * P]
    latents: Array  # [B, G, K, D]
    seen: Array  # [B, V], tokens generated so far
    done: Array  # [B]


def generate(
    model: ColaDLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    key: Key | None = None,
    noise: Float[Array, "B G K D"] | None = None,
    sample_ids: Sequence[int] | None = None,
) -> Generation:
    """Continues each prompt. A sample depends on (key, its id) alone, not on the rest of its batch.

    Args:
      model: the Cola DLM.
      params: its variables.
      prompts: token ids; an empty prompt generates from nothing.
      settings: see `Settings`.
      key: source of noise and token draws; may be None with ``noise`` and temperature 0.
      noise: the noise of every block, in place of the key's. Fewer blocks than the budget needs end the output.
      sample_ids: identity of each sample in the random stream; its index by default.

    Returns:
      A `Generation` with L = max_new_tokens (fewer if ``noise`` ends earlier).

    Raises:
      UserError: a setting or prompt that cannot be used.
    """
    settings.validate()
    packed = _pack(model, prompts, settings)
    per_block = model.dit_config.block_size * model.vae_config.patch_size
    count = len(prompts)
    blocks = -(-(per_block - 1 + settings.max_new_tokens) // per_block)  # whatever the prompts' tails
    if sample_ids is not None and len(sample_ids) != count:
        raise UserError(f"sampling sample_ids: {len(sample_ids)} given, allowed is one for each of {count} prompts")
    if noise is not None:
        size = (model.dit_config.block_size, model.dit_config.latent_dim)
        if noise.shape[0] != count or noise.shape[2:] != size:
            raise UserError(
                f"sampling noise has shape {noise.shape}: allowed is ({count}, blocks, {size[0]}, {size[1]})"
            )
        blocks = min(blocks, noise.shape[1])
    if key is None:
        if noise is None or settings.temperature:
            raise UserError("sampling key = None: allowed only with explicit noise and temperature 0")
        key = jax.random.key(0)
    ids = jnp.arange(count) if sample_ids is None else jnp.asarray(sample_ids)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    return _generate(model, settings, blocks, params, packed, keys, noise)


def generate_batches(
    model: ColaDLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    key: Key,
    batch_size: int = 64,
) -> Iterator[tuple[int, list[int]]]:
    """Continuations of any number of prompts, as they come: (index of the prompt, its new tokens).

    All prompts are checked before the first is generated.

    Args:
      batch_size: prompts generated at a time; it does not change the result.
    """
    settings.validate()
    if batch_size < 1:
        raise UserError(f"sampling batch_size = {batch_size}: allowed is at least 1")
    _check_prompts(model, prompts, settings)
    size = min(batch_size, len(prompts))
    for start in range(0, len(prompts), size):
        chunk = list(prompts[start : start + size])
        # The last batch is filled up, so that it does not need a program of its own.
        filled = chunk + [chunk[-1]] * (size - len(chunk))
        out = generate(model, params, filled, settings, key, sample_ids=range(start, start + size))
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        for row in range(len(chunk)):
            yield start + row, tokens[row, : lengths[row]].tolist()


def _check_prompts(model: ColaDLM, prompts: Sequence[Sequence[int]], settings: Settings) -> None:
    patch, vocabulary = model.vae_config.patch_size, model.vae_config.vocab_size
    if not len(prompts):
        raise UserError("prompts: none given; at least one is needed")
    for index, prompt in enumerate(prompts):
        if len(prompt) % patch:
            raise UserError(f"prompt {index} has {len(prompt)} tokens: allowed is a multiple of the patch size {patch}")
        if settings.context is not None and len(prompt) + settings.max_new_tokens > settings.context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens: allowed are at most {settings.context} (context) "
                f"minus {settings.max_new_tokens} (max_new_tokens)"
            )
        if len(prompt) and not (0 <= min(prompt) and max(prompt) < vocabulary):
            raise UserError(f"prompt {index} has a token outside the vocabulary of {vocabulary}")


def _pack(model: ColaDLM, prompts: Sequence[Sequence[int]], settings: Settings) -> _Prompts:
    """Prompts padded to a common number of blocks, a power of two so that few programs are compiled."""
    patch, block = model.vae_config.patch_size, model.dit_config.block_size
    per_block = patch * block
    _check_prompts(model, prompts, settings)
    lengths = np.array([len(p) for p in prompts])
    needed = -(-max(int(lengths.max()), 1) // per_block)
    width = per_block * 2 ** (needed - 1).bit_length()
    tokens = np.full((len(prompts), width), settings.pad_id or 0, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    visible = lengths if settings.pad_id is None else -(-lengths // per_block) * per_block
    segments = (np.arange(width // patch)[None] < (visible // patch)[:, None]).astype(np.int32)
    return _Prompts(tokens, segments, (lengths // per_block).astype(np.int32), (lengths % per_block).astype(np.int32))


def _write(cache: Array, new: Array, start: Array) -> Array:
    """``new`` [layers, B, n, H, C] into ``cache`` at each sequence's own ``start`` [B]."""
    return jax.vmap(
        lambda c, n, s: jax.lax.dynamic_update_slice_in_dim(c, n, s, axis=1), in_axes=(1, 1, 0), out_axes=1
    )(cache, new, start)


def _start(model: ColaDLM, params: Params, prompts: _Prompts, blocks: int) -> tuple[Array, _State]:
    """The prompts' latents, and a state whose caches hold them."""
    block, channels = model.dit_config.block_size, model.dit_config.latent_dim
    per_block = block * model.vae_config.patch_size
    batch = prompts.tokens.shape[0]
    posterior = model.apply(params, prompts.tokens, prompts.segment_ids, method="encode")
    latents = model.normalize(posterior.mean)
    caches = model.apply(params, latents, prompts.segment_ids, method="prefill")
    room = ((0, 0), (0, 0), (0, blocks * block), (0, 0), (0, 0))
    state = _State(
        block=jnp.int32(0),
        caches=jax.tree.map(lambda x: jnp.pad(x, room), caches),
        tokens=jnp.zeros((batch, blocks, per_block), jnp.int32),
        latents=jnp.zeros((batch, blocks, block, channels)),
        seen=jnp.zeros((batch, model.vae_config.vocab_size), bool),
        done=jnp.zeros((batch,), bool),
    )
    return latents, state


def _transport(model, params, settings: Settings, noise, known, data, positions, cache, cache_mask):
    """One block from noise to latents under the guided flow; ``known`` positions stay at ``data``."""
    if settings.prior == "normal":
        return jnp.where(known, data, noise)
    batch = noise.shape[0]
    nothing = jax.tree.map(lambda x: x[:, :, :0], cache)
    alone = jnp.ones((batch,), bool)
    guided = (positions[:, 0] > 0)[:, None, None]  # without a history both branches coincide

    def velocity(z, t):
        t = jnp.full((batch, 1), t)
        pinned = known[..., 0]
        v, _ = model.apply(params, z, t, positions, cache, cache_mask, pinned=pinned, method="extend")
        if settings.guidance_scale != 1.0:
            free, _ = model.apply(
                params, z, t, positions, nothing, cache_mask[:, :0], pinned=pinned, drop_history=alone, method="extend"
            )
            v = jnp.where(guided, free + settings.guidance_scale * (v - free), v)
        return jnp.where(known, 0.0, v)

    return solve.euler(velocity, jnp.where(known, data, noise), solve.time_grid(settings.steps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model: ColaDLM, settings: Settings, blocks: int, params, prompts: _Prompts, keys, noise) -> Generation:
    block, patch = model.dit_config.block_size, model.vae_config.patch_size
    per_block, batch = block * patch, prompts.tokens.shape[0]
    prompt_latents, state = _start(model, params, prompts, blocks)
    rows = jnp.arange(batch)[:, None]

    def body(state: _State) -> _State:
        start = (prompts.blocks + state.block) * block
        positions = start[:, None] + jnp.arange(block)[None]
        in_prompt = jnp.minimum(positions, prompt_latents.shape[1] - 1)
        is_first = state.block == 0
        known = is_first & (jnp.arange(block)[None] < (prompts.tail // patch)[:, None])
        data = prompt_latents[rows, in_prompt]
        draw = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, state.block)))(keys)
        if noise is None:
            z1 = jax.vmap(lambda k: jax.random.normal(k, (block, model.dit_config.latent_dim)))(draw[:, 0])
        else:
            z1 = jax.lax.dynamic_index_in_dim(noise, state.block, axis=1, keepdims=False)
        cache, decoder_cache = state.caches
        cache_mask = jnp.arange(cache[0].shape[2])[None] < start[:, None]
        z = _transport(model, params, settings, z1, known[..., None], data, positions, cache, cache_mask)

        _, kv = model.apply(params, z, jnp.zeros((batch, 1)), positions, cache, cache_mask, method="extend")
        logits, decoder_kv = model.apply(params, z, decoder_cache, cache_mask, positions, method="decode_next")
        logits = choose.penalize_repetition(logits, state.seen, settings.repetition_penalty)
        tokens = choose.choose(logits, draw[:, 1], settings.temperature)

        index = state.block * per_block + jnp.arange(per_block)[None]
        new = (index >= prompts.tail[:, None]) & (index < (prompts.tail + settings.max_new_tokens)[:, None])
        ended = jnp.zeros_like(state.done)
        if settings.eos_id is not None:
            ended = jnp.any(new & (tokens == settings.eos_id), axis=1)
        full = (state.block + 1) * per_block >= prompts.tail + settings.max_new_tokens
        return _State(
            block=state.block + 1,
            caches=jax.tree.map(lambda c, n: _write(c, n, start), state.caches, (kv, decoder_kv)),
            tokens=state.tokens.at[:, state.block].set(tokens),
            latents=state.latents.at[:, state.block].set(z),
            seen=state.seen.at[rows, tokens].max(new),
            done=state.done | ended | full,
        )

    state = jax.lax.while_loop(lambda s: (s.block < blocks) & ~jnp.all(s.done), body, state)
    return _cut(settings, prompts, state.tokens.reshape(batch, -1), state)


def _cut(settings: Settings, prompts: _Prompts, tokens: Array, state: _State) -> Generation:
    """New tokens only, up to the budget and the end of text."""
    available = tokens.shape[1] - prompts.tail  # a sequence with a tail has fewer new positions in its blocks
    length = min(settings.max_new_tokens, tokens.shape[1])
    index = jnp.arange(length)[None]
    new = jnp.take_along_axis(tokens, jnp.minimum(prompts.tail[:, None] + index, tokens.shape[1] - 1), axis=1)
    inside = index < jnp.minimum(available, settings.max_new_tokens)[:, None]
    if settings.eos_id is not None:
        inside = inside & (jnp.cumsum(new == settings.eos_id, axis=1) == 0)
    return Generation(jnp.where(inside, new, settings.pad_id or 0), jnp.sum(inside, axis=1), state.latents)
