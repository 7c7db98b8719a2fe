"""HAE V2 Conservative on ATLAS v2.0: one channel (T1w), guidance strength 20, one modality in the maps.

    python tools/prepare_data.py --source ATLAS_2/Training --output data/atlas --modalities t1
    python train.py --config configs/atlas_v2c.py --workdir runs/atlas_v2c
    python translate.py --checkpoint runs/atlas_v2c --input ATLAS_2/Testing

The data are ATLAS's own folders (sub-.../ses-1/anat/sub-..._T1w.nii.gz), or one-channel slices that were prepared for
the PyTorch code. ATLAS_2/Testing has no lesion masks.

121.2 million parameters. The training settings are those of the published BraTS run (210 000 steps at a global batch of
28). Duration and quality have not been measured. Guidance strength 20 is the published value for the method hae. The
default method residual was not tested with it; choose a value with tools/ablate.py.
"""

import ml_collections

from hae_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`; bfloat16 computation for GPUs."""
    config = default.get_config()
    config.data.root = "data/atlas"
    config.data.modalities = ("t1",)
    config.model.in_channels = 1
    config.model.dtype = "bfloat16"
    config.translation.modality = (0,)
    config.translation.guidance = 20.0
    return config
