"""Every field with its default value; the base of the other configs.

Not meant to be run: `python launch/train.py --config=configs/quickstart.py` is.
"""

import ml_collections

from cola_jax import families


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(families.default())
    # None says "learnable" or "off"; the command line may replace it with a number.
    config.vae.logsnr = ml_collections.config_dict.placeholder(float)
    config.vae.clip_qkv = ml_collections.config_dict.placeholder(float)
    return config
