"""The stroke phantom: T1 alone, with old infarcts as dark as fluid. No intensity threshold separates the two.

    python train.py --config configs/phantom_stroke.py --workdir runs/phantom_stroke

The command makes and prepares 160 subjects with voxels of 2 mm if they do not exist: 112 for training, 24 for
validation, 24 for testing. 9000 steps take about 85 minutes on two cores. docs/localization.md has the phantom metrics
of the shipped network.
"""

import ml_collections

from hae_jax.configs import phantom_reference


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/phantom_reference.py`."""
    config = phantom_reference.get_config()
    with config.unlocked():
        config.data.root = "data/phantom_stroke"
        config.data.modalities = ("t1",)
        config.data.phantom = ml_collections.ConfigDict({
            "cases": "data/phantom_stroke_cases",
            "kind": "stroke",
            "subjects": 160,
            "lesion_share": 0.75,
            "seed": 0,
            "size": 0.5,
            "train_fraction": 0.7,
            "val_fraction": 0.15,
            "workers": 2,
        })
        config.model.in_channels = 1
        config.training.steps = 9_000
        config.translation.modality = (0,)
        # Chosen on validation subjects (docs/localization.md).
        config.translation.timesteps = (50, 150, 250)
        config.translation.rounds = 2
        config.translation.guidance = 8.0
        config.translation.across_mm = 4.0
        config.translation.healthy_fpr = 5e-3
    return config
