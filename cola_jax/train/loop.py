"""A whole run: its stages one after another, resumable at every moment.

A run's directory holds `config.json`, `tokenizer.model` (if the tokenizer was trained here), a directory of checkpoints
for each stage (`stage1/`, ...), `metrics.jsonl`, `samples.jsonl`, `timing.jsonl`, `starts.jsonl` and `tensorboard/`. In
a bucket, where files cannot grow, each start has its own `metrics-00001.jsonl` and so on.
The same command on the same directory resumes where the last process stopped, with the same result, bit for bit, as if
it had not stopped.
"""

import contextlib
import functools
from collections.abc import Callable

import jax

from cola_jax import paths, sharding
from cola_jax.config import Config
from cola_jax.families.interface import Family
from cola_jax.train import initialise, interrupts, starts, workdir
from cola_jax.train import state as states
from cola_jax.train.experiment import Experiment, build
from cola_jax.train.trainer import Monitors, Sampler, Trainer
from cola_jax.types import Place, PyTree, TemporaryError, UserError


def train(
    config: Config,
    directory: str | Place,
    experiment: Experiment | None = None,
    sampler: Sampler | None = None,
    log: Callable[[str], None] | None = None,
    profile_steps: tuple[int, int] | None = None,
    family: Family | None = None,
) -> states.TrainState:
    """Trains all stages, or what is left of them.

    In a run of several processes each of them calls this, with the same arguments, after `distributed.initialize`.

    Args:
      config: the run's.
      directory: where everything is kept; made if it does not exist. All processes see it. It may be gs://bucket/name.
      experiment: what to train; None for the model and data of the config (`experiment.build`).
      sampler: generates texts in the last stage, every ``train.sample_every`` steps and at the end.
      log: prints a line; None for the console.
      profile_steps: first and last step of the last stage that are profiled, into ``directory/profile``.
      family: as of `experiment.build`, where no experiment is given.

    Returns:
      The final state of the last stage.

    Raises:
      UserError: config, data or directory do not fit.
      TemporaryError: nothing can be read or written (the disk is full, for example), or another process is in trouble.
      NonFiniteLoss: training diverged.
      Interrupted: SIGTERM or Ctrl-C.
    """
    directory = paths.directory(directory, "--workdir")
    try:
        return _train(config, directory, experiment, sampler, log, profile_steps, family)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        message = f"--workdir = {directory}: training stopped: {reason}; what was saved is intact"
        raise TemporaryError(message) from error
    except UserError as error:
        if interrupts.is_temporary(error):
            raise TemporaryError(str(error)) from error
        raise


def _train(config: Config, directory: Place, experiment, sampler, log, profile_steps, family) -> states.TrainState:
    workdir.claim(config, directory)
    log = log or functools.partial(print, flush=True)
    if jax.process_index():
        log = _silent
    experiment = experiment or build(config, directory, family)
    starts.record(config, directory, log)
    mesh = sharding.make_mesh(config.train)
    trained = [i for i, stage in enumerate(experiment.stages) if stage.steps] or [0]
    monitors = Monitors(config, directory, profile_steps, trained[-1] + 1)
    with monitors, contextlib.ExitStack() as opened:

        def open_stage(index: int) -> Trainer:
            return opened.enter_context(Trainer(experiment, index, directory, mesh, monitors, log, sampler))

        last = open_stage(trained[-1])
        if not last.restore():
            given = initialise.load(config.train.init_from, last.target.params["params"])
            _start(last, trained[:-1], given, open_stage)
            del given
        last.run()
        return last.state


def _start(trainer: Trainer, before: list[int], given: dict[str, PyTree], open_stage: Callable[[int], Trainer]) -> None:
    """Begins a stage that has no checkpoint: from what the stages before it train, if there are any.

    Args:
      trainer: of the stage.
      before: the stages to train before it, in order.
      given: parameters that the first stage which holds their group begins from.
      open_stage: index -> its trainer.
    """
    initial = {group: values for group, values in given.items() if group in trainer.stage.groups}
    if before:
        previous = open_stage(before[-1])
        if not previous.restore():
            _start(previous, before[:-1], given, open_stage)
        previous.run()
        trained = states.evaluation_params(previous.state)["params"]
        initial |= {group: values for group, values in trained.items() if group in trainer.stage.groups}
        previous.state = None  # the next stage needs the memory
    trainer.begin(initial)


def _silent(line: str) -> None:
    """Prints nothing: only one process does."""
