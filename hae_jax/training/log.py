"""The log of a run: metrics.jsonl, TensorBoard, wandb on request, and a loss curve at the end.

A step has at most one line. The line is on disk before the step's checkpoint is started. A run that is resumed from a
checkpoint therefore finds every line up to it. It drops later lines and writes them again, so that no line is missing
or doubled.
"""

import json
import logging
import math
import os
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from hae_jax.errors import UserError
from hae_jax.evaluation.figures import loss_curve
from hae_jax.files import read_json_lines, written_whole
from hae_jax.training.state import LOSS_BINS, Window

_LOG = logging.getLogger(__name__)


class RunLog:
    """The log of one run. A resumed run continues it at the step where it resumes."""

    def __init__(
        self, workdir: Path, start_step: int, project: str | None = None, config: dict[str, Any] | None = None
    ):
        """Opens the log and drops lines of an interrupted run after `start_step`.

        Args:
          start_step: step of the checkpoint from which the run is resumed, or 0.
          project: project of wandb; None: wandb is not used.
          config: the run's config for wandb.

        Raises:
          UserError: wandb is requested but not installed.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / "metrics.jsonl"
        self._figure = workdir / "loss.png"
        self._wandb = None if project is None else _begin_wandb(workdir, project, config)
        _truncate(self.path, start_step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def lines(self) -> list[dict[str, float | None]]:
        """The existing lines."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends the line of a step, which is on disk when this returns. Values that are not finite become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Draws the loss curve and closes the files."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        lines = read_metrics(self.path)
        trained, validated = _curve(lines, "loss"), _curve(lines, "validation_loss")
        if len(trained[0]) > 1:
            loss_curve(self._figure, *trained, validated if validated[0] else None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The intact lines of a metrics.jsonl that have a step.

    A crash may leave half of the last line. Any other damaged line gets a warning.
    """
    lines, damaged = read_json_lines(path)
    for number in damaged:
        _LOG.warning("%s: line %d is damaged and left out; the other lines are kept", path, number)
    return [line for line in lines if isinstance(line.get("step"), int)]


def window_means(window: Window) -> dict[str, float]:
    """Means over the steps since the last line: loss, gradient norm, and the loss by quartile of t.

    Not a number where all these steps were skipped; a quartile that no sample fell into is left out.
    """
    window = jax.tree.map(np.asarray, window)
    steps = window.steps or np.nan
    means = {"loss": float(window.loss / steps), "gradient_norm": float(window.gradient_norm / steps)}
    for i in range(LOSS_BINS):
        if window.bin_count[i]:
            means[f"loss_t{i + 1}of{LOSS_BINS}"] = float(window.bin_loss[i] / window.bin_count[i])
    return means


def import_wandb(project: str) -> ModuleType:
    """Imports the wandb package. It is needed only for `training.wandb`.

    Raises:
      UserError: it is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise UserError(f"training.wandb is {project!r}, but wandb is not installed; run `pip install wandb`, or leave "
                        "training.wandb out") from error
    return wandb


def _begin_wandb(workdir: Path, project: str, config: dict[str, Any] | None) -> Any:
    """Starts or continues the run's page in wandb. Its id is stored in the workdir.

    A resumed run may log a step a second time. wandb ignores it; the values are the same.
    """
    wandb = import_wandb(project)
    path = workdir / "wandb_id"
    if not path.exists():
        with written_whole(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8])
    return wandb.init(project=project, name=workdir.name, id=path.read_text().strip(), resume="allow", config=config,
                      dir=str(workdir))


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]


def _truncate(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= start_step]
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
