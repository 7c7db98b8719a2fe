"""The golden cases of the network: weights generated from their names, and inputs and sparse masks in NHWC."""

import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hae_jax.model import UNetConfig


class GoldenCase(NamedTuple):
    """The data of one case, with images in NHWC."""

    name: str
    config: UNetConfig
    parameters: int
    weights: dict[str, np.ndarray]  # in state-dict order
    values: dict[str, np.ndarray]  # the contents of the npz file
    x: np.ndarray  # [B, H, W, C]
    masks: list[np.ndarray]  # [N, N] bool each, True is blocked

    def modes(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(null, drop) of each conditioning mode, [B] bool each."""
        no = np.zeros(len(self.x), bool)
        modes = {"cond": (no, no), "null": (~no, no)}
        return modes | ({"mixed": (no, self.values["drop"].astype(bool))} if "drop" in self.values else {})

    def output(self, mode: str, suffix: str = "") -> np.ndarray:  # [B, H, W, out_channels]
        """The expected output."""
        return self.values[f"out_{mode}{suffix}"].transpose(0, 2, 3, 1)

    def gradient_direction(self) -> np.ndarray:  # [B, H, W, out_channels]
        """g in the scalar mean(out * g), whose gradients are listed."""
        shape = self.values["out_cond"].shape
        return np.random.RandomState(8).standard_normal(shape).astype(np.float32).transpose(0, 2, 3, 1)


def read_case(folder: Path, name: str) -> GoldenCase:
    """Reads one case and generates the weights and masks that are not stored."""
    described = json.loads((folder / f"{name}.json").read_text())
    config = UNetConfig(variant=described["variant"], **described["config"])
    lines = (folder / f"{name}.keys.tsv").read_text().splitlines()
    shapes = {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split("\t") for line in lines)}
    values = dict(np.load(folder / f"{name}.npz"))
    shape = (len(values["t"]), config.in_channels, config.image_size, config.image_size)
    x = values["x"] if "x" in values else np.random.RandomState(7).standard_normal(shape).astype(np.float32)
    masks = [sparse_mask(i, int(n), config.variant) for i, n in enumerate(values["sparse_seq_lens"])]
    weights = {key: weight(key, shape) for key, shape in shapes.items()}
    return GoldenCase(name, config, described["n_params"], weights, values, x.transpose(0, 2, 3, 1), masks)


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value that the reference run gave to the state-dict entry of this name."""
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.startswith("label_emb."):
        return z
    if len(shape) >= 2:
        return z / np.float32(math.sqrt(math.prod(shape[1:])))
    return (0.1 * z + key.endswith("weight")).astype(np.float32)


def sparse_mask(i: int, tokens: int, variant: str) -> np.ndarray:  # [N, N] bool, True is blocked
    """The pattern of the i-th masked attention in the reference run."""
    u = np.random.RandomState(1000 + i).random_sample((tokens, tokens))
    diagonal = np.eye(tokens, dtype=bool)
    return (u < 0.2) | diagonal if variant == "hae_v2c" else (u < 0.9) & ~diagonal
