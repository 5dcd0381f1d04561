"""Batches of packed rows: what a step trains on, from the configuration, the seed and the step.

    documents -> order -> tokens -> rows -> batches

A batch is a pure function of the corpus, the seed and the number of batches before it, whatever the number of
processes, workers and devices. Rows that can be found by index (prepared corpora, and "pad" online) are made only
where they are needed: each process reads those of its own devices, and the iterator's state is one integer. Online
"concat" cannot know where a row begins without the rows before it: there every process makes the whole batches, and the
state is Grain's.
"""

import atexit
import functools
import json
import weakref
from collections.abc import Callable, Sequence

import grain
import numpy as np
from absl import flags

from cola_jax.config import DataConfig
from cola_jax.data import corpora, mixture, packing, pair_rows, prepared, rows
from cola_jax.data.tokenizers import Tokenizer
from cola_jax.nested import Difference, differences
from cola_jax.types import UserError

_PREFETCHED = 4  # batches that are made ahead, by a thread or by each worker
_ENDLESS = 2**60  # rows, of training
# Whole batches are made ahead; a thread pool for single documents would cost more than it hides.
_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _small(seed: int) -> int:
    """A seed of 32 bits, as Grain wants it; hashed, because Grain adds the epoch to it."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


class _Sized:
    """``function`` of what a source has at every index, and a length."""

    def __init__(self, source, size: int, function: Callable | None = None):
        self._source, self._size, self._function = source, size, function

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int):
        found = self._source[index]
        return found if self._function is None else self._function(found)


class _Mixed:
    """Rows of several corpora in their shares."""

    def __init__(self, selection: mixture.Selection, sources: dict):
        self._selection, self._sources = selection, sources

    def __getitem__(self, index: int):
        directory, row = self._selection[index]
        return self._sources[directory][row]


class _OneAfterAnother:
    """The rows of several finite sources, one source after another."""

    def __init__(self, sources: Sequence):
        self._sources = sources
        self.size = sum(source.size for source in sources)

    def __getitem__(self, index: int):
        for source in self._sources:
            if index < source.size:
                return source[index]
            index -= source.size
        raise IndexError(index)


class _Ordered:
    """Documents by index, each once an epoch in a shuffled order."""

    def __init__(self, documents: Sequence, seed: int | None):
        self._documents, self._seed = documents, seed
        self.size = len(documents)

    def __getitem__(self, index: int):
        return self._documents[rows.shuffled(index, self.size, self._seed)]


class _Tokenized(Sequence):
    """The ids of documents that are texts."""

    def __init__(self, texts: Sequence, tokenizer: Tokenizer, align: int):
        self._texts, self._tokenizer, self._align = texts, tokenizer, align

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> np.ndarray:
        return packing.document_tokens(self._texts[index], self._tokenizer, self._align)


def _packed(config: DataConfig, stream: prepared.Stream, pad_id: int, seed: int | None):
    """Rows of a stream by index, or its documents where each has a row of its own."""
    if config.packing == "pad":
        return _Ordered(stream, seed)
    kinds = {"best_fit": rows.BestFit, "concat": rows.InOrder}
    kind = kinds[config.packing]
    if config.packing == "concat" and config.shuffle == "documents":
        kind = rows.ShuffledDocuments
    return kind(stream, config.sequence_length - config.random_offset, pad_id, seed)


def _prepared_rows(config: DataConfig, tokenizer: Tokenizer, split: corpora.Split, seed: int):
    """(what `_packed` gives, of all corpora together, its size)."""
    phases = mixture.parse(config.files)
    length = config.sequence_length - config.random_offset
    found = {path: prepared.open_manifest(path, config) for path in mixture.directories(phases)}
    if not any(each.splits["holdout"] for each in found.values()):
        need = "prepared with a --holdout that leaves some; runs are evaluated on them"
        raise UserError(f"config.data.files = {config.files!r}: has no held-out documents; must be {need}")
    sources = {}
    for directory, each in found.items():
        prepared.check_tokenizer(directory, each, tokenizer)
        stream = prepared.open_stream(directory, each, split)
        if split == "train":
            if not stream.documents:
                raise UserError(f"config.data.files: {directory}: must have documents to train on")
            sources[directory] = _packed(config, stream, tokenizer.pad_id, _small(seed))
        elif stream.documents and config.packing == "concat":  # in order, whatever shuffles the others
            sources[directory] = rows.InOrder(stream, length, tokenizer.pad_id, None)
        elif stream.documents:
            sources[directory] = _packed(config, stream, tokenizer.pad_id, None)
    if split == "holdout":
        together = _OneAfterAnother(list(sources.values()))
        return together, together.size
    if len(sources) == 1:
        return next(iter(sources.values())), _ENDLESS
    return _Mixed(mixture.Selection(phases, config.batch_size), sources), _ENDLESS


def _indexed(config: DataConfig, tokenizer: Tokenizer, split: corpora.Split, seed: int):
    """Rows by index, with a length; None where they cannot be found so."""
    length, pad_id, most = config.sequence_length, tokenizer.pad_id, config.random_offset
    if config.image_size:
        return pair_rows.PairRows(
            config, tokenizer, split, seed, _small(seed), size=_ENDLESS if split == "train" else 0
        )
    if config.corpus == "prepared":
        source, size = _prepared_rows(config, tokenizer, split, seed)
    elif config.packing == "pad":
        texts = corpora.documents(config, split, seed)
        documents = _Tokenized(texts, tokenizer, config.align)
        source = _Ordered(documents, _small(seed) if split == "train" else None)
        size = _ENDLESS if split == "train" else len(documents)
    else:
        return None
    if not most:  # plain Python: Grain's own steps cost more than a short row
        pad = functools.partial(packing.pad_row, length=length, pad_id=pad_id)
        return _Sized(source, size, pad if config.packing == "pad" else None)
    if config.packing == "pad":
        place = functools.partial(packing.pad_row_anywhere, length=length, pad_id=pad_id, most=most)
    else:
        place = functools.partial(packing.place_row, pad_id=pad_id, most=most)
    return grain.MapDataset.source(_Sized(source, size)).random_map(place, seed=_small(seed))


def _stack(found: Sequence[packing.Row], filler: packing.Row, count: int) -> packing.Row:
    """A batch of ``count`` rows; missing ones are padding."""
    found = [*found, *[filler] * (count - len(found))]
    return {name: np.stack([row[name] for row in found]) for name in filler}


class _Batches:
    """Batches by index, from one on; of each the rows that are wanted."""

    def __init__(self, dataset, batch_size: int, wanted: np.ndarray, filler: packing.Row, first: int):
        self._dataset, self._batch_size, self._filler, self._first = dataset, batch_size, filler, first
        self._wanted = [int(row) for row in wanted]

    def __len__(self) -> int:
        return max(0, -(-len(self._dataset) // self._batch_size) - self._first)

    def __getitem__(self, index: int) -> packing.Row:
        start = (self._first + index) * self._batch_size
        places = [start + row for row in self._wanted]
        found = [self._dataset[place] for place in places if place < len(self._dataset)]
        return _stack(found, self._filler, len(places))


class _IndexedIterator(grain.DatasetIterator):
    """Batches by index, made ahead; its state is the number of batches before."""

    def __init__(self, make):
        super().__init__()
        self._make, self._step = make, 0
        self._inner = None

    def __next__(self) -> packing.Row:
        if self._inner is None:
            self._inner = iter(self._make(self._step))
        batch = next(self._inner)
        self._step += 1
        return batch

    def get_state(self) -> dict:
        return {"step": self._step}

    def set_state(self, state: dict) -> None:
        self._step = state["step"]
        self._end()

    def _end(self) -> None:
        if self._inner is not None:
            self._inner.close()
        self._inner = None

    def close(self) -> None:
        super().close()
        self._end()


class _IndexedDataset(grain.IterDataset):
    """Batches of rows that are found by index."""

    def __init__(self, rows_by_index, batch_size: int, wanted, filler: packing.Row, workers: int):
        super().__init__()
        self._arguments = rows_by_index, batch_size, wanted, filler
        self._workers = workers

    def _from(self, step: int) -> grain.IterDataset:
        batches = grain.MapDataset.source(_Batches(*self._arguments, step)).to_iter_dataset(_INLINE)
        return _ahead(batches, self._workers)

    def __iter__(self) -> grain.DatasetIterator:
        return _IndexedIterator(self._from)


def _ahead(batches: grain.IterDataset, workers: int) -> grain.IterDataset:
    """The same batches, made ahead by worker processes or by a thread."""
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags here, and binaries without absl never parse them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=_PREFETCHED)
        return batches.mp_prefetch(options)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCHED)


def _close(reference: weakref.ref) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


class _ClosingIterator(grain.DatasetIterator):
    """The parent's elements; see `_CloseAtExit`."""

    def __init__(self, parent: grain.DatasetIterator):
        super().__init__(parent)
        atexit.register(_close, weakref.ref(self))

    def __next__(self) -> packing.Row:
        return next(self._parent)

    def get_state(self) -> dict:
        return self._parent.get_state()

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state)

    def close(self) -> None:
        super().close()
        self._parents = ()  # Grain's own __del__ fails once the interpreter has cleared its modules


class _CloseAtExit(grain.IterDataset):
    """Ends the threads and processes of its parent before the interpreter ends, if nobody has closed the iterator.

    A prefetching thread of Grain that is inside C++ code (SentencePiece, Grain's shuffle) when the interpreter shuts
    down aborts the process after all its work: "terminate called without an active exception", exit status -6.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _ClosingIterator(iter(self._parent))


def create(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: corpora.Split,
    seed: int,
    wanted: Sequence[int] | np.ndarray | None = None,
) -> grain.IterDataset:
    """Batches of one split.

    Args:
      config: Corpus, packing and sizes.
      tokenizer: Made by `run_tokenizer.create` for the same config.
      split: "train" never ends, in a new order each epoch; "holdout" is one pass in a fixed order, its last
        batch filled up with rows of padding.
      seed: Of the order, and of generated stories.
      wanted: Which rows of a batch this process needs, 0 to B - 1; None: all.

    Returns:
      A dataset of dicts with ``tokens`` and ``segment_ids``, int32 [len(wanted), T]; of pictures also ``image``, uint8
      [len(wanted), S, S, 3], and perhaps instructions (`pair_rows`). The state of its iterator is
      JSON-able, small, and that of the batch that was consumed last, whatever is prefetched: ``{"step": n}`` where
      rows are found by index.

    Raises:
      UserError: The corpus cannot be read, or was prepared with another tokenizer.
    """
    filler = _filler(config, tokenizer.pad_id)
    wanted = np.arange(config.batch_size) if wanted is None else np.asarray(wanted)
    # The held-out part is short, and workers would each end with a batch of padding: a thread is enough.
    workers = config.num_workers if split == "train" else 0
    by_index = _indexed(config, tokenizer, split, seed)
    if by_index is not None:
        return _CloseAtExit(_IndexedDataset(by_index, config.batch_size, wanted, filler, workers))
    return _CloseAtExit(_ahead(_streamed(config, tokenizer, split, seed, wanted, filler), workers))


def _filler(config: DataConfig, pad_id: int) -> packing.Row:
    """A row of nothing but padding, with everything that a row has."""
    return (
        pair_rows.empty_row(config, pad_id) if config.image_size else packing.empty_row(config.sequence_length, pad_id)
    )


def shapes(config: DataConfig, rows: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of a batch with so many rows."""
    return {name: ((rows, *value.shape), value.dtype) for name, value in _filler(config, 0).items()}


def _streamed(config: DataConfig, tokenizer: Tokenizer, split, seed: int, wanted, filler) -> grain.IterDataset:
    """Batches of online documents laid end to end."""
    documents = grain.MapDataset.source(corpora.documents(config, split, seed))
    if split == "train":
        # A hashed seed keeps one run's second epoch from being another's first.
        documents = documents.shuffle(seed=_small(seed)).repeat()
    tokens = documents.map(functools.partial(packing.document_tokens, tokenizer=tokenizer, align=config.align))
    length, most = config.sequence_length, config.random_offset
    found = packing.ConcatIterDataset(tokens.to_iter_dataset(_INLINE), length - most, tokenizer.pad_id)
    if most:
        place = functools.partial(packing.place_row, pad_id=tokenizer.pad_id, most=most)
        found = found.random_map(place, seed=_small(seed))
    stack = functools.partial(_stack, filler=filler, count=config.batch_size)
    batches = found.batch(config.batch_size, batch_fn=stack)
    if len(wanted) == config.batch_size:
        return batches
    return batches.map(lambda batch: {name: values[wanted] for name, values in batch.items()})


def is_indexed(config: DataConfig) -> bool:
    """Whether rows are found by index, so that the number of batches before is all there is to save."""
    return config.corpus == "prepared" or config.packing == "pad"


def fingerprint(config: DataConfig, tokenizer: Tokenizer, seed: int) -> dict:
    """What defines the order of the data, JSON-able: an iterator's state means nothing under another one.

    Compare it with that of the run that saved the state (`changes`) before restoring.
    """
    fields = ["corpus", "packing", "align", "sequence_length", "batch_size"]
    # Not a part of the fingerprints of runs that knew no such field.
    fields += [name for name, default in _LATER_FIELDS.items() if getattr(config, name) != default]
    if not is_indexed(config):  # Grain's state depends on it
        fields.append("num_workers")
    return {
        "seed": seed,
        **{name: getattr(config, name) for name in fields},
        **corpora.describe(config, seed),
        "tokenizer": f"{tokenizer.name} {tokenizer.fingerprint}",
        "order": _order(),
    }


_LATER_FIELDS = {"random_offset": 0, "shuffle": "documents", "task_shares": ()}
_FREE = ("grain", "order", "num_workers")  # may be missing on one side


def _order() -> str:
    """What Grain's shuffle does, so that a version that shuffles differently is noticed, and no other."""
    return " ".join(str(rows.shuffled(i, 10**6, 1)) for i in range(4))


def changes(saved: dict, now: dict, step: int) -> list[Difference]:
    """What differs between the data of a checkpoint and that of the run that reads it.

    A mixture may change from the checkpoint's step on; what came before must be the same.

    Args:
      saved, now: fingerprints.
      step: of the stage, where the checkpoint stands.
    """
    free = {name for name in _FREE if name not in saved or name not in now}
    saved, now = ({k: v for k, v in each.items() if k not in free} for each in (saved, now))
    for each in (saved, now):
        if "mixture" in each:
            each["mixture"] = [phase for phase in each["mixture"] if phase["from_step"] < max(step, 1)]
    return differences(json.loads(json.dumps(saved)), json.loads(json.dumps(now)))
