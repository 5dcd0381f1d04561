"""Integrating the flow from noise to data."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

# A velocity field (z, t) -> dz/dt.
Velocity = Callable[[jax.Array, jax.Array], jax.Array]

_DIFFRAX = {
    "midpoint": diffrax.Midpoint,
    "ralston": diffrax.Ralston,
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}
STEPPERS = ("euler", "heun")
SOLVERS = (*STEPPERS, *_DIFFRAX)


def time_grid(steps: int, shift: float = 1.0, start: float = 1.0) -> np.ndarray:
    """``steps + 1`` times from ``start`` (1: noise) down to 0 (data).

    Args:
      steps: at least 1.
      shift: 1 spaces the times evenly; otherwise t becomes ``shift t / (1 + (shift - 1) t)``, which spends more
        steps near the noise (above 1) or near the data (below 1).
      start: the first time, in (0, 1].
    """
    times = np.linspace(1.0, 0.0, steps + 1)
    return (start * shift * times / (1.0 + (shift - 1.0) * times)).astype(np.float32)


def step(solver: str, velocity: Velocity, z, now, following, v=None) -> jax.Array:
    """One step of a fixed-step solver ("euler", "heun") from time ``now`` to ``following``.

    Args:
      v: ``velocity(z, now)`` where it is known already.
    """
    dt = following - now
    v = velocity(z, now) if v is None else v
    if solver == "euler":
        return z + dt * v
    return z + 0.5 * dt * (v + velocity(z + dt * v, following))


def integrate(velocity: Velocity, z: jax.Array, times, solver: str = "euler") -> jax.Array:
    """``dz/dt = velocity(z, t)`` along ``times`` (first to last), a step of the solver between neighbours.

    Args:
      solver: one of `SOLVERS`; all but the first two are diffrax's.
    """
    times = jnp.asarray(times)
    if solver in STEPPERS:

        def body(z, pair):
            return step(solver, velocity, z, *pair), None

        return jax.lax.scan(body, z, (times[:-1], times[1:]))[0]
    term = diffrax.ODETerm(lambda t, z, _: velocity(z, t))
    controller = diffrax.StepTo(ts=times)
    solution = diffrax.diffeqsolve(
        term, _DIFFRAX[solver](), times[0], times[-1], None, z, stepsize_controller=controller, max_steps=len(times)
    )
    return solution.ys[-1]
