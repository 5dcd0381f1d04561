"""Checkpoints of every family as the model `cola_jax` of lm-evaluation-harness (the package lm_eval).

    python launch/harness.py --model cola_jax --model_args checkpoint=runs/quickstart --tasks hellaswag

What a request gets depends on (seed, request) alone: not on the batch, and not on what a run that was stopped has
answered before. With ``--use_cache`` lm_eval keeps every answer as it comes, and the same command goes on.
"""

import dataclasses
import math
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from cola_jax import fields, rng, runs
from cola_jax.evaluation import continuations
from cola_jax.evaluation.continuations import Given
from cola_jax.types import UserError

_BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing
_CHUNK = 256  # requests of one kind that are answered before their answers are kept


class ColaJax(TemplateLM):
    """A checkpoint, as lm_eval sees it.

    Args:
      checkpoint: a run's directory, one of its stages, or a released directory.
      step: of the run's last stage; None: the newest.
      tokenizer: a tokenizer.json; None: the one in the directory.
      batch_size: prompts, or rows, at a time; it does not change the result.
      seed: of all draws.
      max_new_tokens: budget of an answer where a task names none.
      end_of_text: whether a continuation is scored with the end of text behind it; None: only where log p is a bound
        (Cola scores whole blocks).
      greedy: whether it is found out, by generation, if a continuation is what the model writes; costs as much as the
        answers. Off: lm_eval is told that none is.
      max_batch_size, device: of lm_eval's command line, not used: JAX chooses the device.
      options: settings, sample_NAME of the generation and score_NAME of the likelihood.

    Raises:
      UserError: no such checkpoint or setting.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        step: int | None = None,
        tokenizer: str | None = None,
        batch_size: int | str = 32,
        seed: int = 0,
        max_new_tokens: int = 32,
        end_of_text: bool | None = None,
        greedy: bool = True,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ):
        super().__init__()
        del max_batch_size, device
        self._run = run = runs.load(checkpoint, step, "--model_args checkpoint", tokenizer)
        self._settings = _changed(run.settings, "sample_", options)
        self._scoring = _changed(run.family.score_settings(), "score_", options)
        if options:
            raise UserError(f"--model_args {', '.join(options)}: must be arguments of the model or sample_, score_NAME")
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 32
        self._budget, self._greedy = max_new_tokens, greedy
        self._end = run.family.bound != "exact" if end_of_text is None else end_of_text
        self._keys = {name: rng.key(seed, name) for name in ("sample", "likelihood")}
        where = str(Path(str(checkpoint)).absolute())
        self._facts = {"checkpoint": where, "step": run.step, "family": run.family.name, "seed": seed}
        self._facts |= {"commit": _commit(), "jax_device": jax.devices()[0].device_kind}
        self._errors: list[float] = []
        self._truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self._run.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self._run.config.data.sequence_length

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm_eval's caches."""
        return f"{self._run.tokenizer.name} {self._run.tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; there are no special tokens to add."""
        del add_special_tokens, kwargs
        return self._run.tokenizer.encode(string)

    def get_model_info(self) -> dict:
        """What lm_eval writes beside the results: where they come from, and how likelihoods were estimated."""
        found = self._facts | {"dtype": self._run.config.train.compute_dtype, "bound": self._run.family.bound}
        found |= {"estimator": dataclasses.asdict(self._scoring), "sampler": dataclasses.asdict(self._settings)}
        found |= {"samples": getattr(self._scoring, "samples", 1), "end_of_text": self._end}
        known = [error for error in self._errors if math.isfinite(error)]
        found["log_prob_error"] = sum(known) / len(known) if known else None
        return found | {"truncated_requests": self._truncated}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether the model writes it) of each pair, as lm_eval has tokenized it."""
        del kwargs
        answers: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), _CHUNK):
                chunk = requests[start : start + _CHUNK]
                # lm_eval puts an end of text before a text without context; these models know how a text begins.
                pairs = [self._within([] if pair[0] == "" else before, after) for pair, before, after in chunk]
                given = [self._given(before, self._ended(before, after)) for before, after in pairs]
                values = [self._summed([score]) for score in self._scores(given)]
                written = self._writes(pairs) if self._greedy else [False] * len(pairs)
                for (pair, _, _), value, same in zip(chunk, values, written, strict=True):
                    answers.append((value, same))
                    self.cache_hook.add_partial("loglikelihood", pair, answers[-1])
                bar.update(len(chunk))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text; one that is longer than the context in windows, each token once."""
        answers = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            windows = self._windows(self._ended([], self.tok_encode(request.args[0])))
            answers.append(self._summed(self._scores([self._given(*window) for window in windows])))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to a stop string, an end of text or the budget."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._generation(request.args[1])].append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for settings, members in groups.items():
                room = self.max_length - settings.max_new_tokens
                whole = [self.tok_encode(requests[index].args[0]) for index in members]
                prompts = [ids[-room:] for ids in whole]
                self._truncated += sum(len(ids) > room for ids in whole)
                places = iter(members)
                for tokens in self._write(prompts, settings):
                    index = next(places)
                    context, options = requests[index].args
                    answers[index] = _until(self._run.tokenizer.decode(tokens), options.get("until"))
                    self.cache_hook.add_partial("generate_until", (context, options), answers[index])
                    bar.update(1)
        return answers

    def _within(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """A pair that the context has room for: the front of what is too long is cut off."""
        data, unit = self._run.config.data, self._run.family.tokens_per_latent(self._run.config)
        most = self.max_length - (data.align if self._end else 0)
        kept = after[-most:]
        room = most - len(kept)
        count = min(len(before), room)
        count -= count % unit
        self._truncated += count < len(before) or len(kept) < len(after)
        return before[len(before) - count :], kept

    def _ended(self, before: Sequence[int], after: list[int]) -> list[int]:
        """``after`` with the ends of text that it is scored with."""
        align, size = self._run.config.data.align, len(before) + len(after)
        return after + [self.eot_token_id] * ((align - size % align) * self._end)

    def _given(self, before: list[int], after: list[int]) -> Given:
        """A pair to be scored; what is drawn depends on it alone."""
        (identity,) = continuations.identities([[*before, -1, *after]])
        return Given(before, [after], identity, self._end)

    def _windows(self, ids: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        """(given tokens, scored tokens): each is scored once, the last behind as many as the context has room for."""
        unit, done = self._run.family.tokens_per_latent(self._run.config), 0
        while done < len(ids):
            stop = min(done + self.max_length - (unit if done else 0), len(ids))
            yield ids[max(stop - self.max_length, 0) : done], ids[done:stop]
            done = stop

    def _scores(self, given: list[Given]) -> list[continuations.Score]:
        key, found = self._keys["likelihood"], []
        for some in continuations.score(self._run, given, self._scoring, key, self._batch_size):
            found += [one for (one,) in some]
        return found

    def _summed(self, scores: Sequence[continuations.Score]) -> float:
        """log p of parts together."""
        value = sum(one.log_prob for one in scores)
        if not math.isfinite(value):
            raise UserError(
                "--model_args: a likelihood was not found; score_max_steps must be higher, or others looser"
            )
        self._errors.append(math.sqrt(sum(one.error**2 for one in scores)))
        return value

    def _writes(self, pairs: list[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether greedy generation behind each first text begins with the second one."""
        groups: dict[int, list[int]] = defaultdict(list)
        for index, (_, after) in enumerate(pairs):
            groups[max(4, 2 ** (len(after) - 1).bit_length())].append(index)  # few programs
        found = [False] * len(pairs)
        for budget, members in groups.items():
            settings = self._with(max_new_tokens=budget, temperature=0.0, context=None)
            contexts = list(dict.fromkeys(tuple(pairs[index][0]) for index in members))
            written = dict(zip(contexts, self._write([list(ids) for ids in contexts], settings), strict=True))
            for index in members:
                before, after = pairs[index]
                found[index] = written[tuple(before)][: len(after)] == after
        return found

    def _write(self, prompts: list[list[int]], settings: Any) -> Iterable[list[int]]:
        """The new tokens of each prompt, in order, as they come."""
        samples = continuations.identities(prompts)
        key, size = self._keys["sample"], self._batch_size
        for batch in continuations.generate(self._run, prompts, settings, key, samples, size):
            yield from batch

    def _with(self, **changes: Any) -> Any:
        """The settings of the generation with those of the changes that the family has."""
        names = {field.name for field in dataclasses.fields(self._settings)}
        return dataclasses.replace(self._settings, **{name: changes[name] for name in changes if name in names})

    def _generation(self, options: dict) -> Any:
        """The settings that lm_eval's generation_kwargs ask for; greedy where they do not ask for samples."""
        given = {name: value for name, value in options.items() if name not in ("until", "do_sample")}
        budgets = [int(given.pop(name)) for name in _BUDGETS if given.get(name) is not None]
        budget = min((budgets or [self._budget])[0], self.max_length // 2)
        temperature = float(given.pop("temperature", None) or 0.0)
        if options.get("do_sample") is False or (options.get("do_sample") is None and not temperature):
            temperature = 0.0
        elif not temperature:
            temperature = 1.0
        known = {field.name for field in dataclasses.fields(self._settings)}
        if unknown := [name for name in given if name not in known]:
            raise UserError(
                f"generation_kwargs {', '.join(unknown)}: family {self._facts['family']!r} has no such setting"
            )
        settings = self._with(max_new_tokens=budget, temperature=temperature, **given)
        settings.validate()
        return settings


def _changed(settings: Any, prefix: str, options: dict[str, Any]) -> Any:
    """``settings`` with the options of this prefix, which are taken out of ``options``.

    Raises:
      UserError: there is no such setting, or its value is not allowed.
    """
    known, changes = fields.entries(type(settings)), {}
    for name in [name for name in options if name.startswith(prefix)]:
        field = name.removeprefix(prefix)
        if field not in known:
            raise UserError(f"--model_args {name}: no such setting; must be one of {', '.join(known) or 'none'}")
        fields.check_value(known[field], options[name], f"--model_args {name}")
        changes[field] = options.pop(name)
    settings = dataclasses.replace(settings, **changes)
    settings.validate()
    return settings


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """``text`` up to the first of the stop strings in it."""
    stops = [stops] if isinstance(stops, str) else stops or []
    return text[: min([len(text), *(text.find(stop) for stop in stops if stop and stop in text)])]


def _commit() -> str | None:
    """The commit of this code; None where it is no checkout."""
    place = Path(__file__).parent
    command = ["git", "-C", str(place), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
