"""`tools/phantom_threshold.py`: volume Dice of the best intensity threshold on a folder of cases, a baseline."""

from collections.abc import Sequence
from pathlib import Path

from hae_jax.commands.common import CommandParser, entry_point
from hae_jax.phantom.cohort import MANIFEST
from hae_jax.phantom.figures import ThresholdScore, best_threshold

_DESCRIPTION = """\
Print the volume Dice of the best intensity threshold: of one threshold common to all cases, and of the best threshold
for each case. Intensities are normalised by the 99th percentile. Both thresholds are chosen with the segmentations, so
the values are upper bounds."""
_EPILOG = """\
examples:
  python tools/phantom_threshold.py data/phantom
  python tools/phantom_threshold.py data/stroke --modality t1 --dark"""


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Scores the folder and prints a table."""
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    parser.add_argument("folder", nargs="?", default="data/phantom", help="folder of cases; default: data/phantom")
    parser.add_argument("--modality", default="flair", help="modality to threshold; default: flair")
    parser.add_argument("--dark", action="store_true", help="lesions are dark: voxels below the threshold are lesion")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    what = "PHANTOM metrics" if (folder / MANIFEST).exists() else "metrics"
    print("\n".join(_lines(best_threshold(folder, args.modality, args.dark), what, args.modality)))


def _lines(score: ThresholdScore, what: str, modality: str) -> list[str]:
    lines = ["case                    lesion ml   Dice, common threshold   Dice, own threshold"]
    for row in zip(score.names, score.volumes_ml, score.common_dice, score.own_dice, strict=True):
        lines.append("{:<22} {:>10.1f} {:>24.3f} {:>21.3f}".format(*row))
    lines.append(f"{what} over {len(score.names)} cases with a lesion, {modality} threshold, mean volume Dice:")
    lines.append(f"  one common threshold ({score.common_threshold:.3f} of the 99th percentile)  "
                 f"{score.common_dice.mean():.3f}")
    lines.append(f"  each case's own best threshold (oracle)                {score.own_dice.mean():.3f}")
    return lines
