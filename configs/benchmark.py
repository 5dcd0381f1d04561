"""The model that speed is measured on: DiT 8 x 512, VAE 2+2 x 384, vocabulary 8,192, K = 16, D = 16.

    python launch/benchmark.py --config=configs/benchmark.py --what=generation --batch=1,8
    python launch/benchmark.py --config=configs/benchmark.py --what=training --batch=1,4

Two cores of an AMD EPYC, float32, nothing beside it (prompts of 64 tokens, 64 new ones, 16 Euler steps, guidance 7;
the training step is one of 512 tokens with a fixed VAE):

    generation, batch 1         54.0 tokens/s     90 of 214 GFLOP/s of matmul (42 %)   compiled in  8.4 s   1.2 GiB
    generation, batch 8         88.4 tokens/s    147 of 210 GFLOP/s of matmul (70 %)   compiled in  8.5 s   1.5 GiB
    training,   batch 1        361.5 tokens/s    123 of 206 GFLOP/s of matmul (59 %)   compiled in 27.2 s   2.9 GiB
    training,   batch 4        433.9 tokens/s    147 of 213 GFLOP/s of matmul (69 %)   compiled in 28.5 s   5.0 GiB
    training, joint, batch 1   231.1 tokens/s    103 of 191 GFLOP/s of matmul (54 %)   compiled in 43.5 s   3.6 GiB
    training, joint, batch 4   258.6 tokens/s    116 of 213 GFLOP/s of matmul (54 %)   compiled in 42.8 s   5.9 GiB

(joint: --config.stage2.strategy=joint). The released PyTorch code generates 8.7 and 24.5 tokens/s on such a machine,
and trains with a fixed VAE at 140 to 170 (batch 1) and 98 (batch 4).

Where the rest of a training step goes, by the profiler, batch 1: 6 % copies each layer's weights out of their stack
(and once more, transposed, for the gradient), 5 % is the optimizer, 4 % puts the gradients of the layers together; at
batch 4 these weigh a quarter. Norms, modulations, masks and softmax are the other part; XLA's CPU backend runs many of
them on one core. Generation counts 1.66 GFLOP a token: 33
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
