"""Conversations as prompts: a template in Jinja's language, as tokenizers of chat models bring it."""

import json
from pathlib import Path

import jinja2
import jinja2.sandbox

from cola_jax.serving.bodies import Message
from cola_jax.serving.errors import ApiError
from cola_jax.types import UserError

CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"


class ChatTemplate:
    """Renders conversations."""

    def __init__(self, source: str, name: str = "chat template", **tokens: str):
        """Args:
          source: the template; it sees ``messages``, ``add_generation_prompt`` and ``tokens``.
          name: of the file, for errors.
          tokens: texts such as ``eos_token``.

        Raises:
          UserError: it is not a template.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._tokens = tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{name}: must be a Jinja template ({error})") from error

    def render(self, messages: list[Message]) -> str:
        """The prompt that the answer continues.

        Raises:
          ApiError: the template refuses these messages.
        """
        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, f"messages: the chat template refuses them ({error})", "messages") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def load(directory: Path, file: str | None) -> ChatTemplate | None:
    """The template of a file, or of a checkpoint's directory; None where it has none.

    Raises:
      UserError: the file cannot be read, or is not a template.
    """
    if file is not None:
        try:
            return ChatTemplate(Path(file).read_text(encoding="utf-8"), f"--chat_template = {file}")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat_template = {file}: must be a UTF-8 file with a Jinja template") from error
    if (directory / FILE).exists():
        return load(directory, str(directory / FILE))
    if not (directory / CONFIG).exists():
        return None
    try:
        found = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        source = found.get("chat_template")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{directory / CONFIG}: must be a JSON object") from error
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    texts = {name: _token(found.get(name)) for name in names if found.get(name) is not None}
    return ChatTemplate(source, str(directory / CONFIG), **texts) if isinstance(source, str) else None


def _token(value) -> str:
    """A token as such files write it: its text, or an object that holds it."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)
