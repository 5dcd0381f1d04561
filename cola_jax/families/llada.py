"""The family "llada": masked diffusion of tokens by a bidirectional transformer, in one stage (SPEC 7, 11.13-11.16)."""

import dataclasses

from cola_jax import config as configs
from cola_jax.config import Config, OptimizerConfig
from cola_jax.families import token_models
from cola_jax.families.interface import Family, Scores, Stage, make_init
from cola_jax.fields import like
from cola_jax.likelihood import masked
from cola_jax.likelihood.row_scorer import RowScorer
from cola_jax.models import llada as models
from cola_jax.models import transformer
from cola_jax.models.llada import LLaDA
from cola_jax.models.transformer import TransformerConfig
from cola_jax.objectives import masked_diffusion
from cola_jax.objectives.masked_diffusion import MaskedDiffusionConfig
from cola_jax.sampling import llada as sampling
from cola_jax.types import Key, Params


@dataclasses.dataclass(frozen=True)
class SampleConfig(configs.SampleConfig):
    """How a run of this family generates its samples and its closing report."""

    steps: int = like(sampling.Settings, "steps")
    block_length: int = like(sampling.Settings, "block_length")
    remasking: str = like(sampling.Settings, "remasking")
    guidance_scale: float = like(sampling.Settings, "guidance_scale")


@dataclasses.dataclass(frozen=True)
class LLaDAConfig(Config):
    """A run of LLaDA."""

    family: str = like(Config, "family", "llada")
    sample: SampleConfig = SampleConfig(temperature=1.0, remasking="random")
    transformer: TransformerConfig = TransformerConfig()
    stage1: MaskedDiffusionConfig = MaskedDiffusionConfig()
    optimizer1: OptimizerConfig = OptimizerConfig()


def make_model(config: LLaDAConfig) -> LLaDA:
    """The network of a resolved config."""
    return models.create(config.transformer, config.train.compute_dtype)


def make_stages(model: LLaDA | None, config: LLaDAConfig) -> tuple[Stage]:
    """The one stage: cross-entropy of masked tokens."""

    def terms(params, batch, keys, frozen):
        del frozen  # there is nothing
        return masked_diffusion.terms(model, config.stage1, params, batch, keys)

    return (token_models.only_stage(config, terms, causal=False),)


def default_settings(config: LLaDAConfig, tokenizer) -> sampling.Settings:
    """How the run's config wants text to be generated."""
    sample = config.sample
    return sampling.Settings(
        max_new_tokens=sample.max_new_tokens,
        steps=sample.steps,
        block_length=sample.block_length,
        remasking=sample.remasking,
        temperature=sample.temperature,
        repetition_penalty=sample.repetition_penalty,
        guidance_scale=sample.guidance_scale,
        eos_id=tokenizer.eos_id,
        context=config.data.sequence_length,
    )


def generation_flops(config: LLaDAConfig, settings: sampling.Settings) -> float:
    """FLOPs of the multiplications by weights for each new token, of a text without a prompt.

    Every pass computes all positions, and the logits of those of a block; twice where it is guided.
    """
    head = 2.0 * config.transformer.dim * config.transformer.vocab_size
    layers = transformer.forward_flops(config.transformer, 0) - head
    guided = 1 if settings.guidance_scale == 1.0 else 2
    passes = guided * settings.blocks * len(settings.kept)
    return passes * (layers + head * settings.block / settings.max_new_tokens)


def score(model: LLaDA, params: Params, tokens, segment_ids, settings, key: Key, prefix=None) -> Scores:
    """A lower bound on log p(x) of each row, or of its response given its prefix."""
    found = masked.log_likelihood(model, params, tokens, segment_ids, settings, key, prefix)
    return Scores(found.log_prob, found.error, "lower", found.tokens)


def make_scorer(model, params, settings, key, context: int, batch_size: int, mesh) -> RowScorer:
    """The scorer of JSON lines."""
    del context
    return masked.scorer(model, params, settings, key, batch_size, mesh)


FAMILY = Family(
    name="llada",
    config=LLaDAConfig,
    resolve=token_models.resolve,
    model=make_model,
    init=make_init,
    stages=make_stages,
    settings=sampling.Settings,
    default_settings=default_settings,
    generate=sampling.generate,
    generate_batches=sampling.generate_batches,
    stream=sampling.stream,
    score_settings=masked.Settings,
    score=score,
    scorer=make_scorer,
    check_scorable=lambda model, params: None,
    generation_flops=generation_flops,
    infill=sampling.infill,
)
