"""Where the processes of a run meet: the store through which they tell each other their addresses.

torchrun keeps that store while it restarts processes (`--max_restarts`), and torch's own rendezvous reads it as it is
(torch 2.15, static and c10d alike). A restarted process that is a little ahead of another then finds the address under
which the other one was reached before, and is refused there. Here the processes first agree on a part of the store that
none of their predecessors has written to. The count of restarts would not do for its name: it is each node's own.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
import uuid

import torch.distributed as dist

LOOK_EVERY = 0.1  # seconds


def begin_group(backend: str, limit: datetime.timedelta) -> None:
    """Begin the group of all processes, in a store that torchrun keeps over restarts.

    Nothing is done where torchrun does not offer its store: the libraries begin the group themselves.

    Raises:
        TimeoutError: not all processes came within `limit`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    store = fresh_part(store, rank, world_size, limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)


def fresh_part(store: dist.Store, rank: int, world_size: int, limit: datetime.timedelta) -> dist.Store:
    """A part of the store that exactly these processes share.

    Each says who it is, under its rank. The part is named after all that stand there; each counts itself in once it
    sees a name, and it holds when all are counted: one that has ended cannot have seen who came after it. One that has
    not ended yet, although its torchrun has and was started again, is none of those that come after it.

    Raises:
        RuntimeError: another process has come in this one's place.
        TimeoutError: not all processes came within `limit`.
    """
    here = dist.PrefixStore("phi3v", store)
    own = uuid.uuid4().hex
    here.set(f"rank_{rank}", own)
    until, seen, name = time.monotonic() + limit.total_seconds(), set(), ""
    ranks = [f"rank_{other}" for other in range(world_size)]
    while time.monotonic() < until:
        if here.check(ranks):
            present = here.multi_get(ranks)
            if present[rank] != own.encode():
                raise RuntimeError(f"another process {rank} has come while this one waited for the others")
            name = hashlib.sha256(b"".join(present)).hexdigest()
            if here.add(name, int(name not in seen)) == world_size:
                return dist.PrefixStore(name, here)
            seen.add(name)
        time.sleep(LOOK_EVERY)
    missing = [other for other, key in enumerate(ranks) if not here.check([key])]
    came = f"processes {missing} never came" if missing else f"{here.add(name, 0)} of {world_size} processes agreed"
    raise TimeoutError(
        f"process {rank} waited {limit.total_seconds():.0f} s (--timeout_minutes) for the others: {came}"
    )
