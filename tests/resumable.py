"""A small training run that is interrupted and resumed; a script of its own for torchrun.

    python tests/resumable.py OUTPUT [--at STEP --do stop|kill|group|hang] [--full_at STEP] [--deepspeed JSON]

Three epochs of five steps of two accumulated micro-batches, with dropout; checkpoints every third step and lines of
the log every fourth, so that they fall apart. What is done at a step is done only by the run that begins from nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainingArguments, set_seed

from common.checkpoints import CheckpointingTrainer, checkpoint_to_resume, remove_incomplete
from common.stopping import Stopping, outlive_stop_signals
from common.training import GlobalBatchSampler, _EpochLoader

SIZE, BATCH, AT_ONCE = 38, 8, 2  # five steps an epoch, the last of them filled up
STEPS = 15


class Model(torch.nn.Module):
    """Two layers with dropout between; under DeepSpeed named as it expects of transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=16)
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 1)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """(batch, 16) and (batch,) -> the loss."""
        error = self.second(self.dropout(self.first(x).relu()))[:, 0] - x.sum(1)
        return {"loss": (weight * error**2).mean()}


class Examples(torch.utils.data.Dataset):
    """Drawn anew each epoch, as a recipe's are."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, key: Any) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * key.epoch + key.index)
        return {"x": torch.randn(16, generator=generator), "weight": torch.tensor(key.weight)}


class SmallTrainer(CheckpointingTrainer):
    """With the recipe's own batches; what a process must not load, it prints."""

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        workers = self.args.dataloader_num_workers
        at_once, rank, world = AT_ONCE, self.args.process_index, self.args.world_size
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=GlobalBatchSampler(SIZE, BATCH, at_once, rank, world, seed=7),
            collate_fn=self.data_collator,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=outlive_stop_signals,
        )


class AtStep(TrainerCallback):
    """What happens to the process during a step."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.do()


def small_arguments(folder: Path, **given: Any) -> TrainingArguments:
    """Three epochs; `given` beside, or instead of, what is here."""
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": AT_ONCE,
        "gradient_accumulation_steps": BATCH // AT_ONCE // int(os.environ.get("WORLD_SIZE", "1")),
        "num_train_epochs": 3,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "logging_steps": 4,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "seed": 3,
    }
    return TrainingArguments(**{**arguments, **given})


def write_weights(model: torch.nn.Module, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
    """The trainers' `write_model`."""
    save_file(weights or model.state_dict(), folder / "model.safetensors")


def make_trainer(
    folder: Path, callbacks: list[TrainerCallback], stopping: Any, workers: int = 0, **arguments: Any
) -> SmallTrainer:
    """A trainer that begins from the same weights each time."""
    args = small_arguments(folder, warmup_steps=2, dataloader_num_workers=workers, **{"save_steps": 3, **arguments})
    set_seed(3)
    model = Model()
    return SmallTrainer(
        model=model,
        args=args,
        train_dataset=Examples(),
        callbacks=callbacks,
        write_model=functools.partial(write_weights, model),
        stopping=stopping,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--at", type=int)
    parser.add_argument("--do")
    parser.add_argument("--full_at", type=int)
    parser.add_argument("--deepspeed")
    parser.add_argument("--grace", type=float, default=20)
    options = parser.parse_args()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: value for name, value in alone.items() if "WORLD_SIZE" not in os.environ})
    rank = int(os.environ["RANK"])
    # as a recipe does: another ninja would compile DeepSpeed's extension once more
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def interrupt() -> None:
        if options.do == "group":  # as torchrun and Slurm do: everyone, loader workers included
            # from another process, for a worker obeys its own; then time for what dies of it to be noticed
            subprocess.run(["sh", "-c", f"kill -TERM -{os.getpgid(0)}"], check=False)
            time.sleep(2)
        elif rank == 0:
            os.kill(os.getpid(), signal.SIGKILL if options.do == "kill" else signal.SIGUSR1)
        if options.do == "hang":
            time.sleep(600)

    stopping = Stopping(options.grace)
    trainer = make_trainer(options.output, [], stopping, workers=1, deepspeed=options.deepspeed)
    remove_incomplete(options.output)
    resumed = checkpoint_to_resume("auto", options.output)
    if options.at and resumed is None:
        trainer.add_callback(AtStep(options.at, interrupt))
    if options.full_at and resumed is None and rank == int(os.environ["WORLD_SIZE"]) - 1:
        for step, most in ((options.full_at, 50), (options.full_at + 1, resource.RLIM_INFINITY)):
            limits = (most, resource.RLIM_INFINITY)
            trainer.add_callback(AtStep(step, functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)))
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    print(f"RESUMED {rank} {resumed and resumed.name}\n", end="", flush=True)
    trainer.save_model(str(options.output))
    if rank == 0:
        (options.output / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
