"""The paper's model at full size (its section 16): VAE 0.50B, DiT 1.83B, D = 16, K = 16, joint x1, BERT loss.

    python launch/prepare.py --input='dump/*.jsonl.zst' --format=jsonl --tokenizer=tokenizer.json --output=data/web
    python launch/train.py --config=configs/paper_2b.py --config.data.files=data/web

Not trained here; the tests check its shapes and that it has 501,871,574 + 1,829,875,728 parameters. The paper does not
give beta, lambda_mask, lambda_ref: docs/quickstart.md has how they were found. The paper's tokenizer is
OLMo 2's tokenizer.json, 100,278 entries.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.seed, config.data.seed = 66, 6198
    config.data.update(corpus="prepared", files="data/web", tokenizer="huggingface", shuffle="rows")
    config.data.vocab_size = 100_278
    config.data.sequence_length = 512
    config.data.batch_size = 1408
    config.vae.update(
        vocab_size=100_278,
        dim=1536,
        ffn_dim=6144,
        num_heads=12,
        encoder_layers=4,
        decoder_layers=4,
        latent_dim=16,
        block_size=16,
        attention="causal",
    )
    config.dit.update(
        latent_dim=16,
        block_size=16,
        dim=2048,
        num_heads=16,
        head_dim=128,
        num_layers=24,
        mlp_ratio=4,
        time_dim=2048,
        rope_dim=96,
        remat="full",
    )
    config.stage1.update(steps=100_000, noisy_decoding=0.0)
    config.stage2.update(steps=1_000_000, strategy="joint", vae_learning_rate_ratio=1.0)
    for optimizer in (config.optimizer1, config.optimizer2):
        optimizer.update(
            learning_rate=1.5e-4,
            initial_learning_rate=1e-6,
            final_learning_rate=1e-5,
            warmup_steps=5000,
            weight_decay=0.01,
            clip_norm=1.0,
        )
    config.train.update(
        compute_dtype="bfloat16", log_every=100, eval_every=5000, checkpoint_every=1000, keep_checkpoints=3
    )
    # docs/scaling.md has why so many seconds and minutes.
    config.train.update(mesh_data=1, mesh_fsdp=0, hang_timeout=1800.0, checkpoint_minutes=30.0)
    config.sample.update(steps=16, guidance_scale=7.0, max_new_tokens=32)
    return config
