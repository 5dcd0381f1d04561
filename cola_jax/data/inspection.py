"""What a run trains on, for people: rows as text, lengths of documents, shares of a mixture, and one digest."""

import collections
import hashlib
from collections.abc import Iterator

import numpy as np

from cola_jax.config import DataConfig
from cola_jax.data import mixture, packing, pipeline, prepared
from cola_jax.data.tokenizers import Tokenizer

_SAMPLE = 1000  # documents whose fertility is measured


def batches(
    config: DataConfig, tokenizer: Tokenizer, seed: int, start: int, stop: int, wanted: np.ndarray | None = None
) -> Iterator[packing.Row]:
    """The batches of steps ``start`` + 1 to ``stop`` of a stage whose data has this seed.

    Args:
      config, tokenizer, seed, wanted: as for `pipeline.create`.
      start, stop: batches before the first, and before the last and with it; 0 <= start <= stop.
    """
    iterator = iter(pipeline.create(config, tokenizer, "train", seed, wanted))
    try:
        if pipeline.is_indexed(config):
            iterator.set_state({"step": start})
        else:
            for _ in range(start):
                next(iterator)
        for _ in range(start, stop):
            yield next(iterator)
    finally:
        iterator.close()


def digest(config: DataConfig, tokenizer: Tokenizer, seed: int, start: int, stop: int, processes: int = 1) -> str:
    """sha256 (hex) of the tokens and segments of some steps, row by row, as int32, little endian.

    Where rows have more (an image as bytes, an instruction), it comes behind them.

    Args:
      processes: reads as so many processes do, each its own rows; the digest must not depend on it.
    """
    found = hashlib.sha256()
    shares = [np.arange(config.batch_size)[k::processes] for k in range(processes)]
    readers = [batches(config, tokenizer, seed, start, stop, share) for share in shares]
    for parts in zip(*readers, strict=True):
        for row in range(config.batch_size):
            batch = parts[row % processes]
            for name in ("tokens", "segment_ids", *sorted(batch.keys() - {"tokens", "segment_ids"})):
                values = batch[name][row // processes]
                found.update((values if values.dtype == np.uint8 else values.astype("<i4")).tobytes())
    return found.hexdigest()


def show_row(row: packing.Row, tokenizer: Tokenizer, block: int) -> str:
    """A row as text: ``|`` between blocks, ``[n]`` before the rest or the whole of document n of the row."""
    shown, segment = [], 0
    for start in range(0, len(row["tokens"]), block):
        segments, ids = row["segment_ids"][start : start + block], row["tokens"][start : start + block]
        parts = []
        for number in dict.fromkeys(segments.tolist()):
            if not number:
                parts.append("[padding]")
                continue
            if number != segment:
                parts.append(f"[{number}]")
                segment = number
            piece = ids[segments == number]
            ends = np.count_nonzero(piece == tokenizer.eos_id)
            parts.append(
                tokenizer.decode(piece.tolist()) + ("<end>" if ends == 1 else f"<end x{ends}>" if ends else "")
            )
        shown.append("".join(parts))
    return "|".join(shown)


def corpora(config: DataConfig, verify: bool) -> Iterator[str]:
    """What each corpus of a mixture holds; ``verify`` reads all of it and compares its hashes.

    Raises:
      UserError: a corpus is missing or has changed.
    """
    for directory in mixture.directories(mixture.parse(config.files)):
        found = prepared.open_manifest(directory, config)
        tokenizer = prepared.read_tokenizer(directory, found)
        yield f"{directory}: {found.tokenizer.name}, {found.tokenizer.vocab_size} ids; {found.fingerprint[:16]}"
        for split, infos in found.splits.items():
            stream = prepared.open_stream(directory, found, split)
            if stream.documents:
                yield f"  {split}: {len(infos)} shards, {lengths(stream)}"
                yield f"  {split}: {fertility(stream, tokenizer)}"
            if verify:
                yield f"  {split}: {prepared.verify_all(directory, infos)} bytes are as they were prepared"


def lengths(stream: prepared.Stream) -> str:
    """Documents and tokens of a stream, and how long its documents are."""
    found = np.diff(stream.starts())
    quantiles = np.quantile(found, [0, 0.1, 0.5, 0.9, 0.99, 1]).round().astype(int)
    names = ("shortest", "10 %", "median", "90 %", "99 %", "longest")
    spread = ", ".join(f"{name} {value}" for name, value in zip(names, quantiles, strict=True))
    return (
        f"{len(stream):,} documents, {stream.tokens:,} tokens; a document has {found.mean():.1f} on average ({spread})"
    )


def fertility(stream: prepared.Stream, tokenizer: Tokenizer) -> str:
    """Tokens a word and characters a token, of up to 1,000 documents from all over the corpus."""
    places = np.unique(np.linspace(0, len(stream) - 1, _SAMPLE).astype(int))
    tokens = words = characters = 0
    for place in places.tolist():
        ids = stream[place]
        text = tokenizer.decode(ids.tolist())
        tokens += int(np.count_nonzero(ids != tokenizer.eos_id))
        words, characters = words + len(text.split()), characters + len(text)
    return f"{tokens / max(1, words):.2f} tokens a word, {characters / max(1, tokens):.2f} characters a token"


def fill(config: DataConfig, tokenizer: Tokenizer, seed: int, start: int, stop: int) -> str:
    """How full the rows of some steps are, and how many documents they cut."""
    counted = collections.Counter()
    for batch in batches(config, tokenizer, seed, start, stop):
        used = batch["segment_ids"] > 0
        counted["tokens"] += used.size
        counted["used"] += int(used.sum())
        counted["documents"] += int(batch["segment_ids"].max(axis=1).sum())
        for ids, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            last = segments[segments > 0]
            if len(last):
                counted["cut"] += int(ids[len(last) - 1 + int(np.argmax(segments > 0))] != tokenizer.eos_id)
    used = 100 * counted["used"] / counted["tokens"]
    return (
        f"steps {start + 1} to {stop}: rows are {used:.2f} % full; {counted['documents']} documents or parts of them, "
        f"{counted['cut']} cut at the end of their row"
    )


def shares(config: DataConfig, steps: int) -> list[str]:
    """Rows of each corpus of a mixture in the first steps, beside its share."""
    phases = mixture.parse(config.files)
    selection = mixture.Selection(phases, config.batch_size)
    lines = []
    for k, phase in enumerate(phases):
        end = phases[k + 1].start if k + 1 < len(phases) else max(steps, phase.start + 1)
        counted = collections.Counter(
            selection[row][0] for row in range(phase.start * config.batch_size, end * config.batch_size)
        )
        total = sum(counted.values())
        parts = ", ".join(f"{name} {counted[name]} ({100 * share:.2f} %)" for name, share in phase.shares.items())
        lines.append(f"steps {phase.start + 1} to {end}: {total} rows: {parts}")
    return lines
