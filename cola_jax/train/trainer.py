"""One stage of a run, from its start or its newest checkpoint to its last step."""

import collections
import contextlib
import functools
import itertools
import json
import signal
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from cola_jax import rng, sharding
from cola_jax.config import Config
from cola_jax.data import pipeline
from cola_jax.families.interface import Stage, first_steps
from cola_jax.train import checkpoint as checkpoints
from cola_jax.train import distributed, interrupts, reports
from cola_jax.train import state as states
from cola_jax.train import step as steps
from cola_jax.train.experiment import Experiment, data_seed
from cola_jax.train.interrupts import Interrupted
from cola_jax.types import Params, Place, PyTree, UserError

# (stage from 1, step, variables) -> texts
Sampler = Callable[[int, int, Params], list[str]]
Log = Callable[[str], None]


class NonFiniteLoss(Exception):
    """Training cannot continue: the loss or its gradient is not finite, or too many updates in a row were skipped."""


class Monitors(contextlib.ExitStack):
    """What watches the steps of a run: signals, the watchdog, the profiler (of the stage ``profiled``)."""

    def __init__(self, config: Config, workdir: Place, profile_steps: tuple[int, int] | None, profiled: int):
        super().__init__()
        self.signals = interrupts.Signals()
        self.watchdog = interrupts.Watchdog(config.train.hang_timeout)
        self.profile = reports.Profile(workdir / "profile", profile_steps, profiled)

    def __enter__(self) -> "Monitors":
        for part in (self.signals, self.watchdog, self.profile):
            self.enter_context(part)
        return self


class Trainer:
    """Trains one stage; its state, data, checkpoints and reports.

    Args:
      experiment: the run's.
      index: of the stage in its family, from 0.
      workdir: the run's directory.
      mesh: the devices.
      monitors: entered already.
      log: prints a line.
      sampler: writes samples in the last stage that has steps; None: nothing does.
    """

    def __init__(
        self,
        experiment: Experiment,
        index: int,
        workdir: Place,
        mesh: Mesh,
        monitors: Monitors,
        log: Log,
        sampler: Sampler | None,
    ):
        self._experiment, self._config, self._mesh = experiment, experiment.config, mesh
        self._workdir, self._monitors, self._log, self._sampler = workdir, monitors, log, sampler
        self.number, self.stage = index + 1, experiment.stages[index]
        settings, train = self.stage.optimizer, self._config.train
        sharding.check_batch(
            self._config.data.batch_size, settings.accumulation, mesh, f"{self.stage.optimizer_field}.accumulation"
        )
        self._batch_size = self._config.data.batch_size
        self._rows = sharding.local_rows(mesh, self._batch_size)
        self._rules = sharding.make_rules(train.axes)
        self._make = states.make_init(experiment.init, self.stage)
        self.target = states.abstract(self._make, mesh, self._rules)
        self._seed = data_seed(self._config.data_seed, self.number)
        self._cost = reports.cost(self._config, experiment.stages, index, mesh.size)
        self._milestones = reports.milestones(self._config, experiment.stages, index)
        self._checkpoints = checkpoints.Checkpoints(
            workdir / self.stage.name, train.keep_checkpoints, log, self._milestones
        )
        self._first_step = first_steps(experiment.stages)[index]
        self.step = 0
        self.state: states.TrainState | None = None
        self._position: str | None = None  # in the data, as JSON
        self._saved: int | None = None
        self._skipped = 0
        self._saved_at = time.monotonic()
        # Whether a process was asked to stop before the last step, and whether a save was due by the clock.
        self._asked: jax.Array | tuple[bool, bool] = (False, False)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_) -> None:
        self._checkpoints.close()

    def restore(self) -> bool:
        """Restores the newest checkpoint of the stage; False if there is none."""
        found = self._checkpoints.restore(self.target)
        if found is None:
            return False
        self.step, self.state, body = found
        if changes := pipeline.changes(body["fingerprint"], self._fingerprint, self.step):
            shown = ", ".join(map(str, changes))
            raise UserError(f"{self._workdir}: the data is not what this run began with ({shown})")
        # The position is the same for all processes (`pipeline`), so that their number may change.
        self._position, self._saved = body["data"], self.step
        self._skipped = 0 if self.state.guard is None else int(self.state.guard.skipped)
        self._monitors.watchdog.beat()
        return True

    def begin(self, initial: Mapping[str, PyTree]) -> None:
        """Starts the stage afresh, with the parameters of the groups in ``initial``."""
        self.state = states.create(self._make, self.target, rng.key(self._config.seed, "init"), initial)

    def run(self) -> None:
        """Trains to the last step.

        Raises:
          NonFiniteLoss, Interrupted: the last good state is saved.
        """
        total = self.stage.steps
        if self.step >= total:
            self._log(f"stage {self.number} is complete: {total} steps")
            return
        if self.step:
            self._log(f"stage {self.number}: resumed at step {self.step} of {total}")
        train_step = steps.make_train_step(
            self.stage,
            self.target,
            self._mesh,
            seed=self._config.seed,
            first_step=self._first_step,
            rules=self._rules,
        )
        iterator = Batches(self._experiment.dataset("train", self._seed, self._rows), self._mesh, self._batch_size)
        if self._position is not None:
            iterator.restore(self._position, self.step)
        writes = jax.process_index() == 0
        writer = reports.Writer(self._workdir, self.number, self.step, total, self._cost, self._log, writes)
        self._saved_at = time.monotonic()
        try:
            self._loop(train_step, iterator, writer)
        finally:
            writer.close()
            iterator.close()

    def _loop(self, train_step, iterator, writer: reports.Writer) -> None:
        evaluate = self._evaluator()
        clock, warm = reports.Clock(), False
        # The host looks at a step's metrics only after the next one is dispatched, so it needs positions further back.
        positions = collections.deque([(self.step, iterator.position)], maxlen=3)
        pending = None
        while self.step < self.stage.steps:
            self._monitors.profile.before(self.step + 1, self.number)
            values = self._advance(train_step, iterator, clock)
            positions.append((self.step, iterator.position))
            if pending is not None:
                self._guard(*pending, positions, writer)
            pending = (self.step, values)
            stop, late = self._is_asked()
            due = self._due(late)
            is_profiled = self._monitors.profile.ends_after(self.step, self.number)
            if warm and not (any(due) or stop or is_profiled):
                continue
            self._guard(*pending, positions, writer)
            pending = None
            self._monitors.profile.after(self.step, self.number)
            if not warm:  # the first step of a process is mostly compilation
                clock.lap()
            log_due, eval_due, save_due = due
            if log_due:
                lap = clock.lap() if warm else None
                writer.train(self.step, {name: float(value) for name, value in jax.device_get(values).items()}, lap)
            clock.stop()
            if eval_due:
                writer.holdout(self.step, evaluate(self.state))
            self._sample(writer)
            if save_due or stop:
                writer.flush()
                self._save(self.step, self.state, positions[-1][1])
            if stop and self.step < self.stage.steps:
                self._interrupt()
            self._monitors.watchdog.beat()
            warm = True
            clock.start()

    def _advance(self, train_step, iterator, clock: reports.Clock) -> dict:
        """Dispatches the next step; its metrics, which may not be there yet."""
        asked = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            raise UserError(f"data ended after {self.step} steps: the corpus must hold at least one batch")
        waited = time.perf_counter() - asked
        self.state, values = train_step(self.state, batch)
        self.step += 1
        clock.count(iterator.tokens, waited)
        return values

    def _due(self, late: bool) -> tuple[bool, bool, bool]:
        """Whether to log, evaluate and save after this step; ``late``: a save is due by the clock."""
        settings, last = self._config.train, self.step == self.stage.steps
        every = [settings.log_every, settings.eval_every, settings.checkpoint_every]
        log, evaluate, save = (last or self.step % n == 0 for n in every)
        return log or self.step == 1, evaluate, save or late or self.step in self._milestones

    def _is_asked(self) -> tuple[bool, bool]:
        """Whether to stop, and to save by the clock (`train.checkpoint_minutes`), after this step.

        In all processes or in none: several processes learn of a signal, and of the clock of process 0, one step later.
        """
        stop, late = self._monitors.signals.received is not None, self._is_late()
        if jax.process_count() > 1:
            before, self._asked = self._asked, distributed.any_true(stop, late)
            stop, late = (bool(value) for value in np.asarray(before))
        return stop, late

    def _is_late(self) -> bool:
        """Whether the last save is as long ago as `train.checkpoint_minutes`, by the clock of process 0."""
        minutes, now = self._config.train.checkpoint_minutes, time.monotonic()
        if not minutes or jax.process_index() or now - self._saved_at < 60 * minutes:
            return False
        self._saved_at = now  # asked once: where there are several processes the save comes a step later
        return True

    def _evaluator(self) -> Callable[[states.TrainState], dict[str, float]]:
        """A function from state to metrics over the first held-out batches, which are read once."""
        settings, cached = self._config, []
        evaluate = HeldOut(self.stage, self._mesh, settings.seed, self._rules)

        def run(state: states.TrainState) -> dict[str, float]:
            if not cached:
                dataset = self._experiment.dataset("holdout", self._seed, self._rows)
                cached.extend(evaluate.read(dataset, settings.train.eval_batches, self._batch_size))
            if not cached:
                raise UserError(f"config.data.holdout = {settings.data.holdout}: must be enough for one batch")
            return evaluate(states.evaluation_params(state), state.frozen, cached)

        return run

    def _sample(self, writer: reports.Writer) -> None:
        settings = self._config.train
        is_last_stage = self.number == len(self._experiment.stages)  # those before it cannot generate
        every = settings.sample_every
        due = self.step == self.stage.steps or (every and self.step % every == 0)
        if self._sampler is not None and is_last_stage and settings.num_samples and due:
            writer.samples(self.step, self._sampler(self.number, self.step, states.evaluation_params(self.state)))

    def _guard(self, step: int, values: dict, positions, writer: reports.Writer) -> None:
        """Waits for the end of a step; reports a skipped update.

        Raises:
          NonFiniteLoss: the step cannot be done; the state before it is saved.
        """
        finite = float(values["finite"])
        self._monitors.watchdog.beat()
        shown = {name: float(values[name]) for name in ("loss", "grad_norm", "grad_norm_average") if name in values}
        line = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if finite:
            skipped = int(values.get("skipped", 0))
            if skipped > self._skipped:
                self._log(f"stage {self.number}  step {step}: update skipped, number {skipped} of this stage ({line})")
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
        settings = self.stage.optimizer
        if np.isfinite(list(shown.values())).all():
            what = f"gradient norm above {settings.spike_factor:g} times its average"
        if settings.max_skipped:
            what += f", {settings.max_skipped} updates before it were skipped"
        where = f"the state after step {good} is saved" if good else "nothing is saved"
        raise NonFiniteLoss(f"stage {self.number}, step {step}: {what} ({line}); {where}")

    @functools.cached_property
    def _fingerprint(self) -> dict:
        """Of the data that this process trains on; made once, not from what its files may be later."""
        return json.loads(json.dumps(self._experiment.fingerprint(self._seed)))

    def _save(self, step: int, state: states.TrainState, position: str) -> None:
        if step != self._saved:
            config, fingerprint = self._config, self._fingerprint
            self._checkpoints.save(step, state, config=config, fingerprint=fingerprint, data=position)
            self._saved, self._saved_at = step, time.monotonic()

    def _interrupt(self) -> None:
        self._checkpoints.wait()
        signum = self._monitors.signals.received or signal.SIGTERM
        name = signal.Signals(signum).name
        raise Interrupted(
            f"stopped by {name} after step {self.step} of stage {self.number}: saved; the same command resumes", signum
        )


class Batches:
    """Batches of a dataset on the devices, some of them ahead of the step that trains on them.

    Attributes:
      position: in the data behind the batch that `__next__` gave last, as JSON.
      tokens: of that batch, over all processes (where they hold different rows, estimated from this one's).
    """

    _AHEAD = 2

    def __init__(self, dataset, mesh: Mesh, batch_size: int):
        self._iterator, self._mesh, self._batch_size = iter(dataset), mesh, batch_size
        self._ready: collections.deque = collections.deque()
        self.position, self.tokens = self._state(), 0

    def _state(self) -> str:
        return json.dumps(self._iterator.get_state())

    def restore(self, position: str, step: int) -> None:
        """Goes on where a checkpoint of ``step`` stands; where batches are found by index the step is all it takes."""
        by_index = set(json.loads(self.position)) == {"step"}
        self._iterator.set_state({"step": step} if by_index else json.loads(position))
        self.position = self._state()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict:
        while len(self._ready) <= self._AHEAD:
            batch = next(self._iterator, None)
            if batch is None:
                break
            tokens = np.count_nonzero(batch["segment_ids"]) * self._batch_size / len(batch["segment_ids"])
            placed = sharding.put_batch(self._mesh, batch, self._batch_size)
            self._ready.append((placed, self._state(), round(tokens)))
        if not self._ready:
            raise StopIteration
        batch, self.position, self.tokens = self._ready.popleft()
        return batch

    def close(self) -> None:
        self._iterator.close()


class HeldOut:
    """Loss and terms of a stage over held-out batches; called with (variables, frozen trees, batches of `read`).

    A batch is divided into as many microbatches as in training.
    """

    def __init__(self, stage: Stage, mesh: Mesh, seed: int, rules: sharding.Rules = sharding.RULES):
        self._mesh = mesh
        self._step = steps.make_eval_step(
            stage.terms, mesh, seed=seed, rules=rules, microbatches=stage.optimizer.accumulation
        )

    def read(self, dataset, count: int, batch_size: int) -> list[dict]:
        """The first ``count`` batches of a dataset, on the devices; it has this process's rows of each."""
        iterator = iter(dataset)
        try:
            return [sharding.put_batch(self._mesh, batch, batch_size) for batch in itertools.islice(iterator, count)]
        finally:
            iterator.close()

    def __call__(self, variables: Params, frozen: Mapping[str, Params], batches: list[dict]) -> dict[str, float]:
        return steps.summarize([self._step(variables, frozen, batch, index) for index, batch in enumerate(batches)])
