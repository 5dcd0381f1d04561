"""The paper's autoregressive baseline (Table 9): 27 layers, 1.81B in the layers and 0.41B in the embeddings.

    python launch/train.py --config=configs/paper_2b_ar.py --config.data.files=data/web
    python launch/train.py --config=configs/paper_2b_ar.py --plan=v5e:4x4

Data, batch, optimizer, schedule and seeds are those of paper_2b (Table 10). Not trained here; the tests check its size.
"""

from configs import default, paper_2b


def get_config(cola=paper_2b):
    config, cola = default.get_config("autoregressive"), cola.get_config()
    config.seed, config.data, config.train = cola.seed, cola.data, cola.train
    config.transformer.update(dim=2048, ffn_dim=8192, num_heads=16, head_dim=128, num_layers=27, remat="full")
    config.transformer.vocab_size = cola.vae.vocab_size
    config.stage1.steps, config.optimizer1 = cola.stage2.steps, cola.optimizer2
    config.sample.update(max_new_tokens=32, temperature=0.0)
    return config
