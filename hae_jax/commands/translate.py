"""`translate.py`: finds lesions in cases with a trained network."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hae_jax.commands.common import entry_point
from hae_jax.commands.config import CONFIG_HELP, read_config
from hae_jax.commands.runs import check_overrides, newest_run, trained_config, with_network

DEMO_CONFIG = "configs/phantom.py"
_DESCRIPTION = """\
Translate cases towards "healthy" with a trained network and write, for each, a lesion mask and an anomaly map as NIfTI
on the case's own grid, and a picture; for all together cases.csv and metrics.json. With nothing given it runs on the
phantom (made if absent) with the newest network trained on it. Exit status 1 if a case failed."""
_EPILOG = """\
examples:
  python translate.py                                            # the phantom's test cases
  python translate.py --checkpoint runs/a                        # the test cases of the data that runs/a learnt from
  python translate.py --checkpoint runs/a --input FOLDER --output FOLDER --config.translation.respacing=100"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="translate.py", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help=f"{CONFIG_HELP}; default: that of the checkpoint, or "
                        f"{DEMO_CONFIG} where no checkpoint is given. The network always comes from the checkpoint")
    parser.add_argument("--checkpoint", metavar="RUN", help="folder that train.py --workdir wrote; default: the "
                        "newest run in runs/ that was trained on the config's data")
    parser.add_argument("--input", metavar="FOLDER", help="folder of cases, or one case; default: the test split of "
                        "the config's data")
    parser.add_argument("--output", metavar="FOLDER", help="where the results go; default: RUN/translation, with the "
                        "name of --input after it")
    parser.add_argument("--overwrite", action="store_true", help="work again where --output already holds the results "
                        "of the same network, cases and settings")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, loads the network, translates; exits with 1 if a case failed."""
    arguments, overrides = _parser().parse_known_args(argv)
    check_overrides(overrides)
    config, checkpoint = None, arguments.checkpoint
    if arguments.config or not checkpoint:
        config = read_config(arguments.config or DEMO_CONFIG, overrides)
        checkpoint = checkpoint or newest_run(arguments.config or DEMO_CONFIG, config.data.root)

    # Imported after parsing: --help shall not wait for JAX.
    from hae_jax.commands.devices import use_all_cores
    from hae_jax.data.demo import ensure_phantom
    from hae_jax.training.checkpoint import load_network
    from hae_jax.training.mesh import make_mesh
    from hae_jax.translation.run import translate

    use_all_cores()
    network = load_network(checkpoint)
    config = with_network(config or trained_config(network.config, overrides), network.config)
    if not config.translation.ema:  # known only now, since the checkpoint itself may say so
        network = load_network(checkpoint, ema=False)
    ensure_phantom(config.data, config.model.image_size)
    print(f"network: {network.identity['path']}, {network.identity['parameters']}")
    name = "_".join(["translation", *([Path(arguments.input).resolve().name] if arguments.input else [])])
    report = translate(network.model, network.identity, config, make_mesh(), source=arguments.input,
                       output=arguments.output or Path(checkpoint) / name, overwrite=arguments.overwrite)
    print("\n".join(report.lines()))
    if report.failed:
        sys.exit(1)
