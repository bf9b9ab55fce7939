"""How fast questions are answered: `common.evaluation.generate_answers` and the reference's one by one.

    python -m benchmarks.evaluate --size cpu --num_crops 4

The two take turns, A B A B, on the same pages with four questions each, pictures decoded and processed in the measured
time. Answers are compared: in float32 they are the same token for token. Random weights do not know when to stop, so
every answer has `--new_tokens` tokens, as many as DocVQA's have with their end (about ten). Writes
`benchmarks/results/evaluate.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import baseline
from benchmarks.measuring import (
    RESULTS,
    Page,
    header,
    in_words,
    make_page,
    print_table,
    spread,
    stopwatch,
    write_json,
)
from benchmarks.models import SIZES, make_model, make_processor
from common.cli import Precision
from common.collation import Example
from common.evaluation import generate_answers
from common.loading import end_token_ids
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor

QUESTIONS = 4  # a page


def one_by_one(model: Phi3VForCausalLM, processor: Phi3VProcessor, pages: list[Page], new_tokens: int) -> list[str]:
    """The reference's way."""
    ends = end_token_ids(processor)
    return [
        baseline.answer(model, processor, page.examples(number + 1)[number], ends, new_tokens)
        for page in pages
        for number in range(QUESTIONS)
    ]


def ours(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, pages: list[Page], new_tokens: int, options: argparse.Namespace
) -> list[str]:
    """As the scripts evaluate: an example is made of its row when it is asked for."""

    def make_example(index: int) -> Example:
        page, number = pages[index // QUESTIONS], index % QUESTIONS
        return page.examples(number + 1)[number]

    count = len(pages) * QUESTIONS
    pictures = [index // QUESTIONS for index in range(count)]
    generated = generate_answers(
        model, processor, count, make_example, options, max_new_tokens=new_tokens, pictures=pictures
    )
    return [one.text for one in generated]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Questions per second of either, and how many times as fast ours is."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    about = header(device)
    processor = make_processor(options.num_crops)
    model = make_model(options.size, processor, device, dtype).eval()
    evaluation = argparse.Namespace(
        eval_batch_size_per_gpu=options.eval_batch_size,
        num_workers=0,
        precision=Precision(options.dtype, dtype, None),
        device=device,
        tqdm=False,
        report_images=False,
    )
    size = (options.page_width, round(options.page_width * 2200 / 1700))
    # pages of four questions each
    pages, number = [], 0
    while len(pages) < options.rounds * options.pages_per_turn + 1:
        page = make_page(number, size)
        pages += [page] if len(page.questions) == QUESTIONS else []
        number += 1
    warm_up, pages = pages[:1], pages[1:]
    one_by_one(model, processor, warm_up, 2)
    ours(model, processor, warm_up, 2, evaluation)
    seconds: dict[str, list[float]] = {"reference": [], "ours": []}
    same = total = 0
    for turn in range(options.rounds):
        asked = pages[turn * options.pages_per_turn :][: options.pages_per_turn]
        with stopwatch(device) as taken:
            wanted = one_by_one(model, processor, asked, options.new_tokens)
        seconds["reference"] += taken
        with stopwatch(device) as taken:
            found = ours(model, processor, asked, options.new_tokens, evaluation)
        seconds["ours"] += taken
        same += sum(one == other for one, other in zip(found, wanted, strict=True))
        total += len(wanted)
        print(f"evaluation: round {turn + 1} of {options.rounds}", flush=True)
    questions = options.pages_per_turn * QUESTIONS
    return {
        **about,
        "size": options.size,
        "dtype": options.dtype,
        "num_crops": options.num_crops,
        "page_size": size,
        "questions_per_page": QUESTIONS,
        "new_tokens": options.new_tokens,
        "eval_batch_size": options.eval_batch_size,
        "rounds": options.rounds,
        "questions_per_second": {
            name: spread([questions / taken for taken in values]) for name, values in seconds.items()
        },
        "times_as_fast": spread(
            [reference / own for reference, own in zip(seconds["reference"], seconds["ours"], strict=True)]
        ),
        "same_answers": f"{same} of {total}",
    }


def print_result(result: dict[str, Any]) -> None:
    """The table."""
    print(f"\nanswers of {result['new_tokens']} tokens, {result['size']} size, num_crops={result['num_crops']}")
    rows = [[name, in_words(figures)] for name, figures in result["questions_per_second"].items()]
    print_table(["", "questions/s: median (smallest to largest)"], rows)
    print(f"ours is {in_words(result['times_as_fast'])} times as fast; {result['same_answers']} answers are the same")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Time the evaluation.", allow_abbrev=False)
    parser.add_argument("--size", choices=sorted(SIZES), default="published" if on_gpu else "cpu")
    parser.add_argument("--num_crops", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--new_tokens", type=int, default=10, help="of every answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--pages_per_turn", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--eval_batch_size", type=int, default=4, help="as --eval_batch_size_per_gpu (%(default)s)")
    parser.add_argument("--page_width", type=int, default=1700, help="pixels; 1.29 times as high (%(default)s)")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--output", type=Path, default=RESULTS / "evaluate.json", help="(%(default)s)")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    result = measure(options)
    print_result(result)
    write_json(options.output, result)


if __name__ == "__main__":
    main()
