"""The demo: a small HAE V2 Conservative network on the phantom, at 64 px, on two CPU cores.

    python train.py --config configs/phantom.py --workdir runs/phantom

makes the phantom and prepares it if they are not there yet.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`."""
    config = default.get_config()
    with config.unlocked():
        config.data.root = "data/phantom_64"
        config.data.phantom = ml_collections.ConfigDict({
            "cases": "data/phantom",  # BraTS-style folders, made if absent
            "subjects": 24,
            "tumour_share": 0.75,
            "seed": 0,
            "size": 1.0,  # 1: 240 x 240 x 155 voxels of 1 mm
            "train_fraction": 0.75,
            "val_fraction": 0.125,
            "workers": 2,
        })
        config.model.image_size = 64
        config.model.model_channels = 32
        config.model.num_res_blocks = 1
        config.model.channel_mult = (1, 2, 2)
        config.model.attention_resolutions = (4,)
        config.model.dropout = 0.0
        config.training.steps = 2_000
        config.training.batch_size = 16
        config.training.learning_rate = 4e-4
        config.training.warmup_steps = 100
        config.training.anneal = "cosine"
        config.training.ema_rates = (0.995,)
        config.training.log_every = 50
        config.training.save_every = 500
        config.training.sample_every = 1_000
        config.translation.respacing = "50"
    return config
