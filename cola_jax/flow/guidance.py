"""Classifier-free guidance of a velocity field (SPEC 5)."""

import numpy as np
from jaxtyping import Array, Float


def guide(
    unconditional: Float[Array, "*S"], conditional: Float[Array, "*S"], scale: float | Array
) -> Float[Array, "*S"]:
    """``v = v_uncond + scale (v_cond - v_uncond)``: 0 is unconditional, 1 no guidance, above 1 extrapolates."""
    return unconditional + scale * (conditional - unconditional)


def acts(times: np.ndarray | Array, interval: tuple[float, float]) -> np.ndarray | Array:
    """Whether guidance acts at each of the flow times: inside of the closed interval (low, high)."""
    low, high = interval
    return (low <= times) & (times <= high)
