"""`tools/make_phantom.py`: makes a phantom, the stand-in for patient data."""

import argparse
from collections.abc import Sequence

from hae_jax.commands.common import CommandParser, entry_point
from hae_jax.errors import UserError
from hae_jax.phantom.cohort import make_phantom, modalities_of
from hae_jax.phantom.lesion import PHANTOMS

_EXAMPLES = """\
examples:
  python tools/make_phantom.py --output data/phantom                          # 24 subjects, a minute or two
  python tools/make_phantom.py --output data/small --size 0.25 --subjects 8   # takes seconds, to try things out
  python tools/make_phantom.py --output data/phantom --figure docs/phantom.png
  python tools/make_phantom.py --output data/stroke --kind stroke             # one modality, lesions as dark as fluid
Running the same command again makes only missing subjects. The folder contains no patients: the anatomy is the MNI
ICBM152 template of the nilearn package, and the lesions are drawn.
"""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        "Make a phantom: brain MRI subjects in the BraTS 2021 layout, some with lesions, from a seed.", _EXAMPLES)
    parser.add_argument("--output", default="data/phantom", metavar="FOLDER",
                        help="folder for the subjects; default: data/phantom")
    parser.add_argument("--subjects", type=int, default=24, metavar="N", help="number of subjects; default: 24")
    parser.add_argument("--kind", choices=PHANTOMS, default="tumour", help="tumour: flair, t1, t1ce and t2; stroke: t1 "
                        "with old infarcts, as dark as fluid; default: tumour")
    parser.add_argument("--lesion-share", type=float, default=0.75, metavar="F", help="share of subjects with a "
                        "lesion, 0 to 1; default: 0.75")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed; the same seed gives the same "
                        "files; default: 0")
    parser.add_argument("--size", type=float, default=1.0,
                        metavar="F",
                        help="scale of the 240 x 240 x 155 grid of 1 mm voxels; 0.25 is 60 x 60 x 39 of 4 mm; default: "
                        "1")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes; each needs about 1.5 GB at "
                        "full size; default: 2")
    parser.add_argument("--figure", metavar="PNG", help="also draw a few subjects to this file")
    return parser.parse_args(argv)


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Makes the folder and, if asked, its figure."""
    args = _parse(argv)
    if args.figure is not None and not args.figure.lower().endswith(".png"):
        raise UserError(f"--figure {args.figure}: the name must end in .png")
    folder = make_phantom(args.output, subjects=args.subjects, lesion_share=args.lesion_share, seed=args.seed,
                          size=args.size, workers=args.workers, kind=args.kind)
    print(f"phantom of {args.subjects} subject{'s' * (args.subjects != 1)} in {folder}")
    if args.figure:
        from hae_jax.phantom.figures import draw_phantom  # matplotlib is slow to import

        print(f"picture: {draw_phantom(folder, args.figure, modalities_of(args.kind))}")
