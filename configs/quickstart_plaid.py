"""Plaid on the quickstart's data: diffusion on token embeddings, with as many parameters as the quickstart.

    python launch/train.py --config=configs/quickstart_plaid.py

docs/families.md compares the families. A row is filled up with ends of text (data.align), so that the model learns
where a story ends.
"""

from configs import default, quickstart_ar


def get_config():
    config, ar = default.get_config("plaid"), quickstart_ar.get_config()
    config.data, config.train, config.evaluation = ar.data, ar.train, ar.evaluation
    config.data.align = config.data.sequence_length
    config.dit.update(
        block_size=config.data.sequence_length,
        dim=128,
        num_heads=4,
        head_dim=32,
        num_layers=4,
        time_dim=128,
        rope_dim=32,
        unroll=4,
        self_conditioning=True,
    )
    config.stage1.steps = ar.stage1.steps
    config.optimizer1.update(learning_rate=3e-3, warmup_steps=50, ema=0.99)
    config.sample.update(max_new_tokens=56)
    return config
