"""Draws images for texts with a joint model of text and images, describes images, scores pairs and the corpus `scenes`.

    python launch/images.py --checkpoint=runs/scenes "A small red circle left of a blue square." --out=sheet.png
    python launch/images.py --checkpoint=runs/scenes --mode=describe picture.png
    python launch/images.py --checkpoint=runs/scenes --mode=scenes --count=256 --guidance_scale=2
    python launch/images.py --checkpoint=runs/scenes --mode=curves --count=128 --json=curves.json
    python launch/images.py --checkpoint=runs/emoji --mode=held_out --count=24 --out=sheet.png --probe=flat,round
    python launch/images.py --checkpoint=runs/scenes --mode=likelihood --count=64 --candidates=8 --likelihood_samples=1

draw writes a sheet of --copies images a text; an empty text draws from nothing. describe prints a text for each image
file. scenes prints all scores of a run on held-out pictures, and curves those of drawing by guidance and by steps.
held_out, for any corpus of pictures, prints the errors of reconstruction and writes a sheet of held-out pictures, each
with one that is drawn for its caption. With --probe a linear probe also says which of these words of the captions the
pictures show. likelihood prints bounds on the log-probability of held-out images (or of those of a file of JSON lines,
with a path and a text each) in bits per channel of a pixel, and how often an image's own text fits best among
--candidates.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from absl import flags

from cola_jax import cli, cli_settings
from cola_jax.data import captioned_images
from cola_jax.evaluation import galleries, pairs, pictures, scenes
from cola_jax.families.unified import UnifiedConfig
from cola_jax.likelihood import Settings
from cola_jax.sampling.images import ImageSettings
from cola_jax.types import UserError

_LOAD, _SETTINGS = cli.checkpoint_flags(), cli_settings.SettingsFlags([ImageSettings])
_SCORING = cli_settings.SettingsFlags([Settings], skip=["prefix"], prefix="likelihood_")
_MODES = ["draw", "describe", "scenes", "curves", "held_out", "likelihood"]
_MODE = flags.DEFINE_enum("mode", "draw", _MODES, "what to do")
_OUT = flags.DEFINE_string("out", "images.png", "modes draw and held_out: PNG file of the sheet")
_COPIES = flags.DEFINE_integer("copies", 4, "mode draw: images of each text", 1)
_COUNT = flags.DEFINE_integer("count", 256, "modes that score: held-out pictures, and texts and images made", 1)
_PROBE = flags.DEFINE_list("probe", [], "mode held_out: words; captions that hold exactly one of them are used")
_PROBE_PICTURES = flags.DEFINE_integer("probe_pictures", 4096, "training pictures of a probe, at most", 2)
_CANDIDATES = flags.DEFINE_integer("candidates", 8, "mode likelihood: texts of which one is the image's own", 2)
_SEED = flags.DEFINE_integer("seed", 0, "of the noise; image i depends on (seed, i) and its text alone")
_JSON = flags.DEFINE_string("json", None, "modes that score: file for the numbers")

log = functools.partial(print, flush=True)


def draw(run, texts: list[str], settings: ImageSettings) -> None:
    captions = [text for text in texts for _ in range(_COPIES.value)]
    images = pictures.draw(run, captions, settings, _SEED.value, log)
    galleries.write(Path(_OUT.value), images, captions, columns=max(_COPIES.value, 4))
    log(f"{len(images)} images are in {_OUT.value}")


def describe(run, files: list[str]) -> None:
    decoded = []
    for file in files:
        try:
            decoded.append(captioned_images.decode(Path(file).read_bytes(), run.config.data.image_size))
        except (OSError, UserError) as error:
            raise UserError(f"{file}: must be an image that can be read ({error})") from error
    found = pictures.describe(run, np.stack(decoded), run.settings, _SEED.value, lambda line: None)
    for file, text in zip(files, found, strict=True):
        log(f"{file}: {text}")


def held_out(run, settings: ImageSettings) -> dict:
    """Scores of held-out pictures and of those that are drawn for their captions, and a sheet of both."""
    words = _PROBE.value
    probe = pictures.probe(run, words, _PROBE_PICTURES.value) if words else None
    real = pictures.held_out(run, _COUNT.value)
    decoded = pictures.reconstructed(run, real.pictures, log)
    errors = pictures.reconstruction(real.pictures, decoded)
    log(f"reconstruction: absolute error {errors['absolute']} of the pixels' range, {errors['psnr']} dB")
    found: dict = {"reconstruction": {name: value._asdict() for name, value in errors.items()}}
    drawn = pictures.draw(run, real.captions, settings, _SEED.value, log)
    if probe is not None:
        wanted = pictures.word_of(real.captions, words)
        shares = {
            name: pictures.told_apart(probe(run, images), wanted)
            for name, images in (("held_out", real.pictures), ("drawn", drawn))
        }
        log("probe of the captions' words: " + ", ".join(f"{name} {share}" for name, share in shares.items()))
        found["probe"] = scenes.as_dict(shares)
    both = np.stack([real.pictures, drawn], axis=1).reshape(-1, *drawn.shape[1:])
    captions = [text for caption in real.captions for text in (caption, "drawn")]
    galleries.write(Path(_OUT.value), both, captions, columns=12)
    log(f"{len(drawn)} held-out pictures and drawn ones are in {_OUT.value}")
    return found


def bounds(run, files: list[str]) -> dict:
    settings = _SCORING(Settings(), run.family.name)
    run.family.check_scorable(run.model, run.params)
    found = pairs.of_file(run, files[0]) if files else pictures.held_out(run, _COUNT.value)
    observed = pairs.fitted(run, _SEED.value)
    log(f"pixels, fitted on training images: {observed.kind} of scale {observed.scale:.3f}")
    report = pairs.report(run, found, observed, settings, _CANDIDATES.value, _SEED.value, log)
    return {"pixels": dataclasses.asdict(observed), "count": len(found.captions), **pairs.as_dict(report)}


def main(arguments: list[str]) -> None:
    scoring, likely = _MODE.value in ("scenes", "curves", "held_out"), _MODE.value == "likelihood"
    if likely and len(arguments) > 1:
        raise UserError("--mode=likelihood: must have one file of JSON lines, or no argument")
    if not likely and scoring == bool(arguments):
        need = "no arguments" if scoring else "a text or more" if _MODE.value == "draw" else "an image file or more"
        raise UserError(f"--mode={_MODE.value}: must have {need}")
    _SETTINGS.check()
    _SCORING.check()
    if _MODE.value in ("draw", "held_out"):
        galleries.check(Path(_OUT.value), "--out")
    run = _LOAD()
    if not isinstance(run.config, UnifiedConfig):
        raise UserError(f"--checkpoint: is of family {run.config.family!r}, must be of a family with images: 'unified'")
    if _MODE.value in ("scenes", "curves") and run.config.data.corpus != "scenes":
        raise UserError(f"--mode={_MODE.value}: the run's corpus is {run.config.data.corpus!r}, must be 'scenes'")
    settings = _SETTINGS(run.config.image_sample, run.family.name)
    if _MODE.value == "draw":
        return draw(run, arguments, settings)
    if _MODE.value == "describe":
        return describe(run, arguments)
    if likely:
        found = bounds(run, arguments)
    elif _MODE.value == "held_out":
        found = held_out(run, settings)
    elif _MODE.value == "curves":
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
