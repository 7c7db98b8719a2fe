"""A profile of the requested steps, in files that viewers can open."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from hae_jax.errors import UserError
from hae_jax.training.profile import Profiler, Span, parse_span


@pytest.mark.parametrize("text", ["10", "15:10", "0:5", "a:b", "1:2:3", "-1:3", ""])
def test_nonsense_is_refused(text):
    with pytest.raises(UserError, match="such as --profile 10:15"):
        parse_span(text)


@pytest.mark.parametrize("span", [Span(0, 6), Span(5, 9), Span(9, 12)])
def test_steps_that_will_not_come_are_refused(tmp_path, span):
    with pytest.raises(UserError, match="the run has steps 1 to 8"):
        Profiler(tmp_path, span, start=5, steps=8)


def test_a_resumed_run_does_not_repeat_the_profile(tmp_path, capsys):
    Profiler(tmp_path, Span(2, 3), start=5, steps=8).before(6)
    assert "resumes after step 5, so no profile is recorded" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def run(profiler, steps):
    step = jax.jit(lambda x: x @ x / 16)
    state = jnp.ones((16, 16))
    with profiler:
        for done in range(1, steps + 1):
            profiler.before(done)
            with jax.profiler.TraceAnnotation("wait for input"):
                pass
            state = step(state)
            profiler.after(done, state)


def test_the_files_show_the_steps(tmp_path, capsys):
    run(Profiler(tmp_path, parse_span("2:3"), 0, 4), steps=4)
    (perfetto,) = tmp_path.rglob("perfetto_trace.json.gz")
    trace = json.loads(gzip.decompress(perfetto.read_bytes()))
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    steps = {event["args"]["step_num"] for event in events if "step_num" in event.get("args", {})}
    assert set(map(int, steps)) == {2, 3}
    assert sum(event.get("name") == "wait for input" for event in events) == 2
    # The path is that which TensorBoard's profile plugin expects.
    (xplane,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert xplane.stat().st_size > 1000
    said = capsys.readouterr().out
    assert str(perfetto.parent) in said
    assert "ui.perfetto.dev" in said


def test_a_loop_that_ends_early_leaves_a_whole_profile(tmp_path):
    run(Profiler(tmp_path, Span(2, 4), 0, 4), steps=2)
    assert list(tmp_path.rglob("perfetto_trace.json.gz"))
    with jax.profiler.trace(tmp_path / "next"):  # fails if another one is still running
        pass


def test_nothing_is_written_unless_asked_for(tmp_path):
    run(Profiler(tmp_path, None, 0, 2), steps=2)
    assert not list(tmp_path.iterdir())
