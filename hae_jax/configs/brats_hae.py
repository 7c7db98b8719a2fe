"""HAE on BraTS 2021: joint multi-scale attention with a projection for each patch size.

    python tools/prepare_data.py --source /path/to/BraTS2021 --output data/brats
    python train.py --config configs/brats_hae.py --workdir runs/brats_hae

158.8 million parameters, the largest of the five. The training settings are those of the published run of
`brats_v2c.py` (210 000 steps at a global batch of 28). Duration and quality have not been measured.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`; bfloat16 computation for GPUs."""
    config = default.get_config()
    config.model.variant = "hae"
    config.model.dtype = "bfloat16"
    return config
