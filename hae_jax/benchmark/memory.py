"""The memory of training, from compilation alone: nothing is run, so it may be more than any device here has."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from jax.sharding import Mesh

from hae_jax.benchmark import naive
from hae_jax.benchmark.measure import compile_program
from hae_jax.benchmark.programs import TrainingStep
from hae_jax.benchmark.results import NAIVE, OURS, machine, write
from hae_jax.benchmark.settings import with_model
from hae_jax.benchmark.table import render, size
from hae_jax.errors import UserError
from hae_jax.ops.platform import accelerator_forms
from hae_jax.training.dry_run import activation_bytes
from hae_jax.training.state import network_config

CARDS = (24, 40, 80)  # GB
USABLE = 0.9  # of a card's memory; the rest is the driver's, or lost between buffers
BUILT, SKIPPED = "context built", "context skipped"  # as E tokens; absent, which is what every null row gives
_FORMS = ((NAIVE, "none"), (NAIVE, "block"), (OURS, "none"), (OURS, "block"))
_CONTEXT_FORMS = tuple((form, "none") for form in (
    NAIVE, f"{NAIVE}, {SKIPPED}", f"{OURS}, {BUILT}", f"{OURS}, {SKIPPED}", OURS))


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """The plan of one training step on one device.

    Attributes:
      form: "ours" or "naive", with another context where it says so.
      remat: what the backward pass computes again.
      peak: bytes at the peak of the larger batch, by XLA's plan: arguments, results and everything between.
      per_image: bytes that another image takes, from two batches.
      kept: bytes that the backward pass needs of the forward pass, by the program's shapes before XLA.
      largest: images that fit, for each size of card.
    """

    form: str
    remat: str
    peak: int
    per_image: float
    kept: int
    largest: dict[int, int]


@dataclasses.dataclass(frozen=True)
class MemoryResult:
    """All rows, and what they are about."""

    rows: list[MemoryRow]
    title: str
    batch: int
    config: dict[str, Any]

    def text(self) -> str:
        """The table, with a line above that says what it is about."""
        header = ("form", "remat", "peak", "of naive's", "another image", "kept, by shapes",
                  *(f"batch in {card} GB" for card in CARDS))
        naive_peak = next((row.peak for row in self.rows if row.form == NAIVE), None)
        rows = [(row.form, row.remat, size(row.peak), f"{row.peak / naive_peak:.2f}" if naive_peak else "",
                 size(row.per_image), size(row.kept), *(str(row.largest.get(card, "")) for card in CARDS))
                for row in self.rows]
        foot = (f"The largest batches leave a tenth of the card free, and follow from batches of {self.batch // 2} and "
                f"{self.batch} by a straight line.")
        return "\n".join([self.title, "", render(header, rows), "", foot])

    def write(self, folder: str | Path) -> list[Path]:
        """Writes memory.json and memory.md."""
        return write(folder, "memory", self.text(), {
            "title": self.title, "batch": self.batch, "config": self.config,
            "rows": [dataclasses.asdict(row) for row in self.rows]})


def memory_of_training(
    config: ml_collections.ConfigDict, batch: int, mesh: Mesh, say: Callable[[str], None] = print,
    compared: str = "remat",
) -> MemoryResult:
    """Plans a training step, ours and naive, with each kind of remat or of class context.

    Args:
      config: the config tree; its remat is replaced.
      batch: images on one device; at least 2.
      mesh: of one device; it may be one that is not there (`target.target_device`).
      say: is told what is being done, which may take minutes.
      compared: "remat" or "context".

    Raises:
      UserError: for a batch that cannot be halved.
    """
    if batch < 2 or batch % 2:
        raise UserError(f"--batch {batch}: --memory compares a batch with its half; give an even number")
    forms = _CONTEXT_FORMS if compared == "context" else _FORMS
    rows = [_row(config, form, remat, batch, mesh, say) for form, remat in forms]
    model = config.model
    title = (f"Training {model.variant}, {model.image_size} px, {model.model_channels} channels, batch {batch}, "
             f"{model.dtype}: memory of one device by XLA's plan for {machine(mesh)}")
    return MemoryResult(rows, title, batch, config.to_dict())


def largest_batch(peak: float, batch: int, per_image: float, card: int) -> int:
    """How many images fit into a card of so many GB, where `batch` of them peak at `peak` bytes; 0 if none does."""
    return max(0, int(batch + (USABLE * card * 1e9 - peak) / per_image))


def _row(config, form: str, remat: str, batch: int, mesh: Mesh, say: Callable[[str], None]) -> MemoryRow:
    # Without classes there is no context; the class embedding, which goes with it, is 0.3 % of the parameters.
    tree = with_model(config, remat=remat, **{"num_classes": None} if SKIPPED in form else {})
    network = network_config(tree.to_dict())
    # The forms of accelerators, whose memory is the question: their convolution is XLA's, which is the naive one.
    baselines = (NAIVE,) if NAIVE in form else ("convolution", "context") if BUILT in form else ("convolution",)
    pieces = [piece for name in baselines for piece in naive.pieces_of(name, network, translation=False)]
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    with naive.swapped_in(pieces), accelerator_forms("accelerator" if on_cpu else "gpu"):
        plans = {}
        for images in (batch // 2, batch):
            say(f"compiling {form}, remat {remat}, batch {images}")
            step = TrainingStep(tree, mesh, images)
            plans[images] = compile_program(step.lower, devices=1, plan_only=on_cpu).memory
        kept = activation_bytes(network, batch)
    if plans[batch] is None:
        raise UserError("--memory: the compiler of this device gives no memory plan; run it on a CPU or a GPU")
    per_image = (plans[batch] - plans[batch // 2]) / (batch - batch // 2)
    return MemoryRow(form, remat, plans[batch], per_image, kept,
                     {card: largest_batch(plans[batch], batch, per_image, card) for card in CARDS})
