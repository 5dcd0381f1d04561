"""Flags that follow from settings: what they give, what they refuse, and that --help of the binaries lists them."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from cola_jax import families, fields
from cola_jax.cli_settings import SettingsFlags, config_help
from cola_jax.fields import setting
from cola_jax.types import UserError

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Flow:
    steps: int = setting(16, "steps of the solver", at_least=1)
    temperature: float = setting(0.0, "of the draw", at_least=0)
    interval: tuple[float, float] = setting((0.0, 1.0), "from, to", at_least=0, at_most=1)
    period: int | None = setting(None, "of rotations", at_least=1)
    exact: bool = setting(False, "or estimated")
    eos_id: int | None = setting(None, "of the tokenizer", flag=False)

    def validate(self) -> None:
        fields.check(self, "flow ")

    def check_together(self, prefix: str) -> None:
        fields.require(self.steps > 1 or not self.exact, f"{prefix}steps", self.steps, "at least 2 where exact")


@dataclasses.dataclass(frozen=True)
class Tokens:
    temperature: float = setting(1.0, "of the draw", at_least=0)
    top_k: int = setting(0, "most likely", at_least=0)

    def validate(self) -> None:
        fields.check(self, "tokens ")


def parsed(*arguments: str, **options) -> SettingsFlags:
    values = flags.FlagValues()
    made = SettingsFlags([Flow, Tokens], flag_values=values, **options)
    values(["binary", *arguments])
    return made


def test_what_is_given_replaces_and_the_rest_stays():
    assert parsed()(Flow(steps=3)) == Flow(steps=3)
    apply = parsed("--steps=5", "--interval=0,0.5", "--period=7", "--exact", "--temperature=1")
    assert apply(Flow(eos_id=2)) == Flow(5, 1.0, (0.0, 0.5), 7, True, 2)
    assert parsed("--period=none", "--noexact", "--temperature=0")(Flow(period=7, exact=True)) == Flow()
    assert parsed("--temperature=2", "--top_k=3")(Tokens()) == Tokens(2.0, 3)


def test_a_prefix_keeps_flags_of_one_name_apart():
    apply = parsed("--score_steps=5", prefix="score_")
    assert apply(Flow(steps=3)) == Flow(steps=5)
    with pytest.raises(UserError, match="--score_steps: the checkpoint's family 'x' has no such setting"):
        apply(Tokens(), "x")
    with pytest.raises(UserError, match="--score_steps = 0: must be at least 1"):
        parsed("--score_steps=0", prefix="score_").check()
    with pytest.raises(UserError, match="--score_steps, --score_top_k: no model family has all of these settings"):
        parsed("--score_steps=1", "--score_top_k=1", prefix="score_").check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps = 0: must be at least 1"),
        (["--temperature=nan"], "--temperature = nan: must be a finite number"),
        (["--interval=0,2"], "--interval = (0.0, 2.0): must be each from 0 to 1"),
        (["--interval=0,0.5,1"], "--interval = (0.0, 0.5, 1.0): must be a value of type tuple[float, float]"),
    ],
)
def test_a_value_out_of_range_is_told_before_and_after_loading(arguments, message):
    for use in (parsed(*arguments).check, lambda: parsed(*arguments)(Flow())):
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value) == message


def test_whether_values_fit_each_other_is_told_with_those_of_the_run():
    parsed("--steps=1").check()
    assert parsed("--steps=1")(Flow()) == Flow(steps=1)
    parsed("--exact", "--steps=1").check()
    for flag, settings in (("--steps=1", Flow(exact=True)), ("--exact", Flow(steps=1))):
        with pytest.raises(UserError, match="flow steps = 1: must be at least 2 where exact"):
            parsed(flag)(settings)


def test_a_setting_of_another_family_is_told():
    with pytest.raises(UserError) as error:
        parsed("--steps=3")(Tokens(), "autoregressive")
    assert str(error.value) == "--steps: the checkpoint's family 'autoregressive' has no such setting"
    parsed("--top_k=3").check()
    with pytest.raises(UserError, match="--steps, --top_k: no model family has all of these settings"):
        parsed("--steps=3", "--top_k=3").check()


@pytest.mark.parametrize("argument", ["--steps=many", "--steps=2.5", "--interval=0,x", "--steps=none", "--eos_id=3"])
def test_what_is_no_value_or_no_flag_is_refused_in_parsing(argument):
    with pytest.raises(flags.Error):
        parsed(argument)


def test_a_skipped_field_has_no_flag():
    with pytest.raises(flags.UnrecognizedFlagError):
        parsed("--steps=3", skip=("steps",))


def test_help_says_meaning_range_and_default():
    values = flags.FlagValues()
    SettingsFlags([Flow, Tokens], of_run=("steps",), flag_values=values)
    assert values["steps"].help == "steps of the solver (at least 1; default: as the run's config says)"
    assert values["temperature"].help == "of the draw (at least 0; default: 0.0 or 1.0)"
    assert values["interval"].help == "from, to (each from 0 to 1; default: 0.0,1.0)"
    assert values["exact"].help == "or estimated (default: false)"


def test_a_config_s_fields_can_be_given_on_the_command_line():
    def config(*arguments: str):
        values = flags.FlagValues()
        given = ["binary", *arguments]
        default = families.default_config()
        flag = config_flags.DEFINE_config_dict("config", default, flag_values=values, sys_argv=given)
        values(given)
        return families.parse(flag.value)

    assert config() == families.cola.ColaConfig()
    found = config("--config.data.seed=3", "--config.vae.logsnr=2", "--config.train.milestone_steps=(5,10)")
    assert (found.data.seed, found.vae.logsnr, found.train.milestone_steps) == (3, 2.0, (5, 10))
    assert config("--config.train.init_from=runs/x").train.init_from == "runs/x"
    assert config("--config.train.init_from={'vae': 'runs/x'}").train.init_from == {"vae": "runs/x"}


def test_config_help_lists_every_field_of_every_family():
    text = config_help()
    for family in families.FAMILIES.values():
        for entry in fields.entries(family.config).values():
            assert f"--config.{entry.name} = " in text and entry.rule.meaning in text


@pytest.fixture(scope="module")
def helps() -> dict[str, dict[str, str]]:
    """What --helpfull of each binary says of the flags of each module; --help says the same of its own."""
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    started = {
        path.name: subprocess.Popen(
            [sys.executable, path, "--helpfull"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        for path in (ROOT / "launch").glob("*.py")
        if path.name != "harness.py"  # whose flags are lm-eval's
    }
    outputs = {name: process.communicate()[0] for name, process in started.items()}
    return {name: sections(output.partition("\nflags:\n")[2]) for name, output in outputs.items()}


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^(\S+):$", text, flags=re.MULTILINE)
    return {Path(name).name: squeezed(flags) for name, flags in zip(parts[1::2], parts[2::2], strict=True)}


def squeezed(text: str) -> str:
    """Without white space: --help breaks lines at spaces and hyphens."""
    return "".join(text.split())


@pytest.mark.slow
def test_every_flag_of_ours_is_in_the_help_of_its_binary(helps):
    for name, found in helps.items():
        assert name in found, name
        assert not [module for module in found if module.startswith("cola_jax")], name
    assert "--checkpoint:" in helps["sample.py"]["sample.py"] and "--config:" in helps["train.py"]["train.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "skip"),
    [
        ("sample.py", "settings", set()),
        ("score.py", "score_settings", set()),
        ("likelihood.py", "score_settings", {"samples"}),
        ("evaluate.py", "settings", {"conditioning", "guidance_scale", "repaint_cycles", "repaint_fraction", "steps"}),
    ],
)
def test_help_lists_every_setting_with_its_meaning(helps, name, kind, skip):
    for family in families.FAMILIES.values():
        for entry in fields.entries(getattr(family, kind)).values():
            if entry.rule.flag and entry.name not in skip:
                of_flag = re.split(rf"--(?:\[no\])?{entry.name}:", helps[name][name])[1].partition("default:")[0]
                assert squeezed(entry.rule.meaning) in of_flag, entry.name
