"""A small training run whose examples, or one of whose processes, go wrong; a script of its own for torchrun.

    python tests/watched.py OUTPUT [--bad STEP …] [--slow STEP] [--deepspeed JSON] [--bf16] [--fp16] [--resume FOLDER]

The run of tests/resumable.py, with a checkpoint at every step and a line of the log at every second. With `--bad`
the example that the last process has first in a step is not a number; with `--slow` that process waits for its data
for some seconds, after an evaluation that took as long.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from deepspeed.accelerator import get_accelerator
from transformers import TrainerCallback, set_seed

from common.data import ExampleKey
from common.errors import run, say
from common.packing import PackedBatchSampler, Questions
from common.stopping import Stopping
from common.training import GlobalBatchSampler, _EpochLoader
from common.watching import WatchedTrainer
from tests.resumable import AT_ONCE, BATCH, SIZE, AtStep, Examples, Model, small_arguments, write_weights

SLOW = 4.0  # seconds


class BadModel(Model):
    """An example may say of itself that the loss, or the gradient alone, is not a number."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, fault: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = super().forward(x, weight)["loss"]
        if (fault == 1).any():
            loss = loss * torch.nan
        elif (fault == 2).any():
            loss = loss + (0 * self.second.bias.float()).sum().sqrt()  # whose slope is infinite
        return {"loss": loss}


class BadExamples(Examples):
    """Some have a fault: 1 for a loss, 2 for a gradient that is not a number."""

    def __init__(self) -> None:
        self.faults: dict[tuple[int, int], int] = {}  # by epoch and number
        self.slow: set[tuple[int, int]] = set()
        self.asked: list[list[ExampleKey]] = []

    def __getitem__(self, keys: Any) -> Any:
        if isinstance(keys, list):  # a group
            return [self[key] for key in keys]
        self.asked.append(keys)
        if (keys.epoch, keys.index) in self.slow:
            time.sleep(SLOW)
        fault = self.faults.get((keys.epoch, keys.index), 0)
        return {**super().__getitem__(keys), "fault": torch.tensor(fault)}

    def example(self, index: int, epoch: int) -> SimpleNamespace:
        return SimpleNamespace(id=f"row {index}")


class Trainer(WatchedTrainer):
    """With the recipe's own batches, packed or not."""

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return _EpochLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=collate)


def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
    """Examples, or groups of them."""
    flat = [one for group in examples for one in (group if isinstance(group, list) else [group])]
    return {name: torch.stack([one[name] for one in flat]) for name in flat[0]}


def make_batches(packs: bool, rank: int, world: int) -> GlobalBatchSampler | PackedBatchSampler:
    if not packs:
        return GlobalBatchSampler(SIZE, BATCH, AT_ONCE, rank, world, seed=7)
    pictures = [number // 2 for number in range(SIZE)]
    questions = Questions(pictures, [10] * (SIZE // 2), [1 + number % 3 for number in range(SIZE)])
    return PackedBatchSampler(questions, BATCH, 40, rank, world, seed=7, epochs=3)


def make_trainer(folder: Path, stopping: Any, packs: bool = False, **given: Any) -> Trainer:
    """A trainer that begins from the same weights each time; give it faults by `train_dataset.faults`."""
    max_bad_steps = given.pop("max_bad_steps", 3)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    batches = make_batches(packs, rank, world)
    given = {"save_steps": 1, "logging_steps": 2, "logging_nan_inf_filter": False, **given}
    if packs:
        given["gradient_accumulation_steps"] = batches.micro_steps
    arguments = small_arguments(folder, **given)
    set_seed(3)
    model = BadModel()
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=BadExamples(),
        data_collator=lambda examples: examples,
        write_model=functools.partial(write_weights, model),
        stopping=stopping,
        batches=batches,
        max_bad_steps=max_bad_steps,
    )


def keys_of(step: int, packs: bool, rank: int, world: int) -> list[list[ExampleKey]]:
    """The micro-batches of a step, found by going through the whole run."""
    batches = make_batches(packs, rank, world)
    each = batches.micro_steps if packs else BATCH // AT_ONCE // world
    found: list[list[ExampleKey]] = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        found += [[key for group in one for key in group] if packs else one for one in batches]
    return found[(step - 1) * each : step * each]


def spoil(dataset: BadExamples, steps: Collection[int], world: int = 1, fault: int = 1, packs: bool = False) -> None:
    """Give the example that the last process has first in each of the steps a fault."""
    for step in steps:
        key = keys_of(step, packs, world - 1, world)[0][0]
        dataset.faults[key.epoch, key.index] = fault


class Scales(TrainerCallback):
    """Prints the loss scale after every step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say(f"SCALE {state.global_step} {self.trainer._loss_scale():g}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--bad", type=int, nargs="*", default=[])
    parser.add_argument("--slow", type=int)
    parser.add_argument("--deepspeed")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--resume")
    options = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    world = int(os.environ["WORLD_SIZE"])
    if options.fp16:  # for which DeepSpeed wants instructions that few CPUs have, and torch does without
        get_accelerator().is_fp16_supported = lambda: True
    given = {"deepspeed": options.deepspeed, "bf16": options.bf16, "fp16": options.fp16}
    trainer = make_trainer(options.output, Stopping(20), **given)
    spoil(trainer.train_dataset, options.bad, world)
    if options.slow:
        trainer.watchdog.seconds, trainer.watchdog.poll_seconds = SLOW / 2, 0.1
        key = keys_of(options.slow, False, world - 1, world)[1][0]
        trainer.train_dataset.slow.add((key.epoch, key.index))

        def evaluate() -> None:
            trainer.watchdog.begin("evaluation", "the evaluation")
            time.sleep(SLOW)

        trainer.add_callback(AtStep(options.slow - 1, evaluate))
    if options.fp16:
        trainer.add_callback(Scales(trainer))
    trainer.train(resume_from_checkpoint=options.resume)
    print("TRAINED\n", end="", flush=True)


if __name__ == "__main__":
    run(main)
