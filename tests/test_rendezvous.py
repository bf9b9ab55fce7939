"""Processes that meet in a store which holds what their predecessors wrote."""

from __future__ import annotations

import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from common.rendezvous import fresh_part

LIMIT = datetime.timedelta(seconds=20)


@pytest.fixture
def server():
    """A store, as torchrun keeps it."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)


def meet(server, ranks, world_size, limit=LIMIT) -> list:
    """What `fresh_part` gives to each of these ranks, which come in the order given; an error is given back."""

    def one(rank):
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=LIMIT)
        try:
            return fresh_part(client, rank, world_size, limit)
        except (RuntimeError, TimeoutError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(one, ranks))


def test_all_share_one_part(server):
    parts = meet(server, [0, 1, 2], 3)
    parts[1].set("address", "b")
    assert [part.get("address") for part in parts] == [b"b"] * 3


@pytest.mark.parametrize("first", [0, 1])
def test_restarted_processes_do_not_read_what_was_there(server, first):
    """Whichever of them comes back first, and whether one or both were restarted before."""
    for part in meet(server, [0, 1], 2):
        part.set("address", "old")
    early = meet(server, [first], 2, datetime.timedelta(seconds=0.5))
    assert "1 of 2 processes agreed" in str(early[0])  # with the other's predecessor it does not begin
    parts = meet(server, [first, 1 - first], 2)
    assert [part.check(["address"]) for part in parts] == [False, False]
    parts[first].set("address", "new")
    assert parts[1 - first].get("address") == b"new"


def test_one_that_has_not_ended_is_not_counted(server):
    """Its torchrun was killed and started again, and the new process comes before it has noticed."""
    came = dist.PrefixStore("phi3v", server)
    with ThreadPoolExecutor(2) as threads:
        old = threads.submit(meet, server, [1], 2)
        its = came.get("rank_1")  # waits for it
        new = threads.submit(meet, server, [1], 2)
        while came.get("rank_1") == its:
            time.sleep(0.01)
        (first,), (second,) = meet(server, [0], 2), new.result()
        assert str(old.result()[0]) == "another process 1 has come while this one waited for the others"
    second.set("address", "new")
    assert first.get("address") == b"new"


def test_missing_processes_are_named(server):
    errors = meet(server, [1, 3], 4, datetime.timedelta(seconds=0.5))
    for rank, error in zip([1, 3], errors, strict=True):
        assert str(error) == (
            f"process {rank} waited 0 s (--timeout_minutes) for the others: processes [0, 2] never came"
        )


def test_one_process_alone(server):
    assert isinstance(meet(server, [0], 1)[0], dist.PrefixStore)
