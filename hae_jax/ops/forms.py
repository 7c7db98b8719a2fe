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
_ON_CPUS = {"attention": "rows", "convolution": "winograd"}


def automatic(operation: str, platform: str) -> str:
    """The form for "auto", in any dtype: the forms for CPUs on CPUs, and XLA's on other platforms.

    It is never "cudnn", since the time of that form has not been compared on a GPU yet.

    Args:
      operation: "attention" or "convolution".
      platform: "cpu", "gpu" or "tpu".
    """
    return _ON_CPUS[operation] if platform == "cpu" else "xla"


def attention_form(choice: str, dtype: Any, platform: str | None = None) -> str:
    """The form of attention for a choice in the config.

    - "auto": see `automatic`.
    - "xla": all heads and queries at once, and the scores computed again for the gradient.
    - "rows": head after head and some queries at a time, so that scores stay in a CPU's caches.
    - "cudnn": cuDNN's FlashAttention on GPUs in 16 bits, for head sizes that it takes; elsewhere as "auto".
    - "materialised": the class context as E more tokens, the sparse pattern as a mask on dense attention. This is the
      benchmark's baseline.

    Args:
      choice: one of `ATTENTION`.
      platform: "cpu", "gpu" or "tpu"; None: JAX's default backend.
    """
    platform = platform or jax.default_backend()
    if choice == "auto" or (choice == "cudnn" and not (platform == "gpu" and jax.numpy.dtype(dtype).name in _HALF)):
        return automatic("attention", platform)
    return choice


def convolution_form(choice: str, platform: str | None = None) -> str:
    """The form of convolutions for a choice in the config.

    - "auto": see `automatic`.
    - "xla": XLA's convolution and its gradients.
    - "winograd": Winograd's form, or a matrix product, for the shapes where it is faster on a CPU (`ops.cpu`).

    Args:
      choice: one of `CONVOLUTION`.
      platform: "cpu", "gpu" or "tpu"; None: JAX's default backend.
    """
    return automatic("convolution", platform or jax.default_backend()) if choice == "auto" else choice


def compiler_options() -> dict[str, Any]:
    """XLA's options for the large programs (training step, translation).

    - CPUs: the order of operations that needs the least memory: measured, a tenth less, and a little faster.
    - GPUs: to shorten the compilation, Triton kernels are not timed against XLA's own for each fusion and matrix
      product, and no model of communication between GPUs is evaluated for each kernel. By XLA's plan, a training step
      of `brats_v2c` takes 7 % more memory then. The effect on the programs' time has not been measured.
    """
    return _COMPILER_OPTIONS.get(jax.default_backend(), {})
