"""One training step and one evaluation step, as pure jitted functions."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cola_jax import rng, sharding
from cola_jax.config import OptimizerConfig
from cola_jax.families.interface import Stage, TermsFn
from cola_jax.train import optimizer as optimizers
from cola_jax.train.state import Guard, TrainState
from cola_jax.types import Params, PyTree, Term

# The running average of the gradient norm forgets with this factor, and recognises spikes after this many updates.
_NORM_DECAY, _NORM_UPDATES = 0.98, 20


def _mean(value: jax.Array, weight: jax.Array) -> jax.Array:
    """``value / weight``, and 0 where nothing was counted."""
    return jnp.where(weight > 0, value / jnp.where(weight > 0, weight, 1.0), 0.0)


def add_derived(means: dict) -> dict:
    """Adds the VAE's logSNR (16.2) to term means that hold the power of signal and noise."""
    if "latent_signal" in means and "latent_noise" in means:
        return {**means, "logsnr": jnp.log(means["latent_signal"] / means["latent_noise"])}
    return means


def _microbatches(tree: PyTree, number: int) -> PyTree:
    """[B, ...] -> [number, B / number, ...], with example i in microbatch i % number.

    Strided, so that each device cuts up its own rows instead of exchanging them.
    """

    def cut(x):
        x = jnp.swapaxes(x.reshape(x.shape[0] // number, number, *x.shape[1:]), 0, 1)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(cut, tree)


def _loss_and_gradients(terms: TermsFn, trained, held, batch, keys, frozen, accumulation: int):
    """``sum_i coefficient_i * sum(value_i) / sum(weight_i)``, its gradients by ``trained``, the terms' means.

    With accumulation the weights of the whole batch are summed first, so that microbatches add up to the same
    result however the weights are spread over them.
    """

    def evaluate(active, data, data_keys):
        return terms({"params": {**held, **active}}, data, data_keys, frozen)

    def weights(found):
        return {name: jax.lax.stop_gradient(jnp.sum(term.weight)) for name, term in found.items()}

    def loss(active, data, data_keys, totals=None):
        found = evaluate(active, data, data_keys)
        totals = weights(found) if totals is None else totals
        means = {name: _mean(jnp.sum(term.value), totals[name]) for name, term in found.items()}
        return jnp.asarray(sum(term.coefficient * means[name] for name, term in found.items())), means

    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulation == 1:
        (value, means), gradients = gradient(trained, batch, keys)
        return value, means, gradients
    parts = _microbatches((batch, keys), accumulation)
    # Only weights leave this scan: XLA drops the model from it.
    totals = jax.lax.map(lambda part: weights(evaluate(trained, *part)), parts)
    totals = jax.tree.map(lambda x: jnp.sum(x, axis=0), totals)

    def add(carry, part):
        (value, means), gradients = gradient(trained, *part, totals)
        return jax.tree.map(jnp.add, carry, (value, means, gradients)), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, totals), jax.tree.map(jnp.zeros_like, trained))
    return jax.lax.scan(add, start, parts)[0]


def _moving_average(ema: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
    """``ema + (1 - d) (params - ema)``: exact where both agree. The decay d rises to ``decay`` from 0.1."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)


def _judge(guard: Guard | None, finite: jax.Array, norm: jax.Array, config: OptimizerConfig):
    """(apply the update, continue, the guard after the step), from whether loss and gradient norm are finite."""
    if guard is None:
        return finite, finite, None
    spike = jnp.zeros((), bool)
    if config.spike_factor:
        spike = (guard.applied >= _NORM_UPDATES) & (norm > config.spike_factor * guard.norm)
    apply = finite & ~spike
    in_row = jnp.where(apply, 0, guard.in_row + 1)
    decay = jnp.minimum(_NORM_DECAY, guard.applied / (guard.applied + 1.0))  # the plain mean of the first ones
    after = Guard(
        norm=jnp.where(apply, guard.norm + (1.0 - decay) * (norm - guard.norm), guard.norm),
        applied=guard.applied + apply,
        in_row=in_row,
        skipped=guard.skipped + ~apply,
    )
    return apply, in_row <= config.max_skipped, after


def _update(
    stage: Stage, optimizer: optax.GradientTransformation, seed: int, first_step: int, state: TrainState, batch: dict
) -> tuple[TrainState, dict]:
    """`make_train_step` before it is jitted."""
    config = stage.optimizer
    keys = rng.key(seed, "train", state.step + first_step, sample=jnp.arange(batch["tokens"].shape[0]))
    active, held = optimizers.split_groups(state.params, tuple(stage.trained))
    loss, means, gradients = _loss_and_gradients(
        stage.terms, active, held, batch, keys, state.frozen, config.accumulation
    )
    norm = optax.tree.norm(gradients)
    apply, may_continue, guard = _judge(state.guard, jnp.isfinite(loss) & jnp.isfinite(norm), norm, config)
    finite = state.finite & may_continue
    updates, opt_state = optimizer.update(gradients, state.opt_state, active)
    active = optax.apply_updates(active, updates)
    ema = state.ema if state.ema is None else _moving_average(state.ema, active, config.ema, state.step)
    params = {"params": {**held, **active}}
    new = state.replace(params=params, opt_state=opt_state, ema=ema)
    new = jax.tree.map(lambda a, b: jnp.where(finite & apply, a, b), new, state)
    new = new.replace(step=state.step + finite, finite=finite)
    skipped = 0
    if guard is not None:
        skipped = state.guard.skipped
        new = new.replace(guard=jax.tree.map(lambda a, b: jnp.where(finite, a, b), guard, state.guard))
    metrics = {
        "loss": loss,
        **add_derived(means),
        "grad_norm": norm,
        **{f"grad_norm/{name}": optax.tree.norm(gradient) for name, gradient in gradients.items()},
        "update_norm": optax.tree.norm(updates),
        **{f"update_norm/{name}": optax.tree.norm(update) for name, update in updates.items()},
        # The optimizer has counted the applied updates only.
        "learning_rate": optimizers.learning_rate(config, stage.steps)(state.step - skipped),
        "finite": finite,
    }
    if guard is not None:
        metrics |= {"grad_norm_average": state.guard.norm, "skipped": new.guard.skipped}
    return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def make_train_step(
    stage: Stage,
    target: TrainState,
    mesh: Mesh,
    *,
    seed: int,
    first_step: int = 0,
    rules: sharding.Rules = sharding.RULES,
):
    """The jitted ``(state, batch) -> (state, metrics)``; the state's buffers are donated.

    An update is bad if the loss or the norm of its gradient is not finite, or if the norm is above
    ``spike_factor`` times its running average. A bad update is skipped (only the step is counted) if no more
    than ``max_skipped`` before it were; otherwise the state stays as it was, step included, now and in later
    calls (`TrainState.finite`), and the metrics are those of the step that failed.

    Args:
      stage: its terms, whose noise comes from their keys alone; its optimizer and groups.
      target: from `state.abstract`: where the state lives.
      mesh: the devices.
      seed: of the run.
      first_step: added to the step in the keys, so that a stage does not draw what an earlier one drew.
      rules: from `sharding.make_rules`, for the activations.

    Returns:
      The function. Metrics are float32 scalars: the loss, the mean of every term, "grad_norm" (before clipping) and
      "update_norm" with their parts "<norm>/<group>", "learning_rate", "finite" (1, or 0 if training cannot continue);
      with a guard "grad_norm_average" before this step and "skipped", the updates skipped so far.
    """
    update = functools.partial(_update, stage, optimizers.create(stage), seed, first_step)

    def traced(state, batch):
        with sharding.activate(mesh, rules):
            return update(state, batch)

    homes = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(
        traced,
        donate_argnums=0,
        in_shardings=(homes, sharding.batch_sharding(mesh)),
        out_shardings=(homes, sharding.replicated(mesh)),
    )


def make_eval_step(
    terms: TermsFn, mesh: Mesh, *, seed: int, rules: sharding.Rules = sharding.RULES, microbatches: int = 1
):
    """The jitted ``(params, frozen, batch, index) -> {name: Term}`` with each term summed over the batch.

    The noise of held-out batch ``index`` is the same at every evaluation. That of an example depends on its place in
    the batch alone: microbatches are one after another what the whole batch would be at once.

    Args:
      terms: of the stage.
      mesh: the devices.
      seed: of the run.
      rules: from `sharding.make_rules`, for the activations.
      microbatches: parts of a batch; as many as in training need no more memory than that.
    """

    def part(params, frozen, batch, keys) -> dict[str, Term]:
        found = terms(params, batch, keys, frozen)
        # Coefficients are no arrays, but leave a loop as such.
        sums = {name: (jnp.sum(term.value), jnp.sum(term.weight), term.coefficient) for name, term in found.items()}
        return {name: Term(*(jnp.asarray(x, jnp.float32) for x in term)) for name, term in sums.items()}

    def eval_step(params: Params, frozen: Mapping[str, Params], batch: dict, index: jax.Array) -> dict[str, Term]:
        keys = rng.key(seed, "evaluate", index, sample=jnp.arange(batch["tokens"].shape[0]))
        with sharding.activate(mesh, rules):
            if microbatches == 1:
                return part(params, frozen, batch, keys)
            found = jax.lax.map(lambda own: part(params, frozen, *own), _microbatches((batch, keys), microbatches))
        return {
            name: Term(jnp.sum(term.value), jnp.sum(term.weight), term.coefficient[0]) for name, term in found.items()
        }

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def summarize(sums: list[dict[str, Term]]) -> dict[str, float]:
    """Loss and term means over several batches, from what the evaluation step returned for each."""
    means, loss = {}, 0.0
    for name in sums[0]:
        value, weight = (sum(float(getattr(batch[name], field)) for batch in sums) for field in ("value", "weight"))
        means[name] = value / weight if weight else 0.0
        loss += float(sums[0][name].coefficient) * means[name]
    return {name: float(value) for name, value in {"loss": loss, **add_derived(means)}.items()}
