"""`tools/report.py`: the report page of a folder of results or of a training run."""

from collections.abc import Sequence

from hae_jax.commands.common import CommandParser, entry_point

_DESCRIPTION = """\
Write the report page of a folder of results (translate.py) or of a training run (train.py). The page is one HTML file.
It opens in a browser with a double click and needs neither network nor server. Missing or damaged files are named on
the page. The command may be run while the run continues; run it again to update the page."""
_EPILOG = """\
examples:
  python tools/report.py results/phantom/translation
  python tools/report.py results/hospital --anonymize --output for_a_colleague.html
  python tools/report.py runs/a"""


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the page."""
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    parser.add_argument("folder", metavar="FOLDER", help="results of translate.py, or a run of train.py")
    parser.add_argument("--output", metavar="FILE", help="the page; default: FOLDER/report.html")
    parser.add_argument("--anonymize", action="store_true", help="number the cases and leave out links, commands and "
                        "names of files; default page: FOLDER/report_anonymous.html")
    parser.add_argument("--max-mb", type=float, default=25.0, metavar="MB", help="largest page in megabytes; above "
                        "it the pictures of each case are in a folder beside the page; default: 25")
    arguments = parser.parse_args(argv)

    # Imported after parsing: --help needs no NumPy.
    from hae_jax.report.write import write_report

    print(write_report(arguments.folder, output=arguments.output, anonymize=arguments.anonymize,
                       limit_mb=arguments.max_mb))
