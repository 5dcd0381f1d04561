"""Density under a flow: the augmented ODE of a continuous normalizing flow (3.8-3.11, 10.23-10.25).

The flow runs from data (t = 0) to noise (t = 1): ``d/dt [z, l] = [v, div v]`` with ``l(0) = 0``, and
``log p(z_0) = log N(z_1; 0, I) + l(1)``. The path on which v was learned does not enter: every path ends in N(0, I).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax.flow import solve
from cola_jax.flow.path import Curve
from cola_jax.types import Key

# Tangents that the exact divergence pushes through one block at a time.
_TANGENTS = 64


class Flow(NamedTuple):
    """Where the ODE ends, or ends for each of many.

    Attributes:
      end: z at the last time.
      change: the integral of the divergence, nats.
      ok: False where the solver gave up (too many steps) or the result is not finite.
      steps: solver steps, rejected ones included.
    """

    end: Float[Array, "*S K D"]
    change: Float[Array, "*S"]
    ok: Bool[Array, "*S"]
    steps: Int[Array, "*S"]


def divergence(push: Callable[[Array], Array], probes: Float[Array, "M K D"] | None, shape: tuple, dtype) -> Array:
    """Trace of a Jacobian that is given by its products with tangents.

    Args:
      push: tangent [K, D] to ``J @ tangent``.
      probes: of the Hutchinson estimator, the mean of ``e . J e`` (3.11); None: the exact trace.
      shape: (K, D).
      dtype: of the tangents.
    """
    if probes is not None:
        return jnp.mean(jax.vmap(lambda e: jnp.sum(e * push(e)))(probes))
    size = math.prod(shape)

    def entry(i):
        unit = jax.nn.one_hot(i, size, dtype=dtype).reshape(shape)
        return jnp.sum(unit * push(unit))

    return jnp.sum(jax.lax.map(entry, jnp.arange(size), batch_size=min(size, _TANGENTS)))


def _rescaled(velocity: solve.Velocity, scale: Curve, moves: Bool[Array, "K 1"]) -> solve.Velocity:
    """The velocity of ``x = z / scale(t)`` where z moves with ``velocity``; positions that do not move have none."""

    def field(x, t):
        unit, slope = jax.jvp(scale, (t,), (jnp.ones_like(t),))
        z = jnp.where(moves, unit * x, x)
        return jnp.where(moves, (velocity(z, t) - slope * x) / unit, 0.0)

    return field


def transport(
    velocity: solve.Velocity,
    z: Float[Array, "K D"],
    method: solve.Method,
    start: float = 0.0,
    stop: float = 1.0,
    free: Bool[Array, " K"] | None = None,
    probes: Float[Array, "M K D"] | None = None,
    scale: Curve = jnp.ones_like,
) -> Flow:
    """Solves the augmented ODE for one block; `jax.vmap` over it keeps the step sizes of each.

    The solver's state is ``z / scale(t)``. Where the scale is the deviation of z_t around its mean, that state stands
    still as long as the predicted mean does, so that a few steps are enough (`prediction.spread`).

    Args:
      velocity: ``(z [K, D], t []) -> [K, D]``.
      z: state at ``start``.
      method: solver, steps or tolerances.
      start, stop: flow times; 0 to 1 carries data to noise, 1 to 0 noise to data.
      free: positions that move; the others keep their value and have no density. None: all.
      probes: for Hutchinson's divergence; None: the exact one.
      scale: of the free positions at a time, above 0.
    """
    moves = jnp.ones((z.shape[0], 1), bool) if free is None else free[:, None]
    if probes is not None:
        probes = jnp.where(moves[None], probes, 0.0)

    rescaled = _rescaled(velocity, scale, moves)

    def field(t, state, _):
        value, push = jax.linearize(lambda x: rescaled(x, t), state[0])
        return value, divergence(push, probes, z.shape, z.dtype)

    first, last = jnp.asarray(start, z.dtype), jnp.asarray(stop, z.dtype)
    if method.steps:
        grid = solve.Grid(method.shift, method.power, start, stop)
        controller = diffrax.StepTo(grid.times(method.steps).astype(z.dtype))
    else:
        controller = diffrax.PIDController(rtol=method.rtol, atol=method.atol)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solve.SOLVERS[method.solver](),
        t0=first,
        t1=last,
        dt0=None,
        y0=(jnp.where(moves, z / scale(first), z), jnp.zeros((), z.dtype)),
        stepsize_controller=controller,
        adjoint=diffrax.ForwardMode(),  # nothing is differentiated through the solve
        max_steps=method.max_steps,
        throw=False,
    )
    end = jnp.where(moves, scale(last) * solution.ys[0][-1], z)
    change = solution.ys[1][-1] + moves.sum() * z.shape[1] * jnp.log(scale(last) / scale(first))
    ok = (solution.result == diffrax.RESULTS.successful) & jnp.isfinite(change) & jnp.all(jnp.isfinite(end))
    return Flow(end, change, ok, solution.stats["num_steps"])


def draw_probes(
    key: Key, shape: tuple[int, int], kind: str = "rademacher", count: int = 1, dtype="float32"
) -> Float[Array, "M K D"]:
    """Probes of the Hutchinson estimator for one block; they stay the same through its solve (3.11).

    Args:
      key: of the block.
      shape: (K, D).
      kind: "rademacher" or "gaussian".
      count: M.
      dtype: of the state.
    """
    draw = jax.random.rademacher if kind == "rademacher" else jax.random.normal
    return draw(key, (count, *shape), dtype=jnp.dtype(dtype))


def normal_log_prob(z: Float[Array, "K D"], free: Bool[Array, " K"] | None = None) -> Float[Array, ""]:
    """``log N(z; 0, I)`` over the free positions (None: all), nats."""
    each = -0.5 * (jnp.square(z) + math.log(2 * math.pi))
    return jnp.sum(each if free is None else jnp.where(free[:, None], each, 0.0))


def log_prob(flow: Flow, free: Bool[Array, " K"] | None = None) -> Float[Array, ""]:
    """``log p(z_0) = log N(z_1; 0, I) + l(1)`` of a flow from 0 to 1 (3.9-3.10), nats."""
    return normal_log_prob(flow.end, free) + flow.change
