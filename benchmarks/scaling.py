"""How the training step gains from a second process on the CPU, and how equal the processes' shares are.

    python -m benchmarks.scaling

Two processes of one thread each, joined by gloo. In turn, A B A B, the first takes whole global batches alone, and both
take them together under DDP with `PackedBatchSampler` dividing each. Pages have different shapes, so that dividing by
count and by tokens differ. The spread of tokens (how much longer a step is than with perfectly equal processes) is
computed for 2, 8 and 64 processes, by tokens as the sampler divides and by count. Writes
`benchmarks/results/scaling.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measuring import RESULTS, Page, header, in_words, make_page, print_table, write_json
from benchmarks.measuring import spread as figures_of
from benchmarks.models import SIZES, make_model, make_processor, prepare
from benchmarks.throughput import estimate_tokens, make_optimizer
from common.collation import encode_questions, pack, share_pictures
from common.packing import PackedBatchSampler, Questions, spread
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import plan_layout
from common.training import GlobalBatchSampler

SHAPES = ((1.0, 1.29), (1.29, 1.0), (1.0, 1.41), (1.0, 1.6), (1.0, 0.5))  # letter, landscape, A4, legal, a strip
WORLDS = (2, 8, 64)


def make_pages(count: int, width: int) -> list[Page]:
    """Pages of different shapes."""
    return [
        make_page(number, tuple(round(width * side) for side in SHAPES[number % len(SHAPES)]))
        for number in range(count)
    ]


def describe_questions(processor: Phi3VProcessor, pages: Sequence[Page]) -> Questions:
    """What the sampler needs to know."""
    picture_tokens = [estimate_tokens(processor, page, ()) for page in pages]
    asked = [(number, question) for number, page in enumerate(pages) for question in page.questions]
    own = [estimate_tokens(processor, pages[number], [question]) - picture_tokens[number] for number, question in asked]
    return Questions([number for number, _ in asked], picture_tokens, own)


def run(rank: int, options: argparse.Namespace, folder: str) -> None:
    """One of the two processes; the first writes the seconds of every turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    processor = make_processor(options.num_crops)
    pages = make_pages(options.pages, options.page_width)
    questions = describe_questions(processor, pages)
    firsts = {}
    for question, picture in enumerate(questions.pictures):
        firsts.setdefault(picture, question)
    model = prepare(make_model(options.size, processor, torch.device("cpu"), torch.float32), processor, "full")
    engine = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])

    def epoch(world: int) -> int:
        sampler = PackedBatchSampler(questions, options.batch_size, options.max_tokens, min(rank, world - 1), world, 0)
        count = 0
        for number, groups in enumerate(sampler):
            ends_step = (number + 1) % sampler.micro_steps == 0
            documents = []
            for group in groups:
                picture = questions.pictures[group[0].index]
                examples = pages[picture].examples()
                own = [examples[key.index - firsts[picture]] for key in group]
                encoded = [{**one, "loss_weight": group[0].weight} for one in encode_questions(processor, own)]
                documents += share_pictures(encoded, processor.image_token_id, rope_threshold=4096)
                count += sum(key.weight > 0 for key in group)
            # alone without the wrapper, which now and then waits for the other process in the forward pass too
            whole = engine if world > 1 else model
            with contextlib.nullcontext() if ends_step else engine.no_sync():
                whole(**pack(documents)).loss.backward()
            if ends_step:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        return count

    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(options.rounds + 1):
        for world in (1, 2):
            dist.barrier()
            began = time.perf_counter()
            count = epoch(world) if rank < world else 0
            dist.barrier()
            if turn:  # the first is the warm-up
                seconds[world].append(time.perf_counter() - began)
            counted = torch.tensor(count)
            dist.all_reduce(counted)
            assert int(counted) == len(questions), "every question is seen once"
    if rank == 0:
        torch.save(seconds, f"{folder}/seconds")
    dist.destroy_process_group()


def spreads(batch_size: int = 64, num_pages: int = 1000) -> dict[str, dict[str, float]]:
    """How much longer steps are than with equal processes, by the number of processes; lengths at `num_crops=16`."""
    generator = random.Random(0)
    picture_tokens, pictures, own = [], [], []
    for number in range(num_pages):
        width, height = (round(1700 * side) for side in generator.choice(SHAPES))
        picture_tokens.append(plan_layout(width, height, 16).num_img_tokens)
        for _ in range(generator.choice((1, 2, 3, 4, 4, 5, 6, 6))):  # 3.9 on average
            pictures.append(number)
            own.append(generator.randint(20, 80))
    shared = Questions(pictures, picture_tokens, own)
    apart = Questions(range(len(own)), [picture_tokens[number] for number in pictures], own)
    found: dict[str, dict[str, float]] = {
        "shared, by tokens": {},
        "one by one, by tokens": {},
        "one by one, by count": {},
    }
    for world in WORLDS:
        for name, questions in (("shared, by tokens", shared), ("one by one, by tokens", apart)):
            # as few packs as there are processes
            sampler = PackedBatchSampler(questions, batch_size, 10**9, 0, world, 0)
            found[name][str(world)] = round(sampler.spread(0), 4)
        by_rank = [
            list(GlobalBatchSampler(len(own), batch_size, batch_size // world, rank, world, 0)) for rank in range(world)
        ]
        loads = [
            [sum(apart.tokens([key.index]) for key in batch) for batch in step] for step in zip(*by_rank, strict=True)
        ]
        found["one by one, by count"][str(world)] = round(spread(loads, [sum(step) for step in loads]), 4)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Questions per second of one and two processes, and the spreads."""
    about = header(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (options, folder), nprocs=2)
        seconds = torch.load(f"{folder}/seconds")
    count = sum(len(page.questions) for page in make_pages(options.pages, options.page_width))
    return {
        **about,
        **{
            name: getattr(options, name)
            for name in ("size", "num_crops", "pages", "batch_size", "max_tokens", "rounds")
        },
        "threads_per_process": 1,
        "questions_per_second": {
            str(world): figures_of([count / one for one in taken]) for world, taken in seconds.items()
        },
        "times_as_fast": figures_of([alone / both for alone, both in zip(seconds[1], seconds[2], strict=True)]),
        "token_spread": spreads(),
    }


def print_result(result: dict[str, Any]) -> None:
    """The tables."""
    rows = [[world, in_words(figures)] for world, figures in result["questions_per_second"].items()]
    print_table(["processes", "questions/s: median (smallest to largest)"], rows)
    print(f"two are {in_words(result['times_as_fast'])} times as fast as one\n")
    rows = [
        [name, *(f"{value:.1%}" for value in by_world.values())] for name, by_world in result["token_spread"].items()
    ]
    print_table(["longer than with equal processes, batch of 64", *(f"{world} processes" for world in WORLDS)], rows)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description="Time one and two processes.", allow_abbrev=False)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--num_crops", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--pages", type=int, default=10, help="an epoch (%(default)s)")
    parser.add_argument("--page_width", type=int, default=1700, help="pixels (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--max_tokens", type=int, default=2048, help="of a pass (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="epochs of either (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json", help="(%(default)s)")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    result = measure(options)
    print_result(result)
    write_json(options.output, result)


if __name__ == "__main__":
    main()
