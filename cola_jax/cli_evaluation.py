"""The flags of launch/evaluate.py for the benchmarks of the paper, and what they ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from cola_jax import cli_settings
from cola_jax.evaluation.tasks import evaluate, matching, task
from cola_jax.evaluation.tasks.answers import ANSWERS, Way
from cola_jax.runs import Run
from cola_jax.types import UserError

flags.disclaim_key_flags()  # they are those of the binary that asks for them


class TaskFlags:
    """Defines the flags; calling it evaluates what they name."""

    def __init__(self):
        self._task = flags.DEFINE_list("task", None, f"tasks, with commas between: {', '.join(task.TASKS)}")
        self._data = flags.DEFINE_string("data", None, "examples: JSON lines, a directory with TASK.jsonl, or tfds")
        self._predictions = flags.DEFINE_string("predictions", None, "judge these; no checkpoint (as --data)")
        self._output = flags.DEFINE_string("output", None, "directory of answers and results; repeated, it goes on")
        self._matcher = flags.DEFINE_enum("matcher", "released", matching.MATCHERS, "who is right: docs/tasks.md")
        self._choice = flags.DEFINE_enum("choice", "generation", list(ANSWERS), "write answers, or weigh the options")
        self._demonstrations = flags.DEFINE_string("demonstrations", None, "JSON lines; default: of the package")
        self._shots = flags.DEFINE_integer("shots", None, "demonstrations; default: as the task says", 0)
        self._limit = flags.DEFINE_integer("limit", 0, "examples of each task, drawn at random; 0: all", 0)
        self._subset_seed = flags.DEFINE_integer("subset_seed", 0, "of that draw", 0)
        self._mod = flags.DEFINE_integer("prompt_mod", 0, "divide by prompt length modulo this; 0: P, if above 1", 0)
        self._batch_size = flags.DEFINE_integer("batch_size", 32, "prompts, or rows, at a time", 1)
        self._scoring = cli_settings.scoring_flags(prefix="score_")

    @property
    def given(self) -> bool:
        """Whether tasks are asked for."""
        if self._task.value is None and self._predictions.value is not None:
            raise UserError(f"--predictions = {self._predictions.value}: needs --task, the task that they answer")
        return self._task.value is not None

    def __call__(
        self,
        load: Callable[[], Run],
        generation: Callable[[Run], tuple[Any, int | None]],
        seed: int,
        count: int,
        log: Callable[[str], None],
    ) -> dict:
        """What the flags ask for; the last line of the output.

        Args:
          load: the checkpoint.
          generation: its settings of generation, and the budget of an answer or None.
          seed: of all draws.
          count: stories of task "stories".
          log: prints a line.

        Raises:
          UserError: as in `tasks.evaluate`.
        """
        tasks = task.get([name.strip() for name in self._task.value])
        where = (self._data.value, self._demonstrations.value, self._shots.value)
        selection = evaluate.Selection(*where, self._limit.value, self._subset_seed.value)
        if self._predictions.value is not None:
            if flags.FLAGS.checkpoint is not None:
                raise UserError("--predictions: cannot be given with --checkpoint: they are judged without a model")
            judged = (self._predictions.value, self._matcher.value, self._mod.value)
            return evaluate.from_predictions(tasks, selection, *judged, log)
        if not self._output.value:
            raise UserError("--output is missing: must name a directory for answers and results")
        self._scoring.check()
        asked = evaluate.ask({name: one for name, one in tasks.items() if one.match != "story"}, selection)
        run = load()
        told = [evaluate.ask_stories(name, one, run, count) for name, one in tasks.items() if one.match == "story"]
        settings, budget = generation(run)
        if self._choice.value == "likelihood":
            settings = self._scoring(run.family.score_settings(), run.family.name)
        checkpoint = f"{Path(flags.FLAGS.checkpoint).absolute()} step {run.step}"
        way = Way(checkpoint, self._choice.value, settings, seed, self._batch_size.value, budget)
        shown = (self._output.value, self._matcher.value, self._mod.value)
        return evaluate.from_checkpoint(run, [*asked, *told], way, *shown, log)
