"""`train.py`: trains a network, or resumes a run."""

import argparse
import os
from collections.abc import Sequence

from hae_jax.commands.common import CommandParser, check_fields, entry_point
from hae_jax.commands.config import CONFIG_HELP, read_config
from hae_jax.errors import UserError

_DESCRIPTION = """\
Train a class-conditional diffusion U-Net on slices that are labelled healthy or lesion. The same command resumes a
stopped run. After SIGTERM or SIGUSR1 the run saves and exits with status 75; run the command again to resume."""
_EPILOG = """\
examples:
  python train.py --config configs/phantom.py --workdir runs/phantom
  python train.py --config configs/brats_v2c.py --dry-run                       # parameters, memory, operations, data
  python train.py --config configs/brats_v2c.py --workdir runs/a --profile 10:15
  srun python train.py --config configs/brats_v2c.py --workdir runs/a           # several hosts: docs/scaling.md"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--workdir", metavar="FOLDER",
                        help="run folder: checkpoints, metrics.jsonl, TensorBoard logs, sample pictures")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory, operations, data, and exit")
    parser.add_argument("--print-sharding", action="store_true",
                        help="print how each array is split over the devices, and exit")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="record a profile of these steps to WORKDIR/profile")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, if there is no scheduler")
    parser.add_argument("--num-processes", type=int, metavar="N", help="number of processes, if there is no "
                        "scheduler; 1: train with this process alone and ignore the scheduler")
    parser.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and trains."""
    arguments, overrides = _parser().parse_known_args(argv)
    check_fields(overrides)
    config = read_config(arguments.config, overrides)
    only_says = arguments.dry_run or arguments.print_sharding
    if not (arguments.workdir or only_says):
        raise UserError("--workdir is missing; give the folder for the run, such as --workdir runs/a")

    # Imported after parsing: --help needs no JAX.
    import jax

    from hae_jax.commands.devices import use_all_cores, use_compilation_cache
    from hae_jax.phantom.on_demand import ensure_phantom
    from hae_jax.training import dry_run, hosts, loop
    from hae_jax.training.profile import parse_span

    use_compilation_cache()
    profile = parse_span(arguments.profile) if arguments.profile else None
    if arguments.num_processes or not hosts.in_cluster(os.environ):
        parts = max(1, config.training.accumulation) * max(1, arguments.num_processes or 1)
        use_all_cores(max(1, config.training.batch_size // parts))
    with hosts.joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
        said = [*(dry_run.describe(config) if arguments.dry_run else ()),
                *([loop.sharding_of(config)] if arguments.print_sharding else ())]
        if said and jax.process_index() == 0:
            print("\n".join(said))
        if not only_says:
            hosts.once(lambda: ensure_phantom(config.data, config.model.image_size))
            loop.train(config, arguments.workdir, profile=profile)
