"""Denoising autoencoder (Kascenas et al. 2022), a baseline: a plain U-Net on healthy slices with coarse noise.

    python tools/prepare_data.py --source /path/to/BraTS2021 --output data/brats
    python train.py --config configs/dae.py --workdir runs/dae
    python translate.py --checkpoint runs/dae

The paper's network and length of training are not copied: width and steps are those of `brats_fpdm.py`, so that
methods are compared on one network. This project has not measured how long that takes or how well the network then
does.
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
    config.training.sample_every = 0  # nothing can be drawn from one step
    config.translation.method = "dae"
    return config
