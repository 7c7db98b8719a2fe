"""The command translate.py: the network and the settings that it uses, and its message if there is no network."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from flax import nnx

from hae_jax.commands import runs
from hae_jax.commands.translate import main
from hae_jax.configs import default, phantom
from hae_jax.errors import UserError
from hae_jax.phantom import on_demand
from hae_jax.pipeline import translate as run
from hae_jax.training import checkpoint

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder with the configs in it."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)


def _train(name, tree, age=0.0):
    """Writes the files of a finished run that the commands read."""
    step = Path("runs") / name / "checkpoints" / "10"
    step.mkdir(parents=True)
    (step.parent.parent / "config.json").write_text(json.dumps(tree))
    os.utime(step, (time.time() - age,) * 2)


@pytest.fixture
def calls(monkeypatch):
    """Replaces the network and the translation. Records the calls."""
    found = {"loaded": [], "failed": {}}

    def load(workdir, *, ema=True, forms=None):
        found["loaded"].append((str(workdir), ema))
        found["forms"] = forms
        tree = json.loads((Path(workdir) / "config.json").read_text())
        identity = {"path": str(workdir), "step": 10, "parameters": "ema"}
        return checkpoint.Network(tree, nnx.Linear(1, 1, rngs=nnx.Rngs(0)), identity)

    def translate(model, identity, config, mesh, **places):
        found.update(config=config, identity=identity, **places)
        return run.Summary(Path(places["output"]), 1, 1, 1, found["failed"], {}, "a table", [], 1.0, None)

    monkeypatch.setattr(checkpoint, "load_network", load)
    monkeypatch.setattr(run, "translate", translate)
    monkeypatch.setattr(on_demand, "ensure_phantom", lambda data, size: found.update(ensured=(data.root, size)))
    return found


def _exit(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code, capsys.readouterr().err.splitlines()


def test_without_a_checkpoint_one_line_says_what_to_do(capsys):
    status, lines = _exit(["--config", "configs/phantom_reference.py"], capsys)
    assert status == 2
    assert len(lines) == 1
    assert "train.py --config configs/phantom_reference.py --workdir runs/phantom_reference" in lines[0]


@pytest.mark.parametrize(("argv", "name"), [
    (["--checkpoint", ""], "--checkpoint"), (["--input="], "--input"), ([""], "an argument")])
def test_an_empty_argument_is_refused(argv, name, capsys):
    """As with a variable of the shell that is not set. The shipped network must not take the place of the user's."""
    assert _exit(argv, capsys) == (2, [f"error: {name} is empty; give a value, or leave it out"])


def test_a_classifier_without_its_method_is_refused(calls, capsys):
    _train("a", default.get_config().to_dict())
    status, (line,) = _exit(["--checkpoint", "runs/a", "--classifier", "runs/b"], capsys)
    assert status == 2
    assert "--classifier runs/b: the method is residual; add --method classifier" in line


def test_a_folder_without_checkpoint_is_named(capsys):
    status, lines = _exit(["--checkpoint", "runs/nothing"], capsys)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("error: runs/nothing: there is no such folder")
    assert "shipped weights (phantom, phantom_stroke)" in lines[0]


def test_a_config_alone_means_the_newest_run_on_its_data(calls, capsys):
    demo_tree = phantom.get_config().to_dict()
    _train("old", demo_tree, age=100)
    _train("phantom", demo_tree, age=50)
    _train("other_data", default.get_config().to_dict())
    (Path("runs/unfinished/checkpoints")).mkdir(parents=True)
    (Path("runs/unfinished/config.json")).write_text(json.dumps(demo_tree))
    main(["--config", "phantom"])
    assert calls["loaded"] == [("runs/phantom", True)]
    assert calls["ensured"] == (demo_tree["data"]["root"], demo_tree["model"]["image_size"])
    assert (calls["output"], calls["source"]) == (Path("runs/phantom/translation"), None)
    assert "a table" in capsys.readouterr().out


def test_with_nothing_given_the_shipped_network_on_the_demo_phantom(calls):
    _train("phantom", phantom.get_config().to_dict())  # is not used
    main([])
    assert calls["loaded"] == []
    assert calls["ensured"] == ("data/phantom_demo", 64)
    assert (calls["output"], calls["source"]) == (Path("results/phantom/translation"), None)
    assert calls["config"].translation.method == "residual"
    assert calls["config"].data.scaling == "volume"
    assert calls["identity"]["parameters"] == "ema 0.999, half precision"


def test_settings_come_from_the_checkpoint_with_overrides(calls):
    tree = default.get_config().to_dict()
    tree["translation"] |= {"guidance": 5.0, "modality": [1], "ema": False}
    tree["model"]["model_channels"] = 64
    _train("a", tree)
    main(["--checkpoint", "runs/a", "--input", "some/cases", "--config.translation.forward_steps=7"])
    wanted = calls["config"].translation
    assert (wanted.guidance, wanted.modality, wanted.forward_steps) == (5.0, (1,), 7)
    assert calls["config"].model.model_channels == 64
    assert calls["loaded"] == [("runs/a", True), ("runs/a", False)]
    assert (calls["output"], calls["source"]) == (Path("runs/a/translation_cases"), "some/cases")


def test_how_the_network_is_computed_can_be_chosen_and_nothing_else_of_it(calls, capsys):
    tree = default.get_config().to_dict()
    _train("a", tree)
    main(["--run", "runs/a", "--config.model.attention=cudnn", "--config.model.convolution=xla"])
    assert calls["forms"] == {"attention": "cudnn", "convolution": "xla"}
    assert calls["config"].model.attention == "cudnn"
    main(["--checkpoint", "runs/a"])
    assert (calls["forms"], calls["config"].model.attention) == ({}, "auto")
    status, lines = _exit(["--config.model.attention=flash"], capsys)  # of the shipped network
    assert status == 2
    assert lines == ["error: model.attention is 'flash': choose one of auto, xla, cudnn, rows, materialised"]
    _, (line,) = _exit(["--checkpoint", "runs/a", "--config.model.attention_resolutions=(2,)"], capsys)
    assert "is fixed by the training" in line


def test_a_config_gives_settings_and_the_checkpoint_the_network(calls):
    tree = default.get_config().to_dict()
    tree["model"]["model_channels"], tree["diffusion"]["steps"] = 96, 400
    tree["translation"]["respacing"], tree["data"]["scaling"] = "7", "volume"
    _train("a", tree)
    main(["--config", "configs/phantom.py", "--checkpoint", "runs/a", "--config.translation.guidance=1.5"])
    config = calls["config"]
    assert config.translation.respacing == phantom.get_config().translation.respacing
    assert config.translation.guidance == 1.5
    assert (config.model.model_channels, config.diffusion.steps) == (96, 400)
    assert config.data.scaling == "volume"


def test_sigterm_stops_it_as_ctrl_c_does(calls):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _train("a", default.get_config().to_dict())
        main(["--checkpoint", "runs/a"])
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_channels_than_the_network_s_are_warned_of(calls, capsys):
    _train("a", default.get_config().to_dict())
    main(["--checkpoint", "runs/a", "--config.data.modalities=('t1','flair','t1ce','t2')"])
    assert "trained with the channels flair, t1, t1ce, t2 in this order, but data.modalities is t1, flair" in (
        capsys.readouterr().err)
    main(["--checkpoint", "runs/a"])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("reason", "said"), [
    ("no head", "no head"),
    ("Universit\udce4t: no head", "Universit\\udce4t: no head"),  # a path that is not valid text can be printed
])
def test_a_failed_case_gives_exit_status_1(calls, capsys, reason, said):
    _train("a", default.get_config().to_dict())
    calls["failed"] = {"case_7": reason}
    with pytest.raises(SystemExit) as caught:
        main(["--checkpoint", "runs/a"])
    assert caught.value.code == 1
    assert f"failed case_7: {said}" in capsys.readouterr().out


@pytest.mark.parametrize(("argument", "message"), [
    ("--config.model.dropout=0.5", "comes from the checkpoint"),
    ("--config.data.scaling=volume", "comes from the checkpoint"),
    ("--config.translation.speed=3", "no field translation.speed"),
    ("--config.translation.guidence=2", "no field translation.guidence; did you mean translation.guidance?"),
    ("--config.guidance=2", "did you mean translation.guidance?"),
    ("--config.translation.guidance=strong", "translation.guidance takes a number"),
    ("--config.translation.forward_steps=2.5", "translation.forward_steps takes a whole number"),
    ("--speed=3", "unknown argument"),
])
def test_bad_arguments_are_one_line(calls, capsys, argument, message):
    _train("a", default.get_config().to_dict())
    status, lines = _exit(["--checkpoint", "runs/a", argument], capsys)
    assert (status, len(lines)) == (2, 1)
    assert message in lines[0]


def test_a_checkpoint_from_before_a_field_takes_its_default():
    tree = phantom.get_config().to_dict()
    del tree["translation"]["components"]
    config = runs.trained_config(json.loads(json.dumps(tree)), [])
    assert config.translation.components == default.get_config().translation.components
    assert config.data.phantom.subjects == phantom.get_config().data.phantom.subjects
    with pytest.raises(UserError, match="speed"):
        runs.trained_config(tree, ["--config.translation.speed=3"])


def test_shortcuts_are_fields_of_the_config(calls):
    _train("a", phantom.get_config().to_dict())
    main(["--checkpoint", "runs/a", "--method", "ddib", "--calibration", "some.json", "--max-memory", "1.5",
          "--save-healthy", "--num-shards", "4", "--shard", "2", "--input", "cases"])
    wanted = calls["config"].translation
    assert (wanted.method, wanted.calibration, wanted.max_memory_gb, wanted.save_healthy) == (
        "ddib", "some.json", 1.5, True)
    assert (calls["shard"], calls["num_shards"], calls["source"]) == (2, 4, "cases")
    assert calls["output"] == Path("runs/a/translation_cases_ddib")
    assert calls["calibrations"] == Path("runs/a/calibrations")


def test_the_threshold_needs_no_network(calls):
    main(["--method", "threshold"])
    assert calls["loaded"] == []
    assert calls["config"].translation.method == "threshold"
