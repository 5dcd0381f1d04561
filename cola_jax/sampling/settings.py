"""How to generate: every choice that does not depend on the prompt."""

import dataclasses

import numpy as np

from cola_jax.config import SampleConfig
from cola_jax.fields import check, like, require, setting
from cola_jax.flow import guidance, solve
from cola_jax.flow.path import PATHS

CONDITIONINGS = ("clean", "repaint", "left_pad", "right_pad")
PRIORS = ("flow", "normal")
# "exponential": exact while the predicted mean stays as it is (`flow.prediction.follow_mean`).
SOLVERS = (*solve.SOLVERS, "exponential")


def check_churn(prefix: str, churn: float, solver: str) -> None:
    """Raises UserError for churn with a solver that has none."""
    ok = not churn or solver == "exponential"
    require(ok, f"{prefix}churn", churn, f"0 with solver {solver!r}; only 'exponential' has it")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate.

    What ``conditioning`` does with known positions of a block that has unknown ones too (SPEC 5, 17.1):
      "clean": they are pinned to their latents, at time 0, throughout.
      "repaint": they are replaced by their latents noised to the current time, for the first ``repaint_fraction`` of
        the steps, each of which is done ``repaint_cycles`` times; in the first block (later ones are pinned).
      "left_pad": there are none: padding before the prompt makes it end with a block.
      "right_pad": there are none: padding is behind the prompt, and generation begins with the next block.
    """

    steps: int = setting(16, "steps of the solver in each block", at_least=1)
    solver: str = setting(
        "euler",
        "heun: two evaluations a step; exponential: one, exact while the predicted mean stays; the others: diffrax's",
        choices=SOLVERS,
    )
    churn: float = setting(
        0.0,
        "noise that each step of solver 'exponential' renews; 0: none, the flow; 1: the reverse diffusion (ancestral "
        "sampling, DDPM); above: more",
        at_least=0,
    )
    time_shift: float = setting(
        1.0, "1: even steps; above: more of them near the noise, below: near the data (`flow.solve.Grid`)", above=0
    )
    start_time: float = setting(
        1.0,
        "where blocks start between their latents (0) and noise (1); below 1 makes sense where there are latents to "
        "start from (`edit`)",
        above=0,
        at_most=1,
        flag=False,
    )
    guidance_scale: float = setting(
        7.0, "s of v_uncond + s (v_cond - v_uncond), for blocks with history; 1: no guidance", at_least=0
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0),
        "times between which guidance acts; outside, the unconditional branch is not computed",
        where=(lambda value: 0 <= value[0] <= value[1] <= 1, "two numbers from 0 to 1, the lower first"),
    )
    conditioning: str = setting(
        "clean",
        "known positions in a generated block: pinned, noised at first, or avoided by padding",
        choices=CONDITIONINGS,
    )
    repaint_cycles: int = setting(1, "r of 'repaint': how often each of those steps is done", at_least=1)
    repaint_fraction: float = setting(1.0, "m of 'repaint': the share of the steps", at_least=0, at_most=1)
    max_new_tokens: int = like(SampleConfig, "max_new_tokens", 32)
    temperature: float = like(SampleConfig, "temperature")
    top_k: int = setting(0, "draw among this many most likely tokens; 0: among all", at_least=0)
    top_p: float = setting(
        1.0, "draw among the most likely tokens whose probability together reaches this; 1: all", above=0, at_most=1
    )
    repetition_penalty: float = like(SampleConfig, "repetition_penalty")
    eos_id: int | None = setting(
        None, "a sequence ends before its first such token; None: it never ends early", at_least=0, flag=False
    )
    pad_id: int | None = setting(
        None,
        "padding of a prompt's last block, visible to the encoder as in the released code; None: padding is masked",
        at_least=0,
        flag=False,
    )
    context: int | None = setting(
        None, "most tokens of prompt and output together; None: no limit", at_least=1, flag=False
    )
    prior: str = setting("flow", "the DiT, or the noise itself as latents: what no prior gives", choices=PRIORS)
    rotary_period: int | None = setting(
        None,
        "positions of blocks are modulo this, as in runs of the released code whose table of rotations was filled by "
        "a batch of sequences of that many latents; None: their own",
        at_least=1,
    )
    path: str = setting(
        "linear",
        "on which the prior was trained: where latents are that are noised to a time ('repaint', `edit`)",
        choices=tuple(PATHS),
        flag=False,
    )

    @property
    def times(self) -> np.ndarray:
        """The grid of flow times, ``steps + 1`` of them."""
        return solve.Grid(self.time_shift, start=self.start_time).times(self.steps).astype(np.float32)

    @property
    def on_grid(self) -> bool:
        """Whether the solver needs the velocity at the times of the grid only."""
        return self.solver in (*solve.STEPPERS, "exponential")

    @property
    def guided(self) -> list[bool]:
        """For each step, whether the unconditional branch is needed."""
        acts = guidance.acts(self.times[:-1], self.guidance_interval)
        return [self.guidance_scale != 1.0 and bool(at) for at in acts]

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check(self, "sampling ")

    def check_together(self, prefix: str) -> None:
        ok = self.conditioning != "repaint" or self.solver in solve.STEPPERS
        need = "one of " + ", ".join(map(repr, solve.STEPPERS)) + " with conditioning 'repaint'"
        require(ok, f"{prefix}solver", self.solver, need)
        check_churn(prefix, self.churn, self.solver)
