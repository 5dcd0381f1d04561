"""Examples of tasks from TensorFlow Datasets, which has some of the benchmarks."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cola_jax.data import tfds_records
from cola_jax.data.tfds_records import text
from cola_jax.evaluation.tasks import examples
from cola_jax.evaluation.tasks.task import Example, Task
from cola_jax.types import UserError


class Source(NamedTuple):
    """Where TFDS has a task.

    Attributes:
      name: of the data set.
      split: whose answers are known.
      fields: features that are read.
      rows: record -> the objects of `examples.example`, without their ids.
    """

    name: str
    split: str
    fields: tuple[str, ...]
    rows: Callable[[dict], Iterable[dict]]


def _lambada(record: dict) -> Iterator[dict]:
    context, _, answer = text(record["passage"]).strip().rpartition(" ")
    yield {"context": context, "answer": answer}


def _squad(record: dict) -> Iterator[dict]:
    answer = text(record["answers"]["text"][0])
    yield {"context": text(record["context"]), "question": text(record["question"]), "answer": answer}


def _obqa(record: dict) -> Iterator[dict]:
    question = record["question"]
    choices = [text(question[f"choice_{letter}"]) for letter in "ABCD"]
    yield {"question": text(question["stem"]), "choices": choices, "answer": choices[int(record["answerKey"])]}


def _race(record: dict) -> Iterator[dict]:
    for question, options, answer in zip(record["questions"], record["options"], record["answers"], strict=True):
        choices = [text(option) for option in options]
        right = choices[ord(text(answer)) - ord("A")]
        yield {"context": text(record["article"]), "question": text(question), "choices": choices, "answer": right}


def _story_cloze(record: dict) -> Iterator[dict]:
    choices = [text(ending) for ending in record["endings"]]
    yield {"context": text(record["context"]), "choices": choices, "answer": choices[int(record["label"])]}


SOURCES: dict[str, Source] = {
    "lambada": Source("lambada", "test", ("passage",), _lambada),
    "squad": Source("squad/v1.1", "validation", ("answers", "context", "question"), _squad),
    "obqa": Source("openbookqa", "test", ("answerKey", "question"), _obqa),
    "race": Source("race/high", "test", ("answers", "article", "options", "questions"), _race),
    "story_cloze": Source("story_cloze/2018", "validation", ("context", "endings", "label"), _story_cloze),
}


def read(name: str, task: Task) -> tuple[list[Example], str]:
    """The examples of a task, and the full name of the data set; it is downloaded if it is not here.

    Raises:
      UserError: TFDS does not have the task, or cannot read it.
    """
    if name not in SOURCES:
        raise UserError(f"--data = tfds: has no task {name!r}; must be one of {', '.join(SOURCES)}, or name a file")
    source = SOURCES[name]
    asked = f"--data = tfds (task {name!r}: {source.name})"
    records, full_name = tfds_records.open_source(source.name, source.fields, source.split, None, asked)
    seen: dict[str, str] = {}
    found = []
    for index in range(len(records)):
        where = f"{full_name} {source.split} record {index}"
        try:
            rows = list(source.rows(records[index]))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 ({error.reason}); must be text") from error
        for part, row in enumerate(rows):
            found.append(examples.example(name, task, {"id": f"{index}.{part}", **row}, where, seen))
    return found, f"{full_name} {source.split}"
