"""A training step and a forward pass in PyTorch, for comparison with ours. Needs the extra `torch`.

The training step does the work of `hae_jax.training.step`: timesteps, noise, dropped labels, dropout, the loss of the
predicted noise, gradients and their norm, AdamW, EMA weights. The forward pass is that of `programs.ForwardPass`.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import torch
from flax import nnx
from torch import Tensor

from hae_jax.benchmark.programs import host_batch
from hae_jax.benchmark.torch_network import TorchNetwork
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.errors import UserError
from hae_jax.model import UNet
from hae_jax.provenance import cores
from hae_jax.torch_interop.weights import torch_state
from hae_jax.training.state import network_config

# Supported values of config fields in the training step. With other values, its work would differ from that of ours.
_TRAINING = {
    "diffusion.noise": ("gaussian",),
    "diffusion.variance": ("fixed_large", "fixed_small"),
    "training.timesteps": ("uniform",),
    "training.accumulation": (1,),
    "model.remat": ("none",),
}


class Options(NamedTuple):
    """The options of PyTorch."""

    autocast: bool | None = None  # to bfloat16; None: if the config computes in bfloat16
    compile: str | None = None  # the mode of torch.compile, such as "default"; None: eager
    channels_last: bool = False  # the layout of images and convolutions


class _Program:
    """Base class of both programs: a network on a device, with a batch."""

    def __init__(self, config: ml_collections.ConfigDict, batch: int, device: str, options: Options | None):
        options = options or Options()
        self.images = batch
        self.device = torch.device(device)
        self._prepare_device()
        network = network_config(config.to_dict())
        self.network = TorchNetwork(network)
        self.network.load_state_dict(_initial_weights(network, config.seed))
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.network.to(self.device, memory_format=layout)  # pyright: ignore[reportCallIssue]  not in torch's overloads
        self._run = torch.compile(self.network, mode=options.compile) if options.compile else self.network
        self._autocast = network.dtype == "bfloat16" if options.autocast is None else options.autocast
        arrays = host_batch(network, batch)
        x = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
        self.x = x.to(self.device).contiguous(memory_format=layout)  # [B, C, H, W]
        self.y = None if network.num_classes is None else torch.from_numpy(arrays["label"]).long().to(self.device)

    def call(self) -> "_Program":
        """Starts the program once. Returns itself, to wait for."""
        self._compute()
        return self

    def block_until_ready(self) -> None:
        """Waits for the device, as a JAX array's method does."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self) -> int | None:
        """Calls the program once. Returns the bytes at the peak, parameters included; None on CPUs.

        PyTorch does not count what it allocates on a CPU.
        """
        if self.device.type != "cuda":
            self.call()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.call().block_until_ready()
        return torch.cuda.max_memory_allocated(self.device) - self._held_before

    def _compute(self) -> Any:
        raise NotImplementedError

    def _predict(self, x: Tensor, t: Tensor, drop: Tensor | None = None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext():
            return self._run(x, t, self.y, drop)

    def _prepare_device(self) -> None:
        # In inference, nn.MultiheadAttention uses a separate fast path, which stores all scores. With a mask and 4096
        # tokens on a CPU, it is six times slower than `scaled_dot_product_attention`, which is used without it.
        torch.backends.mha.set_fastpath_enabled(False)
        if self.device.type == "cpu":
            torch.set_num_threads(cores())
            return
        # As in our programs, float32 uses TensorFloat32, and the fastest of several convolutions is used.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        self._held_before = torch.cuda.memory_allocated(self.device)


class TorchForwardPass(_Program):
    """The network once, with labels, as in inference."""

    def __init__(self, config: ml_collections.ConfigDict, batch: int, device: str = "cpu",
                 options: Options | None = None):
        super().__init__(config, batch, device, options)
        self.network.eval()
        self.t = 10 * torch.arange(batch, device=self.device)

    def _compute(self) -> Tensor:  # [B, out_channels, H, W]
        with torch.no_grad():
            return self._predict(self.x, self.t)


class TorchTrainingStep(_Program):
    """A whole training step.

    Raises:
      UserError: the config asks for what this step does not do.
    """

    def __init__(self, config: ml_collections.ConfigDict, batch: int, device: str = "cpu",
                 options: Options | None = None):
        check_training(config)
        super().__init__(config, batch, device, options)
        self.network.train()
        training, diffusion = config.training, config.diffusion
        alpha_bar = make_schedule(diffusion.schedule, diffusion.steps).alpha_bar
        self._signal, self._noise = (torch.tensor(a**0.5, dtype=torch.float32, device=self.device)[:, None, None, None]
                                     for a in (alpha_bar, 1 - alpha_bar))  # [T, 1, 1, 1] each
        self._predicts_eps = diffusion.predicts == "eps"
        self._p_uncond, self._clip_norm = training.p_uncond, training.clip_norm
        self._params: list[torch.Tensor] = list(self.network.parameters())
        self._optimizer = torch.optim.AdamW(self._params, lr=training.learning_rate, betas=(0.9, 0.999), eps=1e-8,
                                            weight_decay=training.weight_decay, fused=True)
        self._averages = [(rate, [p.detach().clone() for p in self._params]) for rate in training.ema_rates]

    def loss(self, t: Tensor, noise: Tensor, drop: Tensor | None) -> Tensor:  # [B], [B, C, H, W], [B] bool -> []
        """The mean squared error of the prediction, at these timesteps, with this noise."""
        x_t = self._signal[t] * self.x + self._noise[t] * noise
        target = noise if self._predicts_eps else self.x
        return (self._predict(x_t, t, drop) - target).square().mean()

    def _compute(self) -> tuple[Tensor, Tensor]:
        batch = len(self.x)
        t = torch.randint(len(self._signal), (batch,), device=self.device)
        drop = None if self.y is None else torch.rand(batch, device=self.device) < self._p_uncond
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss(t, torch.randn_like(self.x), drop)
        loss.backward()
        norm = self._gradient_norm()
        self._optimizer.step()
        with torch.no_grad():
            for rate, average in self._averages:
                torch._foreach_lerp_(average, self._params, 1 - rate)  # pyright: ignore[reportPrivateImportUsage]
        return loss.detach(), norm

    def _gradient_norm(self) -> Tensor:
        if self._clip_norm is not None:
            return torch.nn.utils.clip_grad_norm_(self._params, self._clip_norm)
        grads = [p.grad for p in self._params if p.grad is not None]
        norms = torch._foreach_norm(grads)  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.vector_norm(torch.stack(norms))


PROGRAMS: dict[str, Callable[..., _Program]] = {"train": TorchTrainingStep, "forward": TorchForwardPass}


def check_training(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the config's training step does something that the one here does not."""
    for field, allowed in _TRAINING.items():
        section, name = field.split(".")
        if config[section][name] not in allowed:
            raise UserError(f"--baseline torch: {field} is {config[section][name]!r}; its training step has "
                            f"{' or '.join(map(str, allowed))} only; set it so, or leave --part train out")


def device_for(platform: str, devices: int) -> str:
    """PyTorch's device that corresponds to JAX's.

    Args:
      platform: of JAX's devices.
      devices: how many there are.

    Raises:
      UserError: there is none.
    """
    if platform == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(f"--baseline torch: this PyTorch finds no GPU, and JAX runs on one ({platform}); install "
                        "PyTorch for CUDA (pip install torch), or set JAX_PLATFORMS=cpu")
    if devices > 1:
        raise UserError(f"--baseline torch: runs on one GPU, and ours would on {devices}; add --devices one")
    return "cuda"


def description(device: str) -> str:
    """PyTorch's version and device, for the head of the table."""
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"torch {torch.__version__} ({where})"


def _initial_weights(network: Any, seed: int) -> dict[str, Tensor]:
    """The initial weights of our network."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        state = torch_state(UNet(network, rngs=nnx.Rngs(seed)))
    return {name: torch.from_numpy(value) for name, value in state.items()}
