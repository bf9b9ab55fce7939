"""Scripts in processes that are forked from one with the heavy imports behind it.

The script's own `main()` runs, with its options, its exit code and its output; only the ten seconds of imports are
spared. A process leads a session of its own, so that it is killed together with its loaders' workers.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
DOCVQA, UCF101 = "finetune_hf_trainer_docvqa.py", "finetune_hf_trainer_ucf101.py"
CONTEXT.set_forkserver_preload([Path(script).stem for script in (DOCVQA, UCF101)])


def fork(script: str, *arguments: Any, log: Path, rank: int = 0, world: int = 0, port: int = 0) -> ForkServerProcess:
    """Start a script; what it prints is appended to `log`.

    Args:
        rank, world, port: of one process of several, as torchrun would set them; no world is plain `python`.
    """
    environment = {}
    if world:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        environment = {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = CONTEXT.Process(target=_run, args=(script, list(map(str, arguments)), str(log), environment))
    process.start()
    return process


def _run(script: str, arguments: list[str], log: str, environment: dict[str, Any]) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = [script, *arguments]
    module = importlib.import_module(Path(script).stem)
    module.run(module.main)


def exit_code(process: ForkServerProcess, timeout: float = 600) -> int:
    """Wait for the end; negative for a signal.

    Raises:
        TimeoutError: when it has not ended; then it is killed.
    """
    process.join(timeout)
    if process.exitcode is None:
        kill(process)
        raise TimeoutError(f"{process} has not ended within {timeout:g} seconds")
    return process.exitcode


def kill(process: ForkServerProcess) -> None:
    """SIGKILL to it and its loaders' workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
