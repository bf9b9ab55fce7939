"""DeepSpeed's C++ extensions, compiled at a machine's first run: a build that was killed must not stop the next one.

While PyTorch builds an extension, its folder holds a file `lock`. A process that is killed meanwhile leaves the file
there, and whoever comes later waits for it to go, for ever and in silence.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

LOCK = "lock"
PATIENCE = 120.0  # seconds; a process of another machine may be building in a folder that both see
INTERVAL = 1.0


def folders_of(names: Iterable[str]) -> list[Path]:
    """Where PyTorch has begun to build these extensions, for whichever Python and CUDA."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    roots = [Path(given)] if given else [Path(get_default_build_root()), *Path(get_default_build_root()).glob("*")]
    return [root / name for root in roots for name in names if (root / name).is_dir()]


def wait_for_builds(names: Iterable[str], patience: float = PATIENCE) -> None:
    """Let no lock be there that nobody will take away; every process calls it before DeepSpeed is set up.

    Args:
        names: of the extensions.
        patience: seconds. A lock that no process of this machine holds is removed, by the machine's first process,
            once nothing in its folder has changed for as long.
    """
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    for folder in folders_of(names):
        lock, told = folder / LOCK, False
        while lock.exists():
            is_held = _is_open(lock)
            if first and not is_held and time.time() - _last_change(folder) >= patience:
                lock.unlink(missing_ok=True)
                print(f"removed {lock}, which a build that was ended has left", flush=True)
                break
            if first and not told:
                what = "another process builds it" if is_held else f"or until nothing there changes for {patience:g} s"
                print(f"waiting for DeepSpeed's extension {folder.name} until {lock} is gone, {what}", flush=True)
                told = True
            time.sleep(INTERVAL)


def _is_open(file: Path) -> bool:
    """Whether a process of this machine, as far as its files may be seen, holds a file open."""
    wanted = os.path.realpath(file)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(opened.path == wanted for opened in process.open_files()):
                return True
    return False


def _last_change(folder: Path) -> float:
    """When a file in a folder was last written."""
    times = [folder.stat().st_mtime]
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
