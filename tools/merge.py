"""Fold a LoRA or QLoRA adapter into a complete checkpoint, and check that it answers as the adapter does.

    python -m tools.merge output_lora merged
    python -m tools.merge output_lora merged --image page.png --question "What is the date?"

The adapter is put on the base that it names, loaded unquantised (a QLoRA adapter too) in bfloat16, or in float32 with
`--dtype float32`. What is written is loaded again from the disk and compared, in the same precision, on a picture, the
one given or a built-in page: the greedy answer must be the same text, and no logit that it was chosen by may differ by
more than the bound of the precision, `BOUNDS`, times the largest of them. Only then does it get its name; else nothing
is left behind and the exit code is 1.

A QLoRA adapter was trained beside rounded weights, which are not the ones merged here: its scores may differ a little
from those of its run. Evaluate what was merged with a script's `--eval_only --model_name_or_path merged`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from common.cli import MAX_NEW_TOKENS, Precision
from common.collation import Example, Turn, encode_example
from common.conversations import CONTROL
from common.data import decode_image, one_line
from common.errors import UserError, raise_all, run
from common.files import INCOMPLETE, sync_to_disk
from common.loading import checkpoint_of, end_token_ids, find_adapter, load_model, load_processor
from common.phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from tools.predict import how_to_load

# The largest difference of a logit, relative to the largest logit, that is taken for rounding.
BOUNDS = {"bfloat16": 0.05, "float32": 1e-4}
SAMPLE_TEXT = ("DELIVERY NOTE", "Date: 24 March 2021", "Order: 4711", "Total: 38.50")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; all wrong ones reported at once."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge", description="Fold an adapter into a complete checkpoint.", allow_abbrev=False
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub id of a LoRA or QLoRA adapter")
    parser.add_argument("merged", metavar="MERGED", type=Path, help="folder to write; not there yet, or empty")
    parser.add_argument("--dtype", choices=tuple(BOUNDS), default="bfloat16", help="of the weights (%(default)s)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to compare on (a built-in page)")
    parser.add_argument("--question", default="What is the date?", metavar="TEXT", help="about it (%(default)s)")
    options = parser.parse_args(arguments)
    problems = []
    if options.merged.exists() and (not options.merged.is_dir() or any(options.merged.iterdir())):
        problems.append(f"{options.merged} is there already and not empty: choose another folder")
    if options.image is not None and not options.image.is_file():
        problems.append(f"--image {options.image}: there is no such file")
    if found := CONTROL.search(options.question):
        problems.append(f"--question holds {found[0]}, which is put there by itself: take it out")
    raise_all(problems)
    return options


def check_disk(base: str, revision: str | None, dtype: torch.dtype, folder: Path) -> None:
    """Find out, before any weight is read, whether there is room for all of them.

    Raises:
        UserError: with both numbers.
    """
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(base, revision=revision))
    needed = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder} would take {needed / 1e9:.3g} GB and {existing} has {free / 1e9:.3g} GB free: make room, or "
            "choose a folder on another disk"
        )


def sample_page() -> Image.Image:
    """A page to ask about where none is given."""
    page = Image.new("RGB", (672, 672), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=36)
    for number, text in enumerate(SAMPLE_TEXT):
        draw.text((60, 80 + 120 * number), text, fill="black", font=font)
    return page


@torch.no_grad()
def greedy(
    model: torch.nn.Module, processor: Phi3VProcessor, example: Example
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The greedy answer's tokens (answer,), and the prompt."""
    encoded = encode_example(processor, example, with_answer=False)
    prompt = {name: encoded[name].to(model.device) for name in ("pixel_values", "image_sizes")}
    prompt["input_ids"] = encoded["input_ids"][None].to(model.device)
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    ends = {"eos_token_id": end_token_ids(processor), "pad_token_id": processor.tokenizer.pad_token_id}
    ids = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **ends)
    return ids[0, prompt["input_ids"].shape[1] :], prompt


@torch.no_grad()
def logits_of(model: torch.nn.Module, prompt: dict[str, torch.Tensor], answer: torch.Tensor) -> torch.Tensor:
    """What each token of an answer is chosen by after the prompt and the tokens before it: (answer, vocabulary)."""
    ids = torch.cat([prompt["input_ids"], answer[None]], dim=1)
    inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model(**inputs, logits_to_keep=len(answer) + 1).logits[0, :-1].float().cpu()


def write(model: Phi3VForCausalLM, processor: Phi3VProcessor, folder: Path) -> None:
    """A complete checkpoint, brought to the disk."""
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=end_token_ids(processor),
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in (*folder.iterdir(), folder):
        sync_to_disk(path)


@contextlib.contextmanager
def telling_what_is_not_written(folder: Path) -> Iterator[None]:
    """For what writes the result.

    Raises:
        UserError: the disk is full or fails.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {one_line(error)}") from error


def merge(options: argparse.Namespace, beside: Path) -> list[str]:
    """Merge, write beside and compare.

    Returns:
        What is wrong with the result.
    """
    loading = how_to_load(options.adapter)
    dtype = getattr(torch, options.dtype)
    loading.precision = Precision({"bfloat16": "bf16", "float32": "fp32"}[options.dtype], dtype, None)
    check_disk(*checkpoint_of(options.adapter), dtype, options.merged)
    processor = load_processor(loading)
    image = decode_image({"path": str(options.image)}, f"--image {options.image}") if options.image else sample_page()
    example = Example("the sample", [Turn(f"<|image_1|>\n{options.question}", images=[image])])

    model = load_model(options.adapter, loading).eval()
    wanted, prompt = greedy(model, processor, example)
    wanted_logits = logits_of(model, prompt, wanted)
    with model.disable_adapter():
        effect = (logits_of(model, prompt, wanted) - wanted_logits).abs().max().item()
    try:
        model = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # a weight would not be finite
        raise UserError(f"{options.adapter} cannot be merged: {one_line(error)}") from error
    with telling_what_is_not_written(options.merged):
        write(model, processor, beside)
    del model
    gc.collect()
    torch.cuda.empty_cache()

    model = load_model(beside, loading).eval()
    found, _ = greedy(model, processor, example)
    difference = (logits_of(model, prompt, wanted) - wanted_logits).abs().max().item()
    bound = BOUNDS[options.dtype] * wanted_logits.abs().max().item()
    texts = [processor.decode(ids, skip_special_tokens=True) for ids in (wanted, found)]
    print(f"answer of the adapter:  {texts[0]!r}\nanswer when merged:     {texts[1]!r}")
    print(
        f"largest difference of a logit: {difference:.3g} (bound {bound:.3g}; the adapter itself changes them by up to "
        f"{effect:.3g}), {options.dtype}, {len(wanted)} tokens"
    )
    problems = ["the answers differ"] * (texts[0] != texts[1])
    # also where one is not finite
    return problems + [f"a logit differs by {difference:.3g}, the bound is {bound:.3g}"] * (not difference <= bound)


def main() -> None:
    options = parse()
    disable_progress_bar()  # transformers' own, over weights
    try:
        if find_adapter(options.adapter) is None:
            raise UserError(f"{options.adapter} is a complete checkpoint: there is no adapter to merge")
    except UserError as error:  # which is no option here
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error
    beside = options.merged.with_name(options.merged.name + INCOMPLETE)
    shutil.rmtree(beside, ignore_errors=True)  # of a merge that was stopped
    try:
        problems = merge(options, beside)
        if not problems:
            with telling_what_is_not_written(options.merged):
                beside.replace(options.merged)
                sync_to_disk(options.merged.absolute().parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if problems:
        print(
            f"error: not merged: {' and '.join(problems)}; nothing is written. With --dtype float32 roundings are "
            "smaller, and another --image and --question may lie less on the edge",
            file=sys.stderr,
        )
        sys.exit(1)
    print(f"merged into {options.merged}")


if __name__ == "__main__":
    run(main)
