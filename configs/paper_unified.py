"""One prior for text and images at full size (section 5.5): the 2B model's text, an image VAE of 64 channels.

    python launch/train.py --config=configs/paper_unified.py --plan=h100:8
    python launch/train.py --config=configs/paper_unified.py --config.data.files=pairs.jsonl

Not trained here; docs/unified.md has its plan. The paper gives the image VAE's downsampling and channels, the shares of
the tasks in words, and the stages (256 pixels first); the sizes of the image VAE are ours.
"""

from configs import default, paper_2b


def get_config():
    text, config = paper_2b.get_config(), default.get_config("unified")
    for group in ("data", "vae", "dit", "stage1", "optimizer1", "optimizer2", "train", "sample"):
        getattr(config, group).update(text[group].to_dict())
    config.stage2.update(text.stage2.to_dict() | {"strategy": "fix_vae"})
    config.seed = text.seed
    config.data.update(corpus="images", files="pairs.jsonl", packing="pad", shuffle="documents", batch_size=512)
    config.data.update(image_size=256, sequence_length=256, instruction_length=16, task_shares=(0.1, 0.6, 0.3))
    config.image_vae.update(
        downsampling=16,
        patch_size=2,
        widths=(128, 256, 512, 512),
        latent_dim=64,
        encoder_blocks=2,
        decoder_blocks=2,
        num_heads=8,
        logsnr=2.0,
        remat=True,
    )
    config.image_dit.update(latent_dim=64, dual_layers=8)
    config.stage2.update(steps=80_000, image_time_loc=1.0)
    config.optimizer1.accumulation, config.optimizer2.accumulation = 4, 8
    return config
