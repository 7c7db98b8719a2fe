"""The run that `translate.py` starts: from a folder of cases to NIfTI masks, pictures and metrics."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hae_jax.files import one_at_a_time, remove_leftovers
from hae_jax.localization.batched import IntensityReader, SliceTranslator, Translator
from hae_jax.localization.methods import IntensityThreshold, make_method
from hae_jax.localization.probability import check_probability
from hae_jax.pipeline import checks
from hae_jax.pipeline.cache_key import calibration_key, run_key
from hae_jax.pipeline.calibrations import available, calibrated, writable
from hae_jax.pipeline.per_case import SLICES, CalibratedMethod, CaseWork, process_cases
from hae_jax.pipeline.results_folder import RECORDS, ResultsFolder
from hae_jax.pipeline.summary import Context, Summary
from hae_jax.report.write import write_report

_LOG = logging.getLogger(__name__)


def translate(
    model: nnx.Module | None,
    identity: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    *,
    output: str | Path,
    source: str | Path | None = None,
    overwrite: bool = False,
    shard: int = 0,
    num_shards: int = 1,
    calibrations: str | Path | None = None,
    shipped: str | Path | None = None,
    only_source: bool = False,
) -> Summary:
    """Calibrates a method on the validation slices and translates cases.

    Writes <case>_mask.nii.gz, <case>_map.nii.gz, <case>_overlay.png and, if asked for,
    <case>_healthy_<modality>.nii.gz, <case>_probability.nii.gz and <case>_uncertainty.nii.gz for each case, and
    calibration.json, cases.csv, metrics.json, manifest.json, report.html.
    Finished cases are not processed again. If a case fails, it is reported, and the others are processed.

    Args:
      model: the network; None for a method without a network.
      identity: its origin, and its `cache_key.weights_hash` as "sha256", ready for JSON.
      config: the config tree; `model` and `diffusion` are those of the network's training.
      output: folder for the results, made if absent; several shards may share it.
      source: folder of cases, one case, or a table of cases; None: the test split of `data.root`, from the folder that
        it was prepared from.
      overwrite: process finished cases again.
      shard: number of the part of the cases to process.
      num_shards: number of parts. Cases are distributed one by one.
      calibrations: folder in which calibrations are stored between runs; None, or a read-only folder: `output`.
      shipped: the file of a calibration beside the weights, used if it was made with this network, method and settings;
        it need not exist.
      only_source: leave cases that earlier runs have added to `output` with the same settings out of the tables.

    Raises:
      UserError: settings or data do not fit.
    """
    start, method = time.monotonic(), make_method(config)
    checks.check_shard(shard, num_shards)
    checks.check_settings(config, method, model)
    store, cases, missing = inputs = checks.find_inputs(config, source)
    output = checks.make_output(output, source)
    kept = writable(calibrations, output)
    calibration = available(config, store, method, identity, kept, shipped)
    key = calibration_key(config, store, method, identity)
    baseline = IntensityThreshold.of(config) if method.network and inputs.validates_lesions else None
    results = ResultsFolder(output, run_key(config, identity, calibration or key, baseline is not None), cases,
                            only_cases=only_source)
    with one_at_a_time(results.lock(shard, num_shards), lambda: _LOG.info(
            "%s: another run uses this folder; waiting until it ends", output)):
        for folder in (output, output / RECORDS, output / SLICES, kept):
            remove_leftovers(folder)
        own = cases[shard::num_shards]
        unfinished = [case for case in own if overwrite or not results.finished(case)]
        if not overwrite:
            results.check_namesakes(unfinished)
        # Even if all cases are finished, another run with other settings may have written the tables.
        if unfinished or (own and results.key_of_tables() != results.key):
            translator = _translator(model, method, config, mesh)
            if calibration is None:
                assert store is not None  # else `available` has found a calibration
                calibration = calibrated(translator, method, store, kept, key, config.data.scaling)
            if config.translation.save_probability:
                check_probability(calibration)
            localizer, beside = CalibratedMethod(method, calibration), None
            if baseline is not None and store is not None:
                beside = CalibratedMethod(baseline, calibrated(
                    IntensityReader(baseline.intensity), baseline, store, kept,
                    calibration_key(config, store, baseline, identity)))
            results.invalidate(unfinished)
            results.save_calibrations(localizer.calibration, beside and beside.calibration)
            if unfinished:
                # So that compilation is not part of the first case's time.
                translator.prepare((config.model.image_size, config.model.image_size, config.model.in_channels))
                process_cases(CaseWork(config, results, localizer, beside), unfinished, translator)
        origin = {"checkpoint": dict(identity), "devices": [str(device) for device in mesh.devices.flat]}
        context = Context(config, method, origin, frozenset(case.name for case in own), missing,
                          any(map(checks.of_phantom, cases)), start)
        done = results.summary(context, unfinished)
        if config.evaluation.report:
            # Shards that end together would delete each other's pictures.
            with one_at_a_time(output / RECORDS / ".report.lock", lambda: _LOG.info(
                    "%s: another shard writes the report; waiting until it ends", output)):
                write_report(output)
        return done


def _translator(
    model: nnx.Module | None, method: Any, config: ml_collections.ConfigDict, mesh: Mesh
) -> Translator:
    if model is None or not method.network:
        return IntensityReader(method.intensity)
    wanted = config.translation
    return SliceTranslator(model, method, batch_size=wanted.batch_size, seed=config.seed, mesh=mesh,
                           conditional=config.model.num_classes is not None, max_memory_gb=wanted.max_memory_gb)
