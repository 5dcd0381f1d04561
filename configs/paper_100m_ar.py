"""The autoregressive baseline of paper_100m: same data, batch, optimizer and schedule, as many parameters.

    python launch/train.py --config=configs/paper_100m_ar.py --config.data.files=data/web

Not trained here.
"""

from configs import paper_2b_ar, paper_100m


def get_config():
    config = paper_2b_ar.get_config(paper_100m)
    config.transformer.update(dim=512, ffn_dim=2048, num_heads=8, head_dim=64, num_layers=14, remat="none")
    return config
