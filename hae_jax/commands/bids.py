"""`hae-bids`: a BIDS App around `translate.py`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hae_jax.commands.common import CommandParser, entry_point
from hae_jax.errors import UserError

_DESCRIPTION = """\
Find lesions in a BIDS dataset and write BIDS derivatives. The level participant processes the subjects. The level group
collects their lesion volumes in one table. The two folders and the level come first. After them, the options of
translate.py may follow, except --input, --cases, --output and --layout, for example --checkpoint RUN,
--save-probability, --save-healthy, --calibration FILE, --config.translation.draws=4."""
_OWN = ("--input", "--cases", "--output", "--layout")  # options of translate.py that this command sets itself
_EPILOG = """\
examples:
  hae-bids /data/bids /data/bids/derivatives/hae participant --checkpoint runs/a
  hae-bids /data/bids /data/bids/derivatives/hae participant --participant-label 01 02 --checkpoint runs/a
  hae-bids /data/bids /data/bids/derivatives/hae group

Jobs with one subject each may run at the same time. Research use only; not a medical device."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    parser.add_argument("bids_dir", type=Path, help="BIDS dataset with skull-stripped, registered images")
    parser.add_argument("output_dir", type=Path, help="folder for the derivatives")
    parser.add_argument("analysis_level", choices=("participant", "group"), help="participant: process "
                        "subjects; group: write the table of all subjects")
    parser.add_argument("--participant-label", "--participant_label", nargs="+", metavar="LABEL", default=[],
                        help="subjects to process, with or without sub-; default: all")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs one level; exits with 1 if a case failed."""
    arguments, others = _parser().parse_known_args(argv)
    # Imported after parsing: --help needs no JAX.
    from hae_jax.pipeline.bids import RESULTS, check_derivatives_folder, write_derivatives, write_group_table

    if arguments.analysis_level == "group":
        if others:
            raise UserError(f"{others[0]}: the level group does not take this argument; see --help")
        print(f"table: {write_group_table(arguments.output_dir)}")
        return
    if refused := [argument for argument in others if argument.partition("=")[0] in _OWN]:
        raise UserError(f"{refused[0]}: is set by this command; leave it out")
    from hae_jax.commands import translate

    subjects = _subjects(arguments.bids_dir, arguments.participant_label)
    check_derivatives_folder(arguments.output_dir, arguments.bids_dir)
    results = arguments.output_dir / RESULTS / (subjects[0].name if len(arguments.participant_label) == 1 else "")
    # The input is a folder of links to the subjects: derivatives/ and sourcedata/ hold images that are no cases.
    with tempfile.TemporaryDirectory() as links:
        for subject in subjects:
            (Path(links) / subject.name).symlink_to(subject.resolve(), target_is_directory=True)
        status = _status(translate.main, ["--input", links, "--output", str(results), *others])
    if status not in (0, 1):
        sys.exit(status)
    masks = write_derivatives(results, arguments.output_dir)
    print(f"derivatives of {len(masks)} cases: {arguments.output_dir}")
    sys.exit(status)


def _status(command, argv: list[str]) -> int:
    """The exit status of another command."""
    try:
        command(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def _subjects(dataset: Path, labels: Sequence[str]) -> list[Path]:
    """The folders of the selected subjects."""
    if not (dataset / "dataset_description.json").is_file():
        raise UserError(f"{dataset}: has no dataset_description.json; give the folder of a BIDS dataset. For other "
                        "layouts use translate.py --layout bids")
    if not labels:
        found = sorted(path for path in dataset.glob("sub-*") if path.is_dir())
        if not found:
            raise UserError(f"{dataset}: has no folder sub-...; give the folder of a BIDS dataset")
        return found
    wanted = [dataset / f"sub-{label.removeprefix('sub-')}" for label in labels]
    if missing := [path.name for path in wanted if not path.is_dir()]:
        raise UserError(f"{dataset}: has no {', '.join(missing)}; check --participant-label")
    return wanted
