"""Prints the memory tables of docs/performance.md and docs/training.md, by XLA's plan for an H100, without a GPU.

It compiles training steps with JAX's CUDA plugin and runs none of them. Install the plugin of the same version as JAX,
and cuDNN. Then run this file from the repository's folder. It takes about an hour on two cores.

    pip install --no-deps "jax-cuda13-plugin==$(python -c 'import jax; print(jax.__version__)')" \
        "jax-cuda13-pjrt==$(python -c 'import jax; print(jax.__version__)')" \
        nvidia-cudnn-cu13 nvidia-cublas nvidia-cuda-nvrtc
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python docs/benchmarks/plan_memory.py
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from hae_jax.benchmark.programs import PLAIN, Form, TrainingStep
from hae_jax.configs import brats_v2c
from hae_jax.training.mesh import make_mesh

BATCH, OTHER_BATCH = 28, 14  # the slope between them gives the memory of each further image
CARDS = 24, 40, 80  # GB
FREE = 0.1  # share of a card that stays free
NAIVE = Form("naive", ("attention", "convolution"))
H100 = """
    platform_name: "CUDA"  device_description_str: "NVIDIA H100 80GB HBM3"
    dnn_version_info { major: 9 minor: 10 patch: 0 }
    gpu_device_info {
      cuda_compute_capability { major: 9 minor: 0 }
      core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
      memory_bandwidth: 3352320000000  device_memory_size: 84942979072
      shared_memory_per_core: 233472  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
      registers_per_core_limit: 65536  registers_per_block_limit: 65536
      threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
      thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
    }"""


def peak(mesh: Mesh, batch: int, form: Form = PLAIN, **model) -> int:
    """The planned peak of a training step in bytes, with parameters, EMA weights, optimiser and gradients.

    Args:
      batch: images.
      form: ours or the naive form.
      **model: fields of `config.model` that differ from `brats_v2c`.
    """
    config = brats_v2c.get_config()
    # The forms that "auto" selects on such a GPU. The platform is a CPU here.
    config.model.update({"attention": "cudnn", "convolution": "xla"} | model)
    with mock.patch("jax.default_backend", return_value="gpu"):
        plan = TrainingStep(config, mesh, batch).lower(form).compile().memory_analysis()
    return (plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
            + plan.temp_size_in_bytes)


def main() -> None:
    """Compiles row after row and prints it."""
    device, = topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=H100).devices
    mesh = make_mesh(devices=[device])
    print(f"hae_v2c, 128 px, bfloat16, batch {BATCH}, H100, jax {jax.__version__}")
    print("| form | `model.remat` | peak | relative to naive | each further image | "
          + " | ".join(f"largest batch in {card} GB" for card in CARDS) + " |")
    naive = None
    for name, form, model in (
            ("naive", NAIVE, {}), ("naive, context skipped", NAIVE, {"num_classes": None}),
            ("naive", NAIVE, {"remat": "block"}), ("ours, context skipped", PLAIN, {"num_classes": None}),
            ("ours", PLAIN, {}), ("ours", PLAIN, {"remat": "block"}),
            ("ours, XLA's attention", PLAIN, {"attention": "xla"})):
        used = peak(mesh, BATCH, form, **model)
        naive = naive or used
        image = (used - peak(mesh, OTHER_BATCH, form, **model)) / (BATCH - OTHER_BATCH)
        largest = [int(BATCH + ((1 - FREE) * card * 1e9 - used) / image) for card in CARDS]
        print(f"| {name} | `{model.get('remat', 'none')}` | {used / 1e9:.3g} GB | {used / naive:.2f} | "
              f"{image / 1e6:.0f} MB | {' | '.join(map(str, largest))} |", flush=True)

    print("\nhae_v2c, 64 px, 64 channels, widths 1, 2, 3, one ResBlock per level, batch 4, float32")
    for remat in ("none", "block", "full"):
        small = {"image_size": 64, "model_channels": 64, "channel_mult": (1, 2, 3), "num_res_blocks": 1,
                 "dtype": "float32"}
        print(f"| `{remat}` | {peak(mesh, 4, remat=remat, **small) / 1e6:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
