"""Makes the phantom if a command needs it and it does not exist. Used by training and translation."""

import logging
from pathlib import Path
from typing import Any

import ml_collections

from hae_jax.data.prepare import prepare
from hae_jax.errors import UserError
from hae_jax.files import finish_replacing, one_at_a_time
from hae_jax.phantom.cohort import check_phantom, make_phantom

_LOG = logging.getLogger(__name__)
_TRAINING, _VALIDATION = 2, 6  # subjects of a phantom for comparing methods


def new_phantom(data: ml_collections.ConfigDict, seed: int, subjects: int) -> None:
    """Sets the config's `data` to a phantom of the same kind, with another seed and this many test subjects.

    Raises:
      UserError: if the data are not a phantom's, or there is no test subject.
    """
    if data.phantom is None:
        raise UserError("--phantom-seed: the network was not trained on a phantom; give cases with --input")
    if subjects < 1:
        raise UserError(f"--subjects {subjects}: give at least 1")
    total = subjects + _TRAINING + _VALIDATION
    name = f"{data.phantom.get('kind', 'tumour')}_seed_{seed}_{subjects}"
    data.root = f"data/phantom_{name}"
    data.phantom.update({"cases": f"data/phantom_{name}_cases", "seed": seed, "subjects": total,
                         "train_fraction": (_TRAINING + 0.5) / total, "val_fraction": (_VALIDATION + 0.5) / total})


def ensure_phantom(data: ml_collections.ConfigDict, image_size: int) -> None:
    """Makes and prepares the phantom if the config has one and the prepared dataset does not exist.

    If `data.phantom` is None or `data.root` exists, nothing is made. If another process is making it, this one waits.

    Args:
      data: the config's `data`.
      image_size: side of the network's slices, pixels.

    Raises:
      UserError: settings do not fit, or the phantom's folder holds something else or a phantom with other settings.
    """
    phantom, root = data.phantom, Path(data.root)
    if phantom is None:
        return
    cases = Path(phantom.cases)
    if root.exists() or finish_replacing(root):
        check_phantom(cases, **_settings(phantom))
        return
    cases.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(cases.with_name(f".{cases.name}.lock"),
                       lambda: _LOG.info("waiting for the process that makes the phantom %s", cases)):
        if not root.exists():
            _make(data, image_size)


def _settings(phantom: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `make_phantom` that the files depend on."""
    return {name: phantom[name] for name in ("subjects", "lesion_share", "seed", "size")} | {
        "kind": phantom.get("kind", "tumour")}


def _make(data: ml_collections.ConfigDict, image_size: int) -> None:
    phantom = data.phantom
    _LOG.info("%s does not exist: making a phantom of %d subjects in %s", data.root, phantom.subjects, phantom.cases)
    make_phantom(phantom.cases, workers=phantom.workers, **_settings(phantom))
    report = prepare(phantom.cases, data.root, image_size=image_size, train_fraction=phantom.train_fraction,
                     val_fraction=phantom.val_fraction, workers=phantom.workers, modalities=data.modalities)
    _LOG.info("\n".join(report.lines()))
