"""AdamW with warm-up and cosine decay, and the latent-space training strategies (SPEC 4, 7).

Parameters come in two groups, "vae" and "dit". The optimizer sees only the groups that a strategy trains: what it
does not see has no gradient, no moments and cannot change.
"""

import jax
import jax.numpy as jnp
import optax

from cola_jax.config import OptimizerConfig
from cola_jax.objectives.stage2 import Stage2Config
from cola_jax.types import Params, PyTree

# Names of the parameters that weight decay applies to: kernels of linear maps, token embeddings.
DECAYED = ("kernel", "embedding", "wte")


def trained_groups(stage: int, strategy: str = "joint") -> tuple[str, ...]:
    """The top-level parameter groups that have gradients: stage 1 trains the VAE, "fix_vae" only the DiT."""
    if stage == 1:
        return ("vae",)
    return ("dit",) if strategy == "fix_vae" else ("dit", "vae")


def split_groups(variables: Params, groups: tuple[str, ...]) -> tuple[PyTree, PyTree]:
    """``variables["params"]`` as (trained, frozen) groups."""
    params = variables["params"]
    trained = {name: params[name] for name in groups}
    return trained, {name: value for name, value in params.items() if name not in groups}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from ``initial_learning_rate`` to ``learning_rate`` in ``warmup_steps``, then cosine to
    ``final_learning_rate`` at ``steps``; update number n (from 0) has the rate of n.
    """
    decay = optax.cosine_decay_schedule(
        config.learning_rate,
        max(steps - config.warmup_steps, 1),
        alpha=config.final_learning_rate / config.learning_rate,
    )
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(config.initial_learning_rate, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def is_decayed(path, leaf) -> bool:
    """Whether weight decay applies.

    By name, because `nn.scan` stacks biases and norm scales into arrays that look like matrices.
    """
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return bool(names) and names[-1] in DECAYED and leaf.ndim >= 2


def _decay_mask(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _per_group(**transforms: optax.GradientTransformation) -> optax.GradientTransformation:
    """Each group through its own transformation; the labels follow the groups that are there."""
    return optax.partition(transforms, lambda params: {name: name for name in params})


def create(config: OptimizerConfig, steps: int, stage: int, strategy: Stage2Config | None = None):
    """The optimizer of a stage.

    Args:
      config: rates, decay, clipping.
      steps: of the whole stage; where the cosine ends.
      stage: 1 or 2.
      strategy: stage 2's settings: which groups are trained, the VAE's learning-rate ratio, the interval. With
        "interval", `interval` joint steps alternate with as many in which the VAE's parameters and moments stay
        as they are (and its gradient does not enter the clipping norm).

    Returns:
      A gradient transformation over ``{group: parameters}`` with the groups of `trained_groups`.
    """
    adam = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decay_mask),
    )
    rate = optax.scale_by_learning_rate(learning_rate(config, steps))
    if stage == 1 or strategy.strategy == "fix_vae":
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam, rate)
    gate, vae_adam = optax.identity(), adam
    if strategy.strategy == "interval":

        def is_joint(step: jax.Array) -> jax.Array:
            return jnp.asarray(step // strategy.interval % 2 == 0)

        gate, vae_adam = optax.conditionally_mask(gate, is_joint), optax.conditionally_mask(adam, is_joint)
    return optax.chain(
        _per_group(vae=gate, dit=optax.identity()),
        optax.clip_by_global_norm(config.clip_norm),
        _per_group(vae=vae_adam, dit=adam),
        rate,
        _per_group(vae=optax.scale(strategy.vae_learning_rate_ratio), dit=optax.identity()),
    )
