"""Being told to stop: SIGTERM and SIGUSR1, as clusters send them before they take a machine away."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 143  # the exit code, as a shell gives it for SIGTERM


class ToldToStopError(Exception):
    """An evaluation between steps was given up, on every process, for what trains to be saved in time."""


class Stopping:
    """SIGTERM and SIGUSR1 end the process with code 143: while training at the end of the step, else at once.

    So does the death of torchrun, which `end_with_launcher` turns into SIGTERM.
    Whatever the process is doing, also when it waits for another one, it is gone `grace_seconds` after the signal.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.signal: str | None = None
        self._at_step_end = False
        # The interpreter writes a signal's number to this pipe at once, also while the main thread is in a library.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for each in STOP_SIGNALS:
            signal.signal(each, self._received)
        os.register_at_fork(after_in_child=self._leave_child_alone)

    def _watch(self, reading: int) -> None:
        while (number := os.read(reading, 1)[0]) not in STOP_SIGNALS:
            pass
        self.signal = signal.Signals(number).name
        time.sleep(self.grace_seconds)
        os.write(2, f"{self.signal}: not ended within --grace_seconds {self.grace_seconds:g}\n".encode())
        os._exit(STOPPED)

    def _received(self, number: int, frame: Any) -> None:
        if not self._at_step_end:
            sys.exit(STOPPED)

    def _leave_child_alone(self) -> None:
        signal.set_wakeup_fd(-1)
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    @contextlib.contextmanager
    def at_step_end(self) -> Iterator[None]:
        """Let a signal wait for the end of a step."""
        self._at_step_end = True
        try:
            yield
        finally:
            self._at_step_end = False

    def agreed(self, device: torch.device) -> bool:
        """Whether any process has received a signal (together)."""
        received = torch.tensor(int(self.signal is not None), device=device)
        if dist.is_initialized():
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return bool(received.item())


def outlive_stop_signals(_worker: int) -> None:
    """For a loader's workers (`worker_init_fn`): launchers signal whole groups, and the step still needs its data.

    A worker ends when its own process tells it to, or is gone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process().pid

    def wait_for_parent() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
