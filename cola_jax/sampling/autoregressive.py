"""Text from the autoregressive model: one token at a time against a cache of keys and values.

Prompts stand at the start of their rows, so that a token's place in the cache is its position, and a batch may mix
prompts of all lengths. What is drawn is a pure function of (key, sample id, position): a sample depends neither on its
batch nor on its place there, nor on how much of its text was the prompt.
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
from cola_jax.models.autoregressive import Autoregressive
from cola_jax.sampling import cache as caches
from cola_jax.sampling import choose, token_rows
from cola_jax.sampling.token_rows import Generation, Ids, Piece, Prompts
from cola_jax.types import Key, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate."""

    max_new_tokens: int = like(sampling.Settings, "max_new_tokens")
    temperature: float = like(sampling.Settings, "temperature")
    top_k: int = like(sampling.Settings, "top_k")
    top_p: float = like(sampling.Settings, "top_p")
    repetition_penalty: float = like(sampling.Settings, "repetition_penalty")
    eos_id: int | None = like(sampling.Settings, "eos_id")
    pad_id: int | None = setting(None, "what stands behind the end of a sequence; None: 0", at_least=0, flag=False)
    context: int | None = setting(
        None,
        "most tokens of prompt and output together; one program serves prompts of all lengths. None: no limit, and "
        "one program for each power of two of the prompts' width",
        at_least=1,
        flag=False,
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check(self, "sampling ")


class Plan(NamedTuple):
    """What a program is compiled for.

    ``likeliest`` is of how many most likely tokens log-probabilities are kept for each new one, None: of none at all.
    """

    model: Autoregressive
    settings: Settings
    likeliest: int | None = None


class LogProbs(NamedTuple):
    """log p of each new token given those before it, by the model itself: no temperature, penalty or truncation.

    Attributes:
      chosen: of the token that was drawn.
      ids, values: the most likely tokens and theirs, descending.
    """

    chosen: Array  # [B, L]
    ids: Array  # [B, L, C]
    values: Array  # [B, L, C]


class State(NamedTuple):
    """A batch of sequences on their way. Every leaf but the cache begins with the batch."""

    keys: Array  # [B]
    cache: tuple  # keys and values, [layers, B, W + L, H, C]
    position: Array  # [B], of the next token
    before: Array  # [B], the token before it
    tokens: Array  # [B, L], generated so far
    count: Array  # [B], how many those are, the end of text included
    seen: Array  # [B, V], whether a token was generated
    done: Array  # [B]
    budget: Array  # [B], most new tokens
    choice: choose.Choice | None = None  # of each sequence; None: the plan's
    log_probs: LogProbs | None = None


def begin(plan: Plan, cache: tuple, prompts: Prompts, keys: Key) -> State:
    """The state of sequences whose prompts are in the cache, but for their last tokens: the next place reads those."""
    batch, vocabulary = prompts.lengths.shape[0], plan.model.config.vocab_size
    room, kept = plan.settings.max_new_tokens, plan.likeliest
    log_probs = None
    if kept is not None:
        found = (jnp.zeros((batch, room, kept), dtype) for dtype in (jnp.int32, jnp.float32))
        log_probs = LogProbs(jnp.zeros((batch, room)), *found)
    last = jnp.take_along_axis(prompts.tokens, jnp.maximum(prompts.lengths - 1, 0)[:, None], axis=1)[:, 0]
    return State(
        keys=keys,
        cache=cache,
        position=prompts.lengths,
        before=jnp.where(prompts.lengths > 0, last, vocabulary),
        tokens=jnp.zeros((batch, room), jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros((batch, vocabulary), bool),
        done=jnp.zeros(batch, bool),
        budget=jnp.full(batch, room, jnp.int32),
        log_probs=log_probs,
    )


def _start(plan: Plan, params: Params, prompts: Prompts, keys: Key) -> State:
    """The sequences at their beginning: the prompts are read, and the cache has room for what follows."""
    real = (jnp.arange(prompts.tokens.shape[1])[None] < prompts.lengths[:, None]).astype(jnp.int32)
    cache = plan.model.apply(params, prompts.tokens, real, method="prefill")
    return begin(plan, caches.grow(cache, plan.settings.max_new_tokens), prompts, keys)


def _noted(noted: LogProbs, logits, token, rows, place) -> LogProbs:
    """``noted`` with the log-probabilities of one more token of every sequence."""
    found = jax.nn.log_softmax(logits, axis=-1)
    values, ids = jax.lax.top_k(found, noted.ids.shape[2])
    new = LogProbs(found[rows, token], ids, values)
    return jax.tree.map(lambda all_, one: all_.at[rows, place].set(one, mode="drop"), noted, new)


def _advance(plan: Plan, params: Params, state: State, noting=False) -> State:
    """Generates the next token of every sequence that is not done; ``noting`` its log-probabilities, where kept."""
    settings, rows = plan.settings, jnp.arange(state.done.shape[0])
    earlier = jnp.arange(state.cache[0].shape[3])[None] < state.position[:, None]
    logits, kv = plan.model.apply(
        params, state.before[:, None], state.position[:, None], state.cache, earlier, method="extend"
    )
    keys, choice = rng.fold_in(state.keys, state.position), choose.choice_of(plan.settings, state.choice)
    token = choose.next_tokens(logits, state.seen, keys, choice)[:, 0]
    going = ~state.done
    count = state.count + going
    done = state.done | (count >= state.budget) | choose.is_end(token, choice)
    # A sequence that is done stays where it is: its token is dropped.
    place = jnp.where(going, state.count, settings.max_new_tokens)
    noted = state.log_probs
    if noted is not None:
        new = functools.partial(_noted, logits=logits[:, 0], token=token, rows=rows, place=place)
        noted = jax.lax.cond(noting, new, lambda old: old, noted)
    return State(
        keys=state.keys,
        cache=caches.commit(state.cache, kv, state.position),
        position=state.position + going,
        before=jnp.where(going, token, state.before),
        tokens=state.tokens.at[rows, place].set(token, mode="drop"),
        count=count,
        seen=state.seen.at[rows, token].max(going),
        done=done,
        budget=state.budget,
        choice=state.choice,
        log_probs=noted,
    )


def cut(plan: Plan, state: State) -> Generation:
    """The new tokens so far, up to the end of text."""
    inside = jnp.arange(state.tokens.shape[1])[None] < state.count[:, None]
    ends = choose.is_end(state.tokens, choose.choice_of(plan.settings, state.choice))
    return token_rows.cut(state.tokens, inside, ends, plan.settings.pad_id)


start = jax.jit(_start, static_argnums=0)
advance = jax.jit(_advance, static_argnums=0, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=0)
def run(plan: Plan, params: Params, prompts: Prompts, keys: Key) -> Generation:
    """The whole generation in one program."""
    state = _start(plan, params, prompts, keys)
    state = jax.lax.while_loop(lambda s: ~jnp.all(s.done), functools.partial(_advance, plan, params), state)
    return cut(plan, state)


def generate(
    model: Autoregressive,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key | None = None,
    sample_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continues each prompt. A sample depends on (key, its id) alone, not on the rest of its batch.

    Args:
      model: the autoregressive model.
      params: its variables.
      prompts: token ids; an empty prompt begins a document.
      settings: see `Settings`.
      key: source of the draws; may be None with temperature 0.
      sample_ids: identity of each sample in the random stream; its index by default.
      mesh: sequences over its axes data and fsdp, heads over tensor; the parameters must be there. The number of
        prompts must be a multiple of data * fsdp.

    Returns:
      A `Generation` with L = max_new_tokens.

    Raises:
      UserError: a setting or prompt that cannot be used.
    """
    token_rows.check_prompts(model.config.vocab_size, prompts, settings)
    width = token_rows.width_for(prompts, settings)
    return _generate(model, params, prompts, settings, key, sample_ids, mesh, width)


def _generate(model, params, prompts, settings, key, sample_ids, mesh, width: int) -> Generation:
    rows, keys = token_rows.stack(prompts, width), _keys(key, settings, len(prompts), sample_ids)
    return token_rows.run(functools.partial(run, Plan(model, settings), params), rows, keys, mesh)


def _keys(key: Key | None, settings: Settings, count: int, sample_ids) -> Key:
    drawn = f"temperature = {settings.temperature}" if settings.temperature else ""
    return token_rows.keys_for(key, drawn, count, sample_ids)


def stream(
    model: Autoregressive,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key | None = None,
    sample_ids: Sequence[int] | None = None,
) -> Iterator[Piece]:
    """`generate`, token by token: yields a `Piece` as soon as each is drawn.

    Args:
      model, params, prompts, settings, key, sample_ids: as in `generate`.

    Raises:
      UserError: as `generate`, before the first token.
    """
    token_rows.check_prompts(model.config.vocab_size, prompts, settings)
    rows = token_rows.stack(prompts, token_rows.width_for(prompts, settings))
    keys = _keys(key, settings, len(prompts), sample_ids)
    return _stream(Plan(model, settings), params, rows, keys)


def _stream(plan: Plan, params: Params, rows: Prompts, keys: Key) -> Iterator[Piece]:
    state, going = start(plan, params, rows, keys), np.ones(len(rows.lengths), bool)
    while np.any(going):
        state = advance(plan, params, state)
        tokens, done = jax.device_get((state.before, state.done))
        shown = going & (tokens != plan.settings.eos_id)
        yield Piece([[int(token)] if show else [] for token, show in zip(tokens, shown, strict=True)])
        going = ~done


def generate_batches(
    model: Autoregressive,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key | None = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continuations of any number of prompts, in order, batch by batch: (index of the prompt, its new tokens).

    All prompts are checked before the first is generated, and all batches use one program.

    Args:
      batch_size: prompts generated at a time; it does not change the result.
      model, params, prompts, settings, key, mesh: as in `generate`.

    Raises:
      UserError: as `generate`, or a batch size below 1.
    """
    token_rows.check_batch_size(batch_size)
    token_rows.check_prompts(model.config.vocab_size, prompts, settings)
    size = batch_size if mesh is not None else min(batch_size, len(prompts))
    width = token_rows.width_for(prompts, settings)

    def whole(some, sample_ids):
        return _generate(model, params, some, settings, key, sample_ids, mesh, width)

    return token_rows.batches(whole, prompts, size)
