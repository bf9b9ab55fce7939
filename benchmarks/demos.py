"""What `make demo` has measured: gathers the scores of finished demos, and makes the table of docs/demo.md of them.

    python -m benchmarks.demos demo_runs

Reads `DIR/<task>/output` and `output_shuffled` of every task, prints the table, and writes
`benchmarks/results/demos.json`, which that table is held to by a test. Run it on the machine of the demos.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import RESULTS, describe_machine, markdown, write_json
from common.report import read_log

# task -> its name in the table, its metric
TASKS = {
    "docvqa": ("DocVQA", "anls"),
    "hateful_memes": ("Hateful Memes", "accuracy"),
    "nlvr2": ("NLVR2", "accuracy"),
    "ucf101": ("UCF-101, four frames", "accuracy"),
}


def gather(folder: Path, task: str) -> dict[str, Any]:
    """Scores, time and memory of one finished demo."""
    metric = TASKS[task][1]
    evaluations = {
        name: json.loads((folder / task / file).read_text(encoding="utf-8"))
        for name, file in (
            ("before", "output/eval_before.json"),
            ("after", "output/eval_after.json"),
            ("shuffled", "output_shuffled/eval_only.json"),
        )
    }
    lines = read_log(folder / task / "output" / "train_log.jsonl")
    return {
        "metric": metric,
        **{name: evaluation[metric] for name, evaluation in evaluations.items()},
        "num_examples": evaluations["after"]["num_examples"],
        "date": evaluations["after"]["time"][:10],
        "steps": lines[-1]["step"],
        "training_seconds": lines[-1]["train_runtime"],
        "memory_peak_gb": max(line["memory_peak_gb"] for line in lines if "memory_peak_gb" in line),
    }


def table(demos: dict[str, dict[str, Any]]) -> str:
    """As docs/demo.md has it."""
    names = ("task", "score", "before", "after", "on shuffled pictures", "training", "peak memory of a process")
    rows = []
    for task, found in demos.items():
        metric = {"anls": "ANLS"}.get(found["metric"], found["metric"])
        scores = [f"{found[name]:.3f}" for name in ("before", "after", "shuffled")]
        minutes, memory = f"{found['training_seconds'] / 60:.1f} minutes", f"{found['memory_peak_gb']:.1f} GB"
        rows.append([TASKS[task][0], metric, *scores, minutes, memory])
    return markdown(names, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Gather the demos' scores.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where the demos lie, as `make demo DEMO=...` has it")
    parser.add_argument("--output", type=Path, default=RESULTS / "demos.json", help="(%(default)s)")
    options = parser.parse_args(arguments)
    demos = {task: gather(options.folder, task) for task in TASKS if (options.folder / task / "output").is_dir()}
    print(table(demos), end="")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_json(options.output, {"machine": describe_machine(device), "demos": demos})


if __name__ == "__main__":
    main()
