import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import OPTIMIZER, build, run, same_bits, stage_of, values

from cola_jax import families
from cola_jax.config import OptimizerConfig
from cola_jax.train import optimizer as optimizers

CONFIG = OptimizerConfig(
    learning_rate=0.1,
    initial_learning_rate=0.01,
    final_learning_rate=0.02,
    warmup_steps=3,
    weight_decay=0.1,
    clip_norm=0.5,
    beta1=0.8,
    beta2=0.9,
)


def expected_rate(n, steps=10):
    if n < 3:
        return 0.01 + (0.1 - 0.01) * n / 3
    return 0.02 + (0.1 - 0.02) * 0.5 * (1 + np.cos(np.pi * min((n - 3) / (steps - 3), 1)))


def test_schedule():
    rate = optimizers.learning_rate(CONFIG, 10)
    np.testing.assert_allclose([rate(n) for n in range(13)], [expected_rate(n) for n in range(13)], rtol=1e-5)
    assert float(optimizers.learning_rate(dataclasses.replace(CONFIG, warmup_steps=0), 10)(0)) == pytest.approx(0.1)
    # Fewer steps than the warm-up: the rate just does not get there.
    assert float(optimizers.learning_rate(CONFIG, 2)(1)) == pytest.approx(expected_rate(1))


def parameters(seed=0):
    draw = np.random.default_rng(seed)
    group = lambda: {  # noqa: E731
        "layers": {"kernel": draw.normal(size=(2, 3, 4)).astype(np.float32), "bias": np.ones((2, 4), np.float32)},
        "norm": {"scale": np.ones((2, 4), np.float32)},
        "wte": draw.normal(size=(5, 3)).astype(np.float32),
        "no_history": draw.normal(size=(3,)).astype(np.float32),
    }
    return {"vae": group(), "dit": group()}


class AdamW:
    """The textbook update of one array, in float64."""

    def __init__(self, value, decayed):
        self.value, self.decayed = value.astype(np.float64), decayed
        self.first, self.second, self.count = 0.0, 0.0, 0

    def update(self, gradient, rate):
        self.count += 1
        self.first = 0.8 * self.first + 0.2 * gradient
        self.second = 0.9 * self.second + 0.1 * gradient**2
        mean = self.first / (1 - 0.8**self.count)
        power = self.second / (1 - 0.9**self.count)
        self.value = self.value - rate * (mean / (np.sqrt(power) + 1e-8) + 0.1 * self.decayed * self.value)


def flat(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("strategy", ["stage1", "fix_vae", "joint", "interval"])
def test_against_numpy(strategy):
    stage = 1 if strategy == "stage1" else 2
    own = stage_of(
        stage, "joint" if stage == 1 else strategy, CONFIG, interval=2, total=10, vae_learning_rate_ratio=0.3
    )
    groups, transform = tuple(own.trained), optimizers.create(own)
    params = {name: parameters()[name] for name in groups}
    arrays = {n: AdamW(x, n.endswith(("kernel", "wte"))) for n, x in flat(params).items()}
    state = transform.init(params)
    update = jax.jit(transform.update)
    for n in range(8):
        gradients = {name: parameters(n + 1)[name] for name in groups}
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        # In the second half of a cycle of the interval strategy the VAE does not exist for the optimizer.
        moving = {k: v for k, v in flat(gradients).items() if strategy != "interval" or n % 4 < 2 or k[:3] == "dit"}
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in moving.values()))
        for name, gradient in moving.items():
            ratio = 0.3 if name.startswith("vae") and stage == 2 else 1.0
            arrays[name].update(gradient * min(1, 0.5 / norm), expected_rate(n) * ratio)
        for name, value in flat(params).items():
            np.testing.assert_allclose(value, arrays[name].value, rtol=2e-5, atol=2e-6, err_msg=f"{name} after {n}")


def orthogonal(matrix):
    """Newton and Schulz' iteration of Muon, in float64."""
    x = matrix / np.linalg.norm(matrix)
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if flip else x


def test_muon_against_numpy():
    config = dataclasses.replace(CONFIG, name="muon", momentum=0.7)
    transform = optimizers.create(stage_of(1, "joint", config, total=10))
    params = {"vae": parameters()["vae"]}
    kernel = params["vae"]["layers"]["kernel"].astype(np.float64)
    state, momentum, moved = transform.init(params), 0.0, params
    for n in range(5):
        gradients = {"vae": parameters(n + 1)["vae"]}
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in flat(gradients).values()))
        gradient = gradients["vae"]["layers"]["kernel"] * (0.5 / norm)
        momentum = 0.7 * momentum + 0.3 * gradient
        ahead = 0.7 * momentum / (1 - 0.7 ** (n + 2)) + 0.3 * gradient / (1 - 0.7 ** (n + 1))
        step = np.stack([0.2 * np.sqrt(4) * orthogonal(matrix) for matrix in ahead])  # one matrix for each layer
        kernel = kernel - expected_rate(n) * (step + 0.1 * kernel)
        updates, state = jax.jit(transform.update)(gradients, state, moved)
        moved = jax.tree.map(jnp.add, moved, updates)
        np.testing.assert_allclose(moved["vae"]["layers"]["kernel"], kernel, rtol=1e-4, atol=1e-5, err_msg=f"{n}")
    # The rest goes as in AdamW with momentum after Nesterov: at first by the sign of the gradients.
    first = optimizers.create(stage_of(1, "joint", config, total=10))
    updates, _ = first.update(gradients, first.init(params), params)
    gradient = gradients["vae"]["no_history"]
    np.testing.assert_allclose(
        updates["vae"]["no_history"], -0.01 * (1 + 0.8 * 0.2 / 0.36) * np.sign(gradient), rtol=1e-3
    )
    assert not [n for n in flat(state) if n.endswith("/nu/vae/layers/kernel")]  # and matrices have one moment


@pytest.mark.parametrize(
    "path, shape, inputs, outputs",
    [
        (("dit", "in_layer", "kernel"), (16, 64), (0,), (1,)),
        (("dit", "layers", "attn_out_proj", "kernel"), (3, 64, 64), (1,), (2,)),
        (("vae", "layers", "qkv_proj", "kernel"), (2, 64, 3, 64), (1,), (3,)),
        (("dit", "layers", "qkv", "kernel"), (3, 64, 3, 4, 16), (1,), (3, 4)),
        (("image_dit", "dual", "mlp_in", "kernel"), (1, 64, 256), (1,), (2,)),
        (("image_dit", "modulations", "modulation", "kernel"), (2, 64, 6, 64), (1,), (3,)),
        (("vae", "encoder", "final_layer", "kernel"), (64, 2, 16), (0,), (2,)),
        (("vae", "decoder", "unpatch_layer", "kernel"), (64, 64, 4), (0,), (1, 2)),
        (("image_vae", "encoder", "level_0_block_0", "conv_in", "kernel"), (3, 3, 16, 16), (0, 1, 2), (3,)),
    ],
)
def test_what_is_a_matrix(path, shape, inputs, outputs):
    keys = tuple(map(jax.tree_util.DictKey, path))
    found = optimizers.matrix_axes(keys, np.zeros(shape))
    assert (tuple(found.reduction_axis), tuple(found.output_axis)) == (inputs, outputs)
    assert optimizers.matrix_axes((*keys[:-1], jax.tree_util.DictKey("bias")), np.zeros(shape[1:])) is None


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_stacked_layer_is_known(name):
    family = families.get(name)
    config = family.resolve(family.config(), 300)
    boxed = jax.eval_shape(family.init(family.model(config), config), jax.random.key(0))
    kernels = [
        (tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)), box)
        for path, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
        if path[-1].key == "kernel"
    ]
    assert len(kernels) >= 5
    for names, box in kernels:
        stacked = bool(set(names) & set(optimizers.STACKED))
        assert stacked == (box.names[0] == "layers"), names


def moments_of_vae(state):
    """First and second moments and Adam's count; not the counters of the steps of the run."""
    return [x for name, x in flat(state.opt_state).items() if "/vae/" in name and not name.endswith("/step")]


def test_fixed_vae_has_no_moments_and_keeps_its_bits():
    state, step, mesh, _ = build(2, "fix_vae")
    before = values(state.params["params"]["vae"])
    dit = values(state.params["params"]["dit"])
    assert not moments_of_vae(state) and not state.frozen
    state, _ = run(state, step, mesh, 5)
    assert same_bits(before, state.params["params"]["vae"])
    assert not same_bits(dit, state.params["params"]["dit"])


def test_interval_freezes_parameters_and_moments():
    state, step, mesh, _ = build(2, "interval", interval=2, optimizer=dataclasses.replace(OPTIMIZER, warmup_steps=0))
    moved, dit_moved = [], []
    for n in range(8):
        before = values((state.params["params"]["vae"], moments_of_vae(state)))
        dit = values(state.params["params"]["dit"])
        state, history = run(state, step, mesh, 1, first=n)
        moved.append(not same_bits(before, (state.params["params"]["vae"], moments_of_vae(state))))
        assert moved[-1] == (history[0]["update_norm/vae"] > 0)
        dit_moved.append(not same_bits(dit, state.params["params"]["dit"]))
    assert len(moments_of_vae(state)) >= 6
    assert moved == [True, True, False, False] * 2 and all(dit_moved)


def test_decayed_names():
    mask = flat(jax.tree_util.tree_map_with_path(optimizers.is_decayed, parameters()["vae"]))
    assert {name for name, decayed in mask.items() if decayed} == {"layers/kernel", "wte"}
