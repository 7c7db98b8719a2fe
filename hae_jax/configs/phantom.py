"""The demo: continues the training of the shipped network of `phantom_reference.py` on new subjects, on two CPU cores.

    python train.py --config configs/phantom.py --workdir runs/phantom
    python translate.py

The first command makes and prepares 8 phantom subjects if they do not exist, and trains the shipped weights for 100
steps. This is enough to see the loop, the log, a checkpoint and how a run is resumed. The second command translates the
test subjects with the shipped weights.
"""

import ml_collections

from hae_jax.configs import phantom_reference


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/phantom_reference.py`."""
    config = phantom_reference.get_config()
    with config.unlocked():
        config.data.root = "data/phantom_demo"
        config.data.phantom.update({
            "cases": "data/phantom",  # BraTS-style folders, made if absent
            "subjects": 8,
            "seed": 1000,  # the reference network was trained on seed 0
            "train_fraction": 0.4,
            "val_fraction": 0.25,
        })
        config.training.initial_weights = "phantom"
        config.training.steps = 100
        config.training.learning_rate = 1e-4
        config.training.warmup_steps = 0
        config.training.log_every = 10
        config.training.save_every = 50
        config.training.validate_every = 50
        config.training.localization_every = 100
        config.training.localization_slices = 32
        config.training.sample_every = 100
        config.training.sample_steps = 10
        config.translation.save_healthy = True  # for the report
    return config
