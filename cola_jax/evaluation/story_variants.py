"""Ways to write stories that flags name, in every combination."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from cola_jax.evaluation.stories import Variant
from cola_jax.runs import Run
from cola_jax.types import UserError


def _numbers(name: str, texts: Sequence[str], kind: Callable[[str], Any]) -> list:
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise UserError(f"--{name} = {','.join(texts)}: must be numbers with commas between") from None


def _conditioning(text: str) -> dict:
    name, *numbers = text.split(":")
    if name != "repaint" or not numbers:
        return {"conditioning": name}
    try:
        return {"conditioning": name, "repaint_cycles": int(numbers[0]), "repaint_fraction": float(numbers[1])}
    except (ValueError, IndexError):
        raise UserError(f"--conditioning = {text}: must be repaint:R:M, as repaint:3:0.7") from None


def combinations(
    run: Run,
    base: Any,
    guidance: Sequence[str] | None,
    steps: Sequence[str] | None,
    conditioning: Sequence[str] | None,
    prompted: bool,
    prompt_tokens: int,
    gap: int,
) -> list[Variant]:
    """Every combination of the ways to generate that flags name.

    Args:
      run: whose family must have these settings.
      base: settings for all of them.
      guidance, steps, conditioning: values of the flags --guidance, --steps and --conditioning; None: as ``base``.
      prompted, prompt_tokens, gap: see `Variant`.

    Raises:
      UserError: a value that is none, or that the family does not have.
    """
    ways = [_conditioning(text) for text in conditioning or ()] or [{}]
    given = (("guidance", guidance, "guidance_scale"), ("steps", steps, "steps"))
    for flag, texts, name in (*given, ("conditioning", conditioning, "conditioning")):
        if texts and not hasattr(base, name):
            raise UserError(f"--{flag}: the checkpoint's family {run.family.name!r} has no such setting")
    if gap and run.family.infill is None:
        raise UserError(f"--gap: family {run.family.name!r} only continues texts")
    kinds = {"guidance": float, "steps": int}
    axes = {name: _numbers(flag, texts, kinds[flag]) for flag, texts, name in given if texts}
    variants = []
    for way, *values in itertools.product(ways, *axes.values()):
        settings = dataclasses.replace(base, **dict(zip(axes, values, strict=True)), **way)
        settings.validate()
        variants.append(Variant(settings, prompted, prompt_tokens, gap))
    return variants
