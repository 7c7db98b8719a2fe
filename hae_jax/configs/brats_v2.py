"""HAE V2 on BraTS 2021: the joint multi-scale attention of Lite with a bottleneck MLP.

    python tools/prepare_data.py --source /path/to/BraTS2021 --output data/brats
    python train.py --config configs/brats_v2.py --workdir runs/brats_v2

115.8 million parameters. The training settings are those of the published run of `brats_v2c.py` (210 000 steps at a
global batch of 28). Duration and quality have not been measured.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`; bfloat16 computation for GPUs."""
    config = default.get_config()
    config.model.variant = "hae_v2"
    config.model.dtype = "bfloat16"
    return config
