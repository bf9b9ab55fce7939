"""What goes wrong while a run lasts is told: steps that are not finite, processes that are slow or die, memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common import checkpoints, cli, errors, training, watching
from common.checkpoints import check_same_run
from common.errors import NotWrittenError, UserError, advise, comes_of_another, is_out_of_memory, run
from common.files import INCOMPLETE
from common.phi3v import Phi3VConfig
from common.watching import Watchdog, WatchedTrainer, in_words
from tests.failing import NO_MEMORY, options_of
from tests.launch import REPOSITORY, run_script
from tests.resumable import STEPS, AtStep
from tests.watched import SLOW, keys_of, make_trainer, spoil
from tools import plan

TESTS = REPOSITORY / "tests"


class NotStopping:
    """Of a process that receives no signal."""

    at_step_end = contextlib.nullcontext

    def agreed(self, device):
        return False


# Steps that are not finite


def train(folder: Path, bad=(), fault=1, packs=False, callbacks=(), **given) -> WatchedTrainer:
    trainer = make_trainer(folder, NotStopping(), packs, **given)
    spoil(trainer.train_dataset, bad, fault=fault, packs=packs)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def checkpoints_of(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("fault", "loss"), [(1, "nan"), (2, r"[\d.]+")], ids=["loss", "gradient"])
def test_bad_steps_in_a_row_end_the_run_with_their_examples(tmp_path, capsys, packs, fault, loss):
    """In the second epoch and across its end; the examples are those that the data set was asked for."""
    with pytest.raises(UserError) as raised:
        train(tmp_path, bad=[9, 10, 11], fault=fault, packs=packs)
    told = str(raised.value)
    assert raised.value.everywhere  # or every process would print the same
    assert re.search(rf"^  - step 9: loss {loss}, gradient norm nan, examples of process 0: row ", told, re.MULTILINE)
    assert [int(step) for step in re.findall(r"^  - step (\d+)", told, re.MULTILINE)] == [9, 10, 11]
    assert "smaller --learning_rate than 0.01" in told
    for line, step in zip(re.findall(r"process 0: (.*)", told), (9, 10, 11), strict=True):
        expected = []
        for number, keys in enumerate(keys_of(step, packs, 0, 1)):
            rows = dict.fromkeys(f"row {key.index}" for key in keys)
            spoiled = rows.keys() & {f"row {key.index}" for key in keys_of(step, packs, 0, 1)[0][:1]}
            assert number > 0 or spoiled
            expected.append(", ".join(rows) + (" (loss nan)" if fault == 1 and spoiled else ""))
        assert line == " | ".join(expected)
    assert checkpoints_of(tmp_path) == list(range(1, 9))
    assert capsys.readouterr().out.count("left out step ") == 3


def test_a_bad_step_is_left_out(tmp_path, capsys):
    """Weights and the optimizer's state stay as they were, and the run and its log go on."""
    seen = []

    def look():
        state = trainer.optimizer.state_dict()["state"].values()
        seen.append([*(p.detach().clone() for p in trainer.model.parameters())])
        seen[-1] += [value.clone() for one in state for value in one.values()]

    trainer = make_trainer(tmp_path, NotStopping(), max_bad_steps=2, max_steps=10)
    spoil(trainer.train_dataset, [3, 5, 7])  # never two in a row
    for step in range(2, 9):
        trainer.add_callback(AtStep(step, look))  # before it, so after the one before
    trainer.train()
    after = dict(enumerate(seen, start=1))
    for step in range(2, 8):
        same = all(torch.equal(one, other) for one, other in zip(after[step - 1], after[step], strict=True))
        assert same == (step in (3, 5, 7)), step
    assert checkpoints_of(tmp_path) == [1, 2, 4, 6, 8, 9, 10]
    assert "checkpoint-5 is not written" in capsys.readouterr().out
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [math.isfinite(loss) for loss in losses] == [True, False, False, False, True]  # of two steps each
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_resumed_after_a_bad_step(tmp_path):
    """As if never interrupted, with the bad step before the checkpoint and after it."""
    bad = [3, 5]
    whole = train(tmp_path / "whole", bad)
    again = make_trainer(tmp_path / "again", NotStopping())
    spoil(again.train_dataset, bad)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [line.get("loss") for line in whole.state.log_history if line["step"] > 6] == [
        line.get("loss") for line in again.state.log_history if line["step"] > 6
    ]


def test_ordinary_skips_of_the_loss_scaler_do_not_count(tmp_path):
    """At scales 8, 4 and 2 a smaller one may help, at 1 and below none would: the fourth to the sixth step count."""

    def scaled(fault):
        folder = tmp_path / str(fault)
        trainer = make_trainer(folder, NotStopping())
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        spoil(trainer.train_dataset, range(1, STEPS + 1), fault=fault)
        with pytest.raises(UserError) as raised:
            trainer.train()
        return [int(step) for step in re.findall(r"- step (\d+)", str(raised.value))], checkpoints_of(folder)

    assert scaled(fault=2) == ([4, 5, 6], [1, 2, 3])
    assert scaled(fault=1) == ([1, 2, 3], [])  # no scale mends a loss


def in_float16(folder: Path, scale: float, seen: list[float]) -> WatchedTrainer:
    """Autocast and the scaler, as the libraries set them up on a GPU and do not on a CPU.

    Args:
        seen: where the scale after every step goes.
    """
    given = {"fp16": True, "max_bad_steps": 1, "logging_steps": 1, "optim": "adamw_torch"}
    trainer = make_trainer(folder, NotStopping(), **given)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
    for step in range(2, STEPS + 1):
        trainer.add_callback(AtStep(step, lambda: seen.append(trainer.accelerator.scaler.get_scale())))
    return trainer


@pytest.mark.parametrize("step", [1, 7], ids=["while it looks for a scale", "later"])
def test_resumed_with_the_scale_of_float16(tmp_path, step):
    """Too large a scale is halved, and the steps left out meanwhile are no bad ones; it grows again after four good
    steps, which a resumed run goes on counting."""
    seen, seen_again = [], []
    whole = in_float16(tmp_path / "whole", 2.0**16, seen)
    whole.train()
    assert seen[:2] == [2.0**15, 2.0**14]
    assert any(later > earlier for earlier, later in itertools.pairwise(seen))
    assert checkpoints_of(tmp_path / "whole") == list(range(1, STEPS + 1))
    norms = [line["grad_norm"] for line in whole.state.log_history if "grad_norm" in line]
    assert [math.isfinite(norm) for norm in norms[:3]] == [False, False, True]
    again = in_float16(tmp_path / "again", 1.0, seen_again)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert seen_again == seen[step - 1 :]
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for name in ("loss", "learning_rate"):
        values, values_again = ([line.get(name) for line in each.state.log_history] for each in (whole, again))
        assert values_again == values


def test_deepspeed_s_scale_of_float16(tmp_path):
    """As above, of two processes under ZeRO-2 with the published scaler, whose second overflow is the first to count:
    resumed between these, and later."""
    given = json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text())
    given["fp16"]["loss_scale_window"] = 4  # steps without one, after which the scale grows; published: 1,000
    (tmp_path / "zero2.json").write_text(json.dumps(given))

    def run_to_the_end(name, *words):
        """The scale after each step, the log and the weights."""
        options = ("--deepspeed", tmp_path / "zero2.json", "--fp16", *words)
        ended = run_script(TESTS / "watched.py", tmp_path / name, *options)
        assert ended.returncode == 0, ended.stdout[-3000:]
        assert "left out step" not in ended.stdout
        assert checkpoints_of(tmp_path / name)[-1] == STEPS
        last = tmp_path / name / f"checkpoint-{STEPS}"
        scales = {int(step): float(scale) for step, scale in re.findall(r"SCALE (\d+) (\S+)", ended.stdout)}
        lines = json.loads((last / "trainer_state.json").read_text())["log_history"]
        log = [[line[key] for key in ("step", "loss", "learning_rate")] for line in lines]
        return scales, log, (last / "model.safetensors").read_bytes()

    scales, *rest = run_to_the_end("whole")
    assert [scales[step] for step in (1, 2, 3)] == [2.0**16, 2.0**15, 2.0**14]
    assert any(scales[step] > scales[step - 1] for step in range(2, STEPS + 1))
    for step in (1, 7):
        scales_again, *rest_again = run_to_the_end(
            f"from {step}", "--resume", tmp_path / "whole" / f"checkpoint-{step}"
        )
        assert scales_again == {number: scale for number, scale in scales.items() if number > step}
        assert rest_again == rest


def test_the_options_are_read_and_noted(monkeypatch, tmp_path):
    def parse(*words):
        monkeypatch.setattr("sys.argv", ["script.py", "--output_dir", str(tmp_path), *words])
        return cli.parse_options(cli.make_parser("a script"))

    monkeypatch.setattr(errors, "_options", None)
    options = parse("--max_bad_steps", "5")
    assert options.max_bad_steps == 5
    assert errors._options is options
    assert "max_bad_steps" in checkpoints.FREE_OPTIONS  # another number may be given when a run is resumed
    with pytest.raises(UserError, match="--max_bad_steps 0: it must be at least 1"):
        parse("--max_bad_steps", "0")


@pytest.mark.parametrize(
    "method",
    [(), pytest.param(("--deepspeed", "ds_configs/zero2.json", "--bf16"), marks=pytest.mark.long)],
    ids=["ddp", "zero2 in bfloat16"],
)
def test_bad_steps_of_two_processes(tmp_path, method):
    """The second process has the bad examples: both leave the same steps out and end, and one of them tells."""
    ended = run_script(TESTS / "watched.py", tmp_path, "--bad", 3, 11, 12, 13, *method)
    assert ended.returncode != 0
    assert "TRAINED" not in ended.stdout
    assert len(re.findall(r"^left out step 3: ", ended.stdout, re.MULTILINE)) == 1
    assert ended.stdout.count("error: loss or gradient norm was not finite in 3 steps in a row") == 1
    for step in (11, 12, 13):
        (line,) = re.findall(rf"^  - step {step}: (.*)", ended.stdout.split("error: ")[1], re.MULTILINE)[:1]
        for rank in (0, 1):
            expected = " | ".join(
                ", ".join(f"row {key.index}" for key in keys) for keys in keys_of(step, False, rank, 2)
            )
            assert f"examples of process {rank}: {expected}" in line.replace(" (loss nan)", "")
    root = root_cause(ended.stdout)
    assert "3 steps in a row" in root
    assert checkpoints_of(tmp_path) == [1, 2, *range(4, 11)]
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


# The watchdog


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(watching.time, "monotonic", lambda: self.now)


def test_slow_is_ten_times_the_median_and_half_a_minute(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    watchdog = Watchdog()

    def told_at(*seconds):
        """The seconds after the beginning, of those given, at which something is said."""
        began, found = clock.now, []
        for second in seconds:
            clock.now = began + second
            watchdog._look()
            if text := capsys.readouterr().out:
                found.append((second, text))
        return found

    for step, taken in enumerate((60, 4, 6, 4), start=1):
        watchdog.begin("step", f"step {step}")
        assert told_at(taken) == []  # the first one is long, and nobody knows yet what is usual
    watchdog.begin("step", "step 5")
    watchdog.at("at micro-batch 2 of 8")
    ((second, text), *more) = told_at(49, 50, 51, 99, 100, 150, 199, 200)
    assert second == 50
    assert text == "step 5 has taken 50 s, 10 times the median of 5 s: the process is at micro-batch 2 of 8\n"
    assert [second for second, _ in more] == [100, 200]
    for number in range(4):  # an evaluation is no step, and is compared with other ones
        watchdog.begin("evaluation", f"evaluation {number}")
        assert told_at(500, 900) == []
        watchdog.begin("step", "a step")
        assert told_at(1) == []
    watchdog.begin("evaluation", "evaluation 4")
    assert [second for second, _ in told_at(8000, 9000)] == [9000]
    for _ in range(60):
        watchdog.begin("step", "a step")
        clock.now += 1
    watchdog.begin("step", "a step")  # of a second now, for old ones are forgotten
    assert [second for second, _ in told_at(29, 30)] == [30]


def test_who_is_behind_in_words():
    waiting, last = (4, "at micro-batch 2 of 8 (waiting for data)"), (16, "at micro-batch 8 of 8")
    assert in_words([last, last, last, waiting]) == f"process 3 is {waiting[1]}, the others are {last[1]}"
    assert in_words([waiting, last]) == f"process 0 is {waiting[1]}, the other is {last[1]}"
    assert in_words([last, last]) == f"all processes are {last[1]}"
    told = in_words([(17, "writing a checkpoint"), waiting, last, waiting])
    assert told == f"processes 1, 3 are {waiting[1]}, process 2 is {last[1]}, process 0 is writing a checkpoint"


def test_places_are_read_without_waiting():
    store = dist.HashStore()
    first, second = (Watchdog(rank, 3, store, poll_seconds=0.01) for rank in (0, 1))
    first.at("at the end of the step")
    with second:
        second.at("evaluating")
        deadline = time.monotonic() + 60
        while first._places()[1] != (1, "evaluating") and time.monotonic() < deadline:
            time.sleep(0.01)
    assert first._places() == [(1, "at the end of the step"), (1, "evaluating"), (-1, "not heard of")]
    assert not second._thread.is_alive()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_store_does_not_end_the_run():
    class Broken:
        def set(self, key, value):
            raise dist.DistNetworkError("Connection reset by peer")

    with Watchdog(1, 2, Broken(), poll_seconds=0.01) as watchdog:
        for _ in range(100):
            watchdog.at("at micro-batch 1 of 1")
            time.sleep(0.001)


def test_the_process_that_is_behind_is_named(tmp_path):
    """The second process waits for its second micro-batch; an evaluation before, as long, is no slow step."""
    ended = run_script(TESTS / "watched.py", tmp_path, "--slow", 8)
    assert ended.returncode == 0, ended.stdout[-3000:]
    lines = re.findall(r"^.* times the median of .*$", ended.stdout, re.MULTILINE)
    behind = [line for line in lines if line.startswith("step 8 has taken ")]
    assert behind, ended.stdout[-3000:]
    assert "process 1 is at micro-batch 2 of 2 (waiting for data), the other is at micro-batch 2 of 2" in behind[0]
    assert "the evaluation" not in "".join(lines)
    assert float(re.search(r"taken (\d+) s", behind[0])[1]) >= SLOW / 2 - 0.5


# A process that dies


def root_cause(output: str) -> str:
    """What torchrun's summary names as the first failure."""
    return output.rpartition("Root Cause (first observed failure):")[2]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("error", ("exitcode  : 1", "KeyError: 'what went wrong first'")),
        ("killed", ("exitcode  : -9", "Signal 9 (SIGKILL)")),
        ("user", ("exitcode  : 2", "traceback : data.parquet, row 7: there is no image")),
        ("memory", ("exitcode  : 1", "traceback : process 1: out of memory: 2.15 GB were asked for")),
        pytest.param("exit", ("exitcode  : 3",), marks=pytest.mark.long),
        pytest.param("stuck", ("KeyError: 'what went wrong first'",), marks=pytest.mark.long),
    ],
)
def test_one_process_dies(how, expected):
    """The other one, which waits for it, ends too, and what torchrun names is the first error."""
    ended = run_script(TESTS / "failing.py", how, fresh=True)
    taken = time.time() - float(re.search(r"^FAILED (.*)", ended.stdout, re.MULTILINE)[1])
    assert ended.returncode == 1
    assert taken < 60, ended.stdout[-3000:]
    root = root_cause(ended.stdout)
    assert "rank      : 1 (local_rank: 1)" in root, ended.stdout[-3000:]
    for text in expected:
        assert text in root
    if how == "user":
        assert "error: data.parquet, row 7: there is no image\n" in ended.stdout
        assert "in end\n" not in ended.stdout  # no traceback
    if how == "memory":
        assert "in end\n" in ended.stdout  # a script may be edited
        assert "  - --gradient_checkpointing full instead of none\n" in ended.stdout


def test_a_full_disk_at_the_start_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    (tmp_path / f"run.json{INCOMPLETE}").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as ended:
        run(lambda: check_same_run(tmp_path, {}))
    assert ended.value.code == 2
    told = f"error: [Errno 28] No space left on device: '{tmp_path}/run.json': see that there is room on that disk "
    assert capsys.readouterr().err == told + "and that it works, then start the same command again\n"


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ({}, "the same command"),
        ({"resume": "auto", "overwrite": False}, "the same command"),
        ({"resume": "never", "overwrite": True}, "the same command without --overwrite"),
        ({"resume": "out/checkpoint-5"}, "the same command without --resume out/checkpoint-5"),
    ],
)
def test_by_which_command_a_run_goes_on(monkeypatch, given, command):
    """The same would delete the checkpoint that it was stopped with, or go back behind it."""
    monkeypatch.setattr(errors, "_options", options_of(**given) if given else None)
    assert errors.command_to_go_on() == command


def test_a_full_disk_s_first_file(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "launcher", lambda: "a torchrun")
    monkeypatch.setattr(training, "_lock", lambda folder: None)  # of a device that other tests may hold
    (tmp_path / cli.LOCK).symlink_to("/dev/full")
    with pytest.raises(NotWrittenError, match="No space left on device"):
        training._prepare_output_folder(
            SimpleNamespace(output_dir=tmp_path, eval_only=False, overwrite=False, restarted=False, dry_run=False)
        )


def test_a_full_disk_ends_every_process():
    """Both with code 2 and by themselves; one of them tells."""
    ended = run_script(TESTS / "failing.py", "full")
    assert "Traceback" not in ended.stdout
    assert re.findall(r"^error: .*", ended.stdout, re.MULTILINE) == [
        "error: [Errno 28] No space left on device (process 0): see that there is room on that disk and that it works, "
        "then start the same command again"
    ]
    assert "FAILED" not in ended.stdout


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("Broken pipe"), True),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"), True),
        (dist.DistStoreError("wait timeout after 600000ms"), True),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), False),
        (torch.OutOfMemoryError(NO_MEMORY), False),
    ],
)
def test_what_may_come_of_another_process(monkeypatch, error, expected):
    assert not comes_of_another(error)  # a process alone has no other
    monkeypatch.setattr(errors, "rank_and_world", lambda: (0, 2))
    assert comes_of_another(error) == expected


def test_a_lost_connection_waits_for_the_first_error(monkeypatch):
    waited = []
    monkeypatch.setattr(errors, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for error in (RuntimeError("Connection closed by peer"), KeyError("first")):
        with pytest.raises(type(error)):
            run(lambda error=error: (_ for _ in ()).throw(error))
    assert waited == [errors.SECONDS_FOR_THE_FIRST]
    # what has failed itself is gone before, and all of it is within the minute
    assert errors.SECONDS_TO_END < errors.SECONDS_FOR_THE_FIRST
    assert errors.SECONDS_FOR_THE_FIRST + errors.SECONDS_TO_END < 60


def test_the_error_that_all_have_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for rank, everywhere, expected in ((0, True, 1), (1, True, 0), (1, False, 1)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)

        def fails(everywhere=everywhere):
            raise UserError("what is wrong", everywhere=everywhere)

        with pytest.raises(SystemExit):
            run(fails)
        assert capsys.readouterr().err.count("error: what is wrong\n") == expected


# Out of memory

ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(NO_MEMORY), True),
        (RuntimeError(ON_CPU), True),
        (MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. "), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_real_errors_of_cpu_allocators_are_known():
    for allocate in (lambda: torch.empty(10**17, dtype=torch.uint8), lambda: torch.empty(2**46).numpy().copy()):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        assert is_out_of_memory(raised.value)
        assert re.match(
            r"out of memory: [\d.]+ GB were asked for, this process held [\d.]+ GB, the machine has [\d.]+",
            advise(raised.value, None),
        )


def test_out_of_memory_tells_numbers_and_options():
    """GiB of the error are GB of 1e9 bytes here, as --gpu_memory is."""
    told = advise(torch.OutOfMemoryError(NO_MEMORY), options_of())
    figures, *remedies = told.splitlines()
    assert figures == (
        "out of memory: 2.15 GB were asked for, this process held 83.32 GB, of which 3.44 GB were reserved and unused, "
        "1.61 GB were free, the GPU has 84.9 GB. This was full fine-tuning with --batch_size_per_gpu 4 --num_crops 16 "
        "--gradient_checkpointing none. What needs less memory:"
    )
    assert remedies == [
        "  - PYTORCH_ALLOC_CONF=expandable_segments:True in the environment, against fragments",
        "  - --gradient_checkpointing full instead of none",
        "  - --batch_size_per_gpu 2 instead of 4 (the step stays the same)",
        "  - --deepspeed ds_configs/zero2_offload.json, which keeps the optimizer's state off the GPU",
        "  - --use_lora instead of full fine-tuning",
        "  - --num_crops 8 instead of 16 (less detail of a picture)",
        "  - what fits is shown by python -m tools.plan --gpu_memory 85 --gpus 8 --method full --batch_size 64 "
        "--num_crops 16 --bf16",
    ]


@pytest.mark.parametrize(
    ("given", "there", "absent"),
    [
        ({"gradient_checkpointing": "full", "batch_size_per_gpu": 1}, "--use_lora", "gradient_checkpointing full inst"),
        ({"gradient_checkpointing": "full"}, "--max_crops_per_call 4 instead", "gradient_checkpointing full inst"),
        ({"gradient_checkpointing": "selective"}, "--use_lora", "--max_crops_per_call"),
        ({"freeze_vision_model": True, "gradient_checkpointing": "full"}, "--use_lora", "--max_crops_per_call"),
        ({"eval_only": True}, "--max_crops_per_call 4 instead", "--use_lora"),
        ({"method": "lora", "bf16": False}, "--bf16 (Ampere or newer)", "--use_lora instead"),
        ({"method": "lora"}, "--use_qlora instead of --use_lora", "--bf16 (Ampere"),
        ({"method": "qlora", "bf16": False, "eval_only": True}, "--bf16 (Ampere or newer)", "--use_qlora"),
        ({"max_tokens_per_gpu": 9000}, "--max_tokens_per_gpu 4500 instead of 9000", "--batch_size_per_gpu 2"),
        ({"batch_size_per_gpu": 9}, "--batch_size_per_gpu 3 instead of 9", "--batch_size_per_gpu 4"),
        ({"method": "lora"}, "--use_qlora instead of --use_lora", "zero2_offload"),
        ({"method": "qlora", "num_crops": 1}, "--method qlora", "less detail"),
        ({"eval_only": True}, "--eval_batch_size_per_gpu 2 instead of 4", "--batch_size_per_gpu 2"),
    ],
)
def test_only_what_can_be_changed_is_advised(given, there, absent):
    told = advise(torch.OutOfMemoryError(NO_MEMORY), options_of(**given))
    assert there in told
    assert absent not in told


def test_the_machine_s_own_memory(monkeypatch):
    """Beside a GPU only loaders and processes fill it; on a CPU the model too."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    error = RuntimeError(ON_CPU)
    figures, *remedies = advise(error, options_of()).splitlines()
    assert re.match(r"out of memory: 400.00 GB were asked for, this process held [\d.]+ GB, the machine has", figures)
    workers = "  - --num_workers 0 instead of 4 (no batches are made ahead, the step waits for each)"
    assert remedies == [workers, "  - --nproc_per_node 4 instead of 8"]
    remedies = advise(error, options_of(device="cpu")).splitlines()[1:]
    assert "  - --gradient_checkpointing full instead of none" in remedies
    assert workers in remedies
    assert "zero2_offload" not in "".join(remedies)


@pytest.mark.parametrize(
    "told",
    [
        "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to allocate shared memory(shm) for file </torch_24_1_0>: No space left on device (28)",
        "unable to write to file </torch_24_1_0>: No space left on device (28)",
    ],
)
def test_memory_that_processes_share(told):
    """As torch tells that /dev/shm is full."""
    error = RuntimeError(told)
    assert is_out_of_memory(error)
    figures, *remedies = advise(error, options_of()).splitlines()
    size = r"/dev/shm has [\d.]+ GB, of which [\d.]+ GB are free"
    assert re.fullmatch(rf"out of shared memory: {size}\. What helps:", figures)
    assert remedies == [f"  - {one}" for one in errors.SHARES_MORE]


def test_an_evaluation_between_steps_is_known_by_where_it_ran():
    from common import evaluation

    code = compile("def fails(error):\n    raise error", evaluation.__file__, "exec")
    exec(code, names := {})
    error = torch.OutOfMemoryError(NO_MEMORY)
    with pytest.raises(torch.OutOfMemoryError):
        names["fails"](error)
    assert "This was evaluation with --eval_batch_size_per_gpu 4" in advise(error, options_of())


PACKED = {"method": "lora", "lora_rank": 16, "batch_size": 100, "batch_size_per_gpu": 1, "max_tokens_per_gpu": 9000}
SHARED = {"method": "qlora", "batch_size": 60, "packs": True, "freeze_vision_model": True, "torch_compile": True}


@pytest.mark.parametrize(
    ("given", "longest", "described"),
    [
        ({}, None, {"model_name_or_path": "official", "batch_size": 64, "tokens": 2443, "max_tokens_per_gpu": None}),
        ({}, (3000, 7, 34), {"tokens": 3000, "answer_tokens": 7, "images": 2, "num_crops": 16}),
        ({"num_crops": 4}, (9000, 7, 40), {"images": 8}),
        ({"bf16": False}, (50, 7, 0), {"images": 1, "bf16": False, "tokens": 50}),
        (PACKED, (3000, 7, 17), {"batch_size": 100, "max_tokens_per_gpu": 9000, "lora_rank": 16, "tokens": 3000}),
        ({**PACKED, "max_tokens_per_gpu": 900}, None, {"max_tokens_per_gpu": 900, "tokens": 900}),
        (SHARED, (3000, 7, 17), {"batch_size": 60, "max_tokens_per_gpu": 4 * 3000, "torch_compile": True}),
        (SHARED, None, {"max_tokens_per_gpu": 4 * 2443, "freeze_vision_model": True, "method": "qlora"}),
    ],
)
def test_the_advised_plan_is_a_command_that_describes_the_run(given, longest, described, monkeypatch):
    """As the command's own parser reads it, for eight processes and a card of 85 GB."""
    monkeypatch.setattr(errors, "_longest", {})
    if longest is not None:
        errors.note_longest(*longest)
    options = options_of(**given)
    told = advise(torch.OutOfMemoryError(NO_MEMORY), options)
    planned = vars(plan.parse(shlex.split(told.rpartition("python -m tools.plan ")[2])))
    described = {"gpu_memory": 85, "gpus": 8, "method": options.method, "bf16": options.bf16, **described}
    assert {name: planned[name] for name in described} == described


def test_the_advised_plan_is_of_the_run_s_own_model(tmp_path):
    folder = tmp_path / "my model"
    Phi3VConfig(num_hidden_layers=3).save_pretrained(folder)
    told = advise(torch.OutOfMemoryError(NO_MEMORY), options_of(model_name_or_path=str(folder)))
    planned = plan.parse(shlex.split(told.rpartition("python -m tools.plan ")[2]))
    assert plan.load_config(planned.model_name_or_path).num_hidden_layers == 3
