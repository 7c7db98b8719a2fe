"""What a run says while it runs: metrics.jsonl always, TensorBoard beside it, a loss curve at the end."""

import json
import os
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from hae_jax.evaluation.figures import loss_curve
from hae_jax.files import written_whole
from hae_jax.training.state import LOSS_BINS, Window


class RunLog:
    """The log of one run, continued exactly where a resumed run goes on."""

    def __init__(self, workdir: Path, start_step: int):
        """Opens the log and drops whatever an interrupted run wrote after `start_step`."""
        self.path = workdir / "metrics.jsonl"
        self._figure = workdir / "loss.png"
        _truncate(self.path, start_step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line, on disk when this returns."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Draws the loss curve and closes the files."""
        self._file.close()
        self._board.close()
        lines = read_metrics(self.path)
        if len(lines) > 1:
            loss_curve(self._figure, [line["step"] for line in lines], [line["loss"] for line in lines])


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def window_means(window: Window) -> dict[str, float]:
    """Means over the steps since the last line: loss, gradient norm, and the loss by quartile of t."""
    window = Window(*map(np.asarray, window))
    means = {"loss": float(window.loss / window.steps), "gradient_norm": float(window.gradient_norm / window.steps)}
    for i in range(LOSS_BINS):
        if window.bin_count[i]:
            means[f"loss_t{i + 1}of{LOSS_BINS}"] = float(window.bin_loss[i] / window.bin_count[i])
    return means


def _truncate(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= start_step]
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
