"""What a run reports: console lines, `metrics.jsonl`, `timing.jsonl`, `samples.jsonl`, TensorBoard events.

`metrics.jsonl` and `samples.jsonl` hold nothing that depends on the clock: a run that was killed and resumed
leaves the same bytes as one that was not. Rates and durations go to `timing.jsonl`, which only grows.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import tensorboardX

from cola_jax.config import Config
from cola_jax.train import devices

_HIDDEN = ("learning_rate", "latent_signal", "latent_noise")  # not on the console line, nor norms


def _vae_flops(config: Config) -> tuple[float, float, float]:
    """Forward FLOPs per token of encoder, decoder without its head, and head."""
    vae, latents = config.vae, config.data.sequence_length // config.vae.patch_size
    layer = 2 * (4 * vae.dim**2 + 3 * vae.dim * (vae.ffn_dim // 2)) + 2 * latents * vae.dim
    heads = 2 * vae.dim * 2 * vae.latent_dim
    encoder = vae.encoder_layers * layer + 2 * vae.patch_size * vae.dim**2 + heads
    decoder = vae.decoder_layers * layer + 2 * vae.latent_dim * vae.dim + 2 * vae.patch_size * vae.dim**2
    return encoder / vae.patch_size, decoder / vae.patch_size, 2.0 * vae.dim * vae.vocab_size


def _dit_flops(config: Config) -> float:
    """Forward FLOPs per token of the DiT: one clean pass and the noisy copies."""
    dit, latents = config.dit, config.data.sequence_length // config.vae.patch_size
    width = dit.num_heads * dit.head_dim
    layer = 2 * (4 * dit.dim * width + 2 * dit.mlp_ratio * dit.dim**2) + 2 * latents * width
    copies = config.stage2.noise_copies
    passes = (1 + copies) * (dit.num_layers * layer + 2 * 2 * dit.latent_dim * dit.dim)
    # Modulations are computed once per distinct time, not per latent.
    times = 1 + copies * (latents // dit.block_size if config.stage2.time_per == "block" else 1)
    modulation = times / latents * dit.num_layers * 2 * 6 * dit.dim * dit.time_dim
    return (passes + modulation) / config.vae.patch_size


def flops_per_token(config: Config, stage: int) -> float:
    """Estimated FLOPs of a training step per token of the batch.

    A matrix multiplication costs 2 FLOPs per weight forward and 4 backward for every position that passes through
    it; frozen parts count forward only. Causal attention adds ``4 * (N / 2) * width`` per position and layer
    forward. The mask pass needs the vocabulary head at the masked positions only. Norms, softmax and rematerialised
    work are left out.

    Args:
      config: with ``vae.vocab_size`` known.
      stage: 1 or 2.
    """
    encoder, decoder, head = _vae_flops(config)
    settings = config.stage1 if stage == 1 else config.stage2
    vae = encoder + decoder + head
    if settings.mask_weight:
        vae += encoder + decoder + settings.mask_ratio * head
    if stage == 1:
        return 3 * vae
    if config.stage2.strategy == "fix_vae":
        return encoder + 3 * _dit_flops(config)
    reference = encoder if config.stage2.reference_weight else 0.0
    return 3 * (vae + _dit_flops(config)) + reference


def truncate(path: Path, stage: int, step: int) -> None:
    """Drops the lines of a JSONL file that come after a step of a stage, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
            before = (entry["stage"], entry["step"]) <= (stage, step)
        except (ValueError, KeyError, TypeError):
            continue  # torn while it was written
        if before and line.endswith(b"\n"):
            kept.append(line)
    write_atomically(path, b"".join(kept))


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file: a reader, or a run killed at any time, finds the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
      flops_per_token: from `flops_per_token`.
      tokens_per_step: of a batch, padding included.
      flops_before: of the stages before.
      peak_flops: FLOP/s of all devices of the mesh together; 0 if it is not known.
    """

    flops_per_token: float
    tokens_per_step: int = 0
    flops_before: float = 0.0
    peak_flops: float = 0.0


def cost(config: Config, stage: int, device_count: int) -> Cost:
    """The `Cost` of a stage of a run on ``device_count`` devices."""
    tokens = config.data.batch_size * config.data.sequence_length
    before = config.stage1.steps * tokens * flops_per_token(config, 1) if stage == 2 else 0.0
    peak = config.train.peak_flops or devices.peak_flops(jax.devices()[0].device_kind)
    return Cost(flops_per_token(config, stage), tokens, before, peak * device_count)


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


class Profile:
    """Records a window of training steps with JAX's profiler, for TensorBoard or XProf.

    Args:
      directory: where the trace goes.
      steps: the first and the last step, from 1; None: nothing is recorded.
      stage: whose steps they are.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None, stage: int):
        self._directory, self._steps, self._stage, self._active = directory, steps, stage, False

    def before(self, step: int, stage: int) -> None:
        """Begins with the first step of the window, or inside it where a run resumes there."""
        if self._steps and stage == self._stage and not self._active and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._directory))
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
            jax.profiler.stop_trace()
        self._active = False


class Writer:
    """Writes the reports of one stage, from the step at which it starts or resumes.

    Args:
      workdir: holds the files of both stages.
      stage: 1 or 2.
      first_step: the step that was restored; later lines of an earlier process are dropped.
      total_steps: of the stage.
      cost: of the stage.
      say: prints a line.
      active: False on all processes but one: then nothing is written.
    """

    def __init__(
        self,
        workdir: Path,
        stage: int,
        first_step: int,
        total_steps: int,
        cost: Cost,
        say: Callable[[str], None] = print,
        active: bool = True,
    ):
        self._stage, self._total, self._cost, self._say, self._active = stage, total_steps, cost, say, active
        self._files = {}
        if not active:
            return
        for name in ("metrics", "samples"):
            truncate(workdir / f"{name}.jsonl", stage, first_step)
        for name in ("metrics", "samples", "timing"):
            self._files[name] = open(workdir / f"{name}.jsonl", "a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

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
        self._append("metrics", step, kind="train", **values)
        self._scalars(step, "train", values)
        shown = [f"{name} {value:.4g}" for name, value in values.items() if self._is_shown(name)]
        if lap is not None and lap.seconds > 0 and lap.steps:
            timing = self._timing(step, lap)
            self._append("timing", step, **timing, time=time.time())
            self._scalars(step, "timing", timing)
            shown += self._timing_line(timing, (self._total - step) * timing["step_seconds"])
        self._say(
            f"stage {self._stage}  step {step}/{self._total}  {'  '.join(shown)}  lr {values['learning_rate']:.3g}"
        )

    def _timing(self, step: int, lap: Lap) -> dict[str, float]:
        rate, cost = lap.tokens / lap.seconds, self._cost
        timing = {
            "tokens_per_second": rate,
            "flops_per_second": rate * cost.flops_per_token,
            "step_seconds": lap.seconds / lap.steps,
            "data_wait_share": lap.waited / lap.seconds,
            "exaflops": (self._cost.flops_before + step * self._cost.tokens_per_step * self._cost.flops_per_token)
            / 1e18,
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
        self._append("metrics", step, kind="holdout", **values)
        self._scalars(step, "holdout", values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if self._is_shown(name))
        self._say(f"stage {self._stage}  step {step}/{self._total}  held out: {shown}")

    def samples(self, step: int, texts: list[str]) -> None:
        """Generated texts."""
        if not self._active:
            return
        self._append("samples", step, texts=texts)
        self._events.add_text(f"stage{self._stage}/samples", "\n\n".join(texts), step)
        for text in texts:
            self._say(f"  sample: {text!r}")

    def flush(self) -> None:
        """Everything so far is on disk: before a checkpoint of the same step is committed."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        if self._active:
            self.flush()
            for file in self._files.values():
                file.close()
            self._events.close()
