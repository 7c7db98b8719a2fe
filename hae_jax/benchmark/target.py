"""GPUs that programs can be compiled for without having one: only JAX's CUDA plugin is needed."""

import importlib.util
from typing import NamedTuple

import jax
from jax.experimental import topologies

from hae_jax.errors import UserError

_PLUGINS = "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"
_CUDNN = 9, 10, 0


class Target(NamedTuple):
    """A GPU by its data sheet."""

    name: str
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    units: int  # of each, for float32
    shared: int  # bytes of each; a block may have all but 1 kB
    cache: int  # bytes, level 2
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: float  # bytes per second

    def description(self) -> str:
        """What XLA wants to know of it (`GpuTargetConfigProto` as text)."""
        major, minor = self.capability
        cudnn = " ".join(f"{name}: {n}" for name, n in zip(("major", "minor", "patch"), _CUDNN, strict=True))
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ {cudnn} }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.processors} fpus_per_core: {self.units} clock_rate_ghz: {self.clock}
              memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory} l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared} shared_memory_per_block_optin: {self.shared - 1024}
              shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}"""


TARGETS = {
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 52428800, 1.98, 84942979072, 3.35232e12),
    "a100": Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 41943040, 1.41, 85100068864, 2.03904e12),
}


def target_device(name: str) -> jax.Device:
    """A device that programs can be compiled for, and on which nothing can be put or run.

    Raises:
      UserError: the GPU is not known, or JAX's CUDA plugin is not installed.
    """
    if name not in TARGETS:
        raise UserError(f"--target {name}: choose among {', '.join(TARGETS)}")
    if not any(map(_is_installed, _PLUGINS)):
        raise UserError(f"--target {name}: needs the compiler for GPUs, though no GPU: pip install '.[cuda]'")
    try:
        (device,) = topologies.get_topology_desc(
            "1x1x1", "cuda", topology="1x1x1", target_config=TARGETS[name].description()).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--target {name}: JAX's CUDA plugin does not compile without a GPU here: {reason}") from error
    return device


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(plugin) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
