"""The LLaDA baseline of paper_500m: same data, batch, optimizer and schedule, the network of paper_500m_ar.

    python launch/train.py --config=configs/paper_500m_llada.py --config.data.files=data/web

Not trained here.
"""

from configs import paper_2b_llada, paper_500m_ar


def get_config():
    return paper_2b_llada.get_config(paper_500m_ar)
