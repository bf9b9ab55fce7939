"""The comparison on a CPU: ours against the reference's way of the same step, side by side (`make bench`).

    python -m benchmarks.cpu

A decoder of 106 M parameters in its layers, a tower of four layers of width 1,024, ten pages of 1700x2200 at
`num_crops=4` with 3.9 questions each; every variant takes its turn on every page. Then the image processors at
`num_crops=16`, and the evaluation. Writes `benchmarks/results/cpu.json`, renders `benchmarks/RESULTS.md`; the last line
prints the ratios: ours against the reference's way, more is better except for memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import evaluate, preprocess, render, throughput
from benchmarks.measuring import RESULTS, OtherLoad, header, write_json

# Where speed and memory cannot both be had, the settings for each are measured: `LEAN` recomputes every layer, as the
# reference does, and lets one crop at a time through a layer of the tower.
SINGLE, SHARED, LEAN = "single", "shared", "shared:recompute=full,crops=1"
VARIANTS = {"full": ("reference", SINGLE, SHARED, LEAN), "frozen": ("reference", SHARED)}


def ratio(result: dict[str, Any], name: str, key: str) -> float:
    """A variant's figure by the reference's."""
    return round(result["variants"][name][key] / result["variants"]["reference"][key], 3)


# What each ratio compares with the reference's way.
RATIOS = {
    "ratio_full": ("full", SINGLE, "questions_per_second"),
    "ratio_full_shared": ("full", SHARED, "questions_per_second"),
    "ratio_frozen_shared": ("frozen", SHARED, "questions_per_second"),
    "memory_ratio": ("full", LEAN, "peak_above_gb"),
    "ratio_full_shared_at_memory_ratio": ("full", LEAN, "questions_per_second"),
}


def summarise(parts: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The ratios, over all turns together."""
    return {
        **{name: ratio(parts[method], variant, key) for name, (method, variant, key) in RATIOS.items()},
        "ratio_preprocess": round(parts["preprocess"]["times_as_fast"]["median"], 3),
        "ratio_evaluate": round(parts["evaluate"]["times_as_fast"]["median"], 3),
    }


def make_parser() -> argparse.ArgumentParser:
    """The options; as many rounds as pages that ask DocVQA's 3.9 questions each on average."""
    parser = argparse.ArgumentParser(description="The comparison on a CPU.", allow_abbrev=False)
    parser.add_argument("--size", default="cpu", help="of the model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="pages, each in every variant's turn (%(default)s)")
    parser.add_argument("--page_width", type=int, default=1700, help="pixels; 1.29 times as high (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json", help="(%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    began = time.perf_counter()
    about, others = header(torch.device("cpu")), OtherLoad()
    where = ["--size", options.size, "--device", "cpu", "--dtype", "float32", "--num_crops", "4"]
    where += ["--page_width", str(options.page_width)]
    parts = {}
    for method, variants in VARIANTS.items():
        given = [*where, "--method", method, "--rounds", str(options.rounds), "--pages_per_turn", "1"]
        # one question of each page tells a one-question way's speed
        given += ["--questions_per_page", "1", "--num_workers", "0", "--compare", *variants]
        given += [] if method == "full" else ["--no-peaks"]  # `RATIOS` compares none
        parts[method] = throughput.measure(throughput.parse_options(given))
        throughput.print_result(parts[method])
    # pages enough for a median: each takes milliseconds, in which anything else is felt
    parts["preprocess"] = preprocess.measure(num_crops=16, rounds=4 * options.rounds, page_width=options.page_width)
    preprocess.print_result(parts["preprocess"])
    given = [*where, "--rounds", str(max(1, options.rounds // 5)), "--pages_per_turn", "2", "--eval_batch_size", "8"]
    parts["evaluate"] = evaluate.measure(evaluate.make_parser().parse_args(given))
    evaluate.print_result(parts["evaluate"])
    ratios = summarise(parts)
    about |= {"minutes": round((time.perf_counter() - began) / 60, 1), "taken_by_others": others.share()}
    write_json(options.output, {**about, **ratios, "compared": RATIOS, **parts})
    if options.output.parent == RESULTS:
        render.main([])  # the page holds what the folder holds
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
