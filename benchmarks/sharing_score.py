"""Does the score suffer when the questions of a page come into one step? The same training with and without sharing.

    python -m benchmarks.sharing_score --task docvqa
    python -m benchmarks.sharing_score --task nlvr2

On the demo's data: forms of three to six fields with a question about each, and pairs of pictures with one or two
statements. Once every question is an example of its own, shuffled over the epoch, and once those of a page (a pair)
stand behind one copy of it (`--share_images`). Data, questions per step, learning rate and seeds are the same, and so
are the held-out rows that are evaluated. A step then has fewer pictures: pairs are also trained with half again as many
statements per step (`--batch_size 24` for 16), of about as many pairs as the statements apart have, for as many steps,
which sees half again as many statements and as many pictures.
Writes its part of `benchmarks/results/sharing_score.json`, named by the task and by the pictures where they are not as
many as usual, and prints its table; what `--ways` does not name is kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

from benchmarks.measuring import RESULTS, commit, header, markdown, write_json
from common.demo import CHECKPOINT, QUESTIONS, as_cell, digit_scans, random_document, write_docvqa, write_nlvr2
from common.report import read_log

REPOSITORY = Path(__file__).parent.parent
APART, TOGETHER, WIDER = "each by itself", "a picture's together", "a picture's together, as many pictures a step"
WAYS = {"apart": APART, "together": TOGETHER, "wider": WIDER}
# as `make demo` has them
OPTIONS = "--num_crops 1 --batch_size 16 --warmup_steps 10 --eval_batch_size_per_gpu 16"
OPTIONS += " --num_workers 1 --no-gradient_checkpointing --num_train_epochs 1 --no-report_images"
# At once on a process, which is no part of what is compared: questions, and pictures (a dense mask on a CPU).
AT_ONCE = {APART: 8, TOGETHER: 1, WIDER: 1}


class Task(NamedTuple):
    """Of a task: what is compared, and how it is trained.

    Attributes:
        options: each way's own.
        write: (folder, pictures to train on) -> the folder with the data.
        train_pages: how many pictures, unless asked otherwise.
    """

    metric: str
    questions: str
    options: dict[str, str]
    training: str
    write: Callable[[Path, int], Path]
    train_pages: int


def write_forms(folder: Path, pages: int) -> Path:
    """The demo's forms, a row for every field of a page: so each has three to six rows with the same picture."""
    rows = []
    for number in range(pages):
        random = np.random.default_rng([1, number])
        page = random_document(random, digit_scans("train"))
        cell = as_cell(page.picture)
        for label, value in page.lines:
            question = QUESTIONS[random.integers(len(QUESTIONS))]["en"].format(label=label.lower())
            rows.append({"image": cell, "query": {"en": question}, "answers": [value]})
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "query": {"en": text}, "answers": datasets.List(text)})
    write_docvqa(folder, train_pages=1, test_pages=500)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


TASKS = {
    "docvqa": Task(
        "anls", "questions", {APART: "", TOGETHER: "--share_images"}, "--learning_rate 1e-3", write_forms, 700
    ),
    "nlvr2": Task(
        "accuracy",
        "statements",
        {
            APART: "--separate_questions",
            TOGETHER: "--share_images",
            WIDER: "--share_images --batch_size 24",
        },
        "--learning_rate 2e-3 --freeze_vision_model",
        write_nlvr2,
        2000,
    ),
}


def train(
    name: str, data: Path, output: Path, way: str, seed: int, eval_limit: int, steps: int | None = None
) -> dict[str, Any]:
    """One run's score, steps (all of an epoch, or so many) and mean loss of its last steps."""
    task = TASKS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"finetune_hf_trainer_{name}.py", *OPTIONS.split(), *task.training.split(), *task.options[way].split()]
    command += ["--batch_size_per_gpu", str(AT_ONCE[way]), "--eval_limit", str(eval_limit)]
    command += ["--seed", str(seed), "--overwrite", *(["--max_steps", str(steps)] if steps else [])]
    command += ["--model_name_or_path", str(CHECKPOINT), "--data_dir", str(data), "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    evaluation = json.loads((output / "eval_after.json").read_text(encoding="utf-8"))
    lines = read_log(output / "train_log.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "seed": seed,
        task.metric: evaluation[task.metric],
        "num_examples": evaluation["num_examples"],
        "steps": lines[-1]["step"],
        "loss_at_the_end": statistics.mean(losses[-5:]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def table(name: str, measured: dict[str, Any]) -> str:
    """A part's rows, one for each way."""
    task, rows = TASKS[name.partition("_")[0]], []
    for way in task.options:
        runs = measured[name]["ways"].get(way, [])
        if not runs:
            continue
        scores = [run[task.metric] for run in runs]
        of_each = ", ".join(f"{score:.3f}" for score in scores)
        option = f"`{task.options[way]}`" if task.options[way] else "(none)"
        rows.append([f"{task.questions}, {way}", option, f"{statistics.mean(scores):.3f}", of_each])
    metric = {"anls": "ANLS"}.get(task.metric, task.metric)
    return markdown(("", "option", f"{metric}, mean", "of each seed"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="The score with and without sharing.", allow_abbrev=False)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="(all that the task has)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way (%(default)s)")
    parser.add_argument("--train_pages", type=int, help="pictures to train on (the task's)")
    parser.add_argument("--eval_limit", type=int, default=500, help="rows to evaluate (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "sharing_score.json", help="(%(default)s)")
    options = parser.parse_args(arguments)
    task = TASKS[options.task]
    pages = options.train_pages or task.train_pages
    others = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    part = options.task if pages == task.train_pages else f"{options.task}_{pages}"
    asked = [way for way in task.options if way in [WAYS[name] for name in options.ways]]
    if not asked:
        parser.error(f"{options.task} has no way {' or '.join(options.ways)}")
    known = others.get(part, {}).get("ways", {})
    about = {**header(torch.device("cpu")), "train_pages": pages}
    if asked != list(task.options) and known:  # of the runs that are kept; each run says its own date and commit
        about = {name: value for name, value in others[part].items() if name != "ways"}
    ways: dict[str, list[dict[str, Any]]] = {way: [] if way in asked else known.get(way, []) for way in task.options}
    if WIDER in asked and APART not in asked and len(ways[APART]) < options.seeds:
        parser.error(
            f"wider takes its steps from apart: {options.seeds} runs of that are needed, {len(ways[APART])} known"
        )
    with TemporaryDirectory() as folder:
        data = task.write(Path(folder) / "data", pages)
        for seed in range(options.seeds):
            for way in asked:
                runs = ways[way]
                steps = ways[APART][seed]["steps"] if way == WIDER else None
                runs.append(train(options.task, data, Path(folder) / "output", way, seed, options.eval_limit, steps))
                print(f"{way}: {runs[-1]}", flush=True)
            # what is interrupted later keeps these
            write_json(options.output, dict(sorted({**others, part: {**about, "ways": ways}}.items())))
    print(table(part, {part: {"ways": ways}}), end="")


if __name__ == "__main__":
    main()
