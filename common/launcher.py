"""The death of torchrun, of which nobody else would tell the processes that it has started."""

from __future__ import annotations

import os
import signal
import threading
import time

LAUNCHER = os.getppid()


def end_with_launcher() -> None:
    """Send this process SIGTERM once torchrun is gone; called first of all, for the imports alone take seconds."""

    def watch() -> None:
        while os.getppid() == LAUNCHER:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()
