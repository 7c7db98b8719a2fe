"""Comparisons of methods and of numbers of steps on the same cases: the tables agree with the runs."""

import copy
import csv
import dataclasses
import json

import pytest

from hae_jax.commands import compare_methods, devices
from hae_jax.commands import runs as trained_runs
from hae_jax.errors import UserError
from hae_jax.evaluation import figures
from hae_jax.pipeline import comparison
from hae_jax.pipeline.comparison import Network, check, compare, compare_steps, method_entries, steps_entries
from hae_jax.pipeline.translate import translate
from hae_jax.runs import TrainedRun


@pytest.fixture
def network(toy_network, tmp_path):
    return Network(toy_network(0), {"path": "runs/a/1", "step": 1, "parameters": "params"}, tmp_path / "calibrations")


@pytest.fixture
def short(config):
    config.translation.update({"ddib_steps": 5, "anoddpm_steps": 5, "batch_size": 8})
    return config


def _rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_methods_side_by_side(network, toy_network, short, mesh_of, tmp_path):
    twin = Network(toy_network(1), {"path": "runs/b/1", "step": 1, "parameters": "params"}, tmp_path / "twin")
    entries = method_entries(["hae", "anoddpm-gaussian", "threshold"], network, {"anoddpm-gaussian": twin})
    written = compare(entries, short, mesh_of(1), output=tmp_path / "out")
    assert {path.name for path in written} == {"comparison.csv", "comparison.md", "comparison.json", "comparison.png"}
    assert all(path.stat().st_size > 100 for path in written)
    rows = _rows(tmp_path / "out" / "comparison.csv")
    assert [row["method"] for row in rows] == ["hae", "anoddpm-gaussian", "threshold"]
    for row in rows:
        own = json.loads((tmp_path / "out" / row["method"] / "metrics.json").read_text())["results"]
        assert float(row["all_slices_dice"]) == pytest.approx(own["all_slices"]["dice"]["mean"], rel=1e-4)
        assert float(row["volume_dice"] or -1) == pytest.approx(own["volumes"]["dice"]["mean"], rel=1e-4)
    manifest = json.loads((tmp_path / "out" / "anoddpm-gaussian" / "manifest.json").read_text())
    assert manifest["checkpoint"]["path"] == "runs/b/1"


@pytest.fixture
def twin(toy_network, config, tmp_path):
    """A network for AnoDDPM that was trained with other diffusion settings."""
    its_config = copy.deepcopy(config)
    its_config.model.num_classes = None
    its_config.diffusion.update({"steps": 40, "schedule": "cosine", "predicts": "x0"})
    return Network(toy_network(1), {"path": "runs/b/1", "step": 1, "parameters": "params"}, tmp_path / "twin",
                   its_config)


def test_a_twin_is_sampled_with_the_process_of_its_own_training(network, twin, short, mesh_of, tmp_path):
    entries = method_entries(["anoddpm-gaussian", "threshold"], network, {"anoddpm-gaussian": twin})
    compare(entries, short, mesh_of(1), output=tmp_path / "out")
    alone = copy.deepcopy(short)
    alone.model, alone.diffusion = twin.config.model, twin.config.diffusion
    alone.translation.method = "anoddpm-gaussian"
    translate(twin.model, twin.identity, alone, mesh_of(1), output=tmp_path / "alone")
    made = {name: json.loads((tmp_path / "out" / name / "manifest.json").read_text())["config"]
            for name in ("anoddpm-gaussian", "threshold")}
    assert made["anoddpm-gaussian"]["diffusion"] == twin.config.diffusion.to_dict()
    assert made["threshold"]["diffusion"] == short.diffusion.to_dict()
    ours, theirs = (json.loads((tmp_path / folder / "metrics.json").read_text())["results"]
                    for folder in ("out/anoddpm-gaussian", "alone"))
    assert ours == theirs


@pytest.mark.parametrize(("section", "field", "value"), [
    ("data", "modalities", ("t1", "t1ce", "t2", "flair")), ("model", "image_size", 32), ("model", "in_channels", 3)])
def test_a_twin_for_other_data_is_refused(network, twin, short, mesh_of, tmp_path, section, field, value):
    twin.config[section][field] = value
    entries = method_entries(["hae", "anoddpm-gaussian"], network, {"anoddpm-gaussian": twin})
    with pytest.raises(UserError, match=rf"runs/b/1: was trained with {section}\.{field} ") as caught:
        compare(entries, short, mesh_of(1), output=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def runs(monkeypatch):
    """The runs that were started."""
    begun = []
    monkeypatch.setattr(comparison, "translate", lambda *args, **kwargs: begun.append(args))
    return begun


@pytest.mark.parametrize(("names", "settings", "message"), [
    (("hae", "ddip"), {}, r"^ddip: translation\.method is 'ddip': choose"),
    (("hae", "ddib"), {"ddib_steps": 51}, r"^ddib: translation\.ddib_steps is 51"),
    (("ddib", "hae"), {"calibration": "atlas_600"}, r"^hae: --calibration atlas_600: was made for the modalities"),
    (("ddib", "hae"), {"batch_size": 0}, r"batch_size is 0"),
])
def test_every_method_is_checked_before_the_first_runs(
        network, short, mesh_of, tmp_path, runs, names, settings, message):
    short.translation.update(settings)
    with pytest.raises(UserError, match=message) as caught:
        compare(method_entries(names, network), short, mesh_of(1), output=tmp_path / "out")
    assert not runs
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("counts", "message"), [
    ([10, 51], "^hae, 51 steps: .*cannot give 51"), ([10, 0], "^hae, 0 steps: .*respacing is '0'")])
def test_all_steps_are_checked_before_the_first_run(network, short, mesh_of, tmp_path, runs, counts, message):
    with pytest.raises(UserError, match=message):
        compare_steps(counts, network, short, mesh_of(1), output=tmp_path / "out")
    assert not runs


def test_what_a_method_cannot_calibrate_with_is_said_before_the_first_runs(
        network, short, mesh_of, tmp_path, case_writer, runs):
    """The preset is for hae only. ddib needs validation slices, and there are none."""
    case_writer(tmp_path / "in", "a", seed=0)
    short.translation.calibration = "brats_600"
    short.data.root = str(tmp_path / "gone")
    where = {"output": tmp_path / "out", "source": tmp_path / "in"}
    check(method_entries(["hae"], network), short, **where)
    with pytest.raises(UserError, match=r"^ddib: calibration: a calibration is needed"):
        compare(method_entries(["hae", "ddib"], network), short, mesh_of(1), **where)
    assert not runs


def test_a_method_without_its_network_is_refused(network, short, tmp_path):
    without = dataclasses.replace(network, model=None)
    check(method_entries(["threshold"], without), short, output=tmp_path)
    with pytest.raises(UserError, match=r"^hae, 10 steps: needs a network"):
        check(steps_entries([10], without), short, output=tmp_path)


def test_the_user_s_calibration_goes_to_the_forward_process_alone(network, short, mesh_of, tmp_path, capsys):
    short.translation.calibration = "brats_600"
    compare(method_entries(["hae", "ddib", "threshold"], network), short, mesh_of(1), output=tmp_path / "out")
    used = {name: json.loads((tmp_path / "out" / name / "calibration.json").read_text())
            for name in ("hae", "ddib", "threshold")}
    assert used["hae"]["threshold"] == 0.99488
    assert used["ddib"]["method"] == "ddib"
    assert "brats_600 is for hae only; ddib uses its own" in capsys.readouterr().out


@pytest.fixture
def overridden():
    """The overridden fields of each loaded network."""
    return {}


@pytest.fixture
def command(network, twin, short, tmp_path, monkeypatch, overridden):
    """The command with toy networks for the runs a and b. It returns the entries that `compare` was given."""
    compared = []
    loaded = {"a": (network, short), "b": (twin, twin.config)}

    def chosen_network(config_path, checkpoint, overrides):
        overridden[checkpoint] = overrides
        found, config = loaded[checkpoint]
        return TrainedRun(found.model, config, found.identity, tmp_path / checkpoint)

    monkeypatch.setattr(trained_runs, "chosen_network", chosen_network)
    monkeypatch.setattr(devices, "use_all_cores", lambda: None)
    monkeypatch.setattr(comparison, "compare", lambda entries, *_, **__: [compared.extend(entries)])
    return lambda *arguments: compare_methods.main(["--checkpoint", "a", *arguments]), compared


def test_a_comparison_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        compare_methods.main(["--methods", ""])
    assert stopped.value.code == 2
    assert "--methods is empty and --steps is not given" in capsys.readouterr().err


def test_the_command_hands_over_how_the_twin_was_trained(command, twin):
    call, compared = command
    call("--unconditional", "b", "--methods", "hae, anoddpm-simplex")
    assert [(entry.title, entry.network.config) for entry in compared] == [("hae", None), (
        "anoddpm-simplex", twin.config)]


@pytest.mark.parametrize("ema", [True, False])
def test_averages_or_not_is_asked_of_both_networks(command, overridden, short, ema):
    short.translation.ema = ema
    command[0]("--unconditional", "b", "--methods", "anoddpm-simplex", "--config.seed=1")
    assert overridden == {"a": ["--config.seed=1"], "b": [f"--config.translation.ema={ema}"]}


def test_the_command_checks_the_steps_before_the_methods_run(command, capsys):
    call, compared = command
    with pytest.raises(SystemExit) as ended:
        call("--methods", "hae", "--steps", "10,51")
    assert ended.value.code == 2
    assert "hae, 51 steps: translation.respacing" in capsys.readouterr().err
    assert not compared


def test_figures_say_how_many_slices_are_healthy(network, short, mesh_of, tmp_path, monkeypatch):
    titles = []
    for name in ("comparison_figure", "steps_figure"):
        monkeypatch.setattr(figures, name, lambda *args: titles.append(args[-1]))
    compare_steps([5], network, short, mesh_of(1), output=tmp_path)
    compare(method_entries(["threshold"], network), short, mesh_of(1), output=tmp_path)
    assert len(titles) == 2
    for title in titles:
        assert "57% of all slices are healthy" in title  # 4 of 7


def test_quality_against_steps(network, short, mesh_of, tmp_path):
    short.translation.forward_steps = 30
    written = compare_steps([5, 10], network, short, mesh_of(1), output=tmp_path)
    assert {path.name for path in written} == {"steps.csv", "steps.md", "steps.json", "steps.png"}
    assert [row["settings"] for row in _rows(tmp_path / "steps.csv")] == ["respacing=5", "respacing=10"]
    assert "healthy" in (tmp_path / "steps.md").read_text().splitlines()[0]


def test_a_comparison_needs_truth_and_all_cases(network, short, mesh_of, tmp_path, case_writer):
    case_writer(tmp_path / "in", "a", seed=0, segmented=False)
    entries = method_entries(["hae"], network)
    with pytest.raises(UserError, match="no case has a segmentation"):
        compare(entries, short, mesh_of(1), output=tmp_path / "out", source=tmp_path / "in")
    case_writer(tmp_path / "in", "b", seed=1)
    (tmp_path / "in" / "b" / "b_t2.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 cases failed, the first, b: .*b_t2"):
        compare(entries, short, mesh_of(1), output=tmp_path / "out", source=tmp_path / "in")


def test_cases_of_an_earlier_comparison_are_not_counted(network, short, mesh_of, tmp_path, case_writer):
    for folder, names in (("in", "ab"), ("other", "c")):
        for i, name in enumerate(names):
            case_writer(tmp_path / folder, name, seed=i)
    for source in ("in", "other"):
        compare(method_entries(["threshold"], network), short, mesh_of(1), output=tmp_path / "out",
                source=tmp_path / source)
    assert [row["case"] for row in _rows(tmp_path / "out" / "threshold" / "cases.csv")] == ["c"]
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["entries"][0]["results"]["volumes"]["dice"]["cases"] == 1
