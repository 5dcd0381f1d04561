"""Prompts of a task as text, the same for every model, and as the tokens that a context has room for."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from cola_jax.data.tokenizers import Tokenizer
from cola_jax.evaluation.tasks.task import Example, Task

_BETWEEN = "\n\n"  # examples of one prompt


class Prompt(NamedTuple):
    """The text of a prompt: demonstrations with their answers, and the example up to its anchor."""

    shown: tuple[str, ...]
    text: str

    def join(self, dropped: int = 0) -> str:
        """The whole text, without the first ``dropped`` demonstrations."""
        return _BETWEEN.join([*self.shown[dropped:], self.text])


class Fitted(NamedTuple):
    """A prompt as a model gets it.

    Attributes:
      ids: its tokens.
      dropped: demonstrations that there was no room for.
      cut: tokens that were cut off the front of the example.
    """

    ids: list[int]
    dropped: int
    cut: int


def render(task: Task, example: Example) -> str:
    """An example up to its anchor, without a line end behind it."""
    lines = []
    for label, fields in task.lines:
        text = " ".join(example.fields[field] for field in fields if field in example.fields)
        lines.append(f"{label} {text}" if label else text)
    if task.choices:
        lines += [task.options] if task.options else []
        lines += [f"({chr(ord('A') + index)}) {choice}" for index, choice in enumerate(example.choices)]
    return "\n".join([*lines, *([task.anchor] if task.anchor else [])])


def build(task: Task, examples: Sequence[Example], shown: Sequence[Example]) -> list[Prompt]:
    """The prompt of each example, behind the same demonstrations."""
    answered = tuple(f"{render(task, one)} {one.answer}" for one in shown)
    return [Prompt(answered, render(task, one)) for one in examples]


def hashed(prompts: Sequence[str] | Sequence[list[int]]) -> str:
    """A hash of prompts, texts or tokens: equal for models that are asked the same."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def fit(prompt: Prompt, tokenizer: Tokenizer, room: int, unit: int = 1) -> Fitted:
    """The end of a prompt that has room: whole demonstrations are dropped first, then the front of the text.

    Args:
      prompt: see `Prompt`.
      tokenizer: the model's.
      room: most tokens, at least ``unit``.
      unit: the number of tokens is a multiple of it.
    """
    for dropped in range(len(prompt.shown) + 1):
        ids = tokenizer.encode(prompt.join(dropped))
        if len(ids) <= room:
            break
    most = room - room % unit
    keep = min(most, len(ids) - len(ids) % unit)
    return Fitted(ids[len(ids) - keep :], dropped, len(ids) - keep)
