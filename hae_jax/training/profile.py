"""A profile of some steps on request: `train.py --profile 10:15`."""

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hae_jax.errors import UserError

_LOG = logging.getLogger(__name__)


class Span(NamedTuple):
    """The steps to be profiled; counted from 1, as in the log, over all interruptions of a run."""

    first: int
    last: int


def parse_span(text: str) -> Span:
    """Reads "10:15": from step 10 to step 15, both included.

    Raises:
      UserError: for anything else.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--profile {text}: give the first and the last step, such as --profile 10:15")
    return Span(int(found[1]), int(found[2]))


class Profiler:
    """Records the steps of a span to `<workdir>/profile`; does nothing without one, and in all but the first process.

    Used as a context: what has begun is written even where the loop ends early.
    """

    def __init__(self, workdir: Path, span: Span | None, start: int, steps: int):
        """Checks the span against the run; nothing is written yet.

        Args:
          span: what to record; None: nothing.
          start: steps done so far.
          steps: at which the run ends.

        Raises:
          UserError: the span is not among the steps to come.
        """
        if span is not None and not start < span.first <= span.last <= steps:
            raise UserError(f"--profile {span.first}:{span.last}: only steps {start + 1} to {steps} remain; "
                            "choose among these")
        self.folder = workdir / "profile"
        self._span = span if jax.process_index() == 0 else None
        self._step: jax.profiler.StepTraceAnnotation | None = None
        self._records = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """To be called before the batch of a step is asked for."""
        if self._span is None or not self._span.first <= step <= self._span.last:
            return
        if not self._records:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would crowd out, and slow down, what is looked for
            # A file for Perfetto comes beside the one for TensorBoard.
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
            self._records = True
        self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._step.__enter__()

    def after(self, step: int, state: Any) -> None:
        """To be called at the end of a step, with what it gave; waits for it if it is the last one recorded."""
        if self._step is None or self._span is None:
            return
        if step == self._span.last:
            jax.block_until_ready(state)
        self._end_step()
        if step == self._span.last:
            self._stop()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _stop(self) -> None:
        self._end_step()
        if self._records and self._span is not None:
            self._records = False
            jax.profiler.stop_trace()
            newest = max(self.folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
            _LOG.info("profile of steps %d to %d: %s\n  open %s at https://ui.perfetto.dev, or in TensorBoard with\n"
                      "  pip install tensorboard xprof; tensorboard --logdir %s", self._span.first, self._span.last,
                      newest.parent, newest.name, self.folder)
