"""The family "cola": a Text VAE (stage 1) and a block-causal flow prior over its latents (stage 2).

All that the trainer and the binaries know of "vae" and "dit" is here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cola_jax import config as configs
from cola_jax import likelihood, sampling
from cola_jax.config import Config, DataConfig, OptimizerConfig
from cola_jax.families import strategies
from cola_jax.families.interface import Engine, Family, Group, Scores, Stage, TermsFn, make_init
from cola_jax.fields import like, require, setting
from cola_jax.likelihood import estimators, requests
from cola_jax.models import cola, dit_config, text_vae
from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import VAEConfig
from cola_jax.objectives import common, stage1, stage2
from cola_jax.objectives.stage1 import Stage1Config
from cola_jax.objectives.stage2 import Stage2Config
from cola_jax.sampling import block_engine
from cola_jax.sampling.choose import Choice
from cola_jax.sampling.settings import check_churn
from cola_jax.types import Key, Params

_RELEASED_CONTEXT = 512  # tokens that the released model was trained on


@dataclasses.dataclass(frozen=True)
class SampleConfig(configs.SampleConfig):
    """How a run of this family generates its samples and its closing report."""

    steps: int = like(sampling.Settings, "steps")
    solver: str = like(sampling.Settings, "solver")
    churn: float = like(sampling.Settings, "churn")
    guidance_scale: float = like(sampling.Settings, "guidance_scale", 2.0)
    pad_prompts: bool = setting(
        False, "fill a prompt's last block with padding that the model sees, as released code does"
    )

    def check_together(self, prefix: str) -> None:
        check_churn(prefix, self.churn, self.solver)


@dataclasses.dataclass(frozen=True)
class ColaConfig(Config):
    """A run of Cola DLM."""

    family: str = like(Config, "family", "cola")
    sample: SampleConfig = SampleConfig()
    vae: VAEConfig = VAEConfig()
    dit: DiTConfig = DiTConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    optimizer1: OptimizerConfig = OptimizerConfig()
    optimizer2: OptimizerConfig = OptimizerConfig()

    def check_together(self, prefix: str) -> None:
        super().check_together(prefix)
        vae, dit, data = self.vae, self.dit, self.data
        need = f"vae.latent_dim = {vae.latent_dim}"
        require(dit.latent_dim == vae.latent_dim, f"{prefix}dit.latent_dim", dit.latent_dim, need)
        block = dit.block_size * vae.patch_size
        need = f"a multiple of dit.block_size * vae.patch_size = {block}"
        require(data.sequence_length % block == 0, f"{prefix}data.sequence_length", data.sequence_length, need)
        fits = vae.attention == "causal" or dit.block_size % vae.block_size == 0
        need = f"a divisor of dit.block_size = {dit.block_size}"
        require(fits, f"{prefix}vae.block_size", vae.block_size, need)
        need = f"a multiple of vae.patch_size = {vae.patch_size}"
        require(data.align % vae.patch_size == 0, f"{prefix}data.align", data.align, need)
        ok = not self.stage2.history_dropout or dit.no_history_vector
        need = "True where stage2.history_dropout > 0 (a dropped history must be distinguished from a first block)"
        require(ok, f"{prefix}dit.no_history_vector", False, need)
        if dit.prediction != "velocity":
            require(dit.path == self.stage2.path, f"{prefix}dit.path", dit.path, f"stage2.path = {self.stage2.path!r}")
            known = dit.prediction_variance is not None or vae.logsnr is not None
            need = f"a number where dit.prediction = {dit.prediction!r} and vae.logsnr is not fixed"
            require(known, f"{prefix}dit.prediction_variance", None, need)
        need = "0 unless dit.prediction = 'mixture' has a code for each token (vae.patch_size = 1, dit.num_codes = 0)"
        require(
            _codes_are_tokens(vae, dit) or not self.stage2.code_weight,
            f"{prefix}stage2.code_weight",
            self.stage2.code_weight,
            need,
        )
        self._check_strategy(prefix)

    def _check_strategy(self, prefix: str) -> None:
        """Where the VAE of stage 2 comes from."""
        strategy, first, start = self.stage2.strategy, self.stage1.steps, self.train.init_from
        pretrained = first > 0 or ("vae" in start if isinstance(start, dict) else bool(start))
        if self.stage2.steps and strategy in ("joint", "fix_vae"):
            need = f"at least 1 (stage2.strategy = {strategy!r} starts from stage 1)"
            require(pretrained, f"{prefix}stage1.steps", 0, need)
        if strategy == "scratch":
            require(not first, f"{prefix}stage1.steps", first, "0 (stage2.strategy = 'scratch')")
            require(not start, f"{prefix}train.init_from", start, "'' (stage2.strategy = 'scratch')")
        if not pretrained and strategy in ("scratch", "interval"):
            weight = self.stage2.reference_weight
            need = "0 where there is no stage 1 to refer to"
            require(weight == 0, f"{prefix}stage2.reference_weight", weight, need)


def _codes_are_tokens(vae: VAEConfig, dit: DiTConfig) -> bool:
    """Whether the prior is a mixture with a code for each token."""
    return dit.prediction == "mixture" and vae.patch_size == 1 and dit.num_codes in (0, vae.vocab_size)


def resolve(config: ColaConfig, vocab_size: int) -> ColaConfig:
    """The config with what it leaves open: the tokenizer's vocabulary, the variance that follows from the log-SNR."""
    vae, dit = config.vae, config.dit
    if not vae.vocab_size:
        vae = dataclasses.replace(vae, vocab_size=vocab_size)
    if dit.prediction != "velocity" and dit.prediction_variance is None:
        dit = dataclasses.replace(dit, prediction_variance=vae.scale**2 * math.exp(-vae.logsnr))
    if dit.prediction == "mixture" and not dit.num_codes:
        dit = dataclasses.replace(dit, num_codes=vae.vocab_size)
    return dataclasses.replace(config, vae=vae, dit=dit)


def released_config(model: ColaDLM, eos_id: int = -1, pad_id: int = -1) -> ColaConfig:
    """The config of a run that a released model could have come from: its networks, and how it generates by default.

    Args:
      model: from `release.load`.
      eos_id, pad_id: of the tokenizer; -1: found in its file.
    """
    patch = model.vae_config.patch_size
    per_block = model.dit_config.block_size * patch
    config = ColaConfig(
        data=DataConfig(
            tokenizer="huggingface",
            eos_id=eos_id,
            pad_id=pad_id,
            align=patch,
            sequence_length=max(1, _RELEASED_CONTEXT // per_block) * per_block,
        ),
        vae=model.vae_config,
        dit=model.dit_config,
        sample=SampleConfig(steps=16, guidance_scale=7.0, max_new_tokens=32, pad_prompts=True),
    )
    config.validate()
    return config


def make_model(config: ColaConfig) -> ColaDLM:
    """The networks of a resolved config."""
    return cola.create(config.vae, config.dit, config.train.compute_dtype)


def make_stages(model: ColaDLM | None, config: ColaConfig) -> tuple[Stage, Stage]:
    """Stage 1, the VAE alone (3.16); stage 2, the prior with the VAE frozen or trained along (3.18)."""

    def first(params, batch, keys, frozen):
        del frozen
        return stage1.terms(model, config.stage1, params, batch, keys)

    def second(params, batch, keys, frozen):
        return stage2.terms(model, config.stage2, params, batch, keys, frozen.get("reference"))

    vae_stage, prior_stage = stages_with_terms(config, first, second)
    return vae_stage, prior_stage._replace(begin=begin_stage2(model, config))


def begin_stage2(model: ColaDLM | None, config: ColaConfig) -> Callable | None:
    """What `Stage.begin` of the prior's stage is."""
    return functools.partial(_codes_of_tokens, model) if _codes_are_tokens(config.vae, config.dit) else None


def _codes_of_tokens(model: ColaDLM, params: Params, given: Collection[str]) -> Params:
    """Stage 2 begins with the encoder's means of single tokens as the codes of a mixture, unless the prior is given."""
    if "dit" in given:
        return params
    tokens = jnp.arange(model.vae_config.vocab_size)[:, None]
    means = model.normalize(model.apply(nn.meta.unbox(params), tokens, method="encode").mean)[:, 0]
    dit = params["params"]["dit"]
    return {"params": {**params["params"], "dit": {**dit, "codes": dit["codes"].replace_boxed(means)}}}


def stages_with_terms(config: ColaConfig, first: TermsFn, second: TermsFn) -> tuple[Stage, Stage]:
    """`make_stages` around any terms (tests put a toy in the place of the model)."""
    reference = "vae" in strategies.trained_groups(config.stage2) and config.stage2.reference_weight > 0
    return (
        Stage(
            name="stage1",
            steps=config.stage1.steps,
            optimizer=config.optimizer1,
            optimizer_field="optimizer1",
            groups=("vae",),
            trained={"vae": Group()},
            frozen={},
            terms=first,
            flops_per_token=flops_per_token(config, 1),
        ),
        Stage(
            name="stage2",
            steps=config.stage2.steps,
            optimizer=config.optimizer2,
            optimizer_field="optimizer2",
            groups=("vae", "dit"),
            trained=strategies.trained_groups(config.stage2),
            frozen={"reference": ("vae", "encoder")} if reference else {},
            terms=second,
            flops_per_token=flops_per_token(config, 2),
        ),
    )


def flops_per_token(config: ColaConfig, stage: int) -> float:
    """Model FLOPs of a training step per token of the batch.

    A matrix multiplication costs 2 FLOPs per weight forward and 4 backward for every position that passes through
    it; frozen parts count forward only. Causal attention adds ``4 * (N / 2) * width`` per position and layer
    forward. The mask pass needs the vocabulary head at the masked positions only. Norms, softmax and rematerialised
    work are left out.

    Args:
      config: with ``vae.vocab_size`` known.
      stage: 1 or 2.
    """
    latents = config.data.sequence_length // config.vae.patch_size
    encoder, decoder, head = text_vae.forward_flops(config.vae, latents)
    settings = config.stage1 if stage == 1 else config.stage2
    vae = encoder + decoder + head
    if settings.mask_weight:
        vae += encoder + decoder + settings.mask_ratio * head
    if stage == 1:
        return 3 * vae
    copies = config.stage2.noise_copies
    times = 1 + copies * (latents // config.dit.block_size if config.stage2.time_per == "block" else 1)
    prior = dit_config.forward_flops(config.dit, latents, 1 + copies, times) / config.vae.patch_size
    if config.dit.self_conditioning:
        prior *= 4 / 3  # the pass before, forward only
    if config.stage2.strategy == "fix_vae":
        return encoder + 3 * prior
    reference = encoder if config.stage2.reference_weight else 0.0
    return 3 * (vae + prior) + reference


def default_settings(config: ColaConfig, tokenizer) -> sampling.Settings:
    """How the run's config wants text to be generated."""
    return sampling_settings(config, tokenizer, config.stage2.path)


def sampling_settings(config, tokenizer, path: str) -> sampling.Settings:
    """What a config with a `SampleConfig` and a path of its flow says about generation."""
    sample = config.sample
    return sampling.Settings(
        steps=sample.steps,
        solver=sample.solver,
        churn=sample.churn,
        guidance_scale=sample.guidance_scale,
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        repetition_penalty=sample.repetition_penalty,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id if sample.pad_prompts else None,
        context=config.data.sequence_length,
        path=path,
    )


def generation_flops(config: ColaConfig, settings: sampling.Settings) -> float:
    """FLOPs of the multiplications by the prior's weights for each new token."""
    return prior_flops(config, settings, config.vae.patch_size)


def prior_flops(config, settings: sampling.Settings, patch_size: int) -> float:
    """FLOPs of the multiplications by the weights of ``config.dit`` for each new token.

    Every evaluation passes a block, twice where it is guided, and each finished block once more into the cache.
    Modulations (once for all blocks), attention, encoder and decoder are left out.
    """
    sizes = config.dit
    width = sizes.num_heads * sizes.head_dim
    weights = sizes.num_layers * (4 * sizes.dim * width + 2 * sizes.mlp_ratio * sizes.dim**2)
    evaluations = 2 if settings.solver == "heun" else 1
    guided = settings.guided
    passes = 1 + evaluations * (len(guided) + sum(guided))
    return 2.0 * weights * passes / patch_size


def score(model: ColaDLM, params: Params, tokens, segment_ids, settings, key: Key, prefix=None) -> Scores:
    """The ELBO of each row (3.12), of its response where there is a prefix (10.21-10.22)."""
    found = likelihood.log_likelihood(model, params, tokens, settings, key, segment_ids, prefix)
    return Scores(found.elbo, found.elbo_error, "lower", np.asarray(found.tokens))


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(model: ColaDLM, params: Params, batch: dict, keys: Key) -> tuple[jax.Array, jax.Array]:
    """(tokens that the decoder's first choice recovers from one posterior sample of their latents, tokens)."""
    segments = common.latent_segments(batch, model.vae_config.patch_size)
    inputs = common.encoder_tokens(batch, model.vae_config.vocab_size)
    posterior = model.apply(params, inputs, segments, method="encode")
    z = model.normalize(common.draw(posterior, keys))
    right = common.accuracy(model.apply(params, z, segments, method="decode"), batch["tokens"])
    real = batch["segment_ids"] > 0
    return (right * real).sum(), real.sum()


ENGINE = Engine(
    unit=lambda model, settings: model.dit_config.block_size * model.vae_config.patch_size,
    prepare=block_engine.prepare,
    start=block_engine.start,
    rename=block_engine.rename,
    advance=block_engine.advance,
    own=Choice._fields,
    fills=block_engine.fills,
)

FAMILY = Family(
    name="cola",
    config=ColaConfig,
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
    score=score,
    scorer=requests.Scorer,
    check_scorable=estimators.check_model,
    generation_flops=generation_flops,
    tokens_per_latent=lambda config: config.vae.patch_size,
    infill=sampling.infill,
    edit=sampling.edit,
    reconstruct=reconstruct,
    engine=ENGINE,
)
