"""Trains a model: Cola DLM (a Text VAE, then its block-causal diffusion prior), or a baseline.

    python launch/train.py --config=configs/quickstart.py
    python launch/train.py --config=configs/quickstart_ar.py

The same command resumes a run that was stopped. Everything is kept in --workdir. With --plan=v5e:4x4 (or another
slice or node) it only compiles the run's steps for such devices and reports memory, FLOPs and tokens per second.

On TPU VMs and in SLURM steps every process of the run finds the others; elsewhere --coordinator=host:port
--process_count=N --process_id=I. Exit status: 0 done, 2 bad input, 3 diverged, 75 stopped and saved, or a disk, the
network or another process failed: start again, 76 hung.
"""

import functools
import json
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from cola_jax import cli, families, paths, rng, runs
from cola_jax.evaluation import evaluators
from cola_jax.train import experiment, loop, plan, trainer, workdir

_CONFIG = cli.config_flag()
_PLAN = flags.DEFINE_string("plan", None, "only report what the run needs there: v5e:4x4, v4:2x2x2, h100:8, ...")
_MFU = flags.DEFINE_float("plan_mfu", 0.4, "model FLOP utilisation that the plan assumes", 0.0, 1.0)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run, or gs://bucket/name; default: runs/<its config>")
_PROFILE = cli.profile_flag()
_START = cli.machine_flags()


def make_sampler(parts: experiment.Experiment) -> trainer.Sampler:
    """Generates texts from nothing, as `config.sample` says."""
    config, family = parts.config, families.of(parts.config)
    settings = family.default_settings(config, parts.tokenizer)

    def sample(stage, step, variables):
        del stage
        prompts, key = [[]] * config.train.num_samples, rng.key(config.seed, "sample", step)
        out = family.generate(parts.model, variables, prompts, settings, key=key)
        rows = zip(out.tokens, out.lengths, strict=True)
        return [parts.tokenizer.decode([int(token) for token in tokens[: int(n)]]) for tokens, n in rows]

    return sample


def main() -> None:
    config = cli.read_config(_CONFIG)
    log = functools.partial(print, flush=True)
    if _PLAN.value:
        return plan.show(config, _PLAN.value, _MFU.value, log)
    _START()
    if jax.process_index():
        log = lambda line: None  # noqa: E731
    family = families.of(config)
    plan.check_kernels(config)
    experiment.check_samples(config)
    chosen = evaluators.names(config.evaluation, config, family)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    directory = paths.directory(_WORKDIR.value or Path("runs") / name, "--workdir")
    profile_steps = _PROFILE()
    workdir.claim(config, directory)
    parts = experiment.build(config, directory)
    started = time.monotonic()
    loop.train(config, directory, parts, make_sampler(parts), profile_steps=profile_steps)
    log(f"training took {time.monotonic() - started:.0f} s")
    if config.evaluation.count and chosen and parts.stages[-1].steps:
        report = evaluators.report(runs.load(str(directory)), config.evaluation, config.seed, log)
        if jax.process_index() == 0:  # the others have computed the same
            paths.write_atomically(directory / "report.json", (json.dumps(report, indent=1) + "\n").encode())
        log(f"checkpoints, metrics and report.json are in {directory}")


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
