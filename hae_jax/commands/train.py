"""`train.py`: trains a network, or goes on with it."""

import argparse
from collections.abc import Sequence

from hae_jax.commands.common import entry_point
from hae_jax.commands.config import CONFIG_HELP, read_config


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a class-conditional diffusion U-Net on slices that are labelled healthy or lesion. "
                    "The same command resumes a run that was stopped.",
        epilog="example: python train.py --config configs/phantom.py --workdir runs/phantom",
        allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--workdir", required=True, metavar="FOLDER",
                        help="where checkpoints, metrics.jsonl, TensorBoard logs and sample pictures go")
    arguments, overrides = parser.parse_known_args(argv)
    config = read_config(arguments.config, overrides)

    # Imported after parsing: --help shall not wait for JAX.
    from hae_jax.commands.devices import use_all_cores
    from hae_jax.data.demo import ensure_phantom
    from hae_jax.training.loop import train

    use_all_cores(max(1, config.training.batch_size // max(1, config.training.accumulation)))
    ensure_phantom(config.data, config.model.image_size)
    train(config, arguments.workdir)
