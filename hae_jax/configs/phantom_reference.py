"""The reference network of the phantom: HAE V2 Conservative at 64 px, 4 million parameters.

    python train.py --config configs/phantom_reference.py --workdir runs/phantom_reference

The command makes and prepares 120 phantom subjects if they do not exist: 84 for training, 15 for validation, 21 for
testing. Slices are scaled by their volume, so that a bright lesion does not darken the rest of its slice. The speed on
two cores was 1.8 steps per second, which is 75 minutes for 8000 steps. Making the phantom took 14 minutes and preparing
it 10 minutes, beside other work.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`."""
    config = default.get_config()
    with config.unlocked():
        config.data.root = "data/phantom_reference"
        config.data.scaling = "volume"
        config.data.balance = True
        config.data.phantom = ml_collections.ConfigDict({
            "cases": "data/phantom_reference_cases",
            "subjects": 120,
            "lesion_share": 0.75,
            "seed": 0,
            "size": 1.0,
            "train_fraction": 0.7,
            "val_fraction": 0.125,
            "workers": 2,
        })
        config.model.image_size = 64
        config.model.model_channels = 32
        config.model.num_res_blocks = 1
        config.model.channel_mult = (1, 1, 2, 4)
        config.model.attention_resolutions = (4, 8)
        config.model.dropout = 0.0
        config.training.steps = 8_000
        config.training.batch_size = 8
        config.training.learning_rate = 1e-3
        config.training.warmup_steps = 200
        config.training.clip_norm = 1.0
        config.training.anneal = "cosine"
        config.training.ema_rates = (0.999,)
        config.training.log_every = 50
        config.training.save_every = 500
        config.training.validate_every = 500
        config.training.localization_every = 1_000
        config.training.localization_slices = 256
        config.training.sample_every = 2_000
        config.training.sample_steps = 25
        config.translation.respacing = "20"  # of hae: 12 steps up to forward_steps
        config.translation.median = False
        config.translation.components = 8  # 40 pixels of 128 x 128 are 10 of 64 x 64
    return config
