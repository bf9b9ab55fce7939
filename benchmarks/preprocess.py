"""How fast a page becomes crops: our image processor and the reference's (`benchmarks/baseline.py`), on one core.

    python -m benchmarks.preprocess --num_crops 16

The two take turns, A B A B, on a page in colour and on the same in grey, as scans are; the reference's padding crops
are left out of the comparison of pixels, which must be equal bit for bit, but not of its time. Writes
`benchmarks/results/preprocess.json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import baseline
from benchmarks.measuring import RESULTS, decode, header, in_words, make_page, print_table, spread, write_json
from common.phi3v import Phi3VImageProcessor

WAYS = ("reference", "ours", "reference, grey page", "ours, grey page")


def measure(num_crops: int, rounds: int, page_width: int = 1700) -> dict[str, Any]:
    """Milliseconds per page of either, and how many times as fast ours is; `rounds` pages, each by both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    about = header(torch.device("cpu"))
    ours = Phi3VImageProcessor(num_crops=num_crops)
    size = (page_width, round(page_width * 2200 / 1700))
    milliseconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        page = decode(make_page(number % 10, size).image)
        for picture, names in ((page, WAYS[:2]), (page.convert("L"), WAYS[2:])):
            began = time.perf_counter()
            reference = baseline.process_picture(picture, num_crops)
            between = time.perf_counter()
            found = ours(picture)
            ended = time.perf_counter()
            own = reference["pixel_values"][0, : len(found["pixel_values"])]
            if not torch.equal(found["pixel_values"], own):
                raise RuntimeError(f"page {number}: the pixels are not the reference's")
            if number:  # the first is the warm-up
                milliseconds[names[0]].append(1000 * (between - began))
                milliseconds[names[1]].append(1000 * (ended - between))
    torch.set_num_threads(threads)
    return {
        **about,
        "page_size": size,
        "num_crops": num_crops,
        "rounds": rounds,
        "milliseconds": {name: spread(values) for name, values in milliseconds.items()},
        "times_as_fast": spread(times_as_fast(milliseconds, WAYS[:2])),
        "times_as_fast_grey": spread(times_as_fast(milliseconds, WAYS[2:])),
    }


def times_as_fast(milliseconds: dict[str, list[float]], names: Sequence[str]) -> list[float]:
    """Of each page, the first way's time by the second's."""
    reference, own = (milliseconds[name] for name in names)
    return [one / other for one, other in zip(reference, own, strict=True)]


def print_result(result: dict[str, Any]) -> None:
    """The table."""
    print(f"\na page of {result['page_size'][0]}x{result['page_size'][1]} at num_crops={result['num_crops']}, one core")
    rows = [[name, in_words(figures)] for name, figures in result["milliseconds"].items()]
    print_table(["", "ms per page: median (smallest to largest)"], rows)
    grey = in_words(result["times_as_fast_grey"])
    print(f"ours is {in_words(result['times_as_fast'])} times as fast, on grey pages {grey} times")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the image processors.", allow_abbrev=False)
    parser.add_argument("--num_crops", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="pages (%(default)s)")
    parser.add_argument("--page_width", type=int, default=1700, help="pixels; 1.29 times as high (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "preprocess.json", help="(%(default)s)")
    options = parser.parse_args()
    result = measure(options.num_crops, options.rounds, options.page_width)
    print_result(result)
    write_json(options.output, result)


if __name__ == "__main__":
    main()
