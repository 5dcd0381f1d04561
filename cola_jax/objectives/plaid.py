"""Plaid's variational bound: what its embeddings lose, and what its diffusion loses (11.17-11.19)."""

import dataclasses

import jax.numpy as jnp

from cola_jax import rng
from cola_jax.fields import like, require, setting
from cola_jax.objectives import common, stage2
from cola_jax.objectives.stage2 import Stage2Config
from cola_jax.types import Key, Params, Term


@dataclasses.dataclass(frozen=True)
class PlaidStageConfig:
    """Training of Plaid; the times say only where the integral over time is sampled (`flow.schedule.importance`)."""

    steps: int = setting(1000, "updates", at_least=0)
    time_distribution: str = like(Stage2Config, "time_distribution", "uniform")
    time_loc: float = like(Stage2Config, "time_loc", 0.0)
    time_scale: float = like(Stage2Config, "time_scale", 1.5)
    time_table: tuple[float, ...] = like(Stage2Config, "time_table")
    path: str = like(Stage2Config, "path")
    prompts: float = setting(
        0.25, "share of the texts that keep a random beginning clean, as prompts are", at_least=0, at_most=1
    )
    self_conditioning: float = like(Stage2Config, "self_conditioning")
    code_weight: float = setting(
        0.0, "weight of the cross-entropy of the tokens under what the network predicts (CDCD)", at_least=0
    )

    def check_together(self, prefix: str) -> None:
        ok = self.time_distribution != "uniform_log_snr"
        need = "one whose density is nowhere 0: 'uniform', 'logit_normal' or 'table'"
        require(ok, f"{prefix}time_distribution", self.time_distribution, need)
        tabled = self.time_distribution == "table"
        ok = tabled == bool(self.time_table) and all(self.time_table)
        need = "numbers above 0 where time_distribution = 'table', and else empty"
        require(ok, f"{prefix}time_table", self.time_table, need)

    @property
    def flow(self) -> Stage2Config:
        """The same as settings of flow matching: one time a text, the error in nats of likelihood."""
        return Stage2Config(
            strategy="scratch",
            target="posterior",
            time_weight="likelihood",
            time_per="sequence",
            time_distribution=self.time_distribution,
            time_loc=self.time_loc,
            time_scale=self.time_scale,
            time_table=self.time_table,
            path=self.path,
            prompt_blocks=self.prompts,
            self_conditioning=self.self_conditioning,
            code_weight=self.code_weight,
        )


def terms(model, stage: PlaidStageConfig, params: Params, batch: dict, keys: Key) -> dict[str, Term]:
    """``-log p(x | z_0) + KL(q(z_0 | x) || p(z_0))``, the latter by the error of the field at one time.

    Embeddings are learned through both: they are what is predicted, and what noise is added to.

    Args:
      model: a `models.plaid.Plaid`.
      stage: its settings.
      params: its variables.
      batch: tokens, segment_ids [B, T]; segment 0 is padding and counts nowhere.
      keys: [B].

    Returns:
      Terms per example: "reconstruction" and "flow", whose sum (flow times D) bounds -log p(x) in nats per token where
      no prompt is kept clean; "codes" where it has a weight; and what `stage2.flow_terms` reports.
    """
    draw_keys, flow_keys = rng.split(keys, 2)
    tokens, segments = batch["tokens"], batch["segment_ids"]
    real = (segments > 0).astype(jnp.float32)
    posterior = model.apply(params, tokens, segments, method="encode")
    z = common.draw(posterior, draw_keys)
    scores = common.token_scores(model, params, z, tokens, segments)
    flow = stage2.flow_terms(model, stage.flow, params, z, segments, flow_keys, False, posterior, tokens)
    return flow | {
        "flow": flow["flow"]._replace(coefficient=float(model.dit_config.latent_dim)),
        "reconstruction": common.per_example(scores.cross_entropy, real),
        "accuracy": common.per_example(scores.accuracy, real, 0.0),
        **common.posterior_statistics(posterior, real),
    }
