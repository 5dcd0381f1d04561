"""Stage 2's strategies for the VAE: fixed, joint, scratch, interval; its learning-rate ratio (section 4.3, SPEC 4)."""

import functools

import jax
import jax.numpy as jnp

from cola_jax.families.interface import Group
from cola_jax.objectives.stage2 import Stage2Config


def trained_groups(config: Stage2Config) -> dict[str, Group]:
    """Which groups of parameters have gradients, the VAE's rate ratio, and when the VAE is updated."""
    if config.strategy == "fix_vae":
        return {"dit": Group()}
    active = functools.partial(is_joint, config.interval) if config.strategy == "interval" else None
    return {"dit": Group(), "vae": Group(config.vae_learning_rate_ratio, active)}


def is_joint(interval: int, step: jax.Array) -> jax.Array:
    """Whether the VAE is updated: ``interval`` joint steps alternate with as many in which it stays as it is (16.6)."""
    return jnp.asarray(step // interval % 2 == 0)
