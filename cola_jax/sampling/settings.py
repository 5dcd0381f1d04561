"""How to generate: every choice that does not depend on the prompt."""

import dataclasses

import numpy as np

from cola_jax.flow import guidance, solve
from cola_jax.flow.path import PATHS
from cola_jax.types import UserError

CONDITIONINGS = ("clean", "repaint", "left_pad", "right_pad")
PRIORS = ("flow", "normal")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
      steps: of the solver in each block.
      solver: "euler", "heun" (two evaluations a step), or one of diffrax's (`flow.solve.SOLVERS`).
      time_shift: 1 spaces the steps evenly; see `flow.solve.Grid`.
      start_time: blocks start at this time, between their latents and noise; below 1 only makes sense where there
        are latents to start from (`edit`).
      guidance_scale: s of ``v_uncond + s (v_cond - v_uncond)``; 1 is no guidance. A block without history is
        not guided.
      guidance_interval: times (low, high) between which guidance acts; outside, the unconditional branch is not
        computed.
      conditioning: of known positions in a block that has unknown ones too (SPEC 5, 17.1).
        "clean": pinned to their latents, at time 0, throughout.
        "repaint": replaced by their latents noised to the current time, for the first ``repaint_fraction`` of the
        steps, each of which is done ``repaint_cycles`` times; in the first block (later ones are pinned).
        "left_pad": padding before the prompt makes it end with a block. "right_pad": padding behind it, and
        generation begins with the next block. Neither has known positions in a generated block.
      repaint_cycles: r, at least 1.
      repaint_fraction: m, from 0 to 1.
      max_new_tokens: budget of new tokens; the prompt does not count.
      temperature: 0 takes the most likely token of each position.
      top_k: draws among this many most likely tokens; 0: among all.
      top_p: draws among the most likely tokens whose probability together reaches this; 1: among all.
      repetition_penalty: 1 is none; over tokens that earlier blocks generated.
      eos_id: a sequence ends before its first such token; None: it never ends early.
      pad_id: None: padding is masked. An id: the padding of a prompt's last block is that token and visible to the
        encoder, as in the released code.
      context: most tokens of prompt and output together; None: no limit.
      prior: "flow" (the DiT), or "normal": latents are the noise itself, what the decoder makes of no prior.
      rotary_period: None: blocks are at their own positions. n: at positions modulo n, which reproduces runs of
        the released code whose table of rotations was filled by a batch of sequences of n latents.
      path: on which the prior was trained, one of `flow.path.PATHS`: says where latents are that are noised to a time
        ("repaint", `edit`) and which data a velocity points back to. The flow itself is the prior's.
    """

    steps: int = 16
    solver: str = "euler"
    time_shift: float = 1.0
    start_time: float = 1.0
    guidance_scale: float = 7.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    conditioning: str = "clean"
    repaint_cycles: int = 1
    repaint_fraction: float = 1.0
    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_id: int | None = None
    pad_id: int | None = None
    context: int | None = None
    prior: str = "flow"
    rotary_period: int | None = None
    path: str = "linear"

    @property
    def times(self) -> np.ndarray:
        """The grid of flow times, ``steps + 1`` of them."""
        return solve.Grid(self.time_shift, start=self.start_time).times(self.steps).astype(np.float32)

    @property
    def guided(self) -> list[bool]:
        """For each step, whether the unconditional branch is needed."""
        acts = guidance.acts(self.times[:-1], self.guidance_interval)
        return [self.guidance_scale != 1.0 and bool(at) for at in acts]

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        low, high = self.guidance_interval
        checks = {
            "steps": (self.steps >= 1, "at least 1"),
            "solver": (self.solver in solve.SOLVERS, "one of " + ", ".join(map(repr, solve.SOLVERS))),
            "time_shift": (self.time_shift > 0, "a positive number"),
            "start_time": (0 < self.start_time <= 1, "above 0 and at most 1"),
            "guidance_scale": (self.guidance_scale >= 0, "at least 0"),
            "guidance_interval": (0 <= low <= high <= 1, "two numbers from 0 to 1, the lower first"),
            "conditioning": (self.conditioning in CONDITIONINGS, "one of " + ", ".join(map(repr, CONDITIONINGS))),
            "repaint_cycles": (self.repaint_cycles >= 1, "at least 1"),
            "repaint_fraction": (0 <= self.repaint_fraction <= 1, "from 0 to 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "a positive number"),
            "prior": (self.prior in PRIORS, "one of " + ", ".join(map(repr, PRIORS))),
            "rotary_period": (self.rotary_period is None or self.rotary_period >= 1, "None or at least 1"),
            "path": (self.path in PATHS, "one of " + ", ".join(map(repr, PATHS))),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise UserError(f"sampling {name} = {getattr(self, name)!r}: must be {allowed}")
        if self.conditioning == "repaint" and self.solver not in solve.STEPPERS:
            raise UserError(f"sampling solver = {self.solver!r}: with 'repaint' must be one of {solve.STEPPERS}")
