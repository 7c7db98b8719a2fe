"""Phantom, last stage: makes a folder of subjects in the BraTS 2021 layout, in parallel, resumable, with provenance.

Users without data run the program on this folder. `hae_jax.data.cases` reads it like any other BraTS folder.
"""

import functools
import gzip
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from hae_jax import provenance
from hae_jax.data.cases import MODALITIES
from hae_jax.errors import UserError
from hae_jax.files import folder_written_whole, read_json, remove_leftovers, write_json, written_whole
from hae_jax.phantom.lesion import PHANTOMS, plan_lesions
from hae_jax.phantom.subject import make_subject
from hae_jax.processes import in_order

MANIFEST = "phantom.json"
GENERATOR = 1  # raise it whenever the same seed gives other bytes than before, so that folders are not mixed
SIZES = (0.1, 1.0)

MNI_NOTICE = """\
Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre,
Montreal Neurological Institute, McGill University.
Permission to use, copy, modify, and distribute this software and its
documentation for any purpose and without fee is hereby granted, provided that
the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for
any purpose. It is provided "as is" without express or implied warranty. The
authors are not responsible for any data loss, equipment damage, property loss,
or injury to subjects or patients resulting from the use or misuse of this
software package."""

_README = """\
# A phantom, not patients

{subjects} made-up subjects, {lesions} of them with lesions, in the layout of BraTS 2021: {content}, empty for healthy
subjects. Every metric measured on this folder is a **phantom metric** and must be reported as such. It says nothing
about patients.

The anatomy is the MNI ICBM152 2009 nonlinear symmetric template (T1, grey- and white-matter maps) of the nilearn
package. It is warped differently for each subject. Contrasts, harmless bright spots (not labelled), lesions, bias field
and noise are computed.

Made by HAE-JAX's `tools/make_phantom.py` with kind {kind}, seed {seed}, lesion share {lesion_share} and size {size}
(voxels of {voxel:.3g} mm). `{manifest}` records settings, versions and the planned lesions of each subject.
{notice}

## Notice of the MNI ICBM152 template

{mni}

Reference: Fonov VS, Evans AC, McKinstry RC, Almli CR, Collins DL (2009). Unbiased nonlinear average age-appropriate
brain templates from birth to adulthood. NeuroImage 47 (supplement 1), S102.
"""


_CONTENT = {
    "tumour": "flair, t1, t1ce, t2 and a\nsegmentation with labels 1 (necrotic or non-enhancing core), 2 (oedema) and "
              "4 (enhancing tumour)",
    "stroke": "t1 and a segmentation with\nlabel 1 (old infarct)",
}


@dataclass(frozen=True)
class Settings:
    """All that a subject depends on, except its index."""

    seed: int
    lesion_share: float
    size: float
    kind: str


def case_name(index: int) -> str:
    return f"Phantom_{index:05d}"


def modalities_of(kind: str) -> tuple[str, ...]:
    """The channels of a kind of phantom."""
    return ("t1",) if kind == "stroke" else MODALITIES


def has_lesion(index: int, share: float) -> bool:
    """Whether a subject has a lesion. Of the first n subjects, ceil(n share) have one, for each n."""
    return math.ceil(round((index + 1) * share, 9)) > math.ceil(round(index * share, 9))


def make_phantom(
    output: str | os.PathLike, *, subjects: int = 24, lesion_share: float = 0.75, seed: int = 0, size: float = 1.0,
    workers: int = 2, progress: bool = True, kind: str = "tumour",
) -> Path:
    """Makes `subjects` subjects in the folder `output` and returns its path. Finished subjects are not made again.

    The same seed, share and size give the same files, byte for byte. A subject depends neither on the number of
    subjects nor on the number of workers. Each subject is written whole or not at all.

    Args:
      lesion_share: share of subjects with a lesion, 0 to 1.
      size: scale of the 240 x 240 x 155 grid, 0.1 to 1; the voxels grow accordingly.
      workers: processes; each needs about 1.5 GB at full size.
      kind: "tumour" (flair, t1, t1ce, t2; tumours of 0.5 to 120 ml) or "stroke" (t1; old infarcts of 0.5 to 100 ml that
        are as dark as fluid).

    Raises:
      UserError: an argument is out of range, `output` holds something else or a phantom with other settings, or a
        worker process was killed.
    """
    _check(subjects, lesion_share, seed, size, workers, kind)
    output, settings = Path(output), Settings(seed, float(lesion_share), float(size), kind)
    _claim(output, settings, subjects)
    missing = [i for i in range(subjects) if not (output / case_name(i)).is_dir()]
    with tqdm(total=subjects, initial=subjects - len(missing), desc="phantom", unit="subject",
              disable=not progress) as bar:
        write = functools.partial(write_subject, settings, output)
        for _ in in_order(write, missing, min(workers, len(missing))):
            bar.update()
    write_json(output / MANIFEST, _manifest(settings, subjects, complete=True))
    return output


def check_phantom(
    folder: str | os.PathLike, *, subjects: int, lesion_share: float, seed: int, size: float, kind: str
) -> None:
    """Compares the phantom in a folder with the settings of `make_phantom`. A folder without a phantom passes.

    Raises:
      UserError: the phantom was made with other settings.
    """
    if (Path(folder) / MANIFEST).exists():
        there = _compare(Path(folder), Settings(seed, float(lesion_share), float(size), kind), subjects)
        if there < subjects:
            raise UserError(f"{folder}: holds a phantom of {there} subjects instead of {subjects}; give another "
                            "folder or the same number, or remove it and the dataset that was prepared from it")


def _check(subjects: int, lesion_share: float, seed: int, size: float, workers: int, kind: str) -> None:
    if kind not in PHANTOMS:
        raise UserError(f"kind={kind!r}: not a kind of phantom; choose {' or '.join(PHANTOMS)}")
    if subjects < 1:
        raise UserError(f"subjects={subjects}: a phantom needs at least 1; give a positive number")
    if not 0 <= lesion_share <= 1:
        raise UserError(f"lesion_share={lesion_share}: not a share; give a number from 0 to 1")
    if seed < 0:
        raise UserError(f"seed={seed}: negative; give 0 or more")
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"size={size}: out of range; give a number from {SIZES[0]} to {SIZES[1]}")
    if workers < 1:
        raise UserError(f"workers={workers}: at least 1 process is needed; give a positive number")


def _claim(output: Path, settings: Settings, subjects: int) -> None:
    """Makes `output` a phantom folder with these settings, if it is not one already."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder for the phantom")
    if (output / MANIFEST).exists():
        _compare(output, settings, subjects)
    elif output.exists() and any(p for p in output.iterdir() if not p.name.startswith(".")):
        raise UserError(f"{output}: holds files but no {MANIFEST}, so it is no phantom; give a new or empty folder")
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    with written_whole(output / "README.md") as path:
        path.write_text(_readme(settings, subjects), encoding="utf-8")
    write_json(output / MANIFEST, _manifest(settings, subjects, complete=False))


def _compare(output: Path, settings: Settings, subjects: int) -> int:
    """Raises a UserError if a phantom has other settings or more subjects. Returns its number of subjects."""
    try:
        found = read_json(output / MANIFEST)
        there = {**found["settings"], "generator": found["generator"]}
        count = int(found["subjects"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output / MANIFEST}: not a phantom's manifest; remove the folder or give another") from error
    wanted = {**asdict(settings), "generator": GENERATOR}
    differ = [f"{key} {there.get(key)} instead of {value}" for key, value in wanted.items() if there.get(key) != value]
    if differ:
        raise UserError(f"{output}: holds a phantom made with {', '.join(differ)}; "
                        "give another folder, the same settings, or remove it")
    if count > subjects:
        raise UserError(f"{output}: holds a phantom of {count} subjects, more than the {subjects} asked for; "
                        f"give another folder or ask for at least {count}")
    return count


def _manifest(settings: Settings, subjects: int, *, complete: bool) -> dict[str, Any]:
    return {
        "what": "phantom: real anatomy (MNI ICBM152), drawn lesions; every metric from it is a phantom metric",
        "generator": GENERATOR,
        "settings": asdict(settings),
        "subjects": subjects,
        "complete": complete,
        "plan": [_planned(settings, i) for i in range(subjects)],
        "template_notice": " ".join(MNI_NOTICE.split()),
        "provenance": provenance.record(),
    }


def _planned(settings: Settings, index: int) -> dict[str, Any]:
    foci = ()
    if has_lesion(index, settings.lesion_share):
        foci = plan_lesions(settings.seed, index, settings.kind)
    lesions = [{"kind": f.kind, "volume_ml": round(f.volume_ml, 2), "core_ml": round(f.core_ml, 2)} for f in foci]
    return {"name": case_name(index), "lesions": lesions}


def _readme(settings: Settings, subjects: int) -> str:
    lesions = sum(has_lesion(i, settings.lesion_share) for i in range(subjects))
    return _README.format(subjects=subjects, lesions=lesions, voxel=1 / settings.size, manifest=MANIFEST,
                          content=_CONTENT[settings.kind], mni=MNI_NOTICE, notice=provenance.RESEARCH_USE,
                          **asdict(settings))


def write_subject(settings: Settings, output: Path, index: int) -> None:
    """Makes one subject and writes its files as a case folder, whole."""
    subject = make_subject(settings.seed, index, lesion=has_lesion(index, settings.lesion_share), size=settings.size,
                           kind=settings.kind)
    name = case_name(index)
    with folder_written_whole(output / name) as folder:
        suffixes = (*modalities_of(settings.kind), "seg")
        for suffix, data in zip(suffixes, (*subject.volumes, subject.labels), strict=True):
            _write_nifti(folder / f"{name}_{suffix}.nii.gz", data, subject.affine)


def _write_nifti(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    """Writes no time and no file name: the bytes depend on the data alone. Level 1, since noise hardly shrinks."""
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
