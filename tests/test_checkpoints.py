"""Checkpoints are complete or absent, and a run that was interrupted ends as one that was not, bit for bit."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from common import checkpoints, training
from common.checkpoints import (
    INCOMPLETE,
    MANIFEST,
    check_same_run,
    checkpoint_to_resume,
    complete,
    damage,
    finish_stage,
    is_finished,
    prune,
    record_of,
    remove_incomplete,
)
from common.cli import LOCK
from common.errors import UserError
from tests.launch import REPOSITORY, free_port, run_script
from tests.resumable import STEPS, AtStep, make_trainer

SCRIPT = REPOSITORY / "tests" / "resumable.py"


class Killed(BaseException):
    """As if the process was gone: nothing catches it."""


def write_checkpoint(folder: Path, step: int, content: bytes = b"weights") -> Path:
    beside = folder / f"checkpoint-{step}{INCOMPLETE}"
    (beside / "global_step").mkdir(parents=True)
    (beside / "model.safetensors").write_bytes(content * 100)
    (beside / "global_step" / "optimizer.pt").write_bytes(b"state" * 50)
    complete(beside, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


# Manifests

MODEL, OPTIMIZER = "model.safetensors", "global_step/optimizer.pt"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        (lambda folder: os.truncate(folder / MODEL, 699), rf"{MODEL} has bytes 699, 700 expected"),
        (lambda folder: flip(folder / OPTIMIZER), rf"{OPTIMIZER} has sha256 \w{{64}}, \w{{64}} expected"),
        (lambda folder: (folder / OPTIMIZER).unlink(), rf"{OPTIMIZER} is missing"),
        (lambda folder: (folder / "evil.pt").write_text(""), r"evil\.pt is not in the manifest"),
        (lambda folder: (folder / MANIFEST).unlink(), rf"{MANIFEST} is missing or no manifest"),
        (lambda folder: flip(folder / MANIFEST), r"."),  # whatever the byte was, something no longer agrees
        (lambda folder: (folder / MANIFEST).write_text("[]"), rf"{MANIFEST} is missing or no manifest"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a": 1}}'), rf"{MANIFEST} is missing or no"),
    ],
    ids=["truncated", "flipped", "missing", "extra", "no manifest", "manifest flipped", "list", "no sizes"],
)
def test_damage_is_named(tmp_path, capsys, do, expected):
    older, newest = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 12)
    assert damage(newest) == []
    assert checkpoint_to_resume("auto", tmp_path) == newest
    do(newest)
    (problem,) = damage(newest)
    assert problem.startswith(str(newest))
    with pytest.raises(UserError, match=expected):
        checkpoint_to_resume(str(newest), tmp_path)
    capsys.readouterr()
    assert checkpoint_to_resume("auto", tmp_path) == older
    assert f"{newest} is damaged and passed over: {problem}" in capsys.readouterr().out


def test_no_checkpoint(tmp_path):
    assert checkpoint_to_resume("auto", tmp_path) is None
    assert checkpoint_to_resume("auto", tmp_path / "not there") is None
    write_checkpoint(tmp_path, 3)
    assert checkpoint_to_resume("never", tmp_path) is None
    with pytest.raises(UserError, match="checkpoint-4"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-4"), tmp_path)
    os.truncate(tmp_path / "checkpoint-3" / MODEL, 0)
    assert checkpoint_to_resume("auto", tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (None, [3, 6, 12, 18, 21]),
        (5, [3, 6, 12, 18, 21]),
        (4, [3, 6, 12, 21]),
        (3, [3, 6, 12]),
        (2, [6, 12]),
        (1, [12]),
    ],
)
def test_prune_keeps_the_one_just_completed(tmp_path, limit, kept):
    """Also when the run went on from an older one: those of more steps were damaged, or gone back from."""
    for step in (3, 21, 12, 18, 6):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, limit, tmp_path / "checkpoint-12")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"checkpoint-{step}" for step in kept)


# A run that torchrun starts again (tests/test_resuming.py: for real)


def run_folder(folder: Path, restarted: bool, **given) -> SimpleNamespace:
    """Options of a run whose torchrun began between the folder's two checkpoints."""
    for step, age in ((6, 300), (3, 100)):  # seconds; gone back from the one of more steps
        written = time.time() - age
        os.utime(write_checkpoint(folder, step) / MANIFEST, (written, written))
    (folder / LOCK).write_text("a torchrun")
    os.utime(folder / LOCK, (time.time() - 200, time.time() - 200))
    (folder / "run.json").write_text("{}")
    (folder / "eval_after.json").write_text("{}")
    finish_stage(folder, "eval_after", ["eval_after.json"])
    options = {"output_dir": folder, "eval_only": False, "overwrite": False, "resume": "auto", **given}
    return SimpleNamespace(**options, restarted=restarted)


@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_overwritten(tmp_path, restarted):
    """The run before this one, once; the lock keeps the time at which the first of this torchrun's began."""
    options = run_folder(tmp_path, restarted, overwrite=True)
    training._prepare_output_folder(options)
    assert bool(checkpoints.checkpoints_in(tmp_path)) == restarted
    assert (time.time() - (tmp_path / LOCK).stat().st_mtime > 150) == restarted
    assert (tmp_path / LOCK).read_text() == ("a torchrun" if restarted else "")


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("first_is_restarted", [False, True], ids=["a new one's", "one restarted"])
@pytest.mark.parametrize("resume", ["auto", "never", "certain"])
def test_what_is_gone_on_from(tmp_path, monkeypatch, resume, first_is_restarted, restarted):
    """Restarted, from what torchrun's run has written itself, where there is any; the first process knows."""
    given = str(tmp_path / "checkpoint-6") if resume == "certain" else resume
    options = run_folder(tmp_path, restarted, resume=given)

    def on_first(act):
        here, options.restarted = options.restarted, first_is_restarted
        result, options.restarted = act(), here
        return result

    monkeypatch.setattr(training, "on_first", on_first)
    found = training._find_what_to_resume(options, {})
    own = None if resume == "never" else tmp_path / "checkpoint-6"
    assert found == (tmp_path / "checkpoint-3" if first_is_restarted and resume != "auto" else own)
    assert is_finished(tmp_path, "eval_after") == (resume != "certain" or first_is_restarted)


@pytest.mark.parametrize("step", [9, 6], ids=["next", "replaced"])
def test_killed_at_any_moment(tmp_path, monkeypatch, step):
    """Before every one of the calls that change the disk, with half of a folder's files deleted where it deletes."""
    calls = 0

    def killing(act, last):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last:
                if act is shutil.rmtree and Path(args[0]).exists():
                    next(path for path in Path(args[0]).rglob("*") if path.is_file()).unlink()
                raise Killed
            return act(*args, **kwargs)

        return counted

    ended = False
    for last in range(1, 100):
        folder = tmp_path / str(last)
        for existing in (3, 6):
            write_checkpoint(folder, existing)
        calls = 0
        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
                patch.setattr(module, name, killing(getattr(module, name), last))
            with contextlib.suppress(Killed):
                write_checkpoint(folder, step, b"newer")
                prune(folder, 2, folder / f"checkpoint-{step}")
                ended = True
        remove_incomplete(folder)
        remaining = [path.name for path in folder.iterdir()]
        assert not [name for name in remaining if name.endswith(INCOMPLETE)]
        assert all(damage(folder / name) == [] for name in remaining)  # complete or absent, every one of them
        newest = checkpoint_to_resume("auto", folder)
        if step == 9:
            assert newest.name in ("checkpoint-6", "checkpoint-9")
        if ended:
            assert (newest / MODEL).read_bytes() == b"newer" * 100
            break
    assert last > 10


# What a run is resumed by


def options(**given):
    values = {"model_name_or_path": "somewhere/model", "method": "full", "seed": 0, "batch_size": 16, "use_lora": False}
    values |= {"use_flash_attention": False, "packs": False}
    values |= {"precision": checkpoints.Precision("bf16", torch.bfloat16, None), "num_workers": 4, "save_steps": 100}
    values |= {"output_dir": Path("out"), "device": torch.device("cpu"), "num_processes": 2, "max_steps": None}
    return argparse.Namespace(**{**values, **given})


def test_every_difference_is_listed_with_both_values(tmp_path):
    check_same_run(tmp_path, record_of(options(), examples=100))
    check_same_run(tmp_path, record_of(options(num_workers=0, save_steps=7), examples=100))
    less_memory = options(gradient_checkpointing="full", max_crops_per_call=4, use_liger=False)
    check_same_run(tmp_path, record_of(less_memory, examples=100))
    flash = options(use_flash_attention=True, attention="flash_attention_2")
    check_same_run(tmp_path, record_of(flash, examples=100))
    (tmp_path / "earlier").mkdir()  # with code that compared more
    (tmp_path / "earlier" / "run.json").write_text(json.dumps({**record_of(options()), "use_flash_attention": True}))
    check_same_run(tmp_path / "earlier", record_of(options()))
    with pytest.raises(UserError) as raised:
        check_same_run(tmp_path, record_of(options(seed=1, batch_size=8, packs=True), examples=99))
    for difference in (
        "examples 100 there, 99 here",
        "seed 0 there, 1 here",
        "batch_size 16 there, 8 here",
        "packed rows (--max_tokens_per_gpu, --share_images) False there, True here",
    ):
        assert difference in str(raised.value)
    assert str(raised.value).count(" there, ") == 4
    assert raised.value.everywhere


def test_may_be_divided_otherwise(tmp_path):
    """See tests/test_dividing_anew.py for what comes of it."""
    check_same_run(tmp_path, record_of(options(num_processes=2, batch_size_per_gpu=1, accumulation=8)))
    check_same_run(tmp_path, record_of(options(num_processes=4, batch_size_per_gpu=2, accumulation=2)))


def test_paths_are_compared_as_places(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert record_of(options(data_dir="data")) == record_of(options(data_dir=str(tmp_path / "data")))
    json.dumps(record_of(options(data_dir="data")))


def test_a_stage_is_finished_while_its_files_are_unchanged(tmp_path, capsys):
    (tmp_path / "eval_before.json").write_text('{"anls": 0.5}')
    assert not is_finished(tmp_path, "eval_before")
    finish_stage(tmp_path, "eval_before", ["eval_before.json"])
    finish_stage(tmp_path, "training", [])
    assert is_finished(tmp_path, "eval_before")
    assert is_finished(tmp_path, "training")
    flip(tmp_path / "eval_before.json")
    assert not is_finished(tmp_path, "eval_before")
    assert "eval_before is done again" in capsys.readouterr().out
    (tmp_path / "eval_before.json").unlink()
    assert not is_finished(tmp_path, "eval_before")
    assert is_finished(tmp_path, "training")


# Training


class NotStopping:
    """Of a process that receives no signal."""

    at_step_end = contextlib.nullcontext

    def agreed(self, device):
        return False


def finish(trainer, folder, resumed=None):
    """Train to the end: the weights, and the log without the times."""
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    return weights, losses(trainer.state.log_history)


def losses(log):
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "train_loss")
    return [{name: line.get(name) for name in names} for line in log]


def assert_same(one, other):
    for name, weight in one[0].items():
        assert torch.equal(weight, other[0][name]), name
    assert one[1] == other[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of its own for each number of steps between checkpoints would be the same."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    found = finish(make_trainer(folder, [], NotStopping()), folder)
    assert [line["step"] for line in found[1]] == [4, 8, 12, STEPS]
    return found


@pytest.mark.parametrize(
    ("save_steps", "killed_in", "newest"),
    [(3, 3, None), (3, 4, 3), (3, 8, 6), (5, 6, 5), (4, 15, 12), (15, None, 15)],
    ids=["before any", "right after", "mid-epoch", "epoch's end", "at a line of the log", "after the last step"],
)
def test_resumed_is_as_uninterrupted(tmp_path, uninterrupted, save_steps, killed_in, newest):
    """Weights bit for bit, the same lines of the log: dropout, the optimizer's state and the order go on."""

    def kill():
        raise Killed

    callbacks = [AtStep(killed_in, kill)] if killed_in else []
    with contextlib.suppress(Killed):
        make_trainer(tmp_path, callbacks, NotStopping(), save_steps=save_steps).train()
    remove_incomplete(tmp_path)
    resumed = checkpoint_to_resume("auto", tmp_path)
    assert (resumed and int(resumed.name.removeprefix("checkpoint-"))) == newest
    again = make_trainer(tmp_path, [], NotStopping(), save_steps=save_steps)
    torch.rand(7)  # what has drawn from the generator before does not count
    assert_same(finish(again, tmp_path, resumed), uninterrupted)


def test_resumed_with_other_intervals(tmp_path):
    """Of saving and logging: they are this run's, not the checkpoint's."""
    make_trainer(tmp_path, [], NotStopping(), max_steps=6).train()
    again = make_trainer(tmp_path, [], NotStopping(), save_steps=4, logging_steps=5)
    _, lines = finish(again, tmp_path, tmp_path / "checkpoint-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (12, 3, 4, 6, 8)]
    assert [line["step"] for line in lines] == [5, 10, 15, STEPS]


def test_checkpoints_are_kept_to_their_number(tmp_path):
    make_trainer(tmp_path, [], NotStopping(), save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-15"]


class FullDisk(TrainerCallback):
    """No file may become longer while the sixth step's checkpoint is written."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))

    def on_step_begin(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [50, 2000, 10_000], ids=["safetensors", "torch", "random states"])
def test_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, capsys, uninterrupted, size):
    """Whichever library's writer it is that fails (50 bytes are too few for the weights, 2,000 for the optimizer)."""
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in (6, 9):
                seen.append(sorted(path.name for path in tmp_path.iterdir()))

    trainer = make_trainer(tmp_path, [FullDisk(size), Look()], NotStopping())
    assert_same(finish(trainer, tmp_path), uninterrupted)
    assert seen == [["checkpoint-3"], ["checkpoint-3", "checkpoint-9"]]
    assert "checkpoint-6 could not be written" in (told := capsys.readouterr().out)
    assert "checkpoint-3 is kept" in told


class StoppingAfter(NotStopping):
    """Of a process that is told to stop in this step."""

    def __init__(self, step: int) -> None:
        self.step, self.trainer = step, None

    def agreed(self, device):
        return self.trainer.state.global_step == self.step


@pytest.mark.parametrize(("step", "goes_on_from"), [(6, "step 3, the last one that is saved"), (7, "there")])
def test_stopped_it_tells_from_where_it_goes_on(tmp_path, capsys, step, goes_on_from):
    """The checkpoint of the sixth step finds a full disk."""
    stopping = StoppingAfter(step)
    stopping.trainer = make_trainer(tmp_path, [FullDisk(50)], stopping)
    try:
        with pytest.raises(SystemExit) as ended:
            stopping.trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert ended.value.code == 143
    assert f"stopped after step {step}; the same command goes on from {goes_on_from}\n" in capsys.readouterr().out


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_nothing_foreign_is_unpickled(tmp_path):
    """DeepSpeed's own reader would unpickle anything."""
    trainer = make_trainer(tmp_path, [], NotStopping())
    engine = SimpleNamespace(
        checkpoint_engine=SimpleNamespace(save=torch.save, load=torch.load), save_checkpoint=lambda **given: given
    )
    trainer._teach(engine)
    torch.save({"state": torch.ones(2), "evil": Evil(tmp_path / "marker")}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        engine.checkpoint_engine.load(tmp_path / "optimizer.pt")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert (tmp_path / "marker").exists()  # else this test could not fail


# In processes of their own


def run_alone(*arguments) -> subprocess.CompletedProcess:
    """In a session of its own, for a whole group is signalled."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
        start_new_session=True,
    )


def test_signal_ends_the_step_and_saves(tmp_path, uninterrupted):
    """SIGTERM to the whole group, the loader's worker included: it must still bring the data of the step."""
    ended = run_alone(tmp_path, "--at", 8, "--do", "group")
    assert ended.returncode == 143, ended.stdout[-3000:]
    assert "stopped after step 8" in ended.stdout
    newest = checkpoint_to_resume("auto", tmp_path)
    assert newest.name == "checkpoint-8"
    assert_same(finish(make_trainer(tmp_path, [], NotStopping()), tmp_path, newest), uninterrupted)


def test_signal_ends_a_process_that_hangs(tmp_path):
    """The step takes ten minutes, the time that is granted two seconds."""
    began = time.monotonic()
    ended = run_alone(tmp_path, "--at", 5, "--do", "hang", "--grace", 2)
    assert ended.returncode == 143, ended.stdout[-3000:]
    assert "SIGUSR1: not ended within --grace_seconds 2" in ended.stdout
    assert time.monotonic() - began < 500
    assert checkpoint_to_resume("auto", tmp_path).name == "checkpoint-3"


@pytest.mark.long
@pytest.mark.parametrize(
    "method", ["ds_configs/zero2.json", "", "ds_configs/zero3.json"], ids=["zero2", "ddp", "zero3"]
)
def test_two_processes(tmp_path, method):
    """One process can't write its part of the first checkpoint, the other one is told to stop: no one waits in vain."""
    shared = ("--deepspeed", method) if method else ()
    found = []
    for folder, fault in ((tmp_path / "one", ()), (tmp_path / "two", ("--at", 8, "--do", "stop", "--full_at", 3))):
        ended = run_script(SCRIPT, folder, *shared, *fault, fresh=True)
        if fault:
            assert "checkpoint-3 could not be written" in ended.stdout, ended.stdout[-3000:]
            assert "no checkpoint is kept" in ended.stdout
            # the other process ends so too, or torchrun ends it first
            assert "exitcode  : 143" in ended.stdout, ended.stdout[-3000:]
            assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-8"]
            ended = run_script(SCRIPT, folder, *shared)
            assert "RESUMED 0 checkpoint-8" in ended.stdout
            assert "RESUMED 1 checkpoint-8" in ended.stdout
        assert ended.returncode == 0, ended.stdout[-3000:]
        found.append(((folder / MODEL).read_bytes(), losses(json.loads((folder / "log.json").read_text()))))
    assert found[0] == found[1]
