"""What a run writes down of itself when it begins, for its report: options and where each comes from, versions,
machine, data, commit, and the published row that it repeats."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .data import fingerprint
from .files import write_json
from .together import on_first

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = REPOSITORY / "tools" / "published.json"
RUN_FACTS = "run_facts.json"
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "flash-attn")
PACKAGES += ("liger-kernel", "datasets", "pillow")

# Options that divide the work, say where it goes or show more of it: a run with them may repeat a published row.
NEUTRAL_OPTIONS = {"push_to_hub", "report_images", "check_images", "max_crops_per_call"}
NEUTRAL_OPTIONS |= {"output_dir", "overwrite", "resume", "save_steps", "save_total_limit", "grace_seconds", "seed"}
NEUTRAL_OPTIONS |= {"num_workers", "logging_steps", "report_to", "tqdm", "eval_batch_size_per_gpu", "eval_steps"}
NEUTRAL_OPTIONS |= {"batch_size_per_gpu", "gradient_checkpointing", "timeout_minutes", "max_bad_steps"}
# Options that a row is made of; those of the method and the precision are compared by what they come to.
ROW_OPTIONS = {"model_name_or_path", "batch_size", "learning_rate", "num_train_epochs", "bf16", "use_flash_attention"}
ROW_OPTIONS |= {"use_lora", "use_qlora", "lora_rank", "lora_alpha_ratio", "freeze_vision_model"}


def note_origins(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Add `options.defaults`, the parser's, and `options.given`, the names of the options on the command line."""
    options.defaults = vars(parser.parse_args([]))
    absent = object()
    marked = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(options.defaults, absent)))
    options.given = sorted(name for name, value in vars(marked).items() if value is not absent)


def describe_data(data: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """For every use of data its `source`, and the `fingerprint` by which it is known again; all rows are read.

    Args:
        data: `Rows` or `Conversations`, by what for; None is left out.
    """
    there = {use: one for use, one in data.items() if one is not None}
    return {use: {"source": _source(one), "fingerprint": fingerprint(one)} for use, one in there.items()}


def write_facts(options: argparse.Namespace, data: Mapping[str, Mapping[str, str]]) -> None:
    """Write `run_facts.json` into the output folder, on the first process (together).

    Args:
        data: as `describe_data` has it.

    Raises:
        NotWrittenError: on every process, where the disk is full or fails.
    """
    on_first(lambda: write_json(options.output_dir / RUN_FACTS, run_facts(options, data)))


def run_facts(options: argparse.Namespace, data: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What is written down; see `write_facts`.

    Returns:
        `script`, `command`, `started`, `options` (each with `name`, `value`, `default` and its `origin`: given,
        default or derived), `versions`, `machine`, `data`, `commit`, `published` (see `published_row`).
    """
    return {
        "script": Path(sys.argv[0]).name,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": [
            {"name": name, "value": _plain(value), "default": _plain(options.defaults.get(name)), "origin": origin}
            for name, value, origin in _origins(options)
        ],
        "versions": versions(),
        "machine": machine(options),
        "data": dict(data),
        "commit": commit(),
        "published": published_row(options, Path(sys.argv[0]).stem.removeprefix("finetune_hf_trainer_")),
    }


def _origins(options: argparse.Namespace) -> list[tuple[str, Any, str]]:
    found = []
    for name, value in vars(options).items():
        if name in ("defaults", "given", "restarted", "resume_from", "stopping"):
            continue
        if name in options.given:
            found.append((name, value, "given"))
        elif name in options.defaults and _plain(options.defaults[name]) == _plain(value):
            found.append((name, value, "default"))
        else:
            found.append((name, value, "derived"))
    return found


def _plain(value: Any) -> Any:
    """As JSON holds it; a precision by its name, `./output/` as the path that it becomes."""
    if isinstance(value, bool | int | float | None):
        return value
    if isinstance(value, Path) or str(value).endswith("/"):
        return str(Path(value))
    return str(getattr(value, "name", value))


def _source(data: Any) -> str:
    return str(data.path) if hasattr(data, "path") else f"{data.source}, split {data.split}"


def versions() -> dict[str, str]:
    """Of Python, CUDA and the libraries that compute."""
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the run runs on: GPU and CPU by name, processes."""
    on_gpu = torch.device(options.device).type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if on_gpu else None,
        "cpu": cpu_name(),
        "processes": options.num_processes,
        "system": platform.platform(),
    }


def cpu_name() -> str:
    """As Linux tells it, else as Python does."""
    names = Path("/proc/cpuinfo")
    if names.exists() and (named := re.search(r"^model name\s*:\s*(.+)$", names.read_text(), flags=re.MULTILINE)):
        return named[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The repository's commit, and whether a file that is kept in it was changed since; None outside of git."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=REPOSITORY, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!README.md")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def published_row(options: argparse.Namespace, task: str) -> dict[str, Any] | None:
    """The row of the published tables that has a score and whose settings these are; None where there is none.

    Only a run on a GPU can repeat a row, and none that was given an option which the row does not have, but for those
    that divide the work or show more of it.

    Returns:
        `name`, `metric` as the evaluation calls it, `score` in percent, `decimals`.
    """
    if torch.device(options.device).type != "cuda" or options.eval_only or not PUBLISHED.is_file():
        return None
    tables = [
        table
        for table in json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"]
        if table["task"] == task and table["model"] == options.model_name_or_path
    ]
    for table in tables:
        own = {option.removeprefix("--") for option in table["options"]}
        if set(options.given) - NEUTRAL_OPTIONS - ROW_OPTIONS - own or not all(getattr(options, name) for name in own):
            continue
        for row in table["rows"]:
            if row.get("score") is not None and _has_settings(options, row):
                about = {name: table[name] for name in ("metric", "decimals")}
                return {"name": row["name"], "score": row["score"], **about}
    return None


def _has_settings(options: argparse.Namespace, row: Mapping[str, Any]) -> bool:
    same = [
        (options.method, row["method"]),
        (options.precision.name, row["precision"]),
        (options.batch_size, row["batch_size"]),
        (options.learning_rate, float(row["learning_rate"])),
        (options.num_train_epochs, row["epochs"]),
    ]
    if options.use_lora:
        alpha = round(options.lora_rank * options.lora_alpha_ratio)
        same += [(options.lora_rank, row.get("lora_rank")), (alpha, row.get("lora_alpha"))]
    return all(mine == published for mine, published in same)
