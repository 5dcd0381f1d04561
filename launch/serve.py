"""Serves a trained model to clients of OpenAI's interface, and a page to type in.

    python launch/serve.py --checkpoint=runs/quickstart
    python launch/serve.py --checkpoint=runs/quickstart --batch_sizes=1,16,64 --offer=steps=8 --compilation_cache=cache
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "quickstart", "prompt": "Mia was a girl", "max_tokens": 20}'

Needs the extra [serve]. SIGTERM ends it when what has begun is finished. docs/serving.md has fields, limits, metrics.
"""

import asyncio
import logging
from pathlib import Path

from absl import flags

from cola_jax import cli, cli_settings
from cola_jax.serving.settings import ServeSettings
from cola_jax.types import UserError

_LOAD, _SETTINGS = cli.checkpoint_flags(), cli_settings.generation_flags(skip=("max_new_tokens",))
_LIMITS, _CACHE = cli_settings.SettingsFlags([ServeSettings]), cli.cache_flag()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at; the default reaches this machine only")
_PORT = flags.DEFINE_integer("port", 8000, "0: any that is free", 0, 65535)
_NAME = flags.DEFINE_string("model_name", None, "of the model, for clients; default: the last part of --checkpoint")
_OFFERS = flags.DEFINE_multi_string("offer", [], "settings that requests may ask for, as steps=8,guidance_scale=3")
_TEMPLATE = flags.DEFINE_string("chat_template", None, "a Jinja file; default: the checkpoint's, if it has one")
_KEY_FILE = flags.DEFINE_string("api_key_file", None, "a file with the key that requests must bear; default: none")
_LOG_TEXTS = flags.DEFINE_bool("log_texts", False, "write prompts to the log")


def _key() -> str | None:
    if _KEY_FILE.value is None:
        return None
    try:
        key = Path(_KEY_FILE.value).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file = {_KEY_FILE.value}: must be a UTF-8 file with a key ({error})") from error
    if not key:
        raise UserError(f"--api_key_file = {_KEY_FILE.value}: empty; must hold a key")
    return key


def main() -> None:
    try:
        from cola_jax.serving import server, start
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name}: pip install 'cola_jax[serve]'") from None
    _SETTINGS.check()
    limits, key = _LIMITS(ServeSettings()), _key()
    _CACHE()
    with server.bind(_HOST.value, _PORT.value) as sock:
        run = _LOAD()
        place = Path(flags.FLAGS.checkpoint)
        asked = start.Asked(
            _SETTINGS(run.settings, run.family.name), limits, _NAME.value or place.resolve().name, _OFFERS.value,
            place, _TEMPLATE.value, key, _LOG_TEXTS.value,
        )  # fmt: skip
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("cola_jax.serving").setLevel(logging.INFO)
        asyncio.run(_serve(server, start, run, asked, sock))


async def _serve(server, start, run, asked, sock) -> None:
    found = start.start(run, asked, lambda line: print(line, flush=True))
    host, port = sock.getsockname()[:2]
    if not server.is_loopback(host) and asked.api_key is None:
        print("warning: other machines reach this address, and --api_key_file is not given", flush=True)
    print(f"{asked.name}: http://{host}:{port}", flush=True)
    try:
        await server.Server(found.app, found.batcher, asked.limits.drain_seconds).serve(sockets=[sock])
    finally:
        found.batcher.stop()


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
