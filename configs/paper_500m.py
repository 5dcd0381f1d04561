"""The paper's recipe at about 500M parameters, between `paper_100m` and `paper_2b`.

python launch/train.py --config=configs/paper_500m.py --config.data.files=data/web
python launch/train.py --config=configs/paper_500m.py --plan=v5e:4x4

477M parameters; not trained here. docs/scaling.md explains plans and slices.
"""

from configs import paper_2b


def get_config():
    config = paper_2b.get_config()
    config.data.update(vocab_size=32_768, batch_size=512)
    config.vae.update(vocab_size=0, dim=1024, ffn_dim=4096, num_heads=8, encoder_layers=3, decoder_layers=3)
    config.dit.update(dim=1024, num_heads=8, head_dim=128, num_layers=18, time_dim=1024, rope_dim=96)
    config.stage1.steps, config.stage2.steps = 50_000, 300_000
    for optimizer in (config.optimizer1, config.optimizer2):
        optimizer.update(learning_rate=3e-4, warmup_steps=2000)
    return config
