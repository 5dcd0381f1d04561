"""What every binary shares: flags, the config flag, and errors reported in one line.

Exit status: see `cola_jax.train.interrupts`.
"""

import functools
import logging as python_logging
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from cola_jax import families, paths, runs
from cola_jax.cli_settings import config_help
from cola_jax.config import Config
from cola_jax.train import distributed, interrupts, trainer
from cola_jax.types import TemporaryError, UserError

flags.disclaim_key_flags()  # they are those of the binary that asks for them, and its --help lists them


def config_flag(name: str = "config"):
    """Defines ``--config=configs/x.py``; its fields are flags too (``--config.train.log_every=10``), unknown ones
    are errors. Returns the flag holder for `read_config`.
    """
    # Configs import each other as `configs.x`, from the folder above launch/.
    sys.path.append(str(Path(sys.argv[0]).resolve().parents[1]))
    return config_flags.DEFINE_config_file(name, lock_config=True, help_string=config_help(name))


def checkpoint_flags() -> Callable[[], runs.Run]:
    """Defines ``--checkpoint`` and what goes with it; returns a function that loads what they name."""
    path = flags.DEFINE_string("checkpoint", None, "directory of a run (--workdir of the training), or a released one")
    step = flags.DEFINE_integer("step", None, "step of the run's last stage; default: the newest checkpoint", 0)
    tokenizer = flags.DEFINE_string("tokenizer", None, "a tokenizer.json; default: the one in a released directory")
    ids = [flags.DEFINE_integer(name, -1, "special id; default: from the file", -1) for name in ("eos_id", "pad_id")]
    return lambda: runs.load(path.value, step.value, "--checkpoint", tokenizer.value, *(flag.value for flag in ids))


def machine_flags() -> Callable[[], None]:
    """Defines the flags of runs of several processes and of the compilation cache; returns a function that acts on
    them, to be called before anything touches a device. It may end the process (`distributed.initialize`).
    """
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of process 0; TPU VMs and SLURM need no flags")
    count = flags.DEFINE_integer("process_count", None, "processes of the run")
    index = flags.DEFINE_integer("process_id", None, "of this process, from 0")
    timeout = flags.DEFINE_float("join_timeout", distributed.JOIN_TIMEOUT, "seconds to wait for the other processes")
    use_cache = cache_flag()

    def start() -> None:
        use_cache()
        distributed.initialize(coordinator.value, count.value, index.value, timeout.value)

    return start


def cache_flag() -> Callable[[], None]:
    """Defines ``--compilation_cache``; returns a function that acts on it."""
    cache = flags.DEFINE_string("compilation_cache", None, "directory that keeps compiled programs; default: none")

    def use() -> None:
        if cache.value:
            paths.check(cache.value, "--compilation_cache")
            place = cache.value if paths.scheme(cache.value) else paths.local(cache.value, "--compilation_cache")
            jax.config.update("jax_compilation_cache_dir", str(place))

    return use


def profile_flag() -> Callable[[], tuple[int, int] | None]:
    """Defines ``--profile_steps=100:105``; returns a function that gives the first and the last step."""
    flag = flags.DEFINE_string("profile_steps", None, "FIRST:LAST step of the last stage, traced into WORKDIR/profile")

    def read() -> tuple[int, int] | None:
        if flag.value is None:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", flag.value)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--profile_steps = {flag.value}: must be FIRST:LAST with 1 <= FIRST <= LAST")
        return int(found[1]), int(found[2])

    return read


def read_config(flag) -> Config:
    """The validated config of a parsed `config_flag`.

    Raises:
      UserError: the flag is missing, the file cannot be read, a value is not allowed.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing: it must name a file such as configs/quickstart.py")
    path = config_flags.get_config_filename(flags.FLAGS[flag.name])
    try:
        # A file that cannot be read raises here, at the first use.
        values = flag.value.to_dict()
    except OSError as error:
        reason = "no such file" if "No such file" in str(error) else str(error).strip().splitlines()[-1]
        raise UserError(f"--{flag.name} = {path}: {reason}") from error
    return families.parse(values)


def _parse_error(error: Exception, argv: list[str]) -> str:
    """One line for what absl or config_flags raised while they parsed flags."""
    text = " ".join(str(error).split())
    if isinstance(error, (KeyError, AttributeError)):
        # config_flags tells the last part of the name only: 'stepz' Did you mean "steps" instead of "stepz"?
        found = re.search(r"'(\w+)'", text)
        name = found.group(1) if found else ""
        flag = next((a for a in argv if re.match(rf"--?\w+(\.\w+)*\.{name}\b", a)), None)
        if flag is not None:
            hint = re.search(r'Did you mean "(\w+)"', text)
            flag = flag.lstrip("-").split("=")[0]
            return f"{flag}: no such field" + (f"; did you mean {hint.group(1)}?" if hint else "")
    illegal = re.match(r"flag --(\S+?)=(.*?): (.*)", text)
    if illegal:
        name, value, reason = illegal.groups()
        return f"--{name} = {value!r}: {reason if reason.startswith('must be') else f'not allowed here ({reason})'}"
    if isinstance(error, flags.Error):
        return text
    return f"{type(error).__name__}: {text}"


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    if status == interrupts.RESTART and jax.distributed.is_initialized():
        os._exit(status)  # an orderly end would wait for the other processes, which wait for this one
    sys.exit(status)


def _fail_of(error: Exception) -> None:
    """Ends the process with the line of an error and the status that tells whether another start may mend it."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else text
    _fail(text, interrupts.RESTART if interrupts.is_temporary(error) else interrupts.BAD_INPUT)


# What may be in a bucket; in a config the functions that read a path say what it must be.
_MAY_BE_URLS = ("checkpoint", "from", "tokenizer", "compilation_cache", "scorer")


def _check_urls() -> None:
    """Ends the process for a flag with a URL where a path of this machine is needed, before anything is read."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        is_text = type(flag.parser) is flags.ArgumentParser and isinstance(flag.value, str)
        if is_text and "." not in name and name != "coordinator" and paths.scheme(flag.value):
            refuse = paths.directory if name == "workdir" else paths.check if name in _MAY_BE_URLS else paths.local
            try:
                refuse(flag.value, f"--{name}")
            except UserError as error:
                _fail(str(error), interrupts.BAD_INPUT)


def _check_finite() -> None:
    """Ends the process for a flag whose number is NaN or infinite: no bound of a flag refuses NaN."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if isinstance(flag.parser, flags.FloatParser) and flag.value is not None and not math.isfinite(flag.value):
            _fail(f"--{name} = {flag.value}: must be a finite number", interrupts.BAD_INPUT)


def _parse(argv: list[str], arguments: bool) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # a config file is Python: parsing it raises anything
        _fail(_parse_error(error, argv), interrupts.BAD_INPUT)
    _check_finite()
    _check_urls()
    if len(rest) > 1 and not arguments:
        _fail(f"unexpected argument {rest[1]!r}: every argument must be a flag, --name=value", interrupts.BAD_INPUT)
    return rest


def _quiet() -> None:
    """Keeps the information messages of libraries off the console."""
    logging.set_verbosity(logging.WARNING)
    for name in ("jax", "orbax", "grain"):
        python_logging.getLogger(name).setLevel(python_logging.WARNING)


def _use_huge_pages() -> None:
    """Starts the process again with huge pages for malloc, where that can be had and nobody asked otherwise.

    XLA's CPU backend takes its temporary buffers from malloc in every step; with small pages a quickstart step
    has 83,000 page faults, with huge ones 450, and takes half the time.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(main: Callable[..., None], arguments: bool = False, huge_pages: bool = False) -> None:
    """Parses the flags, runs ``main`` and exits; an error becomes one line, ``error: ...``, and a status.

    The status of a `UserError` is 2, of a `TemporaryError` 75; also 75 where a failing disk or network was behind a
    `UserError` or `OSError` (`interrupts.is_temporary`).

    Args:
      main: called without arguments, or with the list of those that are no flags.
      arguments: whether there may be such.
      huge_pages: for long computations; GLIBC_TUNABLES=glibc.malloc.hugetlb=0 in the environment prevents it.
    """
    if huge_pages:
        _use_huge_pages()
    distributed.reserve_threads()

    def guarded(argv) -> None:
        _quiet()
        try:
            main(*([argv[1:]] if arguments else []))
        except (UserError, TemporaryError) as error:
            _fail_of(error)
        except trainer.NonFiniteLoss as error:
            _fail(str(error), interrupts.DIVERGED)
        except interrupts.Interrupted as error:
            print(str(error), flush=True)
            sys.exit(error.status)
        except Exception as error:
            if isinstance(error, OSError) and interrupts.is_temporary(error):
                _fail_of(error)
            if not distributed.is_lost_peer(error):
                raise
            reason = " ".join(str(error).split())[:300]
            print(
                f"error: another process is lost; the same command resumes the run ({reason})",
                file=sys.stderr,
                flush=True,
            )
            os._exit(interrupts.RESTART)  # an orderly end would wait for the lost process

    app.run(guarded, flags_parser=functools.partial(_parse, arguments=arguments))
