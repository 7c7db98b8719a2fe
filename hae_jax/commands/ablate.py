"""`tools/ablate.py`: the effect of each setting of the method `residual`, on validation slices."""

from collections.abc import Sequence
from pathlib import Path

from hae_jax.commands.common import CommandParser, check_fields, entry_point
from hae_jax.commands.runs import check_overrides

_DESCRIPTION = """\
Measure the effect of each setting of the method residual on slices of the validation split. Writes ablation.md and
ablation.json. The first row is the intensity threshold. The second row has the settings of the config. Each further row
changes one of them. Test subjects are not used. --config.translation.FIELD=VALUE changes a setting for all rows
(configs/default.py explains all fields)."""
_EPILOG = """\
examples:
  python tools/ablate.py --checkpoint runs/a
  python tools/ablate.py --checkpoint runs/a --slices 1000 --config.translation.timesteps="(100, 200, 300)\""""


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, loads the network, compares."""
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    parser.add_argument("--run", "--checkpoint", dest="checkpoint", metavar="RUN", help="run folder of "
                        "train.py, folder of exported weights, or name of shipped weights; default: "
                        "the shipped weights of the phantom")
    parser.add_argument("--slices", type=int, default=256, metavar="N", help="validation slices used; default: 256")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the tables; default: RUN/ablation (shipped "
                        "weights: results/NAME/ablation)")
    arguments, overrides = parser.parse_known_args(argv)
    check_overrides(overrides)
    check_fields(overrides)

    # Imported after parsing: --help needs no JAX.
    from hae_jax.commands.devices import use_all_cores, use_compilation_cache
    from hae_jax.commands.runs import chosen_network
    from hae_jax.data.store import open_store
    from hae_jax.phantom.on_demand import ensure_phantom
    from hae_jax.pipeline.ablation import ablate, variations
    from hae_jax.training.mesh import make_mesh

    use_all_cores()
    use_compilation_cache()
    loaded = chosen_network(None, arguments.checkpoint, overrides)
    config = loaded.config
    ensure_phantom(config.data, config.model.image_size)
    page = ablate(loaded.model, config, make_mesh(), open_store(config.data.root), variations(config),
                  slices=arguments.slices, output=Path(arguments.output or loaded.results / "ablation"))
    print(f"{page.read_text()}\nwritten: {page}")
