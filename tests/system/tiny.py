"""The real model and data at the smallest size that still has every part; for the tests of the binaries."""

from configs import default


def get_config():
    config = default.get_config()
    config.data.update(sequence_length=56, packing="pad", align=8, batch_size=8, vocab_size=400, num_stories=500)
    config.data.stories.update(aligned=True, values=2, variants=1, choices=1)
    config.vae.update(dim=16, ffn_dim=32, num_heads=2, latent_dim=4)
    config.dit.update(latent_dim=4, dim=16, num_heads=2, head_dim=8, num_layers=2, time_dim=16, rope_dim=8)
    config.dit.update(block_position=True, no_history_vector=True)
    config.stage1.steps = 30
    config.stage2.update(steps=30, strategy="joint", history_dropout=0.1)
    config.optimizer2.ema = 0.9
    config.train.update(log_every=2, eval_every=10, eval_batches=1, checkpoint_every=5, num_samples=2)
    config.sample.update(steps=2, max_new_tokens=16)
    config.evaluation.count = 0  # no report
    return config
