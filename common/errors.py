"""The error that is the user's to mend: one line, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


class UserError(ValueError):
    """Something in the options, the data or the checkpoint; its message says what, where and what to do.

    A loader's worker process hands an error on as a text with its traceback; the last line of that
    text is the message as it was raised, and that is what is kept.
    """

    def __init__(self, message: str) -> None:
        prefix = f"{type(self).__module__}.{type(self).__name__}: "
        lines = message.strip().splitlines() or [""]
        super().__init__(lines[-1].removeprefix(prefix) if prefix in message else message)


def is_first_process() -> bool:
    """True on the one process that prints and writes, also before the processes are joined."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def say(text: str) -> None:
    """Print on the first process."""
    if is_first_process():
        print(text, flush=True)


def rank_and_world() -> tuple[int, int]:
    """This process and how many are joined."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def raise_all(problems: Sequence[str]) -> None:
    """Raise one `UserError` that lists every problem; nothing where there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(problems[0])
    raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; torchrun's summary shows the first process's error.

    A `UserError` ends the script with exit code 2 and its message alone. Until the processes are
    joined all of a node's find the same fault and its first one tells; later the one that found it does.
    """

    @record
    def guarded() -> None:
        try:
            main()
        except UserError as error:
            if dist.is_initialized() or int(os.environ.get("LOCAL_RANK", "0")) == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    guarded()
