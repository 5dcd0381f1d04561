"""Likelihood of texts given what stands before them."""

import jax
import jax.numpy as jnp
import numpy as np
from models import tiny_unified

from cola_jax import likelihood
from cola_jax.likelihood import density
from cola_jax.models.unified import with_before
from cola_jax.objectives.unified import before_of

SETTINGS = likelihood.Settings(samples=2, divergence="exact", solver="euler", steps=3, dtype="float32")


def test_each_row_is_scored_given_its_own_image():
    model, params = tiny_unified.make()
    batch = tiny_unified.batch(rows=2)
    before = before_of(model, params, batch)
    score = lambda p, rows, ids: likelihood.log_likelihood(  # noqa: E731
        model, p, np.asarray(batch["tokens"])[rows], SETTINGS, jax.random.key(3), ids=ids
    )
    together = score(with_before(params, before), [0, 1], [0, 1])
    for index in range(2):
        own = with_before(params, jax.tree.map(lambda x: x, before_of(model, params, _row(batch, index))))
        alone = score(own, [index], [index])
        np.testing.assert_allclose(alone.log_weights[0], together.log_weights[index], rtol=1e-4, atol=1e-3)
    swapped = with_before(params, before_of(model, params, {**batch, "image": batch["image"][::-1]}))
    other, nothing = score(swapped, [0, 1], [0, 1]), score(params, [0, 1], [0, 1])
    assert np.abs(other.prior - together.prior).min() > 1e-3
    assert np.abs(nothing.prior - together.prior).min() > 1e-3
    np.testing.assert_allclose(other.reconstruction, together.reconstruction, rtol=1e-5)


def _row(batch, index):
    return {name: value[index : index + 1] for name, value in batch.items()}


def test_the_field_of_a_block_is_that_of_training():
    """One Euler step of each block's density, beside the velocity of the training layout."""
    model, params = tiny_unified.make()
    batch = tiny_unified.batch(rows=2)
    variables = with_before(params, before_of(model, params, batch))
    z = jax.random.normal(jax.random.key(1), (2, 8, 4))
    settings = likelihood.Settings(divergence="exact", solver="euler", steps=1, dtype="float32")
    found = density.log_prob(model, variables, z, settings)
    velocity = model.apply(variables, z, jnp.zeros(2), history=z, method="velocity")
    np.testing.assert_allclose(found.noise, z + velocity, rtol=1e-4, atol=1e-4)
