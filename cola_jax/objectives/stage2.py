"""Stage 2: flow matching of the prior, with the VAE frozen or trained along (3.18)."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cola_jax import rng
from cola_jax.fields import require, setting
from cola_jax.flow import prediction, schedule
from cola_jax.flow.path import PATHS, interpolate
from cola_jax.objectives import common, masked_tokens
from cola_jax.types import Key, Params, Posterior, Term

TARGETS = ("sample", "posterior")
# Flow times whose errors the log shows apart: from each of these to the next.
TIME_BINS = (0.0, 0.1, 0.3, 0.7, math.inf)


@dataclasses.dataclass(frozen=True)
class Stage2Config:
    """VAE and DiT together (3.18, SPEC 3 and 4)."""

    steps: int = setting(1000, "updates; 0: the stage is skipped", at_least=0)
    strategy: str = setting(
        "fix_vae", "what the VAE does (SPEC 4)", choices=("joint", "fix_vae", "scratch", "interval")
    )
    vae_learning_rate_ratio: float = setting(1.0, "learning rate of the VAE over that of the DiT", at_least=0)
    interval: int = setting(0, "strategy 'interval': so many joint steps, then as many with the VAE frozen", at_least=0)
    vae_weight: float = setting(1.0, "lambda_VAE", at_least=0)
    entropy_weight: float = setting(1e-3, "beta, on E_q[log q]", at_least=0)
    mask_weight: float = setting(0.1, "lambda_mask", at_least=0)
    mask_ratio: float = setting(
        0.3, "share of the input tokens that is replaced by the mask token", at_least=0, at_most=1
    )
    flow_weight: float = setting(1.0, "lambda_fm", at_least=0)
    reference_weight: float = setting(0.01, "lambda_ref", at_least=0)
    encoder_gradient: bool = setting(
        True, "gradient of the flow-matching loss into the encoder, through z_t and the target"
    )
    time_distribution: str = setting("logit_normal", "of t", choices=schedule.DISTRIBUTIONS)
    time_loc: float = setting(1.0, "mean of the normal of 'logit_normal'")
    time_scale: float = setting(1.0, "and its standard deviation", above=0)
    time_second_share: float = setting(
        0.0, "share of the times that a second logit-normal draws instead", at_least=0, at_most=1
    )
    time_second_loc: float = setting(-1.5, "mean of its normal; negative: near the data")
    time_second_scale: float = setting(1.0, "and its standard deviation", above=0)
    time_table: tuple[float, ...] = setting(
        (), "'table': what equal parts of [0, 1] get; the report says which times vary the likelihood least", at_least=0
    )
    time_weight: str = setting(
        "as_drawn",
        "what the error at a time counts: the same at each drawn time, or by importance weights as if times were drawn "
        "from 'logit_normal' or 'uniform', or the time's share of the likelihood ((1 - t) / t)",
        choices=schedule.WEIGHTS,
    )
    weight_loc: float = setting(1.0, "time_weight 'logit_normal': mean of the normal")
    weight_scale: float = setting(1.0, "and its standard deviation", above=0)
    target: str = setting(
        "sample",
        "velocity that is learned: the sampled path's, or its mean given the text's posterior: the same field, less "
        "noise (`flow.prediction`) [ours]",
        choices=TARGETS,
    )
    time_per: str = setting("block", "what has a time of its own", choices=("block", "sequence"))
    prompt_blocks: float = setting(
        0.05, "share of the blocks that keep a random proper prefix clean", at_least=0, at_most=1
    )
    history_dropout: float = setting(0.0, "share of the blocks that see no history", at_least=0, at_most=1)
    self_conditioning: float = setting(
        0.5,
        "dit.self_conditioning: share of the sequences whose pass reads the estimate of another pass before it",
        at_least=0,
        at_most=1,
    )
    code_weight: float = setting(
        0.0, "dit.prediction 'mixture': weight of the cross-entropy of the tokens under its codes [ours]", at_least=0
    )
    noise_copies: int = setting(1, "noisy copies for each clean pass", at_least=1)
    path: str = setting("linear", "from data to noise (`flow.path`)", choices=tuple(PATHS))
    time_log_snr_min: float = setting(-10.0, "'uniform_log_snr': the log-SNRs of the path that are trained, from this")
    time_log_snr_max: float = setting(10.0, "to this")
    time_grid: int = setting(0, "times are multiples of 1 / time_grid (16.7); 0: continuous", at_least=0)

    def check_together(self, prefix: str) -> None:
        ok = self.strategy != "interval" or self.interval >= 1
        require(ok, f"{prefix}interval", self.interval, "at least 1 (strategy = 'interval')")
        low, high = self.time_log_snr_min, self.time_log_snr_max
        require(low < high, f"{prefix}time_log_snr_min", low, f"below time_log_snr_max = {high}")
        tabled = self.time_distribution == "table"
        need = "numbers of which one is above 0 where time_distribution = 'table', and else empty"
        require(tabled == (sum(self.time_table) > 0), f"{prefix}time_table", self.time_table, need)
        weighted = self.time_weight != "as_drawn"
        whole = self.time_distribution != "uniform_log_snr" and all(self.time_table)
        covered = not weighted or whole or self.time_second_share > 0
        need = "one whose density is nowhere 0 (or time_second_share > 0) where time_weight is not 'as_drawn'"
        require(covered, f"{prefix}time_distribution", self.time_distribution, need)
        need = "0 (continuous times) where time_weight is not 'as_drawn'"
        require(not (weighted and self.time_grid), f"{prefix}time_grid", self.time_grid, need)
        joint = self.strategy != "fix_vae" and self.encoder_gradient
        need = "'sample' where the flow loss trains the encoder (its variance enters the noise of the target)"
        require(not joint or self.target == "sample", f"{prefix}target", self.target, need)

    @property
    def times(self) -> schedule.Times:
        """The distribution of the flow times that are trained."""
        log_snrs = (self.time_log_snr_min, self.time_log_snr_max)
        first = (self.time_distribution, self.time_loc, self.time_scale)
        second = (self.time_second_share, self.time_second_loc, self.time_second_scale)
        return schedule.Times(*first, *log_snrs, PATHS[self.path], self.time_grid, *second, self.time_table)

    @property
    def weight(self) -> schedule.Weight:
        """What the error at a time counts."""
        return schedule.Weight(self.time_weight, self.weight_loc, self.weight_scale)


def terms(
    model, stage: Stage2Config, params: Params, batch: dict, keys: Key, reference: Params | None = None
) -> dict[str, Term]:
    """``lambda_VAE (recon + beta E_q[log q] + lambda_mask L_mask) + lambda_fm L_FM + lambda_ref KL(q || q_ref)``.

    Args:
      model: a `ColaDLM`.
      stage: weights, strategy, times.
      params: variables of VAE and DiT.
      batch: tokens, segment_ids [B, T]; segment 0 is padding and counts nowhere.
      keys: [B].
      reference: variables of the encoder as stage 2 began, frozen; None: no such term.

    Returns:
      Terms per example; L_FM is a mean over latent elements. With strategy "fix_vae" only L_FM.
    """
    draw_keys, flow_keys, mask_keys = rng.split(keys, 3)
    segments = common.latent_segments(batch, model.vae_config.patch_size)
    latents = (segments > 0).astype(jnp.float32)
    inputs = common.encoder_tokens(batch, model.vae_config.vocab_size)
    posterior = model.apply(params, inputs, segments, method="encode")
    z = model.normalize(common.draw(posterior, draw_keys))
    frozen = stage.strategy == "fix_vae"
    out = {
        **flow_terms(model, stage, params, z, segments, flow_keys, frozen, posterior, batch["tokens"]),
        **common.posterior_statistics(posterior, latents),
    }
    if frozen:
        return out
    return out | _vae_terms(model, stage, params, batch, z, posterior, segments, mask_keys, reference)


def _vae_terms(model, stage, params, batch, z, posterior, segments, mask_keys, reference) -> dict[str, Term]:
    tokens, real = batch["tokens"], (batch["segment_ids"] > 0).astype(jnp.float32)
    written = common.reconstructed(batch, model.vae_config.patch_size)
    latents = (segments > 0).astype(jnp.float32)
    scores = common.token_scores(model, params, z, tokens, segments)
    out = {
        "reconstruction": common.per_example(scores.cross_entropy, written, stage.vae_weight),
        "entropy": common.per_example(
            common.negative_entropy(posterior), latents, stage.vae_weight * stage.entropy_weight
        ),
        "accuracy": common.per_example(scores.accuracy, real, 0.0),
    }
    if stage.mask_weight:
        weight = stage.vae_weight * stage.mask_weight
        out["mask"] = masked_tokens.term(model, params, batch, mask_keys, stage.mask_ratio, weight)
    if reference is not None:
        inputs = common.encoder_tokens(batch, model.vae_config.vocab_size)
        anchor = jax.lax.stop_gradient(model.apply(reference, inputs, segments, method="encode"))
        out["reference_kl"] = common.per_example(common.kl(posterior, anchor), latents, stage.reference_weight)
    return out


class _Draw(NamedTuple):
    """The random part of flow matching; G blocks in all noisy copies together, Q = G * K latents."""

    noise: Array  # [B, Q, D]
    times: Array  # [B, G]
    pinned: Array | None  # [B, Q], positions kept clean
    dropped: Array | None  # [B, G], blocks without history


def _draw(stage: Stage2Config, keys: Key, length: int, channels: int, block_size: int) -> _Draw:
    noise_keys, time_keys, prompt_keys, drop_keys = rng.split(keys, 4)
    total = stage.noise_copies * length
    blocks = total // block_size
    if stage.time_per == "block":
        times = schedule.sample(stage.times, time_keys, blocks)
    else:
        times = schedule.sample(stage.times, time_keys, stage.noise_copies)
        times = jnp.repeat(times, blocks // stage.noise_copies, axis=1)
    pinned = dropped = None
    if stage.prompt_blocks:
        is_prompt, size = rng.split(prompt_keys, 2)
        # A proper prefix: 1 to K - 1 positions (none where K is 1).
        prefix = 1 + jnp.floor(rng.uniform(size, (blocks,)) * (block_size - 1)).astype(jnp.int32)
        prefix = jnp.where(rng.uniform(is_prompt, (blocks,)) < stage.prompt_blocks, prefix, 0)
        prefix = jnp.minimum(prefix, block_size - 1)
        pinned = (jnp.arange(block_size)[None, None] < prefix[..., None]).reshape(-1, total)
    if stage.history_dropout:
        dropped = rng.uniform(drop_keys, (blocks,)) < stage.history_dropout
    return _Draw(rng.normal(noise_keys, (total, channels)), times, pinned, dropped)


def flow_terms(*arguments, **options) -> dict[str, Term]:
    """The terms of `flow`, whose arguments it has."""
    return flow(*arguments, **options)[0]


def flow(
    model,
    stage: Stage2Config,
    params,
    z,
    segments,
    keys: Key,
    frozen: bool = False,
    posterior: Posterior | None = None,
    tokens: Array | None = None,
    mutable: tuple[str, ...] = (),
) -> tuple[dict[str, Term], dict]:
    """``L_FM`` (3.7): squared error of the velocity, per element, over positions that are noisy and real.

    The history is stop-gradient, and so are the positions that a prompt block keeps clean: they are a condition
    like it (17.1). The gradient through z_t and the target is ``stage.encoder_gradient``.

    Args:
      model, stage, params: as in `terms`.
      z: normalised latents [B, N, D].
      segments: [B, N], 0 for padding.
      keys: [B].
      frozen: whether the VAE is.
      posterior: of the latents, before normalisation; needed where ``stage.target`` is "posterior".
      tokens: [B, N], one for each latent; needed where ``stage.code_weight`` is above 0.
      mutable: collections that the network shall record ("kept", see `BlockCausalDiT`).

    Returns:
      The terms, and what was recorded. "flow", the loss; "codes" where it has a weight, the cross-entropy of each
      latent's token under `flow.prediction.code_scores`, nats; and for the log, without a gradient, the mean error of
      the drawn times in each of `TIME_BINS`.
    """
    copies, block = stage.noise_copies, model.dit_config.block_size
    draw = _draw(stage, keys, z.shape[1], z.shape[2], block)
    history = jax.lax.stop_gradient(z)
    data = jnp.tile(z if stage.encoder_gradient and not frozen else history, (1, copies, 1))
    times = jnp.repeat(draw.times, block, axis=1)[..., None]
    noisy, target = interpolate(PATHS[stage.path], data, draw.noise, times)
    if stage.target == "posterior":
        if frozen or not stage.encoder_gradient:
            posterior = jax.lax.stop_gradient(posterior)
        target = _posterior_target(model, stage, posterior, noisy, times)
    counted = jnp.tile((segments > 0).astype(jnp.float32), (1, copies))
    if draw.pinned is not None:
        noisy = jnp.where(draw.pinned[..., None], jnp.tile(history, (1, copies, 1)), noisy)
        counted = counted * ~draw.pinned
    velocity, recorded = _predict(model, stage, params, noisy, draw, history, segments, keys, mutable)
    error = jnp.mean(jnp.square(velocity - target), axis=-1)
    times = times[..., 0]
    out = {
        f"flow_from_{low:g}": common.per_example(error, counted * (times >= low) * (times < high), 0.0)
        for low, high in itertools.pairwise(TIME_BINS)
    }
    if stage.code_weight:
        (scores,) = recorded["scores"]["dit"]["codes"]
        surprise = common.cross_entropy(scores, jnp.tile(tokens, (1, copies)))
        out["codes"] = common.per_example(surprise, counted, stage.code_weight)
    if stage.time_weight != "as_drawn":
        error = error * schedule.importance(stage.weight, stage.times, times)
    return {"flow": common.per_example(error, counted, stage.flow_weight)} | out, recorded


def _predict(model, stage: Stage2Config, params, noisy, draw, history, segments, keys: Key, mutable):
    """Velocity of the noisy copies, and what was recorded: the scores of their codes where these have a weight."""
    if noisy.shape[1] == model.dit_config.block_size and draw.dropped is None and "kept" not in mutable:
        history = None  # one block: nothing is before it
    apply = functools.partial(
        model.apply,
        params,
        noisy,
        draw.times,
        history=history,
        pinned=draw.pinned,
        segment_ids=segments,
        drop_history=draw.dropped,
    )
    options = {}
    if model.dit_config.self_conditioning:
        reads = rng.uniform(rng.fold_in(keys, 1), (1, 1)) < stage.self_conditioning
        options["estimate"] = jnp.where(reads, jax.lax.stop_gradient(apply(method="first_estimate")), 0.0)
    if stage.code_weight:
        mutable = (*mutable, "scores")
    if not mutable:
        return apply(**options, method="velocity"), {}
    return apply(**options, method="velocity", mutable=list(mutable))


def _posterior_target(model, stage: Stage2Config, posterior: Posterior, noisy, times):
    """The velocity given the text's posterior, for every noisy copy; its variance has no gradient."""
    mean = model.normalize(posterior.mean)
    variance = jnp.exp(jax.lax.stop_gradient(posterior.logvar)) * model.vae_config.scale**2
    mean, variance = (jnp.tile(x, (1, stage.noise_copies, 1)) for x in (mean, variance))
    return prediction.posterior_velocity(PATHS[stage.path], noisy, times, mean, variance)
