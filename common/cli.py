"""The options that all scripts share, in groups; their validation, all problems reported at once.

A script adds its own options to the parser that `make_parser` returns and calls `parse_options`,
which checks every option before anything is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_flash_attn_2_available

from .errors import OptionsError, RightOptions, UserError, is_first_process, note_options, raise_all
from .facts import RUN_FACTS, note_origins
from .launcher import launcher
from .model_card import push_problems
from .phi3v.stock import OLDEST_LIGER, find_fused_cross_entropy

MAX_NUM_CROPS = 16
MAX_NEW_TOKENS = 64  # of an answer that is evaluated, as published
MAX_BAD_FRACTION = 0.01
MOST = 2**31 - 1  # of any number; what is beyond it, the libraries do not take for a seed, a size or a time
DEEPSPEED = "ds_configs/zero2.json"  # what full and frozen-vision fine-tuning run under
# What DeepSpeed's files leave to the options, beside the precision.
DEEPSPEED_AUTO = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)

# AdamW as the Trainer names its kinds; of those of bitsandbytes some keep their state in 8 bits, some outside the GPU.
BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
# Elements of a tensor at most, for its kernels are told how many in 32 bits; ZeRO-2 pads a group by a few.
BITSANDBYTES_MOST = 2**31 - 2**16
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", *BITSANDBYTES_OPTIMIZERS)
CHECKPOINTING = ("none", "selective", "full")

# Learning rates of parts of the model: the tower; the projection and the separators.
PART_LEARNING_RATES = ("vision_learning_rate", "projector_learning_rate")

# Options that name a hub id or a path, and those that name a path only.
SOURCES = ("data_dir", "train_data", "eval_data", "model_name_or_path")
PATHS = (*SOURCES, "output_dir", "deepspeed", "resume")

# What a run leaves in its output folder; one of them there means that a run has used it.
RUN_RECORD = "run.json"  # by which it is known again, when the same command is started once more
LOCK = ".in_use"  # held while a run lasts; says which torchrun started it last
BAD_EXAMPLES = "bad_examples.jsonl"  # what --bad_examples skip has left out
RUN_FILES = (
    *(RUN_RECORD, "stages.json", RUN_FACTS, "report.html", "report_images/*.jpg", "plots/*.png"),
    *("eval_before.json", "eval_after.json", "eval_step_*.json", "train_log.jsonl"),
    BAD_EXAMPLES,
    *("eval_only.json", "confusion_*.png", "report_comparison.html", "runs/*/events.out.tfevents.*"),
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "checkpoint-*"),
)


@dataclass(frozen=True)
class Precision:
    """What the weights are kept in and what the computation runs in.

    Attributes:
        name: "bf16", "fp16" or "fp32".
        weights: of the model as loaded.
        autocast: the computation's, where it differs from the weights'; else None.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None


def make_parser(description: str, num_crops: int = MAX_NUM_CROPS) -> argparse.ArgumentParser:
    """The parser with the shared options; names and defaults are the published recipe's.

    Args:
        description: of the script, for `--help`.
        num_crops: the script's default for `--num_crops`.
    """
    parser = argparse.ArgumentParser(
        usage="torchrun --nproc_per_node=<GPUs> %(prog)s [options]",
        description=description,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34),  # one line an option
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model and method")
    model.add_argument(
        "--model_name_or_path",
        default="microsoft/Phi-3.5-vision-instruct",
        metavar="NAME",
        help="hub id or folder, also of an adapter (%(default)s)",
    )
    model.add_argument("--revision", metavar="COMMIT", help="commit, branch or tag of a hub id (main)")
    model.add_argument("--use_lora", action="store_true", help="train low-rank adapters, not the weights")
    model.add_argument("--use_qlora", action="store_true", help="adapters over weights quantised to NF4")
    model.add_argument("--lora_rank", type=int, default=64, metavar="N", help="(%(default)s)")
    model.add_argument(
        "--lora_alpha_ratio", type=float, default=2, metavar="X", help="alpha is rank x ratio (%(default)s)"
    )
    model.add_argument("--lora_dropout", type=float, default=0.0, metavar="X", help="(%(default)s)")
    model.add_argument(
        "--freeze_vision_model",
        action="store_true",
        help="leave tower, projection, separators and token embeddings as they are",
    )
    model.add_argument("--bf16", action="store_true", help="bfloat16 (else float16; on a CPU float32)")
    model.add_argument(
        "--use_flash_attention", action="store_true", help="flash-attn where installed, else PyTorch's flash kernel"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", metavar="DIR", help="a local copy of the data, instead of the hub")
    data.add_argument(
        "--num_crops",
        type=int,
        default=num_crops,
        metavar="N",
        help=f"most sub-images per picture, 1 to {MAX_NUM_CROPS} (%(default)s)",
    )
    data.add_argument(
        "--bad_examples",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about unusable ones (%(default)s)",
    )
    data.add_argument(
        "--max_bad_fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        metavar="X",
        help="with more of them the run ends (%(default)s)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", default="./output/", metavar="DIR", help="(%(default)s)")
    training.add_argument(
        "--batch_size", type=int, default=16, metavar="N", help="examples per step, all GPUs (%(default)s)"
    )
    training.add_argument(
        "--batch_size_per_gpu", type=int, default=1, metavar="N", help="examples at once on a GPU (%(default)s)"
    )
    training.add_argument("--num_train_epochs", type=int, default=1, metavar="N", help="(%(default)s)")
    training.add_argument("--max_steps", type=int, metavar="N", help="stop after so many, whatever the epochs")
    training.add_argument("--learning_rate", type=float, default=4e-5, metavar="X", help="the peak (%(default)s)")
    training.add_argument(
        "--warmup_steps", type=int, default=50, metavar="N", help="steps to reach the peak (%(default)s)"
    )
    training.add_argument("--wd", type=float, default=0.01, metavar="X", help="weight decay (%(default)s)")
    training.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of data order, draws and adapters (%(default)s)"
    )
    checkpoints = parser.add_argument_group("checkpoints and resuming (docs/reliability.md)")
    checkpoints.add_argument(
        "--save_steps", type=int, default=100, metavar="N", help="steps between two checkpoints (%(default)s)"
    )
    checkpoints.add_argument(
        "--save_total_limit", type=int, default=2, metavar="N", help="checkpoints that are kept (%(default)s)"
    )
    checkpoints.add_argument(
        "--resume", default="auto", metavar="HOW", help="auto: from the newest whole checkpoint; never; its folder"
    )
    checkpoints.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    checkpoints.add_argument("--dry_run", action="store_true", help="check all, take one step, write nothing")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--eval_only", action="store_true", help="evaluate --model_name_or_path and stop")
    evaluation.add_argument("--eval_steps", type=int, metavar="N", help="also evaluate every so many steps")
    evaluation.add_argument("--eval_limit", type=int, metavar="N", help="evaluate the first so many examples only")
    evaluation.add_argument(
        "--max_new_tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="of an answer (%(default)s)"
    )
    speed = parser.add_argument_group("speed and memory (docs/speed.md)")
    speed.add_argument(
        "--max_tokens_per_gpu",
        type=int,
        metavar="N",
        help="packed without padding, at most so many tokens at once on a GPU; instead of --batch_size_per_gpu",
    )
    speed.add_argument("--max_crops_per_call", type=int, metavar="N", help="sub-images in the tower at once (all)")
    speed.add_argument(
        "--gradient_checkpointing",
        choices=CHECKPOINTING,
        default="full",
        help="layers computed again in the backward pass: all, every second, none (%(default)s)",
    )
    speed.add_argument(
        "--no-gradient_checkpointing",
        dest="gradient_checkpointing",
        action="store_const",
        const="none",
        help="the same as --gradient_checkpointing none",
    )
    speed.add_argument(
        "--optim",
        choices=OPTIMIZERS,
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)} (adamw_torch_fused; on a CPU adamw_torch)",
    )
    speed.add_argument(
        "--use_liger", action=argparse.BooleanOptionalAction, help="Liger's kernels (on CUDA, where installed)"
    )
    speed.add_argument("--torch_compile", action="store_true", help="compile the decoder's and the tower's layer")
    parser.set_defaults(share_images=False)  # an option of the scripts whose pictures have several questions
    rare = parser.add_argument_group("rarely needed")
    rare.add_argument(
        "--vision_learning_rate", type=float, metavar="X", help="the tower's peak, instead of --learning_rate"
    )
    rare.add_argument(
        "--projector_learning_rate", type=float, metavar="X", help="the projection's and separators' peak"
    )
    rare.add_argument("--deepspeed", metavar="JSON", help=f"configuration of full fine-tuning ({DEEPSPEED})")
    rare.add_argument(
        "--eval_batch_size_per_gpu", type=int, default=4, metavar="N", help="prompts generated at once (%(default)s)"
    )
    rare.add_argument("--num_workers", type=int, default=4, metavar="N", help="loader processes per GPU (%(default)s)")
    rare.add_argument(
        "--grace_seconds", type=float, default=25, metavar="X", help="to end after SIGTERM or SIGUSR1 (%(default)s)"
    )
    rare.add_argument(
        "--timeout_minutes", type=float, default=10, metavar="X", help="for other processes to answer (%(default)s)"
    )
    rare.add_argument(
        "--max_bad_steps", type=int, default=3, metavar="N", help="stop after so many not finite in a row (%(default)s)"
    )
    rare.add_argument(
        "--logging_steps", type=int, default=10, metavar="N", help="steps between two lines of the log (%(default)s)"
    )
    rare.add_argument(
        "--report_to", default="none", metavar="NAMES", help="tensorboard, wandb, trackio: by comma (%(default)s)"
    )
    rare.add_argument(
        "--check_images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every picture to train on before the start (yes)",
    )
    rare.add_argument(
        "--report_images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the evaluated pictures in the output folder, for report.html to show (yes)",
    )
    rare.add_argument("--push_to_hub", metavar="NAME/MODEL", help="upload model and card, privately")
    rare.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="no progress bars")
    return parser


def parse_options(
    parser: argparse.ArgumentParser,
    flash_attention_implies_bf16: bool = False,
    needed: Mapping[str, str] = MappingProxyType({}),
) -> argparse.Namespace:
    """Parse, fill in what one option implies of another, and check every option.

    Args:
        flash_attention_implies_bf16: as published for NLVR2 and UCF-101.
        needed: options that must be given, each with what it is, for the message.

    Returns:
        The options, with `precision`, `method`, `num_processes`, `attention`, `device`, `packs` (rows
        are packed: --share_images or --max_tokens_per_gpu), `accumulation` (micro-steps per step; None
        where rows are packed, for it depends on the data) and `restarted` (by torchrun, after a failure)
        added.

    Raises:
        UserError: with all problems at once, before anything is loaded.
    """
    parser.error = _raise_user_error
    for kind in (int, float):
        parser.register("type", kind, functools.partial(_read_number, kind))
    choices = _leave_choices_unchecked(parser)
    options, unknown = parser.parse_known_args()
    problems = _unknown_option_problems(unknown, parser)
    for name, value in vars(options).items():
        if isinstance(value, _NoNumber):
            problems.append(f"--{name} {value}: it must be a {'whole ' if value.kind is int else ''}number")
            setattr(options, name, parser.get_default(name))  # so that the other options can be checked
        elif name in PATHS and value == "":
            problems.append(f"--{name} is given and empty: name something, or leave the option out")
        elif value is not None and value not in choices.get(name, [value]):
            problems.append(f"--{name} {value}: it is one of {', '.join(choices[name])}")
            setattr(options, name, parser.get_default(name))
    options.use_lora = options.use_lora or options.use_qlora
    if options.use_flash_attention and flash_attention_implies_bf16:
        options.bf16 = True
    options.num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.method = _method(options)
    options.precision = choose_precision(options)
    options.packs = options.share_images or options.max_tokens_per_gpu is not None
    for name in PATHS:  # a shell leaves the ~ of --data_dir=~/pages as it is
        if getattr(options, name, None):
            setattr(options, name, os.path.expanduser(getattr(options, name)))
    options.output_dir = Path(options.output_dir)
    options.restarted = is_restarted(options.output_dir)
    problems += [f"--{name} is needed: {what}" for name, what in needed.items() if getattr(options, name) is None]
    problems += _number_problems(options) + _device_problems(options) + _file_problems(options)
    problems += push_problems(options.push_to_hub)
    options.attention = choose_attention(options)
    if options.use_liger is None:
        options.use_liger = options.device == "cuda" and liger_is_installed()
    if options.optim is None:
        options.optim = "adamw_torch_fused" if options.device == "cuda" else "adamw_torch"
    _raise_options_error(problems, options)
    note_origins(options, parser)
    at_once = options.num_processes * options.batch_size_per_gpu
    options.accumulation = None if options.packs else options.batch_size // at_once
    if options.dry_run:  # a batch to evaluate, a step to train
        at_once = options.num_processes * options.eval_batch_size_per_gpu
        options.eval_limit, options.max_steps, options.eval_steps = min(options.eval_limit or at_once, at_once), 1, None
        options.report_to = "none"  # which may write elsewhere
    note_options(options)
    return options


def _unknown_option_problems(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    if not words:
        return []
    known = [name for name in parser._option_string_actions if name.startswith("--") and name != "--help"]
    given = [word.partition("=")[0] for word in words if word.startswith("-")]
    near = [name for word in given for name in difflib.get_close_matches(word, known, 1)]
    meant = f"; meant may be {', '.join(dict.fromkeys(near))}" if near else ""
    return [f"{' '.join(words)}: there is no such option (--help lists them{meant})"]


def _raise_user_error(message: str) -> NoReturn:
    """Instead of argparse's own way out, which prints the whole usage, once for every process."""
    raise UserError(f"{message} (--help lists the options)")


def _leave_choices_unchecked(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """The options' choices, which argparse is made to show but not to check: its own error would be the only one."""
    choices = {}
    for action in parser._actions:
        if action.choices is not None:
            choices[action.dest] = list(action.choices)
            action.metavar = action.metavar or "{" + ",".join(action.choices) + "}"
            action.choices = None
    return choices


def _raise_options_error(problems: Sequence[str], options: argparse.Namespace) -> None:
    """Raise what is wrong, if anything is; later checks may rely on the options that no problem names."""
    try:
        raise_all(problems)
    except UserError as error:
        named = {name for problem in problems for name in re.findall(r"--(\w+)", problem)}
        raised = OptionsError(str(error), problems=error.problems)
        raised.options = RightOptions(**{name: value for name, value in vars(options).items() if name not in named})
        raise raised from None


class _NoNumber(str):
    """What stands in a number's place; argparse's own error would be the only one told."""

    kind: type


def _read_number(kind: type, text: str) -> float | _NoNumber:
    try:
        return kind(text)
    except ValueError:
        wrong = _NoNumber(text)
        wrong.kind = kind
        return wrong


def _method(options: argparse.Namespace) -> str:
    if options.use_qlora:
        return "qlora"
    if options.use_lora:
        return "lora"
    return "frozen" if options.freeze_vision_model else "full"


def choose_precision(options: argparse.Namespace) -> Precision:
    """Full fine-tuning keeps half-precision weights (ZeRO holds float32 masters of them); adapters keep the
    base in bfloat16, or in float32 under float16 autocast, whose scaler needs float32 gradients."""
    if options.bf16:
        return Precision("bf16", torch.bfloat16, torch.bfloat16 if options.use_lora else None)
    if options.device == "cpu":
        return Precision("fp32", torch.float32, None)
    if options.use_lora:
        return Precision("fp16", torch.float32, torch.float16)
    return Precision("fp16", torch.float16, None)


def choose_attention(options: argparse.Namespace) -> str:
    """The attention implementation for transformers: flash-attn where asked for and installed, else sdpa."""
    if not options.use_flash_attention:
        return "sdpa"
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def liger_is_installed() -> bool:
    """Whether there is a liger-kernel that is new enough."""
    return find_fused_cross_entropy("cuda") is not None


def _number_problems(options: argparse.Namespace) -> list[str]:
    problems = []
    if not 1 <= options.num_crops <= MAX_NUM_CROPS:
        problems.append(f"--num_crops {options.num_crops}: it must be 1 to {MAX_NUM_CROPS}")
    at_least_one = ("batch_size", "batch_size_per_gpu", "num_train_epochs", "lora_rank", "logging_steps")
    at_least_one += ("max_tokens_per_gpu", "max_crops_per_call", "eval_batch_size_per_gpu")
    at_least_one += ("save_steps", "save_total_limit", "max_bad_steps", "max_new_tokens")
    for name in (*at_least_one, "max_steps", "eval_steps", "eval_limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: it must be at least 1")
    for name in ("warmup_steps", "wd", "num_workers", "seed"):
        if not 0 <= getattr(options, name) < float("inf"):
            problems.append(f"--{name} {getattr(options, name)}: it must not be negative")
    for name in ("learning_rate", "lora_alpha_ratio", "grace_seconds", "timeout_minutes", *PART_LEARNING_RATES):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"--{name} {value}: it must be above 0")
    if not 0 <= options.max_bad_fraction < 1:
        problems.append(f"--max_bad_fraction {options.max_bad_fraction}: it must be at least 0 and under 1")
    if options.bad_examples != "skip" and options.max_bad_fraction != MAX_BAD_FRACTION:
        problems.append(
            f"--max_bad_fraction {options.max_bad_fraction} is for --bad_examples skip: add that, or leave it out"
        )
    if options.eval_only and options.push_to_hub:
        problems.append(
            f"--push_to_hub {options.push_to_hub} uploads what is trained, and --eval_only trains nothing: leave one "
            "of them out"
        )
    if options.dry_run and options.resume not in ("auto", "never"):
        problems.append(
            f"--dry_run takes the first step, and --resume {options.resume} later ones: leave one of them out"
        )
    if options.dry_run and options.eval_only:
        problems.append("--dry_run tries out training, and --eval_only leaves it out: leave one of them out")
    if options.freeze_vision_model:
        given = [f"--{name}" for name in PART_LEARNING_RATES if getattr(options, name) is not None]
        problems += [f"{name} is of what --freeze_vision_model does not train: leave one of them out" for name in given]
    for name, value in vars(options).items():
        if isinstance(value, int | float) and MOST < value < float("inf"):
            problems.append(f"--{name} {value}: it must be at most {MOST}")
    if 0 < options.lora_rank <= MOST and 0 < options.lora_alpha_ratio <= MOST:
        alpha = round(options.lora_rank * options.lora_alpha_ratio)
        if alpha < 1:
            problems.append(
                f"--lora_rank {options.lora_rank} x --lora_alpha_ratio {options.lora_alpha_ratio} gives alpha {alpha}: "
                "adapters of alpha 0 learn nothing; raise the ratio"
            )
    if not 0 <= options.lora_dropout < 1:
        problems.append(f"--lora_dropout {options.lora_dropout}: it must be at least 0 and under 1")
    if options.max_tokens_per_gpu is not None and options.batch_size_per_gpu != 1:
        problems.append(
            f"--max_tokens_per_gpu {options.max_tokens_per_gpu} and --batch_size_per_gpu {options.batch_size_per_gpu} "
            "both say what goes through a GPU at once: leave one of them out"
        )
    at_once = options.num_processes * options.batch_size_per_gpu
    divides = not (options.packs or options.eval_only)
    if divides and options.batch_size > 0 and at_once > 0 and options.batch_size % at_once:
        problems.append(
            f"--batch_size {options.batch_size} cannot be divided over {options.num_processes} processes x "
            f"--batch_size_per_gpu {options.batch_size_per_gpu} = {at_once}: give a multiple of {at_once}"
        )
    return problems


def _device_problems(options: argparse.Namespace) -> list[str]:
    if options.device == "cpu":
        names = [name for name in ("use_flash_attention", "use_liger") if getattr(options, name)]
        return [f"--{name} needs a CUDA GPU and there is none: leave the option out" for name in names]
    problems = []
    if options.use_liger and not liger_is_installed():
        problems.append(
            f"--use_liger: liger-kernel {OLDEST_LIGER} or newer is not installed: "
            "pip install -r requirements-liger.txt, or leave the option out"
        )
    num_gpus, num_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_here > num_gpus:
        problems.append(
            f"--nproc_per_node={num_here}, but this machine has {num_gpus} GPUs: start one process for each"
        )
    oldest = min(range(min(num_here, num_gpus)), key=torch.cuda.get_device_capability)  # of the processes' GPUs
    capability, name = torch.cuda.get_device_capability(oldest), torch.cuda.get_device_name(oldest)
    if options.use_flash_attention and capability < (8, 0):
        problems.append(
            f"--use_flash_attention needs compute capability 8.0 (Ampere) and {name} has "
            f"{capability[0]}.{capability[1]}: leave the option out"
        )
    if options.bf16 and capability < (8, 0):
        problems.append(
            f"--bf16 needs compute capability 8.0 (Ampere) and {name} has {capability[0]}.{capability[1]}: "
            "leave the option out to train in fp16"
        )
    return problems


def revision_problems(revision: str | None, name: str | None) -> list[str]:
    """What is wrong with `--revision`, given beside a checkpoint's name."""
    if revision == "":
        return ["--revision is given and empty: name a commit, or leave the option out"]
    if revision is not None and name and os.path.exists(name):
        return [f"--revision {revision} is of a hub id, and {name} is a folder: leave it out"]
    return []


def _file_problems(options: argparse.Namespace) -> list[str]:
    problems = []
    for name in SOURCES:
        value = getattr(options, name, None)
        # a hub id has at most one slash and is no path
        if value and not os.path.exists(value) and (value.partition("@")[0].count("/") > 1 or value[0] in "./~"):
            problems.append(f"--{name} {value}: there is no such file or folder; give one, or a hub id")
    problems += revision_problems(options.revision, options.model_name_or_path) + _data_problems(options)
    if options.eval_only or options.method not in ("full", "frozen"):
        if options.deepspeed:
            problems.append(f"--deepspeed {options.deepspeed} is for full fine-tuning: leave it out here")
    else:
        problems += _deepspeed_problems(options)
    if options.report_to != "none":
        available = get_available_reporting_integrations()
        missing = [name for name in options.report_to.split(",") if name not in available]
        told = [f"{name}: not installed here, where there is {sorted(available)}" for name in missing]
        problems += [f"--report_to {one}; it takes tensorboard, wandb or trackio, by pip install NAME" for one in told]
    return problems + _output_problems(options)


def _data_problems(options: argparse.Namespace) -> list[str]:
    """Of scripts' own options, which the shared --data_dir needs or rules out."""
    problems = []
    eval_file = getattr(options, "eval_file", None)
    if eval_file and not options.data_dir:
        problems.append(f"--eval_file {eval_file} is a file in --data_dir: give that folder, too")
    if getattr(options, "full_train", False) and options.data_dir and not (options.train_data or options.eval_only):
        problems.append(
            f"--full_train and --data_dir {options.data_dir} name different data to train on: give a local copy of the "
            "former as --train_data, or leave one of them out"
        )
    return problems


def deepspeed_file(options: argparse.Namespace) -> Path:
    """The DeepSpeed configuration: as given, or beside the scripts."""
    given = Path(options.deepspeed or DEEPSPEED)
    return given if os.path.isfile(given) else Path(__file__).resolve().parent.parent / given


def _deepspeed_problems(options: argparse.Namespace) -> list[str]:
    file = deepspeed_file(options)
    if not os.path.isfile(file):  # of a name too long Path.is_file raises an error
        return [f"--deepspeed {file}: there is no such file; ds_configs/ holds zero2, zero2_offload and zero3"]
    try:
        configuration = json.loads(file.read_text())
        stage = configuration["zero_optimization"]["stage"]
        if stage not in (1, 2, 3):
            raise ValueError(f"it is {stage!r}, not 1 to 3")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"--deepspeed {file}: no JSON with zero_optimization.stage ({error})"]
    own = [name for name in ("optimizer", "scheduler") if name in configuration]
    if own:
        return [f"--deepspeed {file} has its own {' and '.join(own)}: take it out, for this recipe's options set them"]
    problems = _fixed_values(file, configuration)
    if stage == 3:
        # weights are put together as the same modules run in the same order on every process
        names = [name for name in ("eval_steps", "max_crops_per_call", "torch_compile") if getattr(options, name)]
        problems += [
            f"--{name} does not go with ZeRO-3, whose weights lie in pieces: leave it out or take zero2.json"
            for name in names
        ]
    if offloads_optimizer(configuration["zero_optimization"]) and options.optim in BITSANDBYTES_OPTIMIZERS:
        problems.append(
            f"--optim {options.optim} does not go with {file}, which keeps the optimizer's state off the GPU already: "
            "leave one of them out"
        )
    return problems


def _fixed_values(file: Path, configuration: Mapping[str, Any]) -> list[str]:
    """What a DeepSpeed file has itself of what options say, also where they agree.

    Where they differ the Trainer would stop as it begins, and options and packs decide at every start.
    """
    fixed = {name: configuration[name] for name in DEEPSPEED_AUTO if name in configuration}
    for name in ("fp16", "bf16"):
        block = configuration.get(name)
        if isinstance(block, Mapping) and "enabled" in block:
            fixed[f"{name}.enabled"] = block["enabled"]
    problems = [
        f'--deepspeed {file} has {name} {value!r}: write "auto" there, for this recipe\'s options set it'
        for name, value in fixed.items()
        if value != "auto"
    ]
    if "train_micro_batch_size_per_gpu" not in configuration:
        problems.append(f'--deepspeed {file} has no train_micro_batch_size_per_gpu: add it with the value "auto"')
    return problems


def offloads_optimizer(zero: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed keeps the optimizer's state off the GPU, by a file's `zero_optimization`."""
    where = zero.get("offload_optimizer")
    return isinstance(where, Mapping) and where.get("device", "none") != "none"


def _output_problems(options: argparse.Namespace) -> list[str]:
    folder = options.output_dir
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder)  # a name too long
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return [f"--output_dir {folder} cannot be written ({error}): choose a folder that this user may write to"]
    if options.eval_only:
        return []
    if folder.resolve() == Path(options.model_name_or_path).resolve():
        return [f"--output_dir {folder} is the checkpoint that training starts from: choose another"]
    if options.overwrite and not options.restarted:
        problems = _overwriting_problems(options)
        if problems:
            return problems
    if options.resume not in ("auto", "never"):
        if options.overwrite:
            return [f"--resume {options.resume} goes on with a run, and --overwrite begins anew: leave one of them out"]
        if not os.path.isdir(options.resume):
            return [f"--resume {options.resume}: it is auto, never, or the folder of a checkpoint, and there is none"]
    # Only the first process looks: by the time another one does, the run itself may have begun to write.
    if is_first_process() and not options.overwrite and not options.restarted:
        found = [file.name for file in files_of_run(folder) if file.name != BAD_EXAMPLES]  # which alone is no run's
        if found and (options.resume == "never" or RUN_RECORD not in found):
            return [
                f"--output_dir {folder} holds a run ({', '.join(found)}) that is not gone on with: "
                "choose another, or add --overwrite"
            ]
    return []


def _overwriting_problems(options: argparse.Namespace) -> list[str]:
    folder = options.output_dir
    doomed = files_of_run(folder) if is_first_process() else []
    model = Path(options.model_name_or_path).resolve()
    if any(model.is_relative_to(file.resolve()) for file in doomed):
        return [
            f"--overwrite would delete --model_name_or_path {options.model_name_or_path}, which lies in --output_dir "
            f"{folder}: choose another"
        ]
    weights = [file.name for file in doomed if ".safetensors" in file.name]
    if weights and not (folder / RUN_RECORD).exists():
        return [
            f"--overwrite deletes what a run has left, and --output_dir {folder} holds {', '.join(weights)} but no "
            f"{RUN_RECORD}, so of no run: choose another folder, or delete it yourself"
        ]
    return []


def is_restarted(folder: Path) -> bool:
    """Whether torchrun has started this run before (`--max_restarts`), in this output folder."""
    try:
        return (folder / LOCK).read_text(encoding="utf-8") == launcher()
    except (OSError, UnicodeDecodeError):
        return False


def files_of_run(folder: Path) -> list[Path]:
    """What a run has left in its output folder."""
    return sorted(file for pattern in RUN_FILES for file in folder.glob(pattern))
