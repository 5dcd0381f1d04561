"""What the benchmark counts, and that its rows hold together."""

import pytest
from models.tiny_models import BLOCK, dit_config, vae_config

from cola_jax import config as configs
from cola_jax import families, sampling
from cola_jax.evaluation import benchmark
from cola_jax.models.dit_config import DiTConfig


def test_flops_of_a_new_token():
    """8 layers of 512, 16 steps, guidance: 33 passes by 25.2 million weights."""
    dit = DiTConfig(dim=512, num_heads=8, head_dim=64, num_layers=8)

    def flops(patch=1, **settings):
        vae = vae_config(patch_size=patch)
        config = families.cola.ColaConfig(vae=vae, dit=dit)
        return families.cola.generation_flops(config, sampling.Settings(**settings))

    assert flops() == 2 * 33 * 8 * 12 * 512**2
    assert flops(guidance_scale=1.0) == 2 * 17 * 8 * 12 * 512**2
    assert flops(2, solver="heun", steps=4) == 17 * 8 * 12 * 512**2
    # 8 of the 16 steps begin at 0.5 or below
    assert flops(guidance_interval=(0.0, 0.5)) == 2 * (1 + 16 + 8) * 8 * 12 * 512**2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["generation", "training"])
def test_a_row(what, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul", lambda dtype, size, repeats: (lambda: 0, 1e6))
    data = configs.DataConfig(sequence_length=2 * BLOCK, vocab_size=300)
    config = families.cola.ColaConfig(data=data, vae=vae_config(), dit=dit_config())
    if what == "generation":
        settings = sampling.Settings(steps=1, max_new_tokens=3)
        row = benchmark.generation(config, "float32", 2, 5, settings, 1)
        assert row["tokens_per_s"] == pytest.approx(2 * 3 / row["seconds"])
        assert row["flops_per_token"] == families.cola.generation_flops(config, settings)
    else:
        row = benchmark.training(config, "float32", 8, 1)  # a row for each device
        assert row["tokens_per_s"] == pytest.approx(8 * 2 * BLOCK / row["seconds"])
    assert row["share_of_matmul"] == pytest.approx(row["flops_per_s"] / row["matmul_flops_per_s"])
    assert row["peak_memory_bytes"] > 1e6 and row["compile_s"] > 0
