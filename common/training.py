"""TrainingArguments, Trainer, DeepSpeed configuration, saving.

Full and frozen-vision fine-tuning run under DeepSpeed ZeRO-2, LoRA and QLoRA under DDP, as
published. A step's gradient is the mean over the global batch's examples, whatever the number of
processes and the examples each takes at once.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import itertools
import json
import os
import resource
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedPlugin
from peft import PeftModel
from torch.distributed import distributed_c10d
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from .bad_examples import BadExamples
from .checkpoints import (
    STAGES,
    check_same_run,
    checkpoint_to_resume,
    checkpoints_in,
    finish_stage,
    forget_stages,
    is_finished,
    list_files,
    record_of,
    remove_incomplete,
)
from .cli import (
    BAD_EXAMPLES,
    BITSANDBYTES_MOST,
    BITSANDBYTES_OPTIMIZERS,
    LOCK,
    RUN_RECORD,
    deepspeed_file,
    files_of_run,
)
from .collation import collate, pack, share_pictures
from .data import ExampleDataset, ExampleKey, loader_context, prefetch_factor
from .errors import (
    NotWrittenError,
    UserError,
    command_to_go_on,
    is_first_process,
    say,
    undo_on_failure,
)
from .facts import RUN_FACTS, describe_data, write_facts
from .files import INCOMPLETE, read_json
from .launcher import launcher
from .layers import causal_lm_of
from .memory import in_parts
from .model_card import precision_options, push_to_hub, write_model_card
from .packing import PackedBatchSampler, check_examples, check_fits, measure_questions
from .phi3v import Phi3VConfig, Phi3VModel, Phi3VProcessor
from .phi3v.masks import BY_DOCUMENT, attention_for_packing
from .progress import TrainingProgress, in_time
from .rendezvous import begin_group
from .report import PICTURES, read_log, write_report
from .stopping import Stopping, ToldToStopError, outlive_stop_signals
from .together import on_first
from .watching import WatchedTrainer

SHARED_MARK = ".seen_by_every_process"


def start(options: argparse.Namespace, train_data: Any, eval_data: Any) -> TrainingArguments:
    """Set up the processes, the output folder and the seeds; find what an interrupted run has left to go on with.

    Run by plain `python`, a script is the one process of a run of one.

    Args:
        train_data, eval_data: the rows, by which a run is known again; None where there are none.

    Returns:
        The arguments for the Trainer; `options.device` is this process's device from here on, `options.resume_from`
        the checkpoint to go on from or None, and SIGTERM is heeded.

    Raises:
        RuntimeError: when the libraries set up fewer processes than were started.
        UserError: the output folder holds another run; the checkpoint that was asked for is not whole.
    """
    if "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    uses_deepspeed = options.method in ("full", "frozen") and not options.eval_only
    if uses_deepspeed:
        # DeepSpeed compiles a small extension once, with the ninja installed beside this python
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    disable_progress_bar()  # transformers' own, over weights and files; ours are over examples and steps
    # of every group of processes: what the libraries make beside the first one, or on a CPU, they give no time limit
    limit = datetime.timedelta(minutes=options.timeout_minutes)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    on_cpu = options.device == "cpu"
    if not on_cpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    begin_group("gloo" if on_cpu else "nccl", limit)
    arguments = TrainingArguments(
        output_dir=str(options.output_dir),
        per_device_train_batch_size=1 if options.packs else options.batch_size_per_gpu,
        gradient_accumulation_steps=options.accumulation or 1,
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.learning_rate,
        weight_decay=options.wd,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type="linear",
        optim=options.optim,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        max_grad_norm=1.0,
        bf16=options.precision.name == "bf16",
        fp16=options.precision.name == "fp16",
        # Without it, processes on a CPU run side by side, each as the only one, and nobody is told.
        use_cpu=on_cpu,
        deepspeed=str(deepspeed_file(options)) if uses_deepspeed else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_num_workers=options.num_workers,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite is shown as it is
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        ddp_timeout=round(60 * options.timeout_minutes),
        report_to=options.report_to.split(","),
        disable_tqdm=True,  # ours is readable in a file too
        seed=options.seed,
    )
    options.device = arguments.device
    if arguments.world_size != options.num_processes or (options.num_processes > 1 and not dist.is_initialized()):
        raise RuntimeError(f"{options.num_processes} processes were started, {arguments.world_size} were set up")
    if options.dry_run:  # nothing else is written or looked at in the output folder
        options.output_dir = options.output_dir / f"dry_run{INCOMPLETE}"
    arguments.output_dir = str(options.output_dir)
    _prepare_output_folder(options)
    data = describe_data({"train": train_data, "evaluation": eval_data})
    options.resume_from = None
    if not options.eval_only:
        rows = {"train_rows": data["train"]["fingerprint"], "eval_rows": data["evaluation"]["fingerprint"]}
        options.resume_from = _find_what_to_resume(options, record_of(options, **rows))
    options.stopping = Stopping(options.grace_seconds)
    if not is_beside_a_run(options):
        write_facts(options, data)
    set_seed(options.seed)
    say(describe(options))
    rows = {"train": train_data, "evaluation": eval_data}
    say("; ".join(f"{use} data: {about['source']}, {len(rows[use])} rows" for use, about in data.items()))
    return arguments


def is_beside_a_run(options: argparse.Namespace) -> bool:
    """Whether this evaluates only, in the folder of a run, whose facts and report stay what they are."""
    return options.eval_only and (options.output_dir / RUN_RECORD).exists()


def _prepare_output_folder(options: argparse.Namespace) -> None:
    folder = options.output_dir

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not options.eval_only:
            _lock(folder)
        # also where an earlier dry run was killed
        begins_anew = (options.overwrite or options.dry_run) and not (options.eval_only or options.restarted)
        for path in files_of_run(folder) if begins_anew else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # nothing of the old run may be taken for the new's
            if path.parent != folder and not any(path.parent.iterdir()):
                path.parent.rmdir()
        if not options.eval_only:
            _forget_unbegun_run(folder)  # which was killed, or interrupted, or of which another process failed
            if not (folder / RUN_RECORD).exists():
                (folder / BAD_EXAMPLES).unlink(missing_ok=True)  # of a run that was refused
        if not options.eval_only and not options.restarted:
            (folder / LOCK).write_text(launcher() or "", encoding="utf-8")  # the lock is on the file as opened before
        (folder / SHARED_MARK).touch()

    on_first(prepare)
    if not (folder / SHARED_MARK).exists():
        raise UserError(f"--output_dir {folder} must lie on storage that all nodes share, to be read back")
    wait_for_all()
    if is_first_process():
        (folder / SHARED_MARK).unlink()


def forget_unbegun(options: argparse.Namespace) -> None:
    """Of a run that ends before it has done anything, remove the records (first process).

    Else other options, which its error may ask for, would be refused as those of another run. Pictures that an
    evaluation has kept for the report are nothing without it. The list of bad examples is for the user to read.
    """
    if not options.eval_only:
        _forget_unbegun_run(options.output_dir)
    if options.dry_run:
        _remove_dry_run(options.output_dir)


def _forget_unbegun_run(folder: Path) -> None:
    begun = [file for file in files_of_run(folder) if file.name != BAD_EXAMPLES]
    if all(file.name in (RUN_RECORD, RUN_FACTS) or file.parent.name == PICTURES for file in begun):
        for file in begun:
            file.unlink()
        with contextlib.suppress(OSError):
            (folder / PICTURES).rmdir()


def _remove_dry_run(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # on some network storage the lock's file stays while it is open
    with contextlib.suppress(OSError):  # where there was an output folder, it stays
        folder.parent.rmdir()


def _lock(folder: Path) -> None:
    """Let no other run write into the folder while this process lasts; one that is just ending is waited for."""
    file = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)  # left open
    for second in range(60):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if second == 0:
                say(f"waiting for the run that still uses {folder} to end")
            time.sleep(1)
        except OSError:  # storage without locks
            return
    raise UserError(f"--output_dir {folder} is in use by a run that has not ended: choose another, or end that first")


def _find_what_to_resume(options: argparse.Namespace, record: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, once the output folder's run is known to be this one."""
    folder = options.output_dir
    options.restarted = on_first(lambda: options.restarted)  # another node's own torchrun may be a new one
    since = on_first(lambda: (folder / LOCK).stat().st_mtime) if options.restarted else None
    remove_incomplete(folder)
    if options.resume not in ("auto", "never"):
        check_same_run(Path(options.resume).absolute().parent, record, may_begin=False)
    check_same_run(folder, record)
    undo_on_failure(functools.partial(forget_unbegun, options))  # now that the folder is known to be this run's
    checkpoint = checkpoint_to_resume(options.resume, folder, since)
    if options.resume not in ("auto", "never") and not options.restarted:
        forget_stages(folder, SAVED, "eval_after")  # of a later state of the run
    return checkpoint


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def describe(options: argparse.Namespace) -> str:
    """What is done how; for training a second line: how a step's batch is divided."""
    names = {
        "flash_attention_2": "flash-attn",
        "sdpa": "PyTorch's attention",
        BY_DOCUMENT: "PyTorch's attention, each document by itself",
    }
    implementation = options.attention if options.eval_only else attention_in_training(options)
    attention = names[implementation]
    if options.use_flash_attention and implementation == "sdpa":
        attention = "PyTorch's own flash kernel where no row is padded (flash-attn is not installed)"
    precision = options.precision.name
    if precision == "fp32":
        precision = "fp32 (no CUDA GPU)"
    how = f"on {options.device.type}, {precision}, {attention}"
    if options.eval_only:
        return f"{options.model_name_or_path}: evaluation {how}; output in {options.output_dir}"
    divided = f"{options.batch_size_per_gpu} at once x {options.accumulation} accumulated"
    if options.packs:
        divided = "packs without padding" + (", questions about one picture together" if options.share_images else "")
    return (
        f"{options.model_name_or_path}: {options.method} fine-tuning {how}\n"
        f"{options.batch_size} examples per step = {options.num_processes} processes x {divided}; "
        f"output in {options.output_dir}"
    )


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


class GlobalBatchSampler:
    """The micro-batches of one process; the global batches are the same however they are divided.

    An epoch is a shuffle that depends on the seed and the epoch alone, cut into global batches. The
    last one may hold fewer examples: it is filled up with examples of weight 0, and the weights of
    its own examples rise so that the step is still the mean over them. Every example is seen exactly
    once per epoch.

    Args:
        size: examples per epoch.
        batch_size: examples per global batch.
        at_once: examples per micro-batch and process.
        rank, world: this process and how many there are.
        seed: of the shuffle.
    """

    def __init__(self, size: int, batch_size: int, at_once: int, rank: int, world: int, seed: int) -> None:
        self.size, self.batch_size, self.at_once = size, batch_size, at_once
        self.rank, self.world, self.seed = rank, world, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose shuffle comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        global_batches = -(-self.size // self.batch_size)
        return global_batches * (self.batch_size // (self.at_once * self.world))

    def __iter__(self) -> Iterator[list[ExampleKey]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for start in range(0, self.size, self.batch_size):
            own = order[start : start + self.batch_size]
            weight = self.batch_size / len(own)
            keys = [ExampleKey(index, self.epoch, weight) for index in own]
            keys += [ExampleKey(own[0], self.epoch, 0.0)] * (self.batch_size - len(own))
            # micro-step by micro-step, process by process: (accumulation, world, at once)
            for micro_step in range(0, self.batch_size, self.at_once * self.world):
                first = micro_step + self.rank * self.at_once
                yield keys[first : first + self.at_once]


class _EpochLoader(torch.utils.data.DataLoader):
    """A loader that tells its batch sampler which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def rate_of(name: str, options: argparse.Namespace) -> str:
    """The option that holds a parameter's learning rate, by the parameter's name (an adapter's too)."""
    _, is_vision, inner = name.partition("vision_embed_tokens.")
    option = "vision_learning_rate" if inner.startswith("img_processor.") else "projector_learning_rate"
    return option if is_vision and getattr(options, option) is not None else "learning_rate"


class RecipeTrainer(WatchedTrainer):
    """The Trainer with this recipe's batches and learning rates, and speed and memory in its log."""

    def __init__(
        self,
        *,
        options: argparse.Namespace,
        batches: GlobalBatchSampler | PackedBatchSampler,
        bad_examples: BadExamples | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batches=batches, max_bad_steps=options.max_bad_steps, **kwargs)
        self.options, self.bad_examples = options, bad_examples
        self.rates: dict[str, float] = {}
        self._log_lags = False
        self._peak = 0.0
        self.start_counting()

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, each of its parameter groups (with and without weight decay) divided by rate.

        The scheduler multiplies every group's own rate; without the options the groups are the Trainer's, but for
        those that are too large for bitsandbytes.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((rate_of(name, self.options), name in decayed), []).append(parameter)
            # ZeRO-2 makes one tensor of a group, which one process has whole
            most = BITSANDBYTES_MOST if self.args.optim in BITSANDBYTES_OPTIMIZERS else float("inf")
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": getattr(self.options, rate),
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                        "rate": rate,
                    }
                    for rate, decays in sorted(groups, key=lambda key: (key[0] != "learning_rate", key[0], not key[1]))
                    for parameters in in_parts(groups[rate, decays], torch.nn.Parameter.numel, most)
                ],
                **arguments,
            )
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """Asked by the Trainer between a step and the scheduler's: note what the step's other rates were."""
        groups = self.optimizer.param_groups
        self.rates = {group["rate"]: group["lr"] for group in groups if group["rate"] != "learning_rate"}
        return super()._get_learning_rate()

    @property
    def weights_lie_in_pieces(self) -> bool:
        """Whether no process has the weights whole: ZeRO-3, once the engine is made."""
        return self.is_deepspeed_enabled and self.deepspeed.zero_optimization_stage() == 3

    def start_counting(self) -> None:
        """Begin a new stretch of the log."""
        self._examples = self._tokens = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def not_counted(self) -> Iterator[None]:
        """What is done within is no training, as an evaluation between two steps: neither its time counts nor, on a
        GPU, its memory."""
        began, self._peak = time.perf_counter(), max(self._peak, memory_peak())
        try:
            yield
        finally:
            forget_memory_peak()
            self._since += time.perf_counter() - began

    def _prepare_input(self, data: Any) -> Any:
        """To the device, in its own type: under DeepSpeed the Trainer would round the loss weights to half precision.

        The tower casts pixels to its own type itself.
        """
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """This process's micro-batches; not wrapped by accelerate, which would divide them again."""
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            multiprocessing_context=loader_context(self.args.dataloader_num_workers),
            worker_init_fn=outlive_stop_signals,
            # The Trainer takes all micro-batches of a step before it computes the first, so with fewer than those ready
            # every step would begin with a wait for the rest, while nothing is computed.
            prefetch_factor=prefetch_factor(self.args.gradient_accumulation_steps, self.args.dataloader_num_workers),
            pin_memory=torch.cuda.is_available(),
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of a step from the loader, the time that they are waited for counted, bad examples left
        out."""
        began = time.perf_counter()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._waited += time.perf_counter() - began
        if self.bad_examples is not None:
            self.bad_examples.leave_out(batches, self.state.global_step + 1, self.args.device)
        return batches, num_items

    def _maybe_log_save_evaluate(
        self, loss: torch.Tensor, grad_norm: Any, model: torch.nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """At the end of a step: with too many bad examples leave what was learnt in a checkpoint, and stop."""
        super()._maybe_log_save_evaluate(loss, grad_norm, model, trial, *args, **kwargs)
        if self.bad_examples is not None and self.bad_examples.excess() is not None:
            self._save_checkpoint(model, trial)
            self.bad_examples.check()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """Count what the step holds (fillers of the last batch are no examples), then take it."""
        self._examples += int((inputs["loss_weights"] > 0).sum())
        mask = inputs.get("attention_mask")  # packed rows have no padding and no mask
        self._tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add examples and tokens per second of all processes, and of the process that has most of it the share
        of the time spent waiting for data and training's peak of memory in GB."""
        if "loss" in logs:
            logs |= self.rates
            elapsed = time.perf_counter() - self._since
            counts = torch.tensor([self._examples, self._tokens], dtype=torch.float64, device=self.args.device)
            peak = max(self._peak, memory_peak())
            most = torch.tensor([self._waited, peak], dtype=torch.float64, device=self.args.device)
            if dist.is_initialized():
                dist.all_reduce(counts)
                dist.all_reduce(most, op=dist.ReduceOp.MAX)
            logs["examples_per_second"] = round(counts[0].item() / elapsed, 3)
            logs["tokens_per_second"] = round(counts[1].item() / elapsed, 1)
            logs["data_wait_share"] = round(most[0].item() / elapsed, 4)
            logs["memory_peak_gb"] = round(most[1].item(), 3)
            self.start_counting()
        if "train_runtime" in logs:
            if self._initial_global_step:
                logs["resumed_from_step"] = self._initial_global_step
            if self.options.packs:  # the Trainer takes packs for examples
                logs.pop("train_samples_per_second", None)
        try:
            super().log(logs, start_time)
        except OSError as error:  # of what reports elsewhere, as TensorBoard on a full disk: the run goes on
            say(f"step {self.state.global_step} is not reported everywhere: {error}")
        self.write_log()

    def write_log(self, whole: bool = False) -> None:
        """The newest line of the log to `train_log.jsonl`, or all of them, the step first; on a full disk later."""
        if not is_first_process():
            return
        whole = whole or self._log_lags
        try:
            with open(self.options.output_dir / "train_log.jsonl", "w" if whole else "a", encoding="utf-8") as file:
                for line in self.state.log_history if whole else self.state.log_history[-1:]:
                    file.write(json.dumps({"step": line["step"], **line}) + "\n")
            self._log_lags = False
        except OSError as error:
            if not self._log_lags:
                say(f"train_log.jsonl could not be written ({error}): its lines follow when they can be")
            self._log_lags = True


def memory_peak() -> float:
    """The most memory this process has held, in GB: the GPU's since `forget_memory_peak`, or without one the resident
    memory since the process began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def forget_memory_peak() -> None:
    """Let `memory_peak` begin anew with what the GPU's memory holds now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def run_vision_without_pictures(model: torch.nn.Module) -> None:
    """Let a training step on text alone add the sum of no features of a blank picture to the token embeddings.

    DDP and DeepSpeed wait for every trained parameter's gradient on every process, whatever one's
    examples hold. Under ZeRO-3 every process must also run the same modules in the same order, those
    that are frozen too, so this is called when the engine has placed its own hooks.
    """

    def with_blank_picture(decoder: Phi3VModel, arguments: tuple, keywords: dict[str, Any]) -> tuple | None:
        if not decoder.training or keywords.get("pixel_values") is not None or keywords.get("input_ids") is None:
            return None
        embeddings = decoder.embed_tokens(keywords["input_ids"])
        size = decoder.vision_embed_tokens.img_processor.vision_model.config.image_size
        blank = torch.zeros(2, 3, size, size, device=embeddings.device)  # a global view and one sub-image
        features = decoder.vision_embed_tokens(blank, torch.tensor([[size, size]]))
        # the sum of none of them is 0, also where one is not finite, and has a gradient of 0
        embeddings = embeddings + features[:0].sum().to(embeddings.dtype)
        return arguments, {**keywords, "input_ids": None, "inputs_embeds": embeddings}

    for module in model.modules():
        if isinstance(module, Phi3VModel):
            module.register_forward_pre_hook(with_blank_picture, with_kwargs=True)


class _WhileTraining(TrainerCallback):
    """What happens beside the steps: the check that DeepSpeed really runs, evaluation every so often."""

    def __init__(self, options: argparse.Namespace, evaluate: Callable[[argparse.Namespace, str], Any]) -> None:
        self.options, self.evaluate = options, evaluate
        self.trainer: RecipeTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say(f"{len(self.trainer.train_dataset)} examples in an epoch, {state.max_steps} steps")
        if state.max_steps <= args.warmup_steps and not self.options.dry_run:
            highest = args.learning_rate * (state.max_steps - 1) / args.warmup_steps
            say(
                f"--warmup_steps {args.warmup_steps} leave no step of {state.max_steps} at --learning_rate "
                f"{args.learning_rate:g}: the highest is {highest:.3g}"
            )
        forget_memory_peak()  # of loading, and of the evaluation before
        self.trainer.start_counting()
        wrapper = type(self.trainer.model_wrapped).__name__
        expected = "DeepSpeedEngine" if self.options.method in ("full", "frozen") else "DistributedDataParallel"
        if wrapper != expected and (self.options.num_processes > 1 or expected == "DeepSpeedEngine"):
            raise RuntimeError(f"the model is wrapped as {wrapper}; {self.options.method} training needs {expected}")
        if not self.options.freeze_vision_model or self.trainer.weights_lie_in_pieces:
            run_vision_without_pictures(self.trainer.model)
        # a run that goes on forgets what it had logged after its checkpoint
        self.trainer.write_log(whole=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_due = self.options.eval_steps and state.global_step % self.options.eval_steps == 0
        if is_due and not self.options.stopping.agreed(args.device):  # told to stop, it has the time to save, no more
            self.trainer.watchdog.begin("evaluation", f"the evaluation after step {state.global_step}", "evaluating")
            try:
                with self.trainer.not_counted(), using_attention(self.trainer.model, self.options.attention):
                    totals = self.evaluate(self.options, f"eval_step_{state.global_step}")
                scores = {name: value for name, value in totals.items() if isinstance(value, int | float)}
                wants_log = control.should_log
                self.trainer.log({f"eval_{name}": value for name, value in scores.items()})
                control.should_log = wants_log  # the step's own line, for which the Trainer would take this one
            except ToldToStopError:  # the step is saved next, and the processes end
                say(f"the evaluation after step {state.global_step} is given up")
            except NotWrittenError as error:  # as on a full disk: the run goes on
                say(f"the evaluation after step {state.global_step} is lost: {error}")


def train(
    model: torch.nn.Module,
    processor: Phi3VProcessor,
    dataset: ExampleDataset,
    arguments: TrainingArguments,
    options: argparse.Namespace,
    evaluate: Callable[..., Any],
    *eval_data: Any,
) -> RecipeTrainer:
    """Train, from the checkpoint of an interrupted run where there is one; the log goes to the screen and to
    `train_log.jsonl`. With `--dry_run` the process ends after one step.

    Args:
        evaluate: the script's own, called every `--eval_steps` steps with model, processor, `eval_data`, options and
            a name.

    Returns:
        The Trainer, with what `save` needs.

    Raises:
        SystemExit: with code 143, once a step is finished and saved after SIGTERM or SIGUSR1.
        UserError: `--max_bad_steps` steps in a row whose loss or gradient norm is not finite.
    """
    config, bad_examples = causal_lm_of(model).config, None
    dataset.max_tokens = config.max_position_embeddings
    if options.bad_examples == "skip":
        bad_examples = bad_examples_of(dataset, options)
        bad_examples.check()
    batches = make_batches(dataset, processor, arguments, options, config, bad_examples)
    callback = _WhileTraining(options, functools.partial(evaluate, model, processor, *eval_data))
    trainer = RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=make_collator(processor, options, config),
        options=options,
        batches=batches,
        bad_examples=bad_examples,
        write_model=functools.partial(write_model, model, processor),
        stopping=options.stopping,
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingProgress(options.tqdm))
    if options.resume_from is not None:
        say(f"going on from {options.resume_from}")
    with using_attention(model, attention_in_training(options)):
        trainer.train(resume_from_checkpoint=options.resume_from and str(options.resume_from))
    if options.dry_run:
        _end_dry_run(options)
    return trainer


def _end_dry_run(options: argparse.Namespace) -> None:
    """Leave nothing behind."""
    on_first(functools.partial(_remove_dry_run, options.output_dir))
    say("dry run: one step is taken, nothing is written")
    sys.exit(0)


def bad_examples_of(dataset: ExampleDataset, options: argparse.Namespace) -> BadExamples:
    """What a run that leaves bad examples out has left out so far; where too many, without those mended (together)."""
    dataset.skips_bad = True
    bad_examples = BadExamples(options.output_dir, len(dataset), options.max_bad_fraction)
    if bad_examples.excess() is not None:
        bad_examples.try_again(lambda index, epoch: "problem" in dataset[ExampleKey(index, epoch, 1.0)])
    return bad_examples


def look_at_all(
    dataset: ExampleDataset,
    processor: Phi3VProcessor,
    options: argparse.Namespace,
    config: Phi3VConfig,
    looked_at: int,
    decoded: int,
) -> None:
    """Look at every example that the run will draw, before weights are loaded (together).

    None is where the run has been trained already. Where rows are not packed, and so need not be measured, none is
    either where it goes on from a checkpoint, or leaves bad examples out, for it does so when they are drawn.

    Args:
        dataset: where rows are packed it gets what `make_batches` needs; for that all examples are measured.
        looked_at, decoded: of how many examples what is drawn in the first epoch has been measured, and decoded.

    Raises:
        UserError: an example that cannot be made or that is too long, unless such are left out, which is noted in the
            output folder, and they are no more than `--max_bad_fraction`; one with more than `--max_tokens_per_gpu`.
    """
    if on_first(lambda: SAVED in (read_json(options.output_dir / STAGES) or {})):
        return
    dataset.max_tokens, dataset.skips_bad = config.max_position_embeddings, options.bad_examples == "skip"
    size, epochs = len(dataset), _epochs(len(dataset), options)
    begins = options.resume_from is None and not dataset.skips_bad
    decodes = begins and options.check_images and decoded < size
    how = (options.num_workers, options.tqdm, decodes)
    if options.packs:
        questions = measure_questions(dataset, processor, config.original_max_position_embeddings, epochs, *how)
        if options.max_tokens_per_gpu is not None:
            check_fits(questions, options.max_tokens_per_gpu)
        if dataset.skips_bad:
            bad_examples = bad_examples_of(dataset, options)
            bad_examples.add(questions.problems, step=0)
            bad_examples.check()
        dataset.measured = questions
    elif begins and (decodes or looked_at < size or epochs > 1):
        drawn = examples_drawn(size, options)
        size = len(drawn)
        check_examples(drawn, dataset, processor, *how)
    else:
        return
    say(f"checked: the {'pictures and the ' if decodes else ''}lengths of {size} examples")


def examples_drawn(size: int, options: argparse.Namespace) -> dict[int, Sequence[int]]:
    """Of so many examples those that an unpacked run draws, `--max_steps` considered, and in which epochs.

    Of a dry run all that may be drawn.
    """
    if not options.max_steps or options.dry_run:
        return dict.fromkeys(range(size), range(_epochs(size, options)))
    batches = GlobalBatchSampler(size, options.batch_size, options.batch_size, 0, 1, options.seed)
    drawn: dict[int, list[int]] = {}
    for epoch in range(_epochs(size, options)):
        batches.set_epoch(epoch)
        for keys in itertools.islice(batches, options.max_steps - epoch * len(batches)):
            for index in {key.index for key in keys}:
                drawn.setdefault(index, []).append(epoch)
    return dict(sorted(drawn.items()))


def make_batches(
    dataset: ExampleDataset,
    processor: Phi3VProcessor,
    arguments: TrainingArguments,
    options: argparse.Namespace,
    config: Phi3VConfig,
    bad_examples: BadExamples | None = None,
) -> GlobalBatchSampler | PackedBatchSampler:
    """This process's micro-batches; where rows are packed, `arguments` are told how many make a step.

    Args:
        bad_examples: where those that are found when tokens are counted are noted; no batch has them.

    Raises:
        UserError: an example with more than `--max_tokens_per_gpu`; too many bad examples.
    """
    rank, world = arguments.process_index, arguments.world_size
    if not options.packs:
        at_once = options.batch_size_per_gpu
        return GlobalBatchSampler(len(dataset), options.batch_size, at_once, rank, world, options.seed)
    threshold = config.original_max_position_embeddings
    epochs, questions = _epochs(len(dataset), options), dataset.measured
    dataset.measured = None  # the loader's workers would hold it, too
    if questions is None:
        questions = measure_questions(dataset, processor, threshold, epochs, options.num_workers, options.tqdm)
    if bad_examples is not None:
        bad_examples.add(questions.problems, step=0)
        bad_examples.check()
    most = options.max_tokens_per_gpu or options.batch_size_per_gpu * questions.longest_picture()
    batches = PackedBatchSampler(questions, options.batch_size, most, rank, world, options.seed, epochs)
    set_accumulation(arguments, batches.micro_steps)
    good = [picture for number, picture in enumerate(questions.pictures) if number not in questions.bad]
    pictures = f" about {len(set(good))} pictures" if options.share_images else ""
    excess = 100 * batches.spread(0)
    say(
        f"{len(good)} examples{pictures} in an epoch; a step is {world} processes x {batches.micro_steps} packs "
        f"of at most {most} tokens; the fullest process has {excess:.1f} % more than an equal share"
    )
    return batches


def _epochs(size: int, options: argparse.Namespace) -> int:
    """How many epochs of so many examples the run begins."""
    if not options.max_steps:
        return options.num_train_epochs
    return -(-options.max_steps // -(-size // options.batch_size))


def set_accumulation(arguments: TrainingArguments, micro_steps: int) -> None:
    """Tell the Trainer and DeepSpeed, after their arguments were made, how many micro-batches make a step."""
    arguments.gradient_accumulation_steps = micro_steps
    if arguments.deepspeed_plugin is not None:  # made anew, as `TrainingArguments` itself does
        arguments.hf_deepspeed_config = HfTrainerDeepSpeedConfig(arguments.deepspeed)
        arguments.hf_deepspeed_config.trainer_config_process(arguments)
        arguments.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=arguments.hf_deepspeed_config)


def make_collator(
    processor: Phi3VProcessor, options: argparse.Namespace, config: Phi3VConfig
) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    """Encoded examples, or groups of them about the same pictures -> a padded batch, or a packed row."""
    if not options.packs:
        return lambda encoded: collate(processor, encoded)
    threshold = config.original_max_position_embeddings

    def collate_groups(groups: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        documents = [share_pictures(group, config.image_token_id, threshold) for group in groups]
        return pack([document for each in documents for document in each])

    return collate_groups


def attention_in_training(options: argparse.Namespace) -> str:
    """transformers' name of the attention that trains; evaluation has `options.attention`."""
    if not options.packs:
        return options.attention
    return attention_for_packing(options.attention, options.share_images)


@contextlib.contextmanager
def using_attention(model: torch.nn.Module, implementation: str) -> Iterator[None]:
    """Let the decoder use an implementation of attention for a while."""
    config = causal_lm_of(model).config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


SAVED = "save"  # the stage of a run
BEGAN = time.perf_counter()  # about when the process did


def write_model(
    model: torch.nn.Module, processor: Phi3VProcessor, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write what loads as a checkpoint: the weights or the adapter, configuration, processor and tokenizer.

    Args:
        model: as it was prepared for training.
        folder: that is there.
        state_dict: the weights, where the model's own lie in pieces.
    """
    if isinstance(model, PeftModel):
        # `lm_head` is a LoRA target; without this PEFT would also store the whole base `lm_head`
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        # the base's configuration tells the Auto classes, also the tokenizer's, what model this is
        base = model.peft_config["default"]
        config = Phi3VConfig.from_pretrained(base.base_model_name_or_path, revision=base.revision)
        config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


def is_saved(options: argparse.Namespace) -> bool:
    """Whether this run, before it was interrupted, has trained and saved to the end, and the files are unchanged."""
    saved = is_finished(options.output_dir, SAVED)
    if saved:
        say("trained and saved already")
    return saved


def once(evaluate: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Evaluate, unless this run did so before it was interrupted: then its file is read.

    Args:
        evaluate: the script's own.
        arguments: its arguments, the last two the options and a name: `<name>.json` is written; with
            `--eval_only` always, and it is `eval_only.json`, with the report beside it if no run's is there.

    Returns:
        The totals.
    """
    *others, options, name = arguments
    if options.eval_only:
        totals = evaluate(*others, options, "eval_only")
        if not is_beside_a_run(options):
            write_report(options)
        return totals
    if options.dry_run:
        return evaluate(*arguments)
    if is_finished(options.output_dir, name):
        return on_first(lambda: read_json(options.output_dir / f"{name}.json"))
    totals = evaluate(*arguments)
    finish_stage(options.output_dir, name, [f"{name}.json"])
    return totals


def save(trainer: RecipeTrainer, options: argparse.Namespace) -> None:
    """Write a complete checkpoint into the output folder, whole files only, and let go of what has trained.

    Raises:
        UserError: when the disk is full or fails.
    """
    folder, beside = options.output_dir, options.output_dir / f"model{INCOMPLETE}"
    state_dict = None
    if trainer.weights_lie_in_pieces:
        state_dict = trainer.accelerator.get_state_dict(trainer.deepspeed)  # on every process

    def write() -> list[str]:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        trainer.write_model(beside, state_dict)
        names = list_files(beside)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, folder / name)
        shutil.rmtree(beside)
        return names

    trainer.write_log(whole=True)
    try:
        # PEFT's README.md is left out, for the model card takes its place
        finish_stage(folder, SAVED, [name for name in on_first(write) if name != "README.md"])
    except NotWrittenError as error:
        left = [path.name for path in checkpoints_in(folder)][:1] or ["the beginning"]
        raise UserError(
            f"the trained model could not be written to {folder} ({error}): make room and start {command_to_go_on()} "
            f"again, which goes on from {left[0]}"
        ) from error
    free_memory(trainer)


def finish(
    options: argparse.Namespace,
    train_data: Any,
    eval_data: Any,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    task: str,
    metrics: Mapping[str, str],
) -> None:
    """Say what the run has come to; write its report and the model's card; upload the model where that is asked for.

    Args: as `write_model_card` has them.
    """
    for metric, name in metrics.items():
        if None not in (before[metric], after[metric]):
            was, became = before[metric], after[metric]
            say(f"gain:            {name} {became - was:+.4f}, from {was:.4f} to {became:.4f}")
    write_model_card(options, train_data, eval_data, before, after, task, metrics)
    write_report(options)
    push_to_hub(options)
    if is_first_process():
        lines = []
        with contextlib.suppress(UserError):  # of a damaged log, which the report has told
            lines = read_log(options.output_dir / "train_log.jsonl")
        speeds = [line["examples_per_second"] for line in lines if "examples_per_second" in line]
        memory = max((line["memory_peak_gb"] for line in lines if "memory_peak_gb" in line), default=0.0)
        if speeds:
            steps, speed = lines[-1]["step"], statistics.median(speeds)
            say(f"trained:         {steps} steps, {speed:.3g} examples/s, at most {memory:.1f} GB a process")
        since = ", since this start" if options.resume_from else ""
        say(f"duration:        {in_time(time.perf_counter() - BEGAN)}, evaluations and all{since}")
        say(f"model and files: {options.output_dir}")
        command = f"python -m tools.predict{precision_options(options)} --checkpoint {options.output_dir}"
        say(f'to try it:       {command} --image FILE --question "…"')


def free_memory(trainer: RecipeTrainer) -> None:
    """Let go of the model, the optimizer and the engine, which `load_model` collects."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = trainer.deepspeed = None
    trainer.write_model = None  # which holds the model too
    handler = trainer.callback_handler
    handler.model = handler.optimizer = handler.lr_scheduler = handler.train_dataloader = None
    for callback in handler.callbacks:
        if isinstance(callback, _WhileTraining):
            callback.evaluate = None  # likewise
