"""Plaid on the data of `tiny`."""

from configs import default
from tests.system import tiny_ar


def get_config():
    config, ar = default.get_config("plaid"), tiny_ar.get_config()
    for group in ("data", "train", "evaluation", "optimizer1"):
        config[group] = ar[group]
    config.data.align = config.data.sequence_length
    config.dit.update(
        block_size=56, latent_dim=4, dim=16, num_heads=2, head_dim=8, num_layers=2, time_dim=16, rope_dim=8
    )
    config.stage1.steps = 20
    config.sample.update(steps=2, max_new_tokens=16)
    return config
