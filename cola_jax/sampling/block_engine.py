"""Cola's blocks for a batch whose sequences come and go (`families.interface.Engine`).

Continuations and gaps are one thing, layouts of what is known, and stand in the same batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_layer import Before
from cola_jax.sampling import blocks, conditioning, jobs
from cola_jax.sampling.blocks import State
from cola_jax.sampling.conditioning import Layout
from cola_jax.sampling.jobs import Job, Progress
from cola_jax.sampling.settings import Settings
from cola_jax.sampling.transport import Plan, Precomputed
from cola_jax.types import Params


class Program(NamedTuple):
    """What `prepare` makes: the plan, the weights, and the width in tokens of every layout.

    ``before`` finds what stands before jobs' texts; None: nothing does.
    """

    plan: Plan
    weights: Precomputed
    width: int
    before: Callable[[Sequence[Job]], Before] | None = None


def prepare(model: ColaDLM, params: Params, settings: Settings) -> Program:
    """A program for sequences of at most ``settings.context`` tokens, ``settings.max_new_tokens`` of them new."""
    settings.validate()
    block, patch = model.dit_config.block_size, model.vae_config.patch_size
    width = conditioning.bucket(model, settings.context + patch - 1)
    whole = -(-(settings.context + block * patch - 1) // (block * patch))  # wherever in its block a text begins
    count = conditioning.block_count(model, settings, settings.max_new_tokens)
    model, params = blocks.prepare(model, params)
    plan = Plan(model, settings, count, max(width // patch, whole * block))
    return Program(plan, blocks.tabulate(plan, params), width)


def fills(settings: Settings) -> bool:
    """Whether gaps can be filled with these settings."""
    return settings.conditioning not in ("left_pad", "right_pad")


def _layout(program: Program, asked: Sequence[Job]) -> Layout:
    model, rows = program.plan.model, []
    for job in asked:
        settings = dataclasses.replace(program.plan.settings, max_new_tokens=job.max_new_tokens)
        if job.suffix is None:
            rows.append(conditioning.prompts(model, [job.prompt], settings, program.width))
        else:
            gap = (job.prompt, job.max_new_tokens, job.suffix)
            rows.append(conditioning.gaps(model, [gap], settings, program.width))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def start(program: Program, asked: Sequence[Job]) -> State:
    """The batch of these sequences, all at their beginning."""
    before, layout = program.before and program.before(asked), _layout(program, asked)
    return blocks.begin(program.plan, program.weights, layout, jobs.keys(asked), jobs.choices(asked), before)


def rename(program: Program, state: State, asked: Sequence[Job]) -> State | None:
    """A batch at its beginning as that of other jobs with the same `Job.known`; None where their starts differ."""
    if program.plan.settings.conditioning == "repaint":  # whose first block was drawn
        return None
    ends = jnp.asarray(_layout(program, asked).end)
    choice = jax.tree.map(jnp.asarray, jobs.choices(asked))
    return state._replace(layout=state.layout._replace(end=ends), keys=jobs.keys(asked), choice=choice)


def advance(program: Program, state: State, more: bool):
    """The next block of every sequence: (state, `Progress`, estimates [steps, B, K * P] of its new tokens).

    The estimates are None where the solver leaves the grid, and zeros without ``more``.
    """
    return _advance(program.plan, program.weights, state, np.bool_(more))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(plan: Plan, weights: Precomputed, state: State, more):
    layout, per_block = state.layout, state.tokens.shape[2]
    begin = layout.begin - (layout.first + state.block) * per_block  # of the new tokens, in this block
    state, guesses = blocks.advance(plan, weights, state, estimates=more)
    if guesses is not None:  # the block's new tokens first
        index = (jnp.arange(per_block)[None] + jnp.maximum(begin, 0)[:, None]) % per_block
        guesses = jnp.take_along_axis(guesses, index[None], axis=2)
    out = blocks.cut(plan, state)
    ready = jnp.minimum(out.lengths, (layout.first + state.block) * per_block - layout.begin)
    return state, Progress(out.tokens, jnp.maximum(ready, 0), state.done), guesses
