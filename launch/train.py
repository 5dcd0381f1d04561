"""Trains a Text VAE and its block-causal diffusion prior.

    python launch/train.py --config=configs/quickstart.py

The same command goes on with a run that was stopped. Everything is kept in --workdir.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cola_jax import cli, rng, sampling
from cola_jax.train import loop

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; default: runs/<name of the config>")


def make_sampler(parts: loop.Parts) -> loop.Sampler:
    """Generates stories from nothing, as `config.sample` says."""
    config = parts.config
    settings = sampling.Settings(
        steps=config.sample.steps,
        guidance_scale=config.sample.guidance_scale,
        max_new_tokens=config.sample.max_new_tokens,
        temperature=config.sample.temperature,
        repetition_penalty=config.sample.repetition_penalty,
        eos_id=parts.tokenizer.eos_id,
    )

    def sample(stage, step, variables):
        del stage
        prompts = [[]] * config.train.num_samples
        out = sampling.generate(parts.model, variables, prompts, settings, key=rng.key(config.seed, "sample", step))
        rows = zip(out.tokens, out.lengths, strict=True)
        return [parts.tokenizer.decode([int(token) for token in tokens[: int(n)]]) for tokens, n in rows]

    return sample


def main() -> None:
    config = cli.read_config(_CONFIG)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name).absolute()
    loop.claim_workdir(config, workdir)
    parts = loop.build(config, workdir)
    loop.train(config, workdir, parts, make_sampler(parts))


if __name__ == "__main__":
    cli.run(main)
