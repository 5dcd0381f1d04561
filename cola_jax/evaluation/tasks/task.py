"""The benchmarks as values: what a prompt of each holds, and how its answers are judged (SPEC 7, paper 16.3)."""

from collections.abc import Sequence
from typing import NamedTuple

from cola_jax.data import structures
from cola_jax.types import UserError

MATCHES = ("word", "equal", "option", "story", "rule")


class Task(NamedTuple):
    """A benchmark.

    Attributes:
      lines: (label, fields): each line of a prompt has those of the fields that an example gives, and needs one.
      match: how released code judges: "word" (the first word), "equal" (the whole answer), "option" (the option that
        is meant), "story" (a whole story of the embedded corpus), "rule" (prompt and answer together obey the rule of
        the task's name, white space around them aside, see `structures`; a prompt may be empty).
      choices: whether an example has options to choose from.
      shots: demonstrations before the example.
      anchor: last line of a prompt, behind which the answer stands; "": the answer continues the text.
      options: line above the options; "": none.
      new_tokens: budget of an answer; 0: what the context leaves.
    """

    lines: tuple[tuple[str, tuple[str, ...]], ...]
    match: str
    choices: bool = True
    shots: int = 2
    anchor: str = "Answer:"
    options: str = ""
    new_tokens: int = 32


class Example(NamedTuple):
    """One example, or demonstration, of a task.

    Attributes:
      id: unique in its file.
      fields: "context" and "question", those that are given.
      choices: texts of the options.
      answer: text of the right one, or of the answer.
      where: its file and line, for errors.
    """

    id: str
    fields: dict[str, str]
    choices: tuple[str, ...]
    answer: str
    where: str


_BOTH = ("context", "question")
_QUESTION = Task((("Question:", _BOTH),), "option")

TASKS: dict[str, Task] = {
    "lambada": Task((("", ("context",)),), "word", choices=False, shots=0, anchor=""),
    "mmlu": _QUESTION,
    "siqa": _QUESTION,
    "squad": Task((("Context:", ("context",)), ("Question:", ("question",))), "equal", choices=False, shots=1),
    "obqa": _QUESTION,
    "hellaswag": Task((("Context:", _BOTH),), "equal"),
    "race": Task((("Article:", _BOTH),), "option", options="Options:"),
    "story_cloze": Task((("Story:", _BOTH),), "equal", anchor="End:"),
    "stories": Task((("", ("context",)),), "story", choices=False, shots=0, anchor="", new_tokens=0),
    **dict.fromkeys(
        structures.RULES, Task((("", ("context",)),), "rule", choices=False, shots=0, anchor="", new_tokens=0)
    ),
}


def get(names: Sequence[str]) -> dict[str, Task]:
    """The tasks of these names.

    Raises:
      UserError: there is no such task, or one is named twice.
    """
    for index, name in enumerate(names):
        if name not in TASKS:
            raise UserError(f"--task = {name}: must be one of {', '.join(TASKS)}")
        if name in names[:index]:
            raise UserError(f"--task = {','.join(names)}: {name} is there twice; each must be there once")
    return {name: TASKS[name] for name in names}
