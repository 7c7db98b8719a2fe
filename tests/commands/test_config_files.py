"""Wrong configuration files are refused with file, line and error. The default is never used instead."""

import pytest

from hae_jax.commands.config import read_config
from hae_jax.errors import UserError

GOOD = """\
from hae_jax.configs import default


def get_config():
    config = default.get_config()
    config.seed = 7
    return config
"""


@pytest.mark.parametrize(("text", "says"), [
    ("", "own.py: defines no function get_config"),
    (GOOD.replace("get_config():", "config():"), "own.py: defines no function get_config"),
    ("get_config = 3", "own.py: defines no function get_config"),
    (GOOD.replace("():\n", "()\n"), "own.py, line 4: SyntaxError: expected ':'"),
    (GOOD.replace("return config", "return conf"), "own.py, line 7: NameError: name 'conf'"),
    (GOOD.replace("import default", "import defaultt"), "own.py, line 1: ImportError"),
    (GOOD.replace("hae_jax.configs", "hae_jaxx"), "own.py, line 1: ModuleNotFoundError"),
    (GOOD.replace("7", "(7,)"), "own.py, line 6: TypeError: .*'seed'"),
    (GOOD.replace("seed", "sead"), "own.py, line 6: AttributeError: .*sead"),
    (GOOD.replace("config.seed = 7", "raise SystemExit(0)"), "own.py, line 6: SystemExit"),
    (GOOD.replace("get_config():", "get_config(size):"), "own.py: TypeError: .*size"),
    (GOOD.replace("    return config\n", ""), "own.py: its get_config returns NoneType"),
    (GOOD.replace("return config", "return config.to_dict()"), "own.py: its get_config returns dict"),
    (GOOD.replace("    config.seed = 7", "    with config.unlocked():\n        config.colour = 7"),
     "own.py: has an unknown field, colour"),
    (GOOD.replace("    config.seed = 7", "    with config.unlocked():\n        del config.model"),
     "own.py: lacks a field, model"),
    (GOOD.replace("    config.seed = 7", "    with config.unlocked():\n        del config.seed\n"
                  "        config.seed = 'seven'"), "own.py: seed is 'seven'"),
    ("\0", "own.py.*: .*null"),
])
def test_a_file_that_gives_no_config_is_refused(tmp_path, text, says):
    path = tmp_path / "own.py"
    path.write_text(GOOD)
    assert read_config(str(path), []).seed == 7
    path.write_text(text)  # the earlier contents are not cached
    with pytest.raises(UserError, match=says) as error:
        read_config(str(path), [])
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("name", ["settings.yaml", "config.json", "config"])
def test_only_python_files_are_run(tmp_path, name):
    (tmp_path / name).write_text(GOOD)
    with pytest.raises(UserError, match="a configuration file is a"):
        read_config(str(tmp_path / name), [])


@pytest.mark.parametrize("override", ["--config.seed=x", "--config.seed", "--config.model.channel_mult=(1,",
                                      "--config.model=3", "--config.=1",
                                      "--config.training.learning_rate=1e", "seed=3"])
def test_an_override_that_does_not_fit_is_refused(override):
    with pytest.raises(UserError):
        read_config("default", [override])


@pytest.mark.parametrize(("override", "says"), [
    ("training.learning_rate=nan", "training.learning_rate is nan: it must be finite"),
    ("training.ema_rates=(0.9,1e999)", r"training.ema_rates is \(0.9, inf\): it must be finite"),
    ("data.modalities=(1,2)", r"data.modalities is \(1, 2\): give names in quotes"),
    ("training.mesh=(1.0,-1)", r"training.mesh is \(1.0, -1\): give whole numbers"),
    ("training.ema_rates=('a',)", r"training.ema_rates is \('a',\): give numbers"),
    ("seed=-1", r"seed is -1: give a whole number from 0 to 2\^32 - 1"),
    (f"seed={2**32}", "seed is 4294967296"),
    ("data.modalities=flair,t1", r"""write --config\.data\.modalities="\('flair','t1'\)\""""),
])
def test_values_that_cannot_be_are_refused(override, says):
    with pytest.raises(UserError, match=says):
        read_config("default", [f"--config.{override}"])


def test_none_unsets_a_field_that_may_be_none():
    """This also works if the preset sets a value. The last override of a field is used."""
    flags = [f"--config.{field}=None" for field in ("training.clip_norm", "training.initial_weights", "data.phantom",
                                                    "model.num_classes", "training.wandb")]
    found = read_config("phantom", [*flags, "--config.training.wandb=mine"])
    assert [found.training.clip_norm, found.training.initial_weights, found.data.phantom, found.model.num_classes,
            found.training.wandb] == [None, None, None, None, "mine"]
    with pytest.raises(UserError, match=r"training\.steps=None"):
        read_config("phantom", ["--config.training.steps=None"])


def test_files_of_one_name_do_not_mix(tmp_path):
    for k in (1, 2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "own.py").write_text(GOOD.replace("7", str(k)))
    seeds = [read_config(str(tmp_path / str(k) / "own.py"), ["--config.training.steps=5"]).seed for k in (1, 2)]
    assert seeds == [1, 2]
