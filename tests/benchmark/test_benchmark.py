"""The whole benchmark on the smallest network: rows, ratios, files, errors."""

import dataclasses
import json

import jax
import pytest

from hae_jax.benchmark import run
from hae_jax.benchmark.programs import Settings, with_model
from hae_jax.benchmark.results import Result, Row
from hae_jax.benchmark.run import benchmark
from hae_jax.commands.benchmark import main
from hae_jax.configs import default
from hae_jax.training.dry_run import activation_bytes
from hae_jax.training.mesh import make_mesh
from hae_jax.training.state import network_config


@pytest.fixture
def tiny(tmp_path):
    config = default.get_config()
    config.data.root = str(tmp_path / "nothing")
    return with_model(config, image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                      attention_resolutions=(), variant="fpdm")


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr("hae_jax.benchmark.measure._PEAK_SIZES", {"cpu": 64})
    monkeypatch.setattr("hae_jax.benchmark.measure._COPIED", (64, 64))
    monkeypatch.setattr(run, "_LOADER_SECONDS", 0.05)
    monkeypatch.setattr("hae_jax.benchmark.loader._MADE_UP_SLICES", 64)


def test_every_part_has_its_rows(tiny, tmp_path):
    settings = Settings(("train", "forward", "translate", "input"), ("fpdm",), (), batch=2, steps=2, repeats=2)
    said = []
    result = benchmark(tiny, settings, make_mesh(devices=jax.devices()[:2]), said.append)
    assert [(row.part, row.form) for row in result.rows] == [
        ("train", "ours"), ("forward", "ours"), ("translate", "ours"), ("input", "0 workers")]
    train, forward, translate, loader = result.rows
    assert train.flops == 3 * forward.flops
    assert translate.flops == pytest.approx(2 * 3 * forward.flops, rel=0.01)  # two steps of three passes
    assert train.memory > forward.memory > 0
    assert loader.time_ratio == pytest.approx(loader.images_per_second / train.images_per_second)
    assert "compiling train fpdm ours" in said

    table, data = result.write(tmp_path / "out")
    assert "The loader gives" in table.read_text()
    written = json.loads(data.read_text())
    assert written["settings"]["config"]["model"]["image_size"] == 16
    assert [len(row["seconds"]) for row in written["rows"]] == [2, 2, 2, 1]
    assert "versions" in written


def test_baselines_compare_with_ours_and_variants_with_the_first(tiny):
    config = with_model(tiny, channel_mult=(1, 1))
    settings = Settings(("forward",), ("fpdm", "hae_lite"), ("attention",), batch=2, steps=1, repeats=1)
    rows = benchmark(config, settings, make_mesh(devices=jax.devices()[:1]), str).rows
    assert [(row.variant, row.form) for row in rows] == [
        (variant, form) for variant in ("fpdm", "hae_lite") for form in ("ours", "attention naive")]
    time = [row.seconds[0] for row in rows]
    assert [row.time_ratio for row in rows] == pytest.approx(
        [1, time[1] / time[0], time[2] / time[0], time[3] / time[2]])
    assert rows[3].flops > rows[2].flops == rows[3].model_flops


def test_the_backward_pass_keeps_less_than_half_of_what_the_naive_one_keeps(tiny):
    """Measured from shapes, for a network with all parts that take more memory in the naive form."""
    config = with_model(tiny, variant="hae_v2", image_size=48, channel_mult=(1, 1), num_heads=1)
    network = network_config(config.to_dict())
    ours, theirs = (activation_bytes(dataclasses.replace(network, attention=form), 2)
                    for form in ("auto", "materialised"))
    assert 0 < ours < theirs / 2


@pytest.mark.parametrize(("arguments", "parts", "baselines"), [
    ([], ("train", "forward", "translate", "input"), ("naive",)),
    (["--part", "train,input", "--baseline", "attention"], ("train", "input"), ("attention",)),
    (["--part", "blocks"], ("blocks",), ("naive",)),
    (["--baseline", "none"], ("train", "forward", "translate", "input"), ()),
])
def test_flags_say_what_is_measured(arguments, parts, baselines, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "benchmark", lambda config, settings, mesh: seen.append(settings) or Result(
        [], 1, 1, "", {}))
    main([*arguments, "--batch", "2"])
    assert (seen[0].parts, seen[0].baselines) == (parts, baselines)


def test_blocks_are_a_part(tiny, monkeypatch):
    row = Row("blocks", "a block", "ours", [1.0], 2)
    monkeypatch.setattr(run, "measure_blocks", lambda batch, dtype, repeats, mesh, say: [row] * batch)
    settings = Settings(("blocks",), ("fpdm",), ("naive",), batch=2, steps=1, repeats=1)
    assert benchmark(tiny, settings, make_mesh(devices=jax.devices()[:1]), str).rows == [row, row]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--part", "sleep"], "--part sleep: choose among train, forward, translate, input, blocks"),
    (["--variant", "unet"], "--variant unet: choose among fpdm"),
    (["--baseline", "slow"], "--baseline slow: choose among naive, attention"),
    (["--batch", "0"], "--batch 0: must be at least 1"),
    (["--part", ","], "argument --part: is empty"),
    (["--output", __file__], "test_benchmark.py: is a file; give a folder"),
    (["--repeats", "0"], "--repeats 0: must be at least 1"),
    (["--part", "forward", "--batch", "3", "--config.training.accumulation=2"], "--batch is 3"),
    (["--speed"], "--speed: unknown argument"),
    (["--part", "translate", "--steps", "2000"], "--steps 2000: diffusion.steps is 1000"),
])
def test_mistakes_are_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
