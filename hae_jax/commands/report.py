"""`tools/report.py`: the report page of a folder of results or of a training run."""

import argparse
from collections.abc import Sequence

from hae_jax.commands.common import entry_point
from hae_jax.errors import UserError

_DESCRIPTION = """\
Write the report page of a folder of results (translate.py) or of a training run (train.py): one HTML file that opens in
a browser by a double click and needs neither network nor server. What is missing or damaged is named on the page. A
page may be made while the run goes on; the command given again makes it anew."""
_EPILOG = """\
examples:
  python tools/report.py results/phantom/translation
  python tools/report.py results/hospital --anonymize --output for_a_colleague.html
  python tools/report.py runs/a"""


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the page."""
    parser = argparse.ArgumentParser(prog="report.py", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="results of translate.py, or a run of train.py")
    parser.add_argument("--output", metavar="FILE", help="the page; default: FOLDER/report.html")
    parser.add_argument("--anonymize", action="store_true", help="number the cases and leave out links, commands and "
                        "names of files; default page: FOLDER/report_anonymous.html")
    parser.add_argument("--max-mb", type=float, default=25.0, metavar="MB", help="largest page in megabytes; beyond it "
                        "the pictures of each case lie in a folder beside the page; default: 25")
    arguments = parser.parse_args(argv)
    if arguments.output == "":
        raise UserError("--output is empty; name a file, or leave --output out")

    # Imported after parsing: --help shall not wait for NumPy.
    from hae_jax.report.write import write_report

    print(write_report(arguments.folder, output=arguments.output, anonymize=arguments.anonymize,
                       limit_mb=arguments.max_mb))
