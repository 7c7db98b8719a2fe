"""`tools/compare_methods.py`: several methods on the same cases, in one table."""

import argparse
from collections.abc import Sequence

from hae_jax.commands.common import CommandParser, check_fields, entry_point, source_name
from hae_jax.commands.config import CONFIG_HELP
from hae_jax.commands.runs import DEMO_CONFIG, check_overrides
from hae_jax.errors import UserError

METHODS = "residual,hae,ddib,anoddpm-gaussian,anoddpm-simplex,threshold"
_DESCRIPTION = """\
Run several methods on the same cases and write comparison.csv, .md, .json and .png. With --steps, also measure the
method hae with several numbers of steps and write steps.csv, .md, .json and .png. Masks and maps of each method are
kept in a folder of their own, and the next call reuses them."""
_EPILOG = """\
examples:
  python tools/compare_methods.py                                  # the phantom's test cases, shipped weights
  python tools/compare_methods.py --checkpoint runs/a --methods hae,ddib --output results/methods
  python tools/compare_methods.py --checkpoint runs/a --unconditional runs/b       # AnoDDPM with a network of its own
  python tools/compare_methods.py --methods residual,threshold --phantom-seed 1 --subjects 20
  python tools/compare_methods.py --checkpoint runs/a --methods "" --steps 10,20,50,100,200"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(_DESCRIPTION, _EPILOG, may_be_empty=("--methods",))
    parser.add_argument("--config", metavar="FILE", help=f"{CONFIG_HELP}; default: the config of the checkpoint, or "
                        f"{DEMO_CONFIG}")
    parser.add_argument("--run", "--checkpoint", dest="checkpoint", metavar="RUN", help="run folder of "
                        "train.py, folder of exported weights, or name of shipped weights; default: as "
                        "for translate.py")
    parser.add_argument("--unconditional", metavar="RUN", help="run of an unconditional network for AnoDDPM (configs/"
                        "anoddpm.py); default: the null condition of --checkpoint")
    parser.add_argument("--classifier", metavar="RUN", help="run of configs/classifier.py, for the method classifier")
    parser.add_argument("--dae", metavar="RUN", help="run of configs/dae.py, for the method dae")
    parser.add_argument("--input", metavar="FOLDER", help="folder of cases with segmentations; default: the test split "
                        "of the config's data")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the tables; default: RUN/comparison (shipped "
                        "weights: results/NAME/comparison), followed by the name of --input or the seed")
    parser.add_argument("--phantom-seed", type=int, metavar="N", help="compare on a new phantom of this seed, made in "
                        "data/ with the settings of the training phantom; methods without a calibration are "
                        "calibrated on its validation subjects")
    parser.add_argument("--subjects", type=int, default=20, metavar="N", help="number of test subjects of the "
                        "new phantom; default: 20")
    parser.add_argument("--methods", default=METHODS, metavar="A,B", help=f"methods to compare; default: {METHODS}")
    parser.add_argument("--steps", default="", metavar="N,M", help="also run hae with its schedule respaced to each of "
                        "these numbers of steps")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, loads the networks, compares."""
    arguments, overrides = _parser().parse_known_args(argv)
    check_overrides(overrides)
    check_fields(overrides)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    if not methods and not arguments.steps:
        raise UserError("--methods is empty and --steps is not given; give one of them")
    counts = _counts(arguments.steps)

    # Imported after parsing: --help needs no JAX.
    from hae_jax.commands.devices import use_all_cores, use_compilation_cache
    from hae_jax.commands.runs import chosen_network, with_classifier
    from hae_jax.phantom.on_demand import ensure_phantom, new_phantom
    from hae_jax.pipeline.comparison import Network, check, compare, compare_steps, method_entries, steps_entries
    from hae_jax.runs import TrainedRun
    from hae_jax.training.mesh import make_mesh

    use_all_cores()
    use_compilation_cache()
    loaded = chosen_network(arguments.config, arguments.checkpoint, overrides)
    config = loaded.config
    if arguments.phantom_seed is not None:
        if arguments.input:
            raise UserError("--phantom-seed and --input: give only one of them")
        new_phantom(config.data, arguments.phantom_seed, arguments.subjects)
    ensure_phantom(config.data, config.model.image_size)

    def network(loaded: TrainedRun, trained_with=None) -> Network:
        return Network(loaded.model, loaded.identity, loaded.calibrations, trained_with, loaded.shipped_calibration)

    others = {}
    for names, run in ((("anoddpm-simplex", "anoddpm-gaussian"), arguments.unconditional), (("dae",), arguments.dae)):
        if run:
            ema = f"--config.translation.ema={config.translation.ema}"  # this setting selects its parameters
            other = chosen_network(None, run, [ema])
            others |= dict.fromkeys(names, network(other, other.config))
    if arguments.classifier:
        others["classifier"] = network(with_classifier(loaded, arguments.classifier))
    where = {"output": arguments.output or loaded.results / _name(arguments), "source": arguments.input}
    if counts:  # checked before the first method runs; `compare` does the same for the methods
        check(steps_entries(counts, network(loaded)), config, **where)
    written = compare(method_entries(methods, network(loaded), others), config, make_mesh(), **where) if methods else []
    if counts:
        written += compare_steps(counts, network(loaded), config, make_mesh(), **where)
    print("\n".join(["written:", *(f"  {path}" for path in written)]))


def _name(arguments: argparse.Namespace) -> str:
    parts = ["comparison", *([source_name(arguments.input)] if arguments.input else []),
             *([f"seed_{arguments.phantom_seed}"] if arguments.phantom_seed is not None else [])]
    return "_".join(parts)


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UserError(f"--steps {text}: give whole numbers separated by commas, such as 10,20,50") from error
