"""tools/prepare_data.py: cases on disk -> the prepared dataset that training and evaluation read."""

import argparse
import sys
from collections.abc import Sequence

from hae_jax.commands.common import CASES_HELP, CommandParser, checked_table, entry_point
from hae_jax.data.layouts import LAYOUTS, MODALITIES
from hae_jax.data.prepare import prepare
from hae_jax.data.store import verify_store

_DESCRIPTION = """\
Make a prepared dataset from a folder of cases: normalised axial slices, lesion masks, labels, a split by patient. A
case that cannot be used is named and skipped, and the exit status is 1. After a mistake in the command the exit status
is 2, and nothing is written. Volumes of any orientation are turned to the orientation of BraTS. Slices prepared for the
PyTorch code (npy_train/patient_<case>/slice_<k>.npz, ...) are imported unchanged."""
_LAYOUTS = "\n".join(f"  {title}: {example}" for title, example in LAYOUTS)
_EPILOG = f"""\
layouts, recognised automatically (docs/data.md shows the folders):
{_LAYOUTS}

examples:
  python tools/prepare_data.py --source BraTS2021/ --output data/brats --workers 4
  python tools/prepare_data.py --source ATLAS_2/Training --output data/atlas --modalities t1
  python tools/prepare_data.py --source phantom/ --output data/phantom --train-fraction 0.6 --val-fraction 0.2
  python tools/prepare_data.py --cases cases.csv --output data/own
  python tools/prepare_data.py --verify data/brats

The default split is the published one; fewer than 20 cases need a larger --val-fraction."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--source", metavar="FOLDER", help="folder of cases in one of the layouts below")
    add("--cases", metavar="FILE", help=CASES_HELP)
    add("--output", metavar="STORE", help="folder to write")
    add("--modalities", nargs="+", default=MODALITIES, choices=MODALITIES, metavar="NAME",
        help=f"the channels in their order; default: {' '.join(MODALITIES)}")
    add("--image-size", type=int, default=128, metavar="N", help="slices are resized to N x N pixels; default: 128")
    add("--train-fraction", type=float, default=0.75, metavar="F", help="share of patients for training, rounded "
        "down; default: 0.75")
    add("--val-fraction", type=float, default=0.05, metavar="F", help="share of patients for validation and "
        "calibration, default: 0.05; the rest is for testing")
    add("--seed", type=int, default=10, metavar="N", help="seed of the split; default: 10")
    add("--workers", type=int, default=2, metavar="N", help="processes; each needs about 1 GB for BraTS cases; "
        "default: 2")
    add("--overwrite", action="store_true", help="replace an existing dataset when the new one is complete")
    add("--verify", metavar="STORE", help="only check the files of a prepared dataset against their checksums")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags and prepares, or verifies. Exits with 1 if a case was skipped or a file has changed."""
    parser = _parser()
    flags = vars(parser.parse_args(argv))
    verify, table = flags.pop("verify"), flags.pop("cases")
    if table is not None and flags["source"] is not None:
        parser.error("give --source or --cases, not both")
    flags["source"] = flags["source"] if table is None else checked_table(table)
    given = [flags["source"] is not None, flags["output"] is not None]
    if any(given) if verify is not None else not all(given):
        parser.error("give --source (or --cases) and --output, or --verify alone")
    if verify is not None:
        problems = verify_store(verify)
        lines = problems or [f"{verify}: every file is as it was written"]
    else:
        report = prepare(**flags)
        problems, lines = report.skipped, report.lines()
    print("\n".join(lines))
    if problems:
        sys.exit(1)
