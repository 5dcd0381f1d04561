"""LLaDA on any UTF-8 text: the network of text_ar.py, which sees the whole text.

    python launch/train.py --config=configs/text_llada.py --config.data.files=corpus.txt --workdir=runs/corpus_llada

docs/families.md compares the families.
"""

from configs import default, text_ar


def get_config():
    config, ar = default.get_config("llada"), text_ar.get_config()
    for group in ("data", "train", "evaluation", "transformer", "optimizer1"):
        config[group] = ar[group]
    config.stage1.steps = ar.stage1.steps
    config.sample.max_new_tokens = 128
    return config
