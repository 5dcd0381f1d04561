"""Sizes and options of the diffusion transformer, and what it costs (SPEC 2, 9)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from cola_jax.fields import check, require, setting
from cola_jax.flow import prediction
from cola_jax.flow.path import PATHS
from cola_jax.nn import attention


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Block-causal diffusion transformer (SPEC 2, 9)."""

    latent_dim: int = setting(16, "channels of a latent, D; vae.latent_dim", at_least=1)
    block_size: int = setting(8, "latents of a block, K", at_least=1)
    dim: int = setting(128, "width of the residual stream", at_least=1)
    num_heads: int = setting(4, "heads of attention", at_least=1)
    head_dim: int = setting(32, "channels of a head", at_least=1)
    num_layers: int = setting(3, "layers", at_least=1)
    mlp_ratio: int = setting(4, "hidden width of the MLP over dim", at_least=1)
    time_dim: int = setting(128, "width of the time embedding that the modulations read", at_least=1)
    rope_dim: int = setting(
        16, "channels of a head that are rotated", at_least=0, where=(lambda value: value % 2 == 0, "an even number")
    )
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies", above=0)
    qkv_bias: bool = setting(False, "of queries, keys and values, and of the projection behind them")
    norm_eps: float = setting(1e-5, "added to the variance in norms", above=0)
    block_position: bool = setting(False, "learned embedding of the index inside the block [ours]")
    no_history_vector: bool = setting(False, "marks blocks whose history was dropped [ours]")
    prediction: str = setting(
        "velocity",
        "what the network's output is; mean: of the latents' means, from which the velocity follows; mixture: the mean "
        "as an expectation over codes, one for each token (`flow.prediction`) [ours]",
        choices=prediction.PREDICTIONS,
    )
    prediction_variance: float | None = setting(
        None, "not 'velocity': variance of normalised latents around their means; None: that of vae.logsnr", above=0
    )
    num_codes: int = setting(0, "'mixture': codes; 0: the vocabulary's size", at_least=0)
    self_conditioning: bool = setting(
        False, "the network reads an estimate of the means, its own of a pass or step before; not 'velocity' [ours]"
    )
    path: str = setting("linear", "not 'velocity': the path of the flow; stage2.path", choices=tuple(PATHS))
    time_frequency: float = setting(
        1000.0, "highest angular frequency of the time features, radians over [0, 1]", above=0
    )
    attention_kernel: str = setting("auto", "splash is for TPUs; auto: where it suits", choices=attention.KERNELS)
    remat: str = setting(
        "none", "what the backward pass computes again (`scan_layers`)", choices=("none", "full", "attention", "dots")
    )
    unroll: int = setting(
        1, "layers compiled one after another; all of them: longer compilation, 13 % less work a step", at_least=1
    )

    def validate(self) -> None:
        check(self, "config.dit.")

    def deviation(self, t: Array) -> Array:
        """Of z_t around its mean, at a flow time; 1 where the network predicts velocities."""
        if self.prediction == "velocity":
            return jnp.ones_like(t)
        return jnp.sqrt(prediction.spread(PATHS[self.path], t, self.prediction_variance))

    def check_together(self, prefix: str) -> None:
        need = f"at most head_dim = {self.head_dim}"
        require(self.rope_dim <= self.head_dim, f"{prefix}rope_dim", self.rope_dim, need)
        ok = not self.self_conditioning or self.prediction != "velocity"
        require(ok, f"{prefix}self_conditioning", True, "False where prediction is 'velocity'")


def forward_flops(config: DiTConfig, latents: int, copies: int, times: int, clean: bool = True) -> float:
    """Forward FLOPs per latent of a row that has ``copies`` copies of ``latents`` latents, at ``times`` distinct times.

    2 for each weight that a position passes through, and causal attention over half of the pairs (over all where one
    block is the whole row); modulations are computed once for each distinct time of a row.

    Args:
      config: sizes; of a mixture, with the number of its codes.
      latents: N.
      copies: all of them.
      times: distinct flow times of a row, t = 0 included.
      clean: whether the first copy is the clean one, of which no outputs are computed.
    """
    width = config.num_heads * config.head_dim
    pairs = 4 * latents if config.block_size >= latents else 2 * latents
    layer = 2 * (4 * config.dim * width + 2 * config.mlp_ratio * config.dim**2) + pairs * width
    passes = copies * (config.num_layers * layer + 2 * 2 * config.latent_dim * config.dim)
    if config.prediction == "mixture":  # what is read; of the noisy copies also logits, their evidence, the expectation
        passes += copies * 2 * config.num_codes * (config.latent_dim + config.dim)
        passes += (copies - clean) * 2 * config.num_codes * (config.dim + 2 * config.latent_dim)
    modulation = times / latents * config.num_layers * 2 * 6 * config.dim * config.time_dim
    return passes + modulation
