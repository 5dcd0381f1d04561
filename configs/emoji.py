"""Text and images in one prior, on a folder of small drawings with names (JSON lines: image, text).

    python launch/train.py --config=configs/emoji.py --config.data.files=emoji/captions.jsonl

docs/unified.md explains the model and what a first short run reaches, docs/data.md the files.
"""

from configs import scenes


def get_config():
    config = scenes.get_config()
    config.data.update(corpus="images", files="emoji/captions.jsonl", image_size=64, batch_size=32)
    config.data.update(sequence_length=28, vocab_size=1024, instruction_length=24, task_shares=(0.1, 0.5, 0.4))
    config.image_vae.update(latent_dim=64)
    config.image_dit.latent_dim = 64
    config.stage1.steps = 600
    config.stage2.update(steps=1500, noise_copies=4, image_noise_copies=8, text_dropout=0.15, time_loc=1.0)
    config.train.update(eval_every=500, checkpoint_every=500, eval_batches=3)
    config.sample.max_new_tokens = 28
    config.evaluation.count = 64
    return config
