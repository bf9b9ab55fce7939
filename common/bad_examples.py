"""Training goes on without the examples that cannot be made (`--bad_examples skip`).

A filler of a few tokens takes a bad example's place in its micro-batch, with weight 0, so that all processes take
the same number of micro-steps; the weights of the step's other examples rise so that the step is the mean over them,
as it were without the bad one. Every bad example is told once, in `bad_examples.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .cli import BAD_EXAMPLES
from .data import Problem, gather_in_order
from .errors import UserError, is_first_process, rank_and_world, say
from .files import write_whole
from .together import on_first


class BadExamples:
    """A run's bad examples, the same on every process; made, and asked, by all of them together.

    Args:
        folder: the output folder. What an earlier part of the run has written there counts on.
        size: examples of the data set.
        most: the share of them that may be bad, from 0 to 1.
    """

    def __init__(self, folder: Path, size: int, most: float) -> None:
        self.file, self.size, self.most = folder / BAD_EXAMPLES, size, most
        self._not_written = ""
        # number -> what is wrong with it
        self.found: dict[int, str] = on_first(lambda: {one["index"]: one["problem"] for one in self._read()})

    def _read(self) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off, where a run was killed as it wrote
                record = json.loads(line)
                record["problem"], record["epoch"]
                found[record["index"]] = record
        if text and not text.endswith("\n"):
            self._write("\n")
        return list(found.values())

    def _write(self, text: str) -> None:
        """Append; what a full disk does not take is written with the next."""
        self._not_written += text
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(self._not_written)
            self._not_written = ""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.file, size)  # a part of it may be there
            say(f"{self.file} could not be written ({error}); it is tried again with the next bad example")

    def try_again(self, is_bad: Callable[[int, int], bool]) -> None:
        """Forget those of earlier parts of the run that can be made by now, for their files were mended (together).

        Args:
            is_bad: whether the example of a number and an epoch cannot be made; asked of the first process.
        """

        def look() -> dict[int, str]:
            records = self._read()
            still = [one for one in records if is_bad(one["index"], one["epoch"])]
            if len(still) < len(records):
                write_whole(self.file, "".join(json.dumps(one) + "\n" for one in still))
                say(f"{len(records) - len(still)} of {len(records)} bad examples can be made by now")
            return {one["index"]: one["problem"] for one in still}

        self.found = on_first(look)

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
