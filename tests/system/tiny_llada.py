"""LLaDA on the data of `tiny`."""

from configs import default
from tests.system import tiny_ar


def get_config():
    config, ar = default.get_config("llada"), tiny_ar.get_config()
    for group in ("data", "train", "evaluation", "transformer", "optimizer1"):
        config[group] = ar[group]
    config.data.align = config.data.sequence_length
    config.stage1.steps = 20
    config.sample.max_new_tokens = 16
    return config
