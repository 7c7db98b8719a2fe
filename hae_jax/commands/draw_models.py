"""tools/draw_models.py: the drawing and the table of parameters in docs/models.md."""

from collections.abc import Sequence
from pathlib import Path

from hae_jax.commands.common import CommandParser, entry_point
from hae_jax.commands.config import read_config

_NETWORKS = ("brats_fpdm", "brats_hae", "brats_hae_lite", "brats_v2", "brats_v2c")
_EPILOG = """\
examples:
  python tools/draw_models.py --output docs/models.svg
  python tools/draw_models.py --table"""


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Draws, or prints the table."""
    parser = CommandParser("Draw the five networks with the sizes of configs/brats_v2c.py, or count their parameters.",
                           _EPILOG)
    parser.add_argument("--output", default="docs/models.svg", metavar="FILE",
                        help="drawing to write: .svg, .png or .pdf; default: docs/models.svg")
    parser.add_argument("--table", action="store_true",
                        help="print the parameter counts of the five BraTS configs as Markdown instead")
    arguments = parser.parse_args(argv)
    if not arguments.table and Path(arguments.output).suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"--output {arguments.output}: the name must end in .svg, .png or .pdf")

    from hae_jax.model import UNetConfig  # after parsing: --help needs no JAX

    configs = [UNetConfig.from_mapping(read_config(name, []).model) for name in _NETWORKS]
    if arguments.table:
        from hae_jax.model.sizes import parameter_table

        print(parameter_table(configs))
    else:
        from hae_jax.model.drawing import draw_models

        draw_models(configs[-1], arguments.output)
        print(f"written: {arguments.output}")
