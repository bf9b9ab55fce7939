"""Before weights are loaded: everything that would stop a run after hours, found in seconds and told in one list."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from transformers import set_seed

from .checkpoints import MANIFEST, checkpoints_in
from .cli import BITSANDBYTES_OPTIMIZERS
from .collation import ANSWER_END
from .conversations import counting_processor, encode_without_pixels
from .data import ExampleDataset, check_length, one_line, open_header, open_pixels, opening_images_by
from .errors import (
    SHARED_MEMORY,
    SHARES_MORE,
    NotLookedAtError,
    UserError,
    first_of,
    is_first_process,
    note_longest,
    raise_all,
    rank_and_world,
    remedies,
    say,
    shared_memory_in_words,
)
from .files import INCOMPLETE, read_json
from .loading import checkpoint_of, load_model, prepare_for_training, read_config
from .memory import FRAGMENTATION, Weights, estimated_peak, sizes_on_disk, weights_of_run
from .phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from .phi3v.modeling import IGNORED_LABEL
from .together import together
from .training import forget_unbegun, look_at_all, write_model

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = 64  # examples that are looked at: the first, the last, and between them at equal distances
SECONDS = 2.0  # a process decodes pictures; of the sample's others it reads the headers
TOKENS_PER_VIEW = 149  # about: 144 and its share of the separators
BYTES_PER_VIEW = 4 * 3 * 336 * 336  # on its way from a loader's worker
CERTAIN = 0.7  # of the estimated activations; Liger's kernels keep less than the estimate says


class Look(NamedTuple):
    """What a process has seen of its share of the sample.

    Attributes:
        examples, decoded: how many, and of how many the pictures were decoded.
        tokens, labelled, views: of the longest.
        answer: tokens of the longest text that ends an example.
    """

    problems: list[str]
    examples: int = 0
    decoded: int = 0
    tokens: int = 0
    labelled: int = 0
    views: int = 0
    answer: int = 0


def preflight(dataset: ExampleDataset | None, processor: Phi3VProcessor, options: argparse.Namespace) -> None:
    """Check what a run needs, before weights are loaded; every process calls it once they are joined.

    Libraries, GPU memory, disk space; of a sample of the examples that their pictures decode, that they have labels
    and are not too long; that a shrunk model trained by this method comes back as it was saved. Then of every example
    that its pictures decode and that it is not too long.

    Args:
        dataset: to train on; None with `--eval_only`, when neither examples nor disk are looked at.
        options: as `start` has left them.

    Raises:
        UserError: all problems of all processes, each once, on every process.
    """
    base, revision = checkpoint_of(options.model_name_or_path, options.revision)
    config = read_config(base, revision)
    facts, shared, longest = ["libraries"], [], Look([])
    own = version_problems(options)  # a process's own problems, beside those that are anybody's
    if dataset is not None:
        looks = together(lambda: look_at_examples(dataset, processor, config.max_position_embeddings))
        longest = max(looks, key=lambda look: look.tokens)
        note_longest(longest.tokens, longest.labelled, longest.views)
        answer = max(look.answer for look in looks)
        if answer > options.max_new_tokens:
            say(
                f"answers are of up to {answer} tokens, and evaluation cuts its own at --max_new_tokens "
                f"{options.max_new_tokens}"
            )
        found = [problem for look in looks for problem in look.problems]
        number, decoded = (sum(getattr(look, name) for look in looks) for name in ("examples", "decoded"))
        facts.append(f"{number} of {len(dataset)} examples ({decoded} decoded), of up to {longest.tokens} tokens")
        if options.bad_examples == "skip":
            facts += [f"{len(found)} of them bad"] if found else []
        else:
            shared += first_of(found)
    if dataset is not None:
        own += shared_memory_problems(options, longest)
    if options.device.type == "cuda":
        own += memory_problems(options, config, longest, facts)
    if dataset is not None and is_first_process():
        if base == options.model_name_or_path:  # of an adapter that is trained further it is what that adapts
            facts.append(what_trains(weights_of_run(options, config)))
        shared += disk_problems(options, config, len(dataset), facts) + trial_problems(options, config, processor)
        facts.append("a trial save and reload")
    found_by_all = together(lambda: (shared, own))
    set_seed(options.seed)  # whatever was drawn here, on the first process only
    problems = dict.fromkeys(problem for found, _ in found_by_all for problem in found)
    for problem in dict.fromkeys(problem for _, found in found_by_all for problem in found):
        having = [str(rank) for rank, (_, found) in enumerate(found_by_all) if problem in found]
        where = "" if len(having) == len(found_by_all) else f"process {', '.join(having)}: "
        problems[where + problem] = None
    if problems and is_first_process():
        forget_unbegun(options)
    raise_all(list(problems), everywhere=True)  # so that the first process tells
    say(f"checked: {'; '.join(facts)}")
    if dataset is not None:
        look_at_all(dataset, processor, options, config, number, decoded)


def check_machine(options: argparse.Namespace) -> None:
    """What of the above can be told where options, checkpoint or data are wrong, for the same list.

    Raises:
        UserError: libraries; no room on the disk for the model alone.
    """
    raise_all([*version_problems(options), *_room_problems(options)])


def _room_problems(options: argparse.Namespace) -> list[str]:
    try:
        if options.eval_only:
            return []
        config = read_config(*checkpoint_of(options.model_name_or_path, options.revision))
        return disk_problems(options, config, None, [])
    except Exception:  # of many kinds: what is wrong with the options or the checkpoint, which their checks tell
        return []


def version_problems(options: argparse.Namespace) -> list[str]:
    """Libraries that these options use and that are missing or older than the requirements files say."""
    asks = {
        "peft": lambda: options.use_lora,
        "deepspeed": lambda: not options.use_lora and not options.eval_only,
        "bitsandbytes": lambda: options.use_qlora or options.optim in BITSANDBYTES_OPTIMIZERS,
        "flash-attn": lambda: options.attention == "flash_attention_2",
        "liger-kernel": lambda: options.use_liger,
    }
    names = {"torch", "transformers", "accelerate", "datasets"}
    for name, is_used in asks.items():
        with contextlib.suppress(NotLookedAtError):  # of wrong options
            names |= {name} if is_used() else set()
    problems = []
    for file in sorted(REPOSITORY.glob("requirements*.txt")):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and line[0] not in "#-"]
        for needed in filter(lambda needed: needed.name in names, map(Requirement, lines)):
            try:
                version = importlib.metadata.version(needed.name)
            except importlib.metadata.PackageNotFoundError:
                problems.append(f"{needed.name} is not installed: pip install -r {file.name}")
                continue
            if not needed.specifier.contains(version, prereleases=True):
                problems.append(f"{needed.name} {version} is installed, {needed} is needed: pip install -r {file.name}")
    return problems


# --- examples


def look_at_examples(dataset: ExampleDataset, processor: Phi3VProcessor, limit: int) -> Look:
    """This process's share of the sample; its first example is encoded as for training, of others tokens are counted.

    Args:
        limit: the most tokens that the model takes.
    """
    rank, world = rank_and_world()
    sample = sorted({round(number * (len(dataset) - 1) / (SAMPLE - 1)) for number in range(SAMPLE)})[rank::world]
    counting, began = counting_processor(processor), time.monotonic()
    problems, sizes, decoded, longest_answer = [], [(0, 0, 0)], 0, 0
    end = len(processor.tokenizer(ANSWER_END, add_special_tokens=False).input_ids)
    for index in sample:
        opener = open_pixels if time.monotonic() - began < SECONDS else open_header
        decoded += opener is open_pixels
        try:
            with opening_images_by(functools.cache(opener)):
                example = dataset.example(index, 0)
            encoded = encode_without_pixels(counting, example)
            encoded = dataset[index] if index == sample[0] else encoded
            check_length(example.id, len(encoded["input_ids"]), limit)
        except UserError as error:
            problems.append(str(error))
            continue
        except Exception as error:  # of what an edited script makes, of many kinds
            problems.append(f"example {index} cannot be encoded: {type(error).__name__}: {one_line(error)}")
            continue
        ids, labelled = encoded["input_ids"], int((encoded["labels"] != IGNORED_LABEL).sum())
        last_answer = (encoded["labels"] != IGNORED_LABEL).flip(0).cumprod(0).sum()  # what is labelled at the end
        longest_answer = max(longest_answer, int(last_answer) - end)
        sizes.append((len(ids), labelled, round(int((ids == processor.image_token_id).sum()) / TOKENS_PER_VIEW)))
        if labelled == 0:
            problems.append(f"{example.id}: no token of {len(ids)} is labelled, so there is nothing to learn from it")
    return Look(problems, len(sample), decoded, *max(sizes), longest_answer)


# --- memory and disk


def what_trains(weights: Weights) -> str:
    """How many parameters of how many, in words."""
    trained = sum(weights.trained)
    shares = [
        f"{count / 1e6:,.1f} M" if count >= 1e7 else f"{count / 1e6:.3g} M" for count in (trained, weights.frozen)
    ]
    return f"{shares[0]} parameters train beside {shares[1]} that do not"


def memory_problems(options: argparse.Namespace, config: Phi3VConfig, longest: Look, facts: list[str]) -> list[str]:
    """Whether this process's GPU has room: a problem where it certainly has not, a warning where it may not have."""
    _, world = rank_and_world()
    sizes = {"tokens": max(1, longest.tokens), "answer_tokens": longest.labelled}
    sizes["num_crops"] = max(1, longest.views - 1)  # all of an example's views, as if of one picture
    needed, least = (estimated_peak(options, config, world, share, **sizes) for share in (1, CERTAIN))
    if needed is None:
        return []
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info(options.device))
    facts.append(f"about {needed:,.2f} GB of GPU memory ({free:,.2f} GB free)")
    what = "evaluation, for the weights alone," if options.eval_only else "a training step"
    advice = "end what else runs on this GPU, or " if free < 0.9 * total else ""
    advice += f"{'; or '.join(remedies(options, options.eval_only))} (python -m tools.plan proposes what fits)"
    room = f"and {free:,.2f} of {total:,.2f} GB are free"
    if least > free:
        return [f"{what} takes at least {least:,.2f} GB of GPU memory, {room}: {advice}"]
    if needed * (1 + FRAGMENTATION) > free:
        say(f"{what} may take {needed * (1 + FRAGMENTATION):,.2f} GB of GPU memory, {room}; should it: {advice}")
    return []


def shared_memory_problems(options: argparse.Namespace, longest: Look) -> list[str]:
    """Whether what the workers of this machine's loaders hand over fits into the memory that processes share."""
    if options.num_workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return []
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * options.num_workers
    needed = workers * longest.views * BYTES_PER_VIEW  # an example of each, while each has two or more ready
    if needed <= shutil.disk_usage(SHARED_MEMORY).free:
        return []
    return [
        f"{workers} loader workers hand over at least {needed / 1e9:,.2f} GB at once, and {shared_memory_in_words()}: "
        f"{'; or '.join(SHARES_MORE)}"
    ]


def disk_problems(
    options: argparse.Namespace, config: Phi3VConfig, examples: int | None, facts: list[str]
) -> list[str]:
    """Whether the output folder has room for the model and for the checkpoints kept and, beside them, the newest.

    What an interrupted run has left there is room too, for it counts among them.

    Args:
        examples: to train on; where their number is not known, only the model counts.
    """
    folder = options.output_dir.parent if options.dry_run else options.output_dir
    kept, to_come = checkpoints_in(folder), 0
    if examples is not None:
        steps = options.num_train_epochs * -(-examples // options.batch_size)
        if options.max_steps and not options.dry_run:  # which takes one step of as many as there will be
            steps = options.max_steps
        done = read_json(options.resume_from / MANIFEST)["step"] if options.resume_from else 0
        to_come = max(0, steps // options.save_steps - done // options.save_steps)
    number = min(options.save_total_limit + 1, len(kept) + to_come)
    model, checkpoint = sizes_on_disk(options, config)
    files = [path for each in kept for path in each.rglob("*") if path.is_file()]
    there = sum(path.stat().st_size for path in [*files, *folder.glob("*.safetensors")])
    disk = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    needed, free = max(0, model + number * checkpoint - there), shutil.disk_usage(disk).free
    facts.append(f"{needed / 1e9:,.2f} GB to be written ({free / 1e9:,.2f} GB free)")
    if needed <= free:
        return []
    what, advice = f"the model {model / 1e9:,.2f} GB", "make room, choose another"
    if number:
        what += f", {number} checkpoints at a time of {checkpoint / 1e9:,.2f} GB"
        advice += ", lower --save_total_limit"
    least = "at least " if examples is None else ""
    return [
        f"--output_dir {folder}: the run writes {least}{needed / 1e9:,.2f} GB ({what}), and {free / 1e9:,.2f} GB are "
        f"free: {advice}, or train adapters (--use_lora)"
    ]


# --- a trial


def shrunk(config: Phi3VConfig) -> Phi3VConfig:
    """A configuration of the same kind, vocabulary and head width, with two heads and as few layers as can be."""
    fields = config.to_dict()
    hidden = 2 * config.hidden_size // config.num_attention_heads
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    tower = {**(config.vision_config or {}), **layers, "hidden_size": 64, "intermediate_size": 128}
    tower["num_hidden_layers"] = max(2, -config.image_feature_layer)
    fields |= {**layers, "num_key_value_heads": 2, "hidden_size": hidden, "intermediate_size": 128}
    fields |= {"vision_config": tower, "img_processor": {**config.img_processor, "image_dim_out": 64}}
    return Phi3VConfig.from_dict(fields)


def trial_problems(options: argparse.Namespace, config: Phi3VConfig, processor: Phi3VProcessor) -> list[str]:
    """Save a shrunk model, trained by this method, as the run's end does, and load it again; nothing is left."""
    did = f"a trial save and reload of a shrunk model in {options.output_dir}"
    try:
        with tempfile.TemporaryDirectory(dir=options.output_dir, prefix="trial", suffix=INCOMPLETE) as folder:
            different = _save_and_reload(options, config, processor, Path(folder))
    except Exception as error:  # whatever it is, it would have come after hours
        return [f"{did} failed: {type(error).__name__}: {one_line(error)}"]
    return [f"{did}: {', '.join(different[:3])} came back different ({len(different)} in all)"] if different else []


def _save_and_reload(
    options: argparse.Namespace, config: Phi3VConfig, processor: Phi3VProcessor, folder: Path
) -> list[str]:
    """Names of what is not, bit for bit, as it was saved."""
    trial = copy.copy(options)
    base, saved = folder / "base", folder / "saved"
    for each in (base, saved):
        each.mkdir()
    write_model(Phi3VForCausalLM(shrunk(config)).to(options.precision.weights), processor, base)
    trial.model_name_or_path = str(base)
    model = prepare_for_training(load_model(base, trial), processor, trial)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()  # as if trained: half of an adapter begins as 0
    write_model(model, processor, saved)
    before, after = model.state_dict(), load_model(saved, trial).state_dict()
    different = [name for name in {**before, **after} if not _is_same(before.get(name), after.get(name))]
    again = Phi3VProcessor.from_pretrained(saved, num_crops=options.num_crops)
    text = processor.apply_chat_template([{"role": "user", "content": "What? \n 12,5 %"}], add_generation_prompt=True)
    if again.tokenizer(text).input_ids != processor.tokenizer(text).input_ids:
        different.append("the tokenizer")
    return different


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)
