"""How long the optimizer's step takes and how much its state holds, for each kind of AdamW that `--optim` names.

    python -m benchmarks.optimizers --method full
    python -m benchmarks.optimizers --size published --method lora

The tensors are as many and as large as those that a method trains, in float32, as the scripts keep what they train; the
kinds are the Trainer's own classes with the scripts' settings. The kinds take turns, A B A B; each is made anew for its
turn and takes a step that is not counted, for a GPU need not hold the states of all of them together. Writes
`benchmarks/results/optimizers.json`.
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
from common.cli import OPTIMIZERS
from common.memory import count_weights


def make_optimizer(kind: str, weights: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """As the Trainer does for `--optim`."""
    with TemporaryDirectory() as folder:
        settings = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-7}
        arguments = TrainingArguments(folder, optim=kind, use_cpu=not weights[0].is_cuda, report_to="none", **settings)
    kind_of_adamw, given = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind_of_adamw(weights, weight_decay=0.01, **given)


def state_bytes(optimizer: torch.optim.Optimizer, weights: Sequence[torch.nn.Parameter]) -> int:
    """What the optimizer holds beside the weights and their gradients, wherever it is (bitsandbytes' 512-byte tables
    too)."""
    held = {
        id(value): value.numel() * value.element_size()
        for weight in weights
        for value in optimizer.state[weight].values()
        if isinstance(value, torch.Tensor)
    }
    return sum(held.values())


def measure(size: str, method: str, rounds: int, device: torch.device, kinds: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of a step and GB of state by kind; what is not to be had here is left out, and why is told."""
    about = header(device)
    config = json.dumps(make_config(size, make_processor(1)).to_dict())
    trained = count_weights(config, method, 64, 4).trained
    weights = [torch.nn.Parameter(torch.zeros(elements, device=device)) for elements in trained]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    milliseconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    states: dict[str, int] = {}
    on_cpu = device.type == "cpu"
    left_out = {kind: "pages on a GPU alone" for kind in kinds if on_cpu and kind.startswith("paged")}
    for _ in range(rounds):
        for kind in kinds:
            if kind in left_out:
                continue
            try:
                optimizer = make_optimizer(kind, weights)
                optimizer.step()
                with stopwatch(device) as seconds:
                    optimizer.step()
            except (RuntimeError, ImportError, ValueError) as error:
                left_out[kind] = " ".join(str(error).split())[:200]
                print(f"left out: {kind}: {left_out[kind]}", flush=True)
                continue
            milliseconds[kind].append(1000 * seconds[0])
            states[kind] = state_bytes(optimizer, weights)
            del optimizer
    return {
        **about,
        "size": size,
        "method": method,
        "rounds": rounds,
        "weights": sum(trained),
        "kinds": {
            kind: {"step_milliseconds": spread(milliseconds[kind]), "state_gb": round(states[kind] / 1e9, 3)}
            for kind in kinds
            if kind not in left_out
        },
        "left_out": left_out,
    }


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
    parser.add_argument("--rounds", type=int, default=5, help="turns of every kind (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="(all)")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "optimizers.json", help="(%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    result = measure(options.size, options.method, options.rounds, torch.device(options.device), options.kinds)
    print_result(result)
    write_json(options.output, result)


if __name__ == "__main__":
    main()
