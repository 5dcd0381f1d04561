"""What a run reports: console lines, `metrics.jsonl`, `timing.jsonl`, `samples.jsonl`, TensorBoard events.

`metrics.jsonl` and `samples.jsonl` hold nothing that depends on the clock: a run that was killed and resumed
leaves the same bytes as one that was not. Rates and durations go to `timing.jsonl`, which only grows. In a bucket files
cannot grow: there each start of a stage has a `metrics-00001.jsonl` and so on, which together are the same bytes.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

import jax
import tensorboardX

from cola_jax import paths
from cola_jax.config import Config
from cola_jax.families.interface import Stage
from cola_jax.train import devices
from cola_jax.types import Place

_REPORT = re.compile(r"(metrics|samples|timing)(?:-(\d+))?\.jsonl")  # with a number: of one start, in a bucket
_HIDDEN = ("learning_rate", "latent_signal", "latent_noise")  # not on the console line, nor norms


def truncate(path: Place, stage: int, step: int) -> None:
    """Drops the lines of a JSONL file that come after a step of a stage, and a torn last line."""
    if not path.exists():
        return
    content, kept = path.read_bytes(), []
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            before = (entry["stage"], entry["step"]) <= (stage, step)
        except (ValueError, KeyError, TypeError):
            continue  # torn while it was written
        if before and line.endswith(b"\n"):
            kept.append(line)
    if b"".join(kept) != content:
        paths.write_atomically(path, b"".join(kept))


def _loss_first(values: dict[str, float]) -> dict[str, float]:
    """Without the guard's flag, which is 1 in everything that is reported."""
    rest = {name: value for name, value in values.items() if name not in ("loss", "finite")}
    return {"loss": values["loss"], **rest}


def _rate(value: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}E"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@dataclasses.dataclass(frozen=True)
class Lap:
    """Training steps in a row: their duration, real tokens, number, and the seconds in which they waited for data."""

    seconds: float
    tokens: int
    steps: int
    waited: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stage computes (model FLOPs: nothing that is computed again counts).

    Attributes:
      flops_per_token: of a training step (`Stage.flops_per_token`).
      tokens_per_step: of a batch, padding included.
      flops_before: of the stages before.
      peak_flops: FLOP/s of all devices of the mesh together; 0 if it is not known.
    """

    flops_per_token: float
    tokens_per_step: int = 0
    flops_before: float = 0.0
    peak_flops: float = 0.0

    def exaflops(self, step: int) -> float:
        """What the run has computed after a step of this stage, in 10^18 FLOPs."""
        return (self.flops_before + step * self.tokens_per_step * self.flops_per_token) / 1e18

    def step_at(self, exaflops: float) -> int:
        """The first step after which the run has computed as much; 0 or less if earlier stages did."""
        return math.ceil((exaflops * 1e18 - self.flops_before) / (self.tokens_per_step * self.flops_per_token) - 1e-9)


def cost(config: Config, stages: Sequence[Stage], index: int, device_count: int) -> Cost:
    """The `Cost` of stage ``index`` of a run on ``device_count`` devices."""
    tokens = config.data.batch_size * config.data.sequence_length
    before = float(sum(stage.steps * tokens * stage.flops_per_token for stage in stages[:index]))
    peak = config.train.peak_flops or devices.peak_flops(jax.devices()[0].device_kind)
    return Cost(stages[index].flops_per_token, tokens, before, peak * device_count)


def milestones(config: Config, stages: Sequence[Stage], index: int) -> set[int]:
    """Steps of stage ``index`` whose checkpoints are kept for good (`config.train.milestone_*`)."""
    total, asked = stages[index].steps, cost(config, stages, index, 1)
    steps = {*config.train.milestone_steps, *map(asked.step_at, config.train.milestone_exaflops)}
    return {step for step in steps if 1 <= step <= total}


class Clock:
    """Time spent in training steps: what happens between `stop` and `start` does not count."""

    def __init__(self):
        self.seconds, self.tokens, self.steps, self.waited, self._since = 0.0, 0, 0, 0.0, None

    def start(self) -> None:
        self._since = time.perf_counter()

    def count(self, tokens: int, waited: float) -> None:
        self.tokens += tokens
        self.steps += 1
        self.waited += waited

    def stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None

    def lap(self) -> Lap:
        """What was counted since the last lap; stops the clock."""
        self.stop()
        result = Lap(self.seconds, self.tokens, self.steps, self.waited)
        self.seconds, self.tokens, self.steps, self.waited = 0.0, 0, 0, 0.0
        return result


class Growing:
    """Files of a run that grow: in its directory, or, where that is in a bucket, here, and copied there as a whole.

    Attributes:
      directory: of this machine, where they are written.
    """

    _EVERY = 60.0  # seconds between copies that nobody waits for

    def __init__(self, place: Place):
        self._place, self._is_far = place, bool(paths.scheme(place))
        self._copied: dict[PurePosixPath, tuple[int, int]] = {}
        self._copied_at = time.monotonic()
        self.directory = paths.scratch() if self._is_far else place

    def copy(self, now: bool = True) -> None:
        """Copies what has changed; unless ``now``, only if the last time is a minute ago."""
        if not self._is_far or not now and time.monotonic() - self._copied_at < self._EVERY:
            return
        for name, file in paths.files(self.directory):
            mark = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._copied.get(name) != mark:
                paths.write_atomically(self._place / name, file.read_bytes())
                self._copied[name] = mark
        self._copied_at = time.monotonic()

    def close(self) -> None:
        """Copies, and removes the files that were copied."""
        self.copy()
        if self._is_far:
            shutil.rmtree(self.directory, ignore_errors=True)


class Profile:
    """Records a window of training steps with JAX's profiler, for TensorBoard or XProf.

    Args:
      directory: where the trace goes.
      steps: the first and the last step, from 1; None: nothing is recorded.
      stage: whose steps they are.
    """

    def __init__(self, directory: Place, steps: tuple[int, int] | None, stage: int):
        self._place, self._steps, self._stage, self._active = directory, steps, stage, False
        self._files: Growing | None = None

    def before(self, step: int, stage: int) -> None:
        """Begins with the first step of the window, or inside it where a run resumes there."""
        if self._steps and stage == self._stage and not self._active and self._steps[0] <= step <= self._steps[1]:
            self._files = Growing(self._place)
            jax.profiler.start_trace(str(self._files.directory))
            self._active = True

    def ends_after(self, step: int, stage: int) -> bool:
        """Whether the window ends with this step: it has to be waited for."""
        return self._active and stage == self._stage and step == self._steps[1]

    def after(self, step: int, stage: int) -> None:
        """Ends with the last step of the window, which has been waited for."""
        if self.ends_after(step, stage):
            self.__exit__()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
            self._files.close()


class Writer:
    """Writes the reports of one stage, from the step at which it starts or resumes.

    Args:
      workdir: holds the files of all stages.
      stage: its number, from 1.
      first_step: the step that was restored; later lines of an earlier process are dropped.
      total_steps: of the stage.
      cost: of the stage.
      log: prints a line.
      active: False on all processes but one: then nothing is written.
    """

    def __init__(
        self,
        workdir: Place,
        stage: int,
        first_step: int,
        total_steps: int,
        cost: Cost,
        log: Callable[[str], None] = print,
        active: bool = True,
    ):
        self._stage, self._total, self._cost, self._log, self._active = stage, total_steps, cost, log, active
        self._files = {}
        if not active:
            return
        before = [found for name in paths.listed(workdir, "--workdir") if (found := _REPORT.fullmatch(name))]
        for found in before:
            if found[1] != "timing":
                truncate(workdir / found[0], stage, first_step)
        segment = ""
        if paths.scheme(workdir):
            segment = f"-{max([0, *(int(found[2] or 0) for found in before)]) + 1:05d}"
        self._growing = Growing(workdir)
        here = self._growing.directory
        for name in ("metrics", "samples", "timing"):
            self._files[name] = open(here / f"{name}{segment}.jsonl", "a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(here / "tensorboard"), purge_step=first_step + 1)

    def _append(self, name: str, step: int, **values) -> None:
        # JSON has no infinity and no NaN.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        json.dump({"stage": self._stage, "step": step, **plain}, self._files[name])
        self._files[name].write("\n")
        self._files[name].flush()

    def _scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(f"stage{self._stage}/{kind}/{name}", value, step)

    def train(self, step: int, values: dict[str, float], lap: Lap | None) -> None:
        """Metrics of one training step; ``lap`` from `Clock.lap`, None where time means nothing (compilation)."""
        if not self._active:
            return
        values = _loss_first(values)
        self._append("metrics", step, kind="train", **values, exaflops=self._cost.exaflops(step))
        self._scalars(step, "train", values)
        shown = [f"{name} {value:.4g}" for name, value in values.items() if self._is_shown(name)]
        if lap is not None and lap.seconds > 0 and lap.steps:
            timing = self._timing(step, lap)
            self._append("timing", step, **timing, time=time.time())
            self._scalars(step, "timing", timing)
            shown += self._timing_line(timing, (self._total - step) * timing["step_seconds"])
        self._log(
            f"stage {self._stage}  step {step}/{self._total}  {'  '.join(shown)}  lr {values['learning_rate']:.3g}"
        )
        self._growing.copy(now=False)

    def _timing(self, step: int, lap: Lap) -> dict[str, float]:
        rate, cost = lap.tokens / lap.seconds, self._cost
        timing = {
            "tokens_per_second": rate,
            "flops_per_second": rate * cost.flops_per_token,
            "step_seconds": lap.seconds / lap.steps,
            "data_wait_share": lap.waited / lap.seconds,
            "exaflops": cost.exaflops(step),
            **devices.memory(),
        }
        if cost.peak_flops:
            timing["mfu"] = timing["flops_per_second"] / cost.peak_flops
        return timing

    def _timing_line(self, timing: dict[str, float], left: float) -> list[str]:
        line = [f"{_rate(timing['tokens_per_second'])} tokens/s", f"{_rate(timing['flops_per_second'])}FLOP/s"]
        if "mfu" in timing:
            line.append(f"MFU {100 * timing['mfu']:.1f} %")
        line += [f"{timing['exaflops']:.3g} EFLOP so far", f"data wait {100 * timing['data_wait_share']:.0f} %"]
        if "peak_memory_bytes" in timing:
            line.append(f"memory {timing['peak_memory_bytes'] / 2**30:.1f} GiB")
        return [*line, f"ETA {_duration(left)}"]

    def _is_shown(self, name: str) -> bool:
        return name not in _HIDDEN and not name.startswith(("update_norm", "grad_norm"))

    def holdout(self, step: int, values: dict[str, float]) -> None:
        """Metrics over held-out data."""
        if not self._active:
            return
        values = _loss_first(values)
        self._append("metrics", step, kind="holdout", **values, exaflops=self._cost.exaflops(step))
        self._scalars(step, "holdout", values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if self._is_shown(name))
        self._log(f"stage {self._stage}  step {step}/{self._total}  held out: {shown}")

    def samples(self, step: int, texts: list[str]) -> None:
        """Generated texts."""
        if not self._active:
            return
        self._append("samples", step, texts=texts)
        self._events.add_text(f"stage{self._stage}/samples", "\n\n".join(texts), step)
        for text in texts:
            self._log(f"  sample: {text!r}")

    def flush(self) -> None:
        """Everything so far is on disk, or in the bucket: before a checkpoint of the same step is committed."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._active:
            self._events.flush()
            self._growing.copy()

    def close(self) -> None:
        if self._active:
            self.flush()
            for file in self._files.values():
                file.close()
            self._events.close()
            self._growing.close()
