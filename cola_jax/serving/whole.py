"""An engine for any family: a batch is generated whole when it starts, and is done at the first boundary."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cola_jax import rng
from cola_jax.families.interface import Engine, Family
from cola_jax.sampling.jobs import Job, Progress
from cola_jax.types import Params


class Program(NamedTuple):
    """What `Family.generate` is called with."""

    model: Any
    params: Params
    settings: Any


class State(NamedTuple):
    """What was generated: tokens [B, L], and how many of them [B] each sequence asked for."""

    tokens: jax.Array
    lengths: jax.Array


def engine(family: Family) -> Engine:
    """The family's own engine, or one that generates whole batches with `Family.generate`.

    The latter always generates ``settings.max_new_tokens`` and gives of them what a job asks for, with the settings of
    the program for all.
    """
    if family.engine is not None:
        return family.engine

    def start(program: Program, asked: Sequence[Job]) -> State:
        keys = _keys(np.array([job.seed % 2**32 for job in asked], np.uint32))
        prompts, ids = [list(job.prompt) for job in asked], [job.sample for job in asked]
        out = family.generate(program.model, program.params, prompts, program.settings, key=keys, sample_ids=ids)
        lengths = np.minimum(np.asarray(out.lengths), [job.max_new_tokens for job in asked])
        return State(jnp.asarray(out.tokens, jnp.int32), jnp.asarray(lengths, jnp.int32))

    def advance(program: Program, state: State, more: bool):
        return state, Progress(state.tokens, state.lengths, np.ones(len(state.lengths), bool)), None

    return Engine(
        unit=lambda model, settings: settings.max_new_tokens,
        prepare=lambda model, params, settings: Program(model, params, settings),
        start=start,
        rename=lambda program, state, asked: None,
        advance=advance,
        own=(),
    )


_keys = jax.jit(jax.vmap(lambda seed: rng.key(seed, "sample")))
