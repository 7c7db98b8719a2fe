"""What to measure, and on which network."""

import dataclasses
import re
from typing import Any

import ml_collections

from hae_jax.benchmark import naive
from hae_jax.benchmark.results import NAIVE, TORCH
from hae_jax.errors import UserError
from hae_jax.model import VARIANTS
from hae_jax.model.config import DEFAULT_CHANNEL_MULT

PARTS = ("train", "forward", "translate", "input", "blocks")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      parts: of `PARTS`.
      variants: of the network; the first is what the others are compared with.
      baselines: what ours is compared with: "naive", or with single pieces naive, or "torch".
      batch: images in a call, over all devices.
      steps: that a translation walks.
      repeats: turns; each program is timed once in each.
      options: what else ours is tried with, each alone: "NAME=VALUE", an option of XLA, or "attention=KERNEL".
      profile: whether to say which parts of ours take longest.

    Raises:
      UserError: for values that cannot be.
    """

    parts: tuple[str, ...]
    variants: tuple[str, ...]
    baselines: tuple[str, ...]
    batch: int
    steps: int = 4
    repeats: int = 5
    options: tuple[str, ...] = ()
    profile: bool = False

    def __post_init__(self):
        for flag, values, choices in (("--part", self.parts, PARTS), ("--variant", self.variants, tuple(VARIANTS)),
                                      ("--baseline", self.baselines, (NAIVE, *naive.PIECES, TORCH))):
            for value in values:
                if value not in choices:
                    raise UserError(f"{flag} {value}: choose among {', '.join(choices)}")
        for flag, value in (("--batch", self.batch), ("--steps", self.steps), ("--repeats", self.repeats)):
            if value < 1:
                raise UserError(f"{flag} {value}: must be at least 1")
        for option in self.options:
            if not re.fullmatch(r"[a-z]\w*=.*", option):
                raise UserError(f"--option {option}: give NAME=VALUE, such as xla_cpu_prefer_vector_width=512")


def with_model(config: ml_collections.ConfigDict, **fields: Any) -> ml_collections.ConfigDict:
    """A copy of the config with other fields of the network.

    With another image_size, attention stays at the same sizes in pixels.

    Raises:
      UserError: the network has no level of these sizes then.
    """
    config = config.copy_and_resolve_references()
    size = config.model.image_size
    for name, value in fields.items():
        config.model[name] = value
    if "image_size" in fields and "attention_resolutions" not in fields:
        wanted = [rate * fields["image_size"] / size for rate in config.model.attention_resolutions]
        widths = config.model.channel_mult or DEFAULT_CHANNEL_MULT.get(fields["image_size"], range(32))
        if any(rate >= 1 and rate not in [2**level for level in range(len(widths))] for rate in wanted):
            sizes = " and ".join(str(size // rate) for rate in config.model.attention_resolutions)
            raise UserError(f"--image-size {fields['image_size']}: no level of the network is of {sizes} px then, "
                            "where it has attention; give --config.model.image_size, attention_resolutions and "
                            "channel_mult")
        config.model.attention_resolutions = tuple(int(rate) for rate in wanted if rate >= 1)
    return config
