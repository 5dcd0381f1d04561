"""FLOPs of a training step, counted in its program, against the cost model."""

import dataclasses
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import abstract

from cola_jax import families, rng
from cola_jax.evaluation import benchmark
from cola_jax.models import cola
from cola_jax.objectives import stage2
from configs import benchmark as benchmark_config
from configs import paper_2b


def per_token(config: families.cola.ColaConfig) -> float:
    """FLOPs of the gradient of stage 2 for each token of a batch."""
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, remat="none"))
    model = cola.create(config.vae, config.dit, config.train.compute_dtype)
    params, trained = abstract(model), ("dit",) if config.stage2.strategy == "fix_vae" else ("dit", "vae")
    length = config.data.sequence_length
    row, keys = (
        jax.ShapeDtypeStruct((2, length), jnp.int32),
        jax.eval_shape(lambda: rng.key(0, "train", 0, jnp.arange(2))),
    )

    def loss(active, params, tokens, segments, keys):
        merged = {"params": params["params"] | active}
        reference = params if "vae" in trained else None
        batch = {"tokens": tokens, "segment_ids": segments}
        terms = stage2.terms(model, config.stage2, merged, batch, keys, reference).values()
        return sum(term.coefficient * jnp.sum(term.value) for term in terms if term.coefficient)

    active = {name: params["params"][name] for name in trained}
    return benchmark.count_flops(jax.value_and_grad(loss), active, params, row, row, keys) / (2 * length)


def test_a_joint_step_of_the_full_model_costs_what_the_cost_model_says():
    """19.0 GFLOP a token."""
    config = families.parse(paper_2b.get_config())
    assert per_token(config) == pytest.approx(19.0e9, rel=0.1)
    assert per_token(config) == pytest.approx(families.cola.flops_per_token(config, 2), rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction": "mean", "prediction_variance": 0.1, "self_conditioning": True},  # a forward pass before each
        {"prediction": "mixture", "prediction_variance": 0.1, "num_codes": 4096},
    ],
)
def test_a_step_of_the_benchmark_costs_what_its_share_of_matmul_is_computed_from(options):
    settings = benchmark_config.get_config()
    settings.dit.update(options)
    config = families.parse(settings)
    assert per_token(config) == pytest.approx(families.cola.flops_per_token(config, 2), rel=0.1)


@pytest.mark.parametrize("name", ["paper_100m_ar", "paper_100m_llada", "quickstart_plaid"])
def test_a_step_of_every_family_costs_what_its_cost_model_says(name):
    config = families.parse(importlib.import_module(f"configs.{name}").get_config())
    group = "dit" if name.endswith("plaid") else "transformer"
    # Logits in one chunk: a chunk's are computed again for its gradient, which the model does not count.
    whole = {"remat": "none"} | ({} if group == "dit" else {"logit_chunk": 0})
    config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **whole)})
    family = families.of(config)
    config = family.resolve(config, config.data.vocab_size)
    model, length = family.model(config), config.data.sequence_length
    params = nn.unbox(jax.eval_shape(family.init(model, config), jax.random.key(0)))
    (stage,) = family.stages(model, config)
    row = jax.ShapeDtypeStruct((2, length), jnp.int32)
    keys = jax.eval_shape(lambda: rng.key(0, "train", 0, jnp.arange(2)))

    def loss(params, tokens, segments, keys):
        terms = stage.terms(params, {"tokens": tokens, "segment_ids": segments}, keys, {}).values()
        return sum(term.coefficient * jnp.sum(term.value) for term in terms if term.coefficient)

    found = benchmark.count_flops(jax.value_and_grad(loss), params, row, row, keys) / (2 * length)
    assert found == pytest.approx(stage.flops_per_token, rel=0.1)


@pytest.mark.parametrize("task, auxiliary, copies", [(1, 1.0, None), (1, 0.0, 8), (2, 0.0, None)])
def test_a_step_of_each_task_of_text_and_images_costs_what_its_cost_model_says(monkeypatch, task, auxiliary, copies):
    monkeypatch.setattr(jax.lax, "switch", lambda index, branches: branches[int(index)]())
    config = families.parse(importlib.import_module("configs.scenes").get_config())
    data = dataclasses.replace(config.data, task_shares=tuple(float(k == task) for k in range(3)))
    stage2 = dataclasses.replace(config.stage2, auxiliary_weight=auxiliary, image_noise_copies=copies)
    family = families.of(config)
    config = family.resolve(dataclasses.replace(config, data=data, stage2=stage2), 400)
    model = family.model(config)
    params = nn.unbox(jax.eval_shape(family.init(model, config), jax.random.key(0)))
    stage = family.stages(model, config)[1]
    row, said = (jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (data.sequence_length, 10))
    image = jax.ShapeDtypeStruct((2, data.image_size, data.image_size, 3), jnp.uint8)
    names = ("tokens", "segment_ids", "instruction", "instruction_segment_ids", "image")
    keys = jax.eval_shape(lambda: rng.key(0, "train", 0, jnp.arange(2)))

    def loss(trained, params, values, keys):
        batch = dict(zip(names, values, strict=True)) | {"task": np.full(2, task, np.int32)}
        whole = {"params": {**params["params"], **trained}}
        terms = stage.terms(whole, batch, keys, {}).values()
        return sum(term.coefficient * jnp.sum(term.value) for term in terms)

    trained = {name: params["params"][name] for name in stage.trained}
    values = (row, row, said, said, image)
    found = benchmark.count_flops(jax.value_and_grad(loss), trained, params, values, keys) / (2 * data.sequence_length)
    assert found == pytest.approx(stage.flops_per_token, rel=0.15)


def test_the_count_is_the_compiler_s_and_loops_count_as_often_as_they_run():
    a = jax.ShapeDtypeStruct((32, 32), jnp.float32)

    def once(x):
        return x @ x @ x

    def looped(x):
        return jax.lax.scan(jax.checkpoint(lambda c, _: (jnp.sin(c @ x), None)), x, None, length=5)[0].sum()

    compiled = jax.jit(once).lower(a).compile().cost_analysis()["flops"]
    assert benchmark.count_flops(once, a) == pytest.approx(compiled, rel=1e-6) == 2 * 2 * 32**3
    assert benchmark.count_flops(looped, a) == 5 * 2 * 32**3
    # Forward, forward again (rematerialised), and two products backward.
    assert benchmark.count_flops(jax.grad(looped), a) == 5 * 4 * 2 * 32**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, once, lambda x: x, x)  # noqa: E731
    assert benchmark.count_flops(branch, a) == 2 * 2 * 32**3
    with pytest.raises(ValueError, match="while loop"):
        benchmark.count_flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, once, x), a)
