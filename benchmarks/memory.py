"""What a process holds of a data set that has few rows, and of one that has many.

    python -m benchmarks.memory                     # 1,000 and 100,000 rows; --rows for others

Every data set is held in a process of its own, by the functions that the scripts hold theirs by, up to the first
batch. What counts is the process's anonymous memory: files that are mapped into it, as `datasets` maps its rows, are
the disk's cache. A loader's worker is forked from the process and shares what it does not write to; it is measured
after it has made every row's example. Writes `benchmarks/results/memory_cpu.json` and the table into
`docs/scaling.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

import finetune_hf_trainer_docvqa as docvqa
from benchmarks.measuring import RESULTS, header, markdown, write_json
from common.conversations import check_lengths, load_conversations
from common.data import ExampleDataset, check_answers, load_rows
from common.demo import CHECKPOINT
from common.packing import PackedBatchSampler, measure_questions
from common.phi3v import Phi3VProcessor
from common.training import GlobalBatchSampler

OUT = RESULTS / "memory_cpu.json"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
KINDS = {
    "jsonl": "JSONL, a line a conversation about a picture of its own",
    "parquet": "parquet, a row a question about a picture of its own",
    "sharing": "the same with `--share_images`, which measures every question",
}
QUESTION = "What is the amount in the third row of the table?"
LIMIT = 131_072  # tokens, the published checkpoints'


# --- data sets


def picture(number: int) -> bytes:
    """A small PNG of its own content."""
    file = io.BytesIO()
    Image.new("RGB", (32 + number % 3, 32), (number % 256, number // 256 % 256, number // 65536)).save(file, "PNG")
    return file.getvalue()


def write_rows(kind: str, folder: Path, rows: int) -> None:
    """A data set of so many rows."""
    if kind == "jsonl":
        (folder / "images").mkdir()
        with open(folder / "train.jsonl", "w") as file:
            for number in range(rows):
                name = f"{number:06}.png"
                (folder / "images" / name).write_bytes(picture(number))
                turn = {"images": [name], "user": f"{QUESTION} ({number})", "assistant": f"${number}.00"}
                file.write(json.dumps({"id": f"page-{number:06}", "conversations": [turn]}) + "\n")
        return
    columns = {
        "image": [{"bytes": picture(number), "path": None} for number in range(rows)],
        "query": [{"en": f"{QUESTION} ({number})"} for number in range(rows)],
        "answers": [[f"${number}.00"] for number in range(rows)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet", row_group_size=1000)


# --- what is held


def held_bytes(field: str) -> int:
    """A field of this process's memory, once what is not in use is let go of."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def hold(kind: str, folder: Path) -> dict[str, Any]:
    """Hold a data set as a script does; the bytes that it takes.

    Returns:
        `process`: anonymous memory above what the libraries hold; `most`: the peak of the resident memory above it;
        `worker`: what a forked process has of its own after it has made every example.
    """
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=1)
    before = held_bytes("Anonymous")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    resident = peak_bytes()
    if kind == "jsonl":
        data = load_conversations(folder / "train.jsonl", folder / "images")
        dataset = ExampleDataset(len(data), lambda index, _: data.example(index), processor)
        check_lengths(data, processor, LIMIT)
    else:
        data = load_rows(str(folder), "train", docvqa.LAYOUTS, "--data_dir")
        check_answers(data, docvqa.questions)
        options = SimpleNamespace(all_questions=False, share_images=kind == "sharing", seed=0)
        dataset = docvqa.training_set(data, processor, options)
    batches = GlobalBatchSampler(len(dataset), 64, 1, 0, 1, 0)
    if kind == "sharing":
        batches = PackedBatchSampler(measure_questions(dataset, processor, 4096, 1, 0), 64, 4096, 0, 1, 0)
    epoch = iter(batches)
    next(epoch)  # holds the epoch's order
    most = peak_bytes() - resident
    return {"rows": len(dataset), "process": held_bytes("Anonymous") - before, "most": most, "worker": worker(dataset)}


def peak_bytes() -> int:
    """The most that was resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def worker(dataset: ExampleDataset) -> int:
    """What a process forked from this one has of its own after it has made every example."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = held_bytes("Private_Dirty")
        for index in range(len(dataset)):
            dataset.example(index, 0)
        os.write(writing, str(held_bytes("Private_Dirty") - before).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as found:
        grown = int(found.read())
    os.waitpid(child, 0)
    return grown


def measure(kind: str, rows: int) -> dict[str, Any]:
    """`hold` in a process of its own, of a data set written for it."""
    with tempfile.TemporaryDirectory() as name:
        write_rows(kind, Path(name), rows)
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--hold", kind, name],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": f"{name}/cache", "HF_HUB_OFFLINE": "1"},
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(ended.stdout.splitlines()[-1])


# --- the table


def table(result: dict[str, Any] | None) -> str:
    """What a process holds, for each kind of data set and number of rows."""
    if result is None:
        return "not measured\n"
    names = [
        "data set",
        "rows",
        "a process holds, MB",
        "at most, while loading, MB",
        "each loader's worker besides, MB",
    ]
    rows = [
        [KINDS[kind], f"{each['rows']:,}", *(f"{each[name] / 1e6:.0f}" for name in ("process", "most", "worker"))]
        for kind, figures in result["kinds"].items()
        for each in figures
    ]
    return markdown(names, rows)


def with_table(page: str, result: dict[str, Any] | None) -> str:
    """The text of docs/scaling.md with this table in its place."""
    before, begin, rest = page.partition("<!-- rows -->\n")
    _, end, after = rest.partition("<!-- /rows -->")
    return f"{before}{begin}\n{table(result)}\n{end}{after}"


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000], metavar="N", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="(%(default)s)")
    parser.add_argument("--hold", nargs=2, metavar=("KIND", "DIR"), help="print what holding one data set takes")
    options = parser.parse_args()
    if options.hold:
        kind, folder = options.hold
        print(json.dumps(hold(kind, Path(folder))))
        return
    result = header(torch.device("cpu"))
    result["kinds"] = {kind: [measure(kind, rows) for rows in options.rows] for kind in KINDS}
    print(table(result))
    write_json(options.out, result)
    if options.out == OUT:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
