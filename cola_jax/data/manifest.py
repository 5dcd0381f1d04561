"""What a prepared corpus is: `manifest.json` beside its shards and its tokenizer.

DIR/manifest.json
DIR/tokenizer.model (SentencePiece) or tokenizer.json (Hugging Face); bytes have none
DIR/train-00000.bin, .idx, ...       the documents that are trained on (`shards`)
DIR/holdout-00000.bin, .idx, ...     those that never are
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from cola_jax import paths
from cola_jax.types import UserError

NAME = "manifest.json"
VERSION = 1
TOKENIZER_FILES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """A shard: its name without suffix, its size, and the sha256 (hex) of its two files."""

    name: str
    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids."""

    name: str
    fingerprint: str
    vocab_size: int
    eos_id: int
    pad_id: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A prepared corpus.

    Attributes:
      tokenizer: what the ids mean.
      align: each document is filled up with ends of text to a multiple of so many tokens.
      splits: {"train": shards, "holdout": shards}.
      source: what was asked for when it was prepared, for readers.
      counts: documents read, kept, empty, bad, duplicate; characters.
    """

    tokenizer: TokenizerInfo
    align: int
    splits: dict[str, tuple[ShardInfo, ...]]
    source: dict
    counts: dict

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content: the ids, their order and their division into documents and splits."""
        shards = {
            split: [(s.documents, s.tokens, s.bin_sha256, s.idx_sha256) for s in found]
            for split, found in self.splits.items()
        }
        content = [self.tokenizer.name, self.tokenizer.fingerprint, self.align, shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Writes `manifest.json`; a reader sees all of it or nothing."""
        body = {"version": VERSION, **dataclasses.asdict(self), "fingerprint": self.fingerprint}
        paths.write_atomically(Path(directory) / NAME, (json.dumps(body, indent=1) + "\n").encode())


def read(directory: str | Path) -> Manifest:
    """The manifest of a prepared corpus.

    Raises:
      UserError: there is none, it is damaged, or another version wrote it.
    """
    path = Path(directory) / NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        need = "must be in a directory that launch/prepare.py has completed"
        raise UserError(f"{path}: {error.strerror}; {need}") from None
    except ValueError as error:
        raise UserError(f"{path}: must be a JSON file ({error})") from None
    if not isinstance(body, dict) or body.get("version") != VERSION:
        found = body.get("version") if isinstance(body, dict) else None
        raise UserError(f"{path}: version = {found!r}: must be {VERSION}; prepare the corpus again")
    try:
        manifest = Manifest(
            tokenizer=TokenizerInfo(**body["tokenizer"]),
            align=int(body["align"]),
            splits={split: tuple(ShardInfo(**s) for s in body["splits"][split]) for split in ("train", "holdout")},
            source=body["source"],
            counts=body["counts"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: must be as launch/prepare.py wrote it ({error!r})") from None
    if manifest.fingerprint != body.get("fingerprint"):
        raise UserError(f"{path}: does not match its own fingerprint; it was changed after it was prepared")
    return manifest


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
