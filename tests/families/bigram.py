"""A whole family in one file, as another package could bring it: the next token depends on the one before it alone."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cola_jax import config as configs
from cola_jax import rng
from cola_jax.config import Config, OptimizerConfig
from cola_jax.families.interface import Family, Group, Piece, Scores, Stage
from cola_jax.fields import check, like, setting
from cola_jax.types import Term

NAME = "bigram"


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """The family's one group."""

    vocab_size: int = setting(0, "V; 0: the tokenizer's", at_least=0)
    steps: int = setting(10, "updates", at_least=0)
    learning_rate: float = setting(0.1, "constant but for the decay", above=0)


@dataclasses.dataclass(frozen=True)
class BigramConfig(Config):
    family: str = like(Config, "family", NAME)
    sample: configs.SampleConfig = configs.SampleConfig(temperature=1.0)
    table: TableConfig = TableConfig()


@dataclasses.dataclass(frozen=True)
class Settings:
    max_new_tokens: int = setting(16, "budget", at_least=1)
    temperature: float = setting(1.0, "of the draws", above=0)
    eos_id: int | None = setting(None, "end of text", flag=False)

    def validate(self) -> None:
        check(self, "sampling ")


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    def validate(self) -> None:
        pass


class Table(nn.Module):
    vocab: int

    @nn.compact
    def __call__(self, before):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("embed", "vocab"))
        return jax.nn.log_softmax(self.param("logits", init, (self.vocab + 1, self.vocab))[before])


class Bigram(nn.Module):
    """Before the first token of a document stands the id V."""

    vocab: int

    def setup(self):
        self.table = Table(self.vocab)

    def __call__(self, before):
        return self.table(before)

    def log_probs(self, tokens, segment_ids):
        """[B, T], of each token given the one before it in its document."""
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        before = jnp.where(same, tokens[:, :-1], self.vocab)
        before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=self.vocab)
        return jnp.take_along_axis(self.table(before), tokens[..., None], axis=-1)[..., 0]


def resolve(config, vocab_size):
    return dataclasses.replace(config, table=dataclasses.replace(config.table, vocab_size=vocab_size))


def stages(model, config):
    def terms(params, batch, keys, frozen):
        assert not frozen
        found = model.apply(params, batch["tokens"], batch["segment_ids"], method="log_probs")
        real = (batch["segment_ids"] > 0).astype(jnp.float32)
        return {"next_token": Term(-jnp.sum(found * real, axis=1), jnp.sum(real, axis=1), 1.0)}

    table = config.table
    return (
        Stage(
            name="stage1",
            steps=table.steps,
            optimizer=OptimizerConfig(learning_rate=table.learning_rate, warmup_steps=0),
            optimizer_field="table",
            groups=("table",),
            trained={"table": Group()},
            frozen={},
            terms=terms,
            flops_per_token=6.0 * table.vocab_size,
        ),
    )


class Generation(NamedTuple):
    tokens: np.ndarray
    lengths: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _next(model, params, before, keys, position, temperature):
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(keys, model.apply(params, before) / temperature)


def stream(model, params, prompts, settings, key=None, sample_ids=None) -> Iterator[Piece]:
    ids = jnp.arange(len(prompts)) if sample_ids is None else jnp.asarray(sample_ids)
    keys = rng.fold_in(key, ids)
    before = jnp.array([prompt[-1] if prompt else model.vocab for prompt in prompts])
    going = np.ones(len(prompts), bool)
    for position in range(settings.max_new_tokens):
        before = _next(model, params, before, keys, position, settings.temperature)
        going &= np.asarray(before) != settings.eos_id
        yield Piece([[int(token)] if go else [] for token, go in zip(before, going, strict=True)])
        if not going.any():
            return


def generate(model, params, prompts, settings, key=None, sample_ids=None, mesh=None) -> Generation:
    rows = [[] for _ in prompts]
    for piece in stream(model, params, prompts, settings, key, sample_ids):
        for row, new in zip(rows, piece.tokens, strict=True):
            row += new
    tokens = np.zeros((len(rows), settings.max_new_tokens), np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = row
    return Generation(tokens, np.array([len(row) for row in rows]))


def generate_batches(model, params, prompts, settings, key=None, batch_size=64):
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        out = generate(model, params, chunk, settings, key, range(start, start + len(chunk)))
        for row, (tokens, length) in enumerate(zip(out.tokens, out.lengths, strict=True)):
            yield start + row, tokens[:length].tolist()


def score(model, params, tokens, segment_ids, settings, key, prefix=None) -> Scores:
    found = np.asarray(model.apply(params, tokens, segment_ids, method="log_probs"), np.float64)
    scored = np.asarray(segment_ids) > 0
    if prefix is not None:
        scored &= np.arange(tokens.shape[1])[None] >= np.asarray(prefix)[:, None]
    return Scores((found * scored).sum(axis=1), np.zeros(len(tokens)), "exact", scored.sum(axis=1))


FAMILY = Family(
    name=NAME,
    config=BigramConfig,
    resolve=resolve,
    model=lambda config: Bigram(config.table.vocab_size),
    init=lambda model, config: lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32)),
    stages=stages,
    settings=Settings,
    default_settings=lambda config, tokenizer: Settings(
        config.sample.max_new_tokens, config.sample.temperature, tokenizer.eos_id
    ),
    generate=generate,
    generate_batches=generate_batches,
    stream=stream,
    score_settings=ScoreSettings,
    score=score,
    scorer=lambda *arguments: None,
    check_scorable=lambda model, params: None,
    generation_flops=lambda config, settings: 0.0,
    bound="exact",
)
