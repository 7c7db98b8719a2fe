"""HAE V2 Conservative on BraTS 2021, as published, except for the sparse pattern (model.sparse_pattern).

    python tools/prepare_data.py --source /path/to/BraTS2021 --output data/brats
    python train.py --config configs/brats_v2c.py --workdir runs/brats_v2c

The published run takes 210 000 steps at a global batch of 28.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """`configs/default.py`, with bfloat16 computation for GPUs."""
    config = default.get_config()
    config.model.dtype = "bfloat16"
    return config
