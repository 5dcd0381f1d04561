"""The model that speed is measured on: DiT 8 x 512, VAE 2+2 x 384, vocabulary 8,192, K = 16, D = 16.

    python launch/benchmark.py --config=configs/benchmark.py --batch=1,8

Two cores of an AMD EPYC, float32, nothing beside it (prompts of 64 tokens, 64 new ones, 16 Euler steps, guidance 7;
the training step is one of 512 tokens with a fixed VAE):

    generation, batch 1    53.5 tokens/s     89 of 215 GFLOP/s of matmul (41 %)   compiled in 9.0 s   1.2 GiB
    generation, batch 8    86.4 tokens/s    144 of 214 GFLOP/s of matmul (67 %)   compiled in 9.4 s   1.4 GiB
    training,   batch 1   163.7 tokens/s     56 of  85 GFLOP/s of matmul (65 %)   compiled in 38.4 s  2.8 GiB

The last row was measured beside other programs (load 5 to 7 on the two cores): its share of matmul, measured in turns
with it, is what it tells. Before copies were one row and layers unrolled, a quiet machine gave 293.9 tokens/s, 47 %.

The released PyTorch code reaches 8.7 and 24.5 tokens/s on such a machine. Generation counts 1.66 GFLOP a token: 33
passes of a block by the DiT's weights. The rest, at batch 8: products of 256 rows by the weights run at 85 % of the
rate of 1024 x 1024 matrices, and in a loop of such layers without attention norms, modulations and GELU cost nothing
that could be measured; attention is most of what is left. At batch 1 products have 32 rows: 60 % of that rate.
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
