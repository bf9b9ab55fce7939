"""Check a whole data set in the JSONL format before training on it.

    python -m tools.check_data ucf101/ucf101_train.jsonl ucf101/ucf101_val.jsonl --image_dir ucf101/images --num_crops 4

Prints a table (rows, images, tokens) and every fault with its file and line. Exit code 0: no faults; 1: faults;
2: wrong options.

What is checked: JSON in UTF-8; fields and their types; ids that stand twice in a file; empty texts; image tags and
other control tokens in the texts; paths that leave the image folder; every picture, decoded once however often it is
named; and at the given `--num_crops` whether a picture is too thin and a conversation too long for the model. These are
the functions that training runs when it loads a file (`common/conversations.py`); the pictures that it trains on it
decodes before it starts, so this tool is for looking at a whole data set without a model or a GPU.

Tokens are those that training sees: every text by the checkpoint's own tokenizer, every picture from its size. Where
the default checkpoint cannot be reached no other tokenizer takes its place: the table then counts the pictures' tokens
only, and says so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from common.cli import MAX_NUM_CROPS, revision_problems
from common.conversations import (
    Conversations,
    Line,
    Size,
    find_problems,
    gather,
    measure_image,
    measure_lengths,
    picture_files,
    read_lines,
)
from common.errors import UserError, raise_all, run
from common.loading import load_processor, longest_sequence
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import plan_layout

DEFAULT_MODEL = "microsoft/Phi-3.5-vision-instruct"  # the scripts' own
CHUNK = 16  # pictures that a worker takes at once


@dataclass(frozen=True)
class Checked:
    """What one file holds.

    Attributes:
        tokens: of the rows that could be counted, with their line numbers.
        faults: with file and line, in the order of the lines.
    """

    path: Path
    rows: int
    images: int
    tokens: dict[int, int]
    faults: list[str]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; all wrong ones reported at once."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_data",
        description="Check a data set in the JSONL format before training on it.",
        allow_abbrev=False,
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="JSONL files")
    parser.add_argument("--image_dir", type=Path, required=True, help="the folder that image paths are relative to")
    parser.add_argument(
        "--num_crops", type=int, default=MAX_NUM_CROPS, help="as training will be given it (%(default)s)"
    )
    parser.add_argument(
        "--model_name_or_path", help=f"the checkpoint whose tokenizer counts: hub id or folder ({DEFAULT_MODEL})"
    )
    parser.add_argument("--revision", metavar="COMMIT", help="of a hub id: commit, branch or tag (its main branch)")
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count(), help="processes that decode pictures (%(default)s)"
    )
    options = parser.parse_args(arguments)
    problems = [f"{path}: there is no such file" for path in options.paths if not path.is_file()]
    problems += revision_problems(options.revision, options.model_name_or_path)
    if not options.image_dir.is_dir():
        problems.append(f"--image_dir {options.image_dir}: there is no such folder")
    if not 1 <= options.num_crops <= MAX_NUM_CROPS:
        problems.append(f"--num_crops {options.num_crops}: it must be 1 to {MAX_NUM_CROPS}")
    if options.num_workers < 1:
        problems.append(f"--num_workers {options.num_workers}: it must be at least 1")
    raise_all(problems)
    return options


def load_tokenizer(options: argparse.Namespace) -> tuple[Phi3VProcessor, int] | None:
    """The checkpoint's processor and the model's limit in tokens; None where the default one cannot be reached.

    Raises:
        UserError: when the checkpoint that was asked for cannot be used.
    """
    asked_for = options.model_name_or_path
    if not asked_for:
        print(f"looking for the tokenizer of {DEFAULT_MODEL}", file=sys.stderr, flush=True)
    wanted = argparse.Namespace(
        model_name_or_path=asked_for or DEFAULT_MODEL, revision=options.revision, num_crops=options.num_crops
    )
    try:
        return load_processor(wanted), longest_sequence(wanted)
    except UserError:
        if not asked_for:
            return None
        raise


def measure_images(files: Sequence[Path], num_workers: int) -> dict[Path, Size | str]:
    """Decode every picture, in worker processes; of each its size or what is wrong with it."""
    progress = partial(tqdm, total=len(files), desc="pictures", unit="", disable=not sys.stderr.isatty())
    if num_workers == 1:
        return dict(zip(files, progress(map(partial(measure_image, decode=True), files)), strict=True))
    sizes: dict[Path, Size | str] = {}
    pool = ProcessPoolExecutor(min(num_workers, len(files) // CHUNK + 1), mp_context=get_context("fork"))
    try:
        found = pool.map(partial(measure_image, decode=True), files, chunksize=CHUNK)
        for file, size in zip(files, progress(found), strict=True):
            sizes[file] = size
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died of a crash or for want of memory while it decoded a picture, "
            f"{files[len(sizes)]} or one named after it: try again with a lower --num_workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return sizes


def check(
    path: Path,
    lines: Sequence[Line],
    sizes: dict[Path, Size | str],
    tokenizer: tuple[Phi3VProcessor, int] | None,
    options: argparse.Namespace,
) -> Checked:
    """Everything about one file."""
    faults: dict[int, list[str]] = {}
    for line in lines:
        faults[line.number] = [f"{path}, line {line.number}: {problem}" for problem in find_problems(line, sizes)]
    data = gather(path, options.image_dir, [line for line in lines if not faults[line.number]], sizes)
    tokens = {}
    measured = measure_lengths(data, *tokenizer) if tokenizer else measure_pictures(data, options.num_crops)
    for number, (count, fault) in zip(data.lines, measured, strict=True):
        if count is not None:
            tokens[number] = count
        if fault:
            faults[number].append(fault)
    listed = [fault for number in faults for fault in faults[number]]
    return Checked(
        path, len(lines), sum(len(line.pictures) for line in lines), tokens, listed if lines else [f"{path} is empty"]
    )


def measure_pictures(data: Conversations, num_crops: int) -> list[tuple[int | None, str | None]]:
    """As `measure_lengths`, of the pictures alone."""
    measured: list[tuple[int | None, str | None]] = []
    for index, sizes in enumerate(data.sizes):
        try:
            measured.append((sum(plan_layout(*size, num_crops).num_img_tokens for size in sizes), None))
        except ValueError as error:
            measured.append((None, f"{data.place(index)}: {error}"))
    return measured


def show(results: Sequence[Checked], tokenizer: tuple[Phi3VProcessor, int] | None, options: argparse.Namespace) -> None:
    """Print the faults, then the table, then what the tokens are."""
    for one in results:
        for fault in one.faults:
            print(fault)
    if any(one.faults for one in results):
        print()
    width = max(4, *(len(str(one.path)) for one in results))
    print(
        f"{'file':<{width}} {'rows':>9} {'images':>9} {'min':>8} {'median':>8} {'max':>8} {'in line':>9} {'faults':>8}"
    )
    for one in results:
        low = median = high = where = "-"
        if one.tokens:
            where, high = max(one.tokens.items(), key=lambda item: item[1])
            low, median = min(one.tokens.values()), f"{statistics.median(one.tokens.values()):.0f}"
        print(
            f"{one.path!s:<{width}} {one.rows:>9} {one.images:>9} {low:>8} {median:>8} {high:>8} {where:>9} "
            f"{len(one.faults):>8}"
        )
    counted, rows = sum(len(one.tokens) for one in results), sum(one.rows for one in results)
    of_rows = f"of {counted} of {rows} rows, at --num_crops {options.num_crops}"
    if tokenizer:
        print(
            f"min, median, max: tokens {of_rows}, by the tokenizer of {options.model_name_or_path or DEFAULT_MODEL}; "
            f"the model takes {tokenizer[1]}"
        )
    else:
        print(
            f"min, median, max: tokens of the PICTURES ONLY, {of_rows}. {DEFAULT_MODEL} cannot be reached, so texts "
            "were not counted and no length was checked: give a checkpoint folder with --model_name_or_path"
        )


def main() -> None:
    options = parse()
    sys.stdout.reconfigure(errors="backslashreplace")  # no character of the data ends a long check in an error
    tokenizer = load_tokenizer(options)
    lines_of = {path: read_lines(path, options.image_dir) for path in dict.fromkeys(options.paths)}
    files = picture_files(line for lines in lines_of.values() for line in lines)
    sizes = measure_images(files, options.num_workers)
    results = [check(path, lines, sizes, tokenizer, options) for path, lines in lines_of.items()]
    show(results, tokenizer, options)
    if any(one.faults for one in results):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
