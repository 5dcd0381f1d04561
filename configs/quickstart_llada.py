"""LLaDA on the quickstart's data: the network of quickstart_ar.py, which sees the whole text.

    python launch/train.py --config=configs/quickstart_llada.py

docs/families.md compares the families. A row is filled up with ends of text (data.align), so that the model learns
where a story ends.
"""

from configs import default, quickstart_ar


def get_config():
    config, ar = default.get_config("llada"), quickstart_ar.get_config()
    for group in ("data", "train", "evaluation", "transformer", "optimizer1"):
        config[group] = ar[group]
    config.data.align = config.data.sequence_length
    config.stage1.steps = ar.stage1.steps
    config.sample.max_new_tokens = 56
    return config
