"""Checkpoints that are complete or absent, and the records a run is resumed by.

A checkpoint is the Trainer's own (weights or adapter, optimizer or DeepSpeed's state, scheduler, random states
of every process, `trainer_state.json`). It is written beside, listed in a manifest with sizes and SHA-256,
brought to the disk and renamed: a kill at any moment leaves the one before it usable. Functions marked
"together" are called by every process; what fails on one of them is raised on all, so that none waits for another.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, set_seed
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import deepspeed_files
from .cli import MAX_NEW_TOKENS, PATHS, RUN_RECORD, Precision
from .errors import NotWrittenError, UserError, command_to_go_on, is_first_process, raise_all, rank_and_world, say
from .files import INCOMPLETE, read_json, sync_to_disk, write_json
from .report import PICTURES
from .stopping import STOPPED, Stopping
from .together import is_write_failure, on_first, together

MANIFEST, STAGES = "manifest.json", "stages.json"

# Options that change neither the weights nor what is measured: they may differ when a run is resumed.
FREE_OPTIONS = {"output_dir", "overwrite", "resume", "save_steps", "save_total_limit", "grace_seconds", "dry_run"}
FREE_OPTIONS |= {"device", "num_workers", "logging_steps", "report_to", "tqdm", "eval_batch_size_per_gpu"}
FREE_OPTIONS |= {"bad_examples", "max_bad_fraction", "max_bad_steps", "eval_steps", "timeout_minutes"}
FREE_OPTIONS |= {"defaults", "given", "push_to_hub", "report_images", "restarted", "check_images"}
# How a global batch is divided changes the order of summation alone, and the draws of dropout.
FREE_OPTIONS |= {"num_processes", "batch_size_per_gpu", "accumulation", "max_tokens_per_gpu"}
# What is kept and which kernels compute changes rounding alone: the cure for too little memory, or another machine's.
FREE_OPTIONS |= {"gradient_checkpointing", "max_crops_per_call", "attention", "use_liger", "torch_compile"}
FREE_OPTIONS |= {"use_flash_attention"}  # what else it may imply, the precision, is compared by itself
EARLIER = {"max_new_tokens": MAX_NEW_TOKENS}  # what runs had before there was an option for it
IN_WORDS = {"packs": "packed rows (--max_tokens_per_gpu, --share_images)"}  # of what is no option

Files = dict[str, dict[str, Any]]  # path within a folder -> {"bytes", "sha256"}


# --- files and manifests


def list_files(folder: Path) -> list[str]:
    """All files in a folder and its folders, without the manifest, as paths within it."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def fingerprints(folder: Path, names: Sequence[str], sync: bool = False) -> Files:
    """Size and SHA-256 of files (together: each process reads a share of them).

    Args:
        sync: bring each to the disk first.
    """
    rank, world = rank_and_world()

    def read_own() -> Files:
        own = {}
        for name in sorted(names, key=lambda name: -(folder / name).stat().st_size)[rank::world]:
            if sync:
                sync_to_disk(folder / name)
            with open(folder / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                own[name] = {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        return own

    return {name: found for share in together(read_own) for name, found in share.items()}


def differences(folder: Path, expected: Files) -> list[str]:
    """How files differ from what was written down of them, a line for each (together)."""
    present = on_first(lambda: [name for name in expected if (folder / name).is_file()])
    problems = [f"{folder / name} is missing" for name in expected if name not in present]
    try:
        found = fingerprints(folder, present)
    except NotWrittenError as error:
        return [*problems, f"{folder} cannot be read: {error}"]
    for name in present:
        for quantity in ("bytes", "sha256"):
            its, wanted = found[name][quantity], expected[name].get(quantity)
            if its != wanted:
                problems.append(f"{folder / name} has {quantity} {its}, {wanted} expected")
                break  # of another size it has another hash too
    return problems


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; nothing for a complete one (together)."""
    manifest, names = on_first(lambda: (read_json(folder / MANIFEST) or {}, list_files(folder)))
    expected = manifest.get("files")
    if not isinstance(expected, dict) or not all(isinstance(each, dict) for each in expected.values()):
        return [f"{folder / MANIFEST} is missing or no manifest"]
    extra = [f"{folder / name} is not in the manifest" for name in names if name not in expected]
    return extra + differences(folder, expected)


# --- a folder's checkpoints


def checkpoints_in(folder: Path) -> list[Path]:
    """Every `checkpoint-N`, the one of the most steps first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.fullmatch(r".*-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """How many steps were taken when a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_incomplete(folder: Path) -> None:
    """Remove what a killed run was writing or deleting (together, before anything is written)."""

    def remove() -> None:
        for path in (*folder.glob(f"*{INCOMPLETE}"), *folder.glob(f"{PICTURES}/*{INCOMPLETE}")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    on_first(remove)


def checkpoint_to_resume(resume: str, folder: Path, since: float | None = None) -> Path | None:
    """The checkpoint that `--resume` means (together); damaged ones are named and passed over.

    Args:
        resume: "auto" for the newest complete one, "never", or a checkpoint's folder.
        folder: the output folder.
        since: for a run that torchrun has started again, when it did so first, in seconds as of its files' times: what
            it has written since then is gone on from, whatever `resume` is.

    Raises:
        UserError: the folder that was asked for holds no complete checkpoint.
    """

    def is_meant(checkpoint: Path) -> bool:
        return resume == "auto" or (since is not None and _written_at(checkpoint) >= since)

    for checkpoint in on_first(lambda: list(filter(is_meant, checkpoints_in(folder)))):
        problems = damage(checkpoint)
        if not problems:
            return checkpoint
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        say(f"{checkpoint} is damaged and passed over: {problems[0]}{more}")
    if resume in ("auto", "never"):
        return None
    raise_all([f"--resume {resume}: {problem}" for problem in damage(Path(resume))])
    return Path(resume)


def _written_at(checkpoint: Path) -> float:
    """When its manifest was written; 0 for one without."""
    manifest = checkpoint / MANIFEST
    return manifest.stat().st_mtime if manifest.exists() else 0.0


def prune(folder: Path, limit: int | None, newest: Path) -> None:
    """Delete all but `limit` checkpoints, of which `newest`, just completed, is always one (first process).

    Those of more steps than it were passed over, or gone back from: they go first.
    """
    others = [path for path in checkpoints_in(folder) if path.name != newest.name]
    others.sort(key=lambda path: step_of(path) > step_of(newest))  # in either part the one of the most steps first
    for path in [] if limit is None else others[max(0, limit - 1) :]:
        doomed = path.with_name(path.name + INCOMPLETE)  # at once no checkpoint, should the deleting be cut short
        with contextlib.suppress(OSError):  # it is tried again with the next
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def complete(written: Path, checkpoint: Path) -> None:
    """Turn a written folder into a checkpoint: manifest, everything to the disk, renamed (together).

    Raises:
        NotWrittenError: the disk is full or fails.
    """
    files = fingerprints(written, on_first(lambda: list_files(written)), sync=True)

    def rename() -> None:
        write_json(written / MANIFEST, {"step": step_of(checkpoint), "files": files})
        for path in written.rglob("*"):
            if path.is_dir():
                sync_to_disk(path)
        replaced = checkpoint.with_name(f"{checkpoint.name}.replaced{INCOMPLETE}")
        if checkpoint.exists():  # damaged, or the run went on from an older one
            os.replace(checkpoint, replaced)
        os.replace(written, checkpoint)
        sync_to_disk(checkpoint.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    on_first(rename)


# --- what a run is resumed by


def record_of(options: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """What must agree for a run to be resumed: the options that count, and facts such as the number of examples."""
    record = {"script": Path(sys.argv[0]).name, **facts}
    for name, value in vars(options).items():
        if name in PATHS and value is not None and os.path.exists(value):
            value = os.path.realpath(value)
        if name not in FREE_OPTIONS:
            value = value.name if isinstance(value, Precision) else value
            record[name] = value if isinstance(value, (bool, int, float, type(None))) else str(value)
    return record


def check_same_run(folder: Path, record: Mapping[str, Any], may_begin: bool = True) -> None:
    """Compare with the record in an output folder, or write it where there is none (together).

    Args:
        may_begin: whether there may be none.

    Raises:
        UserError: listing every difference, with both values.
    """
    stored = on_first(lambda: read_json(folder / RUN_RECORD))
    if stored is None and not may_begin:
        missing = f"{folder} has no {RUN_RECORD}: give a checkpoint in the output folder of a run"
        raise UserError(missing, everywhere=True)
    if stored is None:
        on_first(lambda: write_json(folder / RUN_RECORD, dict(record)))
        return
    names = [name for name in {**stored, **record} if name not in FREE_OPTIONS]  # which earlier code may have compared
    pairs = {name: (stored.get(name, EARLIER.get(name, "absent")), record.get(name, "absent")) for name in names}
    different = [
        f"{IN_WORDS.get(name, name)} {its} there, {mine} here" for name, (its, mine) in pairs.items() if its != mine
    ]
    if different:
        raise UserError(
            f"{folder} holds a run with other options: {'; '.join(different)}. Give its own to go on with it, or "
            "another --output_dir, or --overwrite",
            everywhere=True,
        )


def finish_stage(folder: Path, stage: str, names: Sequence[str]) -> None:
    """Write down that a stage of the run is finished, and what the first process has written for it (together)."""
    on_first(lambda: None)
    files = fingerprints(folder, names, sync=True)
    on_first(lambda: write_json(folder / STAGES, {**(read_json(folder / STAGES) or {}), stage: files}))


def is_finished(folder: Path, stage: str) -> bool:
    """Whether a stage was finished and what it has written is still there unchanged (together)."""
    files = (on_first(lambda: read_json(folder / STAGES)) or {}).get(stage)
    if not isinstance(files, dict):
        return False
    problems = differences(folder, files)
    if problems:
        say(f"{stage} is done again: {problems[0]}")
    return not problems


def forget_stages(folder: Path, *names: str) -> None:
    """Let stages be done again (together)."""

    def forget() -> None:
        stages = read_json(folder / STAGES) or {}
        write_json(folder / STAGES, {name: files for name, files in stages.items() if name not in names})

    on_first(forget)


# --- the Trainer


class CheckpointingTrainer(Trainer):
    """transformers' Trainer whose checkpoints are complete or absent, and which resumes as if never interrupted.

    Args:
        write_model: writes the weights or the adapter into a folder; called on the first process, with the weights
            where DeepSpeed has put them together.
        stopping: as set up when the run began.
    """

    def __init__(
        self, *, write_model: Callable[[Path, dict[str, torch.Tensor] | None], None], stopping: Stopping, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.write_model, self.stopping = write_model, stopping
        self._written_in: Path | None = None
        self._failures: list[Exception] = []
        self._resumed_from: str | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what was drawn before, as by an evaluation that a resumed run leaves out, does not count."""
        set_seed(self.args.seed)
        with self.stopping.at_step_end():
            return super().train(*args, **kwargs)

    # writing

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._written_in is None else str(self._written_in)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, written beside; where it can't be, the run goes on with the one before."""
        folder, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        beside = folder / (name + INCOMPLETE)
        self._failures = []

        def write() -> None:
            super(CheckpointingTrainer, self)._save_checkpoint(model, trial)
            if self._failures:
                raise self._failures[0]

        def begin() -> None:
            shutil.rmtree(beside, ignore_errors=True)
            (beside / name).mkdir(parents=True)

        def end() -> None:
            shutil.rmtree(beside, ignore_errors=True)
            prune(folder, self.args.save_total_limit, folder / name)

        try:
            on_first(begin)
            self._written_in = beside
            together(write)
            complete(beside / name, folder / name)
            on_first(end)
        except NotWrittenError as error:
            if is_first_process():
                shutil.rmtree(beside, ignore_errors=True)
            kept = [path.name for path in checkpoints_in(folder)][:1] or ["no checkpoint"]
            free = shutil.disk_usage(folder).free / 1e9
            say(
                f"{name} could not be written ({error}; without it {free:.1f} GB are free): {kept[0]} is kept, and the "
                "next is written in its time"
            )
        finally:
            self._written_in = None

    @contextlib.contextmanager
    def _noting_failures(self) -> Iterator[None]:
        """Between two points where processes wait for each other a failure is noted, to be raised afterwards."""
        try:
            yield
        except Exception as error:
            if not is_write_failure(error):
                raise
            self._failures.append(error)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            with self._noting_failures():
                self.write_model(Path(output_dir or self.args.output_dir), state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save:
            Path(output_dir, "latest").write_text(f"global_step{self.model_wrapped.global_steps}")

    def _own_file(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"process_{self.args.process_index}.json")

    def _save_rng_state(self, output_dir: str) -> None:
        """Also what the Trainer forgets: the loss since the last line of the log, which each process sums alone."""
        super()._save_rng_state(output_dir)
        own = {"tr_loss": self._tr_loss.item(), "total_loss": self._total_loss_scalar}
        self._own_file(output_dir).write_text(json.dumps({**own, "last_logged": self._globalstep_last_logged}))

    # resuming

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """The Trainer would go on with the intervals of logging and saving that the checkpoint's run had."""
        begun = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return begun

    def _is_divided_otherwise(self, checkpoint: str) -> bool:
        """Whether another number of processes has written a checkpoint."""
        return len(list(Path(checkpoint).glob("process_*.json"))) != self.args.world_size

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._is_divided_otherwise(checkpoint):  # whose states are not these processes'
            draws = torch.Generator().manual_seed(self.args.seed + 1_000_003 * self.state.global_step)
            set_seed(torch.randint(2**31, (self.args.world_size,), generator=draws)[self.args.process_index].item())
        else:
            super()._load_rng_state(checkpoint)
        self._load_sums(checkpoint)

    def _load_sums(self, checkpoint: str) -> None:
        records = [json.loads(path.read_text()) for path in Path(checkpoint).glob("process_*.json")]
        if not self._is_divided_otherwise(checkpoint):
            records = [json.loads(self._own_file(checkpoint).read_text())]
        self._tr_loss.fill_(sum(one["tr_loss"] for one in records) / len(records))  # logged as the processes' mean
        self._total_loss_scalar = records[0]["total_loss"]
        self._globalstep_last_logged = records[0]["last_logged"]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As the Trainer does, but DeepSpeed's engine is taught to write and read before it loads anything."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled:
            self._teach(self.model_wrapped)
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                if self._is_divided_otherwise(resume_from_checkpoint):
                    deepspeed_files.divide_anew(self.model_wrapped)
                deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        self._resumed_from = resume_from_checkpoint
        return prepared

    def _teach(self, engine: Any) -> None:
        """Failures noted, for others wait; nothing foreign unpickled; no scripts copied."""
        files = engine.checkpoint_engine
        save = files.save

        def save_noting(state_dict: Any, path: str) -> None:
            with self._noting_failures():
                save(state_dict, path)

        files.save, files.load = save_noting, deepspeed_files.read
        engine._copy_recovery_script = lambda folder: None
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, save_latest=False)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer would take one more step from a checkpoint of a finished run."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any) -> Any:
        if self._resumed_from is not None and self.state.global_step == self._initial_global_step:  # no step was left
            self._load_sums(self._resumed_from)
        return super()._finalize_training(*args)

    # every step

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """At the end of a step: leave with a checkpoint when a process was told to stop.

        The Trainer would write one at the end of the last step too, just before the model is saved.
        """
        stops = self.stopping.agreed(self.args.device)
        self.control.should_save &= self.state.global_step % self.args.save_steps == 0
        self.control.should_save |= stops
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stops:
            newest = on_first(lambda: max(map(step_of, checkpoints_in(Path(self.args.output_dir))), default=0))
            there = "there" if newest == self.state.global_step else f"step {newest}, the last one that is saved"
            say(f"stopped after step {self.state.global_step}; {command_to_go_on()} goes on from {there}")
            raise SystemExit(STOPPED)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The run's mean loss at its end counts the steps before it was resumed too."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)
