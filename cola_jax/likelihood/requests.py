"""Requests for scores as JSON lines: texts, responses to prefixes, candidates to choose from.

A text is scored as the model was trained on it: its tokens, an end of text, and more of them up to a multiple of
``align`` tokens. All of these are part of log p; rates per token count the text's own tokens and one end of text.
What ends inside a block of the prior and is not complete has no log p that means anything: its numbers are null, and
"reason" says why.
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
      complete: whether the responses end with their ends of text.
    """

    line: dict
    index: int
    prefix: list[int]
    responses: list[list[int]]
    tokens: list[int]
    complete: bool = True


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
        return Request(line, index, prefix, responses, counts, self.end_of_text)


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
    name: tuple[str, int]  # "joint" or "response" and its number, or the "prefix"


def _open_end(request: Request, i: int, block: int) -> str:
    """Why the i-th text of a request has no log p; "" where it has one."""
    tokens = len(request.prefix) + len(request.responses[i])
    reason = "" if request.complete else estimators.ends_inside_block(tokens, block)
    return reason and f"text without its end, of {tokens} tokens, {reason}"


def _open_prefix(request: Request, block: int) -> str:
    """Why the prefix of a request has no log p; "" where it has one."""
    tokens = len(request.prefix)
    reason = estimators.ends_inside_block(tokens, block)
    return reason and f"prefix of {tokens} tokens {reason}"


def _rows(request: Request, block: int) -> list[_Row]:
    """The rows that a request needs: each whole text; with a prefix, its responses given it, and the prefix.

    Rows without a log p that means anything are left out.

    Args:
      request: from `Format.request`.
      block: tokens of a block of the prior.
    """
    size, index = len(request.prefix), request.index
    whole = [(i, [*request.prefix, *response]) for i, response in enumerate(request.responses)]
    whole = [(i, ids) for i, ids in whole if not _open_end(request, i, block)]
    rows = [_Row(ids, 0, index, ("joint", i)) for i, ids in whole]
    if request.prefix:
        rows += [_Row(ids, size, index, ("response", i)) for i, ids in whole]
    if request.prefix and whole and not _open_prefix(request, block):
        rows.append(_Row(request.prefix, 0, index, ("prefix", 0)))
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

    @property
    def block(self) -> int:
        """Tokens of a block of the prior."""
        return self.model.dit_config.block_size * self.model.vae_config.patch_size

    def score(
        self, requests: Sequence[Request], report: Callable[[int, int], None] | None = None
    ) -> Iterator[list[dict]]:
        """Results of consecutive requests, some at a time, in their order.

        Args:
          requests: of `Format.request`.
          report: called with (row-samples done, all of them).
        """
        work = sum(len(_rows(request, self.block)) for request in requests) * self.settings.samples
        done = 0
        for group in self._groups(requests):
            rows = list(itertools.chain(*(_rows(request, self.block) for request in group)))
            found = []
            for start in range(0, len(rows), self.batch_size):
                some = rows[start : start + self.batch_size]
                found.append(self._batch(some))
                done += len(some) * self.settings.samples
                if report is not None:
                    report(done, work)
            yield self._results(group, found)

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Consecutive requests that fill at least one batch."""
        group, rows = [], 0
        for request in requests:
            group.append(request)
            rows += len(_rows(request, self.block))
            if rows >= self.batch_size:
                yield group
                group, rows = [], 0
        if group:
            yield group

    def _batch(self, rows: list[_Row]) -> estimators.Likelihood:
        # Few shapes, so that few programs are compiled: full batches, and widths of 1, 2, 4, ... blocks.
        per_block = self.block
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

    def _results(self, group: Sequence[Request], found: list[estimators.Likelihood]) -> list[dict]:
        scores = estimators.join([*found, estimators.unknown(self.settings)])  # a group may have no rows
        results, place = [], 0
        for request in group:
            count = len(_rows(request, self.block))
            some = estimators.take(scores, [*range(place, place + count), -1])
            results.append(_result(request, some, self.block))
            place += count
        return results


def _result(request: Request, scores: estimators.Likelihood, block: int) -> dict:
    """One line of the output.

    Args:
      request: from `Format.request`.
      scores: of its `_rows`, and behind them one row of which nothing is known.
      block: tokens of a block of the prior.
    """
    rows, failed = _rows(request, block), int(scores.failed.sum())
    places = {row.name: i for i, row in enumerate(rows)}
    out = {"index": request.index, **request.line}
    if failed:
        out["error"] = f"the ODE was not solved for {failed} of {len(rows) * scores.log_weights.shape[1]} samples"

    def find(kind, i):
        return estimators.take(scores, [places.get((kind, i), len(rows))])

    texts, no_prefix = _scored(request.line), _open_prefix(request, block)
    answers, ranks = [], {"plug_in": [], "response": []}
    for i, (_, text) in enumerate(texts):
        joint, reason = find("joint", i), _open_end(request, i, block)
        whole = _text(joint, text, request, i) | _why(reason)
        if "text" in request.line:
            return out | whole
        local = find("response", i) if request.prefix else joint
        prefix = find("prefix", 0) if request.prefix else estimators.nothing_like(joint)
        plug_in = estimators.plug_in(joint, prefix)
        conditional = {name: _number(getattr(plug_in, name)[0]) for name in plug_in._fields[:4]}
        answers.append(
            {
                "plug_in": conditional | _why(no_prefix or reason),
                "response": _terms(local) | _why(reason),
                "joint": whole,
            }
        )
        ranks["plug_in"].append(_rank(plug_in))
        ranks["response"].append(_rank(local))
    if "response" in request.line:
        return out | {"tokens": request.tokens[0]} | {f"{name}_score": v for name, v in answers[0].items()}
    best = {} if failed else {name: _best(values) for name, values in ranks.items()}
    return out | {"best": best, "scores": answers}


def _why(reason: str) -> dict:
    return {"reason": reason} if reason else {}


def _rank(scores: estimators.Likelihood | estimators.Conditional) -> float:
    """What candidates are compared by: the IWAE where it is given (exact divergence), else the ELBO."""
    iwae = float(scores.iwae[0])
    return float(scores.elbo[0]) if math.isnan(iwae) else iwae


def _best(values: Sequence[float]) -> int | None:
    """Index of the highest value; None where one is not known."""
    return None if any(map(math.isnan, values)) else int(np.argmax(values))


def _number(value) -> float | None:
    """JSON has no nan."""
    return float(value) if math.isfinite(value) else None


def _terms(one: estimators.Likelihood) -> dict:
    names = ("elbo", "elbo_error", "iwae", "iwae_error", "ess", "reconstruction", "prior", "posterior", "steps")
    return {name: _number(getattr(one, name)[0]) for name in names}


def _text(one: estimators.Likelihood, text: str, request: Request, i: int) -> dict:
    out = _terms(one)
    size = len((request.line.get("prefix", "") + text).encode())
    tokens = request.tokens[i] + len(request.prefix)
    for name in ("elbo", "iwae"):
        out[f"{name}_perplexity"] = _number(estimators.perplexity(getattr(one, name)[0], tokens))
        out[f"{name}_bits_per_byte"] = _number(estimators.bits_per_byte(getattr(one, name)[0], size))
    return out | {"tokens": tokens}
