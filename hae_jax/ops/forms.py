"""Selection of the form of an operation. Only this module selects code by platform.

A network's config names the forms (`model.attention`, `model.convolution`). The layers call this module while a program
is traced, so a program contains one form of each operation. All forms give the same results up to rounding.
"""

from typing import Any

import jax

ATTENTION = ("auto", "xla", "cudnn", "rows", "materialised")
CONVOLUTION = ("auto", "xla", "winograd")
_HALF = ("bfloat16", "float16")
_COMPILER_OPTIONS = {
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "gpu": {"xla_gpu_experimental_enable_fusion_autotuner": False, "xla_gpu_enable_triton_gemm": False,
            "xla_gpu_enable_analytical_sol_latency_estimator": False},
}
_CUDNN_ATTENTION = 8.0  # compute capability that cuDNN's attention needs


def attention_form(choice: str, dtype: Any, platform: str | None = None) -> str:
    """The form of attention for a choice in the config.

    - "auto": "rows" on CPUs; "cudnn" on NVIDIA's GPUs since Ampere in 16 bits; "xla" elsewhere. On an H200, attention
      at 32 px with class context and gradients, batch 28, took 1.05 ms with "cudnn" and 1.64 ms with "xla".
    - "xla": all heads and queries at once, and the scores computed again for the gradient.
    - "rows": head after head and some queries at a time, so that scores stay in a CPU's caches.
    - "cudnn": cuDNN's FlashAttention on GPUs in 16 bits, for head sizes that it takes; elsewhere as "auto".
    - "materialised": the class context as E more tokens, the sparse pattern as a mask on dense attention. This is the
      benchmark's baseline.

    Args:
      choice: one of `ATTENTION`.
      platform: "cpu", "gpu" or "tpu"; None: JAX's default backend.
    """
    if choice not in ("auto", "cudnn"):
        return choice
    platform = platform or jax.default_backend()
    if platform == "gpu" and jax.numpy.dtype(dtype).name in _HALF and (
            choice == "cudnn" or _compute_capability() >= _CUDNN_ATTENTION):
        return "cudnn"
    return "rows" if platform == "cpu" else "xla"


def _compute_capability() -> float:
    """That of the first device; 0 if it is not NVIDIA's."""
    try:
        return float(getattr(jax.local_devices()[0], "compute_capability", 0))
    except ValueError:  # AMD's GPUs have a name, such as "gfx90a"
        return 0.0


def convolution_form(choice: str, platform: str | None = None) -> str:
    """The form of convolutions for a choice in the config.

    - "auto": "winograd" on CPUs, "xla" on other platforms.
    - "xla": XLA's convolution and its gradients.
    - "winograd": Winograd's form, or a matrix product, for the shapes where it is faster on a CPU (`ops.cpu`).

    Args:
      choice: one of `CONVOLUTION`.
      platform: "cpu", "gpu" or "tpu"; None: JAX's default backend.
    """
    if choice != "auto":
        return choice
    return "winograd" if (platform or jax.default_backend()) == "cpu" else "xla"


def compiler_options() -> dict[str, Any]:
    """XLA's options for the large programs (training step, translation).

    - CPUs: the order of operations that needs the least memory: measured, a tenth less, and a little faster.
    - GPUs: to shorten the compilation, Triton kernels are not timed against XLA's own for each fusion and matrix
      product, and no model of communication between GPUs is evaluated for each kernel. The effect on the programs'
      time and memory has not been measured on a GPU.
    """
    return _COMPILER_OPTIONS.get(jax.default_backend(), {})
