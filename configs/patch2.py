"""The quickstart with two tokens a latent (P = 2), and stories that begin on either side of a patch (SPEC 5).

    python launch/train.py --config=configs/patch2.py

RESULTS
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.data.update(sequence_length=64, random_offset=1)
    config.vae.update(patch_size=2, block_size=4)
    return config
