"""The family "autoregressive": a LLaMA-style decoder, trained by next-token prediction in one stage (SPEC 7)."""

import dataclasses

from cola_jax import config as configs
from cola_jax.config import Config, OptimizerConfig
from cola_jax.families import token_models
from cola_jax.families.interface import Engine, Family, Scores, Stage, make_init
from cola_jax.fields import like
from cola_jax.likelihood import exact
from cola_jax.likelihood.row_scorer import RowScorer
from cola_jax.models import autoregressive as models
from cola_jax.models import transformer
from cola_jax.models.autoregressive import Autoregressive
from cola_jax.models.transformer import TransformerConfig
from cola_jax.objectives import next_token
from cola_jax.objectives.next_token import NextTokenConfig
from cola_jax.sampling import autoregressive as sampling
from cola_jax.sampling import token_engine
from cola_jax.sampling.choose import Choice
from cola_jax.types import Key, Params


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig(Config):
    """A run of the autoregressive baseline."""

    family: str = like(Config, "family", "autoregressive")
    sample: configs.SampleConfig = configs.SampleConfig(temperature=1.0)
    transformer: TransformerConfig = TransformerConfig()
    stage1: NextTokenConfig = NextTokenConfig()
    optimizer1: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """How to score: there is nothing to choose, log p(x) is exact."""

    def validate(self) -> None:
        """There is nothing to check."""


def make_model(config: AutoregressiveConfig) -> Autoregressive:
    """The network of a resolved config."""
    return models.create(config.transformer, config.train.compute_dtype)


def make_stages(model: Autoregressive | None, config: AutoregressiveConfig) -> tuple[Stage]:
    """The one stage: cross-entropy of the next token."""

    def terms(params, batch, keys, frozen):
        del keys, frozen  # nothing is drawn, nothing is frozen
        return next_token.terms(model, params, batch)

    return (token_models.only_stage(config, terms, causal=True),)


def default_settings(config: AutoregressiveConfig, tokenizer) -> sampling.Settings:
    """How the run's config wants text to be generated."""
    sample = config.sample
    return sampling.Settings(
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        repetition_penalty=sample.repetition_penalty,
        eos_id=tokenizer.eos_id,
        context=config.data.sequence_length,
    )


def generation_flops(config: AutoregressiveConfig, settings: sampling.Settings) -> float:
    """FLOPs of the multiplications by weights for each new token: every weight once."""
    del settings
    return transformer.forward_flops(config.transformer, 0)


def score(model: Autoregressive, params: Params, tokens, segment_ids, settings, key: Key, prefix=None) -> Scores:
    """Exact log p(x) of each row, or of its response given its prefix."""
    del settings, key
    found = exact.log_likelihood(model, params, tokens, segment_ids, prefix)
    return Scores(found.log_prob, 0.0 * found.log_prob, "exact", found.tokens)


def make_scorer(model, params, settings, key, context: int, batch_size: int, mesh) -> RowScorer:
    """The scorer of JSON lines."""
    del settings, key, context
    return exact.scorer(model, params, batch_size, mesh)


FAMILY = Family(
    name="autoregressive",
    config=AutoregressiveConfig,
    resolve=token_models.resolve,
    model=make_model,
    init=make_init,
    stages=make_stages,
    settings=sampling.Settings,
    default_settings=default_settings,
    generate=sampling.generate,
    generate_batches=sampling.generate_batches,
    stream=sampling.stream,
    score_settings=ScoreSettings,
    score=score,
    scorer=make_scorer,
    check_scorable=lambda model, params: None,
    generation_flops=generation_flops,
    bound="exact",
    engine=Engine(
        unit=lambda model, settings: token_engine.UNIT,
        prepare=token_engine.prepare,
        start=token_engine.start,
        rename=token_engine.rename,
        advance=token_engine.advance,
        own=Choice._fields,
        chunk=lambda program: program.chunk,
        log_probs=token_engine.LIKELIEST,
    ),
)
