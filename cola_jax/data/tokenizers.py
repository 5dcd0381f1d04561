"""Text to token ids and back: bytes, SentencePiece pieces with a fall-back to bytes, or a Hugging Face tokenizer.json.

Every tokenizer is a pure function of its `fingerprint`, which checkpoints store: ids mean nothing without it.
"""

import collections
import hashlib
import io
import os
import re
import typing
from collections.abc import Iterable, Iterator

import sentencepiece

from cola_jax.types import UserError

_SPACE = "\u2581"  # SentencePiece's own sign for a space
_LINE = 4000  # longest line given to the trainer, in characters; it skips lines that exceed its limit
_TRAINER_RESERVED = re.compile("[\n\r\t\0\u2581\u2585]+")  # lines with such characters would be skipped
_WORD = re.compile(r"\w+")
SAMPLE_CHARACTERS = 10_000_000  # most text a tokenizer is trained on; about half a minute
_MOST_WORDS = 50_000  # words that are offered to the trainer as whole pieces


@typing.runtime_checkable
class Tokenizer(typing.Protocol):
    """What the rest of the package knows of a tokenizer.

    Attributes:
      name: "bytes", "sentencepiece" or "huggingface".
      vocab_size: Ids run from 0 to ``vocab_size - 1``, special ones included.
      pad_id: Fills rows behind their text.
      eos_id: Ends a document; `encode` does not append it.
      fingerprint: sha256 (hex) of what defines the mapping.
    """

    name: str
    vocab_size: int
    pad_id: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; never a special one, whatever the text spells."""
        ...

    def decode(self, ids: Iterable[typing.SupportsInt]) -> str:
        """The text of ``ids`` (0 to ``vocab_size - 1``), without padding and ends of text."""
        ...


class ByteTokenizer:
    """UTF-8 bytes (ids 0 to 255), end of text (256) and padding (257)."""

    name = "bytes"
    vocab_size = 258
    eos_id = 256
    pad_id = 257
    fingerprint = hashlib.sha256(b"cola_jax bytes eos=256 pad=257").hexdigest()

    def encode(self, text: str) -> list[int]:
        """One id for each byte of ``text`` in UTF-8."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[typing.SupportsInt]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        specials = (self.eos_id, self.pad_id)
        return bytes(i for i in map(int, ids) if i not in specials).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model.

    Models made by `train` restore any text exactly. Models from elsewhere keep their own normalisation, and
    where they have no padding piece, the end of text serves as padding (padding is marked by its segment anyway).
    """

    name = "sentencepiece"

    def __init__(self, model: bytes):
        """Args:
          model: A serialized SentencePiece model.

        Raises:
          ValueError: ``model`` is no such model, or it has no end-of-text piece.
        """
        processor = sentencepiece.SentencePieceProcessor()
        try:
            # The constructor's own loading accepts an empty model.
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError("not a SentencePiece model") from error
        if processor.eos_id() < 0:
            raise ValueError("a SentencePiece model without an end-of-text piece (eos_id)")
        self._model = model
        self._processor = processor
        self.vocab_size = processor.vocab_size()
        self.eos_id = processor.eos_id()
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        self.fingerprint = hashlib.sha256(model).hexdigest()
        marks = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = marks if all(processor.is_byte(i) for i in marks) else []

    def __reduce__(self):
        return SentencePieceTokenizer, (self._model,)  # data workers get a copy

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        if _SPACE not in text or not self._space_ids:
            return self._processor.encode_as_ids(text)
        # Left to SentencePiece, U+2581 would come back as a space; as bytes it comes back as itself.
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += (self._space_ids if i else []) + self._processor.encode_as_ids(part)
        return ids

    def decode(self, ids: Iterable[typing.SupportsInt]) -> str:
        """The text of ``ids``; byte pieces that are not UTF-8 become U+FFFD."""
        specials = (self.eos_id, self.pad_id)
        return self._processor.decode([i for i in map(int, ids) if i not in specials])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Fits a lossless unigram model in memory; the same texts give the same model.

        Args:
          texts: The training text; it is read once and kept in memory.
          vocab_size: Most pieces, counting 256 bytes and 4 symbols. Text with few different words needs fewer.

        Raises:
          UserError: There is no text, or ``vocab_size`` has no room for the bytes and symbols.
        """
        texts = list(texts)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_training_lines(texts, rare=_rare(texts, keep=(vocab_size - 260) // 2)),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                # Lossless: nothing is normalised, stripped or added, and unseen characters become bytes.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                max_sentence_length=8 * _LINE,
                num_threads=1,  # sums of floats in a fixed order: the same model each time
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise UserError(
                f"config.data.vocab_size = {vocab_size}: must be a size that SentencePiece can train on the"
                f" {sum(map(len, texts))} characters of the corpus ({reason})"
            ) from error
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SentencePieceTokenizer":
        """Reads a model file.

        Raises:
          UserError: The file cannot be read or is not a usable model.
        """
        try:
            with open(path, "rb") as file:
                return cls(file.read())
        except OSError as error:
            raise UserError(f"{os.fspath(path)}: {error.strerror}; must be a SentencePiece model file") from error
        except ValueError as error:
            raise UserError(f"{os.fspath(path)}: {error}; must be a SentencePiece model file") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model file; a reader sees all of it or nothing."""
        path = os.fspath(path)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        partial = f"{path}.{os.getpid()}.partial"
        with open(partial, "wb") as file:
            file.write(self._model)
        os.replace(partial, path)


# What the end of text and padding are called in tokenizer files, the most specific first.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_PAD_NAMES = ("<|pad|>", "<|padding|>", "<pad>", "[PAD]")


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face ``tokenizers`` (extra [hf]).

    It keeps its own normalisation; text that spells a special token is encoded as text.
    """

    name = "huggingface"

    def __init__(self, model: bytes, eos_id: int = -1, pad_id: int = -1):
        """Args:
          model: The content of the file.
          eos_id: -1: the id of a special token with one of the usual names.
          pad_id: -1: likewise; the end of text where there is none.

        Raises:
          ValueError: The content is no such tokenizer, or a special id is not known or not in the vocabulary.
          UserError: The package ``tokenizers`` is missing.
        """
        try:
            import tokenizers  # optional
        except ImportError:
            raise UserError(
                "tokenizer.json: needs the package tokenizers, which is missing: pip install 'cola_jax[hf]'"
            ) from None
        self._arguments = (model, eos_id, pad_id)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"not a tokenizer.json ({' '.join(str(error).split())[:200]})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        specials = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        # Ids may have gaps: the largest counts.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_id = self._special(eos_id, _EOS_NAMES, specials, None, "eos_id")
        self.pad_id = self._special(pad_id, _PAD_NAMES, specials, self.eos_id, "pad_id")
        self.special_ids = frozenset(specials.values()) | {self.eos_id, self.pad_id}
        self.fingerprint = hashlib.sha256(model + f" eos={self.eos_id} pad={self.pad_id}".encode()).hexdigest()

    def _special(self, given: int, names: tuple[str, ...], specials: dict[str, int], default, what: str) -> int:
        found = given if given >= 0 else next((specials[name] for name in names if name in specials), default)
        if found is None:
            raise ValueError(f"has no special token of the names {', '.join(names)}; {what} must be given")
        if found >= self.vocab_size:
            raise ValueError(f"{what} = {found}: must be an id below {self.vocab_size}")
        return found

    def __reduce__(self):
        return HuggingFaceTokenizer, self._arguments  # data workers get a copy

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without what the file's post-processor would add."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[typing.SupportsInt]) -> str:
        """The text of ``ids``, without special tokens."""
        return self._tokenizer.decode([i for i in map(int, ids) if i not in self.special_ids])

    @classmethod
    def load(cls, path: str | os.PathLike, eos_id: int = -1, pad_id: int = -1) -> "HuggingFaceTokenizer":
        """Reads a tokenizer.json.

        Raises:
          UserError: The file cannot be read or is not a usable tokenizer, or the package is missing.
        """
        try:
            with open(path, "rb") as file:
                return cls(file.read(), eos_id, pad_id)
        except OSError as error:
            raise UserError(f"{os.fspath(path)}: {error.strerror}; must be a tokenizer.json") from error
        except ValueError as error:
            raise UserError(f"{os.fspath(path)}: {error}") from error


def _rare(texts: list[str], keep: int) -> dict[int, str]:
    """A translation to line ends of all but the ``keep`` most frequent characters.

    Each character the trainer sees becomes a piece. Where they are too many for the vocabulary, the rarest ones are
    left to their bytes (SentencePiece's own option for this accepts no more than 2 % of the text).
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(text)
    return {ord(character): "\n" for character, _ in counts.most_common()[max(1, keep) :]}


def _training_lines(texts: list[str], rare: dict[int, str]) -> Iterator[str]:
    """The lines the trainer learns from.

    The trainer proposes a piece only if it occurs in two different whitespace-separated chunks. "the" that always
    stands alone is one chunk, so it would be spelled from fragments. Each word is therefore shown once more with
    each of two marks; the counts hardly change, and whole words can become pieces.
    """
    words = collections.Counter()
    for text in texts:
        for line in filter(None, _TRAINER_RESERVED.split(text.translate(rare) if rare else text)):
            # A word at the start of a line has no space before it, which is a piece of its own.
            words.update((" " if match.start() else "") + match.group() for match in _WORD.finditer(line))
            yield from (line[i : i + _LINE] for i in range(0, len(line), _LINE))
    for word, _ in words.most_common(_MOST_WORDS):
        yield from (word[:_LINE] + mark for mark in ".,")
