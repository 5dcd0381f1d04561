"""Measures the likelihood of a model of `stories`: its gap to the exact entropy, ranking, cost of the solvers.

With --part=prior, for a model of any corpus: the error of the prior's field by time, and where its density is lost.

    python launch/likelihood.py --checkpoint=runs/quickstart --part=gap --count=64 --samples=1,10,100
    python launch/likelihood.py --checkpoint=runs/quickstart --part=prior --count=64 --steps=24 --power=2
    python launch/likelihood.py --checkpoint=runs/quickstart --part=ranking --count=64 --samples=4
    python launch/likelihood.py --checkpoint=runs/quickstart --part=sweep --count=8
    python launch/likelihood.py --part=speed --config=configs/benchmark.py --solver=heun --steps=16 --samples=1

Solver, tolerances and divergence are flags; with --json=FILE the numbers are written there.
"""

import dataclasses
import json
import time
from pathlib import Path

from absl import flags

from cola_jax import cli, cli_settings, families
from cola_jax.evaluation import likelihood, prior
from cola_jax.evaluation.statistics import Mean
from cola_jax.likelihood import Settings
from cola_jax.types import UserError

_LOAD, _CONFIG = cli.checkpoint_flags(), cli.config_flag()
_PART = flags.DEFINE_enum("part", "gap", ["gap", "ranking", "sweep", "probes", "prior", "speed"], "what to measure")
_COUNT = flags.DEFINE_integer("count", 64, "held-out stories, or texts", lower_bound=2)
_SAMPLES = flags.DEFINE_list(
    "samples", "1,10", "K; the ELBO is given for the largest, the IWAE for each with --divergence=exact"
)
_SEED = flags.DEFINE_integer("seed", 1, "of all draws")
_SETTINGS = cli_settings.scoring_flags(skip=("samples",))
_JSON = flags.DEFINE_string("json", None, "file for the numbers")


def log(line: str) -> None:
    print(line, flush=True)


def measure(run, settings: Settings, counts: list[int]) -> dict | list:
    """The part that was asked for, as JSON can hold it; logs it in lines."""
    arguments = (_COUNT.value, _SEED.value)
    if _PART.value in ("sweep", "probes"):
        found = getattr(likelihood, _PART.value)(run, settings, *arguments, log)
        return [row._asdict() | {"settings": dataclasses.asdict(row.settings)} for row in found]
    if _PART.value == "prior":
        return measure_prior(run, settings)
    if _PART.value == "ranking":
        found = likelihood.ranking(run, settings, *arguments)
        values = {name: {"mean": share.mean, "interval": share.interval} for name, share in found.items()}
    else:
        start = time.monotonic()

        def report(done, total):
            left = (time.monotonic() - start) / done * (total - done)
            log(f"{done}/{total} samples  ETA {left:.0f} s")

        found = likelihood.gap(run, settings, *arguments, counts, report)
        if settings.divergence != "exact":
            log(f"no IWAE with --divergence={settings.divergence}: it would be no bound; --divergence=exact gives it")
        values = {name: value._asdict() for name, value in found.items()}
    for name, value in found.items():
        log(f"{name}: {value}")
    return values


def measure_prior(run, settings: Settings) -> dict:
    """Field errors and the split by time, as JSON can hold them; logs each in a line."""
    sample, found = prior.draw(run, _COUNT.value, _SEED.value), {"field": [], "split": []}
    for when in prior.TIMES:
        found["field"] += prior.field_error(run, sample, [when])
        log(str(found["field"][-1]))
    found["bound"] = [prior.bound(run, sample, 64, _SEED.value)]
    log(str(found["bound"][0]))
    for when in prior.STARTS:
        found["split"] += prior.split(run, sample, [when], settings)
        log(str(found["split"][-1]))
    return {name: [plain(row) for row in rows] for name, rows in found.items()}


def plain(row) -> dict:
    """A named tuple of numbers, means and lists of them as JSON can hold it."""
    return {name: value._asdict() if isinstance(value, Mean) else value for name, value in row._asdict().items()}


def check_family(family: families.Family, flag: str) -> None:
    """Raises UserError for a family whose likelihood has other settings."""
    if family.score_settings is not Settings:
        other = "evaluate.py --evaluators=likelihood measures it"
        raise UserError(f"{flag}: a run of family {family.name!r} has another likelihood; {other}")


def main() -> None:
    try:
        counts = sorted(int(value) for value in _SAMPLES.value)
    except ValueError:
        raise UserError(f"--samples = {','.join(_SAMPLES.value)}: must be numbers with commas between") from None
    _SETTINGS(Settings(samples=counts[0]))
    settings = _SETTINGS(Settings(samples=counts[-1]))
    if _PART.value == "speed":
        config = cli.read_config(_CONFIG)
        check_family(families.of(config), "--config")
        first, found = likelihood.speed(config, settings, _COUNT.value)
        log(f"{likelihood.describe(settings)}, K = {counts[-1]}: {found:.2f} s/sequence ({first:.2f} with compilation)")
    else:
        run = _LOAD()
        check_family(run.family, "--checkpoint")
        found = measure(run, settings, counts)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
