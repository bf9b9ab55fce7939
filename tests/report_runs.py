"""Output folders as runs leave them, for the tests of the report: written by what the runs write with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image, ImageDraw

from common.cli import make_parser, parse_options
from common.conversations import Conversations, load_conversations
from common.data import Rows, load_rows
from common.evaluation import write_evaluation
from common.facts import write_facts
from common.metrics import anls, anls_recipe, exact_match, mean
from common.report import save_pictures

# What must come out of the page as it went in, wherever it stands.
HOSTILE = "<script>window.hacked = 1</script></script><img src=x onerror='window.hacked=1'>"
HOSTILE += " & \"q\" 'a' \u2028 {{ 7*7 }} $x_1$"


def page(number: int, width: int = 340, height: int = 440) -> Image.Image:
    """A page with lines of text, unlike any other."""
    image = Image.new("RGB", (width, height), (252, 251, 247))
    draw = ImageDraw.Draw(image)
    generator = np.random.RandomState(number)
    draw.rectangle((16, 16, width - 16, 52), fill=tuple(int(c) for c in generator.randint(90, 210, 3)))
    draw.text((24, 26), f"INVOICE No. {number:05}", fill="white")
    for line in range(70, height - 20, 16):
        draw.text((24, line), " ".join(f"{value:04x}" for value in generator.randint(0, 65536, 8)), fill=(40, 40, 50))
    return image


def document_examples(folder: Path, count: int, pictures: bool = True) -> list[dict[str, Any]]:
    """Questions about pages, `answers` accepted; one page for every second question."""
    examples = []
    for number in range(count):
        one = {"id": f"test_{number}", "question": f"What is total {number}?\nAnswer briefly."}
        one["answers"] = [f"{1000 + number}", f"{1000 + number}.00"]
        if pictures:
            one["images"] = save_pictures(folder, [page(number // 2)])
        examples.append(one)
    return examples


def write_documents(folder: Path, name: str, examples: list[dict[str, Any]], answers: list[str]) -> None:
    """`eval_<name>.json` as the DocVQA script writes it."""
    scored = []
    for one, text in zip(examples, answers, strict=True):
        scores = {"anls": anls(text, one["answers"]), "anls_recipe": anls_recipe(text, one["answers"])}
        scored.append({**one, "generated": text, **scores})
    totals = {metric: mean([one[metric] for one in scored]) for metric in ("anls", "anls_recipe")}
    write_evaluation(folder / f"eval_{name}.json", totals, scored)


def write_classes(
    folder: Path, name: str, labels: list[str], truth: list[str], answers: list[str], **more: Any
) -> None:
    """`eval_<name>.json` with an answer among `labels`, as the scripts that classify write it."""
    examples = [
        {"id": f"{name}-{number}", "answers": [label], "generated": text, "correct": exact_match(text, label), **more}
        for number, (label, text) in enumerate(zip(truth, answers, strict=True))
    ]
    for number, one in enumerate(examples):
        one["id"] = f"video-{number}"
    matrix = [
        [sum(t == row and a == column for t, a in zip(truth, answers, strict=True)) for column in labels]
        for row in labels
    ]
    confusion = {"labels": [*labels, "(other)"], "rows_true_columns_predicted": matrix}
    write_evaluation(
        folder / f"eval_{name}.json",
        {"accuracy": mean([one["correct"] for one in examples]), "confusion": confusion},
        examples,
    )


def write_log(folder: Path, steps: int = 200, every: int = 10, seed: int = 0, finished: bool = True) -> None:
    """`train_log.jsonl` in a real run's fields."""
    generator = np.random.RandomState(seed)
    lines = []
    for step in [1, *range(every, steps + 1, every)]:
        line = {"step": step, "loss": 1.4 * float(np.exp(-step / 60)) + 0.05 + 0.08 * generator.rand()}
        line |= {
            "grad_norm": 1 + float(generator.rand()),
            "learning_rate": 1e-3 * min(1, step / 20) * (1 - step / (steps + 1)),
        }
        line |= {
            "examples_per_second": 11 + float(generator.rand()),
            "tokens_per_second": 3900 + 200 * float(generator.rand()),
        }
        line |= {"data_wait_share": 0.01 * float(generator.rand()), "memory_peak_gb": 2.045, "epoch": step / steps}
        lines.append(line)
    if finished:
        lines.append({"step": steps, "train_runtime": 175.1, "train_loss": 0.19, "epoch": 1.0})
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def options_of(folder: Path, *words: str, script: str = "finetune_hf_trainer_docvqa.py") -> argparse.Namespace:
    """The options as a script parses them."""
    parser = make_parser("A test.")
    parser.add_argument("--full_train", action="store_true")
    with mock.patch("sys.argv", [script, "--output_dir", str(folder), "--overwrite", *words]):
        return parse_options(parser)


def write_run(folder: Path, count: int = 12, seed: int = 0, pictures: bool = True, steps: Sequence[int] = ()) -> Path:
    """A finished DocVQA run: a quarter of the answers each gained, lost, still wrong and right both times.

    Args:
        steps: at which it evaluated while training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    examples = document_examples(folder, count, pictures)
    right = [one["answers"][0] for one in examples]
    before = [text if number % 4 in (1, 3) else "nothing here" for number, text in enumerate(right)]
    after = [text if number % 4 in (0, 3) else "no idea" for number, text in enumerate(right)]
    write_documents(folder, "before", examples, before)
    for step in steps:
        write_documents(folder, f"step_{step}", examples, after)
    write_documents(folder, "after", examples, after)
    write_log(folder, seed=seed)
    with mock.patch("sys.argv", ["finetune_hf_trainer_docvqa.py", "--output_dir", str(folder)]):
        write_facts(options_of(folder, "--batch_size", "8", "--learning_rate", "1e-3"), {})
    return folder


def conversations_of(folder: Path, records: list[dict[str, Any]]) -> Conversations:
    """Records as a JSONL file and read again."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_conversations(path, folder)


def rows_of(source: Path, split: str) -> Rows:
    """Rows as the scripts load them."""
    return load_rows(str(source), split, (("image", "query", "answers"), ("images", "texts")), "--data_dir")
