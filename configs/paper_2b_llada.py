"""The paper's LLaDA baseline (Table 9): the network of paper_2b_ar, which sees the whole row.

    python launch/train.py --config=configs/paper_2b_llada.py --config.data.files=data/web

Data, batch, optimizer, schedule and seeds are those of paper_2b (Table 10). Not trained here; the tests check its size.
"""

from configs import default, paper_2b_ar


def get_config(ar=paper_2b_ar):
    config, ar = default.get_config("llada"), ar.get_config()
    for group in ("data", "train", "transformer", "optimizer1"):
        config[group] = ar[group]
    config.seed, config.stage1.steps = ar.seed, ar.stage1.steps
    config.stage1.random_length = 0.01
    config.sample.update(max_new_tokens=32, temperature=0.0, remasking="low_confidence")
    return config
