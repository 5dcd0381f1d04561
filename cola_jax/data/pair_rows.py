"""Rows of a caption and its picture by index, perhaps with an instruction: what captioned corpora make of `packing`.

Beside ``tokens`` and ``segment_ids`` a row has ``image``, uint8 [S, S, 3], and where the config asks for instructions
``instruction`` and ``instruction_segment_ids``, int32 [L], and where it asks for tasks ``task``, the same for all rows
of a batch.
"""

import logging
from collections.abc import Sequence

import numpy as np

from cola_jax.config import DataConfig
from cola_jax.data import corpora, packing, rows
from cola_jax.data.tokenizers import Tokenizer
from cola_jax.types import UserError

INSTRUCTION = ("instruction", "instruction_segment_ids")


def empty_row(config: DataConfig, pad_id: int) -> packing.Row:
    """A row of nothing but padding; its image is all zeros."""
    row = packing.empty_row(config.sequence_length, pad_id)
    row["image"] = np.zeros((config.image_size, config.image_size, 3), np.uint8)
    if config.instruction_length:
        row |= _instruction(np.zeros(0, np.int32), config.instruction_length, pad_id)
    if config.task_shares:
        row["task"] = np.int32(0)
    return row


def _instruction(ids: np.ndarray, length: int, pad_id: int) -> packing.Row:
    padded = packing.pad_row(ids, length, pad_id)
    return dict(zip(INSTRUCTION, (padded["tokens"], padded["segment_ids"]), strict=True))


def _instructions(config: DataConfig, tokenizer: Tokenizer) -> list[packing.Row]:
    """Each instruction as tokens, ended and aligned as documents are."""
    found = []
    for text in config.instructions if config.instruction_length else ():
        ids = packing.document_tokens(text, tokenizer, config.align)
        if len(ids) > config.instruction_length:
            raise UserError(
                f"config.data.instruction_length = {config.instruction_length}: must be at least {len(ids)}, the tokens"
                f" of {text!r} and its end"
            )
        found.append(_instruction(ids, config.instruction_length, tokenizer.pad_id))
    return found


def task(shares: Sequence[float], batch: int, seed: int | None) -> int:
    """The task of a batch: drawn by the shares; without a seed, those that have a share take turns.

    Args:
      shares: of the tasks, one of them above 0.
      batch: its number.
      seed: 32 bits, or None.
    """
    if seed is None:
        wanted = np.flatnonzero(shares)
        return int(wanted[batch % len(wanted)])
    draw = np.random.Generator(np.random.Philox(key=np.array([seed, 2**63 + batch], np.uint64)))
    return int(np.searchsorted(np.cumsum(shares), draw.random() * sum(shares), side="right"))


class PairRows:
    """Rows by index, each pair once an epoch. A pure function of the config and the seeds; can be pickled.

    Attributes:
      pairs: how many there are.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, split: corpora.Split, seed: int, small_seed: int, size: int
    ):
        """Args:
          config: of a corpus of pictures.
          tokenizer: of the captions.
          split: "train", in a new order each epoch, or "holdout", in a fixed one.
          seed: of generated pairs.
          small_seed: 32 bits, of the order and of all that is drawn for a row.
          size: rows; 0: as many as there are pairs.

        Raises:
          UserError: a caption or an instruction is too long, or the corpus cannot be read.
        """
        self._config, self._tokenizer, self._seed = config, tokenizer, small_seed
        self._shuffle_seed = small_seed if split == "train" else None
        self._captions = corpora.documents(config, split, seed)
        self._pictures = corpora.pictures(config, split, seed)
        self._instructions = _instructions(config, tokenizer)
        self._kept = self._fitting()
        self.pairs = len(self._captions) if self._kept is None else len(self._kept)
        self._size = size or self.pairs

    def _fitting(self) -> np.ndarray | None:
        """The pairs whose captions fit; None: all. Generated captions are looked at when they are drawn."""
        if self._config.corpus == "scenes":
            return None
        skip = self._config.on_bad_image == "skip"
        kept = [k for k in range(len(self._captions)) if self._tokens(k, None if skip else "fail") is not None]
        if len(kept) < len(self._captions):
            message = "%d of %d captions do not fit into a row and are skipped"
            logging.getLogger(__name__).warning(message, len(self._captions) - len(kept), len(self._captions))
        if not kept:
            field = f"config.data.sequence_length = {self._config.sequence_length}"
            raise UserError(f"{field}: no caption fits into a row; must be more")
        return np.array(kept)

    def _tokens(self, place: int, on_long: str | None = "fail") -> np.ndarray | None:
        """The ids of a caption; None where they do not fit, and that is no error."""
        config = self._config
        ids = packing.document_tokens(self._captions[place], self._tokenizer, config.align)
        room = config.sequence_length - config.random_offset
        if len(ids) <= room:
            return ids
        if on_long is None:
            return None
        need = f"{len(ids) + config.random_offset} (data.random_offset = {config.random_offset})"
        raise UserError(
            f"{corpora.place(self._captions, place)}: the caption has {len(ids)} tokens with its end;"
            f" config.data.sequence_length = {config.sequence_length} must be at least {need}"
        )

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> packing.Row:
        config = self._config
        place = rows.shuffled(index, self.pairs, self._shuffle_seed)
        place = place if self._kept is None else int(self._kept[place])
        draw = np.random.Generator(np.random.Philox(key=np.array([self._seed, index], np.uint64)))
        offset = int(draw.integers(config.random_offset + 1))
        row = packing.pad_row(self._tokens(place), config.sequence_length, self._tokenizer.pad_id, offset)
        row["image"] = self._pictures[place]
        if config.task_shares:
            row["task"] = np.int32(task(config.task_shares, index // config.batch_size, self._shuffle_seed))
        if self._instructions:
            row |= self._instructions[int(draw.integers(len(self._instructions)))]
        return row
