"""Does the score suffer when the questions of a page come into one step? The same training with and without sharing.

    python -m benchmarks.sharing_score

The demo's pairs of NLVR2, whose rows have one or two statements: once every statement by itself
(`--separate_questions`), shuffled over the epoch, and once those of a pair behind one copy of it (`--share_images`).
Data, statements per step, learning rate and number of seeds are the same, and so are the first 500 pairs, which are
evaluated. Writes `benchmarks/results/sharing_score.json` and prints its table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.measuring import RESULTS, header, markdown, write_json
from common.demo import CHECKPOINT, write_nlvr2
from common.report import read_log

REPOSITORY = Path(__file__).parent.parent
WAYS = {"each statement by itself": "--separate_questions", "a pair's statements together": "--share_images"}
# At once on a process, which is no part of what is compared: statements, and pairs. A CPU has a dense mask for sharing.
AT_ONCE = {"each statement by itself": 8, "a pair's statements together": 1}
# as `make demo TASK=nlvr2` has them
OPTIONS = "--num_crops 1 --batch_size 16 --warmup_steps 10 --eval_batch_size_per_gpu 16"
OPTIONS += " --num_workers 1 --no-gradient_checkpointing --num_train_epochs 1 --learning_rate 2e-3"
OPTIONS += " --freeze_vision_model --no-report_images"


def train(data: Path, output: Path, way: str, seed: int, eval_limit: int) -> dict[str, Any]:
    """One run's score, steps and mean loss of its last steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["finetune_hf_trainer_nlvr2.py", *OPTIONS.split(), WAYS[way], "--seed", str(seed), "--overwrite"]
    command += ["--batch_size_per_gpu", str(AT_ONCE[way]), "--eval_limit", str(eval_limit)]
    command += ["--model_name_or_path", str(CHECKPOINT), "--data_dir", str(data), "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    evaluation = json.loads((output / "eval_after.json").read_text(encoding="utf-8"))
    lines = read_log(output / "train_log.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "seed": seed,
        "accuracy": evaluation["accuracy"],
        "num_examples": evaluation["num_examples"],
        "steps": lines[-1]["step"],
        "loss_at_the_end": statistics.mean(losses[-5:]),
    }


def table(measured: dict[str, Any]) -> str:
    """A row for each way."""
    rows = []
    for way, runs in measured["ways"].items():
        scores = [run["accuracy"] for run in runs]
        of_each = ", ".join(f"{score:.3f}" for score in scores)
        rows.append([way, f"`{WAYS[way]}`", f"{statistics.mean(scores):.3f}", of_each])
    return markdown(("", "option", "accuracy, mean", "of each seed"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="The score with and without sharing.", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way (%(default)s)")
    parser.add_argument("--train_pages", type=int, default=2000, help="pairs to train on (%(default)s)")
    parser.add_argument("--eval_limit", type=int, default=500, help="pairs to evaluate (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "sharing_score.json", help="(%(default)s)")
    options = parser.parse_args(arguments)
    ways: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with TemporaryDirectory() as folder:
        data = write_nlvr2(Path(folder) / "data", options.train_pages)
        for seed in range(options.seeds):
            for way, runs in ways.items():
                runs.append(train(data, Path(folder) / "output", way, seed, options.eval_limit))
                print(f"{way}: {runs[-1]}", flush=True)
    measured = {**header(torch.device("cpu")), "train_pages": options.train_pages, "ways": ways}
    write_json(options.output, measured)
    print(table(measured), end="")


if __name__ == "__main__":
    main()
