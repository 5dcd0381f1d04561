import json
import math

import pytest
import toy_model

from cola_jax import families
from cola_jax.train import reports


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_truncation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entries = [{"stage": stage, "step": step} for stage in (1, 2) for step in (1, 5, 9)]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    for torn in ('{"stage": 1, "st', '{"stage": 2, "step": 5}', "\x00\x00"):
        path.write_text(text + torn)
        reports.truncate(path, 2, 5)
        assert lines(path) == entries[:5]
    reports.truncate(path, 1, 5)
    assert lines(path) == entries[:2]
    reports.truncate(path, 1, 0)
    assert path.read_bytes() == b""
    reports.truncate(tmp_path / "none.jsonl", 1, 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_writer(tmp_path):
    said = []
    writer = reports.Writer(tmp_path, 1, 0, 100, reports.Cost(1e6, 500, 0.0, 4e9), log=said.append)
    values = {
        "finite": 1.0,
        "kl": 2.0,
        "learning_rate": 0.01,
        "loss": 0.25,
        "logsnr": 2.5,
        "update_norm": 0.1,
        "grad_norm/vae": math.nan,
    }
    writer.train(10, values, reports.Lap(2.0, 4000, 10, waited=0.5))
    writer.holdout(10, {"loss": 0.5})
    writer.samples(10, ["one\ntwo"])
    writer.close()
    assert said[0] == (
        "stage 1  step 10/100  loss 0.25  kl 2  logsnr 2.5  2k tokens/s  2GFLOP/s  MFU 50.0 %  "
        "5e-09 EFLOP so far  data wait 25 %  ETA 0:00:18  lr 0.01"
    )
    assert said[1] == "stage 1  step 10/100  held out: loss 0.5" and said[2] == "  sample: 'one\\ntwo'"
    train, holdout = lines(tmp_path / "metrics.jsonl")
    assert (
        train["kl"] == 2.0
        and train["kind"] == "train"
        and holdout == dict(stage=1, step=10, kind="holdout", loss=0.5, exaflops=5e-9)
    )
    (timing,) = lines(tmp_path / "timing.jsonl")
    assert timing["tokens_per_second"] == 2000 and timing["flops_per_second"] == 2e9 and timing["step_seconds"] == 0.2
    assert timing["mfu"] == 0.5 and timing["data_wait_share"] == 0.25 and timing["exaflops"] == 5e-9
    assert train["grad_norm/vae"] is None
    assert lines(tmp_path / "samples.jsonl") == [{"stage": 1, "step": 10, "texts": ["one\ntwo"]}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_an_inactive_writer_writes_nothing(tmp_path):
    writer = reports.Writer(tmp_path, 1, 0, 100, reports.Cost(1.0), active=False)
    writer.train(1, {"loss": 1.0, "learning_rate": 0.1}, None)
    writer.holdout(1, {"loss": 1.0})
    writer.samples(1, ["text"])
    writer.flush()
    writer.close()
    assert not list(tmp_path.iterdir())


def test_flops_of_the_real_size():
    """In GFLOP per token: DiT 14.8, VAE 2.1, mask pass 1.5, reference 0.2."""
    values = {
        "data": {"sequence_length": 512, "batch_size": 8},
        "vae": {
            "vocab_size": 100278,
            "dim": 1536,
            "ffn_dim": 6144,
            "num_heads": 12,
            "encoder_layers": 4,
            "decoder_layers": 4,
        },
        "dit": {
            "dim": 2048,
            "num_heads": 16,
            "head_dim": 128,
            "num_layers": 24,
            "block_size": 16,
            "time_dim": 2048,
            "rope_dim": 64,
        },
        "stage2": {"strategy": "joint", "reference_weight": 0.01},
    }
    config = families.parse(values)
    assert families.cola.flops_per_token(config, 1) / 1e9 == pytest.approx(2.1 + 1.5, rel=0.05)
    assert families.cola.flops_per_token(config, 2) / 1e9 == pytest.approx(19.0, rel=0.03)


def test_flops_fall_with_what_is_left_out():
    joint = toy_model.config(stage2={"strategy": "joint"})
    fixed = toy_model.config(stage2={"strategy": "fix_vae"})
    no_mask = toy_model.config(stage2={"strategy": "joint", "mask_weight": 0.0})
    costs = [families.cola.flops_per_token(config, 2) for config in (fixed, no_mask, joint)]
    assert 0 < costs[0] < costs[1] < costs[2]
