"""From the body of a request to the sequences that it asks for."""

import dataclasses
import secrets
from typing import Any, NamedTuple

from cola_jax.data.tokenizers import Tokenizer
from cola_jax.families.interface import Pictures
from cola_jax.sampling.choose import Choice
from cola_jax.sampling.jobs import Job, Picture
from cola_jax.serving import pictures
from cola_jax.serving.bodies import Body, ChatBody, CompletionBody, ImageBody
from cola_jax.serving.chat import ChatTemplate
from cola_jax.serving.errors import ApiError
from cola_jax.serving.offers import Offers
from cola_jax.serving.settings import ServeSettings
from cola_jax.types import UserError


class Asked(NamedTuple):
    """What one request asks for.

    Attributes:
      lane: index of the offer; that of images comes behind them.
      jobs: its sequences; those of prompt i are the n from i * n on.
      prompts: the tokens of each prompt.
      echoes: what stands before each sequence's text in the answer.
      stops: see `TextStream`.
      log_probs: most likely tokens to tell at each place, 0 for those that were chosen only; None: nothing.
      provisional: whether estimates are told.
      seed: of the draws.
    """

    lane: int
    jobs: list[Job]
    prompts: list[list[int]]
    echoes: list[str]
    stops: tuple[str, ...]
    log_probs: int | None
    provisional: bool
    seed: int


class Desk:
    """Knows what the server offers."""

    def __init__(
        self, name: str, tokenizer: Tokenizer, offers: Offers, limits: ServeSettings, chat: ChatTemplate | None
    ):
        """Args:
        name: of the model.
        tokenizer: of the checkpoint.
        offers, limits: of the server.
        chat: template of conversations, or None.
        """
        self.name, self.tokenizer, self.offers = name, tokenizer, offers
        self._limits, self._chat = limits, chat

    def completion(self, body: CompletionBody) -> Asked:
        """What a completion asks for.

        Raises:
          ApiError: it cannot be had.
        """
        self._check_model(body.model)
        prompts = [self._ids(index, prompt) for index, prompt in enumerate(body.prompts)]
        if body.echo and (body.logprobs is not None or body.suffix is not None):
            raise ApiError(400, "echo: cannot be given together with logprobs or suffix", "echo")
        suffix = None if body.suffix is None else self.tokenizer.encode(body.suffix)
        echoes = [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
            for prompt, ids in zip(body.prompts, prompts, strict=True)
        ]
        asked = self._asked(body, prompts, suffix, body.max_tokens, self._log_probs(body.logprobs, "logprobs"))
        return asked._replace(echoes=[text for text in echoes for _ in range(body.n or 1)]) if body.echo else asked

    def chat(self, body: ChatBody) -> Asked:
        """What a conversation asks for.

        Raises:
          ApiError: it cannot be had.
        """
        self._check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: must be given together with logprobs = true", "top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens: cannot be given together with max_completion_tokens", "max_tokens")
        log_probs = self._log_probs(body.top_logprobs or 0, "top_logprobs") if body.logprobs else None
        budget = body.max_tokens or body.max_completion_tokens
        if any(message.urls for message in body.messages):
            return self._description(body, budget, log_probs)
        if self._chat is None:
            need = "the checkpoint has no chat template; --chat_template=FILE of the server names one"
            raise ApiError(400, f"messages: {need}; /v1/completions needs none", "messages", "no_chat_template")
        prompt = self._ids(0, self._chat.render(body.messages))
        return self._asked(body, [prompt], None, budget, log_probs)

    def _description(self, body: ChatBody, budget: int | None, log_probs: int | None) -> Asked:
        """A text for the image of a message, whose words are what is said before the image.

        Raises:
          ApiError: the run knows no images, or not as many; not an image, too many words.
        """
        known, message = self._pictures("messages: an image", "messages"), body.messages[0]
        if len(body.messages) > 1 or len(message.urls) > 1:
            found = f"{sum(len(each.urls) for each in body.messages)} images in {len(body.messages)} messages"
            raise ApiError(400, f"messages: {found}; must be one image in the only message", "messages")
        picture = pictures.read(message.urls[0], known.size)
        said = known.words(message.text) if message.text.strip() else known.instruction
        if len(said) > known.instruction_length:
            need = f"must be at most {known.instruction_length} with their end; without words the run's own are said"
            if not known.instruction_length:
                need = "must be none: this run's images have no instructions"
            raise ApiError(400, f"messages: the words beside the image are {len(said)} tokens: {need}", "messages")
        asked = self._asked(body, [[]], None, budget, log_probs)
        jobs = [job._replace(picture=Picture(picture, said)) for job in asked.jobs]
        return asked._replace(jobs=jobs, prompts=[said])

    def image(self, body: ImageBody) -> Asked:
        """What a request for images asks for.

        Raises:
          ApiError: it cannot be had.
        """
        self._check_model(body.model)
        known, count = self._pictures("/v1/images/generations", "model"), body.n or 1
        size = f"{known.size}x{known.size}"
        if body.size not in (None, "auto", size):
            raise ApiError(400, f"size = {body.size[:32]!r}: must be {size!r}, the run's", "size")
        self._check_count(count, 1)
        given = {name: getattr(body, name) for name in ("steps", "guidance_scale") if getattr(body, name) is not None}
        prompt = known.words(body.prompt) if body.prompt else []
        if len(prompt) > known.length:
            message = f"prompt has {len(prompt)} tokens with its end: must be at most {known.length}"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        seed, drawing = self._seed(body.seed), dataclasses.replace(known.settings, **given)
        jobs = [Job(prompt, 0, Choice(), seed, index, drawing=drawing) for index in range(count)]
        return Asked(len(self.offers.settings), jobs, [prompt], [""] * count, (), None, False, seed)

    def _pictures(self, what: str, param: str) -> Pictures:
        """Of the run.

        Raises:
          ApiError: it has none.
        """
        if self.offers.pictures is None:
            family = f"the model is of family {self.offers.family!r}"
            raise ApiError(400, f"{what} needs a model of family 'unified'; {family}", param, "no_images")
        return self.offers.pictures

    def _seed(self, given: int | None) -> int:
        return secrets.randbits(31) if given is None else given

    def _check_count(self, count: int, prompts: int) -> None:
        most = self._limits.max_sequences
        if count * prompts > most:
            raise ApiError(400, f"n = {count}: with {prompts} prompts must be at most {most} sequences", "n")

    def _check_model(self, name: str) -> None:
        if name != self.name:
            message = f"model = {name[:64]!r}: not served here; must be {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def _ids(self, index: int, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        most = self.tokenizer.vocab_size
        if prompt and not (0 <= min(prompt) and max(prompt) < most):
            message = f"prompt {index}: has a token outside the vocabulary, must be 0 to {most - 1}"
            raise ApiError(400, message, "prompt")
        return prompt

    def _log_probs(self, count: int | None, name: str) -> int | None:
        most = self.offers.engine.log_probs
        if count is None:
            return None
        if not most:
            raise ApiError(400, f"{name}: the model has no probabilities of single tokens; must be null", name)
        if count > most:
            raise ApiError(400, f"{name} = {count}: must be at most {most}", name)
        return count

    def _asked(self, body: Body, prompts: list[list[int]], suffix, budget: int | None, log_probs) -> Asked:
        count = body.n or 1
        self._check_count(count, len(prompts))
        ours: dict[str, Any] = dict(body.cola_jax or {})
        provisional = ours.pop("provisional", False)
        if not isinstance(provisional, bool):
            raise ApiError(400, "cola_jax.provisional: must be true or false", "cola_jax")
        for name in ("temperature", "top_p"):
            if getattr(body, name) is not None:
                ours[name] = getattr(body, name)
        try:
            lane, choice = self.offers.choose(ours, "")
        except UserError as error:
            name = str(error).split(maxsplit=1)[0].rstrip(":")
            raise ApiError(400, str(error), name if name in ("temperature", "top_p") else "cola_jax") from error
        if suffix is not None:
            choice = self._filling(choice, lane)
        seed = self._seed(body.seed)
        jobs = []
        for index, prompt in enumerate(prompts):
            room = self._room(index, prompt, suffix, budget, lane)
            for each in range(count):
                jobs.append(Job(prompt, room, choice, seed, index * count + each, suffix))
        return Asked(lane, jobs, prompts, [""] * len(jobs), body.stops, log_probs, provisional, seed)

    def _filling(self, choice, lane: int):
        """The choice of a sequence that fills a gap: it does not end early.

        Raises:
          ApiError: this family only continues texts.
        """
        if not self.offers.engine.fills(self.offers.settings[lane]):
            raise ApiError(400, "suffix: this model only continues texts; must be null", "suffix", "cannot_infill")
        return choice._replace(eos_id=None)

    def _room(self, index: int, prompt: list[int], suffix, budget: int | None, lane: int) -> int:
        """New tokens of a sequence: what was asked for, or what its prompt leaves."""
        offers, settings = self.offers, self.offers.settings[lane]
        known = len(prompt) + len(suffix or ())
        context, most = offers.context, offers.max_tokens
        if not offers.engine.own:  # whole batches: the budget is the program's
            context, most = offers.context - settings.max_new_tokens + 1, settings.max_new_tokens
        limit = min(context - 1, self._limits.max_prompt_tokens or context)
        if known > limit:
            what = "prompt and suffix have" if suffix else f"prompt {index} has"
            message = f"{what} {known} tokens: must be at most {limit}"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        room = min(most, context - known if offers.engine.own else most)
        if budget is None:
            if suffix is not None:
                raise ApiError(400, "max_tokens: must be given with suffix: the length of the gap", "max_tokens")
            return room
        if budget > room:
            message = f"max_tokens = {budget}: must be at most {room} behind a prompt of {known} tokens"
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        return budget
