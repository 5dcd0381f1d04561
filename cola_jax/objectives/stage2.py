"""Stage 2: flow matching of the prior, with the VAE frozen or trained along (3.18)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cola_jax import rng
from cola_jax.fields import require, setting
from cola_jax.flow import schedule
from cola_jax.flow.path import PATHS, interpolate
from cola_jax.objectives import common, masked_tokens
from cola_jax.types import Key, Params, Term


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
    time_per: str = setting("block", "what has a time of its own", choices=("block", "sequence"))
    prompt_blocks: float = setting(
        0.05, "share of the blocks that keep a random proper prefix clean", at_least=0, at_most=1
    )
    history_dropout: float = setting(0.0, "share of the blocks that see no history", at_least=0, at_most=1)
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

    @property
    def times(self) -> schedule.Times:
        """The distribution of the flow times that are trained."""
        log_snrs = (self.time_log_snr_min, self.time_log_snr_max)
        return schedule.Times(
            self.time_distribution, self.time_loc, self.time_scale, *log_snrs, PATHS[self.path], self.time_grid
        )


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
        "flow": flow_term(model, stage, params, z, segments, flow_keys, frozen),
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


def flow_term(model, stage: Stage2Config, params, z, segments, keys: Key, frozen: bool = False) -> Term:
    """``L_FM`` (3.7): squared error of the velocity, per element, over positions that are noisy and real.

    The history is stop-gradient, and so are the positions that a prompt block keeps clean: they are a condition
    like it (17.1). The gradient through z_t and the target is ``stage.encoder_gradient``.
    """
    copies, block = stage.noise_copies, model.dit_config.block_size
    draw = _draw(stage, keys, z.shape[1], z.shape[2], block)
    history = jax.lax.stop_gradient(z)
    data = jnp.tile(z if stage.encoder_gradient and not frozen else history, (1, copies, 1))
    times = jnp.repeat(draw.times, block, axis=1)[..., None]
    noisy, target = interpolate(PATHS[stage.path], data, draw.noise, times)
    counted = jnp.tile((segments > 0).astype(jnp.float32), (1, copies))
    if draw.pinned is not None:
        noisy = jnp.where(draw.pinned[..., None], jnp.tile(history, (1, copies, 1)), noisy)
        counted = counted * ~draw.pinned
    velocity = model.apply(
        params,
        noisy,
        draw.times,
        history=history,
        pinned=draw.pinned,
        segment_ids=segments,
        drop_history=draw.dropped,
        method="velocity",
    )
    error = jnp.mean(jnp.square(velocity - target), axis=-1)
    return common.per_example(error, counted, stage.flow_weight)
