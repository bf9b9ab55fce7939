"""How long the optimizer's step takes and how much its state holds, for each kind of AdamW that `--optim` names.

    python -m benchmarks.optimizers --method full
    python -m benchmarks.optimizers --size published --method lora

The tensors are float32 ones such as the optimizer of one process has: with LoRA and QLoRA the adapters; in full
fine-tuning, where ZeRO-2 makes one of all weights, one, in parts where bitsandbytes could not count its elements. The
kinds are the Trainer's own classes with the scripts' settings. They come one after another, and each makes its state in
a step that is not counted: a GPU need not hold the states of all of them together, but for the paged kinds, which come
last and never give theirs back. Writes `benchmarks/results/optimizers.json`, anew after every kind.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from benchmarks.measuring import RESULTS, header, in_words, print_table, spread, stopwatch, write_json
from benchmarks.models import METHODS, SIZES, make_config, make_processor
from common.cli import BITSANDBYTES_MOST, OPTIMIZERS
from common.memory import Setting, count_weights, in_parts


def make_optimizer(kind: str, weights: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """As the Trainer does for `--optim`."""
    with TemporaryDirectory() as folder:
        settings = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-7}
        arguments = TrainingArguments(folder, optim=kind, use_cpu=not weights[0].is_cuda, report_to="none", **settings)
    kind_of_adamw, given = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind_of_adamw(weights, weight_decay=0.01, **given)


def state_bytes(optimizer: torch.optim.Optimizer, weights: Sequence[torch.nn.Parameter]) -> int:
    """What the optimizer holds beside the weights and their gradients, wherever it is (with bitsandbytes' two tables of
    256 numbers)."""
    held = {
        id(value): value.numel() * value.element_size()
        for weight in weights
        for value in optimizer.state[weight].values()
        if isinstance(value, torch.Tensor)
    }
    return sum(held.values())


def sizes_of_tensors(size: str, method: str) -> list[int]:
    """Elements of each tensor that an optimizer steps."""
    config = json.dumps(make_config(size, make_processor(1)).to_dict())
    trained = count_weights(config, method, Setting.lora_rank, torch.float32.itemsize).trained
    if method in ("lora", "qlora"):
        return list(trained)
    return [sum(part) for part in in_parts(trained, int, BITSANDBYTES_MOST)]


def measure(
    size: str, method: str, rounds: int, device: torch.device, kinds: Sequence[str], output: Path | None = None
) -> dict[str, Any]:
    """Milliseconds of a step and GB of state by kind; what is not to be had here is left out, and why is told.

    Args:
        output: where the result is written after every kind: a run that is stopped leaves what it had.
    """
    trained = sizes_of_tensors(size, method)
    result = {**header(device), "size": size, "method": method, "rounds": rounds, "weights": sum(trained)}
    result |= {"kinds": {}, "left_out": {}}
    weights = [torch.nn.Parameter(torch.zeros(elements, device=device)) for elements in trained]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    for kind in kinds:
        try:
            if kind.startswith("paged") and device.type == "cpu":
                raise RuntimeError("pages on a GPU alone")
            result["kinds"][kind] = measure_kind(kind, weights, rounds)
        except (RuntimeError, ImportError, ValueError) as error:
            result["left_out"][kind] = " ".join(str(error).split())[:200]
            print(f"left out: {kind}: {result['left_out'][kind]}", flush=True)
        if output is not None:
            write_json(output, result)
    return result


def measure_kind(kind: str, weights: Sequence[torch.nn.Parameter], rounds: int) -> dict[str, Any]:
    """One kind's figures."""
    optimizer = make_optimizer(kind, weights)
    optimizer.step()  # makes the state
    milliseconds = []
    for _ in range(rounds):
        with stopwatch(weights[0].device) as seconds:
            optimizer.step()
        milliseconds.append(1000 * seconds[0])
    return {"step_milliseconds": spread(milliseconds), "state_gb": round(state_bytes(optimizer, weights) / 1e9, 3)}


def print_result(result: dict[str, Any]) -> None:
    """The table."""
    print(f"\nAdamW's step on {result['weights'] / 1e6:.0f} M weights, {result['method']} fine-tuning")
    rows = [[kind, in_words(one["step_milliseconds"]), one["state_gb"]] for kind, one in result["kinds"].items()]
    print_table(["--optim", "ms: median (smallest to largest)", "state, GB"], rows)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Time the optimizer's step.", allow_abbrev=False)
    parser.add_argument("--size", choices=sorted(SIZES), default="published" if on_gpu else "cpu")
    parser.add_argument("--method", choices=METHODS, default="full")
    parser.add_argument("--rounds", type=int, default=5, help="steps of every kind (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="(all)")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "optimizers.json", help="(%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    device = torch.device(options.device)
    result = measure(options.size, options.method, options.rounds, device, options.kinds, options.output)
    print_result(result)


if __name__ == "__main__":
    main()
