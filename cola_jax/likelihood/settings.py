"""How a likelihood is estimated: samples, solver, divergence."""

import dataclasses

import jax

from cola_jax.fields import check, require, setting
from cola_jax.flow import solve


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to estimate log p(x)."""

    samples: int = setting(1, "posterior samples an example, K", at_least=1)
    solver: str = setting("dopri5", "of the ODE from data to noise", choices=tuple(solve.SOLVERS))
    steps: int = setting(
        0, "fixed steps; 0: step sizes follow the tolerances, for each block of each sample (not euler)", at_least=0
    )
    power: float = setting(
        1.0, "fixed steps end at (i / steps) ** power: above 1, they are finer near the data", above=0
    )
    rtol: float = setting(
        1e-3, "relative tolerance of adaptive steps, on latents over their deviation and log-density (nats)", above=0
    )
    atol: float = setting(1e-3, "absolute tolerance of adaptive steps", above=0)
    max_steps: int = setting(1000, "adaptive steps, rejected ones included, after which a solve has failed", at_least=1)
    divergence: str = setting(
        "hutchinson",
        "estimated from probes (3.11; unbiased, noisy), or the trace of each block's K D x K D Jacobian",
        choices=("hutchinson", "exact"),
    )
    probe: str = setting("rademacher", "distribution of Hutchinson's probes", choices=("rademacher", "gaussian"))
    probes: int = setting(1, "probes of a solve; they stay the same through it", at_least=1)
    dtype: str = setting("float32", "of ODE and prior; float64 needs JAX_ENABLE_X64=1", choices=("float32", "float64"))
    rows: int = setting(64, "most sequences (examples times samples) solved at a time; bounds the memory", at_least=1)
    prefix: str = setting(
        "mean",
        "latents of the prefix of a scored response: the posterior's mean, as in generation, or a sample",
        choices=("mean", "sample"),
    )

    @property
    def method(self) -> solve.Method:
        """How the ODE of each block is solved."""
        return solve.Method(
            self.solver, self.steps, power=self.power, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps
        )

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check(self, "likelihood ")

    def check_together(self, prefix: str) -> None:
        require(self.steps > 0 or self.solver != "euler", f"{prefix}steps", 0, "at least 1 with solver 'euler'")
        need = f"at least steps = {self.steps}"
        require(self.max_steps >= self.steps, f"{prefix}max_steps", self.max_steps, need)
        ok = self.dtype != "float64" or jax.config.jax_enable_x64
        require(ok, f"{prefix}dtype", self.dtype, "'float32' unless JAX is in its 64-bit mode (JAX_ENABLE_X64=1)")
