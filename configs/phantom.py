"""The demo: a small HAE V2 Conservative network on the phantom, at 32 px, on two CPU cores.

    python train.py --config configs/phantom.py --workdir runs/phantom

makes the phantom and prepares it if they are not there yet. With translation about 9 minutes on two cores; slices are
called lesion or healthy with an accuracy of 0.91, localisation is poor (lesion-slice Dice 0.19): phantom figures.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`."""
    config = default.get_config()
    with config.unlocked():
        config.data.root = "data/phantom_32"
        config.data.phantom = ml_collections.ConfigDict({
            "cases": "data/phantom",  # BraTS-style folders, made if absent
            "subjects": 18,
            "lesion_share": 0.75,
            "seed": 0,
            "size": 1.0,  # 1: 240 x 240 x 155 voxels of 1 mm
            "train_fraction": 0.67,
            "val_fraction": 0.17,
            "workers": 2,
        })
        config.model.image_size = 32
        config.model.model_channels = 32
        config.model.num_res_blocks = 1
        config.model.channel_mult = (1, 1, 2)
        config.model.attention_resolutions = (4,)
        config.model.dropout = 0.0
        config.training.steps = 2_000
        config.training.batch_size = 8
        config.training.learning_rate = 1e-3
        config.training.warmup_steps = 100
        config.training.anneal = "cosine"
        config.training.ema_rates = (0.995,)
        config.training.log_every = 50
        config.training.save_every = 500
        config.training.localization_every = 1_000
        config.training.localization_slices = 128
        config.training.sample_every = 1_000
        config.training.sample_steps = 25
        config.translation.respacing = "20"  # 12 steps up to forward_steps
        config.translation.median = False  # 5 x 5 pixels of 32 would be a third of a lesion
        config.translation.components = 2  # 40 pixels of 128 x 128 are 2.5 of 32 x 32
    return config
