"""`hae-export`: exports a network to share, or masks as a training set."""

import argparse
from collections.abc import Sequence

from hae_jax.commands.common import CommandParser, entry_point
from hae_jax.errors import UserError

_DESCRIPTION = """\
Write a trained network as a folder for the Hugging Face Hub (--to), or the masks of a run as a training set for nnU-Net
(--nnunet)."""
_EPILOG = """\
examples:
  hae-export --to shared/my-network --checkpoint runs/a --license apache-2.0 --results runs/a/translation
  hae-export --nnunet nnUNet_raw/Dataset501_Lesion --results results --cases 100

--to writes model.safetensors, config.json, calibration.json and README.md (the model card). translate.py --checkpoint
and Localizer.load accept this folder. Upload it with: hf upload NAME shared/my-network
--nnunet writes imagesTr, labelsTr, dataset.json and sure_cases.csv (the most certain cases first). It needs results
that were made with --save-probability. Research use only; not a medical device."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", metavar="FOLDER", help="new folder for the network")
    target.add_argument("--nnunet", metavar="FOLDER", help="new folder for the dataset")
    parser.add_argument("--run", "--checkpoint", dest="checkpoint", metavar="RUN",
                        help="with --to: run folder of train.py, folder of exported weights, or name of shipped "
                        "weights; default: phantom")
    parser.add_argument("--results", metavar="FOLDER", help="results of translate.py: metrics for the card, or masks")
    parser.add_argument("--license", metavar="ID", help="with --to: licence of the weights, as "
                        "the Hub abbreviates it; default: unknown")
    parser.add_argument("--half", action="store_true", help="with --to: store the weights in half precision; a "
                        "calibration of full-precision weights is left out, because it belongs to them")
    parser.add_argument("--cases", type=int, metavar="N",
                        help="with --nnunet: only the N most certain cases; default: all")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the folder."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.nnunet:
        if arguments.checkpoint or arguments.license or arguments.half:
            parser.error("--run, --license and --half belong to --to; leave them out with --nnunet")
        if not arguments.results:
            raise UserError("--nnunet: needs the folder of masks; give it with --results")
        from hae_jax.pipeline.nnunet import ORDER, export_nnunet

        names = export_nnunet(arguments.results, arguments.nnunet, arguments.cases)
        print(f"{len(names)} cases in {arguments.nnunet}, the most certain first in {ORDER}: {', '.join(names[:5])}"
              f"{', ...' if len(names) > 5 else ''}")
        return
    if arguments.cases is not None:
        parser.error("--cases belongs to --nnunet; leave it out with --to")
    from hae_jax.pipeline.export import export_network

    for line in export_network(arguments.checkpoint or "phantom", arguments.to, results=arguments.results,
                               license_id=arguments.license or "unknown", half=arguments.half):
        print(line)
    print(f"network: {arguments.to}; complete its model card, README.md")
