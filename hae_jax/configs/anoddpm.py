"""An unconditional network for AnoDDPM: the network of `brats_v2c.py` without classes, trained on simplex noise.

    python tools/prepare_data.py --source /path/to/BraTS2021 --output data/brats
    python train.py --config configs/anoddpm.py --workdir runs/anoddpm
    python tools/compare_methods.py --checkpoint runs/brats_v2c --unconditional runs/anoddpm

Wyatt et al. 2022 train a plain U-Net on healthy images. This network is trained on all slices of the training split, so
only the method differs in a comparison with `brats_v2c.py`. To train on healthy slices alone, set data.healthy_only.

120.9 million parameters. The training settings are those of the published run of `brats_v2c.py` (210 000 steps at a
global batch of 28). Duration and quality have not been measured.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`; bfloat16 computation for GPUs."""
    config = default.get_config()
    config.model.num_classes = None
    config.model.dtype = "bfloat16"
    config.diffusion.noise = "simplex"
    config.training.p_uncond = 0.0  # there is no label to drop
    config.translation.method = "anoddpm-simplex"
    return config
