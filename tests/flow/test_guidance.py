import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import normal

from cola_jax.flow import guidance

FREE, CONDITIONAL = normal(2, 3), normal(2, 3, seed=1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.0])
def test_guidance_is_on_the_line_through_both(scale):
    free, conditional = (np.asarray(x, np.float64) for x in (FREE, CONDITIONAL))
    found = guidance.guide(FREE, CONDITIONAL, scale)
    np.testing.assert_allclose(found, (1 - scale) * free + scale * conditional, atol=1e-5)


def test_the_interval_is_closed():
    times = np.array([0.0, 0.25, 0.5, 0.75, 1.0], np.float32)
    np.testing.assert_array_equal(guidance.acts(times, (0.25, 0.75)), [False, True, True, True, False])
    assert guidance.acts(jnp.asarray(0.5), (0.5, 1.0)) and not guidance.acts(jnp.asarray(0.4), (0.5, 1.0))
