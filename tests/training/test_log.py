"""The log: one line per step, truncated to the checkpoint when a run is resumed; wandb on request."""

import json
import sys
from types import SimpleNamespace

import pytest

from hae_jax.errors import UserError
from hae_jax.training.log import RunLog, import_wandb, read_metrics


def write(workdir, start, steps):
    log = RunLog(workdir, start)
    for step in steps:
        log.write(step, {"loss": 1 / step})
    log._file.close()  # as if killed, without the curve


def test_a_resumed_run_has_every_line_once(tmp_path):
    write(tmp_path, 0, (1, 2, 3, 4))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    write(tmp_path, 2, (3, 4))
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_damaged_line_is_said_and_the_others_are_kept(tmp_path, caplog):
    write(tmp_path, 0, (1, 2, 3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(["\0" * 9 + "\n", *lines[1:]]))
    write(tmp_path, 2, (3,))
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[1:])
    (message,) = caplog.messages
    assert message == f"{tmp_path / 'metrics.jsonl'}: line 1 is damaged and left out; the other lines are kept"


def test_a_run_without_a_checkpoint_begins_its_log_anew(tmp_path):
    write(tmp_path, 0, (1, 2))
    write(tmp_path, 0, (1,))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_what_is_not_finite_is_null(tmp_path):
    log = RunLog(tmp_path, 0)
    for step, loss in enumerate((2.0, float("nan"), 1.0), start=1):
        log.write(step, {"loss": loss})
    log.close()  # the curve has a gap
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.0, None, 1.0]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_curve_shows_both_losses(tmp_path):
    for name, validates in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        log = RunLog(tmp_path / name, 0)
        for step in range(1, 9):
            log.write(step, {"loss": 1 / step} | ({"validation_loss": 0.5} if validates and step % 4 == 0 else {}))
        log.write(9, {"validation_loss": 0.5} if validates else {"loss": 0.1})
        log.close()
    assert (tmp_path / "with" / "loss.png").read_bytes() != (tmp_path / "without" / "loss.png").read_bytes()


class FakeWandb:
    """Records its calls."""

    def __init__(self):
        self.begun, self.lines, self.finished = [], [], 0

    def init(self, **arguments):
        self.begun.append(arguments)
        return SimpleNamespace(log=lambda values, step: self.lines.append((step, values)), finish=self.finish)

    def finish(self):
        self.finished += 1


def test_wandb_is_told_the_same_and_goes_on_with_its_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 2):
        log = RunLog(tmp_path, start, "lesions", {"seed": 0})
        log.write(start + 1, {"loss": 0.5})
        log.close()
    first, second = fake.begun
    assert first["project"] == "lesions"
    assert first["config"] == {"seed": 0}
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert fake.lines == [(1, {"loss": 0.5}), (3, {"loss": 0.5})]
    assert fake.finished == 2


def test_wandb_is_not_touched_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    log = RunLog(tmp_path, 0)
    log.write(1, {"loss": 0.5})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    with pytest.raises(UserError, match="pip install wandb"):
        import_wandb("lesions")
