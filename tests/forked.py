"""Scripts in processes that are forked from one with the heavy imports behind it.

The script runs from its first line on, with its options, its exit code and its output; only the ten seconds of imports
are spared. A process leads a session of its own, so that it is killed together with its loaders' workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
GRACE = 30  # seconds that torchrun gives the other processes when one has failed
DOCVQA, UCF101 = "finetune_hf_trainer_docvqa.py", "finetune_hf_trainer_ucf101.py"
CONTEXT.set_forkserver_preload([Path(script).stem for script in (DOCVQA, UCF101)])


def fork(
    script: str,
    *arguments: Any,
    log: Path,
    rank: int = 0,
    world: int = 0,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Start a script, or `-m` and a module; what it prints is appended to `log`.

    Args:
        rank, world, port: of one process of several, as torchrun would set them; no world is plain `python`.
        environment: its variables, all of them; None for those of the first test that forked.
    """
    variables = {}
    if world:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        errors = Path(f"{log}.errors") / str(rank)
        shutil.rmtree(errors, ignore_errors=True)
        errors.mkdir(parents=True)
        variables = {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables["TORCHELASTIC_ERROR_FILE"] = errors / "error.json"
    variables = {name: str(value) for name, value in variables.items()}
    words = [str(script), *map(str, arguments)]
    process = CONTEXT.Process(target=_run, args=(words, str(log), variables, environment))
    process.start()
    return process


def _run(words: list[str], log: str, variables: dict[str, str], environment: Mapping[str, str] | None) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    os.environ.update(variables)
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def end_of_all(processes: list[ForkServerProcess], timeout: float) -> int:
    """Wait for a run's processes as torchrun does: when one fails the others are ended.

    Returns:
        0, or the first failure's exit code.

    Raises:
        TimeoutError: when they have not ended; then they are killed.
    """
    until, code = time.monotonic() + timeout, 0
    running = list(processes)
    while running:
        multiprocessing.connection.wait([each.sentinel for each in running], max(0.0, until - time.monotonic()))
        ended = [each for each in running if each.exitcode is not None]
        running = [each for each in running if each not in ended]
        failed = [each.exitcode for each in ended if each.exitcode]
        if failed and not code:
            code, until = failed[0], time.monotonic() + GRACE
            for each in running:
                os.kill(each.pid, signal.SIGTERM)
        if running and time.monotonic() >= until:
            for each in running:
                kill(each)
            if not code:
                raise TimeoutError(f"{len(running)} processes have not ended within {timeout:g} seconds")
            break
    return code


def exit_code(process: ForkServerProcess, timeout: float = 600) -> int:
    """Wait for the end; negative for a signal.

    Raises:
        TimeoutError: when it has not ended; then it is killed.
    """
    return end_of_all([process], timeout)


def kill(process: ForkServerProcess) -> None:
    """SIGKILL to it and its loaders' workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
