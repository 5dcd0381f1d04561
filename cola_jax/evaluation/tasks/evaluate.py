"""The evaluation protocol (SPEC 7): predictions of a checkpoint for tasks, and the judgement of predictions."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from cola_jax import paths
from cola_jax.data import corpora, structures
from cola_jax.data.stories import Stories
from cola_jax.evaluation.stories import held_out_prompts
from cola_jax.evaluation.tasks import answers, examples, matching, prompts, results, tfds_examples
from cola_jax.evaluation.tasks.answers import Asked, Way
from cola_jax.evaluation.tasks.examples import Prediction
from cola_jax.evaluation.tasks.task import Example, Task
from cola_jax.runs import Run
from cola_jax.types import UserError

Log = Callable[[str], None]


class Selection(NamedTuple):
    """Which examples are asked, and behind which demonstrations.

    Attributes:
      data: file of JSON lines, a directory with one for each task, or "tfds".
      demonstrations: file; None: those of the package.
      shots: of every task with an anchor; None: as the task says.
      limit: examples of each task, drawn with ``seed``; 0: all of them.
      seed: of that draw.
    """

    data: str | None
    demonstrations: str | None = None
    shots: int | None = None
    limit: int = 0
    seed: int = 0


def ask(tasks: dict[str, Task], selection: Selection) -> list[Asked]:
    """Reads the examples and builds the prompts of tasks.

    Raises:
      UserError: as in `examples`.
    """
    if selection.data and Path(selection.data).is_file() and len(tasks) > 1:
        raise UserError(f"--data = {selection.data}: must be a directory where there are several tasks")
    shown = examples.demonstrations(selection.demonstrations, tasks, selection.shots)
    asked = []
    for name, task in tasks.items():
        every, facts = _read(name, task, selection.data)
        examples.check_overlap(shown[name], every)
        some = examples.subset(every, selection.limit, selection.seed)
        asked.append(_asked(name, task, every, some, shown[name], facts | {"shots": len(shown[name])}))
    return asked


def _read(name: str, task: Task, data: str | None) -> tuple[list[Example], dict]:
    """The examples of a task, and what is reported of where they are from."""
    if data == "tfds":
        every, place = tfds_examples.read(name, task)
        return every, {"data": place, "data_sha256": prompts.hashed([json.dumps(one) for one in every])}
    file = examples.file_of(data, name, "--data")
    return examples.read(name, task, file), {"data_sha256": examples.sha256(file)}


def _asked(name: str, task: Task, every: list, some: list, shown: list, facts: dict) -> Asked:
    built = prompts.build(task, some, shown)
    facts |= {"prompts_sha256": prompts.hashed([prompt.join() for prompt in built])}
    return Asked(name, task, every, some, built, facts)


def ask_stories(name: str, task: Task, run: Run, count: int) -> Asked:
    """Held-out stories of a run of the embedded corpus, asked for after their first sentences.

    Raises:
      UserError: the run is of another corpus.
    """
    data, seed = run.config.data, run.config.data_seed
    if data.corpus != "stories":
        raise UserError(f"--task = {name}: config.data.corpus = {data.corpus!r}; must be 'stories'")
    texts, begins = corpora.documents(data, "holdout", seed), held_out_prompts(run, seed, count)
    some = []
    for index, begin in enumerate(begins):
        rest = texts[index % len(texts)][len(begin) :]
        some.append(Example(str(index), {"context": begin}, (), rest, f"held-out story {index}"))
    return _asked(name, task, some, some, [], {"shots": 0})


def judge(asked: Asked, predictions: Sequence[Prediction], matcher: str, stories: Stories | None = None) -> list[bool]:
    """Whether each prediction is right; ``stories`` judges those of the embedded corpus."""
    found = []
    for one, said in zip(asked.examples, predictions, strict=True):
        if said.generated is None:
            right = said.choice is not None and said.choice < len(one.choices)
            right = right and matching.normalise(one.choices[said.choice]) == matching.normalise(one.answer)
        elif asked.task.match == "story":
            begin = one.fields["context"]
            right = stories is not None and stories.coherent_with_prompt(begin, begin + said.generated)
        elif asked.task.match == "rule":
            right = structures.RULES[asked.name].valid((one.fields["context"] + said.generated).strip())
        else:
            right = matching.correct(matcher, asked.task, one, said.generated)
        found.append(right)
    return found


def _left_open(asked: Asked) -> list[int] | None:
    """What each prompt of a rule leaves open."""
    if asked.task.match != "rule":
        return None
    return [structures.RULES[asked.name].open(one.fields["context"]) for one in asked.examples]


def _conclude(found: dict[str, dict], matcher: str, log: Log) -> dict:
    """Prints the table; returns the average, or the one task."""
    for name, one in found.items():
        log(results.line(name, one))
    if len(found) == 1:
        ((name, one),) = found.items()
        return {"task": name, **one, "matcher": matcher}
    last = results.average(found)
    log(results.line("average", last))
    return {**last, "tasks": found, "matcher": matcher}


def from_predictions(
    tasks: dict[str, Task], selection: Selection, place: str, matcher: str, mod: int, log: Log
) -> dict:
    """Judges predictions that are there: no model is needed.

    Args:
      tasks: by name.
      selection: the examples.
      place: file of predictions, or a directory with one for each task.
      matcher: one of `matching.MATCHERS`.
      mod: see `results.result`.
      log: prints a line.

    Raises:
      UserError: as in `examples`; the task needs a model.
    """
    if "stories" in tasks:
        raise UserError("--task = stories: needs --checkpoint: the run's corpus says which stories are coherent")
    found = {}
    for asked in ask(tasks, selection):
        file = examples.file_of(place, asked.name, "--predictions")
        said = examples.predictions(file, asked.every, asked.examples)
        correct = judge(asked, said, matcher)
        lengths = [one.prompt_tokens for one in said]
        found[asked.name] = results.result(correct, lengths, mod, _left_open(asked))
    return _conclude(found, matcher, log)


def from_checkpoint(run: Run, asked: Sequence[Asked], way: Way, output: str, matcher: str, mod: int, log: Log) -> dict:
    """Lets a model answer, and judges what it says. A directory that holds some of the predictions is completed.

    Args:
      run: from `runs.load`.
      asked: tasks.
      way: how to answer.
      output: directory of predictions and results.json.
      matcher: one of `matching.MATCHERS`; for choices by likelihood there is nothing to match.
      mod: see `results.result`; 0: the run's tokens per latent.
      log: prints a line.

    Raises:
      UserError: a prompt has no room, the family has no likelihood, or the directory holds others' predictions.
    """
    place, found = Path(output), {}
    if place.exists() and not place.is_dir():
        raise UserError(f"--output = {output}: is a file; must be a directory")
    place.mkdir(parents=True, exist_ok=True)
    stories = Stories(run.config.data.stories) if run.config.data.corpus == "stories" else None
    answer = answers.ANSWERS[way.choice]
    mod = mod or run.family.tokens_per_latent(run.config)
    for one in asked:
        log(f"{one.name}: {len(one.examples)} examples, {one.facts['shots']} demonstrations")
        fitted, file = answer(run, one, way, place)
        said = examples.predictions(file, one.examples, one.examples)
        truncated = {"dropped": sum(f.dropped > 0 for f in fitted), "cut": sum(f.cut > 0 for f in fitted)}
        correct = judge(one, said, matcher, stories)
        lengths = [len(f.ids) for f in fitted]
        found[one.name] = results.result(correct, lengths, mod, _left_open(one)) | {"truncated": truncated}
        found[one.name] |= one.facts | {"prompt_ids_sha256": prompts.hashed([f.ids for f in fitted])}
    last = _conclude(found, matcher if way.choice == "generation" else "likelihood", log)
    facts = {"checkpoint": way.checkpoint, "family": run.family.name, "choice": way.choice, "seed": way.seed}
    facts |= {"settings": dataclasses.asdict(way.settings), "device": jax.devices()[0].device_kind}
    name = "results.json" if way.choice == "generation" else "results.likelihood.json"
    paths.write_atomically(place / name, (json.dumps({**facts, **last}, indent=1) + "\n").encode())
    return last
