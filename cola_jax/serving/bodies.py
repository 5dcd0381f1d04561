"""Bodies of requests, with the fields that OpenAI's interface gives them; what is ours is under "cola_jax"."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Discriminator, Field, Tag

from cola_jax.serving.errors import ApiError

# Fields that clients send although they ask for nothing, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "metadata": ({},),
    "quality": ("auto", "standard"),
    "background": ("auto",),
    "moderation": ("auto",),
    "output_format": ("png",),
}


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Model):
    """What a stream ends with."""

    include_usage: bool | None = None


class Body(_Model):
    """What both kinds of requests have."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    cola_jax: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which a text ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Any = ""
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    best_of: Any = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids.

        Raises:
          ApiError: it is something else.
        """
        value = self.prompt
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if _are_ids(value):
                return [value]
            if all(isinstance(each, str) or _are_ids(each) for each in value):
                return value
        raise ApiError(400, "prompt: must be a text, a list of texts, token ids, or a list of those", "prompt")


def _are_ids(value) -> bool:
    """Whether this is a list of whole numbers."""
    return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)


class TextPart(_Model):
    """A part of a message that is said."""

    type: Literal["text"]
    text: str


class ImageUrl(_Model):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Model):
    """A part of a message that is shown."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
]


class Message(_Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @property
    def text(self) -> str:
        """What was said."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        """Of the images that were shown."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None
    store: Any = None
    metadata: Any = None


class ImageBody(_Model):
    """POST /v1/images/generations."""

    model: str
    prompt: str
    n: int | None = Field(None, ge=1)
    size: str | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    response_format: Literal["b64_json"] | None = None
    user: str | None = None
    quality: Any = None
    background: Any = None
    moderation: Any = None
    output_format: Any = None


AnyBody = Body | ImageBody


def parse(kind: type[AnyBody], raw: bytes) -> AnyBody:
    """The body of a request.

    Raises:
      ApiError: it is not JSON, has an unknown field, or one with a value that is not allowed.
    """
    try:
        body = kind.model_validate_json(raw)
    except pydantic.ValidationError as error:
        raise _error(kind, error) from None
    for name in _NEUTRAL.keys() & kind.model_fields.keys():
        value, neutral = getattr(body, name), _NEUTRAL[name]
        asks = kind.model_fields[name].annotation is Any and value is not None
        if asks and not any(type(value) is type(each) and value == each for each in neutral):
            raise ApiError(400, f"{name}: not offered here; must be null or {neutral[0]!r}", name, "unsupported")
    if isinstance(body, Body):
        if len(body.stops) > 4 or not all(body.stops):
            raise ApiError(400, "stop: must be a text or up to four, none empty", "stop")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options: must be given together with stream = true", "stream_options")
    return body


def _error(kind: type[AnyBody], error: pydantic.ValidationError) -> ApiError:
    """The first thing that is wrong, in one line without the value: it may be text of the user, or long."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON ({first['msg'].removeprefix('Invalid JSON: ')})", code="bad_json")
    name = str(first["loc"][0])[:64] if first["loc"] else None
    if name is None:
        return ApiError(400, "the body must be a JSON object")
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        allowed = ", ".join(kind.model_fields)
        return ApiError(400, f"{name}: no such field; the fields are {allowed}", name, "unknown_field")
    place = ".".join(str(part)[:64] for part in first["loc"])
    words = first["msg"].replace("Input should be", "must be", 1).replace("Input should have", "must have", 1)
    return ApiError(400, f"{place}: {words}", name)
