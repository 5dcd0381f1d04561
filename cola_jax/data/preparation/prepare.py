"""From the documents of a source to a prepared corpus on the disk: `shards` and a `manifest`.

documents -> held-out split by content -> (duplicates out) -> tokens, in worker processes -> shards

The result depends on the input, the tokenizer and `Options` alone: not on the number of workers, nor on how often it
was stopped. A stopped preparation is started again with the same arguments: it reads the input once more from its
start, but passes over the documents of complete shards without making their tokens.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cola_jax.data import manifest, packing, shards
from cola_jax.data.preparation import progress, records, selection, workers
from cola_jax.data.preparation.meter import Meter
from cola_jax.data.preparation.selection import Options
from cola_jax.data.preparation.tokenizer_choice import Choice
from cola_jax.data.tokenizers import Tokenizer
from cola_jax.types import UserError

_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 2**20, 4096  # of what a worker gets at a time; a longer document goes alone


class Unfinished(Exception):
    """Something outside ended the preparation; the same arguments go on with it."""


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """What a worker does: the ids of some documents end to end, and how many each has."""

    tokenizer: Tokenizer
    align: int
    dtype: str

    def __call__(self, contents: list) -> tuple[np.ndarray, list[int]]:
        ids = [self._ids(content) for content in contents]
        return np.concatenate(ids), list(map(len, ids))

    def _ids(self, content: str | np.ndarray) -> np.ndarray:
        eos_id = self.tokenizer.eos_id
        if isinstance(content, str) and self.tokenizer.name != "bytes":
            return np.array(packing.ended(self.tokenizer.encode(content), eos_id, self.align), self.dtype)
        # Ids that are an array already, and bytes, are the same without a list of Python's integers.
        ids = np.frombuffer(content.encode("utf-8"), np.uint8) if isinstance(content, str) else content
        end = packing.ended([0] * (len(ids) % self.align), eos_id, self.align)[len(ids) % self.align :]
        return np.concatenate([ids.astype(self.dtype), np.array(end, self.dtype)])


class _Split:
    """The shards of one split, as they come to be."""

    def __init__(self, name: str, directory: Path, dtype: str, most: int, state: progress.Progress):
        self._name, self._directory, self._dtype, self._most, self._state = name, directory, dtype, most, state
        self._done = state.shards[name]
        ends = itertools.accumulate(shard.info.documents for shard in self._done)
        self._ends = dict(zip(ends, self._done, strict=True))
        self._complete = max(self._ends, default=0)  # documents in complete shards
        self._documents = 0
        self._hash = hashlib.sha256()
        self._writer: shards.Writer | None = None

    def has(self, document: selection.Document) -> bool:
        """Whether a document is in a complete shard.

        Raises:
          UserError: the documents of a complete shard are others than they were.
        """
        if self._documents >= self._complete:
            return False
        self._count(document.digest)
        shard = self._ends.get(self._documents)
        if shard and shard.documents_digest != self._hash.hexdigest():
            self._changed(shard.info.name)
        return True

    def _changed(self, name: str) -> None:
        need = "it must be as it was; remove the directory to prepare it as it is now"
        raise UserError(f"--input: its documents are not those of {self._directory / name}: it was changed; {need}")

    def _count(self, digest: bytes) -> None:
        self._hash.update(digest)
        self._documents += 1

    def add(self, ids: np.ndarray, digest: bytes) -> None:
        """Appends a document."""
        if self._writer and self._writer.tokens + len(ids) > self._most:
            self._complete_shard()
        if not self._writer:
            name = f"{self._name}-{len(self._done):05d}"
            self._writer = shards.Writer(self._directory / name, self._dtype)
        self._writer.add(ids)
        self._count(digest)

    def _complete_shard(self) -> None:
        writer = self._writer
        stem = self._directory / f"{self._name}-{len(self._done):05d}"
        writer.close()
        self._writer = None
        hashes = [manifest.file_sha256(stem.with_name(stem.name + suffix)) for suffix in (".bin", ".idx")]
        info = manifest.ShardInfo(stem.name, writer.documents, writer.tokens, *hashes)
        progress.sync(self._directory)
        self._done.append(progress.Done(info, self._hash.hexdigest()))
        self._state.write(self._directory)

    def finish(self) -> None:
        """Completes the last shard."""
        if self._documents < self._complete:
            self._changed(self._done[-1].info.name)
        if self._writer:
            self._complete_shard()

    def discard(self) -> None:
        """Gives up the shard that is not complete."""
        if self._writer:
            self._writer.discard()


def _chunks(documents: Iterator[selection.Document], splits: dict[str, _Split]) -> Iterator[tuple[list, list]]:
    """Contents for a worker, with the (split, digest) of each; without documents of complete shards."""
    contents, kept, characters = [], [], 0
    for document in documents:
        split = splits[document.split]
        if split.has(document):
            continue
        contents.append(document.content)
        kept.append((split, document.digest))
        characters += len(document.content)
        if characters >= _CHUNK_CHARACTERS or len(kept) >= _CHUNK_DOCUMENTS:
            yield contents, kept
            contents, kept, characters = [], [], 0
    if kept:
        yield contents, kept


@contextlib.contextmanager
def _output(directory: Path) -> Iterator[None]:
    """What cannot be written, and workers that are gone, end with one line."""
    try:
        yield
    except OSError as error:
        where, reason = error.filename or directory, error.strerror or error
        raise Unfinished(
            f"{where}: {reason}; it must be possible to write it, then the same command goes on"
        ) from error
    except workers.Lost as error:
        raise Unfinished(f"{error}; the same command goes on; fewer --workers need less") from error


def _begin(
    directory: Path, settings: dict, state: progress.Progress | None, tokenizer, choice, say
) -> progress.Progress:
    """Makes the directory what its state says, or begins one."""
    if state is None:
        state = progress.Progress(settings, tokenizer.fingerprint, {split: [] for split in progress.SPLITS})
        progress.clean(directory, keep=set())
        state.write(directory)
    elif state.tokenizer != tokenizer.fingerprint:
        raise UserError(f"--tokenizer: is not the one that {directory} was begun with; must be the same")
    for split in progress.SPLITS:
        good = progress.intact(directory, state.shards[split])
        if len(good) < len(state.shards[split]):
            name = state.shards[split][len(good)].info.name
            say(f"{directory / name}: is not what it was; it and those behind it are made again")
            state.shards[split] = good
            state.write(directory)
    names = {shard.info.name for found in state.shards.values() for shard in found}
    progress.clean(directory, keep={"progress", "tokenizer", *names})
    choice.save(tokenizer, directory)
    return state


def _ticker(
    what: str, source: records.Source, meter: Meter, stopped: Callable[[], bool]
) -> Callable[[selection.Counts], None]:
    """What is done at each record: lines for the console, and a stop where one is asked for."""

    def tick(counts: selection.Counts) -> None:
        if stopped():
            raise Unfinished("stopped; the same command goes on")
        if meter.due:
            meter.show(what, counts.read, source.position, source.size)

    return tick


def _write(source, tokenizer, options, directory, state, meter, stopped) -> selection.Counts:
    """Makes the shards that are missing."""
    dtype = shards.smallest_type(tokenizer.vocab_size)
    splits = {name: _Split(name, directory, dtype, options.shard_tokens, state) for name in progress.SPLITS}

    reader = selection.Reader(source, tokenizer, options, meter.say, _ticker("tokens", source, meter, stopped))
    encoder = _Encoder(tokenizer, options.align, dtype)
    count = 0 if source.has_ids else options.workers
    results = workers.ordered(encoder, _chunks(iter(reader), splits), count)
    try:
        with contextlib.closing(results):
            for kept, (ids, lengths) in results:
                start = 0
                for (split, digest), length in zip(kept, lengths, strict=True):
                    split.add(ids[start : start + length], digest)
                    start += length
                meter.tokens += start
        for split in splits.values():
            split.finish()
    finally:
        for split in splits.values():
            split.discard()
    return reader.counts


def _training_texts(source, options, say, stopped) -> Iterator[str]:
    """The texts that a tokenizer may be trained on."""
    tick = _ticker("sample for the tokenizer", source, Meter(say), stopped)
    reader = selection.Reader(source, None, dataclasses.replace(options, deduplicate=False), lambda line: None, tick)
    return (document.content for document in reader if document.split == "train")


def _end(directory, state, tokenizer, options, counts, meter) -> manifest.Manifest:
    """Writes the manifest."""
    splits = {name: tuple(shard.info for shard in state.shards[name]) for name in progress.SPLITS}
    if not splits["train"]:
        progress.remove(directory)
        found = f"{counts.kept} document(s), all of them held out"
        raise UserError(f"--holdout = {options.holdout}: {found}; must leave some for training")
    info = manifest.TokenizerInfo(
        tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id
    )
    found = manifest.Manifest(info, options.align, splits, state.settings, dataclasses.asdict(counts) | _tokens(splits))
    found.write(directory)
    progress.sync(directory)
    (directory / progress.NAME).unlink()
    meter.say(_summary(directory, found))
    if options.holdout and not splits["holdout"]:
        meter.say(f"note: no document is held out; --holdout = {options.holdout} is too small a share of so few")
    return found


def _tokens(splits: dict[str, tuple[manifest.ShardInfo, ...]]) -> dict[str, int]:
    return {"tokens": sum(shard.tokens for found in splits.values() for shard in found)}


def _summary(directory: Path, found: manifest.Manifest) -> str:
    lost = ", ".join(f"{found.counts[name]:,} {name}" for name in ("bad", "empty", "duplicate"))
    parts = []
    for name, infos in found.splits.items():
        documents, tokens = sum(shard.documents for shard in infos), sum(shard.tokens for shard in infos)
        parts.append(f"{name} {documents:,} documents, {tokens:,} tokens in {len(infos)} shard(s)")
    return f"{directory}: complete; {found.counts['read']:,} records ({lost}); {'; '.join(parts)}"


def _complete(directory: Path, settings: dict, say: Callable[[str], None]) -> manifest.Manifest:
    """A directory that has its manifest already."""
    found = manifest.read(directory)
    progress.refuse_differences(directory, found.source, settings)
    (directory / progress.NAME).unlink(missing_ok=True)
    say(f"nothing to do: {_summary(directory, found)}")
    return found


def prepare(
    source: records.Source,
    choice: Choice,
    options: Options,
    directory: str | Path,
    say: Callable[[str], None] = print,
    stopped: Callable[[], bool] = lambda: False,
) -> manifest.Manifest:
    """Makes a prepared corpus, or what is missing of it.

    Args:
      source: where the documents come from.
      choice: of the tokenizer.
      options: of division and storage.
      directory: is made; may hold an earlier attempt with the same arguments.
      say: takes lines for the console.
      stopped: asked after each record; True ends with `Unfinished`.

    Raises:
      UserError: the input is wrong, or the directory was begun with other arguments. If no shard is complete yet,
        nothing is left of what was begun.
      Unfinished: the output cannot be written, a worker is lost, or ``stopped``; the same arguments go on.
    """
    directory = Path(directory)
    fields = {name: getattr(options, name) for name in ("align", "holdout", "shard_tokens", "deduplicate")}
    settings = {**source.description, "tokenizer": choice.description, **fields}
    if choice.is_trained and source.has_ids:
        raise UserError("--tokenizer = train: the input has no text, but ids; must be the tokenizer that made them")
    with _output(directory):
        progress.refuse_foreign(directory)
        if (directory / manifest.NAME).exists():
            return _complete(directory, settings, say)
        state = progress.read(directory)
        if state:
            progress.refuse_differences(directory, state.settings, settings)
        texts = functools.partial(_training_texts, source, options, say, stopped)
        tokenizer = choice.tokenizer(directory, state and state.tokenizer, texts)
        directory.mkdir(parents=True, exist_ok=True)
        with progress.alone(directory):
            if progress.read(directory) != state or (directory / manifest.NAME).exists():
                raise UserError(f"--output = {directory}: another process prepares it, too; must be a new directory")
            try:
                state = _begin(directory, settings, state, tokenizer, choice, say)
                meter = Meter(say)
                counts = _write(source, tokenizer, options, directory, state, meter, stopped)
                return _end(directory, state, tokenizer, options, counts, meter)
            except UserError:
                if state and not any(state.shards.values()):
                    progress.remove(directory)
                raise
