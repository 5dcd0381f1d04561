"""One request on its way through the batcher: its sequences, and their updates as pieces of an answer."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from cola_jax.data.tokenizers import Tokenizer
from cola_jax.serving import answers
from cola_jax.serving.answers import Piece
from cola_jax.serving.batcher import Batcher
from cola_jax.serving.desk import Asked
from cola_jax.serving.errors import ApiError
from cola_jax.serving.lane import Ticket, Update
from cola_jax.serving.text import TextStream


class Exchange:
    """The sequences of a request; they are cancelled when nobody reads `pieces` any longer."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, batcher: Batcher, seconds: float):
        """Submits the sequences.

        Args:
          asked: the request.
          tokenizer: of the model.
          batcher: takes them.
          seconds: until the request is given up.

        Raises:
          ApiError: 429 or 503, the batcher takes no more.
        """
        self._asked, self._tokenizer, self._batcher = asked, tokenizer, batcher
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._texts = [TextStream(tokenizer.decode, asked.stops) for _ in asked.jobs]
        more = asked.provisional or asked.log_probs is not None
        self._tickets = [Ticket(job, self._sink(index), more) for index, job in enumerate(asked.jobs)]
        batcher.submit(asked.lane, self._tickets)

    def _sink(self, index: int):
        return lambda update: self._updates.put_nowait((index, update))

    def cancel(self) -> None:
        """Gives up the sequences that are not done."""
        self._batcher.cancel(self._tickets)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all sequences as they come.

        Raises:
          ApiError: 408, the time is over; 500, generation failed.
        """
        for index, echo in enumerate(self._asked.echoes):
            if echo:
                yield Piece(index, echo)
        going = set(range(len(self._tickets)))
        while going:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, update = await self._updates.get()
            except TimeoutError:
                raise ApiError(408, "the time for a request is over", code="timeout") from None
            if update.error is not None:
                raise ApiError(500, "generation failed; the server's log has the reason", code="failed")
            if index not in going:
                continue
            piece = self._piece(index, update)
            if piece.finish is not None:
                going.remove(index)
                self._tickets[index].cancelled = True  # where a stop text came before the end
            if piece.text or piece.finish or piece.log_probs:
                yield piece

    def _piece(self, index: int, update: Update) -> Piece:
        stream, asked = self._texts[index], self._asked
        before = stream.tokens
        text = stream.add(update.tokens, update.done)
        finish = None
        if stream.stopped or update.done:
            finish = "stop" if stream.stopped or update.ended else "length"
        found = estimates = None
        if asked.log_probs is not None and update.log_probs is not None:
            decode = self._tokenizer.decode
            found = answers.noted(update.log_probs, update.tokens, asked.log_probs, decode)
        if asked.provisional and update.estimates is not None and len(update.tokens):
            estimates = self._provisional(before, update.estimates)
        return Piece(index, text, finish, len(update.tokens), found, estimates, update.picture)

    def _provisional(self, before: Sequence[int], estimates) -> list[str]:
        """What each step made of a unit, as text that stands behind that of the tokens before."""
        start = self._tokenizer.decode(before)
        return [self._tokenizer.decode([*before, *guess])[len(start) :] for guess in estimates.tolist()]
