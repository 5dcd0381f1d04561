"""Whether what a model wrote is the right answer: by the rules of released code, or by those of the paper (16.3).

Both cut what was written at the end of its first line and compare without case and punctuation. For options they
differ: "released" wants the option's text or its letter, "paper" takes the option that is most like what was written.
"""

import difflib
import re
from collections.abc import Sequence

from cola_jax.evaluation.tasks.task import Example, Task

MATCHERS = ("released", "paper")
_SIMILAR = 0.9  # least ratio of a text that is taken for an option, "released"
_SHORT = 40  # characters of a text in which a letter in brackets is an answer

_LETTER = re.compile(r"[(\[]?([a-z])[)\]]?\.?", re.IGNORECASE)
_NAMED = re.compile(r"\b(?:answer|option|choice)\b\s*(?:is|=|:)?\s*[(\[]?([a-z])\b", re.IGNORECASE)
_BRACKETED = re.compile(r"[(\[]([a-z])[)\]]", re.IGNORECASE)
_ANNOUNCED = re.compile(r"\b(?:final\s+)?answer\b\s*(?:is\b|=|:)?\s*(.*)", re.IGNORECASE)
_LEAD = re.compile(r"(?:the )?(?:correct )?(?:final )?(?:answer|option|choice) is\b\s*")


def cut(text: str) -> str:
    """``text`` up to its first line end that has a word character before it."""
    word = re.search(r"\w", text)
    return text if word is None else text[: word.start()] + text[word.start() :].partition("\n")[0]


def normalise(text: str) -> str:
    """``text`` in lower case, without punctuation and with single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]", "", text.lower().strip()))


def option(text: str, choices: Sequence[str]) -> int | None:
    """The option that an answer's own text means: its letter, its text, or nearly its text; None: none of them."""
    text = text.strip()
    found = _letter(text, len(choices))
    return _by_text(normalise(text), [normalise(choice) for choice in choices]) if found is None else found


def written_option(text: str, choices: Sequence[str]) -> int | None:
    """`option` of what stands behind "answer" in the last line, or else of the whole text."""
    lines = text.strip().splitlines()
    announced = _ANNOUNCED.search(lines[-1]) if lines else None
    found = option(announced[1], choices) if announced else None
    return option(text, choices) if found is None else found


def _letter(text: str, count: int) -> int | None:
    """The option whose letter a text gives; letters beyond the options do not count."""
    lone = _LETTER.fullmatch(text)
    ways = [[lone[1]] if lone else [], _NAMED.findall(text), _BRACKETED.findall(text) if len(text) <= _SHORT else []]
    for letters in ways:
        known = [index for index in (ord(letter.lower()) - ord("a") for letter in letters) if index < count]
        if known:
            return known[-1]
    return None


def _by_text(text: str, choices: list[str]) -> int | None:
    """The option that a text is, contains alone, or resembles; both normalised."""
    if text in choices:
        return choices.index(text)
    lead = _LEAD.match(text)
    text = text[lead.end() :] if lead else text
    if text in choices:
        return choices.index(text)
    inside = [index for index, choice in enumerate(choices) if choice and choice in text]
    if len(inside) == 1:
        return inside[0]
    best, ratio = _most_similar(text, choices)
    return best if ratio >= _SIMILAR else None


def _most_similar(text: str, choices: list[str]) -> tuple[int, float]:
    """(the first option that is most like a text, their ratio)."""
    ratios = [difflib.SequenceMatcher(None, text, choice).ratio() for choice in choices]
    best = max(range(len(ratios)), key=ratios.__getitem__)
    return best, ratios[best]


def correct(matcher: str, task: Task, example: Example, generated: str) -> bool:
    """Whether what a model wrote answers an example.

    Args:
      matcher: one of `MATCHERS`.
      task: with a match other than "story", whose judge is the corpus.
      example: of the task.
      generated: uncut.
    """
    text, answer = cut(generated), example.answer
    if task.match == "word":
        words, right = normalise(text).split(), normalise(answer).split()
        return bool(words) and words[:1] == right[:1]
    if matcher == "paper" and task.choices:
        if not normalise(text).strip():
            return False
        best, _ = _most_similar(normalise(text), [normalise(choice) for choice in example.choices])
        return normalise(example.choices[best]) == normalise(answer)
    if normalise(text) == normalise(answer):
        return True
    if task.match == "equal":
        return False
    chosen = written_option(text, example.choices)
    return chosen is not None and chosen == option(answer, example.choices)
