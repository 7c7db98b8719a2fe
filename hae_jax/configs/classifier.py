"""The classifier of noised slices that guides a diffusion network towards "healthy" (Wolleb et al. 2022), a baseline.

    python train.py --config configs/classifier.py --workdir runs/classifier
    python translate.py --checkpoint runs/brats_v2c --classifier runs/classifier --method classifier

The classifier is the encoder of the U-Net with a head for the two classes. It guides a network of the same diffusion
process, for example `brats_v2c.py` under its null condition. Duration and quality have not been measured.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`; bfloat16 computation for GPUs."""
    config = default.get_config()
    config.model.task = "classify"
    config.model.variant = "fpdm"
    config.model.dtype = "bfloat16"
    config.data.balance = True
    config.training.steps = 60_000
    config.training.p_uncond = 0.0
    config.training.sample_every = 0  # a classifier draws no samples
    config.translation.method = "classifier"
    return config
