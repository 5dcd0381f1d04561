"""Trains a Text VAE and its block-causal diffusion prior.

    python launch/train.py --config=configs/quickstart.py

The same command resumes a run that was stopped. Everything is kept in --workdir. With --plan=v5e:4x4 (or another
slice or node) it only compiles the run's steps for such devices and tells memory, FLOPs and tokens per second.

On TPU VMs and in SLURM steps every process of the run finds the others; elsewhere --coordinator=host:port
--process_count=N --process_id=I. Exit status: 0 done, 2 bad input, 3 diverged, 75 stopped and saved, or another process
lost: start again, 76 hung.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from cola_jax import cli, rng, sampling, sharding
from cola_jax.config import Config
from cola_jax.evaluation import stories, trained
from cola_jax.models import cola
from cola_jax.train import loop, plan
from cola_jax.types import UserError

_CONFIG = cli.config_flag()
_PLAN = flags.DEFINE_string("plan", None, "only tell what the run needs there: v5e:4x4, v4:2x2x2, h100:8, ...")
_MFU = flags.DEFINE_float("plan_mfu", 0.4, "model FLOP utilisation that the plan assumes", 0.0, 1.0)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; default: runs/<name of the config>")
_PROFILE = cli.profile_flag()
_START = cli.machine_flags()


def make_sampler(parts: loop.Parts) -> loop.Sampler:
    """Generates stories from nothing, as `config.sample` says."""
    config, settings = parts.config, trained.settings(parts.config, parts.tokenizer)

    def sample(stage, step, variables):
        del stage
        prompts = [[]] * config.train.num_samples
        out = sampling.generate(parts.model, variables, prompts, settings, key=rng.key(config.seed, "sample", step))
        rows = zip(out.tokens, out.lengths, strict=True)
        return [parts.tokenizer.decode([int(token) for token in tokens[: int(n)]]) for tokens, n in rows]

    return sample


def show_plan(config: Config) -> None:
    """Compiles the step of each stage for described devices; raises UserError if one does not fit."""
    cluster = plan.parse_cluster(_PLAN.value)
    vocabulary = config.vae.vocab_size or config.data.vocab_size
    config = dataclasses.replace(config, vae=cola.with_vocabulary(config.vae, vocabulary))
    plan.prepare(cluster)
    devices, compiler = plan.describe_devices(cluster)
    mesh = sharding.make_mesh(config.train, devices)
    if mesh.size != cluster.count:
        allowed = f"all {cluster.count} devices of --plan = {_PLAN.value}"
        raise UserError(f"config.train.mesh_* takes {mesh.size} devices: must take {allowed}")
    say = functools.partial(print, flush=True)
    say(f"{cluster.name}: {cluster.count} devices, mesh {', '.join(f'{k} {v}' for k, v in mesh.shape.items())}")
    fits = True
    for stage in (1, 2):
        if (config.stage1, config.stage2)[stage - 1].steps:
            report = plan.compile_step(config, stage, mesh, cluster.chip, compiler)
            say(plan.describe(report, cluster, _MFU.value))
            fits = fits and report.fits
    if not fits:
        raise UserError(
            f"--plan = {_PLAN.value}: does not fit; more of config.train.mesh_fsdp, config.optimizer2.accumulation or "
            "config.dit.remat, or less of config.data.batch_size, may help"
        )


def main() -> None:
    config = cli.read_config(_CONFIG)
    if _PLAN.value:
        return show_plan(config)
    _START()
    for part in ("vae", "dit"):
        if getattr(config, part).attention_kernel == "splash" and jax.default_backend() != "tpu":
            allowed = f"'auto', 'xla' or 'splash_interpreted' on this machine's {jax.default_backend()}"
            raise UserError(f"config.{part}.attention_kernel = 'splash': must be {allowed}")
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda line: None
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name).absolute()
    profile_steps = _PROFILE()
    loop.claim_workdir(config, workdir)
    parts = loop.build(config, workdir)
    started = time.monotonic()
    loop.train(config, workdir, parts, make_sampler(parts), profile_steps=profile_steps)
    say(f"training took {time.monotonic() - started:.0f} s")
    if config.data.corpus == "stories" and config.sample.report_stories and config.stage2.steps:
        run = trained.load(str(workdir))
        settings = trained.settings(config, run.tokenizer)
        report = stories.report(run, settings, config.sample.report_stories, config.seed, say)
        if jax.process_index() == 0:  # the others have computed the same
            (workdir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        say(f"checkpoints, metrics and report.json are in {workdir}")


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
