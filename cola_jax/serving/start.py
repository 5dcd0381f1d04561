"""From a checkpoint to an application."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from starlette.applications import Starlette

from cola_jax.data.preparation import records
from cola_jax.families.interface import Pictures
from cola_jax.runs import Run
from cola_jax.serving import app, chat
from cola_jax.serving.app import Service
from cola_jax.serving.batcher import Batcher, Updates
from cola_jax.serving.desk import Desk
from cola_jax.serving.lane import Lane
from cola_jax.serving.metrics import Metrics
from cola_jax.serving.offers import Offers
from cola_jax.serving.settings import ServeSettings
from cola_jax.types import UserError


class Asked(NamedTuple):
    """What a server is started with, besides the run.

    Attributes:
      settings: of generation, for requests that ask for nothing else.
      limits: see `ServeSettings`.
      name: of the model, for clients.
      offers: other settings that requests may ask for (`Offers`).
      directory: of the checkpoint, which may have a chat template.
      chat_template: a file with one; None: that of the directory.
      api_key: that requests must bear; None: none.
      log_texts: whether prompts stand in the log.
    """

    settings: Any
    limits: ServeSettings
    name: str
    offers: Sequence[str] = ()
    directory: Path = Path()
    chat_template: str | None = None
    api_key: str | None = None
    log_texts: bool = False


class Started(NamedTuple):
    """A server that only has to listen."""

    app: Starlette
    batcher: Batcher
    metrics: Metrics


def start(run: Run, asked: Asked, log: Callable[[str], None] = print) -> Started:
    """Compiles all that service needs, and starts the batcher; to be called in the loop that will serve.

    Raises:
      UserError: something of ``asked`` that this model cannot do.
    """
    limits, metrics, loop = asked.limits, Metrics(), asyncio.get_running_loop()
    template = chat.load(asked.directory, asked.chat_template)
    offers = Offers(run, asked.settings, asked.offers, limits)
    lanes = []
    for settings, words in zip(offers.settings, offers.described(), strict=True):
        log(f"compiling for batches of {', '.join(map(str, limits.batch_sizes))}: {words}")
        program = offers.engine.prepare(run.model, run.params, settings)
        lanes.append(Lane(offers.engine, program, limits.batch_sizes, limits.prefixes))
        _warm(lanes[-1], limits, offers.context)
    if offers.pictures is not None:
        lanes.append(_image_lane(run, offers.pictures, limits, log))
        _warm(lanes[-1], limits, offers.context)

    def deliver(updates: Updates) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(_hand_out, updates)

    batcher = Batcher(lanes, limits.queue, deliver, metrics)
    desk = Desk(asked.name, run.tokenizer, offers, limits, template)
    facts = facts_of(run, offers, template is not None)
    service = Service(desk, batcher, metrics, limits, facts, asked.api_key, asked.log_texts)
    return Started(app.create(service), batcher, metrics)


def _image_lane(run: Run, pictures: Pictures, limits: ServeSettings, log: Callable[[str], None]) -> Lane:
    """The lane behind those of the offers.

    Raises:
      UserError: images cannot be read or written.
    """
    records.require("PIL", "images", f"serving a run of family {run.family.name!r}")
    log(f"compiling for batches of {', '.join(map(str, limits.batch_sizes))}: images")
    program = pictures.images.prepare(run.model, run.params, pictures.settings)
    return Lane(pictures.images, program, limits.batch_sizes, prefixes=0)


def _warm(lane: Lane, limits: ServeSettings, context: int) -> None:
    """Compiles what a lane needs.

    Raises:
      UserError: the device has no memory for its batches.
    """
    try:
        lane.warm()
    except jax.errors.JaxRuntimeError as error:
        if "out of memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = ",".join(map(str, limits.batch_sizes))
        what = f"--batch_sizes = {sizes}, --context = {context}"
        raise UserError(f"{what}: too much for the memory of this device; must be less") from error


def _hand_out(updates: Updates) -> None:
    for ticket, update in updates:
        if not ticket.cancelled:
            ticket.sink(update)


def facts_of(run: Run, offers: Offers, chats: bool) -> dict:
    """What GET /v1/models tells of the model besides its name."""
    base, pictures = offers.settings[0], offers.pictures
    return {
        "family": run.family.name,
        "step": run.step,
        "context": offers.context,
        "max_tokens": offers.max_tokens,
        "unit": offers.engine.unit(run.model, base),
        "batching": "whole batches" if run.family.engine is None else "continuous",
        "infills": offers.engine.fills(base),
        "log_probs": offers.engine.log_probs,
        "chat": chats,
        "images": None if pictures is None else {"size": pictures.size, **_told(pictures.settings)},
        "defaults": _told(base),
        "offers": offers.described(),
    }


def _told(settings: Any) -> dict:
    """Settings that are single values, by name."""
    return {name: v for name, v in dataclasses.asdict(settings).items() if isinstance(v, (int, float, str, bool))}
