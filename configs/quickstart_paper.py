"""The quickstart with the paper's own prior: it predicts velocities, its log-SNR is learned, times are logit-normal.

    python launch/train.py --config=configs/quickstart_paper.py

On two cores: 461 to 563 s of training. 97.7 % valid sentences, 85.7 % coherent stories of 512 (seed 0). The base of
configs/quickstart.py, which changes the prior; docs/quickstart.md compares them and has what was tried.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.update(corpus="stories", sequence_length=56, packing="pad", align=8, batch_size=32, vocab_size=512)
    config.data.stories.update(aligned=True, values=6, variants=2, choices=2)
    config.vae.update(dim=64, ffn_dim=256, num_heads=4, encoder_layers=1, decoder_layers=1, latent_dim=16, block_size=8)
    config.dit.update(
        latent_dim=16,
        block_size=4,
        dim=128,
        num_heads=4,
        head_dim=32,
        num_layers=3,
        time_dim=128,
        rope_dim=32,
        block_position=True,
        no_history_vector=True,
        unroll=3,
    )
    config.stage1.update(steps=200, kl_weight=1e-3, mask_weight=0.1)
    config.stage2.update(steps=2600, strategy="fix_vae", history_dropout=0.1)
    config.optimizer1.update(learning_rate=3e-3, warmup_steps=20)
    config.optimizer2.update(learning_rate=6e-3, warmup_steps=50, ema=0.99)
    config.train.update(log_every=50, eval_every=500, checkpoint_every=500)
    config.sample.update(steps=16, guidance_scale=2.0, max_new_tokens=56)
    config.evaluation.count = 512
    return config
