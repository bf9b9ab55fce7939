"""What the measurements share: pages and questions, timing, memory, the machine, statistics, JSON and tables."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import io
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from common.collation import Example, Turn
from common.facts import commit as whole_commit

RESULTS = Path(__file__).parent / "results"
PAGE_SIZE = (1700, 2200)  # letter paper at 200 dots an inch
QUESTIONS_PER_PAGE = (4, 4, 4, 4, 4, 4, 4, 4, 4, 3)  # DocVQA asks 39,463 questions about 10,194 pages
LIBRARIES = ("torch", "torchvision", "transformers", "peft", "bitsandbytes", "pillow", "flash-attn", "liger-kernel")

# DocVQA's kind, answers included: what a page asks, in turn
QUESTIONS = (
    ("What is the date mentioned in this letter?", "1/8/93"),
    ("What is the contact person name mentioned in letter?", "P. Carter"),
    ("Which corporation's letterhead is this?", "Brown & Williamson"),
    ("Who is in cc in this letter?", "T.F. Riehl"),
    ("What is the subject of the document?", "Review of existing brainstorming ideas"),
    ("What is the amount in the third row of the table?", "$1,250.00"),
    ("How many nomination forms have been submitted?", "4"),
    ("What is the page number at the bottom?", "12"),
    ("What is the telephone number of the office?", "919-741-5000"),
    ("To whom is the letter addressed?", "Dr. J. H. Robinson"),
    ("What is the title of the second section?", "Materials and methods"),
)


# --- pages


@dataclass(frozen=True)
class Page:
    """An encoded picture and what is asked about it."""

    image: bytes
    questions: tuple[tuple[str, str], ...]

    def examples(self, count: int | None = None) -> list[Example]:
        """Its first `count` questions, with the picture decoded once for all of them."""
        picture = decode(self.image)
        asked = self.questions[:count]
        return [Example(question, [Turn(in_prompt(question), answer, [picture])]) for question, answer in asked]


def decode(image: bytes) -> Image.Image:
    """An encoded picture, its pixels read."""
    picture = Image.open(io.BytesIO(image))
    picture.load()
    return picture


def in_prompt(question: str) -> str:
    """A question as DocVQA's script puts it."""
    return f"<|image_1|>\n{question}\nAnswer briefly."


@functools.cache
def make_page(number: int, size: tuple[int, int] = PAGE_SIZE) -> Page:
    """A page of printed words, as a JPEG, and DocVQA's number of questions; the same whenever it is made."""
    generator = random.Random(number)
    width, height = size
    picture = Image.new("RGB", size, (250, 249, 245))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(8, height // 70))
    for top in range(height // 15, height - height // 15, height // 45):
        words = ["".join(generator.choices("abcdefghilmnoprstu", k=generator.randint(2, 10))) for _ in range(14)]
        indent = generator.choice((1, 1, 1, 2)) * width // 15
        draw.text((indent, top), " ".join(words)[: generator.randint(20, 75)], fill=(30, 30, 35), font=font)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    count = QUESTIONS_PER_PAGE[number % len(QUESTIONS_PER_PAGE)]
    asked = tuple(QUESTIONS[(4 * number + place) % len(QUESTIONS)] for place in range(count))
    return Page(file.getvalue(), asked)


# --- time and memory


def synchronize(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def stopwatch(device: torch.device) -> Iterator[list[float]]:
    """The seconds that the block takes are appended to the list it is given, the device's work included."""
    seconds: list[float] = []
    synchronize(device)
    began = time.perf_counter()
    yield seconds
    synchronize(device)
    seconds.append(time.perf_counter() - began)


def matrix_flops(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Operations a second of a large matrix product, the best of ten: what a training step cannot exceed."""
    side = side or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(10):
        with stopwatch(device) as seconds:
            left @ right
        times += seconds
    return 2 * side**3 / min(times)


class MemoryPeak:
    """The most memory held since `start`, in bytes: allocated on the GPU, resident without one.

    On a CPU that is the whole process's, so a way whose peak is to be known runs in a process of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Let go of what is not in use, and count from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        self.before = resident_bytes("VmRSS")

    def total(self) -> int:
        """The peak."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes("VmHWM")

    def above(self) -> int:
        """The peak above what was held at the start."""
        return self.total() - self.before


def resident_bytes(field: str) -> int:
    """`VmRSS`, what the process holds, or `VmHWM`, the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


# --- gradients

NO_GRADIENT = "k_proj.bias"  # 0 in exact arithmetic: compared with the whole gradient
Gradients = dict[str, torch.Tensor]


def worst_difference(found: Gradients, wanted: Gradients) -> tuple[float, str]:
    """The largest relative difference of a parameter's gradient, and whose it is."""
    whole = norm_of(wanted.values())
    differences = []
    for name, gradient in wanted.items():
        # that of an adapter's first half is 0 while its second half is
        norm = whole if name.endswith(NO_GRADIENT) else norm_of([gradient]) or whole
        differences.append((norm_of([found[name].double() - gradient.double()]) / norm, name))
    return max(differences)


def whole_difference(found: Gradients, wanted: Gradients) -> float:
    """The whole gradient's relative difference."""
    return norm_of(found[name] - wanted[name] for name in wanted) / norm_of(wanted.values())


def norm_of(tensors: Iterable[torch.Tensor]) -> float:
    """Of all of them together, summed in double precision."""
    return math.sqrt(sum(float(one.double().square().sum()) for one in tensors))


# --- the machine


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the code."""
    found = {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "cpu": cpu_name()}
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "gpu_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    found |= {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cpu_name() -> str:
    """As the system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str | None:
    """The measured code's, in short; None where this is no git checkout and `COMMIT` does not say it."""
    whole = whole_commit() or os.environ.get("COMMIT")
    return whole and whole[:7] + whole[40:]


def header(device: torch.device) -> dict[str, Any]:
    """What every JSON begins with: when, where, and how busy the machine was."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(device),
        "commit": commit(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


class OtherLoad:
    """How much of the processors others took since this was made: a figure is worth as much as the machine was idle."""

    def __init__(self) -> None:
        self.before = self._seconds()

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """All processors' time, their busy time, and this process's and its children's, in seconds."""
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = fields
        busy = user + nice + system + interrupts + soft_interrupts + stolen
        ticks = os.sysconf("SC_CLK_TCK")
        return sum(fields) / ticks, busy / ticks, sum(os.times()[:4])

    def share(self) -> float:
        """Of all processors' time, 0 to 1."""
        total, busy, own = (after - before for after, before in zip(self._seconds(), self.before, strict=True))
        return round(max(0.0, busy - own) / total, 4)


# --- statistics, files, tables


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, to four digits."""
    figures = {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def in_words(figures: dict[str, float]) -> str:
    """A spread as `1.52 (1.47 to 1.60)`; of a single value that alone."""
    if figures["smallest"] == figures["largest"]:
        return f"{figures['median']:.2f}"
    return f"{figures['median']:.2f} ({figures['smallest']:.2f} to {figures['largest']:.2f})"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", flush=True)


def print_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell."""
    cells = [list(map(str, row)) for row in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def markdown(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(names), ["---"] * len(names), *(list(map(str, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
