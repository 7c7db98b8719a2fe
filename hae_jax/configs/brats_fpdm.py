"""FPDM on BraTS 2021: the plain conditional U-Net, without hybrid blocks.

    python tools/prepare_data.py --source /path/to/BraTS2021 --output data/brats
    python train.py --config configs/brats_fpdm.py --workdir runs/brats_fpdm

103.1 million parameters, the smallest of the five. The training settings are those of the published run of
`brats_v2c.py` (210 000 steps at a global batch of 28). Duration and quality have not been measured.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`; bfloat16 computation for GPUs."""
    config = default.get_config()
    config.model.variant = "fpdm"
    config.model.dtype = "bfloat16"
    return config
