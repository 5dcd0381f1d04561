"""Text and images in one prior, on the embedded corpus `scenes`: pictures of shapes with captions.

    python launch/train.py --config=configs/scenes.py

50 minutes on two cores beside other work. It draws and names single shapes well, relations not yet (docs/unified.md).
"""

from configs import default


def get_config():
    config = default.get_config("unified")
    config.data.update(corpus="scenes", image_size=48, packing="pad", sequence_length=32, batch_size=16, vocab_size=400)
    config.data.update(instruction_length=10, task_shares=(0.1, 0.4, 0.5))
    config.vae.update(dim=64, ffn_dim=256, num_heads=4, encoder_layers=1, decoder_layers=1, latent_dim=16, block_size=2)
    config.vae.logsnr = 2.0
    config.image_vae.update(downsampling=16, patch_size=4, widths=(64, 96, 192), latent_dim=16, logsnr=3.0)
    config.image_stage1.update(loss="l2", kl_weight=0.0)
    config.dit.update(
        latent_dim=16,
        block_size=2,
        dim=128,
        num_heads=4,
        head_dim=32,
        num_layers=3,
        unroll=3,
        time_dim=128,
        rope_dim=32,
        block_position=True,
        no_history_vector=True,
        prediction="mean",
    )
    config.image_dit.update(latent_dim=16, dual_layers=1, prediction="mean", position_sines=True)
    config.stage1.update(steps=400, mask_weight=0.0, kl_weight=1e-3)
    config.stage2.update(steps=5000, strategy="fix_vae", history_dropout=0.1, target="posterior")
    config.stage2.update(noise_copies=12, image_noise_copies=16, auxiliary_weight=0.0)
    config.stage2.update(time_loc=1.5, time_scale=1.5, image_time_loc=0.7)
    config.optimizer1.update(name="muon", learning_rate=4e-3, warmup_steps=30)
    config.optimizer2.update(name="muon", learning_rate=6e-3, warmup_steps=100, ema=0.995)
    config.train.update(log_every=100, eval_every=1000, checkpoint_every=1000, eval_batches=12)
    config.sample.update(solver="exponential", churn=6.0, steps=16, guidance_scale=1.0, max_new_tokens=32)
    config.evaluation.count = 256
    return config
