"""Text and images in one prior, on a folder of small drawings with names (JSON lines: image, caption).

    python launch/train.py --config=configs/emoji.py --config.data.files=emoji/captions.jsonl

Not trained yet; docs/unified.md explains the model, docs/data.md the files.
"""

from configs import scenes


def get_config():
    config = scenes.get_config()
    config.data.update(corpus="images", files="emoji/captions.jsonl", text_field="caption", sequence_length=16)
    config.image_vae.update(latent_dim=16, widths=(24, 64, 160))
    config.data.update(vocab_size=1024, instruction_length=24)
    config.stage2.update(text_dropout=0.15)
    config.sample.max_new_tokens = 16
    config.evaluation.count = 64
    return config
