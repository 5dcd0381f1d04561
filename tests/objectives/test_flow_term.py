"""Flow matching with a model that records what it is given and answers what it is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, assert_close, dit_config, normal

from cola_jax import rng
from cola_jax.fields import check
from cola_jax.flow.path import PATHS
from cola_jax.objectives import stage2
from cola_jax.objectives.stage2 import Stage2Config
from cola_jax.types import UserError
from tests.flow.gaussian import CURVES

BATCH, LENGTH, BLOCKS, CHANNELS = 8, 12, 3, 4
Z = normal(BATCH, LENGTH, CHANNELS, seed=1)
SEGMENTS = jnp.array([[1] * LENGTH] * 5 + [[1] * 9 + [0] * 3, [1] * 4 + [2] * 8, [1] * 2 + [0] * 10])
KEYS = rng.key(0, "train", 0, jnp.arange(BATCH))
PLAIN = Stage2Config(prompt_blocks=0.0)


class Spy:
    """Stands for a model; the velocity is a function of (noisy, history)."""

    dit_config = dit_config()

    def __init__(self, velocity=lambda noisy, history: jnp.zeros_like(noisy)):
        self.velocity = velocity

    def apply(self, params, noisy, times, *, method, history, **kwargs):
        assert method == "velocity"
        self.noisy, self.times, self.history, self.kwargs = noisy, times, history, kwargs
        return self.velocity(noisy, history)


def run(stage=PLAIN, velocity=None, z=Z, keys=KEYS, segments=SEGMENTS, frozen=False):
    spy = Spy(velocity) if velocity else Spy()
    term = stage2.flow_terms(spy, stage, None, z, segments, keys, frozen)["flow"]
    return spy, term


def noise_of(spy, z):
    """What was mixed into the latents: z_t = (1 - t) z + t noise."""
    t = np.repeat(np.asarray(spy.times, np.float64), BLOCK, axis=1)[..., None]
    return (np.asarray(spy.noisy, np.float64) - (1 - t) * np.asarray(z, np.float64)) / t


def test_the_term_is_the_squared_error_against_noise_minus_data():
    velocity = normal(BATCH, LENGTH, CHANNELS, seed=5)
    spy, term = run(velocity=lambda noisy, history: velocity)
    errors = (np.asarray(velocity) - (noise_of(spy, Z) - np.asarray(Z))) ** 2
    real = np.asarray(SEGMENTS > 0)
    assert_close(term.value, (errors.mean(-1) * real).sum(1), 1e-4)
    np.testing.assert_array_equal(term.weight, real.sum(1))
    assert term.coefficient == PLAIN.flow_weight
    np.testing.assert_array_equal(spy.history, Z)
    np.testing.assert_array_equal(spy.kwargs["segment_ids"], SEGMENTS)


@pytest.mark.parametrize("path", PATHS)
def test_the_term_on_every_path(path):
    """The noise and times are those that the linear path has for the same keys."""
    velocity = normal(BATCH, LENGTH, CHANNELS, seed=5)
    noise, z = noise_of(run()[0], Z), np.asarray(Z, np.float64)
    spy, term = run(dataclasses.replace(PLAIN, path=path), lambda noisy, history: velocity)
    t = np.repeat(np.asarray(spy.times, np.float64), BLOCK, axis=1)[..., None]
    signal, signal_slope, weight, weight_slope = CURVES[path](t)
    assert_close(spy.noisy, signal * z + weight * noise, 1e-5)
    errors = (np.asarray(velocity) - (signal_slope * z + weight_slope * noise)) ** 2
    assert_close(term.value, (errors.mean(-1) * np.asarray(SEGMENTS > 0)).sum(1), 1e-4)


def test_the_noise_is_standard_normal():
    keys = rng.key(0, "train", 1, jnp.arange(200))
    z = normal(200, LENGTH, CHANNELS)
    spy, _ = run(z=z, keys=keys, segments=jnp.ones((200, LENGTH), jnp.int32))
    noise = noise_of(spy, z)
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03  # 9600 draws: 4 standard errors
    assert abs(np.corrcoef(noise.ravel(), np.asarray(z).ravel())[0, 1]) < 0.04


def test_a_time_for_each_block_or_one_for_the_sequence():
    spy, _ = run()
    assert spy.times.shape == (BATCH, BLOCKS) and len(np.unique(spy.times)) == BATCH * BLOCKS
    spy, _ = run(dataclasses.replace(PLAIN, time_per="sequence", noise_copies=2))
    copies = np.asarray(spy.times).reshape(BATCH, 2, BLOCKS)
    assert np.all(copies == copies[:, :, :1])
    assert len(np.unique(copies)) == BATCH * 2


def test_noise_copies_have_their_own_noise_and_times_and_one_history():
    spy, term = run(dataclasses.replace(PLAIN, noise_copies=3))
    assert spy.noisy.shape == (BATCH, 3 * LENGTH, CHANNELS) and spy.times.shape == (BATCH, 3 * BLOCKS)
    assert spy.history.shape == Z.shape
    assert len(np.unique(spy.times)) == BATCH * 3 * BLOCKS
    noise = noise_of(spy, np.tile(Z, (1, 3, 1)))
    assert len(np.unique(np.round(noise, 4))) > 0.9 * noise.size
    np.testing.assert_array_equal(term.weight, 3 * np.sum(SEGMENTS > 0, axis=1))


def test_prompt_blocks_keep_a_proper_prefix_clean_and_carry_no_loss_there():
    stage = dataclasses.replace(PLAIN, prompt_blocks=1.0, noise_copies=2)
    spy, term = run(stage)
    pinned = np.asarray(spy.kwargs["pinned"])
    sizes = pinned.reshape(-1, BLOCK).sum(1)
    assert set(sizes) == set(range(1, BLOCK))
    np.testing.assert_array_equal(pinned.reshape(-1, BLOCK), np.arange(BLOCK)[None] < sizes[:, None])
    data = np.tile(Z, (1, 2, 1))
    np.testing.assert_array_equal(np.asarray(spy.noisy)[pinned], data[pinned])
    assert np.all(np.asarray(spy.noisy)[~pinned] != data[~pinned])
    np.testing.assert_array_equal(term.weight, (np.tile(SEGMENTS > 0, (1, 2)) & ~pinned).sum(1))
    # A wrong velocity at pinned positions costs nothing; anywhere else it does.
    _, wrong_there = run(stage, lambda noisy, history: jnp.where(pinned[..., None], 9.0, 0.0))
    np.testing.assert_array_equal(wrong_there.value, term.value)
    _, wrong_elsewhere = run(stage, lambda noisy, history: jnp.where(pinned[..., None], 0.0, 9.0))
    np.testing.assert_array_equal(wrong_elsewhere.value != term.value, np.asarray(term.weight) > 0)


@pytest.mark.parametrize("field", ["prompt_blocks", "history_dropout"])
def test_share_of_prompt_and_dropped_blocks(field):
    stage = dataclasses.replace(PLAIN, **{field: 0.3}, noise_copies=4)
    keys, z = rng.key(0, "train", 2, jnp.arange(100)), normal(100, LENGTH, CHANNELS)
    spy, _ = run(stage, z=z, keys=keys, segments=jnp.ones((100, LENGTH), jnp.int32))
    if field == "prompt_blocks":
        assert spy.kwargs["drop_history"] is None
        chosen = np.asarray(spy.kwargs["pinned"]).reshape(-1, BLOCK)[:, 0]
    else:
        assert spy.kwargs["pinned"] is None
        chosen = np.asarray(spy.kwargs["drop_history"])
        assert chosen.shape == (100, 4 * BLOCKS)
    assert abs(chosen.mean() - 0.3) < 0.055  # 1200 blocks: 4 standard errors


def test_times_follow_the_config():
    keys, z = rng.key(0, "train", 3, jnp.arange(100)), normal(100, LENGTH, CHANNELS)
    segments = jnp.ones((100, LENGTH), jnp.int32)
    for stage, median in (
        (dataclasses.replace(PLAIN, time_loc=2.0, time_scale=0.1), 1 / (1 + np.exp(-2.0))),
        (dataclasses.replace(PLAIN, time_distribution="uniform"), 0.5),
    ):
        spy, _ = run(stage, z=z, keys=keys, segments=segments)
        assert abs(np.median(spy.times) - median) < 0.08


def test_times_uniform_in_the_log_snr_of_the_path():
    stage = dataclasses.replace(
        PLAIN, path="trigonometric", time_distribution="uniform_log_snr", time_log_snr_min=-3.0, time_log_snr_max=5.0
    )
    keys, z = rng.key(0, "train", 3, jnp.arange(100)), normal(100, LENGTH, CHANNELS)
    spy, _ = run(stage, z=z, keys=keys, segments=jnp.ones((100, LENGTH), jnp.int32))
    signal, _, noise, _ = CURVES["trigonometric"](np.asarray(spy.times, np.float64))
    values = np.log(signal**2 / noise**2)
    assert -3.001 < values.min() < -2.8 and 4.8 < values.max() < 5.001
    assert abs(np.median(values) - 1.0) < 0.95  # 300 draws: 4 standard errors


@pytest.mark.parametrize("per", ["block", "sequence"])
def test_times_on_the_training_grid(per):
    spy, _ = run(dataclasses.replace(PLAIN, time_grid=5, time_per=per))
    continuous, _ = run(dataclasses.replace(PLAIN, time_per=per))
    np.testing.assert_allclose(spy.times, np.round(np.asarray(continuous.times) * 5) / 5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "cubic"}, "stage2.path = 'cubic': must be one of 'linear', 'trigonometric', 'quadratic'"),
        ({"time_grid": -1}, "stage2.time_grid = -1: must be at least 0"),
        ({"time_log_snr_min": 10.0}, "stage2.time_log_snr_min = 10.0: must be below time_log_snr_max = 10.0"),
        ({"time_distribution": "normal"}, "must be one of 'logit_normal', 'uniform', 'uniform_log_snr'"),
    ],
)
def test_a_bad_choice_of_path_or_times_is_told(changes, message):
    with pytest.raises(UserError) as error:
        check(dataclasses.replace(PLAIN, **changes), "stage2.")
    assert message in str(error.value)


def gradient(stage, velocity, frozen=False):
    return jax.grad(lambda z: jnp.sum(run(stage, velocity, z, frozen=frozen)[1].value))(Z)


def test_history_gives_no_gradient():
    """A velocity that reads the history only: what is left is the gradient of the target, z_1 - z_0."""
    spy, _ = run()
    actual = gradient(PLAIN, lambda noisy, history: 5 * history)
    errors = 5 * np.asarray(Z) - (noise_of(spy, Z) - np.asarray(Z))
    expected = 2 / CHANNELS * errors * np.asarray(SEGMENTS > 0)[..., None]
    assert_close(actual, expected, 1e-4)


def test_noisy_latents_and_target_give_a_gradient_where_told():
    """A velocity of 3 z_t: the derivative of 3 (1 - t) z + z."""
    spy, _ = run()
    t = np.repeat(np.asarray(spy.times), BLOCK, axis=1)[..., None]
    errors = 3 * np.asarray(spy.noisy) - (noise_of(spy, Z) - np.asarray(Z))
    expected = 2 / CHANNELS * errors * (3 * (1 - t) + 1) * np.asarray(SEGMENTS > 0)[..., None]
    assert_close(gradient(PLAIN, lambda noisy, history: 3 * noisy), expected, 1e-4)


def test_the_clean_part_of_a_prompt_block_gives_no_gradient():
    """It is a condition, as the history is (17.1), whatever the rest of its block makes of it."""
    stage = dataclasses.replace(PLAIN, prompt_blocks=1.0)
    pinned = np.asarray(run(stage)[0].kwargs["pinned"])
    actual = gradient(stage, lambda noisy, history: noisy + jnp.sum(noisy, axis=1, keepdims=True))
    assert pinned.any()
    np.testing.assert_array_equal(actual[pinned], 0.0)
    assert np.all(np.any(actual[~pinned & np.asarray(SEGMENTS > 0)] != 0, axis=-1))


def test_no_gradient_where_switched_off_or_frozen():
    both = lambda noisy, history: 3 * noisy + history  # noqa: E731
    off = dataclasses.replace(PLAIN, encoder_gradient=False)
    np.testing.assert_array_equal(gradient(off, both), 0.0)
    np.testing.assert_array_equal(gradient(PLAIN, both, frozen=True), 0.0)
    assert np.any(gradient(PLAIN, both) != 0)
