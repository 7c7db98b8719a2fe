"""Programs compiled for a GPU that is not there."""

import json

import jax
import pytest

from hae_jax.benchmark import plan as plan_module
from hae_jax.benchmark import target
from hae_jax.benchmark.plan import plan
from hae_jax.benchmark.settings import Settings, with_model
from hae_jax.commands.benchmark import main
from hae_jax.configs import default
from hae_jax.errors import UserError
from hae_jax.ops.platform import attention_kernels

OPTION = "xla_cpu_prefer_vector_width=512"


@pytest.fixture
def tiny():
    return with_model(default.get_config(), image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                      attention_resolutions=(), variant="fpdm", dtype="bfloat16")


def settings(*parts, options=(), baselines=()):
    return Settings(parts, ("fpdm",), baselines, batch=2, steps=2, repeats=1, options=options)


def test_rows_and_files(tiny, tmp_path, monkeypatch):
    """With this machine's CPU in the place of the GPU: the forms are a GPU's, the compiler is not."""
    monkeypatch.setattr(plan_module, "target_device", lambda name: jax.devices("cpu")[0])
    monkeypatch.setattr(plan_module, "device_peak_flops", lambda device, dtype: 1e12)
    result = plan(tiny, settings("forward", "train", options=(OPTION,), baselines=("norm", "sparse")),
                  "h100", str)
    # fpdm has no sparse attention.
    forms = ["ours", "norm naive", f"ours, {OPTION}"]
    assert [(row.part, row.form) for row in result.rows] == [(part, form) for part in ("forward", "train")
                                                             for form in forms]
    forward, train = result.rows[0], result.rows[3]
    assert train.flops == 3 * forward.flops == 3 * result.rows[2].flops
    assert train.memory > forward.memory > 0
    assert train.kernels > forward.kernels > forward.convolutions.count > 4
    assert forward.bytes == sum(count for _, count in forward.bytes_by_part)
    assert "norm" in dict(forward.bytes_by_part)
    table, data = result.write(tmp_path)
    assert "no figure here is a measured time" in table.read_text()
    written = json.loads(data.read_text())
    assert written["target"]["name"] == "NVIDIA H100 80GB HBM3"
    assert written["rows"][0]["convolutions"]["count"] == forward.convolutions.count


def test_blocks(tiny, monkeypatch):
    monkeypatch.setattr(plan_module, "target_device", lambda name: jax.devices("cpu")[0])
    monkeypatch.setattr(plan_module, "device_peak_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr("hae_jax.benchmark.blocks._SIZES", {
        "attention": (8, 32), "sparse": (264, 16), "convolutions": ((3, 8, 16, 16),), "norm": (8, 32),
        "noise": (16, 1)})
    rows = plan(tiny, settings("blocks"), "h100", str).rows
    of = {(row.variant, row.form): row for row in rows}
    forward = of["simplex noise, 16 px, 1 channels, forward", "ours"]
    assert forward.images == 2
    assert forward.kernels >= 6  # octaves, at least
    with_gradients = of["attention at 8 px, with gradients", "ours"]
    assert with_gradients.flops == 3 * of["attention at 8 px, forward", "ours"].flops > 0
    assert of["sparse attention, 264 tokens, forward", "dense"].flops > of[
        "sparse attention, 264 tokens, forward", "ours"].flops


def test_the_kernels_of_gpus_are_to_be_had():
    with plan_module.accelerator_forms("gpu"), plan_module.tried("attention=cudnn"):
        assert attention_kernels() == ("cudnn",)
        with plan_module.accelerator_forms():
            assert attention_kernels() == ()
    assert attention_kernels() == ()


def test_mistakes(tiny, monkeypatch, capsys):
    with pytest.raises(UserError, match="--target h10: choose among h100, a100"):
        plan(tiny, settings("forward"), "h10")
    with pytest.raises(UserError, match="--part input cannot be compiled"):
        plan(tiny, settings("input"), "h100")
    for flags, said in ((["--target", "h100", "--repeats", "3"], "--repeats: has no effect with --target"),
                        (["--memory", "--steps", "3"], "--steps: has no effect with --memory"),
                        (["--memory", "--target", "a100", "--profile"], "--profile: has no effect with --memory"),
                        (["--memory", "--option", "a=b"], "--option: has no effect with --memory")):
        with pytest.raises(SystemExit) as stopped:
            main(flags)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(target, "_PLUGINS", ("jax_plugins.none", "nothing.at_all"))
    with pytest.raises(SystemExit) as stopped:
        main(["--target", "h100"])
    assert stopped.value.code == 2
    assert "pip install '.[cuda]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", target.TARGETS)
def test_descriptions_say_what_the_data_sheets_say(name):
    gpu = target.TARGETS[name]
    text = gpu.description()
    assert text.count("{") == text.count("}") == 3
    assert f'device_description_str: "{gpu.name}"' in text
    assert f"device_memory_size: {gpu.memory} " in text
    # Four bytes for each unit and clock, two operations at a time: within the sheets' 67 and 19.5 TFLOP/s.
    assert 2 * gpu.processors * gpu.units * gpu.clock / 1e3 == pytest.approx({"h100": 67, "a100": 19.5}[name], rel=0.01)
