"""Accuracies of tasks: whole, by the length of the prompt modulo the patch (paper, table 6), and their average."""

from collections.abc import Mapping, Sequence

import numpy as np

from cola_jax.evaluation.statistics import Proportion


def _share(correct: np.ndarray) -> dict:
    """Accuracy and interval in percent, as the paper gives them."""
    found = Proportion(int(correct.sum()), len(correct))
    accuracy = 100 * found.successes / found.total if found.total else None
    interval = [round(100 * end, 4) for end in found.interval]
    return {"accuracy": accuracy, "count": found.total, "correct": found.successes, "interval": interval}


def result(
    correct: Sequence[bool], prompt_tokens: Sequence[int | None], mod: int, left_open: Sequence[int] | None = None
) -> dict:
    """What is reported of a task.

    Args:
      correct: for each example.
      prompt_tokens: length of each prompt; None where it is not known.
      mod: 2 or more: the examples are also divided by ``prompt_tokens % mod``; else they are not.
      left_open: of each example, what its prompt leaves open, by which they are divided, too.

    Returns:
      accuracy and its 95 % Wilson interval in percent, count, correct; with ``mod`` also prompt_mod: remainder -> the
      same of these examples; and so open.
    """
    hits = np.asarray(correct, bool)
    found = _share(hits)
    if mod > 1 and all(length is not None for length in prompt_tokens):
        rests = np.array(prompt_tokens, int) % mod
        found["prompt_mod"] = {str(rest): _share(hits[rests == rest]) for rest in range(mod)}
    if left_open is not None:
        counts = np.array(left_open, int)
        found["open"] = {str(count): _share(hits[counts == count]) for count in np.unique(counts)}
    return found


def average(results: Mapping[str, dict]) -> dict:
    """The mean accuracy over tasks ("Task Avg" of the paper), each counted once, and that of each division."""
    found = {"task": "average", "accuracy": _mean(results.values()), "count": sum(r["count"] for r in results.values())}
    divided = [one["prompt_mod"] for one in results.values() if "prompt_mod" in one]
    if len(divided) == len(results):
        found["prompt_mod"] = {rest: {"accuracy": _mean(one[rest] for one in divided)} for rest in divided[0]}
    return found


def _mean(parts) -> float | None:
    values = [part["accuracy"] for part in parts]
    return None if None in values else float(np.mean(values))


def line(name: str, found: dict) -> str:
    """A row of the table that is printed."""
    text = f"{name:<12} {_percent(found['accuracy'])} %"
    if "interval" in found:
        low, high = found["interval"]
        text += f" [{low:5.2f}, {high:5.2f}]"
    text += f"  of {found['count']}"
    for rest, part in found.get("prompt_mod", {}).items():
        text += f"  Mod{rest} {_percent(part['accuracy'])} %" + (f" of {part['count']}" if "count" in part else "")
    for count, part in found.get("open", {}).items():
        text += f"\n  {count} open: {_percent(part['accuracy'])} % of {part['count']}"
    cut = found.get("truncated")
    if cut and (cut["dropped"] or cut["cut"]):
        text += f"  prompts without all demonstrations {cut['dropped']}, cut {cut['cut']}"
    return text


def _percent(value: float | None) -> str:
    return "  -  " if value is None else f"{value:5.2f}"
