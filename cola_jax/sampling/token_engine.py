"""The autoregressive model's tokens for a batch whose sequences come and go (`families.interface.Engine`)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cola_jax.models.autoregressive import Autoregressive
from cola_jax.sampling import autoregressive as sampling
from cola_jax.sampling import jobs, token_rows
from cola_jax.sampling.autoregressive import Plan, Settings, State
from cola_jax.sampling.choose import Choice
from cola_jax.sampling.jobs import Job, Progress
from cola_jax.types import Key, Params

UNIT = 4  # tokens that are generated between two boundaries at which sequences come and go
LIKELIEST = 5  # tokens of which log-probabilities are kept, at each place


class Program(NamedTuple):
    """What `prepare` makes."""

    plan: Plan
    params: Params


def prepare(model: Autoregressive, params: Params, settings: Settings) -> Program:
    """A program for sequences of at most ``settings.context`` tokens, ``settings.max_new_tokens`` of them new."""
    settings.validate()
    return Program(Plan(model, settings, settings.context, min(LIKELIEST, model.config.vocab_size)), params)


def widths(program: Program) -> tuple[int, ...]:
    """Of the rows in which prompts are read: most are short, and reading a whole context costs like a whole answer."""
    context = program.plan.settings.context
    short = max(16, context // 8)
    return (short, context) if short < context else (context,)


def start(program: Program, asked: Sequence[Job]) -> State:
    """The batch of these sequences, all at their beginning."""
    longest = max(len(job.prompt) for job in asked)
    width = next(width for width in widths(program) if width >= longest)
    rows = token_rows.stack([job.prompt for job in asked], width)
    return _start(program.plan, program.params, rows, jobs.keys(asked), _budgets(asked), jobs.choices(asked))


def _budgets(asked: Sequence[Job]) -> np.ndarray:
    return np.array([job.max_new_tokens for job in asked], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _start(plan: Plan, params: Params, rows: token_rows.Prompts, keys: Key, budget, choice: Choice) -> State:
    return sampling.start(plan, params, rows, keys)._replace(budget=budget, choice=choice)


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
