"""What is seen of a run's progress: a bar on a terminal, whole lines in a file, nothing of the other processes."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from common import progress
from common.progress import TrainingProgress, in_time, log_line, progress_bar


class Stream(io.StringIO):
    """What is written to; a terminal or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def written(monkeypatch, terminal: bool, shown: bool = True) -> str:
    """What a stage of three units writes."""
    stream = Stream(terminal)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar("evaluate", 3, "example", shown) as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()
    return stream.getvalue()


def test_whole_lines_in_a_file(monkeypatch):
    text = written(monkeypatch, terminal=False)
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[-1].startswith("evaluate: 3 of 3 examples, ")
    assert all(line.endswith(" left") for line in lines)


def test_a_bar_on_a_terminal(monkeypatch):
    text = written(monkeypatch, terminal=True)
    assert "\revaluate: " in text
    assert "3/3" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_silent_where_not_wanted(monkeypatch, terminal):
    assert written(monkeypatch, terminal, shown=False) == ""
    monkeypatch.setenv("RANK", "1")
    assert written(monkeypatch, terminal) == ""


def test_durations():
    assert [in_time(seconds) for seconds in (0.4, 61, 3599.6)] == ["0 min 00 s", "1 min 01 s", "1 h 00 min"]


def test_a_line_of_the_log():
    logs = {"learning_rate": 1e-4, "loss": 0.5, "epoch": 1.0, "data_wait_share": 0.012, "train_runtime": 12.0}
    line = "step 3 of 8: loss 0.5000, learning rate 0.0001, waiting for data 1.2%, train runtime 12"
    assert log_line(logs, 3, 8) == line


def test_what_is_to_come_is_told_once(monkeypatch, capsys):
    """After the sixth step, the first of which is not counted; not where next to nothing is left."""
    for steps, told in ((20, ["about 0 min 28 s of training to come, 14 steps of 2 s"]), (10, [])):
        clock = iter(range(0, 100, 2))
        monkeypatch.setattr(progress.time, "perf_counter", lambda clock=clock: next(clock))
        callback, state = TrainingProgress(shown=False), SimpleNamespace(is_world_process_zero=True, max_steps=steps)
        state.global_step = 0
        callback.on_train_begin(None, state, None)
        for step in range(1, steps + 1):
            state.global_step = step
            callback.on_step_end(None, state, None)
        assert capsys.readouterr().out.splitlines() == told
