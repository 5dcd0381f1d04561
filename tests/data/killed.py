"""Kills preparations and starts them again: they must end as one that was left alone.

    python tests/data/killed.py FOLDER 1
    python tests/data/killed.py FOLDER 1 100

Each attempt is a fork of this process. First it ends at once, without any cleaning up, before or in the middle of
the n-th write, synchronization, renaming or removal, for every n that is a multiple of the first number. Then so many
attempts as the second number says get a SIGKILL at a random moment. Prints counts; any failure is an exception.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data")]
END = 9


class _Fuse:
    """Counts what is done to the disk, and ends the process at the n-th."""

    def __init__(self, number: int):
        self.left = number

    def burn(self) -> bool:
        self.left -= 1
        return self.left == 0


def _install(fuse: _Fuse) -> None:
    from cola_jax.data import shards

    def wrapped(function):
        def call(*arguments, **options):
            if fuse.burn():
                os._exit(END)
            return function(*arguments, **options)

        return call

    for name in ("replace", "fsync", "unlink", "mkdir", "open"):
        setattr(os, name, wrapped(getattr(os, name)))
    add = shards.Writer.add

    def half(self, ids):
        """Writes, and gets half of it to the disk."""
        add(self, ids)
        if fuse.burn():
            self._file.flush()
            os.truncate(self._file.name, os.path.getsize(self._file.name) - len(ids))
            os._exit(END)

    shards.Writer.add = half


def _prepare(folder: Path, output: Path, count: int = 0) -> None:
    from cola_jax.data.preparation import prepare, sources, tokenizer_choice

    source = sources.create("jsonl", str(folder / "in" / "*.jsonl"))
    options = prepare.Options(holdout=0.3, shard_tokens=100, deduplicate=True, workers=count)
    choice = tokenizer_choice.Choice(str(folder / "tokenizer.model"))
    prepare.prepare(source, choice, options, output, lambda line: None)


def _attempt(folder: Path, output: Path, number: int) -> int:
    """The status of an attempt that ends at its n-th act."""
    child = os.fork()
    if not child:
        try:
            _install(_Fuse(number))
            _prepare(folder, output)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _start(folder: Path, output: Path, workers: int) -> int:
    """A fork that prepares; a server of forks belongs to one process, so this one must have none."""
    child = os.fork()
    if not child:
        try:
            _prepare(folder, output, workers)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def _signals(folder: Path, count: int, workers: int) -> int:
    """Kills a preparation so many times, starting anew when it is complete; returns how many were completed."""
    rng, whole, complete = random.Random(workers), content(folder / "whole"), 0
    began = time.monotonic()
    assert not os.waitpid(_start(folder, folder / f"timed{workers}", workers), 0)[1]
    needed = time.monotonic() - began
    for killed in range(count + 1):
        output = folder / f"signals{workers}-{complete}"
        child = _start(folder, output, workers)
        if killed < count:  # the last one is left alone
            time.sleep(rng.uniform(0, needed))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        if not status:
            assert content(output) == whole, output
            complete += 1
    return complete


def main(folder: Path, step: int, kills: int) -> None:
    import corpus_files

    from cola_jax.data import tokenizers

    os.fsync = lambda descriptor: None  # nothing here stops the machine
    texts = [f"text {i} of the garden" for i in range(40)] + ["text 3 of the garden", ""]
    corpus_files.write(folder / "in", "jsonl", texts)
    tokenizers.SentencePieceTokenizer.train(texts, 300).save(folder / "tokenizer.model")
    _prepare(folder, folder / "whole")
    whole = content(folder / "whole")
    assert len(whole) >= 8, sorted(whole)
    ends = 0
    for number in range(step, 1000, step):
        output = folder / f"killed{number}"
        status = _attempt(folder, output, number)
        if status == 0:
            assert content(output) == whole
            break
        assert status == END, (number, status)
        ends += 1
        if number % 5 < step:  # killed again somewhere else
            assert _attempt(folder, output, 1 + number * 7 % 60) in (0, END), number
        assert _attempt(folder, output, 0) == 0, number
        assert content(output) == whole, (number, sorted(content(output)))
    # One that gets a little further each time.
    output = folder / "often"
    attempts = 1
    while _attempt(folder, output, 20 + 2 * attempts) == END:
        attempts += 1
        assert attempts < 500
    assert content(output) == whole
    print(f"{ends} ends, then {attempts} attempts at one", flush=True)
    for workers, count in ((0, kills * 9 // 10), (1, kills // 10)) if kills else ():
        complete = _signals(folder, count, workers)
        print(f"{count} signals, {workers} workers: {complete} complete", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
