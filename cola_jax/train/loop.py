"""The training loop: stage 1, then stage 2, resumable at every moment. The only module with state and files.

A run's directory holds `config.json`, `tokenizer.model`, `stage1/` and `stage2/` (checkpoints), `metrics.jsonl`,
`samples.jsonl`, `timing.jsonl` and `tensorboard/`. The same command on the same directory goes on where the last
process stopped, with the same result, bit for bit, as if it had not stopped.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cola_jax import config as configs
from cola_jax import release, rng, sharding
from cola_jax.config import Config
from cola_jax.data import pipeline, tokenizers
from cola_jax.models import cola
from cola_jax.train import checkpoint as checkpoints
from cola_jax.train import metrics as reports
from cola_jax.train import setup
from cola_jax.train import state as states
from cola_jax.train import step as steps
from cola_jax.types import Key, Params, PyTree, UserError

# (stage, step, variables) -> texts
Sampler = Callable[[int, int, Params], list[str]]


class NonFiniteLoss(Exception):
    """The loss or its gradient is not finite: training cannot go on."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of; tests put a toy in the place of the model.

    Attributes:
      config: with everything resolved (the vocabulary size).
      init: variables of the whole model from a key, boxed with logical axes.
      terms: of stage 1 and stage 2, ``(params, batch, keys, reference) -> {name: Term}``.
      dataset: ``(split, seed) -> grain.IterDataset`` of batches.
      fingerprint: ``seed -> dict``, what defines the order of the data.
      difference: lines that tell two fingerprints apart.
      model, tokenizer: for the sampler.
    """

    config: Config
    init: Callable[[Key], Params]
    terms: tuple[steps.TermsFn, steps.TermsFn]
    dataset: Callable[[str, int], Any]
    fingerprint: Callable[[int], dict]
    difference: Callable[[dict, dict], list[str]]
    model: Any = None
    tokenizer: Any = None


def build(config: Config, workdir: Path) -> Parts:
    """The parts of a real run; trains the tokenizer if the run has none yet.

    Raises:
      UserError: see the tokenizers and the corpora.
    """
    tokenizer = tokenizers.create(config.data, workdir / "tokenizer.model")
    config = dataclasses.replace(config, vae=cola.with_vocabulary(config.vae, tokenizer.vocab_size))
    made = setup.model(config)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return Parts(
        config=config,
        init=made.init,
        terms=made.terms,
        dataset=lambda split, seed: pipeline.create(config.data, tokenizer, split, seed, **share),
        fingerprint=functools.partial(pipeline.fingerprint, config.data, tokenizer),
        difference=pipeline.difference,
        model=made.model,
        tokenizer=tokenizer,
    )


def _flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in tree.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return found


def claim_workdir(config: Config, workdir: Path) -> None:
    """Writes `config.json`, or checks that the run in this directory has the same config.

    The mesh may differ: it says where a run is computed, not what.

    Raises:
      UserError: another config; names each field that differs. Nothing is touched.
    """
    path = workdir / "config.json"
    now = json.loads(json.dumps(configs.to_dict(config)))
    if path.exists():
        try:
            saved = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not a JSON file ({error}); allowed is the file that the run wrote") from error
        before, after = _flat(saved), _flat(now)
        names = [name for name in {**before, **after} if not name.startswith("train.mesh_")]
        fields = [name for name in names if before.get(name) != after.get(name)]
        if fields:
            changes = ", ".join(f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in fields)
            raise UserError(f"{workdir}: holds a run with another config ({changes}); choose another --workdir")
    elif jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir = {workdir}: allowed is a directory that can be made ({error})") from error
        reports.write_atomically(path, json.dumps(now, indent=2).encode() + b"\n")


class _Signals:
    """Notes SIGTERM and SIGINT for the loop to act on between steps; a second one acts at once."""

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def _note(self, signum, frame) -> None:
        self.received = signum
        signal.signal(signum, self._before[signum])

    def __enter__(self) -> "_Signals":
        if jax.process_count() > 1:
            return self  # processes must agree on the step to stop at: see `Checkpoints.reached_preemption`
        for signum in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[signum] = signal.signal(signum, self._note)
            except ValueError:  # not in the main thread, where signals are handled
                break
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def data_seed(seed: int, stage: int) -> int:
    """The seed of a stage's order of the data; the stages do not see the same order."""
    return int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])


class _Stage:
    """One stage of a run: its state, data, checkpoints and reports."""

    def __init__(self, parts: Parts, workdir: Path, stage: int, mesh: Mesh, sampler, say, stop: _Signals):
        self._parts, self._config, self.number, self._mesh = parts, parts.config, stage, mesh
        self._workdir, self._sampler, self._say, self._stop = workdir, sampler, say, stop
        self._setup = setup.stage(self._config, stage, parts.init)
        self.total, accumulation = self._setup.steps, self._setup.settings.accumulation
        sharding.check_batch(self._config.data.batch_size, accumulation, mesh, f"optimizer{stage}.accumulation")
        self._target = states.abstract(self._setup.make, mesh)
        self._seed = data_seed(self._config.seed, stage)
        self._checkpoints = checkpoints.Checkpoints(workdir / f"stage{stage}", self._config.train.keep_checkpoints, say)
        self.step = 0
        self.state: states.TrainState | None = None
        self._position: str | None = None  # in the data, as JSON
        self._saved: int | None = None

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
        return True

    def begin(self, vae: PyTree | None, dit: PyTree | None = None) -> None:
        """Starts the stage afresh, from the parameters of the stage before or of another model if there are any."""
        self.state = states.create(self._setup.make, self._mesh, rng.key(self._config.seed, "init"), vae, dit)

    def initial(self) -> dict[str, PyTree]:
        """What `config.train.init_from` holds of the stage's groups; raises UserError unless the shapes are its."""
        path = self._config.train.init_from
        if not path:
            return {}
        loaded = release.load(path)[1] if release.is_released(path) else checkpoints.load_params(path).variables
        groups = {name: loaded["params"].get(name, {}) for name in self._target.params["params"]}
        needed, given = _flat(self._target.params["params"]), _flat(groups)
        for name in sorted(set(needed) | set(given)):
            shapes = [list(tree[name].shape) if name in tree else None for tree in (given, needed)]
            if shapes[0] != shapes[1]:
                raise UserError(f"config.train.init_from = {path}: {name} is {shapes[0]}, this run needs {shapes[1]}")
        return groups

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
            first_step=0 if self.number == 1 else config.stage1.steps,
        )
        iterator = iter(parts.dataset("train", self._seed))
        if self._position is not None:
            iterator.set_state(json.loads(self._position))
        flops = reports.flops_per_token(config, self.number)
        writer = reports.Writer(
            self._workdir, self.number, self.step, self.total, flops, self._say, jax.process_index() == 0
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
            batch = next(iterator, None)
            if batch is None:
                raise UserError(f"data ended after {self.step} steps: allowed is a corpus with at least one batch")
            self.state, values = train_step(self.state, sharding.put_batch(self._mesh, batch))
            self.step += 1
            clock.count(int(np.count_nonzero(batch["segment_ids"])) * jax.process_count())
            positions.append((self.step, json.dumps(iterator.get_state())))
            if pending is not None:
                self._guard(*pending, positions, writer)
            pending = (self.step, values)
            last = self.step == self.total
            is_log = last or self.step == 1 or self.step % settings.log_every == 0
            is_eval = last or self.step % settings.eval_every == 0
            is_save = last or self.step % settings.checkpoint_every == 0
            stop = self._stop.received is not None or self._checkpoints.reached_preemption(self.step)
            if warm and not (is_log or is_eval or is_save or stop):
                continue
            self._guard(*pending, positions, writer)
            pending = None
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
            warm = True
            clock.start()

    def _evaluator(self) -> Callable[[states.TrainState], dict[str, float]]:
        """A function from state to metrics over the first held-out batches, which are read once."""
        dataset = self._parts.dataset("holdout", self._seed)
        eval_step = steps.make_eval_step(self._parts.terms[self.number - 1], self._mesh, seed=self._config.seed)
        cached = []

        def evaluate(state: states.TrainState) -> dict[str, float]:
            if not cached:
                iterator = iter(dataset)
                for _, batch in zip(range(self._config.train.eval_batches), iterator, strict=False):
                    cached.append(sharding.put_batch(self._mesh, batch))
                iterator.close()
            if not cached:
                raise UserError(f"config.data.holdout = {self._config.data.holdout}: allowed is one that gives a batch")
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
        """Raises NonFiniteLoss if a step was not finite, with the state before it saved."""
        if float(values["finite"]):
            return
        good = int(self.state.step)
        writer.flush()
        if good:
            self._save(good, self.state, dict(positions)[good])
            self._checkpoints.wait()
        hidden = ("finite", "learning_rate")
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items() if name not in hidden)
        where = f"the state after step {good} is saved" if good else "nothing is saved"
        raise NonFiniteLoss(f"stage {self.number}, step {step}: loss or gradient is not finite ({shown}); {where}")

    def _interrupt(self) -> None:
        self._checkpoints.wait()
        signum = self._stop.received or signal.SIGTERM
        name = signal.Signals(signum).name
        raise Interrupted(
            f"stopped by {name} after step {self.step} of stage {self.number}: saved; the same command goes on", signum
        )


def train(
    config: Config,
    workdir: str | Path,
    parts: Parts | None = None,
    sampler: Sampler | None = None,
    say: Callable[[str], None] | None = None,
) -> states.TrainState:
    """Runs both stages, or what is left of them.

    Args:
      config: the run's.
      workdir: where everything is kept; made if it does not exist.
      parts: what to train; None for the model and data of the config (`build`).
      sampler: generates texts in stage 2, every ``train.sample_every`` steps and at the end.
      say: prints a line; None for the console.

    Returns:
      The final state of the last stage.

    Raises:
      UserError: config, data or directory do not fit.
      NonFiniteLoss: training diverged.
      Interrupted: SIGTERM or Ctrl-C.
    """
    workdir = Path(workdir).absolute()
    claim_workdir(config, workdir)
    say = say or functools.partial(print, flush=True)
    if jax.process_index():
        say = _silent
    with _Signals() as stop, contextlib.ExitStack() as opened:
        parts = parts or build(config, workdir)
        mesh = sharding.make_mesh(config.train)

        def open_stage(stage: int) -> _Stage:
            return opened.enter_context(_Stage(parts, workdir, stage, mesh, sampler, say, stop))

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
