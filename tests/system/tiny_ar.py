"""The autoregressive family on the data of `tiny`."""

from configs import default
from tests.system import tiny


def get_config():
    config, cola = default.get_config("autoregressive"), tiny.get_config()
    config.data, config.train, config.evaluation = cola.data, cola.train, cola.evaluation
    config.transformer.update(dim=16, ffn_dim=32, num_heads=2, head_dim=8, num_layers=2)
    config.stage1.steps, config.optimizer1 = 20, cola.optimizer2
    config.sample.update(max_new_tokens=16, temperature=1.0)
    return config
