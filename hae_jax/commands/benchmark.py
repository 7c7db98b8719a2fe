"""`tools/benchmark.py`: time and memory of training, forward pass, translation, loader and blocks, in one table."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from hae_jax.commands.common import CommandParser, check_fields, entry_point
from hae_jax.commands.config import CONFIG_HELP, DEFAULTS, read_config
from hae_jax.errors import UserError

_SMALL = ("image_size=64", "model_channels=32", "num_res_blocks=1", "channel_mult=(1,2,2)",
          "attention_resolutions=(2,4)")
_DESCRIPTION = """\
Measure a training step, a forward pass, the translation of a batch and the loader: time (median), images/s, model
FLOP/s, memory, compile time. Compared programs are timed in turns (interleaved timing). Model FLOP are the operations
that the network needs, counted on shapes. MFU is model FLOP/s divided by the FLOP/s of a large matrix product on the
same devices. "time x" and "memory x" are the values of a baseline divided by ours, of another variant divided by the
first one, or of a block's other form divided by the first form. For the loader, "time x" is its slices/s divided by
those that the training step needs. "blocks" are single layers in the sizes of the full network; they are measured only
with --part blocks."""
_PARTS = ("train", "forward", "translate", "input")
_EPILOG = """\
examples:
  python tools/benchmark.py                                          # a small network, about 4 minutes on two cores
  python tools/benchmark.py --baseline attention,convolution,translation # one naive part each
  python tools/benchmark.py --part train,forward --baseline torch    # PyTorch, in turns with ours
  python tools/benchmark.py --variant hae_v2c,fpdm --part forward --baseline none
  python tools/benchmark.py --config configs/brats_v2c.py --batch 28 --output results/full  # the full network
  python tools/benchmark.py --config configs/brats_v2c.py --config.model.attention=xla    # another form of attention
  python tools/benchmark.py --config configs/brats_v2c.py --part train,input --baseline none # loader and step
  python tools/benchmark.py --part blocks --batch 4                  # single blocks: ours against others"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(_DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--part", type=_names, metavar="A,B", help="parts to measure: train, forward, translate, "
        "input, blocks; default: "
        f"{','.join(_PARTS)}")
    add("--variant", type=_names, metavar="A,B", help="variants to measure: fpdm, hae, hae_lite, hae_v2, hae_v2c; "
        "default: the config's")
    add("--baseline", type=_names, metavar="A,B", help="baselines to compare with. naive: a direct "
        "implementation; attention, convolution, translation: only this part is naive; torch: the same network in "
        "PyTorch (train and forward; pip install torch); none. Default: naive")
    add("--batch", type=int, metavar="N", help="batch size over all devices; default: 8")
    add("--config", metavar="FILE", help=f"{CONFIG_HELP}; default: a small network, "
        f"configs/default.py with {', '.join(_SMALL)}")
    add("--steps", type=int, metavar="N", help="steps of a translation; default: 4 of 600")
    add("--repeats", type=int, metavar="N", help="number of turns; default: 5")
    add("--devices", choices=("one", "cores"), help="one device, or all devices (on a CPU, its cores); default: "
        "cores")
    add("--output", metavar="FOLDER", help="also write the table there, as Markdown and JSON")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints the table."""
    arguments, overrides = _parser().parse_known_args(argv)
    check_fields(overrides)
    small = arguments.config is None
    config = read_config(arguments.config or DEFAULTS,
                         [*(f"--config.model.{field}" for field in _SMALL if small), *overrides])
    batch = 8 if arguments.batch is None else arguments.batch
    parts = arguments.part or _PARTS
    if arguments.output and Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise UserError(f"--output {arguments.output}: is a file; give a folder")

    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cache would hide the compile times
    if "torch" in (arguments.baseline or ()):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise PyTorch gets no GPU memory
        # Otherwise PyTorch's threads spin while they wait for each other. On cores with other work, this made a small
        # network fifty times slower. Spinning also slows down our network.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported after parsing: --help needs no JAX.
    import jax

    from hae_jax.benchmark.programs import Settings
    from hae_jax.benchmark.run import benchmark
    from hae_jax.commands.devices import use_all_cores
    from hae_jax.training.mesh import make_mesh

    baselines = arguments.baseline or ("naive",)
    settings = Settings(
        parts, arguments.variant or (config.model.variant,), tuple(name for name in baselines if name != "none"), batch,
        **{name: value for name in ("steps", "repeats") if (value := getattr(arguments, name)) is not None})
    if arguments.devices != "one":
        use_all_cores(batch)
    devices = jax.devices()[:1] if arguments.devices == "one" else jax.devices()
    result = benchmark(config, settings, make_mesh(devices=devices))
    print(f"\n{result.text()}")
    if arguments.output:
        print("\n".join(["", "written:", *(f"  {path}" for path in result.write(arguments.output))]))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names:
        raise argparse.ArgumentTypeError("is empty")
    return names
