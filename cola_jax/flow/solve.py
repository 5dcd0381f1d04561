"""Integrating a flow: solvers by name, time grids, fixed steps (SPEC 5)."""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# A velocity field (z, t) -> dz/dt.
Velocity = Callable[[Array, Array], Array]

SOLVERS = {
    "euler": diffrax.Euler,
    "heun": diffrax.Heun,
    "midpoint": diffrax.Midpoint,
    "ralston": diffrax.Ralston,
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}
# Those that `step` takes too: they need the velocity only at the times of the grid.
STEPPERS = ("euler", "heun")


class Grid(NamedTuple):
    """Where the steps of a solver end.

    Attributes:
      shift: 1 leaves the spacing; otherwise t becomes ``shift t / (1 + (shift - 1) t)``, which spends more steps near
        the noise (above 1) or near the data (below 1). On the linear path it adds ``-2 log(shift)`` to the log-SNR.
      power: before the shift, t becomes ``t ** power``: above 1, steps are finer near the data.
      start, stop: the first and the last flow time, in [0, 1]; 1 (noise) down to 0 (data), or up. ``shift`` and
        ``power`` act on the share of the way from the smaller to the larger.
    """

    shift: float = 1.0
    power: float = 1.0
    start: float = 1.0
    stop: float = 0.0

    def times(self, steps: int) -> Float[np.ndarray, " T"]:
        """``steps + 1`` times in float64, from ``start`` to ``stop``."""
        down = self.start > self.stop
        times = self.at(np.linspace(1.0 if down else 0.0, 0.0 if down else 1.0, steps + 1))
        times[[0, -1]] = self.start, self.stop
        return times

    def at(self, share):
        """Times at shares of the way from the smaller time to the larger, in equal steps; an array of either kind."""
        low, high = sorted((self.start, self.stop))
        share = share**self.power
        return low + (high - low) * self.shift * share / (1.0 + (self.shift - 1.0) * share)


class Method(NamedTuple):
    """How an ODE is solved.

    Attributes:
      solver: one of `SOLVERS`.
      steps: fixed steps; 0: step sizes follow the tolerances.
      shift, power: of the fixed steps; see `Grid`.
      rtol, atol: tolerances of the adaptive steps.
      max_steps: rejected ones included, after which a solve has failed.
    """

    solver: str = "dopri5"
    steps: int = 0
    shift: float = 1.0
    power: float = 1.0
    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = 1000


def step(solver: str, velocity: Velocity, z, now, following, v=None) -> jax.Array:
    """One step of a fixed-step solver ("euler", "heun") from time ``now`` to ``following``.

    Args:
      solver: one of `STEPPERS`.
      velocity: the field.
      z: state at ``now``.
      now, following: flow times.
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
      velocity: the field.
      z: state at the first time.
      times: flow times, falling (to data) or rising (to noise).
      solver: one of `SOLVERS`.
    """
    times = jnp.asarray(times)
    if solver in STEPPERS:

        def body(z, pair):
            return step(solver, velocity, z, *pair), None

        return jax.lax.scan(body, z, (times[:-1], times[1:]))[0]
    term = diffrax.ODETerm(lambda t, z, _: velocity(z, t))
    controller = diffrax.StepTo(ts=times)
    solution = diffrax.diffeqsolve(
        term, SOLVERS[solver](), times[0], times[-1], None, z, stepsize_controller=controller, max_steps=len(times)
    )
    return solution.ys[-1]
