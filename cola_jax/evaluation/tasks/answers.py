"""What a checkpoint answers to the prompts of a task: texts, or the most likely options, in a file that resumes."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from cola_jax import rng
from cola_jax.evaluation import continuations, score_file
from cola_jax.evaluation.tasks import prompts
from cola_jax.evaluation.tasks.prompts import Fitted, Prompt
from cola_jax.evaluation.tasks.task import Example, Task
from cola_jax.runs import Run
from cola_jax.types import UserError


class Asked(NamedTuple):
    """The examples of a task and their prompts; ``every`` has all of the file."""

    name: str
    task: Task
    every: list[Example]
    examples: list[Example]
    prompts: list[Prompt]
    facts: dict


class Way(NamedTuple):
    """How a checkpoint answers.

    Attributes:
      checkpoint: which it is, for resumed files.
      choice: one of `ANSWERS`.
      settings: of the generation, or of the likelihood.
      seed: of all draws.
      batch_size: prompts, or rows, at a time.
      new_tokens: budget of an answer; None: as the task says.
    """

    checkpoint: str
    choice: str
    settings: Any
    seed: int
    batch_size: int
    new_tokens: int | None = None


def _resume(file: Path, asked: Asked, way: Way, settings: Any) -> int:
    """How many predictions a file holds already."""
    identity = {"task": asked.name, "prompts": asked.facts["prompts_sha256"], "checkpoint": way.checkpoint}
    identity |= {"choice": way.choice, "seed": way.seed} | dataclasses.asdict(settings)
    identity.pop("rows", None)  # how many are solved at a time does not change the result
    return score_file.resume(file, json.loads(json.dumps(identity)))


def generation(run: Run, asked: Asked, way: Way, place: Path) -> tuple[list[Fitted], Path]:
    """Writes what the model writes behind each prompt."""
    context, budget = run.config.data.sequence_length, way.new_tokens or asked.task.new_tokens
    if not budget:
        longest = max(len(run.tokenizer.encode(prompt.join())) for prompt in asked.prompts)
        budget = context - longest
        if budget < 1:
            what = f"task {asked.name!r}: a prompt has {longest} tokens, all of the context ({context})"
            raise UserError(f"{what}; must be shorter, or --max_new_tokens must be given")
    if not 0 < budget < context:
        raise UserError(f"max_new_tokens = {budget}: must be at least 1 and below the {context} tokens of the context")
    fitted = [prompts.fit(prompt, run.tokenizer, context - budget) for prompt in asked.prompts]
    settings = dataclasses.replace(way.settings, max_new_tokens=budget)
    file = place / f"{asked.name}.jsonl"
    done = _resume(file, asked, way, settings)
    ids = [one.ids for one in fitted]
    samples, key, index = continuations.identities(ids), rng.key(way.seed, "sample"), done
    with tqdm(total=len(ids), initial=done, unit="example", desc=asked.name, dynamic_ncols=True) as bar:
        for batch in continuations.generate(run, ids[done:], settings, key, samples[done:], way.batch_size):
            texts = [{"generated": run.tokenizer.decode(tokens)} for tokens in batch]
            index = _append(file, asked, fitted, index, texts)
            bar.update(len(batch))
    return fitted, file


def _append(file: Path, asked: Asked, fitted: list[Fitted], index: int, answers: Sequence[dict]) -> int:
    """Adds the answers to the next prompts; returns the index behind them."""
    rows = []
    for place, answer in enumerate(answers, index):
        one = fitted[place]
        row = {"index": place, "id": asked.examples[place].id, **answer, "prompt_tokens": len(one.ids)}
        rows.append(row | {"dropped": one.dropped, "cut": one.cut})
    score_file.append(file, rows)
    return index + len(rows)


def likelihood(run: Run, asked: Asked, way: Way, place: Path) -> tuple[list[Fitted], Path]:
    """Writes log p of each option behind its prompt, and the most likely one."""
    if not asked.task.choices:
        raise UserError(f"--choice = likelihood: task {asked.name!r} has no choices; must be one that has")
    run.family.check_scorable(run.model, run.params)
    data, unit = run.config.data, run.family.tokens_per_latent(run.config)
    given, fitted = [], []
    for one, prompt in zip(asked.examples, asked.prompts, strict=True):
        options = [run.tokenizer.encode(f" {choice}") for choice in one.choices]
        room = data.sequence_length - max(map(len, options)) - data.align
        if room < unit:
            raise UserError(
                f"{one.where}: an option with {max(map(len, options))} tokens; must leave room for a prompt"
            )
        fitted.append(prompts.fit(prompt, run.tokenizer, room, unit))
        ends = [data.align - (len(fitted[-1].ids) + len(ids)) % data.align for ids in options]
        responses = [ids + [run.tokenizer.eos_id] * end for ids, end in zip(options, ends, strict=True)]
        given.append(continuations.Given(fitted[-1].ids, responses, 0, True))
    samples = continuations.identities([one.prefix for one in given])
    given = [one._replace(identity=sample) for one, sample in zip(given, samples, strict=True)]
    file = place / f"{asked.name}.likelihood.jsonl"
    done, key = _resume(file, asked, way, way.settings), rng.key(way.seed, "likelihood")
    index = done
    with tqdm(total=len(given), initial=done, unit="example", desc=asked.name, dynamic_ncols=True) as bar:
        for scores in continuations.score(run, given[done:], way.settings, key, way.batch_size):
            index = _append(file, asked, fitted, index, [_answer(one) for one in scores])
            bar.update(len(scores))
    return fitted, file


def _answer(scores: list[continuations.Score]) -> dict:
    """The most likely option; none where a log p is not known."""
    values = [one.log_prob for one in scores]
    known = all(value == value for value in values)
    errors = [one.error if one.error == one.error else None for one in scores]
    best = max(range(len(values)), key=values.__getitem__) if known else None
    return {"choice": best, "log_prob": values if known else None, "log_prob_error": errors}


# How a model answers, by name: (run, task, how, directory) -> (prompts as they were given, file of predictions).
ANSWERS: dict[str, Callable[[Run, Asked, Way, Path], tuple[list[Fitted], Path]]] = {
    "generation": generation,
    "likelihood": likelihood,
}
