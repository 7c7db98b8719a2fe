"""Command: how well one threshold on flair does on a folder of cases, the figure that any method has to beat."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hae_jax.commands.common import entry_point
from hae_jax.data.phantom import MANIFEST
from hae_jax.data.phantom_figures import ThresholdScore, flair_threshold

_DESCRIPTION = """\
Print the volume Dice of the best threshold on flair (normalised by its 99th percentile), for one threshold common to
all cases and for each case's own best one. Both are chosen with the segmentations, so they are upper bounds."""


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Scores the folder and prints a table."""
    parser = argparse.ArgumentParser(
        prog="phantom_threshold", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/phantom_threshold.py data/phantom")
    parser.add_argument("folder", nargs="?", default="data/phantom", help="folder of cases (default: data/phantom)")
    folder = Path(parser.parse_args(argv).folder)
    score = flair_threshold(folder)
    print("\n".join(_lines(score, "PHANTOM figures" if (folder / MANIFEST).exists() else "figures")))


def _lines(score: ThresholdScore, what: str) -> list[str]:
    lines = ["case                    lesion ml   Dice, common threshold   Dice, own threshold"]
    for row in zip(score.names, score.volumes_ml, score.common_dice, score.own_dice, strict=True):
        lines.append("{:<22} {:>10.1f} {:>24.3f} {:>21.3f}".format(*row))
    lines.append(f"{what} over {len(score.names)} cases with a lesion, flair threshold, mean volume Dice:")
    lines.append(f"  one common threshold ({score.common_threshold:.3f} of the 99th percentile)  "
                 f"{score.common_dice.mean():.3f}")
    lines.append(f"  each case's own best threshold (oracle)                {score.own_dice.mean():.3f}")
    return lines
