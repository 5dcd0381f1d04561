"""The model that speed is measured on: DiT 8 x 512, VAE 2+2 x 384, vocabulary 8,192, K = 16, D = 16.

    python launch/benchmark.py --config=configs/benchmark.py --what=generation --batch=1,8
    python launch/benchmark.py --config=configs/benchmark.py --what=training --batch=1,4

Two cores of an AMD EPYC, float32, nothing beside it: generation 54.0 and 88.4 tokens/s, training with a fixed VAE 361
and 434. docs/generation.md has the other figures and where the time goes.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.update(sequence_length=512, batch_size=1, vocab_size=8192)
    config.vae.update(
        vocab_size=8192, dim=384, ffn_dim=1536, num_heads=6, encoder_layers=2, decoder_layers=2, latent_dim=16
    )
    config.vae.block_size = 16
    config.dit.update(latent_dim=16, block_size=16, dim=512, num_heads=8, head_dim=64, num_layers=8, time_dim=512)
    config.dit.update(rope_dim=48, unroll=8)
    config.stage2.update(strategy="fix_vae")
    config.sample.update(steps=16, guidance_scale=7.0, max_new_tokens=64)
    return config
