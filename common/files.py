"""Files that are whole or absent, whenever the machine stops."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

INCOMPLETE = ".incomplete"  # ends the name of what is being written or deleted


def sync_to_disk(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network storage
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is whole or absent."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or absent: written beside, brought to the disk and renamed.

    Raises:
        OSError: naming the file, which Python's own does not when the disk gets full meanwhile.
    """
    beside = path.with_name(path.name + INCOMPLETE)
    try:
        beside.write_text(text, encoding="utf-8")
        sync_to_disk(beside)
        os.replace(beside, path)
        sync_to_disk(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
