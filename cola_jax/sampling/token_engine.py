"""The autoregressive model's tokens for a batch whose sequences come and go (`families.interface.Engine`)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cola_jax.models.autoregressive import Autoregressive
from cola_jax.sampling import autoregressive as sampling
from cola_jax.sampling import cache as caches
from cola_jax.sampling import jobs, token_rows
from cola_jax.sampling.autoregressive import Plan, Settings, State
from cola_jax.sampling.choose import Choice
from cola_jax.sampling.jobs import Job, Progress
from cola_jax.types import Key, Params

UNIT = 8  # tokens that are generated between two boundaries at which sequences come and go
LIKELIEST = 5  # tokens of which log-probabilities are kept, at each place


class Program(NamedTuple):
    """What `prepare` makes: a plan, the weights, and the tokens of a prompt that are read at a time."""

    plan: Plan
    params: Params
    chunk: int


def prepare(model: Autoregressive, params: Params, settings: Settings) -> Program:
    """A program for sequences of at most ``settings.context`` tokens, ``settings.max_new_tokens`` of them new."""
    settings.validate()
    chunks = min(max(settings.context // 16, 1), 8)
    plan = Plan(model, settings, min(LIKELIEST, model.config.vocab_size))
    return Program(plan, params, -(-settings.context // chunks))


def start(program: Program, asked: Sequence[Job], earlier: State | None = None, shared: int = 0) -> State:
    """The batch of these sequences, all at their beginning.

    Prompts are read chunk by chunk, by one program: what a chunk puts into the cache depends on the tokens up to its
    end, and on nothing else.

    Args:
      earlier: a batch at its beginning, each of whose prompts has its first ``shared`` tokens in common with that of
        the job in its place: they are not read again.
      shared: a multiple of the chunk.
    """
    plan, chunk = program.plan, program.chunk
    prompts = [job.prompt for job in asked]
    width = chunk * -(-plan.settings.context // chunk)
    rows = token_rows.stack(prompts, width)
    if earlier is None:  # bound to the device, as the caches of batches are: for others `_read` would be compiled again
        cache = jax.device_put(_empty(plan, program.params, len(asked), width), jax.devices()[0])
    else:
        cache = earlier.cache
    before = np.pad(rows.tokens[:, :-1], ((0, 0), (1, 0)), constant_values=plan.model.config.vocab_size)
    for begin in range(shared, max(map(len, prompts)), chunk):
        cache = _read(plan, program.params, cache, before[:, begin : begin + chunk], np.int32(begin))
    return _begin(plan, cache, rows, jobs.keys(asked), _budgets(asked), jobs.choices(asked))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty(plan: Plan, params: Params, batch: int, width: int) -> tuple:
    """A cache of ``width`` positions without anything in it."""
    row = jax.ShapeDtypeStruct((batch, width), jnp.int32)
    shapes = jax.eval_shape(functools.partial(plan.model.apply, method="prefill"), params, row, row)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def _read(plan: Plan, params: Params, cache: tuple, before, begin) -> tuple:
    """The cache with the positions from ``begin`` on, each of which reads the token before it."""
    positions = jnp.broadcast_to(begin + jnp.arange(before.shape[1]), before.shape)
    earlier = jnp.arange(cache[0].shape[3])[None] < positions[:, :1]
    _, new = plan.model.apply(params, before, positions, cache, earlier, method="extend")
    return caches.commit(cache, new, positions[:, 0])


def _budgets(asked: Sequence[Job]) -> np.ndarray:
    return np.array([job.max_new_tokens for job in asked], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _begin(plan: Plan, cache: tuple, rows: token_rows.Prompts, keys: Key, budget, choice: Choice) -> State:
    return sampling.begin(plan, cache, rows, keys)._replace(budget=budget, choice=choice)


def rename(program: Program, state: State, asked: Sequence[Job]) -> State:
    """A batch at its beginning as that of other jobs with the same prompts."""
    choice = jax.tree.map(jnp.asarray, jobs.choices(asked))
    return state._replace(keys=jobs.keys(asked), budget=jnp.asarray(_budgets(asked)), choice=choice)


def advance(program: Program, state: State, more: bool):
    """The next tokens of every sequence: (state, `Progress`, None); with ``more``, their log-probabilities too."""
    return *_advance(program.plan, program.params, state, np.bool_(more)), None


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(plan: Plan, params: Params, state: State, more):
    state = jax.lax.fori_loop(0, UNIT, lambda _, state: sampling.advance(plan, params, state, more), state)
    out = sampling.cut(plan, state)
    return state, Progress(out.tokens, out.lengths, state.done, state.log_probs)
