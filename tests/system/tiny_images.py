"""The joint model of text and images on the embedded pictures, at the smallest size that still has every part."""

from configs import default


def get_config():
    config = default.get_config("unified")
    config.data.update(batch_size=8, vocab_size=400, num_scenes=2000, image_size=32, sequence_length=32)
    config.data.scenes.update(max_shapes=2, colours=2, kinds=2)
    config.vae.update(dim=16, ffn_dim=32, num_heads=2, latent_dim=4)
    config.image_vae.update(downsampling=8, widths=(8, 16), latent_dim=4, logsnr=2.0)
    config.dit.update(latent_dim=4, dim=16, num_heads=2, head_dim=8, num_layers=2, time_dim=16, rope_dim=8)
    config.image_dit.latent_dim = 4
    config.stage1.steps, config.stage2.steps = 10, 20
    config.stage2.noise_copies = 2
    config.optimizer1.name = config.optimizer2.name = "muon"
    config.train.update(log_every=1, eval_every=10, eval_batches=3, checkpoint_every=5, num_samples=1)
    config.sample.update(steps=2, max_new_tokens=8)
    config.image_sample.steps = 2
    config.evaluation.count = 4
    return config
