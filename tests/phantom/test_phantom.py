"""The phantom: BraTS layout, reproducibility with any number of subjects and workers, plausible anatomy."""

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from hae_jax.commands import make_phantom as make_phantom_command
from hae_jax.commands import phantom_threshold as phantom_threshold_command
from hae_jax.data.cases import MODALITIES, find_cases, read_case
from hae_jax.errors import UserError
from hae_jax.phantom import cohort as phantom
from hae_jax.phantom.figures import best_threshold
from hae_jax.phantom.lesion import ENHANCING, KINDS, NECROSIS, VOLUME_ML, plan_lesions
from hae_jax.phantom.subject import make_subject
from hae_jax.phantom.warp import Grid, load_template, smooth_noise

SMALL = 0.25


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.nii.gz"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return phantom.make_phantom(tmp_path_factory.mktemp("phantom") / "a", subjects=5, size=SMALL, seed=3, workers=1,
                                progress=False)


def test_files_are_a_brats_case(folder):
    cases = find_cases(folder)
    assert [c.name for c in cases] == [f"Phantom_{i:05d}" for i in range(5)]
    case = read_case(cases[0])
    assert case.volumes.shape == (60, 60, 39, 4)
    np.testing.assert_allclose(case.affine, [[-4, 0, 0, 0], [0, -4, 0, 236], [0, 0, 4, 0], [0, 0, 0, 1]])
    for path in cases[0].paths:
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16
        assert image.header.get_xyzt_units()[0] == "mm"
    labels = np.unique(np.asarray(nib.load(cases[0].segmentation).dataobj))
    assert set(labels) <= {0, 1, 2, 4}
    assert len(labels) > 1


def test_full_size_grid_is_brats():
    grid = Grid.of_size(1.0)
    assert grid.shape == (240, 240, 155)
    np.testing.assert_array_equal(grid.affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_background_is_zero_and_the_brain_is_not(folder):
    case = read_case(find_cases(folder)[1])
    inside = case.volumes > 0
    for channel in range(1, 4):  # all modalities have the same mask, so that 0 is background in each
        np.testing.assert_array_equal(inside[..., channel], inside[..., 0])
    assert not (case.mask & ~inside[..., 0]).any()
    brain = inside[..., 0]
    assert 1.1e6 < brain.sum() * 64 < 2.0e6  # mm^3
    assert not brain[[0, -1]].any()
    assert not brain[:, [0, -1]].any()
    assert not brain[..., [0, -1]].any()  # BraTS volumes have slices without brain


def test_same_seed_same_bytes_whatever_the_company(folder, tmp_path):
    again = phantom.make_phantom(tmp_path / "b", subjects=2, size=SMALL, seed=3, workers=2, progress=False)
    there, here = digests(folder), digests(again)
    assert len(here) == 10
    assert here == {name: there[name] for name in here}


def test_other_seed_and_other_subject_differ(folder):
    assert len(set(digests(folder).values())) == 5 * 5  # all files differ, including the segmentations
    a, b = (make_subject(seed, 0, lesion=False, size=SMALL).volumes for seed in (3, 4))
    assert (a != b).any()


def test_tumours_come_with_the_share_and_healthy_subjects_have_none(folder):
    has = [bool(read_case(files).mask.any()) for files in find_cases(folder)]
    assert has == [phantom.has_lesion(i, 0.75) for i in range(5)] == [True, True, True, False, True]
    assert [sum(phantom.has_lesion(i, s) for i in range(20)) for s in (0, 0.3, 0.75, 1)] == [0, 6, 15, 20]


def test_rerun_makes_only_what_is_missing(folder, tmp_path):
    output = tmp_path / "c"
    phantom.make_phantom(output, subjects=1, size=SMALL, seed=3, workers=1, progress=False)
    kept = output / "Phantom_00000" / "Phantom_00000_t1.nii.gz"
    before = kept.stat().st_mtime_ns
    for killed in ("Phantom_00001", "Phantom_00007"):
        (output / f".7-a.partial.{killed}").mkdir()
    phantom.make_phantom(output, subjects=2, size=SMALL, seed=3, workers=1, progress=False)
    assert kept.stat().st_mtime_ns == before
    assert json.loads((output / phantom.MANIFEST).read_text())["complete"] is True
    assert not list(output.glob("*.partial.*"))
    expected = {k: v for k, v in digests(folder).items() if k.startswith(("Phantom_00000", "Phantom_00001"))}
    assert digests(output) == expected


@pytest.mark.parametrize(("change", "named"), [
    ({"seed": 4}, "seed 3 instead of 4"), ({"size": 0.2}, "size"), ({"lesion_share": 0.5}, "lesion_share"),
    ({"subjects": 4}, "5 subjects"), ({"subjects": 0}, "subjects"), ({"lesion_share": 1.5}, "lesion_share"),
    ({"size": 3.0}, "size"), ({"workers": 0}, "workers"), ({"seed": -1}, "seed"),
])
def test_other_settings_are_refused(folder, change, named):
    before = digests(folder)
    with pytest.raises(UserError, match=named):
        phantom.make_phantom(folder, **{"subjects": 5, "size": SMALL, "seed": 3, "progress": False, **change})
    assert digests(folder) == before


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="new or empty folder"):
        phantom.make_phantom(tmp_path, subjects=1, size=SMALL, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_folder_says_what_it_is(folder):
    text = (folder / "README.md").read_text()
    assert "phantom metric" in text
    assert "McConnell Brain Imaging Centre" in text
    manifest = json.loads((folder / phantom.MANIFEST).read_text())
    assert manifest["settings"] == {"seed": 3, "lesion_share": 0.75, "size": SMALL, "kind": "tumour"}
    assert [bool(p["lesions"]) for p in manifest["plan"]] == [True, True, True, False, True]


def test_plans_cover_sizes_kinds_and_numbers():
    plans = [plan_lesions(0, i) for i in range(40)]
    totals = np.array([sum(f.volume_ml for f in foci) for foci in plans])
    assert totals.min() < 4
    assert totals.max() > 100
    assert (totals < VOLUME_ML[-1] + 1).all()
    assert min(f.volume_ml for foci in plans for f in foci) >= VOLUME_ML[0] / 2
    assert {foci[0].kind for foci in plans} == set(KINDS)
    assert {len(foci) for foci in plans} == {1, 2, 3}


def test_planned_volume_is_drawn_at_every_size():
    planned = sum(focus.volume_ml for focus in plan_lesions(3, 1))
    for size in (SMALL, 0.5):
        labels = make_subject(3, 1, lesion=True, size=size).labels
        assert (labels > 0).sum() / size**3 / 1000 == pytest.approx(planned, rel=0.1)


def test_noise_is_the_same_field_on_every_grid():
    coarse, fine = Grid.of_size(0.2), Grid.of_size(1.0)
    a, b = (smooth_noise(np.random.default_rng(0), grid, 20) for grid in (coarse, fine))
    assert b.std() == pytest.approx(1, abs=0.1)
    match = [np.abs(f[:, None] - c).argmin(axis=0) for f, c in zip(fine.axes, coarse.axes, strict=True)]
    for axis, (f, c) in enumerate(zip(fine.axes, coarse.axes, strict=True)):
        np.testing.assert_allclose(f[match[axis]], c, atol=1e-3)  # 5 mm voxels are centred on every fifth 1 mm voxel
    np.testing.assert_allclose(b[np.ix_(*match)], a, atol=1e-4)


def test_tumour_pushes_the_brain_and_shows_where_it_should():
    focus, = plan_lesions(0, 2)
    assert focus.kind == "ring"
    assert focus.volume_ml > 40
    ill, well = (make_subject(0, 2, lesion=t, size=0.5) for t in (True, False))
    head = well.volumes[0] > 0
    assert ((ill.volumes[0] > 0) != head).sum() < 0.01 * head.sum()  # the skull is not deformed
    mask = ill.labels > 0
    far = ndimage.distance_transform_edt(~mask) > 5  # 10 mm off
    change = np.abs(ill.volumes[1].astype(float) - well.volumes[1])[far & (well.volumes[1] > 0)]
    assert np.percentile(change, 95) > 50  # 5 % of the brain outside of the tumour has moved
    flair, t1, t1ce, _ = ill.volumes.astype(float)
    brain = (flair > 0) & ~mask
    assert np.median(t1ce[ill.labels == ENHANCING]) > 1.2 * np.percentile(t1ce[brain], 90)
    assert np.median(t1[ill.labels == NECROSIS]) < 0.8 * np.median(t1[brain])
    assert np.median(flair[mask]) > 1.3 * np.median(flair[brain])


def test_core_is_irregular():
    """A ball has a surface of 4.84 V^(2/3). The surface of a core must be clearly larger."""
    subject = make_subject(0, 2, lesion=True, size=0.5)
    core = np.isin(subject.labels, (NECROSIS, ENHANCING))
    components, _ = ndimage.label(core)
    core = components == np.argmax(np.bincount(components.ravel())[1:]) + 1
    depth = ndimage.distance_transform_edt(core)
    assert depth.max() < 0.75 * (core.sum() * 3 / (4 * np.pi)) ** (1 / 3)


def test_heads_are_asymmetric_although_the_template_is_not():
    template = load_template()
    np.testing.assert_array_equal(template.gm, template.gm[::-1])
    brain = make_subject(0, 0, lesion=False, size=SMALL).volumes[1] > 0
    assert 0.02 < (brain != brain[::-1]).sum() / brain.sum() < 0.25


def test_healthy_subjects_have_bright_spots():
    loads = []
    for index in range(3):
        flair = make_subject(0, index, lesion=False, size=0.5).volumes[0]
        loads.append((flair > 1.5 * np.median(flair[flair > 0])).sum() / 125)
    assert 0.5 < np.median(loads) < 30  # ml


def test_one_threshold_is_a_fair_baseline(folder):
    score = best_threshold(folder)
    assert len(score.names) == 4
    assert (score.own_dice >= score.common_dice).all()
    assert 0.3 < score.common_dice.mean() < 0.9
    case = read_case(find_cases(folder)[0])
    flair = case.volumes[..., MODALITIES.index("flair")]
    found = flair >= score.common_threshold * np.percentile(flair[flair > 0], 99)
    dice = 2 * (found & case.mask).sum() / (found.sum() + case.mask.sum())
    assert score.common_dice[0] == pytest.approx(dice, abs=2e-3)


def test_commands(folder, tmp_path, capsys):
    make_phantom_command.main(["--output", str(folder), "--subjects", "5", "--size", str(SMALL), "--seed", "3",
                               "--workers", "1", "--figure", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 20_000
    phantom_threshold_command.main([str(folder)])
    assert "PHANTOM metrics over 4 cases" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        make_phantom_command.main(["--output", str(folder), "--seed", "9"])
    assert stop.value.code == 2
