"""The family "plaid": diffusion on learned token embeddings, with Cola's prior and sampler (11.17-11.19, Table 1)."""

import dataclasses
import functools

from cola_jax import likelihood, sampling
from cola_jax.config import Config, OptimizerConfig
from cola_jax.families import cola
from cola_jax.families.interface import Family, Group, Stage, make_init
from cola_jax.fields import like, require
from cola_jax.likelihood import estimators, requests
from cola_jax.models import dit_config
from cola_jax.models import plaid as models
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.plaid import Plaid
from cola_jax.objectives import plaid as objective
from cola_jax.objectives.plaid import PlaidStageConfig


@dataclasses.dataclass(frozen=True)
class PlaidConfig(Config):
    """A run of Plaid."""

    family: str = like(Config, "family", "plaid")
    sample: cola.SampleConfig = cola.SampleConfig(
        steps=32, solver="exponential", churn=1.0, guidance_scale=1.0, max_new_tokens=64
    )
    dit: DiTConfig = DiTConfig(prediction="mixture", prediction_variance=0.1, block_size=64)
    stage1: PlaidStageConfig = PlaidStageConfig()
    optimizer1: OptimizerConfig = OptimizerConfig()

    def check_together(self, prefix: str) -> None:
        super().check_together(prefix)
        dit, length = self.dit, self.data.sequence_length
        require(dit.prediction == "mixture", f"{prefix}dit.prediction", dit.prediction, "'mixture' (over the tokens)")
        need = f"data.sequence_length = {length}: one block is the whole text"
        require(dit.block_size == length, f"{prefix}dit.block_size", dit.block_size, need)
        known = dit.prediction_variance is not None
        require(known, f"{prefix}dit.prediction_variance", None, "a number: sigma_0^2 of the embeddings")
        require(dit.path == self.stage1.path, f"{prefix}dit.path", dit.path, f"stage1.path = {self.stage1.path!r}")
        guided = self.sample.guidance_scale != 1.0
        require(
            not guided, f"{prefix}sample.guidance_scale", self.sample.guidance_scale, "1: no block is before another"
        )


def resolve(config: PlaidConfig, vocab_size: int) -> PlaidConfig:
    """The config with the tokenizer's vocabulary where it leaves it open.

    Raises:
      UserError: the model's vocabulary is smaller than the tokenizer's.
    """
    codes = config.dit.num_codes or vocab_size
    require(codes >= vocab_size, "config.dit.num_codes", codes, f"at least the tokenizer's {vocab_size}")
    return dataclasses.replace(config, dit=dataclasses.replace(config.dit, num_codes=codes))


def make_model(config: PlaidConfig) -> Plaid:
    """The network of a resolved config."""
    return models.create(config.dit, config.train.compute_dtype)


def make_stages(model: Plaid | None, config: PlaidConfig) -> tuple[Stage]:
    """The one stage: the variational bound."""

    def terms(params, batch, keys, frozen):
        del frozen  # there is nothing
        return objective.terms(model, config.stage1, params, batch, keys)

    return (
        Stage(
            name="stage1",
            steps=config.stage1.steps,
            optimizer=config.optimizer1,
            optimizer_field="optimizer1",
            groups=("dit",),
            trained={"dit": Group()},
            frozen={},
            terms=terms,
            flops_per_token=flops_per_token(config),
        ),
    )


def flops_per_token(config: PlaidConfig) -> float:
    """Model FLOPs of a training step per token, as `families.cola.flops_per_token` counts them."""
    forward = dit_config.forward_flops(config.dit, config.data.sequence_length, 1, 2, clean=False)
    if config.dit.self_conditioning:
        forward *= 4 / 3  # the pass before, forward only
    return 3 * forward


def default_settings(config: PlaidConfig, tokenizer) -> sampling.Settings:
    """How the run's config wants text to be generated."""
    return cola.sampling_settings(config, tokenizer, config.stage1.path)


FAMILY = Family(
    name="plaid",
    config=PlaidConfig,
    resolve=resolve,
    model=make_model,
    init=make_init,
    stages=make_stages,
    settings=sampling.Settings,
    default_settings=default_settings,
    generate=sampling.generate,
    generate_batches=sampling.generate_batches,
    stream=sampling.stream,
    score_settings=likelihood.Settings,
    score=cola.score,
    scorer=requests.Scorer,
    check_scorable=estimators.check_model,
    generation_flops=functools.partial(cola.prior_flops, patch_size=1),
    infill=sampling.infill,
    edit=sampling.edit,
    reconstruct=cola.reconstruct,
    engine=cola.ENGINE,
)
