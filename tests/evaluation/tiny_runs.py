"""Runs of both families that are small enough to compile in seconds, with a token a byte."""

import json

from models import tiny_autoregressive, tiny_models

from cola_jax.config import DataConfig
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.families import autoregressive, cola
from cola_jax.runs import Run
from cola_jax.sampling import Settings

CONTEXT, ALIGN = 32, 4
DATA = DataConfig(sequence_length=CONTEXT, align=ALIGN, tokenizer="bytes")


def create(family: str, patch: int = 1) -> Run:
    """A run with random weights."""
    tokenizer = ByteTokenizer()
    if family == "autoregressive":
        model, params = tiny_autoregressive.create(vocab_size=tokenizer.vocab_size)
        config = autoregressive.AutoregressiveConfig(data=DATA, transformer=model.config)
        return Run(autoregressive.FAMILY, model, params, tokenizer, config, 3)
    vae = {"vocab_size": tokenizer.vocab_size, "patch_size": patch}
    model, params = tiny_models.create(vae=vae)
    config = cola.ColaConfig(data=DATA, vae=model.vae_config, dit=model.dit_config)
    return Run(cola.FAMILY, model, params, tokenizer, config, 3)


def generation(run: Run, **changes):
    """Quick settings of its generation, with which something is drawn."""
    if run.family.name == "cola":
        return Settings(steps=1, guidance_scale=1.0, context=CONTEXT, eos_id=256, **changes)
    return run.settings.__class__(context=CONTEXT, eos_id=256, temperature=1.0, **changes)


def scoring(run: Run):
    """Quick settings of its likelihood."""
    settings = run.family.score_settings
    return settings(samples=2, solver="euler", steps=1) if run.family.name == "cola" else settings()


def write(path, *rows):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
