"""`translate.py`: finds lesions in cases with a trained network."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hae_jax.commands.common import (
    CASES_HELP,
    CommandParser,
    check_fields,
    checked_table,
    entry_point,
    source_name,
    stop_when_told,
)
from hae_jax.commands.config import CONFIG_HELP
from hae_jax.commands.runs import DEMO_CONFIG, check_overrides
from hae_jax.errors import UserError
from hae_jax.localization.calibration import PRESETS

_DESCRIPTION = """\
Find lesions in cases with a trained network. Writes for each case a lesion mask and an anomaly map as NIfTI on the grid
of the input, and a picture. Writes for all cases cases.csv, metrics.json and report.html. Without arguments, the
command uses the phantom (made if absent) and the shipped weights. Finished cases are skipped. The exit status is 1 if a
case of this job failed."""
_EPILOG = """\
examples:
  python translate.py                                            # the phantom's test cases, shipped weights
  python translate.py --checkpoint runs/a                        # the test cases of the data that runs/a was trained on
  python translate.py --checkpoint runs/a --input FOLDER --output FOLDER --save-probability
  python translate.py --checkpoint runs/a --input FOLDER --output FOLDER --method hae --calibration brats_600
  python translate.py --checkpoint runs/a --input FOLDER --output FOLDER --num-shards 8 --shard $SLURM_ARRAY_TASK_ID
  python translate.py --checkpoint runs/a --cases cases.csv --output FOLDER

cases: BraTS 2021 or 2023 folders, Decathlon or nnU-Net folders with dataset.json, BIDS trees, or one volume per case
for a network of one channel; with or without segmentation (docs/data.md)."""
_SHORTCUTS = {  # flags that stand for one field of config.translation
    "method": {"metavar": "NAME", "help": "method: residual (low noise; default), hae (the published forward "
               "process), ddib, anoddpm-simplex, anoddpm-gaussian, classifier, dae, or threshold (intensity threshold; "
               "needs no network); docs/translation.md explains them"},
    "calibration": {"metavar": "NAME", "help": f"calibration.json of another run, or a preset: {', '.join(PRESETS)} "
                    "(published, for hae); default: the one beside the weights if it has the same settings, otherwise "
                    "made on the validation slices and stored in RUN/calibrations"},
    "max_memory_gb": {"flag": "--max-memory", "metavar": "GB", "type": float, "help": "use the largest batch, "
                      "up to 256 slices, that needs at most this memory on each device (on a CPU: in total)"},
    "save_healthy": {"action": "store_true", "default": None, "help": "also write the pseudo-healthy reconstructions"},
    "save_probability": {"action": "store_true", "default": None, "help": "also write the probability of a lesion; "
                         "with --config.translation.draws=4 also its uncertainty"},
}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    parser.add_argument("--config", metavar="FILE", help=f"{CONFIG_HELP}; default: the config of the checkpoint, or "
                        f"{DEMO_CONFIG} without a checkpoint. The network settings always come from the checkpoint")
    parser.add_argument("--run", "--checkpoint", dest="checkpoint", metavar="RUN", help="run folder of "
                        "train.py, folder of exported weights, or name of shipped weights; default: "
                        "with --config the newest run in runs/ that was trained on "
                        "the config's data, otherwise the shipped weights of the phantom")
    parser.add_argument("--classifier", metavar="RUN", help="run of configs/classifier.py that guides the network, for "
                        "--method classifier")
    parser.add_argument("--input", metavar="FOLDER", help="folder of cases, or one case; default: the test split of "
                        "the config's data")
    parser.add_argument("--cases", metavar="FILE", help=CASES_HELP)
    parser.add_argument("--output", metavar="FOLDER", help="folder for the results; default: RUN/translation (shipped "
                        "weights: results/NAME/translation), followed by the names of --input and --method")
    parser.add_argument("--layout", choices=("plain", "bids"), default="plain", help="plain: one folder; bids: BIDS "
                        "derivatives, with the plain results in sourcedata/hae-jax (docs/bids.md)")
    parser.add_argument("--overwrite", action="store_true", help="process finished cases again")
    parser.add_argument("--num-shards", type=int, default=1, metavar="N", help="distribute the cases over N jobs")
    parser.add_argument("--shard", type=int, default=0, metavar="I",
                        help="number of this job, from 0; all jobs have the same --output")
    for field, options in _SHORTCUTS.items():
        options = dict(options)
        parser.add_argument(options.pop("flag", "--" + field.replace("_", "-")), dest=field, **options)
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, loads the network, translates; exits with 1 if a case of this job failed."""
    arguments, overrides = _parser().parse_known_args(argv)
    check_overrides(overrides)
    check_fields(overrides)
    if arguments.cases is not None:
        if arguments.input is not None:
            raise UserError("--input and --cases: give one of them")
        arguments.input = checked_table(arguments.cases)
    overrides += [f"--config.translation.{field}={getattr(arguments, field)}" for field in _SHORTCUTS
                  if getattr(arguments, field) is not None]

    # Imported after parsing: --help needs no JAX.
    from hae_jax.commands.devices import use_all_cores, use_compilation_cache
    from hae_jax.commands.runs import chosen_network, with_classifier
    from hae_jax.phantom.on_demand import ensure_phantom
    from hae_jax.pipeline.bids import RESULTS, check_derivatives_folder, write_derivatives
    from hae_jax.pipeline.translate import translate
    from hae_jax.training.mesh import make_mesh

    stop_when_told()
    use_all_cores()
    use_compilation_cache()
    network = chosen_network(arguments.config, arguments.checkpoint, overrides)
    config = network.config
    if arguments.classifier:
        if config.translation.method != "classifier":
            raise UserError(f"--classifier {arguments.classifier}: the method is {config.translation.method}; add "
                            "--method classifier, or leave --classifier out")
        network = with_classifier(network, arguments.classifier)
    calibrated = config.translation.calibration or network.shipped_calibration.is_file()
    if not (arguments.input and calibrated):  # else no prepared data are needed
        ensure_phantom(config.data, config.model.image_size)
    print(f"network: {network.identity['path']}, {network.identity['parameters']}")
    name = ["translation", *([source_name(arguments.input)] if arguments.input else []),
            *([arguments.method] if arguments.method else [])]
    bids = arguments.layout == "bids"
    output = Path(arguments.output or network.results / "_".join([*name, *(["bids"] if bids else [])]))
    if bids:
        check_derivatives_folder(output, arguments.input)
    report = translate(network.model, network.identity, config, make_mesh(), source=arguments.input,
                       output=output / RESULTS if bids else output, overwrite=arguments.overwrite,
                       shard=arguments.shard, num_shards=arguments.num_shards,
                       calibrations=network.calibrations, shipped=network.shipped_calibration)
    print("\n".join(report.lines()))
    if bids:
        print(f"BIDS derivatives of {len(write_derivatives(report.output, output))} cases: {output}")
    if report.failed_here:
        sys.exit(1)
