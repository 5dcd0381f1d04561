"""Plans for devices that are not there, on the virtual devices of the tests."""

import dataclasses
import math
import types

import jax
import pytest
from models.tiny_models import BLOCK, dit_config, vae_config

from cola_jax import config as configs
from cola_jax import families, sharding
from cola_jax.objectives.stage2 import Stage2Config
from cola_jax.train import collectives, plan
from cola_jax.train import state as states
from cola_jax.types import UserError

CONFIG = families.cola.ColaConfig(
    data=configs.DataConfig(sequence_length=2 * BLOCK, batch_size=16),
    vae=vae_config(),
    dit=dit_config(),
    stage2=Stage2Config(strategy="joint"),
)
CHIP = plan.CHIPS["h100"]


def report(stage, **mesh):
    made = sharding.make_mesh(configs.TrainConfig(**mesh), jax.devices())
    return plan.compile_step(CONFIG, stage - 1, made, CHIP, "CPU")


def test_cluster_names():
    assert plan.parse_cluster("v5e:4x4").count == 16 and plan.parse_cluster("h100:8").shape == (8,)
    for text in ("v5e", "v5e:", "h100:0", "h100:8x", "tpu:8", "h100:-1"):
        with pytest.raises(UserError, match=f"--plan = {text}: must be CHIP:COUNT"):
            plan.parse_cluster(text)


def held(stage, **mesh):
    """Bytes of the state on a device."""
    model = families.cola.make_model(CONFIG)
    own = families.cola.make_stages(model, CONFIG)[stage - 1]
    make = states.make_init(families.cola.make_init(model, CONFIG), own)
    return plan._bytes(states.abstract(make, sharding.make_mesh(configs.TrainConfig(**mesh), jax.devices())))


@pytest.mark.slow
def test_a_report_counts_what_a_device_holds():
    made = report(1, mesh_data=1)
    assert math.isclose(made.state, 3 * made.parameters * 4, rel_tol=1e-3)  # parameters and two moments
    assert made.fits and made.state < made.peak < 1000 * made.state and made.evaluation_peak < made.peak
    assert not any(made.collectives.values())
    assert made.batch == 16 * 2 * BLOCK and made.flops_per_token == families.cola.flops_per_token(CONFIG, 1)


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "splash"), ("cpu", "xla")])
def test_a_plan_has_the_kernels_of_its_devices(platform, kernel):
    dit = dataclasses.replace(CONFIG.dit, head_dim=128)
    config = dataclasses.replace(CONFIG, dit=dit, data=configs.DataConfig(sequence_length=128))
    found = plan.with_kernels(config, platform)
    assert (found.dit.attention_kernel, found.vae.attention_kernel) == (kernel, "xla")  # the VAE's heads are too small


def test_fsdp_shares_the_state_out():
    assert held(1, mesh_data=1) < held(2, mesh_data=1)
    assert held(2, mesh_data=8) == held(2, mesh_data=1) > 2 * held(2, mesh_data=1, mesh_fsdp=8)


def test_the_lines_of_a_report():
    moved = dict.fromkeys(collectives.KINDS, 0.0) | {"all-gather": 450e9, "all-reduce": 45e9}
    made = plan.Report(2, 10**9, 2**30, 10**6, 60 * 2**30, 90 * 2**30, False, 1e10, "TPU", 12.0, moved)
    cluster = plan.parse_cluster("h100:8")
    text = plan.describe(made, cluster, 0.5)
    assert "1,000,000,000 parameters" in text
    assert "peak 60.00 GiB, in evaluation 90.00 GiB, of 74.5 GiB: DOES NOT FIT (TPU compiler" in text
    assert "10.00 GFLOP a token: 395,600 tokens/s, 2.53 s a step, at 50 % of 8 x 989 TFLOP/s" in text
    # 1e16 FLOP at 8 x 989 TFLOP/s are 1.264 s, 495 GB at 450 GB/s 1.1 s.
    assert "send 495.00 GB a device and step (all-gather 450.00, all-reduce 45.00): MFU at most 100 %, or 53 %" in text
    slower = made._replace(collectives=moved | {"all-gather": 900e9})
    assert plan.utilisation_limits(slower, cluster) == pytest.approx((1.2639 / 2.1, 1.2639 / 3.3639), rel=1e-4)
    text = plan.describe(made._replace(peak=None, collectives=None), plan.parse_cluster("v4:2"), 0.5)
    assert "peak more than there is" in text and "collectives" not in text


class _Program:
    """Looks like a lowered program: of so many bytes, or too many for the compiler."""

    def __init__(self, size):
        self.size = size

    def compile(self):
        if self.size is None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no number")
        return self

    def memory_analysis(self):
        names = ("argument", "output", "alias", "temp", "generated_code")
        return types.SimpleNamespace(
            **{f"{name}_size_in_bytes": 0 for name in names} | {"temp_size_in_bytes": self.size}
        )

    def as_text(self):
        return "ENTRY %main {\n}"


@pytest.mark.parametrize(
    ("training", "evaluation", "fits"),
    [(70e9, 60e9, True), (81e9, 60e9, False), (70e9, 81e9, False), (None, 1e9, False), (1e9, None, False)],
)
def test_the_larger_peak_decides(monkeypatch, training, evaluation, fits):
    """Of training and evaluation; beside the latter lies what it does not read."""
    monkeypatch.setattr(plan.step, "make_train_step", lambda *_, **__: types.SimpleNamespace(lower=lambda *_: one))
    monkeypatch.setattr(plan.step, "make_eval_step", lambda *_, **__: types.SimpleNamespace(lower=lambda *_: two))
    one, two = (_Program(size and int(size)) for size in (training, evaluation))
    made = report(1, mesh_data=1)
    assert made.fits == fits and made.peak == one.size
    if evaluation is not None:
        assert made.evaluation_peak - two.size == pytest.approx(2 / 3 * made.state, rel=1e-3)  # both moments


def test_evaluation_has_the_microbatches_of_training(monkeypatch):
    seen = {}

    def make(*_, **options):
        seen.update(options)
        return types.SimpleNamespace(lower=lambda *_: _Program(1))

    monkeypatch.setattr(
        plan.step, "make_train_step", lambda *_, **__: types.SimpleNamespace(lower=lambda *_: _Program(1))
    )
    monkeypatch.setattr(plan.step, "make_eval_step", make)
    config = dataclasses.replace(CONFIG, optimizer1=configs.OptimizerConfig(accumulation=4))
    plan.compile_step(config, 0, sharding.make_mesh(configs.TrainConfig(mesh_data=1), jax.devices()), CHIP, "CPU")
    assert seen["microbatches"] == 4


def test_bad_batches_are_refused_before_compilation():
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=12))
    with pytest.raises(UserError, match="config.data.batch_size = 12"):
        plan.compile_step(config, 1, sharding.make_mesh(configs.TrainConfig(), jax.devices()), CHIP, "CPU")


def test_the_tpu_compiler_s_complaint_is_read():
    assert plan._used("RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded") == int(20.5 * 2**30)
    assert plan._used("something else") is None
