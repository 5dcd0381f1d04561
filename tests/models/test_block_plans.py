"""Blocks of given sizes, through the whole prior and with caches; who sees whom: `test_causality`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, apply, assert_close, assert_trees_close, create, normal, uniform

from cola_jax.nn import visibility
from cola_jax.nn.visibility import BlockPlan

LENGTH, SIZES = 12, (2, 7, 3)
PLAN, STARTS = BlockPlan.of_sizes(SIZES), (0, 2, 9)
NOISY, CLEAN, TIMES = normal(2, 2 * LENGTH, 4, seed=1), normal(2, LENGTH, 4, seed=2), uniform(2, 6)
OPTIONS = {"block_position": True, "no_history_vector": True}
MODEL = {"dit": OPTIONS}


def velocity(*args, params=None, **kwargs):
    model, own = create(**MODEL)
    return apply(model, own if params is None else params, *args, method="velocity", **kwargs)


def per_latent(times, sizes=SIZES):
    """A time for each latent of as many copies as ``times`` has."""
    return jnp.asarray(np.repeat(times, np.tile(sizes, times.shape[1] // len(sizes)), axis=1))


def test_training_layout_equals_the_whole_sequence_path_block_by_block():
    """Both noisy copies: velocity of block b = that of [clean blocks < b, noisy block b] at times [0 ... 0, t_b]."""
    both = velocity(NOISY, TIMES, history=CLEAN, plan=PLAN)
    for copy in range(2):
        noisy, times = NOISY[:, copy * LENGTH :][:, :LENGTH], TIMES[:, copy * 3 :][:, :3]
        for b, (start, size) in enumerate(zip(STARTS, SIZES, strict=True)):
            here = slice(start, start + size)
            latents = CLEAN.at[:, here].set(noisy[:, here])  # what follows block b does not matter
            alone = velocity(latents, jnp.zeros((2, 3)).at[:, b].set(times[:, b]), plan=PLAN)
            assert_close(both[:, copy * LENGTH :][:, here], alone[:, here], 1e-5)


def test_a_time_for_each_block_is_that_of_its_latents():
    """Three times are of the three blocks, not of three equal stretches; one time is of all."""
    whole, times = NOISY[:, :LENGTH], TIMES[:, :3]
    assert_close(velocity(whole, times, plan=PLAN), velocity(whole, per_latent(times), plan=PLAN), 1e-6)
    expected = velocity(NOISY, per_latent(TIMES), history=CLEAN, plan=PLAN)
    assert_close(velocity(NOISY, TIMES, history=CLEAN, plan=PLAN), expected, 1e-6)
    equal_stretches = per_latent(TIMES, (4, 4, 4))
    assert np.max(np.abs(velocity(NOISY, equal_stretches, history=CLEAN, plan=PLAN) - expected)) > 0.01
    one = velocity(NOISY, TIMES[:, :1], history=CLEAN, plan=PLAN)
    assert_close(one, velocity(NOISY, jnp.tile(TIMES[:, :1], (1, 6)), history=CLEAN, plan=PLAN), 1e-6)


def test_pinned_positions_are_at_time_zero():
    pinned = jnp.asarray(np.random.default_rng(0).random((2, 2 * LENGTH)) < 0.4)
    times = jnp.where(pinned, 0.0, per_latent(TIMES))
    actual = velocity(NOISY, TIMES, history=CLEAN, pinned=pinned, plan=PLAN)
    assert_close(actual, velocity(NOISY, times, history=CLEAN, plan=PLAN), 1e-6)


@pytest.mark.parametrize("unroll", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_given_sizes_that_are_all_the_same_are_equal_blocks(unroll):
    """Values and gradients, with the layers as a loop and one by one."""
    model, params = create(dit=OPTIONS | {"unroll": unroll})
    dropped = jnp.zeros((2, 6), bool).at[1, 4].set(True)

    def loss(plan, params, noisy, clean, times):
        options = {"drop_history": dropped, "plan": plan}
        out = model.apply(params, noisy, times, history=clean, method="velocity", **options)
        whole = model.apply(params, clean, times[:, :3], method="velocity", plan=plan)
        return jnp.sum(out**2) + jnp.sum(whole**2)

    arguments = ({"params": {"dit": params["params"]["dit"]}}, NOISY, CLEAN, TIMES)
    plans = None, BlockPlan.equal(BLOCK), BlockPlan.of_sizes((BLOCK,) * 3)
    default, equal, given = (
        jax.jit(jax.value_and_grad(loss, (1, 2, 3, 4)), static_argnums=0)(p, *arguments) for p in plans
    )
    jax.tree.map(np.testing.assert_array_equal, equal, default)
    assert_trees_close(given, default, 2e-6)


def test_the_index_inside_the_block_repeats_itself_in_longer_blocks():
    """Without rotations only the learned index tells positions apart: it has four values, the block seven."""
    model, params = create(dit=OPTIONS | {"rope_dim": 0})
    z = jnp.broadcast_to(normal(1, 1, 4), (1, 9, 4))
    out = apply(model, params, z, jnp.full((1, 1), 0.5), plan=BlockPlan.of_sizes((2, 7)), method="velocity")[0, 2:]
    assert_close(out[4:], out[:3], 1e-5)
    assert all(np.max(np.abs(out[i] - out[j])) > 0.01 for i in range(4) for j in range(i))


def test_the_index_inside_the_block_begins_with_the_block():
    """A block that sees no history is the same behind a first block of any size."""
    model, params = create(dit=OPTIONS | {"rope_dim": 0})

    def behind(first):
        z, dropped = jnp.concatenate([CLEAN[:, :first], NOISY[:, :7]], axis=1), jnp.ones((2, 2), bool)
        options = {"history": z, "drop_history": dropped, "plan": BlockPlan.of_sizes((first, 7))}
        return apply(model, params, z, jnp.full((2, 1), 0.5), method="velocity", **options)[:, first:]

    assert_close(behind(2), behind(3), 1e-5)


def test_cached_blocks_equal_the_training_layout():
    """The middle block after the first, with the unconditional branch behind it; then both of them in one pass."""
    model, params = create(**MODEL)
    prefilled = apply(model, params, CLEAN, jnp.ones((2, LENGTH), jnp.int32), plan=PLAN, method="history")
    held = jnp.broadcast_to(jnp.arange(LENGTH)[None] < 2, (2, LENGTH))
    cache = jax.tree.map(lambda x: jnp.where(held[None, :, None, :, None], x, 7.0), prefilled)
    block = NOISY[:, 2:9]
    dropped = jnp.zeros((2, 6), bool).at[:, 4].set(True)
    noisy = jnp.concatenate([NOISY[:, :LENGTH]] * 2, axis=1)
    times = jnp.tile(TIMES[:, :3], (1, 2))
    expected = velocity(noisy, times, history=CLEAN, drop_history=dropped, plan=PLAN)
    positions = jnp.broadcast_to(jnp.arange(2, 9)[None], (2, 7))
    twice = [jnp.concatenate([x, x], axis=1) for x in (block, positions)]
    one_block = visibility.block_causal(BlockPlan.equal(7), 7)
    extend = lambda *args: apply(model, params, *args, plan=PLAN, method="extend")[0]  # noqa: E731
    out = extend(twice[0], times[:, 1], twice[1], cache, held, one_block)
    assert_close(out[:, :7], expected[:, 2:9], 1e-5)
    assert_close(out[:, 7:], expected[:, LENGTH + 2 : LENGTH + 9], 1e-5)

    latents = jnp.concatenate([CLEAN[:, :2], block], axis=1)
    positions = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    pinned = positions < 2
    nothing, own = jnp.zeros_like(held), visibility.block_causal(PLAN, 9)
    assert_close(extend(latents, times[:, 1], positions, cache, nothing, own, pinned)[:, 2:], out[:, :7], 1e-5)


def test_decoding_with_a_cache_equals_decoding_the_whole():
    model, params = create({"attention": "block_causal"})
    z = normal(2, LENGTH, 4)
    whole = apply(model, params, z, plan=PLAN, method="decode")
    ones = jnp.ones((2, LENGTH), jnp.int32)
    _, cache = apply(model, params, z, ones, decoder_plan=PLAN, method="prefill")
    held = jnp.broadcast_to(jnp.arange(LENGTH)[None] < 2, (2, LENGTH))
    positions = jnp.broadcast_to(jnp.arange(2, 12)[None], (2, 10))
    rest = BlockPlan.of_sizes(SIZES[1:])
    logits, _ = apply(model, params, z[:, 2:], cache, held, positions, plan=rest, method="decode_next")
    assert_close(logits, whole[:, 2:], 1e-5)
