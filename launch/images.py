"""Draws images for texts with a joint model of text and images, describes images, or scores the corpus `scenes`.

    python launch/images.py --checkpoint=runs/scenes "A small red circle left of a blue square." --out=sheet.png
    python launch/images.py --checkpoint=runs/scenes --mode=describe picture.png
    python launch/images.py --checkpoint=runs/scenes --mode=scenes --count=256 --guidance_scale=2
    python launch/images.py --checkpoint=runs/scenes --mode=curves --count=128 --json=curves.json

draw writes a sheet of --copies images a text; an empty text draws from nothing. describe prints a text for each image
file. scenes prints all scores of a run on held-out pictures, and curves those of drawing by guidance and by steps.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from absl import flags

from cola_jax import cli, cli_settings
from cola_jax.data import captioned_images
from cola_jax.evaluation import galleries, scenes
from cola_jax.families.unified import UnifiedConfig
from cola_jax.sampling.images import ImageSettings
from cola_jax.types import UserError

_LOAD, _SETTINGS = cli.checkpoint_flags(), cli_settings.SettingsFlags([ImageSettings])
_MODE = flags.DEFINE_enum("mode", "draw", ["draw", "describe", "scenes", "curves"], "what to do")
_OUT = flags.DEFINE_string("out", "images.png", "mode draw: PNG file of the sheet")
_COPIES = flags.DEFINE_integer("copies", 4, "mode draw: images of each text", 1)
_COUNT = flags.DEFINE_integer("count", 256, "modes scenes and curves: held-out pictures, and texts and images made", 1)
_SEED = flags.DEFINE_integer("seed", 0, "of the noise; image i depends on (seed, i) and its text alone")
_JSON = flags.DEFINE_string("json", None, "modes scenes and curves: file for the numbers")

log = functools.partial(print, flush=True)


def draw(run, texts: list[str], settings: ImageSettings) -> None:
    captions = [text for text in texts for _ in range(_COPIES.value)]
    images = scenes.draw(run, captions, settings, _SEED.value, log)
    galleries.write(Path(_OUT.value), images, captions, columns=max(_COPIES.value, 4))
    log(f"{len(images)} images are in {_OUT.value}")


def describe(run, files: list[str]) -> None:
    pictures = []
    for file in files:
        try:
            pictures.append(captioned_images.decode(Path(file).read_bytes(), run.config.data.image_size))
        except (OSError, UserError) as error:
            raise UserError(f"{file}: must be an image that can be read ({error})") from error
    found = scenes.describe(run, np.stack(pictures), run.settings, _SEED.value, lambda line: None)
    for file, text in zip(files, found, strict=True):
        log(f"{file}: {text}")


def main(arguments: list[str]) -> None:
    scoring = _MODE.value in ("scenes", "curves")
    if scoring == bool(arguments):
        need = "no arguments" if scoring else "a text or more" if _MODE.value == "draw" else "an image file or more"
        raise UserError(f"--mode={_MODE.value}: must have {need}")
    _SETTINGS.check()
    if _MODE.value == "draw":
        galleries.check(Path(_OUT.value), "--out")
    run = _LOAD()
    if not isinstance(run.config, UnifiedConfig):
        raise UserError(f"--checkpoint: is of family {run.config.family!r}, must be of a family with images: 'unified'")
    if scoring and run.config.data.corpus != "scenes":
        raise UserError(f"--mode={_MODE.value}: the run's corpus is {run.config.data.corpus!r}, must be 'scenes'")
    settings = _SETTINGS(run.config.image_sample, run.family.name)
    if _MODE.value == "draw":
        return draw(run, arguments, settings)
    if _MODE.value == "describe":
        return describe(run, arguments)
    if _MODE.value == "curves":
        table = scenes.curves(run, settings, _COUNT.value, _SEED.value, log)
        found = {
            field: {f"{value:g}": scenes.as_dict(shares) for value, shares in row.items()}
            for field, row in table.items()
        }
    else:
        run = run._replace(config=dataclasses.replace(run.config, image_sample=settings))
        report = scenes.report(run, _COUNT.value, _SEED.value, log)
        found = {name: scenes.as_dict(shares) for name, shares in report.items()}
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, arguments=True)
