"""The autoregressive baseline of paper_500m: same data, batch, optimizer and schedule, as many parameters.

    python launch/train.py --config=configs/paper_500m_ar.py --config.data.files=data/web

Not trained here.
"""

from configs import paper_2b_ar, paper_500m


def get_config():
    config = paper_2b_ar.get_config(paper_500m)
    config.transformer.update(dim=1024, ffn_dim=4096, num_heads=8, num_layers=24)
    return config
