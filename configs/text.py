"""Any UTF-8 text: a small Cola DLM trained from scratch on a CPU, whose prior is a mixture of codes.

    python launch/train.py --config=configs/text.py --config.data.files=corpus.txt --workdir=runs/corpus

docs/text.md has results on the King James Bible beside the autoregressive baseline (`configs/text_ar.py`): 1.40 bits
per byte and clauses in the corpus's style with --config.stage2.steps=2400, an hour on one core.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.update(
        corpus="text",
        files="corpus.txt",
        document_separator="\n\n",
        vocab_size=2048,
        sequence_length=128,
        packing="concat",
        batch_size=8,
        holdout=0.05,
    )
    config.vae.update(
        dim=128, ffn_dim=512, num_heads=4, encoder_layers=2, decoder_layers=2, latent_dim=16, block_size=16, logsnr=2.0
    )
    config.dit.update(
        latent_dim=16,
        block_size=1,
        dim=192,
        num_heads=6,
        head_dim=32,
        num_layers=4,
        time_dim=128,
        rope_dim=32,
        block_position=True,
        no_history_vector=True,
        unroll=4,
        prediction="mixture",
    )
    config.stage1.update(steps=600, kl_weight=1e-3, mask_weight=0.0)
    config.stage2.update(
        steps=6000, history_dropout=0.1, target="posterior", code_weight=1.0, time_loc=1.0, time_scale=1.5
    )
    config.optimizer1.update(learning_rate=5e-3, warmup_steps=50)
    config.optimizer2.update(learning_rate=3e-3, warmup_steps=100, ema=0.995)
    config.train.update(log_every=100, eval_every=1000, checkpoint_every=1000, sample_every=0, num_samples=3)
    config.sample.update(steps=32, solver="exponential", churn=6.0, guidance_scale=1.0, max_new_tokens=128)
    return config
