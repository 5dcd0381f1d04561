"""Tiny models with a tokenizer of letters, and a server of them in a thread."""

import asyncio
import contextlib
import dataclasses
import functools
import threading

import flax.linen as nn
import jax
from families import bigram
from models import tiny_autoregressive, tiny_models, tiny_unified

from cola_jax.config import DataConfig
from cola_jax.families import autoregressive, cola, unified
from cola_jax.runs import Run
from cola_jax.sampling.images import ImageSettings
from cola_jax.serving import server, start
from cola_jax.serving.settings import ServeSettings

CONTEXT = 28
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
LIMITS = ServeSettings(batch_sizes=(4,), queue=8, max_sequences=6, request_seconds=60.0, drain_seconds=20.0)


class Letters:
    """An id for each letter; a letter that has none is an "a"."""

    name, fingerprint = "letters", "letters"
    eos_id, pad_id, vocab_size = len(LETTERS), len(LETTERS) + 1, tiny_models.VOCAB

    def encode(self, text: str) -> list[int]:
        return [max(LETTERS.find(letter), 0) for letter in text]

    def decode(self, ids) -> str:
        return "".join(LETTERS[i] for i in map(int, ids) if i < len(LETTERS))


def _run(family, config, model, params) -> Run:
    params = jax.device_put(params, jax.devices()[0])  # as those of a checkpoint are
    return Run(family, model, params, Letters(), config, 7)


@functools.cache
def run(name: str) -> Run:
    """The same run for the same name: "cola", "autoregressive", "bigram" (which has no engine), "unified"."""
    data = DataConfig(sequence_length=CONTEXT)
    if name == "unified":
        return _unified()
    if name == "cola":
        model, params = tiny_models.create({"patch_size": 2, "attention": "block_causal"}, {"no_history_vector": True})
        sample = cola.SampleConfig(steps=2, guidance_scale=3.0, temperature=0.7, max_new_tokens=12)
        config = cola.ColaConfig(data=data, vae=model.vae_config, dit=model.dit_config, sample=sample)
        return _run(cola.FAMILY, config, model, params)
    if name == "autoregressive":
        model, params = tiny_autoregressive.create()
        config = autoregressive.AutoregressiveConfig(data=data, transformer=model.config)
        return _run(autoregressive.FAMILY, config, model, params)
    config = bigram.BigramConfig(data=data, table=bigram.TableConfig(vocab_size=tiny_models.VOCAB))
    model = bigram.FAMILY.model(config)
    params = nn.unbox(bigram.FAMILY.init(model, config)(jax.random.key(0)))
    params = jax.tree.map(lambda x: 3.0 * jax.random.normal(jax.random.key(1), x.shape), params)
    return _run(bigram.FAMILY, config, model, params)


def _unified() -> Run:
    model, params = tiny_unified.make(vocab_size=tiny_models.VOCAB)
    stream = params["params"]["image_dit"]
    louder = stream | {"in_layer": jax.tree.map(lambda x: 10 * x, stream["in_layer"])}  # so that texts depend on it
    params = {"params": params["params"] | {"image_dit": louder}}
    instructions = {"instruction_length": 12, "instructions": ("what is it",)}
    data = DataConfig(sequence_length=CONTEXT, image_size=tiny_unified.SIDE, **instructions)
    config = unified.UnifiedConfig(
        data=data,
        vae=model.vae_config,
        dit=model.dit_config,
        image_vae=model.image_vae_config,
        image_dit=model.image_dit_config,
        sample=cola.SampleConfig(steps=2, guidance_scale=3.0, max_new_tokens=12),
        image_sample=ImageSettings(steps=3, guidance_scale=2.0),
    )
    return _run(unified.FAMILY, config, model, params)


def settings(found: Run, **changes):
    """Those of a server of the run, with changes."""
    known = {field.name for field in dataclasses.fields(found.settings)}
    fixed = {"context": CONTEXT} | changes
    return dataclasses.replace(found.settings, **{name: value for name, value in fixed.items() if name in known})


def asked(found: Run, limits: dict | None = None, **changes) -> start.Asked:
    """What a server of a tiny run is started with."""
    name, limited = f"tiny-{found.family.name}", dataclasses.replace(LIMITS, **(limits or {}))
    return start.Asked(found.settings, limited, name)._replace(**changes)


class Serving:
    """A server in a thread.

    Attributes:
      url: its address.
      name: of the model.
      started: its parts.
      server: uvicorn's, `cola_jax.serving.server.Server`.
    """

    def __init__(self, found: Run, **changes):
        self._asked, self._run = asked(found, **changes), found
        self.name = self._asked.name
        self._sock = server.bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._ready, self.error = threading.Event(), None
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        async def main():
            self.started = start.start(self._run, self._asked, lambda line: None)
            self.server = server.Server(self.started.app, self.started.batcher, self._asked.limits.drain_seconds)
            self._ready.set()
            try:
                await self.server.serve(sockets=[self._sock])
            finally:
                self.started.batcher.stop()

        try:
            asyncio.run(main())
        except BaseException as error:
            self.error = error
            self._ready.set()

    def __enter__(self) -> "Serving":
        self._thread.start()
        self._ready.wait()
        if self.error is not None:
            raise self.error
        while not self.server.started:
            pass
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self._thread.join()

    def value(self, name: str, **labels) -> float:
        """A metric now."""
        return self.started.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def serving(name: str, **changes):
    with Serving(run(name), **changes) as found:
        yield found
