"""A profile of some steps on request: `train.py --profile 10:15`."""

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hae_jax.errors import UserError

_LOG = logging.getLogger(__name__)


class Span(NamedTuple):
    """The steps to profile. They are counted from 1, as in the log, also in a resumed run."""

    first: int
    last: int


def parse_span(text: str) -> Span:
    """Parses text such as "10:15", which means steps 10 to 15, both included.

    Raises:
      UserError: for anything else.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--profile {text}: give the first and the last step, such as --profile 10:15")
    return Span(int(found[1]), int(found[2]))


class Profiler:
    """Records the steps of a span to `<workdir>/profile`. Without a span and in other processes, it does nothing.

    Use it as a context, so that a started profile is written even if the loop ends early.
    """

    def __init__(self, workdir: Path, span: Span | None, start: int, steps: int):
        """Checks the span against the run. Nothing is written yet.

        Args:
          span: steps to record; None: nothing.
          start: number of steps done so far.
          steps: last step of the run.

        Raises:
          UserError: the span is not within the steps of the run.
        """
        if span is not None and not 0 < span.first <= span.last <= steps:
            raise UserError(f"--profile {span.first}:{span.last}: the run has steps 1 to {steps}; choose among these")
        if span is not None and span.first <= start:  # the command that started a run also resumes it
            _LOG.info("--profile %d:%d: the run resumes after step %d, so no profile is recorded", span.first,
                      span.last, start)
            span = None
        self.folder = workdir / "profile"
        self._span = span if jax.process_index() == 0 else None
        self._step: jax.profiler.StepTraceAnnotation | None = None
        self._records = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Call it before the batch of a step is requested."""
        if self._span is None or not self._span.first <= step <= self._span.last:
            return
        if not self._records:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # traces of Python calls would slow the steps and fill the file
            # Writes a file for Perfetto in addition to that for TensorBoard.
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
            self._records = True
        self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._step.__enter__()

    def after(self, step: int, state: Any) -> None:
        """Call it at the end of a step with the new state. After the last recorded step, it waits for the state."""
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
