import jax.numpy as jnp
import numpy as np
from models.tiny_models import assert_close, normal

from cola_jax.nn.convolution import Convolution, depth_to_space, space_to_depth


def test_a_convolution_is_the_sum_over_neighbours():
    x, kernel, bias = (np.asarray(normal(*shape)) for shape in ((2, 4, 5, 3), (3, 3, 3, 2), (2,)))
    padded, expected = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros((2, 4, 5, 2))
    for i in range(4):
        for j in range(5):
            expected[:, i, j] = np.einsum("bhwc,hwcf->bf", padded[:, i : i + 3, j : j + 3], kernel) + bias
    layer = Convolution(2, ("embed", "mlp"))
    assert_close(layer.apply({"params": {"kernel": kernel, "bias": bias}}, jnp.asarray(x)), expected, 1e-5)


def test_space_to_depth_puts_squares_together_row_by_row():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3).astype(np.float32)
    packed = space_to_depth(jnp.asarray(x), 2)
    np.testing.assert_array_equal(packed[1, 1, 2], x[1, 2:4, 4:6].ravel())
    np.testing.assert_array_equal(depth_to_space(packed, 2), x)
