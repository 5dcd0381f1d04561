"""The paper's recipe at about 100M parameters: a first run on one accelerator, or on one node in hours.

python launch/train.py --config=configs/paper_100m.py --config.data.files=data/web
python launch/train.py --config=configs/paper_100m.py --plan=v5e:2x2

93M parameters; not trained here. docs/scaling.md explains plans and slices.
"""

from configs import paper_2b


def get_config():
    config = paper_2b.get_config()
    config.data.update(vocab_size=32_768, batch_size=256)
    config.vae.update(vocab_size=0, dim=512, ffn_dim=2048, num_heads=8, encoder_layers=2, decoder_layers=2)
    config.dit.update(dim=512, num_heads=8, head_dim=64, num_layers=10, time_dim=512, rope_dim=48, remat="none")
    config.stage1.steps, config.stage2.steps = 20_000, 100_000
    for optimizer in (config.optimizer1, config.optimizer2):
        optimizer.update(learning_rate=6e-4, warmup_steps=1000)
    config.train.update(mesh_data=0, mesh_fsdp=1)
    return config
