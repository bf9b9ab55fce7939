"""torchrun, which has started this process: which one it is, and its death, of which nobody else would tell."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import psutil

LAUNCHER = os.getppid()


def end_with_launcher() -> None:
    """Send this process SIGTERM once torchrun is gone; called first of all, for the imports alone take seconds."""

    def watch() -> None:
        while os.getppid() == LAUNCHER:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def launcher() -> str | None:
    """Which torchrun it is, as no other one is called; None without one, or when it is gone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        return f"{socket.gethostname()} {LAUNCHER} {psutil.Process(LAUNCHER).create_time()}"
    except psutil.Error:
        return None
