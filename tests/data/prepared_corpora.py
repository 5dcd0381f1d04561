"""Prepared corpora for tests, small and of many shards."""

from pathlib import Path

import numpy as np

from cola_jax.data import manifest, packing, shards, tokenizers

TOKENIZER = tokenizers.ByteTokenizer()


def texts(count: int, seed: int = 0, longest: int = 88) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{seed}/{i} " + "x" * int(rng.integers(1, longest)) for i in range(count)]


def write(directory: Path, train: list[str], holdout: list[str] = (), align: int = 1, shard_tokens: int = 500) -> Path:
    """A corpus of texts as `launch/prepare.py` writes it, with bytes as tokens."""
    splits = {"train": train, "holdout": holdout}
    ids = {split: [packing.document_tokens(t, TOKENIZER, align) for t in found] for split, found in splits.items()}
    return write_ids(directory, ids, align, shard_tokens)


def write_ids(directory: Path, documents: dict[str, list[np.ndarray]], align: int, shard_tokens: int) -> Path:
    """A corpus of documents that are ids of the tokenizer "bytes" already."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, found in documents.items():
        infos, waiting = [], list(found)
        while waiting:
            name = f"{split}-{len(infos):05d}"
            writer = shards.Writer(directory / name, "<u2")
            while waiting and (not writer.documents or writer.tokens + len(waiting[0]) <= shard_tokens):
                writer.add(waiting.pop(0))
            writer.close()
            sums = [manifest.file_sha256(directory / (name + suffix)) for suffix in (".bin", ".idx")]
            infos.append(manifest.ShardInfo(name, writer.documents, writer.tokens, *sums))
        splits[split] = tuple(infos)
    info = manifest.TokenizerInfo("bytes", TOKENIZER.fingerprint, 258, 256, 257)
    manifest.Manifest(info, align, splits, {}, {}).write(directory)
    return directory
