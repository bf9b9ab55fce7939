"""A script that is interrupted and started again by the same command ends as one that was not: for every method.

Weights bit for bit, the same log of losses, the same answers. The script's own `main()` runs in one process, as by
plain `python`, on the built-in checkpoint and twelve pages; checkpoint 3 of 8 steps lies within an epoch, and a step
accumulates four micro-batches. Two processes by torchrun, and every moment, are in tests/faults.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from common.cli import LOCK
from common.training import SHARED_MARK, RecipeTrainer
from tests.faults.harness import (
    COMMON,
    CONFIGURATIONS,
    LORA,
    STEPS,
    STRETCHES,
    Result,
    checkpoints,
    losses,
    progress,
    read,
    steps_taken,
    write_pages,
)
from tests.forked import DOCVQA, exit_code, fork, kill
from tests.launch import free_port, start_logged

KILLED_AFTER = 4  # in the middle of the fifth step
FINAL_EVALUATION = STRETCHES.index("evaluation after")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def begin(pages):
    """(folder, options) -> the script's processes, started; what they print goes to `log_of(folder)`."""

    def start(folder, *options, world=0):
        arguments = (*pages, *COMMON, *options, "--output_dir", folder)
        ranks, port = range(world or 1), free_port()
        return [fork(DOCVQA, *arguments, log=log_of(folder), rank=rank, world=world, port=port) for rank in ranks]

    return start


@pytest.fixture(scope="module")
def run(begin):
    """As `begin`, to the end -> exit code of the first process, what was printed."""

    def to_the_end(folder, *options, world=0):
        log_of(folder).unlink(missing_ok=True)
        codes = [exit_code(process) for process in begin(folder, *options, world=world)]
        return codes[0], log_of(folder).read_text()

    return to_the_end


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """Options -> the folder of their run that nothing was done to; each is run once."""
    done = {}

    def folder_of(*options, world=0):
        if (options, world) not in done:
            folder = tmp_path_factory.mktemp("uninterrupted") / "out"
            code, text = run(folder, *options, world=world)
            assert code == 0, text[-3000:]
            assert steps_taken(folder) == STEPS
            done[options, world] = folder
        return done[options, world]

    return folder_of


def log_of(folder):
    return folder.with_name(f"{folder.name}.log")


def copy_of(folder, tmp_path):
    """A run's folder, to go on in."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


# Made of the others when a run begins or ends, so again whenever it is started: the report and the model's card.
RENDERED = {".in_use", "report.html", "README.md", "run_facts.json", "plots"}


def contents(folder):
    """Every file with its time and size, but for what is rendered of others."""
    files = (path for path in folder.rglob("*") if path.is_file() and not RENDERED & {path.name, path.parent.name})
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def wait_for(condition, process):
    """Until it holds of a run that has not ended."""
    end = time.monotonic() + 600
    while not condition():
        assert process.exitcode is None, "the run has ended before"
        assert time.monotonic() < end
        time.sleep(0.005)


LONG = ("frozen", "qlora")  # of which the pages that are shared and the rows that are packed stay


@pytest.mark.parametrize(
    "configuration", [pytest.param(one, marks=[pytest.mark.long] if one in LONG else []) for one in CONFIGURATIONS]
)
def test_killed_run_ends_as_uninterrupted(begin, run, uninterrupted, tmp_path, configuration):
    options, folder = CONFIGURATIONS[configuration], tmp_path / "out"
    expected = Result.of(uninterrupted(*options))
    (process,) = begin(folder, *options)
    wait_for(lambda: steps_taken(folder) >= KILLED_AFTER, process)
    kill(process)
    assert KILLED_AFTER <= steps_taken(folder) < STEPS
    newest = checkpoints(folder)[-1]
    code, text = run(folder, *options)
    assert code == 0, text[-3000:]
    assert f"going on from {folder}/checkpoint-{newest}" in text
    expected.check_same(folder)
    assert checkpoints(folder) == [3, 6]


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_signal_saves_the_step(begin, run, uninterrupted, tmp_path, sent):
    """Exit code 143, a checkpoint of the very step that was being taken, none of it lost."""
    options, folder = CONFIGURATIONS["lora"], tmp_path / "out"
    (process,) = begin(folder, *options)
    wait_for(lambda: steps_taken(folder) >= KILLED_AFTER, process)
    os.kill(process.pid, sent)
    assert exit_code(process) == 143, log_of(folder).read_text()[-3000:]
    reached = steps_taken(folder)
    assert checkpoints(folder)[-1] == reached < STEPS
    code, text = run(folder, *options)
    assert code == 0, text[-3000:]
    assert f"going on from {folder}/checkpoint-{reached}" in text
    Result.of(uninterrupted(*options)).check_same(folder)


TOLD_TO_STOP = """
import os
import signal

import finetune_hf_trainer_docvqa as docvqa

evaluate = docvqa.evaluate


def evaluate_and_be_told(*arguments):
    if arguments[-1] == "eval_step_4" and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*arguments)


docvqa.evaluate = evaluate_and_be_told
docvqa.run(docvqa.main)
"""


def test_signal_in_an_evaluation_between_steps(pages, run, uninterrupted, tmp_path):
    """It is given up for the step to be saved: an evaluation may take longer than the time there is."""
    options, folder = CONFIGURATIONS["lora"], tmp_path / "out"
    script = tmp_path / DOCVQA  # of the same name, for it is the same run
    script.write_text(TOLD_TO_STOP)
    arguments = (*pages, *COMMON, *options, "--eval_steps", 2, "--output_dir", folder)
    process = fork(script, *arguments, log=log_of(folder))
    assert exit_code(process) == 143, log_of(folder).read_text()[-3000:]
    told = log_of(folder).read_text()
    assert "the evaluation after step 4 is given up" in told
    assert "stopped after step 4; the same command goes on from there" in told
    assert checkpoints(folder)[-1] == 4
    assert (folder / "eval_step_2.json").exists()
    assert not (folder / "eval_step_4.json").exists()
    code, text = run(folder, *options, "--eval_steps", 2)
    assert code == 0, text[-3000:]
    assert f"going on from {folder}/checkpoint-4" in text
    found = Result.of(folder)
    losses_alone = [line for line in found.losses if "eval_anls" not in line]
    assert replace(found, losses=losses_alone) == Result.of(uninterrupted(*options))


def test_killed_in_the_final_evaluation(begin, run, uninterrupted, tmp_path):
    """What is trained is not trained again."""
    options, folder = CONFIGURATIONS["full"], tmp_path / "out"
    (process,) = begin(folder, *options)
    wait_for(lambda: progress(folder) == FINAL_EVALUATION, process)
    kill(process)
    assert not (folder / "eval_after.json").exists()
    before = contents(folder)
    code, text = run(folder, *options)
    assert code == 0, text[-3000:]
    assert "trained and saved already" in text
    after = contents(folder)
    assert {name for name in after if before.get(name) != after[name]} == {"eval_after.json", "stages.json"}
    Result.of(uninterrupted(*options)).check_same(folder)


def test_finished_run_does_nothing_more(run, uninterrupted, tmp_path):
    options = CONFIGURATIONS["lora"]
    folder = copy_of(uninterrupted(*options), tmp_path)
    before = contents(folder)
    code, text = run(folder, *options)
    assert code == 0, text[-3000:]
    assert contents(folder) == before
    lines = ("before training:", "after training:", "gain:")
    told = log_of(uninterrupted(*options)).read_text().splitlines()
    assert [line for line in text.splitlines() if line.startswith(lines)] == [
        line for line in told if line.startswith(lines)
    ]


def test_two_at_once(begin, uninterrupted, tmp_path):
    """The second one waits for the first one's end, and then finds all done."""
    options, folder = CONFIGURATIONS["lora"], tmp_path / "out"
    (first,) = begin(folder, *options)
    wait_for(lambda: progress(folder) >= 4, first)  # of 8: it waits a minute, which a slow machine needs for the rest
    (second,) = begin(folder, *options)
    assert exit_code(first) == 0
    written = contents(folder)
    written.pop(SHARED_MARK, None)  # the second one's, which may have begun; it takes it away
    assert exit_code(second) == 0, log_of(folder).read_text()[-3000:]
    text = log_of(folder).read_text()
    assert f"waiting for the run that still uses {folder}" in text
    assert text.count("gain:") == 2
    assert contents(folder) == written
    Result.of(uninterrupted(*options)).check_same(folder)


def test_other_options_are_refused(run, uninterrupted, tmp_path):
    """With both values of each, and nothing touched."""
    options = CONFIGURATIONS["lora"]
    folder = copy_of(uninterrupted(*options), tmp_path)
    before = contents(folder)
    code, text = run(folder, *options, "--seed", 1, "--lora_rank", 8, "--max_steps", STEPS + 1)
    assert code == 2, text[-3000:]
    for difference in (
        "seed 0 there, 1 here",
        "lora_rank 4 there, 8 here",
        f"max_steps {STEPS} there, {STEPS + 1} here",
    ):
        assert difference in text
    assert text.count(" there, ") == 3
    assert contents(folder) == before


def test_never_refuses_a_used_folder_and_overwrite_begins_anew(run, uninterrupted, tmp_path):
    options = CONFIGURATIONS["lora"]
    folder = copy_of(uninterrupted(*options), tmp_path)
    (folder / "plots" / "mine.txt").write_text("a file that no run has written stays")
    left = [folder / name for name in ("runs/a/events.out.tfevents.1", "confusion_eval_before.png", "eval_only.json")]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    before = contents(folder)
    code, text = run(folder, *options, "--resume", "never")
    assert code == 2, text[-3000:]
    assert f"--output_dir {folder} holds a run" in text
    assert contents(folder) == before
    code, text = run(folder, *options, "--seed", 1, "--max_steps", 2, "--overwrite")
    assert code == 0, text[-3000:]
    assert steps_taken(folder) == 2
    assert checkpoints(folder) == []
    assert "going on from" not in text
    assert read(folder / "run.json")["seed"] == 1
    assert not any(file.exists() for file in left)
    assert (folder / "plots" / "mine.txt").is_file()


@pytest.mark.parametrize(
    "elsewhere", [pytest.param(False, id="in its folder", marks=pytest.mark.long), pytest.param(True, id="in another")]
)
def test_from_a_certain_checkpoint(run, uninterrupted, tmp_path, elsewhere):
    """An older one than the newest; from elsewhere by another name, too."""
    options = CONFIGURATIONS["lora"]
    expected = Result.of(uninterrupted(*options))
    folder = copy_of(uninterrupted(*options), tmp_path)
    output, checkpoint = (tmp_path / "other", folder / "best") if elsewhere else (folder, folder / "checkpoint-3")
    if elsewhere:
        (folder / "checkpoint-3").rename(checkpoint)
    code, text = run(output, *options, "--resume", checkpoint)
    assert code == 0, text[-3000:]
    assert f"going on from {checkpoint}" in text
    expected.check_same(output)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(("--overwrite",), id="overwrite"),
        pytest.param(("--resume", "never"), id="never", marks=pytest.mark.long),
        pytest.param(("--resume", "checkpoint-3"), id="from a certain one", marks=pytest.mark.long),
    ],
)
def test_torchrun_starts_it_again(pages, uninterrupted, tmp_path, given):
    """From what it has written itself: what was there before it is not deleted, refused or gone back to once more."""
    options, folder = CONFIGURATIONS["lora"], tmp_path / "copy"
    expected = uninterrupted(*options)
    if given != ("--resume", "never"):
        copy_of(expected, tmp_path)
        (folder / LOCK).write_text("the name of another torchrun, which is longer than this one's will ever be " * 3)
    if "checkpoint-3" in given:
        given = ("--resume", folder / "checkpoint-3")
    began = time.time()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts=1", DOCVQA]
    words = (*launcher, *pages, *COMMON, *options, *given, "--output_dir", folder)
    log = log_of(folder)
    torchrun = start_logged(words, log, {**os.environ, "OMP_NUM_THREADS": "1"})
    try:

        def has_new_checkpoint():
            newest = max(folder.glob("checkpoint-*/manifest.json"), key=os.path.getmtime, default=None)
            return newest is not None and newest.stat().st_mtime > began

        end = time.monotonic() + 600
        while not has_new_checkpoint():
            assert torchrun.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.005)
        (worker,) = psutil.Process(torchrun.pid).children()
        worker.kill()
        code = torchrun.wait(600)
    finally:
        if torchrun.poll() is None:
            os.killpg(torchrun.pid, signal.SIGKILL)
    text = log.read_text()
    assert code == 0, text[-3000:]
    reached = 6 if "checkpoint-3" in str(given) else 3
    assert f"going on from {folder}/checkpoint-{reached}" in text
    assert text.count(f"going on from {folder}/checkpoint-3\n") == 1
    Result.of(expected).check_same(folder)


def test_dry_run_leaves_nothing_behind(run, uninterrupted, tmp_path):
    """In a new folder, and in one that is in use."""
    options = CONFIGURATIONS["full"]
    code, text = run(tmp_path / "new", *options, "--dry_run")
    assert code == 0, text[-3000:]
    assert "one step is taken" in text
    assert not (tmp_path / "new").exists()
    folder = copy_of(uninterrupted(*options), tmp_path)
    before = contents(folder)
    code, text = run(folder, *options, "--dry_run")
    assert code == 0, text[-3000:]
    assert contents(folder) == before
    assert not list(folder.glob("dry_run*"))


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ((*LORA, "--batch_size_per_gpu", 2), 2, 0),
        (CONFIGURATIONS["full"], 0, 2),
        pytest.param(CONFIGURATIONS["full"], 2, 0, marks=pytest.mark.long),
    ],
    ids=["lora, two to one", "full, one to two", "full, two to one"],
)
def test_another_number_of_processes(run, uninterrupted, tmp_path, options, before, after):
    """The same global batch: sums in another order, so 1e-5 in float32, and no dropout."""
    there, folder = uninterrupted(*options, world=before), tmp_path / "out"
    code, text = run(folder, *options, "--resume", there / "checkpoint-3", world=after)
    assert code == 0, text[-3000:]
    found, expected = ([line for line in losses(one) if "loss" in line] for one in (folder, there))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["learning_rate"] == other["learning_rate"]
    assert found[0] == expected[0]  # taken over with the checkpoint
    assert found[-1] != expected[-1]  # taken anew; else nothing was tested


def test_a_log_that_cannot_be_written_is_written_later(tmp_path, capsys):
    """A full disk costs no run for a line of its log."""
    log = [{"loss": 2.5 - step, "step": step} for step in range(1, 5)]
    trainer = SimpleNamespace(options=SimpleNamespace(output_dir=tmp_path), _log_lags=False)
    for step in range(1, 5):
        trainer.state = SimpleNamespace(log_history=log[:step])
        most = 40 if step in (2, 3) else resource.RLIM_INFINITY  # a line and a half
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            RecipeTrainer.write_log(trainer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert trainer._log_lags == (step in (2, 3))
    assert capsys.readouterr().out.count("train_log.jsonl could not be written") == 1
    assert losses(tmp_path) == log


def test_the_records_name_no_place_of_the_output(uninterrupted):
    """So that a run's folder may be moved."""
    folder = uninterrupted(*CONFIGURATIONS["lora"])
    names = ("run.json", "stages.json", "checkpoint-3/manifest.json")
    assert not [name for name in names if str(folder) in Path(folder, name).read_text()]
