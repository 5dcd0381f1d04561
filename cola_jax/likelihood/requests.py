"""Requests for scores as JSON lines: texts, responses to prefixes, candidates to choose from.

A text is scored as the model was trained on it: its tokens, an end of text, and more of them up to a multiple of
``align`` tokens. All of these are part of log p; rates per token count the text's own tokens and one end of text.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cola_jax.data.tokenizers import Tokenizer
from cola_jax.likelihood import estimators
from cola_jax.likelihood.rows import stack
from cola_jax.likelihood.settings import Settings
from cola_jax.models.cola import ColaDLM
from cola_jax.types import Key, Params, UserError

FORMS = '{"text": ...}, {"prefix": ..., "response": ...} or {"prefix": ..., "candidates": [...]}, with "id" as you like'


class Request(NamedTuple):
    """One line of the input.

    Attributes:
      line: the JSON object.
      index: its number, from 0; its identity in the random stream.
      prefix: ids of the prefix; of a text, none.
      responses: ids of what is scored: the text, the response or the candidates, with their ends of text.
      tokens: how many of those ids count in rates, for each.
    """

    line: dict
    index: int
    prefix: list[int]
    responses: list[list[int]]
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Format:
    """How text becomes rows.

    Attributes:
      tokenizer: the checkpoint's.
      context: most tokens of a row.
      align: `config.data.align`.
      patch: tokens a latent.
      end_of_text: whether texts and responses are complete and end with end-of-text tokens.
    """

    tokenizer: Tokenizer
    context: int
    align: int = 1
    patch: int = 1
    end_of_text: bool = True

    def request(self, index: int, raw: str, where: str) -> Request:
        """The request of one line of JSON.

        Raises:
          UserError: naming the line, its value and what it must be.
        """
        line = _parse(raw, where)
        prefix = self.tokenizer.encode(line.get("prefix", ""))
        if len(prefix) % self.patch:
            raise UserError(f"{where}: {len(prefix)} tokens in prefix; must be a multiple of the patch {self.patch}")
        responses, counts = [], []
        for name, text in _scored(line):
            ids = self.tokenizer.encode(text)
            if not ids:
                raise UserError(f"{where}: {name} is empty; it must be text")
            fill = self.align - (len(prefix) + len(ids)) % self.align if self.end_of_text else 0
            total = len(prefix) + len(ids) + fill
            if total > self.context:
                raise UserError(f"{where}: {name} makes {total} tokens; there must be at most {self.context} (context)")
            if total % self.patch:
                raise UserError(f"{where}: {name} makes {total} tokens; must be a multiple of the patch {self.patch}")
            responses.append([*ids, *[self.tokenizer.eos_id] * fill])
            counts.append(len(ids) + self.end_of_text)
        return Request(line, index, prefix, responses, counts)


def _parse(raw: str, where: str) -> dict:
    try:
        line = json.loads(raw)
    except ValueError:
        raise UserError(f"{where}: not JSON; a line must be {FORMS}") from None
    names = set(line) - {"id"} if isinstance(line, dict) else set()
    if names not in ({"text"}, {"prefix", "response"}, {"prefix", "candidates"}):
        raise UserError(f"{where}: fields {sorted(names)}; a line must be {FORMS}")
    candidates = line.get("candidates", [])
    texts = [line[name] for name in names - {"candidates"}]
    if not isinstance(candidates, list) or not all(isinstance(text, str) for text in [*texts, *candidates]):
        raise UserError(f"{where}: a value is not text; a line must be {FORMS}")
    if "candidates" in line and not line["candidates"]:
        raise UserError(f"{where}: candidates = []; there must be at least one")
    return line


def _scored(line: dict) -> list[tuple[str, str]]:
    if "candidates" in line:
        return [(f"candidate {i}", text) for i, text in enumerate(line["candidates"])]
    return [(name, line[name]) for name in ("text", "response") if name in line]


class _Row(NamedTuple):
    ids: list[int]
    given: int  # tokens of a prefix that are not scored
    request: int


def _rows(request: Request) -> list[_Row]:
    """The rows that a request needs: each whole text; with a prefix, its responses given it, and the prefix."""
    whole = [[*request.prefix, *response] for response in request.responses]
    rows = [_Row(ids, 0, request.index) for ids in whole]
    if request.prefix:
        rows += [_Row(ids, len(request.prefix), request.index) for ids in whole]
        rows.append(_Row(request.prefix, 0, request.index))
    return rows


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores requests with one model.

    Attributes:
      model, params: the Cola DLM.
      settings, key, mesh: as in `estimators.log_likelihood`.
      context: most tokens of a row.
      batch_size: rows scored at a time; it does not change the result.
    """

    model: ColaDLM
    params: Params
    settings: Settings
    key: Key
    context: int
    batch_size: int = 32
    mesh: object = None

    def score(
        self, requests: Sequence[Request], report: Callable[[int, int], None] | None = None
    ) -> Iterator[list[dict]]:
        """Results of consecutive requests, some at a time, in their order.

        Args:
          requests: of `Format.request`.
          report: called with (row-samples done, all of them).
        """
        work = sum(len(_rows(request)) for request in requests) * self.settings.samples
        done = 0
        for group in self._groups(requests):
            rows = list(itertools.chain(*map(_rows, group)))
            found = []
            for start in range(0, len(rows), self.batch_size):
                some = rows[start : start + self.batch_size]

                found.append(self._batch(some))
                done += len(some) * self.settings.samples
                if report is not None:
                    report(done, work)
            yield _results(group, found)

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Consecutive requests that fill at least one batch."""
        group, rows = [], 0
        for request in requests:
            group.append(request)
            rows += len(_rows(request))
            if rows >= self.batch_size:
                yield group
                group, rows = [], 0
        if group:
            yield group

    def _batch(self, rows: list[_Row]) -> estimators.Likelihood:
        # Few shapes, so that few programs are compiled: full batches, and widths of 1, 2, 4, ... blocks.
        per_block = self.model.dit_config.block_size * self.model.vae_config.patch_size
        blocks = -(-max(len(row.ids) for row in rows) // per_block)
        width = max(min(2 ** (blocks - 1).bit_length(), -(-self.context // per_block)), blocks) * per_block
        filled = [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
        tokens, segments = stack([row.ids for row in filled], width)
        given, ids = [row.given for row in filled], [row.request for row in filled]
        found = estimators.log_likelihood(
            self.model, self.params, tokens, self.settings, self.key, segments, given, ids, self.mesh
        )
        # Batches of different widths are put together later: only what does not depend on the width is kept.
        nothing = estimators.BlockTerms(*[np.zeros((len(rows), 0))] * 3)
        return estimators.take(found, range(len(rows)))._replace(blocks=nothing)


def _results(group: Sequence[Request], found: list[estimators.Likelihood]) -> list[dict]:
    scores = estimators.join(found)
    results, place = [], 0
    for request in group:
        count = len(_rows(request))
        results.append(_result(request, estimators.take(scores, range(place, place + count))))
        place += count
    return results


def _result(request: Request, scores: estimators.Likelihood) -> dict:
    """One line of the output."""
    count, failed = len(request.responses), int(scores.failed.sum())
    out = {"index": request.index, **request.line}
    if failed:
        rows = len(scores.failed)
        out["error"] = f"the ODE was not solved for {failed} of {rows * scores.log_weights.shape[1]} samples"
    texts = _scored(request.line)
    each = [_text(estimators.take(scores, [i]), texts[i][1], request, i) for i in range(count)]
    if "text" in request.line:
        return out | each[0]
    if request.prefix:
        prefix = estimators.take(scores, [len(scores.elbo) - 1] * count)
    else:
        prefix = estimators.nothing_like(estimators.take(scores, range(count)))
    plug_in = estimators.plug_in(estimators.take(scores, range(count)), prefix)
    start = count if request.prefix else 0
    local = estimators.take(scores, range(start, start + count))
    answers = []
    for i in range(count):
        conditional = {name: _number(getattr(plug_in, name)[i]) for name in plug_in._fields[:4]}
        answers.append({"plug_in": conditional, "response": _terms(estimators.take(local, [i])), "joint": each[i]})
    if "response" in request.line:
        return out | {"tokens": request.tokens[0]} | {f"{name}_score": v for name, v in answers[0].items()}
    best = {} if failed else {"plug_in": int(np.argmax(plug_in.iwae)), "response": int(np.argmax(local.iwae))}
    return out | {"best": best, "scores": answers}


def _number(value) -> float | None:
    """JSON has no nan."""
    return float(value) if math.isfinite(value) else None


def _terms(one: estimators.Likelihood) -> dict:
    names = ("elbo", "elbo_error", "iwae", "iwae_error", "reconstruction", "prior", "posterior", "steps")
    return {name: _number(getattr(one, name)[0]) for name in names}


def _text(one: estimators.Likelihood, text: str, request: Request, i: int) -> dict:
    out = _terms(one)
    size = len((request.line.get("prefix", "") + text).encode())
    tokens = request.tokens[i] + len(request.prefix)
    for name in ("elbo", "iwae"):
        out[f"{name}_perplexity"] = _number(estimators.perplexity(getattr(one, name)[0], tokens))
        out[f"{name}_bits_per_byte"] = _number(estimators.bits_per_byte(getattr(one, name)[0], size))
    return out | {"tokens": tokens}
