"""A run goes on with another number of processes: the same losses, whoever holds which piece of the state.

Without dropout, whose draws are each process's own: float32 sums in another order, 1e-5 relative.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from common.checkpoints import checkpoint_to_resume
from common.deepspeed_files import MASTER, _copy, _flats
from common.errors import UserError
from tests import resumable
from tests.launch import free_port
from tests.resumable import STEPS, make_trainer


class WithoutDropout(resumable.Model):
    def __init__(self):
        super().__init__()
        self.dropout.p = 0.0


class NotStopping:
    at_step_end = contextlib.nullcontext

    def agreed(self, device):
        return False


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Uninterrupted, in one process, without DeepSpeed: the log and the weights."""
    folder = tmp_path_factory.mktemp("plain")
    trainer = make_trainer(folder, [], NotStopping())
    trainer.model.dropout.p = 0.0
    trainer.train()
    return trainer.state.log_history, trainer.model.state_dict()


def run_in(folder, processes, *options):
    """The small run in processes forked from this one, which has the libraries loaded; their exit codes."""
    port = free_port()

    def work(rank):
        log = os.open(folder.parent / f"log_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.stdout = sys.stderr = os.fdopen(log, "a", buffering=1)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in environment.items()})
        sys.argv = ["resumable.py", str(folder), *map(str, options)]
        resumable.Model = WithoutDropout
        resumable.main()

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(900)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in started], (folder.parent / "log_0").read_text()


long = pytest.mark.long


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("zero2", 2, 1),
        pytest.param("zero2", 1, 2, marks=long),
        pytest.param("zero2", 4, 2, marks=long),
        pytest.param("zero2_offload", 2, 1, marks=long),
        pytest.param("zero3", 2, 1, marks=long),
        pytest.param("zero3", 1, 2, marks=long),
        pytest.param("zero3", 2, 4, marks=long),
        pytest.param("ddp", 2, 1, marks=long),
        pytest.param("ddp", 1, 2, marks=long),
    ],
)
def test_goes_on_with_another_number_of_processes(tmp_path, plain, method, before, after):
    """Stopped in the middle of an epoch and between two lines of the log."""
    options = () if method == "ddp" else ("--deepspeed", f"ds_configs/{method}.json")
    folder = tmp_path / "run"
    codes, told = run_in(folder, before, *options, "--at", 7, "--do", "stop")
    assert codes == [143] * before, told[-3000:]
    newest = checkpoint_to_resume("auto", folder)
    assert newest.name == "checkpoint-7"
    assert len(list(newest.glob("process_*.json"))) == before
    codes, told = run_in(folder, after, *options)
    assert codes == [0] * after, told[-3000:]
    assert "RESUMED 0 checkpoint-7" in told
    log = json.loads((folder / "log.json").read_text())
    assert [line["step"] for line in log] == [4, 8, 12, STEPS]
    expected, weights = plain
    for line, own in zip(expected, log, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            if name in line:
                assert own[name] == pytest.approx(line[name], rel=1e-5), (line["step"], name)
    if method != "zero3":  # whose weights this small trainer does not put together
        for name, weight in load_file(folder / "model.safetensors").items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-6)


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_pieces_are_put_together(old, new, margin):
    """A parameter cut in one way -> the same cut in another, the last old piece padded, each with margins about it."""
    size = sum(old)
    whole = {MASTER: torch.arange(size) + 1.0, "exp_avg": -torch.arange(size) - 1.0}

    def flat(key, first, count):
        return torch.cat(
            [torch.full((margin,), 0.5), whole[key][first : first + count], torch.full((margin + 1,), 0.5)]
        )

    pieces, begin = [], 0
    for count in old:
        pieces.append(({key: flat(key, begin, count) for key in whole}, margin, count))
        begin += count
    first = 0
    for count in new:
        own = {key: torch.zeros(count + 2) for key in whole}
        _copy(pieces, own, 1, first, count)
        for key in whole:
            expected = whole[key][first : first + count]
            assert torch.equal(own[key][1 : 1 + len(expected)], expected)
            assert own[key][0] == own[key][1 + len(expected) :].abs().sum() == 0
        first += count


def test_a_state_in_blocks_is_not_divided():
    """bitsandbytes' 8-bit optimizers keep one scale for 256 values of a flat tensor."""
    state = {"single_partition_of_fp32_groups": [torch.zeros(510)], "group_paddings": [2]}
    moments = {"step": torch.tensor(3.0), "state1": torch.zeros(512), "state2": torch.zeros(512)}
    state["base_optimizer_state"] = {"state": {0: moments}}
    assert set(_flats(state, 0)) == {MASTER, "state1", "state2"}
    moments["absmax1"] = torch.zeros(2)
    with pytest.raises(UserError, match="go on with as many as have written the checkpoint"):
        _flats(state, 0)
