"""Text from LLaDA: masked tokens are predicted all at once, and some of the predictions kept, again and again.

The new tokens are divided into blocks that are written one after another, each in a number of passes over the whole
row; one block is LLaDA's pure diffusion, several are its semi-autoregressive sampling. A row is a prompt and as many
masks as tokens shall be new (SPEC 7: denoising length = generation length), for a gap also what stands behind it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from cola_jax import rng, sampling
from cola_jax.fields import check, like, setting
from cola_jax.models.llada import LLaDA
from cola_jax.sampling import autoregressive, choose, token_rows
from cola_jax.sampling.token_rows import Generation, Ids, Piece
from cola_jax.types import Key, Params, UserError

REMASKING = ("low_confidence", "random")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate."""

    max_new_tokens: int = like(sampling.Settings, "max_new_tokens")
    steps: int = setting(0, "passes for all new tokens together; 0: one for each", at_least=0)
    block_length: int = setting(0, "new tokens that are written together; 0: all of them", at_least=0)
    remasking: str = setting(
        "low_confidence", "which predictions a pass keeps: the most probable ones, or random ones", choices=REMASKING
    )
    temperature: float = like(sampling.Settings, "temperature")
    top_k: int = like(sampling.Settings, "top_k")
    top_p: float = like(sampling.Settings, "top_p")
    repetition_penalty: float = like(sampling.Settings, "repetition_penalty")
    guidance_scale: float = setting(1.0, "s of u + s (c - u), where u has not read the prompt; 1: none", at_least=0)
    eos_id: int | None = like(sampling.Settings, "eos_id")
    pad_id: int | None = like(autoregressive.Settings, "pad_id")
    context: int | None = like(autoregressive.Settings, "context")

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check(self, "sampling ")

    @property
    def block(self) -> int:
        """New tokens of a block."""
        return min(self.block_length or self.max_new_tokens, self.max_new_tokens)

    @property
    def blocks(self) -> int:
        """How many blocks the new tokens have; the last one may be shorter."""
        return -(-self.max_new_tokens // self.block)

    @property
    def kept(self) -> tuple[int, ...]:
        """How many predictions each pass over a block keeps: equally many, the first ones one more (LLaDA)."""
        passes = min(self.block, max(1, (self.steps or self.max_new_tokens) // self.blocks))
        return tuple(self.block // passes + (i < self.block % passes) for i in range(passes))


class Plan(NamedTuple):
    """What a program is compiled for."""

    model: LLaDA
    settings: Settings


class Rows(NamedTuple):
    """What is known of B texts: W tokens each, from the start of a row."""

    tokens: np.ndarray | jax.Array  # [B, W]; what is to be written is arbitrary
    begin: np.ndarray | jax.Array  # [B], where the new tokens begin
    count: np.ndarray | jax.Array  # [B], how many they are, at most max_new_tokens
    length: np.ndarray | jax.Array  # [B], of the whole text


class State(NamedTuple):
    """Texts on their way; every leaf begins with the batch."""

    rows: Rows
    keys: Array  # [B]
    masked: Array  # [B, W]
    done: Array  # [B], whether a written block has an end of text


def _start(plan: Plan, rows: Rows, keys: Key) -> State:
    index = jnp.arange(rows.tokens.shape[1])[None]
    begin, end = rows.begin[:, None], (rows.begin + rows.count)[:, None]
    masked = (index >= begin) & (index < end)
    return State(rows, keys, masked, jnp.zeros(len(rows.tokens), bool))


def _advance(plan: Plan, params: Params, state: State, block: Array) -> State:
    """Writes a block of every text that is not done."""
    settings, rows = plan.settings, state.rows
    place = block * settings.block + jnp.arange(settings.block)[None]
    inside = (place < rows.count[:, None]) & ~state.done[:, None]
    positions = jnp.minimum(rows.begin[:, None] + place, rows.tokens.shape[1] - 1)
    kept = jnp.asarray(settings.kept)

    def one(number, carry):
        tokens, masked = carry
        logits = _predict(plan, params, rows._replace(tokens=tokens), masked, positions)
        if settings.repetition_penalty != 1.0:
            written = _seen(plan, rows._replace(tokens=tokens), masked)
            logits = choose.penalize_repetition(logits, written, settings.repetition_penalty)
        keys = rng.fold_in(rng.fold_in(state.keys, block), number)
        chosen = choose.choose(logits, rng.fold_in(keys, 0), settings.temperature, settings.top_k, settings.top_p)
        if settings.remasking == "random":
            score = rng.uniform(rng.fold_in(keys, 1), (settings.block,))
        else:
            score = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[..., None], axis=-1)[..., 0]
        open_ = jnp.take_along_axis(masked, positions, axis=1) & inside
        # The best of what is open; the order of equal scores is that of the positions.
        rank = jnp.argsort(jnp.argsort(jnp.where(open_, -score, jnp.inf), axis=1), axis=1)
        keep = open_ & (rank < kept[number])
        # Positions that are not kept are written outside of the row, which drops them.
        target = jnp.where(keep, positions, tokens.shape[1])
        row = jnp.arange(len(tokens))[:, None]
        return tokens.at[row, target].set(chosen, mode="drop"), masked.at[row, target].set(False, mode="drop")

    tokens, masked = jax.lax.fori_loop(0, len(settings.kept), one, (rows.tokens, state.masked))
    done = state.done
    if settings.eos_id is not None:
        written = jnp.take_along_axis(tokens, positions, axis=1)
        done = done | jnp.any((written == settings.eos_id) & inside, axis=1)
    return State(rows._replace(tokens=tokens), state.keys, masked, done)


def _predict(plan: Plan, params: Params, rows: Rows, masked: Array, positions: Array) -> Array:
    """Logits [B, S, V] of the tokens at positions, guided."""
    index, scale = jnp.arange(rows.tokens.shape[1])[None], plan.settings.guidance_scale
    segments = (index < rows.length[:, None]).astype(jnp.int32)

    def logits(tokens, masked, segments, positions):
        return plan.model.apply(params, tokens, masked, segments, positions, method="logits")

    if scale == 1.0:
        return logits(rows.tokens, masked, segments, positions)
    given = masked | (index < rows.begin[:, None])  # without the prompt, too
    both = (jnp.concatenate(pair) for pair in ((rows.tokens,) * 2, (masked, given), (segments,) * 2, (positions,) * 2))
    conditional, unconditional = jnp.split(logits(*both), 2)
    return unconditional + scale * (conditional - unconditional)


def _new(plan: Plan, rows: Rows, masked: Array) -> tuple[Array, Array]:
    """The new tokens [B, L], and which of them are written."""
    index = jnp.arange(plan.settings.max_new_tokens)[None]
    positions = jnp.minimum(rows.begin[:, None] + index, rows.tokens.shape[1] - 1)
    new, open_ = (jnp.take_along_axis(x, positions, axis=1) for x in (rows.tokens, masked))
    return new, (index < rows.count[:, None]) & ~open_


def _seen(plan: Plan, rows: Rows, masked: Array) -> Array:
    """Which tokens of the vocabulary are written, [B, V]."""
    new, written = _new(plan, rows, masked)
    vocabulary = plan.model.config.vocab_size
    seen = jnp.zeros((len(new), vocabulary), bool)
    return seen.at[jnp.arange(len(new))[:, None], jnp.where(written, new, vocabulary)].set(True, mode="drop")


def _cut(plan: Plan, state: State) -> Generation:
    """The new tokens up to the end of text."""
    (new, written), settings = _new(plan, state.rows, state.masked), plan.settings
    ends = None if settings.eos_id is None else new == settings.eos_id
    return token_rows.cut(new, written, ends, settings.pad_id)


start = jax.jit(_start, static_argnums=0)
advance = jax.jit(_advance, static_argnums=0, donate_argnums=2)
cut = jax.jit(_cut, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def run(plan: Plan, params: Params, rows: Rows, keys: Key) -> Generation:
    """The whole generation in one program."""

    def going(carry):
        block, state = carry
        return (block < plan.settings.blocks) & ~jnp.all(state.done)

    def step(carry):
        block, state = carry
        return block + 1, _advance(plan, params, state, block)

    return _cut(plan, jax.lax.while_loop(going, step, (jnp.int32(0), _start(plan, rows, keys)))[1])


def _keys(key: Key | None, settings: Settings, count: int, sample_ids) -> Key:
    drawn = f"temperature = {settings.temperature}" if settings.temperature else ""
    drawn = drawn or ("remasking = 'random'" if settings.remasking == "random" else "")
    return token_rows.keys_for(key, drawn, count, sample_ids)


def _rows(prompts: Sequence[Ids], width: int, new: int) -> Rows:
    """Prompts with masks behind them."""
    found = token_rows.stack(prompts, width)
    count = np.full(len(prompts), new, np.int32)
    tokens = np.pad(found.tokens, ((0, 0), (0, new)))
    return Rows(tokens, found.lengths, count, found.lengths + count)


def generate(
    model: LLaDA,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key | None = None,
    sample_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continues each prompt. A sample depends on (key, its id) alone, not on the rest of its batch.

    Args:
      model: the LLaDA model.
      params: its variables.
      prompts: token ids; an empty prompt generates from nothing.
      settings: see `Settings`.
      key: source of the draws; may be None where nothing is drawn.
      sample_ids: identity of each sample in the random stream; its index by default.
      mesh: as of `sampling.autoregressive.generate`.

    Returns:
      A `Generation` with L = max_new_tokens.

    Raises:
      UserError: a setting or prompt that cannot be used.
    """
    token_rows.check_prompts(model.config.vocab_size, prompts, settings)
    width = token_rows.width_for(prompts, settings)
    return _generate(model, params, prompts, settings, key, sample_ids, mesh, width)


def _generate(model, params, prompts, settings, key, sample_ids, mesh, width: int) -> Generation:
    rows = _rows(prompts, width, settings.max_new_tokens)
    keys = _keys(key, settings, len(prompts), sample_ids)
    return token_rows.run(functools.partial(run, Plan(model, settings), params), rows, keys, mesh)


def generate_batches(
    model: LLaDA,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key | None = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continuations of any number of prompts, in order; see `sampling.autoregressive.generate_batches`."""
    token_rows.check_batch_size(batch_size)
    token_rows.check_prompts(model.config.vocab_size, prompts, settings)
    size = batch_size if mesh is not None else min(batch_size, len(prompts))
    width = token_rows.width_for(prompts, settings)

    def whole(some, sample_ids):
        return _generate(model, params, some, settings, key, sample_ids, mesh, width)

    return token_rows.batches(whole, prompts, size)


def stream(
    model: LLaDA,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key | None = None,
    sample_ids: Sequence[int] | None = None,
) -> Iterator[Piece]:
    """`generate`, block by block: yields a `Piece` as soon as each is written.

    Raises:
      UserError: as `generate`, before the first block.
    """
    token_rows.check_prompts(model.config.vocab_size, prompts, settings)
    rows = _rows(prompts, token_rows.width_for(prompts, settings), settings.max_new_tokens)
    return _stream(Plan(model, settings), params, rows, _keys(key, settings, len(prompts), sample_ids))


def _stream(plan: Plan, params: Params, rows: Rows, keys: Key) -> Iterator[Piece]:
    state, sent = start(plan, rows, keys), np.zeros(len(keys), int)
    for block in range(plan.settings.blocks):
        state = advance(plan, params, state, jnp.int32(block))
        out = cut(plan, state)
        lengths = np.asarray(out.lengths)
        yield Piece([row[a:b].tolist() for row, a, b in zip(np.asarray(out.tokens), sent, lengths, strict=True)])
        sent = lengths
        if np.all(state.done):
            return


def infill(
    model: LLaDA,
    params: Params,
    texts: Sequence[tuple[Ids, int, Ids]],
    settings: Settings,
    key: Key | None = None,
    sample_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Fills the gap of each text: (tokens before, length of the gap, tokens after), given both sides.

    Args:
      texts: either side may be empty.
      settings: ``max_new_tokens`` is replaced by the longest gap, ``eos_id`` by None.
      model, params, key, sample_ids, mesh: as in `generate`.

    Returns:
      A `Generation` whose tokens are those of the gaps, L the longest.

    Raises:
      UserError: a setting or text that cannot be used.
    """
    settings.validate()
    if not len(texts):
        raise UserError("texts: none given; at least one is needed")
    for index, (before, length, after) in enumerate(texts):
        if length < 1:
            raise UserError(f"text {index} has a gap of length {length}: must be at least 1")
        total = len(before) + length + len(after)
        if settings.context is not None and total > settings.context:
            raise UserError(f"text {index} has {total} tokens: must be at most {settings.context} (context)")
        token_rows.check_ids(model.config.vocab_size, [*before, *after], f"text {index}")
    new = max(length for _, length, _ in texts)
    settings = dataclasses.replace(settings, max_new_tokens=new, eos_id=None)
    whole = [[*before, *[0] * length, *after] for before, length, after in texts]
    found = token_rows.stack(whole, token_rows.width_for(whole, dataclasses.replace(settings, context=None)))
    begin = np.array([len(before) for before, _, _ in texts], np.int32)
    count = np.array([length for _, length, _ in texts], np.int32)
    rows = Rows(found.tokens, begin, count, found.lengths)
    keys = _keys(key, settings, len(texts), sample_ids)
    return token_rows.run(functools.partial(run, Plan(model, settings), params), rows, keys, mesh)
