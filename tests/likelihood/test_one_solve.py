"""The one solve for all blocks of a model against separate solves through the training layout, and a dense Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax.flow import density as flow_density
from cola_jax.likelihood import Settings, density, geometry
from tests.models import tiny_models
from tests.models.tiny_models import BLOCK, CHANNELS

SETTINGS = Settings(solver="heun", steps=6, divergence="exact")
BATCH, BLOCKS = 2, 3
LENGTH = BLOCKS * BLOCK
SIZE = LENGTH * CHANNELS


@pytest.fixture(scope="module")
def tiny():
    return tiny_models.create(dit={"block_position": True})


@pytest.fixture(scope="module")
def latents():
    return tiny_models.normal(BATCH, LENGTH, CHANNELS, seed=5)


ALL = jnp.ones((BATCH, LENGTH), jnp.int32)
NONE = jnp.zeros((BATCH, LENGTH), bool)


def solve(tiny, latents, segments=ALL, pinned=NONE):
    """Always the same program."""
    return density.log_prob(*tiny, latents, SETTINGS, None, segments, pinned)


@pytest.fixture(scope="module")
def solved(tiny, latents):
    return solve(tiny, latents)


@pytest.fixture(scope="module")
def dense(tiny):
    """Velocity and Jacobian of a whole sequence in the training layout: all noisy blocks against the clean copy."""
    model, params = tiny

    @jax.jit
    def value_and_jacobian(z, t, history, segments, pinned):
        def velocity(z):
            noisy = z.reshape(1, LENGTH, CHANNELS)
            times = jnp.full((1,), t)
            v = model.apply(
                params, noisy, times, history=history[None], pinned=pinned, segment_ids=segments, method="velocity"
            )
            return v.reshape(-1)

        return velocity(z), jax.jacfwd(velocity)(z)

    return value_and_jacobian


def expected(dense, latents, row, segments=ALL, pinned=NONE, free=None):
    """End and log-density of the free elements (flat) by Heun's method on the dense Jacobian."""
    free = np.ones(SIZE, bool) if free is None else free
    z, change, steps = latents[row].reshape(-1), 0.0, SETTINGS.steps

    def field(z, t):
        value, jacobian = dense(z, t, latents[row], segments[row : row + 1], pinned[row : row + 1])
        return jnp.where(free, value, 0.0), jnp.sum(jnp.where(free, jnp.diag(jacobian), 0.0))

    for t in np.linspace(0, 1, steps + 1)[:-1]:
        v0, d0 = field(z, t)
        v1, d1 = field(z + v0 / steps, t + 1 / steps)
        z, change = z + (v0 + v1) / (2 * steps), change + (d0 + d1) / (2 * steps)
    return z, float(-0.5 * (jnp.sum(jnp.where(free, z**2, 0.0)) + free.sum() * np.log(2 * np.pi)) + change)


def test_one_solve_equals_a_dense_jacobian_of_the_whole_sequence(dense, latents, solved):
    for row in range(BATCH):
        end, log_prob = expected(dense, latents, row)
        assert float(jnp.sum(solved.log_prob[row])) == pytest.approx(log_prob, rel=1e-5)
        np.testing.assert_allclose(solved.noise[row].reshape(-1), end, atol=1e-5)


def test_the_jacobian_is_block_diagonal(dense, latents):
    z = tiny_models.normal(SIZE, seed=8)
    jacobian = np.asarray(dense(z, 0.4, latents[0], ALL[:1], NONE[:1])[1])
    block = np.arange(SIZE) // (BLOCK * CHANNELS)
    same = block[:, None] == block[None]
    assert np.all(jacobian[~same] == 0) and np.abs(jacobian[same]).min() > 0


def test_one_solve_equals_block_by_block_solves(tiny, latents, solved):
    """Each block alone in time: the others stay where they are, in the training layout."""
    model, params = tiny

    def log_prob(history, block):
        def velocity(z, t):
            noisy = jnp.where(block[:, None], z, history)
            return model.apply(params, noisy[None], t[None], history=history[None], method="velocity")[0]

        flow = flow_density.transport(velocity, history, SETTINGS.method, free=block)
        return flow_density.log_prob(flow, block)

    by_block = jnp.arange(LENGTH)[None] // BLOCK == jnp.arange(BLOCKS)[:, None]
    found = jax.jit(jax.vmap(log_prob, (None, 0)))(latents[0], by_block)
    np.testing.assert_allclose(solved.log_prob[0], found, rtol=1e-5, atol=1e-5)


def test_padding_does_not_count(tiny, dense, latents):
    """A document that ends inside a block: its real positions alone, whatever the padding holds."""
    segments = (jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [BLOCK + 1]])).astype(jnp.int32)
    other = jnp.where(segments[..., None] > 0, latents, 7.0)
    found, same = solve(tiny, latents, segments), solve(tiny, other, segments)
    np.testing.assert_array_equal(found.log_prob, same.log_prob)
    assert np.all(found.log_prob[1, 2:] == 0) and np.all(found.log_prob[1, :2] != 0)
    _, log_prob = expected(dense, latents, 1, segments, free=np.repeat(np.asarray(segments[1]) > 0, CHANNELS))
    assert float(found.log_prob[1].sum()) == pytest.approx(log_prob, rel=1e-5)


def test_pinned_positions_are_data_at_time_zero(tiny, dense, latents):
    """The density of the free part of a block, given its pinned part."""
    pinned = NONE.at[:, BLOCK : BLOCK + 2].set(True)
    found = solve(tiny, latents, pinned=pinned)
    np.testing.assert_array_equal(found.noise[:, BLOCK : BLOCK + 2], latents[:, BLOCK : BLOCK + 2])
    free = np.zeros((LENGTH, CHANNELS), bool)
    free[BLOCK + 2 : 2 * BLOCK] = True
    _, log_prob = expected(dense, latents, 0, pinned=pinned, free=free.reshape(-1))
    assert float(found.log_prob[0, 1]) == pytest.approx(log_prob, rel=1e-5)


def test_float64_goes_through_the_whole_network(tiny, latents):
    """A change below float32's resolution passes through linearly."""
    with jax.enable_x64(True):
        model, params = density.precise(*tiny, Settings(dtype="float64"))

        @jax.jit
        def run(clean):
            cache = model.apply(params, clean, ALL[:1], method="history")
            cache = jax.tree.map(lambda x: x[:, 0], cache)
            real = jnp.ones(BLOCK, bool)
            field = density.block_velocity(model, params, cache, jnp.int32(1), real, ~real)
            z, t, step = clean[0, BLOCK : 2 * BLOCK], jnp.asarray(0.3, jnp.float64), 1e-10
            slope = jax.jvp(lambda x: field(x, t), (z,), (jnp.ones_like(z),))[1]
            return (field(z + step, t) - field(z - step, t)) / (2 * step), slope

        found, slope = run(latents[:1].astype(jnp.float64))
        assert slope.dtype == jnp.float64
        np.testing.assert_allclose(found, slope, atol=1e-4)


@pytest.mark.slow
def test_a_bfloat16_model_has_its_density_in_the_dtype_of_the_settings(tiny, latents, solved):
    model, params = tiny_models.create(dit={"block_position": True}, dtype="bfloat16")
    found = solve((model, params), latents)
    assert found.log_prob.dtype == jnp.float32
    np.testing.assert_allclose(found.log_prob, solved.log_prob, rtol=1e-6)
    place = geometry.token(model, params, list(range(1, LENGTH + 1)), LENGTH - 1)
    points = place.mean[None] + tiny_models.normal(2, CHANNELS)
    both = (geometry.prior_log_prob(m, params, place, points, SETTINGS) for m in (model, tiny[0]))
    np.testing.assert_allclose(*both, rtol=1e-6)


@pytest.mark.slow
def test_a_bfloat16_model_that_predicts_means_has_the_density_of_its_float32_clone(latents):
    model, params = tiny_models.create(dit={"prediction": "mean", "prediction_variance": 0.1}, dtype="bfloat16")
    found, expected = (
        solve((one, params), latents).log_prob for one in (model, model.clone(dtype=jnp.dtype("float32")))
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_probes_are_those_of_the_settings():
    key = jax.random.key(3)
    assert density.draw_probes(key, SETTINGS, (4, 2)) is None
    single = density.draw_probes(key, Settings(), (4, 2))
    assert single.shape == (1, 4, 2) and set(np.unique(single)) == {-1.0, 1.0}
    with jax.enable_x64(True):
        several = density.draw_probes(key, Settings(probe="gaussian", probes=3, dtype="float64"), (4, 2))
    assert several.shape == (3, 4, 2) and several.dtype == jnp.float64 and len(np.unique(several)) == 24
