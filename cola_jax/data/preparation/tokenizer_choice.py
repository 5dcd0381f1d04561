"""The tokenizer that a preparation is asked for: bytes, a file, or one trained on the documents."""

import hashlib
import heapq
from collections.abc import Callable, Iterable
from pathlib import Path

from cola_jax.data import manifest, tokenizers
from cola_jax.data.preparation import progress
from cola_jax.types import UserError

_LONGEST = 100_000  # characters of a document that are looked at, so that a few long ones are not all there is


def sample(texts: Iterable[str], characters: int = tokenizers.SAMPLE_CHARACTERS, longest: int = _LONGEST) -> list[str]:
    """Documents of which the hash is lowest, as many as the budget holds; in the order of their hashes.

    They are spread evenly over the corpus, depend on its content alone, and equal ones count once. No more than the
    budget and one document is in memory.

    Args:
      texts: documents.
      characters: budget.
      longest: characters of a document; the rest of a longer one is left out.
    """
    heap: list[tuple[int, str]] = []  # the highest hash is on top
    held, total = set(), 0
    for text in texts:
        head = text[:longest]
        rank = -int.from_bytes(
            hashlib.blake2b(head.encode("utf-8"), digest_size=8, person=b"tokenizer").digest(), "big"
        )
        if rank in held or total + len(head) > characters and heap and rank < heap[0][0]:
            continue
        heapq.heappush(heap, (rank, head))
        held.add(rank)
        total += len(head)
        while total > characters and len(heap) > 1:
            dropped, out = heapq.heappop(heap)
            held.remove(dropped)
            total -= len(out)
    return [text for _, text in sorted(heap, reverse=True)]


class Choice:
    """What ``--tokenizer`` asks for.

    Attributes:
      description: JSON-able; equal for equal choices.
    """

    def __init__(self, asked: str | None, vocab_size: int = 0, eos_id: int = -1, pad_id: int = -1):
        """Args:
          asked: "bytes", "train", the path of a SentencePiece model (.model) or of a tokenizer.json.
          vocab_size: most pieces of a tokenizer that is trained.
          eos_id: of a tokenizer.json; -1: from the file.
          pad_id: likewise.

        Raises:
          UserError: there is no such file, or it is no tokenizer.
        """
        self._vocab_size, self._loaded, self._content = vocab_size, None, b""
        forms = "bytes, train, a SentencePiece .model or a tokenizer.json"
        if not asked:
            raise UserError(f"--tokenizer is missing: it must be {forms}")
        if asked == "train":
            if vocab_size < 300:
                raise UserError(f"--vocab_size = {vocab_size}: must be at least 300 to train a tokenizer")
            self.description = f"trained, vocab_size {vocab_size}"
            return
        if asked == "bytes":
            self._loaded = tokenizers.ByteTokenizer()
        elif asked.endswith(".model"):
            self._loaded = tokenizers.SentencePieceTokenizer.load(asked)
        elif asked.endswith(".json"):
            self._loaded = tokenizers.HuggingFaceTokenizer.load(asked, eos_id, pad_id)
        else:
            raise UserError(f"--tokenizer = {asked!r}: must be {forms}")
        if asked != "bytes":
            self._content = Path(asked).read_bytes()
        self.description = f"{self._loaded.name} {self._loaded.fingerprint}"

    @property
    def is_trained(self) -> bool:
        """Whether it is made from the documents."""
        return self._loaded is None

    def tokenizer(
        self, directory: Path, fingerprint: str | None, texts: Callable[[], Iterable[str]]
    ) -> tokenizers.Tokenizer:
        """The tokenizer.

        Args:
          directory: where an earlier attempt may have left a trained one.
          fingerprint: of that one; None: there was no attempt.
          texts: what to train on otherwise.

        Raises:
          UserError: it cannot be trained on the documents.
        """
        if self._loaded is not None:
            return self._loaded
        path = directory / manifest.TOKENIZER_FILES["sentencepiece"]
        if fingerprint and path.exists():
            found = tokenizers.SentencePieceTokenizer.load(path)
            if found.fingerprint == fingerprint:
                return found
        try:
            return tokenizers.SentencePieceTokenizer.train(sample(texts()), self._vocab_size)
        except UserError as error:
            raise UserError(str(error).replace("config.data.vocab_size", "--vocab_size")) from error

    def save(self, tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
        """Puts the tokenizer's file beside the shards."""
        if tokenizer.name not in manifest.TOKENIZER_FILES:
            return
        path = directory / manifest.TOKENIZER_FILES[tokenizer.name]
        if isinstance(tokenizer, tokenizers.SentencePieceTokenizer) and not self._content:
            tokenizer.save(path)
        else:
            progress.replace(path, self._content)
