"""What processes tell each other, with one process that plays its part of two."""

import errno
import os

import jax
import numpy as np
import pytest

from cola_jax.train import distributed
from cola_jax.types import TemporaryError, UserError


def two(monkeypatch, index: int, other: BaseException | None) -> None:
    """This process is one of two; ``other``: what the other process's turn of `distributed.first` ended with."""
    asked = []

    def all_true(value: bool) -> bool:
        asked.append(value)
        turn = 1 if index == 0 else 0  # which of the two questions "did it go well" is the other's
        if len(asked) - 1 == turn:
            return value and other is None
        if len(asked) - 1 > turn and other is not None:
            return value and not distributed.interrupts.is_temporary(other)
        return value

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(distributed, "all_true", all_true)


def fail(error: BaseException):
    def make():
        raise error

    return make


@pytest.mark.parametrize("index", [0, 1])
def test_all_processes_learn_whether_another_start_may_help(monkeypatch, index):
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with monkeypatch.context() as patch:
        two(patch, index, None)
        assert distributed.first(lambda: 3) == 3
    for other, kind in ((UserError("x"), UserError), (TemporaryError("x"), TemporaryError), (stale, TemporaryError)):
        with monkeypatch.context() as patch:
            two(patch, index, other)
            with pytest.raises(kind, match="another process could not go on; it has said why"):
                distributed.first(lambda: 3)
        with monkeypatch.context() as patch:
            two(patch, index, None)
            with pytest.raises(type(other)) as caught:
                distributed.first(fail(other))
            assert caught.value is other


def test_values_that_are_true_anywhere():
    for values in ((True, False), (False, False), (False, True, True)):
        np.testing.assert_array_equal(distributed.any_true(*values), values)


def test_one_device_is_enough():
    sharding, largest = distributed._over_devices()
    for row in range(jax.device_count()):
        values = np.zeros((jax.device_count(), 2), bool)
        values[row, 1] = True
        np.testing.assert_array_equal(largest(jax.device_put(values, sharding)), [False, True])
