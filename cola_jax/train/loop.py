"""The training loop: stage 1, then stage 2, resumable at every moment. The only module with state and files.

A run's directory holds `config.json`, `tokenizer.model`, `stage1/` and `stage2/` (checkpoints), `metrics.jsonl`,
`samples.jsonl`, `timing.jsonl` and `tensorboard/`. The same command on the same directory resumes where the last
process stopped, with the same result, bit for bit, as if it had not stopped.
"""

import collections
import contextlib
import functools
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from cola_jax import release, rng, sharding
from cola_jax.config import Config
from cola_jax.train import checkpoint as checkpoints
from cola_jax.train import distributed, interrupts, setup
from cola_jax.train import metrics as reports
from cola_jax.train import state as states
from cola_jax.train import step as steps
from cola_jax.train.interrupts import Interrupted
from cola_jax.train.parts import Parts, build, claim_workdir, data_seed, flat
from cola_jax.types import Params, PyTree, UserError

# (stage, step, variables) -> texts
Sampler = Callable[[int, int, Params], list[str]]


class NonFiniteLoss(Exception):
    """Training cannot go on: the loss or its gradient is not finite, or too many updates in a row were skipped."""


class _Stage:
    """One stage of a run: its state, data, checkpoints and reports."""

    def __init__(self, parts: Parts, workdir: Path, stage: int, mesh: Mesh, sampler, say, around: "_Around"):
        self._parts, self._config, self.number, self._mesh = parts, parts.config, stage, mesh
        self._workdir, self._sampler, self._say, self._around = workdir, sampler, say, around
        self._setup = setup.stage(self._config, stage, parts.init)
        self.total, accumulation = self._setup.steps, self._setup.settings.accumulation
        sharding.check_batch(self._config.data.batch_size, accumulation, mesh, f"optimizer{stage}.accumulation")
        self._rules = sharding.make_rules(self._config.train.axes)
        self._target = states.abstract(self._setup.make, mesh, self._rules)
        self._seed = data_seed(self._config.seed, stage)
        self._checkpoints = checkpoints.Checkpoints(workdir / f"stage{stage}", self._config.train.keep_checkpoints, say)
        self.step = 0
        self.state: states.TrainState | None = None
        self._position: str | None = None  # in the data, as JSON
        self._saved: int | None = None
        self._skipped = 0
        self._stop: jax.Array | bool = False  # whether a process was asked to stop before the last step
        # Of the whole run: the stages count each from 0.
        self._first_step = 0 if stage == 1 else self._config.stage1.steps

    def restore(self) -> bool:
        """Takes up the newest checkpoint of the stage; False if there is none."""
        found = self._checkpoints.restore(self._target)
        if found is None:
            return False
        self.step, self.state, body = found
        changes = self._parts.difference(body["fingerprint"], self._fingerprint())
        if changes:
            raise UserError(f"{self._workdir}: the data is not what this run began with ({', '.join(changes)})")
        # The position is the same for all processes (`pipeline`), so that their number may change.
        self._position, self._saved = body["data"], self.step
        self._skipped = 0 if self.state.guard is None else int(self.state.guard.skipped)
        self._around.watchdog.beat()
        return True

    def begin(self, vae: PyTree | None, dit: PyTree | None = None) -> None:
        """Starts the stage afresh, from the parameters of the stage before or of another model if there are any."""
        self.state = states.create(self._setup.make, self._target, rng.key(self._config.seed, "init"), vae, dit)

    def initial(self) -> dict[str, PyTree]:
        """What `config.train.init_from` holds of the stage's groups; raises UserError unless the shapes are its."""
        path = self._config.train.init_from
        if not path:
            return {}
        loaded = release.load(path)[1] if release.is_released(path) else checkpoints.load_params(path).variables
        groups = {name: loaded["params"].get(name, {}) for name in self._target.params["params"]}
        needed, given = flat(self._target.params["params"]), flat(groups)
        for name in sorted(set(needed) | set(given)):
            shapes = [list(tree[name].shape) if name in tree else None for tree in (given, needed)]
            if shapes[0] != shapes[1]:
                raise UserError(f"config.train.init_from = {path}: {name} is {shapes[0]}, this run needs {shapes[1]}")
        # Arrays of one device cannot enter a computation of several processes; what all have on the host can.
        return groups if jax.process_count() == 1 else jax.tree.map(np.asarray, groups)

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, *_) -> None:
        self._checkpoints.close()

    def _fingerprint(self) -> dict:
        return json.loads(json.dumps(self._parts.fingerprint(self._seed)))

    def _save(self, step: int, state: states.TrainState, position: str) -> None:
        if step != self._saved:
            config, fingerprint = self._config, self._fingerprint()
            self._checkpoints.save(step, state, config=config, fingerprint=fingerprint, data=position)
            self._saved = step

    def run(self) -> None:
        """Trains to the last step.

        Raises:
          NonFiniteLoss, Interrupted: the last good state is saved.
        """
        if self.step >= self.total:
            self._say(f"stage {self.number} is complete: {self.total} steps")
            return
        if self.step:
            self._say(f"stage {self.number}: resumed at step {self.step} of {self.total}")
        config, parts = self._config, self._parts
        train_step = steps.make_train_step(
            parts.terms[self.number - 1],
            self._setup.optimizer,
            self._setup.settings,
            self._setup.trained,
            self._target,
            self._mesh,
            steps=self.total,
            seed=config.seed,
            first_step=self._first_step,
            rules=self._rules,
        )
        iterator = iter(parts.dataset("train", self._seed))
        if self._position is not None:
            iterator.set_state(json.loads(self._position))
        cost = reports.cost(config, self.number, self._mesh.size)
        writer = reports.Writer(
            self._workdir, self.number, self.step, self.total, cost, self._say, jax.process_index() == 0
        )
        try:
            self._loop(train_step, iterator, writer)
        finally:
            writer.close()
            iterator.close()

    def _loop(self, train_step, iterator, writer: reports.Writer) -> None:
        evaluate = self._evaluator()
        clock, warm, settings = reports.Clock(), False, self._config.train
        # The host looks at a step's metrics only after the next one is dispatched, so it needs positions further back.
        positions = collections.deque([(self.step, json.dumps(iterator.get_state()))], maxlen=3)
        pending = None
        while self.step < self.total:
            self._around.profile.before(self.step + 1, self.number)
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                raise UserError(f"data ended after {self.step} steps: the corpus must hold at least one batch")
            waited = time.perf_counter() - asked
            self.state, values = train_step(self.state, sharding.put_batch(self._mesh, batch))
            self.step += 1
            clock.count(int(np.count_nonzero(batch["segment_ids"])), waited)
            positions.append((self.step, json.dumps(iterator.get_state())))
            if pending is not None:
                self._guard(*pending, positions, writer)
            pending = (self.step, values)
            last = self.step == self.total
            is_log = last or self.step == 1 or self.step % settings.log_every == 0
            is_eval = last or self.step % settings.eval_every == 0
            is_save = last or self.step % settings.checkpoint_every == 0
            stop = self._is_asked_to_stop()
            is_profiled = self._around.profile.ends_after(self.step, self.number)
            if warm and not (is_log or is_eval or is_save or stop or is_profiled):
                continue
            self._guard(*pending, positions, writer)
            pending = None
            self._around.profile.after(self.step, self.number)
            if not warm:  # the first step of a process is mostly compilation
                clock.lap()
            if is_log:
                lap = clock.lap() if warm else None
                writer.train(self.step, {name: float(value) for name, value in jax.device_get(values).items()}, lap)
            clock.stop()
            if is_eval:
                writer.holdout(self.step, evaluate(self.state))
            self._sample(writer, last)
            if is_save or stop:
                writer.flush()
                self._save(self.step, self.state, positions[-1][1])
            if stop and not last:
                self._interrupt()
            self._around.watchdog.beat()
            warm = True
            clock.start()

    def _is_asked_to_stop(self) -> bool:
        """After this step; in all processes or in none: those learn of a signal with the step after it."""
        stop = self._around.signals.received is not None
        if jax.process_count() > 1:
            before, self._stop = self._stop, distributed.any_true(stop)
            return bool(before)
        return stop

    def _evaluator(self) -> Callable[[states.TrainState], dict[str, float]]:
        """A function from state to metrics over the first held-out batches, which are read once."""
        dataset = self._parts.dataset("holdout", self._seed)
        eval_step = steps.make_eval_step(
            self._parts.terms[self.number - 1], self._mesh, seed=self._config.seed, rules=self._rules
        )
        cached = []

        def evaluate(state: states.TrainState) -> dict[str, float]:
            if not cached:
                iterator = iter(dataset)
                for _, batch in zip(range(self._config.train.eval_batches), iterator, strict=False):
                    cached.append(sharding.put_batch(self._mesh, batch))
                iterator.close()
            if not cached:
                raise UserError(f"config.data.holdout = {self._config.data.holdout}: must be enough for one batch")
            params = states.evaluation_params(state)
            sums = [eval_step(params, state.reference, batch, index) for index, batch in enumerate(cached)]
            return steps.summarize(sums)

        return evaluate

    def _sample(self, writer: reports.Writer, last: bool) -> None:
        every = self._config.train.sample_every
        due = last or (every and self.step % every == 0)
        if self._sampler is not None and self.number == 2 and self._config.train.num_samples and due:
            writer.samples(self.step, self._sampler(self.number, self.step, states.evaluation_params(self.state)))

    def _guard(self, step: int, values: dict, positions, writer: reports.Writer) -> None:
        """Waits for the end of a step; reports a skipped update.

        Raises:
          NonFiniteLoss: the step cannot be done; the state before it is saved.
        """
        finite = float(values["finite"])
        self._around.watchdog.beat()
        shown = {name: float(values[name]) for name in ("loss", "grad_norm", "grad_norm_average") if name in values}
        line = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if finite:
            skipped = int(values.get("skipped", 0))
            if skipped > self._skipped:
                self._say(f"stage {self.number}  step {step}: update skipped, the {skipped}. of this stage ({line})")
            self._skipped = skipped
            return
        good = int(self.state.step)
        writer.flush()
        if good:
            self._save(good, self.state, dict(positions)[good])
            self._checkpoints.wait()
        hidden = ("finite", "learning_rate")
        line = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items() if name not in hidden)
        what = "loss or gradient is not finite"
        if np.isfinite(list(shown.values())).all():
            what = f"gradient norm above {self._setup.settings.spike_factor:g} times its average"
        if self._setup.settings.max_skipped:
            what += f", {self._setup.settings.max_skipped} updates before it were skipped"
        where = f"the state after step {good} is saved" if good else "nothing is saved"
        raise NonFiniteLoss(f"stage {self.number}, step {step}: {what} ({line}); {where}")

    def _interrupt(self) -> None:
        self._checkpoints.wait()
        signum = self._around.signals.received or signal.SIGTERM
        name = signal.Signals(signum).name
        raise Interrupted(
            f"stopped by {name} after step {self.step} of stage {self.number}: saved; the same command resumes", signum
        )


class _Around(contextlib.ExitStack):
    """What runs beside the steps of a run: signals, the watchdog, the profiler."""

    def __init__(self, config: Config, workdir: Path, profile_steps: tuple[int, int] | None):
        super().__init__()
        self.signals = interrupts.Signals()
        self.watchdog = interrupts.Watchdog(config.train.hang_timeout)
        self.profile = reports.Profile(workdir / "profile", profile_steps, 2 if config.stage2.steps else 1)

    def __enter__(self) -> "_Around":
        for part in (self.signals, self.watchdog, self.profile):
            self.enter_context(part)
        return self


def train(
    config: Config,
    workdir: str | Path,
    parts: Parts | None = None,
    sampler: Sampler | None = None,
    say: Callable[[str], None] | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> states.TrainState:
    """Runs both stages, or what is left of them.

    In a run of several processes each of them calls this, with the same arguments, after `distributed.initialize`.

    Args:
      config: the run's.
      workdir: where everything is kept; made if it does not exist. All processes see it.
      parts: what to train; None for the model and data of the config (`build`).
      sampler: generates texts in stage 2, every ``train.sample_every`` steps and at the end.
      say: prints a line; None for the console.
      profile_steps: first and last step of the last stage that are profiled, into ``workdir/profile``.

    Returns:
      The final state of the last stage.

    Raises:
      UserError: config, data or directory do not fit; nothing can be read or written (the disk is full, for example).
      NonFiniteLoss: training diverged.
      Interrupted: SIGTERM or Ctrl-C.
    """
    workdir = Path(workdir).absolute()
    try:
        return _train(config, workdir, parts, sampler, say, profile_steps)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"--workdir = {workdir}: cannot go on: {reason}; what was saved is as it was") from error


def _train(config: Config, workdir: Path, parts, sampler, say, profile_steps) -> states.TrainState:
    claim_workdir(config, workdir)
    say = say or functools.partial(print, flush=True)
    if jax.process_index():
        say = _silent
    with _Around(config, workdir, profile_steps) as around, contextlib.ExitStack() as opened:
        parts = parts or build(config, workdir)
        mesh = sharding.make_mesh(config.train)

        def open_stage(stage: int) -> _Stage:
            return opened.enter_context(_Stage(parts, workdir, stage, mesh, sampler, say, around))

        last = open_stage(2 if config.stage2.steps else 1)
        if not last.restore():
            initial = last.initial()
            vae, dit = initial.get("vae"), initial.get("dit")
            if last.number == 2 and config.stage1.steps:
                first = open_stage(1)
                if not first.restore():
                    first.begin(vae)
                first.run()
                vae = states.evaluation_params(first.state)["params"]["vae"]
                first.state = None  # stage 2 needs the memory
            last.begin(vae, dit)
            del initial, vae, dit
        last.run()
        return last.state


def _silent(line: str) -> None:
    """Says nothing: only one process speaks."""
