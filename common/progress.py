"""How far a stage of the run has come: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm
from transformers.trainer_callback import ProgressCallback

from .errors import is_first_process

SECONDS_BETWEEN_LINES = 30.0
STEPS_TO_TELL = 5  # after the first, which is slower, are enough to say how long training will take
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, {remaining} left"

# How the log's figures are told, in this order; others, as of a run's end, as they are.
FIGURES = {
    "loss": "loss {:.4f}",
    "grad_norm": "gradient norm {:.3g}",
    "learning_rate": "learning rate {:.3g}",
    "examples_per_second": "{:.3g} examples/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "data_wait_share": "waiting for data {:.1%}",
    "memory_peak_gb": "{:.1f} GB",
}


class _Lines:
    """Whole lines, where a bar would be drawn over and over."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(title: str, total: int, unit: str, shown: bool, initial: int = 0) -> tqdm:
    """A stage's progress with the time left, on the first process.

    Args:
        total: how many units the stage has, `initial` of them done before.
        shown: whether it is wanted at all (`--no-tqdm`).
    """
    how: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        how = {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES, "bar_format": LINE}
    shown = shown and is_first_process()
    return tqdm(total=total, desc=title, unit=unit, initial=initial, disable=not shown, **how)


def in_time(seconds: float) -> str:
    """A duration for people."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"


def log_line(logs: dict[str, Any], step: int, steps: int) -> str:
    """A line of the log in words."""
    told = [text.format(logs[name]) for name, text in FIGURES.items() if name in logs]
    others = [name for name in logs if name not in FIGURES and name not in ("epoch", "total_flos", "step")]
    told += [f"{name.replace('_', ' ')} {logs[name]:.4g}" for name in others]
    return f"step {step} of {steps}: {', '.join(told)}"


class TrainingProgress(ProgressCallback):
    """The training's bar, the log's lines above it, and once how long it will take."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self.shown = shown
        self.times: list[float] = []  # at which the first steps ended

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin where a resumed run goes on."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = progress_bar("train", state.max_steps, "step", self.shown, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar on."""
        super().on_step_end(args, state, control, **kwargs)
        if state.is_world_process_zero and len(self.times) <= STEPS_TO_TELL:
            self.times.append(time.perf_counter())
            left = state.max_steps - state.global_step
            if len(self.times) > STEPS_TO_TELL and left > STEPS_TO_TELL:
                each = (self.times[-1] - self.times[0]) / STEPS_TO_TELL
                tqdm.write(f"about {in_time(left * each)} of training to come, {left} steps of {each:.3g} s")
                sys.stdout.flush()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print the log's line."""
        if state.is_world_process_zero and logs:
            tqdm.write(log_line(logs, state.global_step, state.max_steps))
            sys.stdout.flush()
