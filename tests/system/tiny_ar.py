"""The autoregressive baseline at the smallest size that still has every part; for the tests of the binaries."""

from configs import default


def get_config():
    config = default.get_config("autoregressive")
    config.data.update(sequence_length=56, packing="pad", align=8, batch_size=8, vocab_size=400, num_stories=500)
    config.data.stories.update(aligned=True, values=2, variants=1, choices=1)
    config.transformer.update(dim=32, ffn_dim=48, num_heads=2, head_dim=16, num_layers=2)
    config.stage1.steps = 30
    config.optimizer1.ema = 0.9
    config.train.update(log_every=2, eval_every=10, eval_batches=1, checkpoint_every=5, num_samples=2)
    config.sample.update(max_new_tokens=16)
    config.evaluation.count = 16
    return config
