"""Every field with its default value; the base of the other configs.

Not meant to be run: `python launch/train.py --config=configs/quickstart.py` is.
"""

import ml_collections

from cola_jax import families


def get_config(family: str = "cola") -> ml_collections.ConfigDict:
    return families.default_config(family)
