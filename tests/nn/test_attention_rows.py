"""Attention of rows of copies, in both kernels, against attention under a dense mask written out pair by pair."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import assert_close, normal

from cola_jax.models import cola
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import VAEConfig
from cola_jax.nn import attention, splash
from cola_jax.nn.visibility import BlockPlan

HEADS, CHANNELS, BATCH = 2, 4, 2


def allowed(row: int, length: int, blocks, ids) -> np.ndarray:
    """[B, R, R] bool: who sees whom, pair by pair; ``blocks`` [N] are those of a copy's positions."""
    mask = np.zeros((len(ids), row, row), bool)
    for i in range(row):
        for j in range(row):
            (copy, at), (other, place) = divmod(i, length), divmod(j, length)
            earlier = other == 0 and blocks[place] < blocks[at]
            mask[:, i, j] = (earlier or copy == other and blocks[place] == blocks[at]) & (ids[:, i] == ids[:, j])
    return mask


def row_segments(draw, length: int, copies: int, dropped):
    """Documents of random lengths; a block of the noisy copies may have ids of its own (its history is dropped)."""
    ids = np.cumsum(draw.random((BATCH, length)) < 3 / length, axis=1)
    ids = np.tile(ids, (1, 1 + copies))
    if dropped is not None:
        ids[:, dropped] = -1 - ids[:, dropped]
    return ids.astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, arrays, weights):
    value, backward = jax.vjp(function, *arrays)
    return value, backward(weights)


def check(layout, row, mask):
    arrays = [normal(BATCH, row, HEADS, CHANNELS, seed=i) for i in range(3)]
    weights = normal(BATCH, row, HEADS, CHANNELS, seed=9)
    found = value_and_gradients(lambda *x: attention.attend_row(*x, layout), arrays, weights)
    wanted = value_and_gradients(lambda *x: attention.attend(*x, jnp.asarray(mask)), arrays, weights)
    jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), found, wanted)


CASES = [  # length, block size or sizes of blocks, noisy copies: several chunks of 128 in the longer ones
    (5, 2, 0),
    (12, 4, 2),
    (16, 16, 1),
    (136, 1, 0),
    (300, 7, 0),
    (144, 16, 1),
    (270, 10, 1),
    (130, 130, 1),
    (12, (3, 1, 8), 2),
    (10, (2, 2, 5, 3), 0),  # ends inside the last block
    (144, (8,) * 18, 1),
    (282, (16, 16, 100, 1, 1, *(4,) * 37), 1),
    (150, (130, 20, 7), 1),
]


@pytest.mark.parametrize("kernel", ["xla", "splash_interpreted"])
@pytest.mark.parametrize(("length", "sizes", "copies"), CASES)
def test_kernels_equal_dense_attention_values_and_gradients(length, sizes, copies, kernel):
    draw, row = np.random.default_rng(length), length * (1 + copies)
    equal = isinstance(sizes, int)
    blocks = (np.arange(length) // sizes if equal else np.repeat(np.arange(len(sizes)), sizes))[:length]
    dropped = length + np.flatnonzero(blocks == 1) if copies else None
    ids = row_segments(draw, length, copies, dropped)
    plan = BlockPlan.equal(sizes) if equal else BlockPlan.of_sizes(sizes)
    layout = attention.RowLayout(length, plan, jnp.asarray(ids), kernel)
    check(layout, row, allowed(row, length, blocks, ids))


@pytest.mark.parametrize("kernel", ["xla", "splash_interpreted"])
def test_without_segments_all_are_of_one_document(kernel):
    layout = attention.RowLayout(8, BlockPlan.equal(4), None, kernel)
    check(layout, 16, allowed(16, 8, np.arange(8) // 4, np.zeros((BATCH, 16))))


def test_given_sizes_that_are_all_the_same_are_equal_blocks():
    arrays = [normal(BATCH, 288, HEADS, CHANNELS, seed=i) for i in range(3)]
    plans = BlockPlan.equal(16), BlockPlan.of_sizes((16,) * 9)
    equal, given = (jax.jit(attention.attend_row)(*arrays, attention.RowLayout(144, plan)) for plan in plans)
    assert_close(given, equal, 1e-6)


def boolean_sizes(jaxpr):
    return [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.dtype == jnp.bool_]


def test_no_mask_of_all_pairs_is_made():
    arrays = [normal(1, 2 * 512, 1, CHANNELS, seed=i) for i in range(3)]
    for plan in (BlockPlan.equal(16), BlockPlan.of_sizes((*(16,) * 8, 128, *(8,) * 32))):
        layout = attention.RowLayout(512, plan)
        jaxpr = jax.make_jaxpr(lambda *x, layout=layout: attention._xla(*x, layout))(*arrays)
        assert max(boolean_sizes(jaxpr)) <= 512 * 512 // 4  # of 1024 * 1024 pairs


def test_noisy_copies_follow_whole_blocks_only():
    arrays = [normal(BATCH, 20, HEADS, CHANNELS, seed=i) for i in range(3)]
    for plan in (BlockPlan.equal(4), BlockPlan.of_sizes((4, 7))):
        with pytest.raises(ValueError, match="10 positions: must end with a block"):
            attention.attend_row(*arrays, attention.RowLayout(10, plan))


def test_the_splash_kernel_is_made_inside_other_transformations():
    """Flax's scan of an initialisation traces by partial evaluation, which stages even operations on constants."""
    options = {"num_heads": 2, "attention_kernel": "splash_interpreted"}
    vae = VAEConfig(vocab_size=300, dim=16, encoder_layers=2, decoder_layers=2, **options)
    model = cola.create(vae, DiTConfig(dim=16, head_dim=8, rope_dim=4, num_layers=2, remat="full", **options))
    splash._kernel.cache_clear()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
    assert set(shapes["params"]) == {"vae", "dit"}


@pytest.mark.parametrize(
    ("kernel", "channels", "row", "platform", "chosen"),
    [
        ("auto", 128, 512, "tpu", "splash"),
        ("auto", 128, 512, "gpu", "xla"),
        ("auto", 64, 512, "tpu", "xla"),
        ("auto", 128, 64, "tpu", "xla"),
        ("xla", 128, 512, "tpu", "xla"),
        ("splash", 64, 64, "cpu", "splash"),
    ],
)
def test_choice_of_the_kernel(kernel, channels, row, platform, chosen):
    assert attention.choose_kernel(kernel, channels, row, platform) == chosen


def test_the_splash_kernel_runs_on_each_device_s_examples_and_heads():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arrays = [normal(BATCH, 16, HEADS, CHANNELS, seed=i) for i in range(3)]
    layout = attention.RowLayout(8, BlockPlan.equal(4), None, "splash_interpreted")
    expected = jax.jit(attention.attend_row)(*arrays, layout)
    home = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"), ("heads", "tensor"))):
        program = jax.jit(attention.attend_row).lower(*jax.device_put(arrays, home), layout).compile()
    actual = program(*jax.device_put(arrays, home), layout)
    assert_close(actual, expected, 1e-6)
    assert actual.sharding.is_equivalent_to(home, 4)
    assert "all-gather" not in program.as_text()
