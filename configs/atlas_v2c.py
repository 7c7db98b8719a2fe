"""HAE V2 Conservative on ATLAS v2.0: one channel (T1w), guidance strength 20, one modality in the maps.

    python tools/prepare_data.py --source /path/to/npy_slices --output data/atlas
    python train.py --config configs/atlas_v2c.py --workdir runs/atlas_v2c

tools/prepare_data.py does not read ATLAS's own NIfTI files yet. What it can import are one-channel slices that were
prepared for the PyTorch code (npy_train/patient_<case>/slice_<k>.npz, ...); the path above means those. translate.py
needs NIfTI cases of four modalities, so a network trained here cannot be applied to cases yet.

121.2 million parameters. The training settings are those of the published BraTS run (210 000 steps at a global batch of
28); this project has not measured how long that takes or how well the network does.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Differences from `configs/default.py`; bfloat16 computation for GPUs."""
    config = default.get_config()
    config.data.root = "data/atlas"
    config.model.in_channels = 1
    config.model.dtype = "bfloat16"
    config.translation.modality = (0,)
    config.translation.guidance = 20.0
    return config
