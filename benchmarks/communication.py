"""The tables of docs/scaling.md: ZeRO-2's and DDP's communication at 8 to 1,000 GPUs, memory beside the published and
beside peaks that `benchmarks/gpu.sh` has measured.

    python -m benchmarks.communication                  # prints them; --update writes them into the page
    python -m benchmarks.communication --intra_node 450 --inter_node 400 --seconds_full 0.3 --seconds_lora 0.2

Nothing is measured here. The model of communication, which is compared with the published rows: a collective over n
GPUs that leaves S bytes on each moves S (n - 1) / n a GPU (a reduction of gradients that all receive twice as much), at
the slower of the links in a node and of what a node has to the others, and waits for every hop. A reduction runs beside
the backward pass, but for its last bucket; the parameters are gathered after the optimizer's step, beside nothing. The
seconds that a micro-batch takes without communication are what the published row of one node leaves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS, markdown
from benchmarks.models import make_config, make_processor
from benchmarks.throughput import Variant
from common.cli import CHECKPOINTING
from common.memory import COMPUTE, Setting, count_weights, estimate, needed, peak, read_zero_configuration
from common.phi3v import Phi3VConfig
from tools.recipes import PUBLISHED, with_tables

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1000)
GPUS_PER_NODE = 8
# Assumed, and the same everywhere.
ATTAINED = 0.8  # of a link's bandwidth
SECONDS_PER_HOP = 1e-5
BACKWARD_SHARE = 3 / 4  # of a micro-batch's seconds with every layer computed again: forward 1, again 1, backward 2
OF_DEEPSPEED = ("gradient buckets", "gradients, accumulated", "the optimizer at work")  # parts of an estimate
DDP_BUCKET = 25e6  # bytes: PyTorch's default


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of node of eight GPUs: bandwidths of one direction in bytes a second."""

    name: str
    intra_node: float  # of a GPU to the others of its node
    inter_node: float  # of a node to the others


MACHINES = (
    Machine("A100", 300e9, 200e9),  # NVLink 3: 600 GB/s both ways; eight InfiniBand adapters of 200 Gb/s
    Machine("V100", 150e9, 12.5e9),  # NVLink 2: 300 GB/s both ways; one InfiniBand adapter of 100 Gb/s
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a method sends.

    Attributes:
        gradients: bytes of all gradients, reduced `every_micro_batch` or once a step, in `buckets` pieces.
        parameters: bytes gathered once a step.
    """

    gradients: float
    parameters: float
    buckets: int
    every_micro_batch: bool


def traffic(method: str) -> Traffic:
    """A method's on the published model: ZeRO-2 of ds_configs/zero2.json, or DDP of adapters of the default rank."""
    setting = Setting(method)
    config = json.dumps(Phi3VConfig().to_dict())
    trained = sum(count_weights(config, method, setting.lora_rank, setting.stored).trained)
    if setting.uses_lora:
        return Traffic(4 * trained, 0, -(-4 * trained // int(DDP_BUCKET)), every_micro_batch=False)
    zero, _ = read_zero_configuration(setting.deepspeed)
    buckets = -(-trained // int(zero["reduce_bucket_size"]))
    return Traffic(COMPUTE * trained, COMPUTE * trained, buckets, every_micro_batch=True)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step on so many GPUs: bytes that a GPU sends, and seconds; `shown` are not hidden behind the backward pass."""

    gpus: int
    examples: int
    micro_batches: int
    sent: float
    reduction: float
    gather: float
    shown: float
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.examples / self.seconds


def model_step(sends: Traffic, machine: Machine, gpus: int, examples: int, compute: float) -> Step:
    """A step of micro-batches of one example, each of which computes for `compute` seconds."""
    micro_batches = examples // gpus
    bandwidth = ATTAINED * (
        machine.intra_node if gpus <= GPUS_PER_NODE else min(machine.intra_node, machine.inter_node)
    )
    part = (gpus - 1) / gpus
    # DeepSpeed's stage 2 averages a bucket by an all-reduce, as DDP does, and keeps its part of it
    reduction = 2 * (sends.gradients * part / bandwidth + sends.buckets * (gpus - 1) * SECONDS_PER_HOP)
    gather = sends.parameters * part / bandwidth + (gpus - 1) * SECONDS_PER_HOP if sends.parameters else 0.0
    reductions = micro_batches if sends.every_micro_batch else 1
    shown = reductions * max(reduction / sends.buckets, reduction - BACKWARD_SHARE * compute) + gather
    sent = part * (2 * sends.gradients * reductions + sends.parameters)
    return Step(gpus, examples, micro_batches, sent, reduction, gather, shown, micro_batches * compute + shown)


def published_rows(machine: str, method: str) -> list[dict[str, Any]]:
    """The published rows of a machine and method, with flash attention where there are any, the fewest GPUs first."""
    machines = json.loads(PUBLISHED.read_text(encoding="utf-8"))["speed"]["machines"]
    rows = next(each["rows"] for each in machines if each["name"] == f"speed-{machine}")
    rows = [row for row in rows if row["method"] == method]
    with_flash = [row for row in rows if row["flash_attention"]]
    return sorted(with_flash or rows, key=lambda row: row["gpus"])


def compute_seconds(sends: Traffic, machine: Machine, row: dict[str, Any], examples: int = 64) -> float:
    """What a micro-batch computes for, so that the model gives the published speed of one node."""
    low, high = 0.0, examples / row["images_per_second"]
    for _ in range(60):  # a step is longer the longer its micro-batches: bisection
        middle = (low + high) / 2
        slower = model_step(sends, machine, row["gpus"], examples, middle).images_per_second < row["images_per_second"]
        low, high = (low, middle) if slower else (middle, high)
    return middle


def scaling_table(machine: Machine, method: str, compute: float | None = None) -> str:
    """8 to 1,000 GPUs, 64 examples a step or one a GPU where there are more GPUs."""
    sends = traffic(method)
    compute = compute or compute_seconds(sends, machine, published_rows(machine.name, method)[0])
    rows = []
    for gpus in GPUS:
        step = model_step(sends, machine, gpus, max(64, gpus), compute)
        shares = (step.sent / 1e9, step.reduction, step.gather, step.shown, step.seconds)
        efficiency = step.images_per_second / gpus * compute
        speed = f"{step.images_per_second:.1f}"
        rows.append(
            [gpus, step.examples, step.micro_batches, *(f"{x:.3f}" for x in shares), speed, f"{efficiency:.1%}"]
        )
    names = ("GPUs", "examples a step", "micro-batches a GPU", "a GPU sends, GB a step", "one reduction, s")
    names += ("gathering, s", "not hidden, s a step", "step, s", "images/s, modelled", "efficiency, modelled")
    return markdown(names, rows)


def check_table() -> str:
    """The model against the published rows of several nodes; those of one node set its seconds."""
    rows = []
    for machine in MACHINES:
        sends = traffic("full")
        first, *others = published_rows(machine.name, "full")
        compute = compute_seconds(sends, machine, first)
        for row in (first, *others):
            modelled = model_step(sends, machine, row["gpus"], 64, compute).images_per_second
            ideal = first["images_per_second"] * row["gpus"] / first["gpus"]
            speeds = (f"{row['images_per_second']:.2f}", f"{modelled:.2f}")
            of_ideal = [f"{compute:.3f}"] + [f"{speed / ideal:.1%}" for speed in (row["images_per_second"], modelled)]
            note = "sets the seconds" if row is first else f"{modelled / row['images_per_second'] - 1:+.1%}"
            rows.append([f"8x {machine.name}", row["nodes"], row["gpus"], *speeds, *of_ideal, note])
    names = ("machine", "nodes", "GPUs", "images/s, published", "images/s, modelled")
    names += ("a micro-batch computes, s", "of linear, published", "of linear, modelled", "modelled against published")
    return markdown(names, rows)


def memory_table() -> str:
    """Every published row of the A100 beside the estimate of this repository's way, and with the reference's logits."""
    speed = json.loads(PUBLISHED.read_text(encoding="utf-8"))["speed"]
    config, rows = Phi3VConfig(), []
    for row in next(each["rows"] for each in speed["machines"] if each["name"] == "speed-A100"):
        flash = row["flash_attention"]
        setting = Setting(row["method"], row["gpus"], flash, "full", "adamw_torch", speed["batch_size"])
        setting = dataclasses.replace(setting, attention="flash_attention_2" if flash else "eager")
        parts = estimate(config, setting)
        everywhere = estimate(config, dataclasses.replace(setting, answer_tokens=setting.tokens - 1))
        sizes = [f"{size / 1e9:.1f}" for size in (peak(parts), needed(parts), needed(everywhere))]
        attention, precision = ("flash", "bf16") if flash else ("eager", "fp16")
        rows.append([row["method"], row["gpus"], attention, precision, f"~{row['peak_gpu_gb']}", *sizes])
    names = ("method", "GPUs", "attention", "data type", "published, GB", "peak, estimated", "needed, estimated")
    return markdown((*names, "needed with logits of the whole sequence, estimated"), rows)


@dataclasses.dataclass(frozen=True)
class MeasuredPeak:
    """A measured peak, and the setting of which it is the peak.

    Attributes:
        setting: with `tokens` of a question about a picture of its own.
        together: questions that went through at once.
        kernels: of the layers, as `benchmarks/throughput.py` names them.
        measured: bytes.
    """

    gpu: str
    setting: Setting
    together: int
    kernels: str
    measured: float

    @property
    def estimated(self) -> float:
        """In bytes; these steps are taken without DeepSpeed, so without what it holds besides."""
        config = make_config("published", make_processor(self.setting.num_crops))
        return peak([part for part in estimate(config, self.setting) if part.name not in OF_DEEPSPEED])

    @property
    def difference(self) -> float:
        """The estimate against what was measured: 0.1 where it is a tenth more."""
        return self.estimated / self.measured - 1


def measured_peaks(folder: Path = RESULTS) -> list[MeasuredPeak]:
    """Every one of one question a picture at the published size; of shared pictures there is no estimate."""
    found = []
    for path in sorted(folder.glob("gpu_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("size") != "published" or "gpu" not in result["machine"]:
            continue
        for name, figures in result.get("variants", {}).items():
            variant = Variant.parse(name)
            estimated = variant.way == "single" and variant.recompute in CHECKPOINTING and not variant.crops
            if not estimated or "peak_gb" not in figures:
                continue
            tokens = round(figures["tokens_per_question"])
            together = max(1, variant.tokens // tokens)
            setting = Setting(
                method=result["method"],
                bf16=result["dtype"] == "bfloat16",
                gradient_checkpointing=variant.recompute,
                batch_size=result["batch_size"],
                tokens=tokens,
                num_crops=result["num_crops"],
                torch_compile=variant.kernels == "compiled",
                max_tokens_per_gpu=together * tokens if variant.packs else None,
            )
            measured = 1e9 * figures["peak_gb"]
            found.append(MeasuredPeak(result["machine"]["gpu"], setting, together, variant.kernels, measured))
    return found


def measured_table() -> str:
    """The measured peaks beside the estimates."""
    kernels = {"none": "", "compiled": "`--torch_compile`", "liger": "Liger's, not in the estimate"}
    rows = []
    for one in measured_peaks():
        sizes = (f"{size / 1e9:.1f}" for size in (one.measured, one.estimated))
        about = (one.setting.method, f"{one.together} x {one.setting.tokens:,}", one.setting.gradient_checkpointing)
        rows.append([one.gpu, *about, kernels[one.kernels], *sizes, f"{one.difference:+.1%}"])
    names = ("GPU", "method", "tokens at once", "computed again", "kernels", "peak measured, GB", "peak estimated, GB")
    return markdown((*names, "estimated against measured"), rows)


def tables() -> dict[str, str]:
    """Every table of docs/scaling.md by its name."""
    a100 = MACHINES[0]
    return {
        "zero2-A100": scaling_table(a100, "full"),
        "ddp-A100": scaling_table(a100, "lora"),
        "check": check_table(),
        "memory": memory_table(),
        "measured": measured_table(),
    }


def main(words: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.communication", description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the tables into docs/scaling.md")
    parser.add_argument("--intra_node", type=float, metavar="GB/S", help="a GPU's, one direction (an A100's)")
    parser.add_argument("--inter_node", type=float, metavar="GB/S", help="a node's, one direction (an A100 node's)")
    parser.add_argument("--seconds_full", type=float, metavar="S", help="of a micro-batch's computation (published)")
    parser.add_argument("--seconds_lora", type=float, metavar="S", help="the same for LoRA")
    options = parser.parse_args(words)
    if options.update:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables(), PAGE), encoding="utf-8")
        return 0
    given = {name: 1e9 * getattr(options, name) for name in ("intra_node", "inter_node") if getattr(options, name)}
    machine = dataclasses.replace(MACHINES[0], **given)
    for method in ("full", "lora"):
        compute = getattr(options, f"seconds_{method}")
        if given and not compute:
            compute = compute_seconds(traffic(method), MACHINES[0], published_rows("A100", method)[0])
        print(f"{method}:\n{scaling_table(machine, method, compute)}")
    print(check_table(), memory_table(), measured_table(), sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
