"""How a likelihood is estimated: samples, solver, divergence."""

import dataclasses

import jax

from cola_jax.flow import solve
from cola_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to estimate log p(x).

    Attributes:
      samples: K, posterior samples an example.
      solver: one of `flow.solve.SOLVERS`.
      steps: fixed steps from data to noise; 0: step sizes follow the tolerances, for each block of each sample.
      power: the fixed steps end at ``(i / steps) ** power``: above 1, they are finer near the data, where the flow of
        a trained model changes fastest.
      rtol, atol: tolerances of the adaptive steps, on latents and log-density (nats) together.
      max_steps: adaptive steps, rejected ones included, after which a solve has failed.
      divergence: "hutchinson" (3.11; unbiased, noisy), or "exact" (the trace of each block's K D x K D Jacobian).
      probe: "rademacher" or "gaussian" probes of the Hutchinson estimator.
      probes: probes a solve; they stay the same through it.
      dtype: "float32" or "float64" of ODE and prior. The latter needs JAX's 64-bit mode (JAX_ENABLE_X64=1, or
        ``with jax.enable_x64(True)``).
      rows: most sequences (examples times samples) whose ODEs are solved at a time; bounds the memory.
      prefix: where only a response is scored, latents of the prefix are the posterior's "mean", as in generation,
        or a "sample".
    """

    samples: int = 1
    solver: str = "dopri5"
    steps: int = 0
    power: float = 1.0
    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = 1000
    divergence: str = "hutchinson"
    probe: str = "rademacher"
    probes: int = 1
    dtype: str = "float32"
    rows: int = 64
    prefix: str = "mean"

    @property
    def method(self) -> solve.Method:
        """How the ODE of each block is solved."""
        return solve.Method(
            self.solver, self.steps, power=self.power, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps
        )

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        adaptive = not self.steps
        checks = {
            "samples": (self.samples >= 1, "at least 1"),
            "solver": (self.solver in solve.SOLVERS, "one of " + ", ".join(solve.SOLVERS)),
            "steps": (self.steps >= 0 and not (adaptive and self.solver == "euler"), "at least 1, or 0 (not euler)"),
            "power": (self.power > 0, "a positive number"),
            "rtol": (self.rtol > 0, "a positive number"),
            "atol": (self.atol > 0, "a positive number"),
            "max_steps": (self.max_steps >= max(self.steps, 1), "at least 1 and at least steps"),
            "divergence": (self.divergence in ("hutchinson", "exact"), "'hutchinson' or 'exact'"),
            "probe": (self.probe in ("rademacher", "gaussian"), "'rademacher' or 'gaussian'"),
            "probes": (self.probes >= 1, "at least 1"),
            "dtype": (self.dtype in ("float32", "float64"), "'float32' or 'float64'"),
            "rows": (self.rows >= 1, "at least 1"),
            "prefix": (self.prefix in ("mean", "sample"), "'mean' or 'sample'"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise UserError(f"likelihood {name} = {getattr(self, name)!r}: must be {allowed}")
        if self.dtype == "float64" and not jax.config.jax_enable_x64:
            raise UserError("likelihood dtype = 'float64': JAX must be in its 64-bit mode (JAX_ENABLE_X64=1)")
