"""Examples and demonstrations from files of JSON lines, and predictions for them; each line is checked."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cola_jax.evaluation.tasks.matching import normalise
from cola_jax.evaluation.tasks.task import Example, Task
from cola_jax.types import UserError

_TEXTS = ("context", "question")


class Prediction(NamedTuple):
    """What a model wrote for an example, or which option it finds most likely.

    Attributes:
      generated: uncut; None where an option was chosen by likelihood.
      choice: index of the option that was chosen by likelihood; None: none.
      prompt_tokens: length of its prompt; None where the file does not say.
    """

    generated: str | None
    choice: int | None
    prompt_tokens: int | None


def lines(path: str | Path, flag: str) -> Iterator[tuple[str, dict]]:
    """(file and line, object) of each line of a file.

    Raises:
      UserError: the file cannot be read or is empty, or a line is no JSON object.
    """
    try:
        content = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} = {path}: must be a UTF-8 file of JSON lines ({error})") from error
    if not content:
        raise UserError(f"{flag} = {path}: empty; must have at least one line")
    for number, line in enumerate(content, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not JSON ({error}); must be an object") from error
        if not isinstance(value, dict):
            raise UserError(f"{path} line {number}: {type(value).__name__}; must be an object")
        yield f"{path} line {number}", value


def file_of(place: str | None, name: str, flag: str) -> Path:
    """The file of a task: ``place`` itself, or ``<name>.jsonl`` in it where it is a directory.

    Raises:
      UserError: there is none.
    """
    if not place:
        raise UserError(f"{flag} is missing: must name a file of JSON lines, or a directory with {name}.jsonl")
    file = Path(place) / f"{name}.jsonl" if Path(place).is_dir() else Path(place)
    if not file.is_file():
        raise UserError(f"{flag} = {place}: no file {file}")
    return file


def sha256(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _identity(value: dict, where: str, seen: dict[str, str]) -> str:
    found = value.get("id")
    if not isinstance(found, str | int) or isinstance(found, bool):
        raise UserError(f"{where}: id = {found!r}; must be text or a whole number")
    if (earlier := seen.setdefault(str(found), where)) != where:
        raise UserError(f"{where}: id {found!r} is in {earlier}, too; each must be there once")
    return str(found)


def _text(value: dict, name: str, where: str) -> str:
    if not isinstance(value.get(name), str) or not value[name].strip():
        raise UserError(f"{where}: {name} = {value.get(name)!r}; must be text")
    return value[name]


def example(name: str, task: Task, value: dict, where: str, seen: dict[str, str]) -> Example:
    """The example of one line.

    Args:
      name: of the task, for errors.
      task: what its examples must have.
      value: the object.
      where: its file and line.
      seen: id -> where, of the lines before; this one is added.

    Raises:
      UserError: a field is missing or of a wrong type, an id is there twice, or the answer is no option.
    """
    empty = ("",) if task.match == "rule" else ()  # from nothing
    given = {field: value[field] for field in _TEXTS if value.get(field) is not None}
    texts = {field: text if text in empty else _text(value, field, where) for field, text in given.items()}
    for _, wanted in task.lines:
        if not any(field in texts for field in wanted):
            raise UserError(f"{where}: no {' or '.join(wanted)}; an example of task {name!r} must have it")
    if "answer" not in value:
        raise UserError(f"{where}: no answer; an example of task {name!r} must have it")
    choices, answer = value.get("choices"), _text(value, "answer", where)
    if task.choices:
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) for text in choices):
            raise UserError(f"{where}: choices = {choices!r}; must be a list of at least 2 texts (task {name!r})")
        if normalise(answer) not in map(normalise, choices):
            raise UserError(f"{where}: answer = {answer!r}; must be one of its choices {choices}")
    return Example(_identity(value, where, seen), texts, tuple(choices or ()), answer, where)


def read(name: str, task: Task, path: Path) -> list[Example]:
    """The examples of a task's file.

    Raises:
      UserError: as `lines` and `example`.
    """
    seen: dict[str, str] = {}
    return [example(name, task, value, where, seen) for where, value in lines(path, "--data")]


def subset(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """``limit`` of the examples, drawn with ``seed``, in their order; 0: all of them."""
    if not limit or limit >= len(examples):
        return list(examples)
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return [examples[index] for index in sorted(chosen)]


def demonstrations(path: str | None, tasks: dict[str, Task], shots: int | None) -> dict[str, list[Example]]:
    """The first demonstrations of each task, as many as it shows, from a file whose lines name their task.

    Args:
      path: None: those that come with the package.
      tasks: by name.
      shots: for every task with an anchor; None: as the task says.

    Raises:
      UserError: as `lines` and `example`, or there are too few.
    """
    flag = "--demonstrations"
    file = Path(path) if path else Path(str(resources.files(__package__) / "demonstrations.jsonl"))
    found: dict[str, list[Example]] = {name: [] for name in tasks}
    seen: dict[str, dict[str, str]] = {name: {} for name in tasks}
    for where, value in lines(file, flag):
        name = value.get("task")
        if not isinstance(name, str):
            raise UserError(f"{where}: task = {name!r}; must be the name of a task")
        if name in tasks:
            found[name].append(example(name, tasks[name], value, where, seen[name]))
    for name, task in tasks.items():
        need = task.shots if shots is None or not task.anchor else shots
        if len(found[name]) < need:
            raise UserError(f"{flag} = {file}: {len(found[name])} of task {name!r}; must be at least {need}")
        found[name] = found[name][:need]
    return found


def check_overlap(shown: Sequence[Example], examples: Sequence[Example]) -> None:
    """Raises UserError for a demonstration that is an example, too, whatever its case and punctuation."""

    def text(one: Example) -> str:
        return normalise(" ".join(one.fields[field] for field in _TEXTS if field in one.fields))

    known = {text(one): one.where for one in examples}
    for one in shown:
        if text(one) in known:
            raise UserError(f"{one.where}: is in the evaluation set ({known[text(one)]}); demonstrations must not be")


def predictions(path: Path, every: Sequence[Example], asked: Sequence[Example]) -> list[Prediction]:
    """The predictions for ``asked``, in that order.

    Args:
      path: JSON lines with "id" and "generated" (or "choice"), in any order.
      every: the examples of the data file: others must not be there.
      asked: those that are judged: each must be there.

    Raises:
      UserError: as `lines`; an id twice, unknown or missing; a line without what was written.
    """
    seen: dict[str, str] = {}
    found: dict[str, Prediction] = {}
    known = {one.id for one in every}
    for where, value in lines(path, "--predictions"):
        name = _identity(value, where, seen)
        if name not in known:
            raise UserError(f"{where}: id {name!r} is not in the data; must be predictions for these examples")
        found[name] = _prediction(value, where)
    missing = [one.id for one in asked if one.id not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{path}: no line with id {missing[0]!r}{more}; must have all of {len(asked)} examples")
    return [found[one.id] for one in asked]


def _prediction(value: dict, where: str) -> Prediction:
    def optional(name: str, check: Callable[[Any], bool], what: str):
        if value.get(name) is not None and not check(value[name]):
            raise UserError(f"{where}: {name} = {value[name]!r}; must be {what}")
        return value.get(name)

    def whole(found: Any) -> bool:
        return isinstance(found, int) and not isinstance(found, bool) and found >= 0

    generated = optional("generated", lambda found: isinstance(found, str), "text")
    if generated is None and "choice" not in value:
        raise UserError(f"{where}: no generated; must be what the model wrote")
    number = "a whole number, at least 0"
    return Prediction(generated, optional("choice", whole, number), optional("prompt_tokens", whole, number))
