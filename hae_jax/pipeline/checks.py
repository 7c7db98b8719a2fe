"""Checks of a run's settings, dataset, cases and output folder before any computation."""

import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from hae_jax.data.cases import CaseFiles, find_cases
from hae_jax.data.store import MANIFEST, Store, open_store
from hae_jax.errors import UserError
from hae_jax.localization.methods import Method
from hae_jax.phantom import cohort as phantom

_LOG = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """The data of a run.

    Attributes:
      store: the prepared dataset, where there is one.
      cases: of all shards.
      missing: cases of the test split that are not where they were prepared from, with the reason.
    """

    store: Store | None
    cases: list[CaseFiles]
    missing: dict[str, str]

    @property
    def validates_lesions(self) -> bool:
        """Whether there are validation slices with a lesion."""
        return self.store is not None and bool(self.store.split("val").rows["labels"].any())


def find_inputs(config: ml_collections.ConfigDict, source: str | Path | None) -> Inputs:
    """Opens the prepared dataset and finds the cases.

    Args:
      source: folder of cases; None: the test split of `data.root`, from the folder that it was prepared from.

    Raises:
      UserError: if there are no cases, or the dataset does not fit the network.
    """
    if source is None:
        store = _store(config)
        return Inputs(store, *_test_cases(store, config))
    store = None
    if (Path(config.data.root) / MANIFEST).is_file():
        try:
            store = _store(config)
        except UserError as error:  # needed only if there is no calibration
            _LOG.info("data.root is not used: %s", error)
    return Inputs(store, find_cases(source, config.data.modalities), {})


def check_settings(config: ml_collections.ConfigDict, method: Method, model: Any) -> None:
    """Refuses impossible settings, and a network that does not fit the method.

    Raises:
      UserError: naming the setting.
    """
    wanted = config.translation
    if wanted.components < 0:
        raise UserError(f"translation.components is {wanted.components}: it must not be negative; 0 removes nothing")
    if wanted.batch_size < 1:
        raise UserError(f"translation.batch_size is {wanted.batch_size}: it must be at least 1")
    if wanted.filter_dimensions not in (2, 3):
        raise UserError(f"translation.filter_dimensions is {wanted.filter_dimensions}: choose 2 (each slice "
                        "alone) or 3")
    if config.evaluation.overlay_slices < 0:
        raise UserError(f"evaluation.overlay_slices is {config.evaluation.overlay_slices}: it must not be negative; 0 "
                        "draws nothing")
    if wanted.max_memory_gb is not None and not 0 < wanted.max_memory_gb < math.inf:
        raise UserError(f"--max-memory {wanted.max_memory_gb:g}: give the gigabytes per device, more than 0")
    if len(config.data.modalities) != config.model.in_channels:
        raise UserError(f"data.modalities names {len(config.data.modalities)} channels "
                        f"({', '.join(config.data.modalities)}), but the network has {config.model.in_channels}; "
                        "give --config.data.modalities=\"('NAME','NAME')\", in the order of its training")
    if method.network and model is None:
        raise UserError("needs a network; give one with --checkpoint")
    if method.name == "classifier" and not hasattr(model, "classifier"):
        raise UserError("translation.method is 'classifier': it needs a classifier; give its run with --classifier")
    if wanted.save_healthy and not method.network:
        _LOG.info("save_healthy: the method %s makes no pseudo-healthy reconstructions, so none are written",
                  method.name)


def check_shard(shard: int, num_shards: int) -> None:
    """Checks the number of a shard.

    Raises:
      UserError: it is outside of 0 .. num_shards - 1.
    """
    if not 0 <= shard < num_shards:
        raise UserError(f"--shard {shard} of --num-shards {num_shards}: shards are counted from 0 to "
                        f"{max(num_shards - 1, 0)}")


def make_output(output: str | Path, source: str | Path | None) -> Path:
    """Makes the folder for the results, if absent.

    Raises:
      UserError: if it is the folder of the cases, or cannot be written to.
    """
    output = Path(output)
    if source is not None and os.path.realpath(output) == os.path.realpath(source):
        raise UserError(f"{output}: is the folder of the cases; give another one with --output")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder for the results with --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"{output}: cannot be made or written to ({error.strerror}: {error.filename}); give another "
                        "folder with --output") from error
    return output


def of_phantom(case: CaseFiles) -> bool:
    """Whether a case belongs to a phantom, which has a manifest in the case's folder or above it."""
    folder = case.folder.resolve()
    # os.path.isfile returns False in a folder without permission, where Path.is_file raises an error.
    return any(os.path.isfile(parent / phantom.MANIFEST) for parent in (folder, *list(folder.parents)[:2]))


def _store(config: ml_collections.ConfigDict) -> Store:
    store = open_store(config.data.root)
    found, size = store.manifest["slice_shape"], config.model.image_size
    if found != [size, size, config.model.in_channels]:
        raise UserError(f"{store.root}: its slices are {found} (H, W, channels), but the network needs "
                        f"{[size, size, config.model.in_channels]}; give the data that it was trained on with "
                        "--config.data.root")
    store.check_modalities(config.data.modalities)
    return store


def _test_cases(store: Store, config: ml_collections.ConfigDict) -> tuple[list[CaseFiles], dict[str, str]]:
    """The cases of the test split, and those that no longer exist in the source folder."""
    names, folder = store.manifest["split"]["test"], store.manifest["source"]
    if not names:
        raise UserError(f"{store.root}: its test split is empty; give cases with --input FOLDER")
    try:
        found = {case.name: case for case in find_cases(folder, config.data.modalities)}
    except UserError as error:
        raise UserError(f"{store.root}: the cases that it was prepared from were not found ({error}); give cases with "
                        "--input FOLDER") from error
    missing = {name: f"{folder}: the case no longer exists" for name in names if name not in found}
    if len(missing) == len(names):
        raise UserError(f"{folder}: has none of the test cases of {store.root}; give cases with --input FOLDER")
    return [found[name] for name in sorted(names) if name in found], missing
