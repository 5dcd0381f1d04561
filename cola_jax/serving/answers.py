"""Answers as OpenAI's interface defines them."""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Piece(NamedTuple):
    """More of one sequence of an answer.

    Attributes:
      index: of the sequence.
      text: new text; final.
      finish: "stop" or "length" in the last piece; None before.
      tokens: how many new ones.
      log_probs: of the new tokens (`Noted`), where they are told.
      estimates: the texts that each step made of the new tokens, where they are told.
      picture: in the last piece of an image, uint8 [S, S, 3].
    """

    index: int
    text: str
    finish: str | None = None
    tokens: int = 0
    log_probs: "list[Noted] | None" = None
    estimates: list[str] | None = None
    picture: np.ndarray | None = None


class Noted(NamedTuple):
    """log p of one token, and of the most likely ones in its place."""

    text: str
    log_prob: float
    likeliest: list[tuple[str, float]]


def noted(found: Any, tokens: Sequence[int], count: int, decode: Callable[[list[int]], str]) -> list[Noted]:
    """What an update's log-probabilities say of its tokens, with the ``count`` most likely ones."""
    rows = []
    for place, token in enumerate(tokens):
        pairs = zip(found.ids[place, :count].tolist(), found.values[place, :count].tolist(), strict=True)
        rows.append(Noted(decode([token]), float(found.chosen[place]), [(decode([i]), value) for i, value in pairs]))
    return rows


class Form:
    """Writes the answers to one request.

    Attributes:
      id: of the answer.
    """

    def __init__(self, chat: bool, model: str, count: int, prompt_tokens: int, seed: int):
        """Args:
        chat: whether it is a conversation.
        model: its name.
        count: sequences of the answer.
        prompt_tokens: of all prompts.
        seed: of the draws, told under "cola_jax".
        """
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._chat, self._model, self._prompt_tokens, self._seed = chat, model, prompt_tokens, seed
        self._created, self._tokens = int(time.time()), 0
        self._texts = [""] * count
        self._finish: list[str | None] = [None] * count
        self._log_probs: list[list[Noted] | None] = [None] * count

    def take(self, piece: Piece) -> None:
        """Notes a piece."""
        self._tokens += piece.tokens
        self._finish[piece.index] = piece.finish or self._finish[piece.index]
        self._texts[piece.index] += piece.text
        if piece.log_probs is not None:
            self._log_probs[piece.index] = (self._log_probs[piece.index] or []) + piece.log_probs

    @property
    def usage(self) -> dict:
        """Tokens so far."""
        total = self._prompt_tokens + self._tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._tokens, "total_tokens": total}

    def whole(self) -> dict:
        """The answer, when all pieces were taken."""
        choices = []
        for index, text in enumerate(self._texts):
            content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            log_probs = self._told(self._log_probs[index], 0, text)
            choices.append({"index": index, **content, "logprobs": log_probs, "finish_reason": self._finish[index]})
        return self._envelope(choices) | {"usage": self.usage}

    def beginning(self) -> list[dict]:
        """What a stream begins with."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._envelope([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], stream=True)
            for index in range(len(self._texts))
        ]

    def chunk(self, piece: Piece) -> dict:
        """A piece in a stream; its estimates under "cola_jax"."""
        offset = len(self._texts[piece.index])
        self.take(piece)
        content = {"delta": {"content": piece.text} if piece.text else {}} if self._chat else {"text": piece.text}
        log_probs = self._told(piece.log_probs, offset, None)
        choice = {"index": piece.index, **content, "logprobs": log_probs, "finish_reason": piece.finish}
        chunk = self._envelope([choice], stream=True)
        if piece.estimates is not None:
            chunk["cola_jax"] |= {"index": piece.index, "provisional": piece.estimates}
        return chunk

    def usage_chunk(self) -> dict:
        """What a stream ends with where it was asked for."""
        return self._envelope([], stream=True) | {"usage": self.usage}

    def _envelope(self, choices: list[dict], stream: bool = False) -> dict:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self._chat else "text_completion"
        common = {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}
        return common | {"cola_jax": {"seed": self._seed}}

    def _told(self, rows: list[Noted] | None, offset: int, text: str | None) -> dict | None:
        """Log-probabilities in the shape of the kind of answer; those of tokens behind the end of ``text`` are not."""
        if rows is None:
            return None
        offsets = [offset]
        for row in rows:
            offsets.append(offsets[-1] + len(row.text))
        if text is not None:
            rows = [row for row, at in zip(rows, offsets, strict=False) if at < len(text)]
        if self._chat:
            return {"content": [_place(row.text, row.log_prob) | {"top_logprobs": _tops(row)} for row in rows]}
        likeliest = [dict(reversed(row.likeliest)) for row in rows]  # of equal texts, the more likely one
        return {
            "tokens": [row.text for row in rows],
            "token_logprobs": [row.log_prob for row in rows],
            "top_logprobs": likeliest if any(likeliest) else None,
            "text_offset": offsets[: len(rows)],
        }


def _place(text: str, value: float) -> dict:
    return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8"))}


def _tops(row: Noted) -> list[dict]:
    return [_place(text, value) for text, value in row.likeliest]


def event(body: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
