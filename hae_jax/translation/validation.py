"""From the validation slices of a prepared dataset to a calibration, which is kept and used again.

Stands between `batched.py`, which translates the slices, and `calibration.py`, which does the arithmetic.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hae_jax.data.batches import eval_batches
from hae_jax.data.store import Store
from hae_jax.errors import UserError
from hae_jax.translation.batched import Slice, SliceTranslator
from hae_jax.translation.calibration import Calibration, calibrate

_SPLIT = "val"


def calibrated(
    translator: SliceTranslator,
    store: Store,
    modality: tuple[int, ...],
    path: Path,
    made_with: Mapping[str, Any],
) -> Calibration:
    """The calibration of a network; that in `path` if it was made with exactly the same, else a new one, saved there.

    Args:
      translator: the network with its settings.
      store: the prepared dataset, of which the validation slices and their yes/no labels are used.
      modality: the channels that the settings name.
      path: the JSON file.
      made_with: everything that the result depends on: checkpoint, settings, data.

    Raises:
      UserError: if there are no validation slices of both kinds, or the file is damaged.
    """
    made_with = json.loads(json.dumps(made_with))  # as it will be read back: tuples become lists
    if path.exists():
        found = Calibration.load(path)
        if found.made_with == made_with:
            print(f"calibration: {path} is used again")
            return found
    reader = store.split(_SPLIT)
    if len(reader) == 0:
        raise UserError(f"{store.root}: its validation split is empty, and calibration needs slices with labels; "
                        "prepare the data with a larger --val-fraction")
    curves = []
    with tqdm(total=len(reader), desc="calibrating", unit="slice") as bar:
        for _, result in translator(_slices(store, translator.batch_size)):
            curves.append((result.mse, result.ref, result.diff))
            bar.update()
    mse, ref, diff = map(np.stack, zip(*curves, strict=True))
    made = calibrate(mse, ref, diff, reader.rows["labels"], modality=modality, made_with=made_with)
    made.save(path)
    return made


def _slices(store: Store, batch_size: int) -> Iterator[Slice]:
    """The validation slices in stored order."""
    for batch in eval_batches(store.split(_SPLIT), batch_size=batch_size):
        for i in np.flatnonzero(batch["valid"]):
            yield Slice(batch["image"][i], store.cases[batch["case"][i]]["name"], int(batch["slice"][i]))
