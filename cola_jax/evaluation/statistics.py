"""Shares and means with their intervals and errors."""

import math
from typing import NamedTuple

import numpy as np


class Proportion(NamedTuple):
    """A share, with its 95 % Wilson interval."""

    successes: int
    total: int

    @property
    def mean(self) -> float:
        return self.successes / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end; (0, 1) without observations."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959964, self.total, self.mean
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
        return max(low, 0.0), min(high, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.mean:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


class Mean(NamedTuple):
    """A mean over stories and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.error:.4f}"


def per_token(values: np.ndarray, tokens: np.ndarray) -> Mean:
    """``sum(values) / sum(tokens)`` over stories, with the standard error of a ratio of means."""
    ratio, count = values.sum() / tokens.sum(), len(values)
    spread = np.sqrt(np.sum(np.square(values - ratio * tokens)) / max(count - 1, 1) / count)
    return Mean(float(ratio), float(spread / tokens.mean()))
