"""What a training step needs of a GPU's memory, part by part, and the fastest setting that fits.

    python -m tools.plan --gpu_memory 80 --gpus 8 --bf16
    python -m tools.plan --gpu_memory 16 --method qlora --bf16 --model_name_or_path FOLDER
    python -m tools.plan --gpu_memory 80 --method lora --bf16 --gradient_checkpointing none --batch_size_per_gpu 4
    python -m tools.plan --gpu_memory 80 --method lora --bf16 --torch_compile --max_tokens_per_gpu 8000

Options are those of the scripts that change the memory, and --gpu_memory, --gpus, --method, --attention, and --tokens,
--answer_tokens and --images, which describe an example. What is given of --gradient_checkpointing, --optim,
--batch_size_per_gpu and --deepspeed is kept, what is not is searched, in this order, of which the first that fits is
proposed:

1. The optimizer's state on the GPU before state that leaves it (paged, or DeepSpeed's offload).
2. Less computed again in the backward pass before more: "full" costs a third of the step's work, "selective" a sixth.
3. AdamW's state in 32 bits before 8, which changes the results a little; where 8 are proposed, 32 are shown too.
4. More examples at once before fewer: fewer passes, and under ZeRO-2 fewer reductions of the gradients.

The order follows from the work, not from a measurement. Beside it stands what is fastest with --torch_compile, and how
many tokens packed rows (--max_tokens_per_gpu) may have in its place: which of these is faster depends on the GPU and on
how different examples are in length. Sizes are GB of 1e9 bytes; see common/memory.py for what they are made of.

With --max_tokens_per_gpu rows are packed, with as many examples as have so many tokens, and nothing is searched in
place of --batch_size_per_gpu. With --share_images an example is a picture with all its questions.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence

from common.cli import BITSANDBYTES_OPTIMIZERS, CHECKPOINTING, DEEPSPEED, MAX_NUM_CROPS, OPTIMIZERS
from common.errors import UserError, raise_all
from common.memory import (
    CUDA_CONTEXT,
    FRAGMENTATION,
    METHODS,
    Part,
    Setting,
    estimate,
    needed,
    peak,
    read_zero_configuration,
)
from common.phi3v import Phi3VConfig
from tools.recipes import METHOD_OPTIONS

OFFICIAL = ("official", "microsoft/Phi-3.5-vision-instruct", "microsoft/Phi-3-vision-128k-instruct")
OFFLOAD = "ds_configs/zero2_offload.json"
MOST_AT_ONCE = 16
EXTRA_WORK = {"none": "nothing", "selective": "a sixth of the step's work", "full": "a third of the step's work"}
NUMBERS = {  # options, each with its default where that stands by itself
    "tokens": (f"of an example, the picture's included ({Setting.tokens}, or --max_tokens_per_gpu if less)", None),
    "answer_tokens": ("labelled of them", Setting.answer_tokens),
    "images": ("pictures of an example", Setting.images),
    "num_crops": ("most sub-images of a picture", MAX_NUM_CROPS),
    "lora_rank": ("with lora and qlora", Setting.lora_rank),
    "batch_size": ("examples per step, all GPUs", Setting.batch_size),
    "batch_size_per_gpu": ("examples at once on a GPU (searched)", None),
    "max_tokens_per_gpu": ("packed rows: tokens at once on a GPU, instead of --batch_size_per_gpu", None),
}
PHASES = {
    "held": "held throughout",
    "backward": "as the backward pass begins",
    "step": "in the optimizer's step",
    "outside": "outside, where the GPU is short",
}


def candidates(fixed: Setting, options: argparse.Namespace) -> Iterator[Setting]:
    """All settings that the options leave open, the fastest first."""
    own = fixed.batch_size // fixed.gpus
    sizes = [size for size in range(min(own, MOST_AT_ONCE), 0, -1) if own % size == 0]
    given = 1 if fixed.packs else options.batch_size_per_gpu
    sizes = [given] if given else sizes
    again = [options.gradient_checkpointing] if options.gradient_checkpointing else CHECKPOINTING
    optimizers = [options.optim] if options.optim else ["adamw_torch_fused", *BITSANDBYTES_OPTIMIZERS]
    files = [options.deepspeed] if options.deepspeed else [DEEPSPEED] if fixed.uses_lora else [DEEPSPEED, OFFLOAD]
    settings = [
        dataclasses.replace(fixed, gradient_checkpointing=which, optim=optim, batch_size_per_gpu=size, deepspeed=file)
        for which in again
        for file in files
        for optim in optimizers
        for size in sizes
        if not (file == OFFLOAD and optim in BITSANDBYTES_OPTIMIZERS)
    ]
    yield from sorted(settings, key=lambda one: one.optim.startswith("paged") or one.deepspeed == OFFLOAD)


def in_words(setting: Setting) -> str:
    """The options to give a script."""
    words = f"--gradient_checkpointing {setting.gradient_checkpointing} --optim {setting.optim}"
    if setting.packs:  # the scripts take no --batch_size_per_gpu beside it
        words += f" --max_tokens_per_gpu {setting.max_tokens_per_gpu}"
    else:
        words += f" --batch_size_per_gpu {setting.batch_size_per_gpu}"
    words += " --torch_compile" if setting.torch_compile else ""
    return words + (f" --deepspeed {setting.deepspeed}" if setting.deepspeed != DEEPSPEED else "")


def helps(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """What else would need less, one change at a time."""
    if setting.uses_lora and not setting.bf16:  # else the weights beside the adapters are kept in float32
        yield "--bf16 (Ampere or newer)", dataclasses.replace(setting, bf16=True)
    for method in METHODS[METHODS.index(setting.method) + 1 :]:
        yield " ".join(METHOD_OPTIONS[method]), dataclasses.replace(setting, method=method, deepspeed=DEEPSPEED)
    if not setting.uses_lora:
        for gpus in (2 * setting.gpus, 8 * setting.gpus):
            more = dataclasses.replace(setting, gpus=gpus, batch_size=max(gpus, setting.batch_size))
            yield f"{gpus} GPUs instead of {setting.gpus}", more
    if setting.packs and setting.max_tokens_per_gpu > setting.tokens:
        fewer = max(setting.max_tokens_per_gpu // 2, setting.tokens)
        yield f"--max_tokens_per_gpu {fewer}", dataclasses.replace(setting, max_tokens_per_gpu=fewer)
    if setting.num_crops > 1:
        crops = setting.num_crops // 4 or 1
        gone = 144 * setting.images * (setting.num_crops - crops)  # positions of the sub-images that are gone
        tokens = max(setting.tokens - gone, setting.answer_tokens + 1)
        yield f"--num_crops {crops}", dataclasses.replace(setting, num_crops=crops, tokens=tokens)


def report(parts: Sequence[Part]) -> str:
    """A setting's parts as a table."""
    lines = []
    for phase, title in PHASES.items():
        own = [part for part in parts if part.phase == phase]
        if own:
            lines.append(f"{title:<32}{sum(part.size for part in own) / 1e9:>8.2f} GB")
            lines += [f"  {part.name:<30}{part.size / 1e9:>8.2f}     {part.about}" for part in own]
    lines.append(f"{'peak':<32}{peak(parts) / 1e9:>8.2f} GB  held, and the greater of backward pass and step")
    more = f"{FRAGMENTATION:.0%} for fragmentation, {CUDA_CONTEXT / 1e9:.1f} GB for CUDA and NCCL: assumed"
    return "\n".join([*lines, f"{'needed':<32}{needed(parts) / 1e9:>8.2f} GB  {more}"])


def propose(config: Phi3VConfig, fixed: Setting, options: argparse.Namespace) -> int:
    """Print the first of the candidates that fits, or by how much the least greedy does not.

    Returns:
        0 where one fits, else 1.
    """
    room = options.gpu_memory * 1e9
    sized = [(needed(estimate(config, setting)), setting) for setting in candidates(fixed, options)]
    fitting = [one for one in sized if one[0] <= room]
    if not fitting:
        return tell_shortage(config, *min(sized, key=lambda one: one[0]), room)
    _, chosen = fitting[0]
    print(f"fastest that fits {options.gpu_memory:g} GB: {in_words(chosen)}\n\n{report(estimate(config, chosen))}\n")
    print(f"computed again: {EXTRA_WORK[chosen.gradient_checkpointing]}")
    faster = sized[: sized.index(fitting[0])]
    if faster:
        size, setting = min(faster, key=lambda one: one[0])
        print(f"of what would be faster the least greedy needs {size / 1e9:.1f} GB: {in_words(setting)}")
    exact = [one for one in fitting if not one[1].optim.endswith("8bit")]
    if exact and exact[0] != fitting[0]:
        size, setting = exact[0]
        print(f"with AdamW's state in 32 bits the fastest needs {size / 1e9:.1f} GB: {in_words(setting)}")
    compiled = [] if fixed.torch_compile else candidates(dataclasses.replace(fixed, torch_compile=True), options)
    fits = ((size, one) for one in compiled if (size := needed(estimate(config, one))) <= room)
    for size, setting in itertools.islice(fits, 1):
        print(f"compiled, where layers keep less, the fastest needs {size / 1e9:.1f} GB: {in_words(setting)}")
    most = packed_in(config, chosen, room)
    if most is not None and not options.batch_size_per_gpu:
        size = needed(estimate(config, most))
        print(f"without padding as many at once as fit need {size / 1e9:.1f} GB: {in_words(most)}")
    return 0


def packed_in(config: Phi3VConfig, setting: Setting, room: float) -> Setting | None:
    """The same with rows packed of as many examples as fit, of those that a process has of a step; None if that is one.

    Args:
        room: bytes.
    """
    if setting.packs:
        return None
    for examples in range(setting.batch_size // setting.gpus, 1, -1):
        tokens = examples * setting.tokens
        packed = dataclasses.replace(setting, batch_size_per_gpu=1, max_tokens_per_gpu=tokens)
        if needed(estimate(config, packed)) <= room:
            return packed
    return None


def tell_shortage(config: Phi3VConfig, size: float, setting: Setting, room: float) -> int:
    """Nothing fits: say by how much, and what would help."""
    print(
        f"nothing fits {room / 1e9:g} GB; the least greedy, {in_words(setting)}, lacks {(size - room) / 1e9:.1f} GB:\n"
    )
    print(report(estimate(config, setting)) + "\n\nwhat would help:")
    for change, other in helps(setting):
        less = needed(estimate(config, other))
        fits = "fits" if less <= room else f"still lacks {(less - room) / 1e9:.1f} GB"
        print(f"  {change:<24}{less / 1e9:>8.1f} GB needed, {fits}")
    return 1


# --- command line


def make_parser() -> argparse.ArgumentParser:
    """The options, unchecked."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description="Peak memory of a setting, and the fastest that fits.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu_memory", type=float, required=True, metavar="GB", help="of one GPU")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of the run, all nodes together (%(default)s)")
    parser.add_argument(
        "--model_name_or_path", default="official", metavar="NAME", help="a folder with a config.json (%(default)s)"
    )
    parser.add_argument("--method", choices=METHODS, help="(full, or as the scripts' options say)")
    parser.add_argument("--use_lora", action="store_true", help="the same as --method lora")
    parser.add_argument("--use_qlora", action="store_true", help="the same as --method qlora")
    parser.add_argument("--bf16", action="store_true", help="as the scripts': without it float16")
    parser.add_argument(
        "--freeze_vision_model", action="store_true", help="with lora and qlora too: nothing of it trains"
    )
    for name, (told, default) in NUMBERS.items():
        shown = told if default is None else f"{told} ({default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=shown)
    parser.add_argument("--gradient_checkpointing", choices=CHECKPOINTING, help="(searched)")
    parser.add_argument("--optim", choices=OPTIMIZERS, metavar="NAME", help=f"{', '.join(OPTIMIZERS)} (searched)")
    parser.add_argument("--torch_compile", action="store_true", help="layers compiled")
    parser.add_argument("--deepspeed", metavar="JSON", help="of stage 2 (zero2.json, then zero2_offload.json)")
    parser.add_argument(
        "--attention", choices=("sdpa", "flash_attention_2", "eager"), default="sdpa", help="(%(default)s)"
    )
    parser.add_argument(
        "--use_flash_attention",
        dest="attention",
        action="store_const",
        const="flash_attention_2",
        help="the same as --attention flash_attention_2",
    )
    return parser


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked.

    Raises:
        UserError: with all problems at once.
    """
    options = make_parser().parse_args(words)
    asked = "qlora" if options.use_qlora else "lora" if options.use_lora else None
    problems = []
    if asked and options.method not in (None, asked):
        problems.append(f"--method {options.method} and --use_{asked}: leave one of them out")
    options.method = options.method or asked or "full"
    if options.method == "full" and options.freeze_vision_model:
        options.method = "frozen"
    if options.tokens is None:  # the scripts take no example that is longer than a row
        options.tokens = min(Setting.tokens, options.max_tokens_per_gpu or Setting.tokens)
    problems += [] if options.gpu_memory > 0 else [f"--gpu_memory {options.gpu_memory}: it must be above 0"]
    given = {name: getattr(options, name) for name in ("gpus", *NUMBERS)}
    problems += [
        f"--{name} {value}: it must be at least 1" for name, value in given.items() if value is not None and value < 1
    ]
    if options.num_crops > MAX_NUM_CROPS:
        problems.append(f"--num_crops {options.num_crops}: it must be 1 to {MAX_NUM_CROPS}")
    if options.answer_tokens >= options.tokens:
        problems.append(f"--answer_tokens {options.answer_tokens} must be fewer than --tokens {options.tokens}")
    at_once = options.gpus * (options.batch_size_per_gpu or 1)
    if options.max_tokens_per_gpu is not None:
        problems += packing_problems(options)
    elif at_once > 0 and options.batch_size % at_once:
        problems.append(
            f"--batch_size {options.batch_size} cannot be divided by {at_once} (--gpus x --batch_size_per_gpu)"
        )
    if options.deepspeed and options.method not in ("full", "frozen"):
        problems.append(f"--deepspeed {options.deepspeed} is for full and frozen: leave it out for {options.method}")
    elif options.deepspeed:
        problems += read_zero_configuration(options.deepspeed)[1]
    raise_all(problems)
    return options


def packing_problems(options: argparse.Namespace) -> list[str]:
    """What the scripts refuse beside `--max_tokens_per_gpu`."""
    given = f"--max_tokens_per_gpu {options.max_tokens_per_gpu}"
    problems = []
    if options.batch_size_per_gpu not in (None, 1):
        problems.append(
            f"{given} and --batch_size_per_gpu {options.batch_size_per_gpu} both say what goes through a GPU at once: "
            "leave one of them out"
        )
    if 0 < options.max_tokens_per_gpu < options.tokens:
        problems.append(f"{given} must be at least --tokens {options.tokens}: an example is not divided")
    return problems


def load_config(name_or_path: str) -> Phi3VConfig:
    """A folder's configuration; the published one needs no file, for its sizes are the defaults."""
    if name_or_path in OFFICIAL:
        return Phi3VConfig()
    try:
        return Phi3VConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"--model_name_or_path {name_or_path}: no configuration of the model ({told})") from error


def main(words: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring.

    Returns:
        0 where a setting fits, else 1.
    """
    options = parse(words)
    shared = {field.name for field in dataclasses.fields(Setting)} & set(vars(options))
    open_fields = {"gradient_checkpointing", "optim", "batch_size_per_gpu", "deepspeed"}
    fixed = Setting(**{name: getattr(options, name) for name in shared - open_fields})
    return propose(load_config(options.model_name_or_path), fixed, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
