"""Plans for devices that are not there, on the virtual devices of the tests."""

import dataclasses
import math

import jax
import pytest
from models.tiny_models import BLOCK, dit_config, vae_config

from cola_jax import config as configs
from cola_jax import families, sharding
from cola_jax.objectives.stage2 import Stage2Config
from cola_jax.train import plan
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
    assert made.fits and made.state < made.peak < 1000 * made.state
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
    made = plan.Report(2, 10**9, 2**30, 10**6, 90 * 2**30, False, 1e10, "TPU", 12.0)
    text = plan.describe(made, plan.parse_cluster("h100:8"), 0.5)
    assert "1,000,000,000 parameters" in text and "peak 90.00 GiB of 74.5 GiB: DOES NOT FIT (TPU compiler" in text
    assert "10.00 GFLOP a token: 395,600 tokens/s, 2.53 s a step, at 50 % of 8 x 989 TFLOP/s" in text
    assert "peak more than there is" in plan.describe(made._replace(peak=None), plan.parse_cluster("v4:2"), 0.5)


def test_bad_batches_are_refused_before_compilation():
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=12))
    with pytest.raises(UserError, match="config.data.batch_size = 12"):
        plan.compile_step(config, 1, sharding.make_mesh(configs.TrainConfig(), jax.devices()), CHIP, "CPU")


def test_the_tpu_compiler_s_complaint_is_read():
    assert plan._used("RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded") == int(20.5 * 2**30)
    assert plan._used("something else") is None
