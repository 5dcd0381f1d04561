"""What a config makes of the model and of each stage: pure functions, no files, no devices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from cola_jax.config import Config, OptimizerConfig
from cola_jax.models import cola
from cola_jax.objectives import stage1, stage2
from cola_jax.train import optimizer as optimizers
from cola_jax.train import state as states
from cola_jax.train import step as steps
from cola_jax.types import Key, Params


class Model(NamedTuple):
    """The model, its initialisation, and the terms of both stages."""

    model: cola.ColaDLM
    init: Callable[[Key], Params]
    terms: tuple[steps.TermsFn, steps.TermsFn]


class Stage(NamedTuple):
    """One stage's optimizer and state."""

    steps: int
    settings: OptimizerConfig
    trained: tuple[str, ...]
    optimizer: optax.GradientTransformation
    make: Callable[..., states.TrainState]


def model(config: Config) -> Model:
    """The model of a config whose ``vae.vocab_size`` is known."""
    made = cola.create(config.vae, config.dit, config.train.compute_dtype)
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    return Model(
        made,
        lambda key: made.init(key, tokens),
        (
            lambda params, batch, keys, reference: stage1.terms(made, config, params, batch, keys),
            functools.partial(stage2.terms, made, config),
        ),
    )


def stage(config: Config, number: int, init: Callable[[Key], Params]) -> Stage:
    """Stage 1 or 2 of a config, over parameters from ``init``."""
    strategy = config.stage2
    settings, total = (config.optimizer1, config.stage1.steps) if number == 1 else (config.optimizer2, strategy.steps)
    trained = optimizers.trained_groups(number, strategy.strategy)
    optimizer = optimizers.create(settings, total, number, strategy)
    make = states.make_init(
        init,
        optimizer,
        trained,
        groups=("vae",) if number == 1 else ("vae", "dit"),
        ema=settings.ema > 0,
        reference=number == 2 and "vae" in trained and strategy.reference_weight > 0,
        guard=settings.max_skipped > 0 or settings.spike_factor > 0,
    )
    return Stage(total, settings, trained, optimizer, make)
