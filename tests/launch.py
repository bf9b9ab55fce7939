"""Starting a script as a user does, in processes of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.forked import end_of_all, fork

REPOSITORY = Path(__file__).resolve().parent.parent
WAIT = 60_000  # milliseconds for what a browser does, on a busy machine


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# In the environment of every run, and in none of what it writes (tests/test_docvqa_methods.py).
TOKENS = {"HF_TOKEN": "hf_planted3kQ9xWvT7mZ", "WANDB_API_KEY": "planted8f2c1d7e6b5a4930"}


def run_script(
    script: str, *arguments: Any, processes: int = 2, timeout: int = 600, fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run a script as by torchrun (as by plain python for no processes); both its streams together, as text.

    Args:
        fresh: by torchrun or python itself, where the test is about them; everything is imported anew.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **TOKENS}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    words = [str(script), *map(str, arguments)]
    if not fresh:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            log.touch()
            shared = {"log": log, "world": processes, "port": free_port(), "environment": environment}
            started = [fork(*words, rank=rank, **shared) for rank in range(processes or 1)]
            try:
                code = end_of_all(started, timeout)
            except TimeoutError as error:
                raise subprocess.TimeoutExpired(words, timeout, log.read_bytes()) from error
            text = log.read_text(encoding="utf-8", errors="replace")
        # torchrun's own code is 1 whatever its processes' are
        return subprocess.CompletedProcess(words, int(code != 0) if processes else code, text)
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return subprocess.run(
        [*launcher, *words],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def start_logged(command: Sequence[Any], log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a command in a session of its own, for whole groups are signalled; both its streams go to `log`."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run's `train_log.jsonl`."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def read_evaluation(folder: Path, name: str) -> dict[str, Any]:
    """One of a run's `eval_*.json`."""
    return json.loads((folder / f"{name}.json").read_text())
