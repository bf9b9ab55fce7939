"""Training goes on without the examples that cannot be made (`--bad_examples skip`).

A filler of a few tokens takes a bad example's place in its micro-batch, with weight 0, so that all processes take
the same number of micro-steps; the weights of the step's other examples rise so that the step is the mean over them,
as it were without the bad one. Every bad example is told once, in `bad_examples.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .checkpoints import on_first
from .cli import BAD_EXAMPLES
from .data import Problem, gather_in_order
from .errors import UserError, is_first_process, rank_and_world, say


class BadExamples:
    """A run's bad examples, the same on every process; made, and asked, by all of them together.

    Args:
        folder: the output folder. What an earlier part of the run has written there counts on.
        size: examples of the data set.
        most: the share of them that may be bad, from 0 to 1.
    """

    def __init__(self, folder: Path, size: int, most: float) -> None:
        self.file, self.size, self.most = folder / BAD_EXAMPLES, size, most
        self.found: dict[int, str] = on_first(self._read)  # number -> what is wrong with it

    def _read(self) -> dict[int, str]:
        found: dict[int, str] = {}
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off, where a run was killed as it wrote
                record = json.loads(line)
                found[record["index"]] = record["problem"]
        if text and not text.endswith("\n"):
            self._write("\n")
        return found

    def _write(self, text: str) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(text)

    def leave_out(self, batches: Sequence[dict[str, Any]], step: int, device: torch.device) -> None:
        """Take the problems out of this process's micro-batches of a step, and weigh its examples anew.

        With a bad example in the step `loss_weights` are scaled on every process, so that their mean over the
        micro-batches and processes is 1 again; else nothing is touched. Where every example of a step is bad, all
        weights and so the gradient are 0.

        Args:
            batches: as the collator makes them; changed in place.
            step: from 1, for the file.
            device: that the processes communicate through.
        """
        problems = [problem for batch in batches for problem in batch.pop("problems", ())]
        weight = sum(batch["loss_weights"].double().mean().item() for batch in batches)
        totals = torch.tensor([len(problems), weight, len(batches)], dtype=torch.float64, device=device)
        if dist.is_initialized():
            dist.all_reduce(totals)
        num_problems, weight, num_batches = totals.tolist()
        if not num_problems:
            return
        self.add(gather_in_order(problems, rank_and_world()[1]), step)
        if weight == 0:
            say(f"step {step}: all of its examples are bad, so its gradient is 0")
            return
        for batch in batches:
            batch["loss_weights"] = batch["loss_weights"] * (num_batches / weight)

    def add(self, problems: Iterable[Problem], step: int) -> None:
        """Note bad examples, each once.

        Args:
            problems: the same on every process.
            step: in which they would have been used; 0 before training.
        """
        new: dict[int, Problem] = {}
        for problem in problems:
            if problem.index not in self.found:
                new.setdefault(problem.index, problem)
        if not new:
            return
        self.found |= {index: problem.text for index, problem in new.items()}
        if is_first_process():
            records = (
                {"step": step, "epoch": one.epoch, "index": one.index, "problem": one.text} for one in new.values()
            )
            self._write("".join(json.dumps(record) + "\n" for record in records))
        first = next(iter(new.values())).text
        say(f"bad examples left out: {len(new)}, so far {len(self.found)} of {self.size} ({self.file}); {first}")

    def excess(self) -> str | None:
        """Why the run must not go on: more bad examples than it may have; None where it may."""
        if len(self.found) / self.size <= self.most:
            return None
        return (
            f"{len(self.found)} of {self.size} examples are bad, more than --max_bad_fraction {self.most:g} allows: "
            f"mend those that {self.file} names, or allow more; the last: {list(self.found.values())[-1]}"
        )

    def check(self) -> None:
        """Before training.

        Raises:
            UserError: `excess`.
        """
        excess = self.excess()
        if excess is not None:
            raise UserError(excess, everywhere=True)
