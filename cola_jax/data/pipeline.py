"""Batches of packed rows, as a Grain graph whose iterator can be saved and restored.

documents -> order -> tokens -> rows -> batches

Every process computes the whole batches, of which its devices keep their rows (`sharding.put_batch`): what a step
trains on, and the iterator's state, depend on the configuration and the seed but not on the number of processes.
"""

import atexit
import functools
import weakref
from collections.abc import Sequence

import grain
import numpy as np
from absl import flags

from cola_jax.config import DataConfig
from cola_jax.data import corpora, packing
from cola_jax.data.tokenizers import Tokenizer

_PREFETCHED = 4  # batches that are made ahead, by a thread or by each worker


def _batch(rows: Sequence[packing.Row], filler: packing.Row, batch_size: int) -> packing.Row:
    """Stacks the rows of a batch; missing ones are padding."""
    rows = [*rows, *[filler] * (batch_size - len(rows))]
    return {name: np.stack([row[name] for row in rows]) for name in filler}


def _small(seed: int) -> int:
    """A seed of 32 bits, as Grain wants it; hashed, because Grain adds the epoch to it."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _rows(config: DataConfig, tokenizer: Tokenizer, documents: grain.MapDataset, seed: int) -> grain.IterDataset:
    """Rows of T tokens (see `packing`) from a dataset of texts."""
    length, pad_id = config.sequence_length, tokenizer.pad_id
    tokens = documents.map(functools.partial(packing.document_tokens, tokenizer=tokenizer, align=config.align))
    # Whole batches are made ahead; a thread pool for single documents would cost more than it hides.
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if config.packing == "pad":
        if config.random_offset:
            pad = functools.partial(packing.pad_row_anywhere, length=length, pad_id=pad_id, most=config.random_offset)
            return tokens.random_map(pad, seed=_small(seed)).to_iter_dataset(inline)
        pad = functools.partial(packing.pad_row, length=length, pad_id=pad_id)
        return tokens.map(pad).to_iter_dataset(inline)
    return packing.ConcatIterDataset(tokens.to_iter_dataset(inline), length, pad_id)


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
) -> grain.IterDataset:
    """Batches of one split.

    Args:
      config: Corpus, packing and sizes.
      tokenizer: Made by `tokenizers.create` for the same config.
      split: "train" never ends, in a new order each epoch; "holdout" is one pass in a fixed order, its last
        batch filled up with rows of padding.
      seed: Of the order, and of generated stories.

    Returns:
      A dataset of dicts with ``tokens`` and ``segment_ids``, int32 [B, T]. The state
      of its iterator is JSON-able, small, and that of the batch that was consumed last, whatever is prefetched.

    Raises:
      UserError: The corpus cannot be read.
    """
    batch_size = config.batch_size
    documents = grain.MapDataset.source(corpora.documents(config, split, seed))
    if split == "train":
        # A hashed seed keeps one run's second epoch from being another's first.
        documents = documents.shuffle(seed=_small(seed)).repeat()
    make_batch = functools.partial(
        _batch,
        filler=packing.empty_row(config.sequence_length, tokenizer.pad_id),
        batch_size=batch_size,
    )
    batches = _rows(config, tokenizer, documents, seed).batch(batch_size, batch_fn=make_batch)
    if split == "train" and config.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags here, and binaries without absl never parse them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=_PREFETCHED)
        return _CloseAtExit(batches.mp_prefetch(options))
    # The held-out part is short, and workers would each end with a batch of padding: a thread is enough.
    return _CloseAtExit(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCHED))


def fingerprint(config: DataConfig, tokenizer: Tokenizer, seed: int) -> dict:
    """What defines the order of the data, JSON-able: an iterator's state means nothing under another one.

    A changed worker count makes Grain fail with an opaque error, a changed seed or file goes unnoticed: compare this
    with the fingerprint of the run that saved the state (`nested.differences`) before restoring.
    """
    fields = ("corpus", "packing", "align", "sequence_length", "batch_size", "num_workers")
    if config.random_offset:  # not a part of the fingerprints of runs that knew no such field
        fields += ("random_offset",)
    return {
        "seed": seed,
        **{name: getattr(config, name) for name in fields},
        **corpora.describe(config, seed),
        "tokenizer": f"{tokenizer.name} {tokenizer.fingerprint}",
        "grain": grain.__version__,
    }
