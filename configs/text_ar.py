"""The autoregressive baseline on any UTF-8 text: 3.4M parameters; `configs/text.py` has 4.6M.

    python launch/train.py --config=configs/text_ar.py --config.data.files=corpus.txt --workdir=runs/corpus_ar

docs/text.md compares the two on the King James Bible.
"""

from configs import default, text


def get_config():
    config = default.get_config("autoregressive")
    cola = text.get_config()
    config.data, config.train, config.evaluation = cola.data, cola.train, cola.evaluation
    config.transformer.update(dim=192, ffn_dim=512, num_heads=6, head_dim=32, num_layers=6, unroll=6)
    config.stage1.steps = 6000
    config.optimizer1.update(learning_rate=3e-3, warmup_steps=100, ema=0.99)
    config.sample.update(max_new_tokens=128, temperature=1.0)
    return config
