"""Denoising autoencoder (Kascenas et al. 2022), a baseline: a plain U-Net on healthy slices with coarse noise.

    python tools/prepare_data.py --source /path/to/BraTS2021 --output data/brats
    python train.py --config configs/dae.py --workdir runs/dae
    python translate.py --checkpoint runs/dae

Width and steps are those of `brats_fpdm.py`, not those of the paper, so that methods are compared on one network.
Duration and quality have not been measured.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`; bfloat16 computation for GPUs."""
    config = default.get_config()
    config.model.variant = "fpdm"
    config.model.num_classes = None
    config.model.dtype = "bfloat16"
    config.diffusion.schedule = "single"
    config.diffusion.steps = 1
    config.diffusion.predicts = "x0"
    config.diffusion.noise = "coarse"
    config.data.healthy_only = True
    config.training.p_uncond = 0.0  # there is no label to drop
    config.training.sample_every = 0  # a single step cannot draw samples
    config.translation.method = "dae"
    return config
