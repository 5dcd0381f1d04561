"""Likelihood of text: `Settings`, `log_likelihood`, `conditional`, and what they say per token and byte."""

from cola_jax.flow.solve import SOLVERS
from cola_jax.likelihood.estimators import (
    Conditional,
    Likelihood,
    bits_per_byte,
    conditional,
    iwae_curve,
    log_likelihood,
    perplexity,
    plug_in,
    take,
)
from cola_jax.likelihood.rows import stack
from cola_jax.likelihood.settings import Settings

__all__ = [
    "SOLVERS",
    "Conditional",
    "Likelihood",
    "Settings",
    "bits_per_byte",
    "conditional",
    "iwae_curve",
    "log_likelihood",
    "perplexity",
    "plug_in",
    "stack",
    "take",
]
