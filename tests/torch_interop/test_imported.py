"""A run that was imported from PyTorch's files equals the run that wrote them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from hae_jax.commands.config import read_config
from hae_jax.errors import UserError
from hae_jax.torch_interop import imported
from hae_jax.torch_interop import run as torch_run
from hae_jax.torch_interop.weights import torch_state
from hae_jax.training.checkpoint import Checkpoints, check_same_run, load_network
from hae_jax.training.loop import train
from hae_jax.training.mesh import make_mesh
from hae_jax.training.state import (
    abstract_network,
    abstract_state,
    empty_window,
    make_optimizer,
    network_config,
    shardings_of,
)


@pytest.fixture(scope="module")
def settings(tiny_settings):
    """A config with all parts of the optimiser's state: clipping, a schedule, two sets of EMA weights."""

    def make():
        config = tiny_settings()
        config.training.clip_norm = 1.0
        config.training.warmup_steps = 2
        config.training.ema_rates = (0.9, 0.5)
        return config

    return make


@pytest.fixture
def plain_config(tiny_config):
    """A network that compiles quickly."""
    tiny_config.model.update({"variant": "fpdm", "channel_mult": (1,), "attention_resolutions": (1,), "dropout": 0.0})
    return tiny_config


def abstract_of(config):
    """The shapes of a run's state. The state is not initialised, since that would be slow."""
    return abstract_state(network_config(config.to_dict()), make_optimizer(config.training),
                          len(config.training.ema_rates))


def state_after_three_steps(config):
    """The state of a run with random values and counts of 3."""
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.random(leaf.shape, np.float32), leaf.dtype)
                         if leaf.dtype == jnp.float32 else jnp.full(leaf.shape, 3, leaf.dtype), abstract_of(config))
    return state._replace(window=empty_window(), skipped=jnp.zeros((), jnp.int32))


@pytest.fixture(scope="module")
def state(settings):
    return state_after_three_steps(settings())


def restored(workdir, config, step):
    """The whole state in a checkpoint."""
    like = abstract_of(config)
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(step, like, shardings_of(make_mesh(devices=jax.devices()[:1]), like))
    checkpoints.close()
    return state


def in_torch(params, config) -> dict[str, np.ndarray]:
    graph, _ = abstract_network(network_config(config.to_dict()))
    return torch_state(nnx.merge(graph, params))


def tensors(state):
    return {name: torch.from_numpy(value) for name, value in state.items()}


def adamw_of(state, opt_state, config) -> dict:
    """An optimiser's state in the form of `torch.optim.AdamW.state_dict`."""
    mu, nu = (tensors(in_torch(optax.tree_utils.tree_get(opt_state, key), config)) for key in ("mu", "nu"))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(value) for value in tensors(state).values()])
    state_dict = optimizer.state_dict()
    state_dict["state"] = {i: {"step": torch.tensor(3.0), "exp_avg": mu[name], "exp_avg_sq": nu[name]}
                           for i, name in enumerate(state)}
    return state_dict


def write_files(state, config, folder):
    """Writes a run as PyTorch's files."""
    params = in_torch(state.params, config)
    torch.save(tensors(params), folder / "model000003.pt")
    for rate, average in zip(config.training.ema_rates, state.ema, strict=True):
        torch.save(tensors(in_torch(average, config)), folder / f"ema_{rate}_000003.pt")
    torch.save(adamw_of(params, state.opt_state, config), folder / "opt000003.pt")


@pytest.fixture(scope="module")
def files(state, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(state, settings(), folder)
    return folder


def read_all(files):
    return torch_run.read_weights(files / "model000003.pt", files / "opt000003.pt",
                                 [files / "ema_0.5_000003.pt", files / "ema_0.9_000003.pt"])


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_imported_run_is_the_original_bit_for_bit(state, files, settings, tmp_path):
    """Parameters, both sets of EMA weights, moments, both counts and the step are equal."""
    lines = imported.write_run(read_all(files), settings(), tmp_path / "run", verify=True)
    assert any("moments of step 3" in line for line in lines)
    assert_same(restored(tmp_path / "run", settings(), 3), state)


def test_an_imported_run_goes_on_as_the_original_does(plain_config, tmp_path):
    state = state_after_three_steps(plain_config)
    original = Checkpoints(tmp_path / "original")
    original.save(state, plain_config.to_dict())
    original.close()
    write_files(state, plain_config, tmp_path)
    weights = torch_run.read_weights(tmp_path / "model000003.pt", tmp_path / "opt000003.pt",
                                     [tmp_path / "ema_0.9_000003.pt"])
    imported.write_run(weights, plain_config, tmp_path / "imported")
    plain_config.training.steps = 4
    states = []
    for folder in (tmp_path / "original", tmp_path / "imported"):
        train(plain_config, folder, jax.devices()[:1])
        states.append(restored(folder, plain_config, 4)._replace(window=()))
    assert_same(*states)


def test_one_more_step_is_the_step_that_pytorch_takes(plain_config, tmp_path):
    config = plain_config
    config.training.weight_decay = 0.01
    params = tensors(in_torch(state_after_three_steps(config).params, config))
    rng = np.random.default_rng(0)
    parameters = [torch.nn.Parameter(value) for value in params.values()]
    optimizer = torch.optim.AdamW(parameters, lr=config.training.learning_rate, weight_decay=0.01)
    unused = list(params).index("out.2.bias")

    def step():
        for i, parameter in enumerate(parameters):
            gradient = 1e-3 * rng.standard_normal(parameter.shape, np.float32)
            parameter.grad = None if i == unused else torch.from_numpy(gradient)
        optimizer.step()

    for _ in range(3):
        step()
    torch.save(optimizer.state_dict(), tmp_path / "opt000003.pt")
    torch.save(dict(zip(params, (p.detach() for p in parameters), strict=True)), tmp_path / "model000003.pt")
    lines = imported.write_run(torch_run.read_weights(tmp_path / "model000003.pt", tmp_path / "opt000003.pt"), config,
                               tmp_path / "run", verify=True)
    assert any("1 parameters never had a gradient" in line for line in lines)
    state = restored(tmp_path / "run", config, 3)
    step()
    gradients = imported._placed({name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
                                  for name, p in zip(params, parameters, strict=True)},
                                 network_config(config.to_dict()))

    @jax.jit  # one program instead of several per shape
    def after(gradients, state):
        updates, _ = make_optimizer(config.training).update(gradients, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    ours = in_torch(after(gradients, state), config)
    for i, (name, parameter) in enumerate(zip(params, parameters, strict=True)):
        if i != unused:  # PyTorch does not change it, not even by weight decay
            np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-6, atol=1e-7, err_msg=name)


def test_an_average_alone_serves_as_parameters_and_average(files, settings, tmp_path):
    weights = torch_run.read_weights(files / "ema_0.9_000003.pt")
    assert (weights.step, list(weights.ema)) == (3, [0.9])
    lines = imported.write_run(weights, settings(), tmp_path / "run")
    assert any("EMA weights; training continues from them" in line for line in lines)
    assert any("EMA weights 0.5" in line and "a copy of the parameters" in line for line in lines)
    expected = torch.load(files / "ema_0.9_000003.pt")
    for ema in (True, False):
        found = torch_state(load_network(tmp_path / "run", ema=ema).model)
        assert all(np.array_equal(found[name], expected[name].numpy()) for name in expected)
    state = restored(tmp_path / "run", settings(), 3)
    counts = [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == ()]
    assert sorted(counts) == [0, 3]  # the moments start at 0; the learning rate's schedule continues


def test_the_step_is_of_the_name_or_of_the_optimiser(files, tmp_path):
    torch.save(torch.load(files / "model000003.pt"), tmp_path / "weights_v2.pt")
    assert torch_run.read_weights(tmp_path / "weights_v2.pt").step == 0
    (tmp_path / "o.pt").write_bytes((files / "opt000003.pt").read_bytes())
    assert torch_run.read_weights(tmp_path / "weights_v2.pt", tmp_path / "o.pt").step == 3
    (tmp_path / "opt000004.pt").write_bytes((files / "opt000003.pt").read_bytes())
    with pytest.raises(UserError, match=r"model000003\.pt, .*opt000004\.pt: files of different steps"):
        torch_run.read_weights(files / "model000003.pt", tmp_path / "opt000004.pt")


def test_a_guessed_config_is_written_as_one_that_goes_on(files, tmp_path):
    weights = torch_run.read_weights(files / "model000003.pt", ema=[files / "ema_0.5_000003.pt"])
    config = read_config("configs/default.py", [])
    found = torch_run.guessed_settings(weights, config)
    assert found == {"training.ema_rates": (0.5,), "model.model_channels": 32, "model.channel_mult": (1, 1),
                     "model.num_res_blocks": 1, "model.attention_resolutions": (2,)}
    config.update_from_flattened_dict(found)
    imported.write_run(weights, config, tmp_path / "run", config_text=torch_run.config_file(found, weights))
    again = read_config(str(tmp_path / "run" / "config.py"), [])
    check_same_run(tmp_path / "run", load_network(tmp_path / "run").config, again.to_dict())
    origin = json.loads((tmp_path / "run" / "imported.json").read_text())
    assert [entry["path"] for entry in origin["files"]] == [str(path) for path in weights.files]
    assert "Research use only" in origin["notice"]


def test_what_does_not_fit_is_said_in_one_line_and_nothing_is_written(files, settings, tmp_path):
    def refused(config=None, weights=None, output=tmp_path / "run", **options) -> str:
        with pytest.raises(UserError) as caught:
            imported.write_run(weights or read_all(files), config or settings(), output, **options)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before
        return str(caught.value)

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a").touch()
    params = torch.load(files / "model000003.pt")
    torch.save({name: value for name, value in params.items() if name != "out.2.bias"}, tmp_path / "part.pt")
    torch.save(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict(), tmp_path / "small.pt")
    before = sorted(tmp_path.iterdir())
    wrong = settings()
    wrong.model.variant, wrong.model.num_classes = "hae", 3
    message = refused(wrong, config_name="a.py")
    assert "does not fit a.py: model.variant is 'hae', that of the weights 'hae_v2c'; model.num_classes is 3" in message
    rates = settings()
    rates.training.ema_rates = (0.9,)
    assert "ema_0.5_000003.pt: EMA rate not in the config, training.ema_rates is (0.9,)" in refused(rates)
    assert "missing: out.2.bias" in refused(weights=torch_run.read_weights(tmp_path / "part.pt"))
    other = read_all(files)
    other = other._replace(adamw=other.adamw._replace(exp_avg=other.adamw.exp_avg[:-1]))
    assert "the network has" in refused(weights=other)
    other = read_all(files)
    other = other._replace(adamw=other.adamw._replace(exp_avg=other.adamw.exp_avg[::-1]))
    assert "opt000003.pt: moments of another network" in refused(weights=other)
    assert "exists and is not empty" in refused(output=tmp_path / "used")
    with pytest.raises(UserError, match="no moments of Adam"):
        torch_run.read_weights(files / "model000003.pt", tmp_path / "small.pt")
    with pytest.raises(UserError, match="EMA weights of the same rate"):
        torch_run.read_weights(files / "model000003.pt", ema=[files / "ema_0.5_000003.pt"] * 2)


def test_verification_notices_a_single_changed_number(files, settings, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_changed(self, state, config):
        nu = optax.tree_utils.tree_get(state.opt_state, "nu")
        nu.head_conv.bias = nu.head_conv.bias.replace(nu.head_conv.bias[...].at[1].add(1e-3))
        save(self, state, config)

    monkeypatch.setattr(Checkpoints, "save", save_changed)
    with pytest.raises(UserError, match=r"1 of \d+ arrays were written wrongly, first out\.2\.bias \(nu\); nothing"):
        imported.write_run(read_all(files), settings(), tmp_path / "run", verify=True)
    assert list(tmp_path.iterdir()) == []
