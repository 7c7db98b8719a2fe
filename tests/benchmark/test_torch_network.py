"""The PyTorch baseline computes the same values as our and the published networks, and is timed with ours."""

import dataclasses
import functools
import json
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from golden_weights import GoldenCase, read_case
from network_helpers import SMALL, assert_close, filled, inputs
from torch_modules import tensors

from hae_jax.benchmark import programs, torch_programs
from hae_jax.benchmark.programs import Settings, with_model
from hae_jax.benchmark.torch_network import TorchNetwork, published_mask
from hae_jax.benchmark.torch_programs import Options, TorchForwardPass, TorchTrainingStep
from hae_jax.commands.benchmark import main
from hae_jax.configs import default
from hae_jax.diffusion.loss import training_loss
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.model import VARIANTS, UNetConfig, sparse
from hae_jax.torch_interop.weights import torch_state
from hae_jax.training.state import make_optimizer

CASES = ("fpdm_tiny", "hae_tiny", "hae_lite_tiny", "hae_v2_tiny", "hae_v2c_tiny", "fpdm_options", "hae_v2c_options")
TOLERANCE = 1e-5  # of the output's maximum


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Tests run in parallel. If each of them used a thread per core, PyTorch's threads would wait for each other."""
    monkeypatch.setattr(torch_programs, "cores", lambda: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loaded(config: UNetConfig, state: dict[str, np.ndarray]) -> TorchNetwork:
    network = TorchNetwork(config).eval()
    network.load_state_dict(tensors(state), strict=True)
    return network


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x.transpose(0, 3, 1, 2), order="C"))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


class Golden(NamedTuple):
    """A golden case with its network."""

    case: GoldenCase
    network: TorchNetwork

    def run(self, mode: str, network: TorchNetwork | None = None) -> torch.Tensor:
        case = self.case
        null, drop = case.modes()[mode]
        y = None if null.all() else torch.from_numpy(case.values["y"]).long()
        return (network or self.network)(nchw(case.x), torch.from_numpy(case.values["t"]), y, torch.from_numpy(drop),
                                         list(map(torch.from_numpy, case.masks)))


@pytest.fixture(scope="module", params=CASES)
def golden_case(request: pytest.FixtureRequest, golden) -> Golden:
    case = read_case(golden, request.param)
    return Golden(case, loaded(case.config, case.weights))


def test_golden_outputs(golden_case: Golden):
    for mode in golden_case.case.modes():
        with torch.no_grad():
            assert_close(nhwc(golden_case.run(mode)), golden_case.case.output(mode), TOLERANCE)


def test_golden_outputs_without_memory_optimization(golden_case: Golden):
    case = golden_case.case
    network = loaded(dataclasses.replace(case.config, memory_optimization=False), case.weights)
    # Only hae_v2c has a memory optimisation, so the other cases have no such variant.
    suffix = "_memopt_off" if case.config.rules.skips_zero_context else ""
    for mode in case.modes():
        with torch.no_grad():
            assert_close(nhwc(golden_case.run(mode, network)), case.output(mode, suffix), TOLERANCE)


def test_golden_gradient_norm_of_every_parameter(golden_case: Golden):
    case, network = golden_case
    network.zero_grad()
    (golden_case.run(str(case.values["grad_mode"])) * nchw(case.gradient_direction())).mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    expected = dict(zip(case.values["grad_keys"].tolist(), case.values["grad_l2"], strict=True))
    assert expected.keys() <= gradients.keys()
    norms = {name: 0 if (g := gradients[name]) is None else g.double().norm().item() for name in expected}
    assert not {name: (norms[name], b) for name, b in expected.items() if abs(norms[name] - b) > 1e-5 * b + 1e-7}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_ours(variant: str):
    """With dropped rows, the rule "sample", and a mask. Not all patch sizes divide the image size."""
    config = UNetConfig(variant=variant, null_context="sample", **SMALL)
    graph, state = filled(config)
    x, t, y = inputs(config, 3)
    drop = np.array([False, True, False])
    network = nnx.merge(graph, state)
    rng = np.random.default_rng(0)
    masks = [rng.random((n, n)) < 0.5 for n in network.masked_tokens(*x.shape[1:3])]
    ours = jax.jit(lambda state: nnx.merge(graph, state)(
        x, jnp.asarray(t), jnp.asarray(y), drop=jnp.asarray(drop), sparse_masks=masks))(state)
    with torch.no_grad():
        theirs = loaded(config, torch_state(network))(
            nchw(x), *map(torch.from_numpy, (t, y, drop)), list(map(torch.from_numpy, masks)))
    assert_close(nhwc(theirs), ours, TOLERANCE)


@pytest.mark.parametrize(("per_scale", "ours"), [
    (True, sparse.trained_mask_per_scale), (False, sparse.trained_mask_joint)])
def test_published_masks_are_drawn_as_ours_are(per_scale: bool, ours):
    torch.manual_seed(0)
    tokens = 600
    masks = [published_mask(tokens, per_scale, torch.device("cpu")).numpy() for _ in range(2)]
    assert (masks[0] != masks[1]).any()  # each pass draws new masks
    expected = np.asarray(ours(tokens, jax.random.key(0)))
    np.testing.assert_array_equal(masks[0].diagonal(), expected.diagonal())
    assert masks[0].mean() == pytest.approx(expected.mean(), abs=0.003)
    if not per_scale:
        i = np.arange(tokens)
        assert not masks[0][np.abs(i[:, None] - i) <= int(tokens * 0.1) // 2].any()


@pytest.fixture
def tiny():
    """The smallest config with a hybrid block that has a mask."""
    return with_model(default.get_config(), image_size=24, model_channels=32, num_res_blocks=1, channel_mult=(1, 1),
                      attention_resolutions=(2,))


def test_loss_is_ours(tiny):
    step = TorchTrainingStep(with_model(tiny, dropout=0.0, sparse_pattern="dense"), 2)
    rng = np.random.default_rng(0)
    t = np.array([3, 900])
    x0, noise = nhwc(step.x), rng.standard_normal((2, 24, 24, 4), np.float32)
    process = Process(make_schedule(tiny.diffusion.schedule, tiny.diffusion.steps))
    x_t = np.array(process.noised(x0, t, noise))
    output = step.network(nchw(x_t), torch.from_numpy(t), step.y)
    expected = training_loss(process, nhwc(output), x0, x_t, t, noise).loss.mean()
    assert step.loss(torch.from_numpy(t), nchw(noise), None).item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_update_is_ours(tiny, clip_norm):
    tiny.training.update(weight_decay=0.1, ema_rates=(0.9, 0.5), clip_norm=clip_norm)
    step = TorchTrainingStep(tiny, 2)
    parameters = list(step.network.parameters())
    before = [p.detach().numpy().copy() for p in parameters]
    step.call()
    after = [p.detach().numpy() for p in parameters]
    # The optimiser's gradients, after clipping.
    gradients = [p.grad.numpy() for p in parameters]
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients))
    assert norm == pytest.approx(clip_norm, rel=1e-3) if clip_norm else norm > 1e-2

    some = [i for i, p in enumerate(parameters) if p.shape == (32, 32, 3, 3)][:3]  # few shapes, since each is compiled
    old = [before[i] for i in some]
    optimizer = make_optimizer(tiny.training)
    updates, _ = optimizer.update([gradients[i] for i in some], optimizer.init(old), old)
    for i, update in zip(some, updates, strict=True):
        np.testing.assert_allclose(after[i] - before[i], update, rtol=1e-3, atol=1e-8)
    for rate, averages in step._averages:
        for average, old, new in zip(averages, before, after, strict=True):
            np.testing.assert_allclose(average.numpy(), rate * old + (1 - rate) * new, rtol=1e-5, atol=1e-7)


def test_labels_are_dropped_and_masks_drawn_in_training(tiny):
    step = TorchTrainingStep(tiny, 2)
    seen = []
    step._run = lambda x, t, y, drop: seen.append((t, drop)) or step.network(x, t, y, drop)
    for p_uncond in (0.0, 1.0):
        step._p_uncond = p_uncond
        step.call()
    assert [drop.tolist() for _, drop in seen] == [[False, False], [True, True]]
    assert len({int(n) for t, _ in seen for n in t}) > 1
    assert step.network.training
    assert step.peak_memory() is None  # PyTorch does not count memory on CPUs


def test_options_compute_the_same(tiny, monkeypatch):
    config = with_model(tiny, variant="fpdm", channel_mult=(1,))  # small, since tracing it takes time
    plain = TorchForwardPass(config, 2)
    plain.network.out[2].weight.data.normal_()  # it is zero initially

    def output(options=None, config=config):
        program = TorchForwardPass(config, 2, options=options)
        program.network.load_state_dict(plain.network.state_dict())
        return nhwc(program._compute())

    expected = nhwc(plain._compute())
    assert_close(output(Options(channels_last=True)), expected, TOLERANCE)
    # The backend is eager, since the compiler takes a minute. The traced program is the same.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert_close(output(Options(compile="default")), expected, TOLERANCE)
    rounded = output(Options(autocast=True))
    assert_close(rounded, expected, 0.1)
    assert np.abs(rounded - expected).max() > 1e-4
    np.testing.assert_array_equal(output(config=with_model(config, dtype="bfloat16")), rounded)
    np.testing.assert_array_equal(output(Options(autocast=False), with_model(config, dtype="bfloat16")), expected)


@pytest.fixture
def flags(monkeypatch):
    """Command-line flags of a benchmark of the smallest network."""
    monkeypatch.setattr("hae_jax.benchmark.measure._PEAK_SIZES", {"cpu": 64})
    monkeypatch.setattr("hae_jax.benchmark.measure._COPIED", (64, 64))
    return ["--config", default.__file__, "--variant", "fpdm", "--config.model.image_size=16",
            "--config.model.model_channels=32",
            "--config.model.channel_mult=(1,)", "--config.model.num_res_blocks=1",
            "--config.model.attention_resolutions=()", "--devices", "one", "--batch", "2", "--repeats", "2",
            "--baseline", "torch"]


def test_the_benchmark_has_rows_of_it(flags, tmp_path, capsys):
    main([*flags, "--part", "forward", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__} (1 threads)" in printed
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in printed.splitlines() if line.startswith("| ")]
    assert rows[1:] == [["forward", "fpdm", "ours"], ["forward", "fpdm", "torch"]]
    ours, theirs, *_ = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    ratios = np.divide(theirs["seconds"], ours["seconds"])
    assert theirs["time_ratio"] == pytest.approx(np.median(ratios))
    assert theirs["images_per_second"] == pytest.approx(2 / np.median(theirs["seconds"]))
    assert theirs["memory"] is None  # on a CPU


def test_it_has_no_translation():
    settings = Settings(("forward", "translate"), ("fpdm",), ("torch",), batch=2)
    network = UNetConfig(num_classes=2)
    forms = [[form.name for form in programs.forms_of(part, network, settings)] for part in settings.parts]
    assert forms == [["ours", "torch"], ["ours"]]


def test_without_pytorch_one_line_says_what_to_do(flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--baseline torch: needs PyTorch; pip install torch" in line


@pytest.mark.parametrize(("field", "value"), [
    ("model.remat", "block"), ("training.accumulation", "2"), ("training.timesteps", "loss-second-moment"),
    ("diffusion.noise", "simplex"), ("diffusion.variance", "learned_range")])
def test_a_step_that_would_do_less_than_ours_is_refused(flags, field, value, capsys):
    with pytest.raises(SystemExit):
        main([*flags, "--part", "train", f"--config.{field}={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--baseline torch: {field} is " in line


def test_devices_that_it_does_not_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no GPU"):
        torch_programs.device_for("gpu", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_programs.device_for("gpu", 1) == "cuda"
    with pytest.raises(UserError, match="add --devices one"):
        torch_programs.device_for("gpu", 2)
