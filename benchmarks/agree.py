"""Whether every fast path has the reference's gradients: run before anything is timed.

    python -m benchmarks.agree
    python -m benchmarks.agree --only compiled flex    the variants that compile first, which takes most of the time

A small model with heads as wide as the published ones takes the step on two pages with eight questions in every way:
one by one, packed, shared, recomputed, with every attention that runs here. In float32 each gradient is held to the
reference's with eager attention; in bfloat16 the whole gradient may be at most three times as far from the reference's
in float32 as the reference's own in bfloat16 is (found on a CPU: up to twice as far; ten times as far where the
questions of a page see each other). LoRA takes some of the ways, too. What does not run here is said. Exit code 1
where something differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from benchmarks.measuring import (
    RESULTS,
    Gradients,
    Page,
    header,
    make_page,
    print_table,
    whole_difference,
    worst_difference,
    write_json,
)
from benchmarks.throughput import TOLERANCE, Runner, Variant
from common.cli import liger_is_installed
from common.layers import causal_lm_of

REFERENCE = "reference:attention=eager"
FLOAT32 = (
    *("reference", "single", "single:tokens=4096", "shared", "shared:tokens=4096", "shared:recompute=full,crops=2"),
    *("single:tokens=4096,attention=sdpa", "shared:tokens=4096,attention=sdpa"),
    *("single:tokens=4096,attention=flex_attention", "shared:tokens=4096,attention=flex_attention"),
    "shared:recompute=full,attention=flex_attention",
)
BFLOAT16 = (
    *("single", "shared", "single:tokens=4096", "shared:tokens=4096"),
    *("single:kernels=liger", "shared:tokens=4096,kernels=liger"),
    *("single:kernels=compiled", "shared:tokens=4096,kernels=compiled"),
    *("single:attention=flash_attention_2", "single:tokens=4096,attention=flash_attention_2"),
    "shared:tokens=4096,attention=flex_attention",
)
# with adapters autocast chooses the precision
LORA_FLOAT32 = ("reference", "single", "shared:tokens=4096")
LORA_BFLOAT16 = (
    *("single", "single:tokens=4096", "shared:tokens=4096"),
    *("single:tokens=4096,kernels=liger", "single:tokens=4096,kernels=compiled"),
)


def paths() -> list[tuple[str, torch.dtype, tuple[str, ...]]]:
    """Method, precision and variants that are compared; a method's float32 comes first."""
    return [
        ("full", torch.float32, FLOAT32),
        ("full", torch.bfloat16, BFLOAT16),
        ("lora", torch.float32, LORA_FLOAT32),
        ("lora", torch.bfloat16, LORA_BFLOAT16),
    ]


def label(method: str, variant: str, dtype: torch.dtype | str) -> str:
    """How a comparison is named."""
    return f"{'' if method == 'full' else method + ', '}{variant}, {str(dtype).removeprefix('torch.')}"


def gradients(runner: Runner, name: str, pages: list[Page]) -> Gradients:
    """Every trained parameter's gradient, in double precision."""
    runner.clear_gradients()
    runner.turn(Variant.parse(name), pages)
    return {key: gradient.to(torch.float64, copy=True) for key, gradient in runner.gradients().items()}


def draw_weights(model: torch.nn.Module) -> None:
    """Weights that keep activations large: with the initial ones a wrong position would hardly show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                continue
            is_large = name.endswith(("model.embed_tokens.weight", "position_embedding.weight", "_GN"))
            scale = 1.0 if is_large else parameter[0].numel() ** -0.5
            if "lora_" in name:  # a small change of what they are added to, as when they train
                scale *= 0.3
            drawn = torch.randn(parameter.shape, generator=generator) * (0.02 if name.endswith("bias") else scale)
            parameter.copy_(drawn.to(torch.bfloat16))  # what both precisions can hold


def why_not(variant: str, device: torch.device) -> str | None:
    """Why a variant cannot run here."""
    if "liger" in variant and (device.type == "cpu" or not liger_is_installed()):
        return "Liger's kernels need CUDA" if device.type == "cpu" else "liger-kernel is not installed"
    if "flash_attention_2" in variant and not is_flash_attn_2_available():
        return "flash-attn is not installed"
    if "flex_attention" in variant and device.type == "cpu":
        return "FlexAttention has no backward pass on a CPU"
    return None


def measure(
    device: torch.device,
    size: str = "small",
    page_width: int = 500,
    num_crops: int = 4,
    questions: int = 4,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> dict[str, Any]:
    """Every path's difference, its tolerance, and what was left out.

    Args:
        only, skip: parts of variants' names: those with none of `only`, and with any of `skip`, are not asked for.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = header(device)
    pages = [make_page(number, (page_width, round(page_width * 2200 / 1700))) for number in range(2)]
    pages = [replace(page, questions=page.questions[:questions]) for page in pages]
    rows, left_out, wanted = [], {}, {}
    for method, dtype, variants in paths():
        asked = [
            name
            for name in variants
            if (not only or any(part in name for part in only)) and not any(part in name for part in skip)
        ]
        if not asked and method in wanted:
            continue
        runner = Runner(size, method, num_crops, device, dtype)
        draw_weights(runner.model)
        causal_lm_of(runner.model).fuses_loss_from = 1  # a few answers are to show what Liger's loss gives
        reference = gradients(runner, REFERENCE, pages)
        own_error = whole_difference(reference, wanted[method]) if method in wanted else None
        wanted.setdefault(method, reference)
        for name in asked:
            reason = why_not(name, device)
            if reason:
                left_out[label(method, name, dtype)] = reason
                continue
            found = gradients(runner, name, pages)
            if own_error is None:
                (difference, parameter), tolerance = worst_difference(found, wanted[method]), TOLERANCE
            else:
                difference, parameter, tolerance = whole_difference(found, wanted[method]), "all", 3 * own_error
            rows.append(
                {
                    "method": method,
                    "variant": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "difference": float(f"{difference:.3g}"),
                    "of": parameter,
                    "tolerance": float(f"{tolerance:.3g}"),
                    "agrees": difference <= tolerance,
                }
            )
    return {**about, "size": size, "reference": REFERENCE, "rows": rows, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare gradients of every path.", allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="small", help="of the model (%(default)s)")
    parser.add_argument("--page_width", type=int, default=500, help="pixels (%(default)s)")
    parser.add_argument("--num_crops", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--questions", type=int, default=4, help="of each page, 1 to 4 (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PART", help="variants with one of these in their name"
    )
    parser.add_argument("--skip", nargs="+", default=(), metavar="PART", help="no variants with one of these in it")
    parser.add_argument("--output", type=Path, default=RESULTS / "agree.json", help="(%(default)s)")
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = (options.size, options.page_width, options.num_crops, options.questions)
    result = measure(device, *sizes, options.only, options.skip)
    rows = [
        [
            *(row[name] for name in ("method", "variant", "dtype", "difference", "tolerance")),
            "ok" if row["agrees"] else "DIFFERS",
        ]
        for row in result["rows"]
    ]
    print_table(["method", "variant", "precision", "difference of gradients", "allowed", ""], rows)
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    write_json(options.output, result)
    sys.exit(0 if all(row["agrees"] for row in result["rows"]) else 1)


if __name__ == "__main__":
    main()
