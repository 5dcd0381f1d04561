"""The autoregressive baseline on the quickstart's data, with as many parameters as the quickstart's VAE and DiT.

    python launch/train.py --config=configs/quickstart_ar.py

About 300 s of training on two cores: 99.7 % valid sentences [99.4, 99.9], 97.5 % coherent stories
[95.7, 98.5], -log p(x) 0.4004 +- 0.0027 nats a token where the exact entropy of the same stories is 0.3997 (seed 0).
docs/quickstart.md compares it with Cola at 55, 145 and 295 s of training.
"""

from configs import default, quickstart_paper


def get_config():
    config = default.get_config("autoregressive")
    cola = quickstart_paper.get_config()
    config.data, config.train, config.evaluation = cola.data, cola.train, cola.evaluation
    config.transformer.update(dim=128, ffn_dim=352, num_heads=4, head_dim=32, num_layers=5, unroll=5)
    config.stage1.steps = 2250
    config.optimizer1.update(learning_rate=3e-3, warmup_steps=50, ema=0.99)
    config.sample.update(max_new_tokens=56, temperature=1.0)
    return config
