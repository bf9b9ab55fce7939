"""Watching over a run's steps: one whose loss or gradient is not finite, one that takes far too long."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .checkpoints import CheckpointingTrainer
from .data import ExampleKey, open_header, opening_images_by
from .errors import UserError, rank_and_world, say
from .packing import PackedBatchSampler

SLOW_FACTOR = 10  # times the median is slow
SLOW_SECONDS = 30.0  # and nothing shorter
REMEMBERED, FEWEST = 50, 3  # how many durations the median is of
POLL_SECONDS = 1.0

Place = tuple[int, str]  # how many places a process has come through, and the last of them in words


def default_store() -> dist.Store | None:
    """A connection of its own to the store in which the processes found each other, for which torch has no public
    name; None where a process is alone."""
    if rank_and_world()[1] == 1:
        return None
    return dist.PrefixStore("watching", distributed_c10d._get_default_store().clone())


class _Current(NamedTuple):
    """What is going on, since when, and the median of how long its kind has taken; None where too few are known."""

    kind: str
    name: str
    began: float
    median: float | None


class Watchdog:
    """Tells which process is behind, and at what, when something takes far longer than it did before.

    A thread of every process writes where its process is into the store, at most once in `poll_seconds`; the first
    one's reads them where something is slow. The process itself only notes its place. To be used as a context.

    Args:
        rank: this process.
        world: how many there are.
        store: what all write into; None for a process alone.
        seconds: what takes no longer is never slow.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        store: dist.Store | None = None,
        seconds: float = SLOW_SECONDS,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.rank, self.world, self.store = rank, world, store
        self.seconds, self.poll_seconds = seconds, poll_seconds
        self._durations: dict[str, deque[float]] = {}
        self._current: _Current | None = None
        self._told_of: _Current | None = None
        self._tell_after = 0.0
        self._place: Place = (0, "at the beginning")
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def begin(self, kind: str, name: str, place: str | None = None) -> None:
        """Something new begins, and what came before has ended.

        Args:
            kind: of things that take about as long, as a "step".
            name: for the message.
            place: where the process now is, as for `at`.
        """
        if place is not None:
            self.at(place)
        now = time.monotonic()
        if (before := self._current) is not None:
            self._durations.setdefault(before.kind, deque(maxlen=REMEMBERED)).append(now - before.began)
        durations = self._durations.get(kind, ())
        self._current = _Current(kind, name, now, statistics.median(durations) if len(durations) >= FEWEST else None)

    def at(self, place: str) -> None:
        """Note what this process does now; every process comes through the same places."""
        self._place = (self._place[0] + 1, place)

    def each(self, batches: Iterator[Any], count: int) -> Iterator[Any]:
        """The next `count` batches (or fewer, where they end), noting which of them is waited for."""
        for number in range(1, count + 1):
            self.at(f"at micro-batch {number} of {count} (waiting for data)")
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def _watch(self) -> None:
        written: Place | None = None
        with contextlib.suppress(RuntimeError):  # without the store, which ends with the run, there is nobody to watch
            while not self._ended.wait(self.poll_seconds):
                place = self._place
                if self.store is not None and place != written:
                    self.store.set(str(self.rank), json.dumps(place))
                    written = place
                if self.rank == 0:
                    self._look()

    def _look(self) -> None:
        """Say it when something begins to be slow, and again whenever it has taken twice as long."""
        current = self._current
        if current is None or (median := current.median) is None:
            return
        if current is not self._told_of:
            self._told_of, self._tell_after = current, max(self.seconds, SLOW_FACTOR * median)
        taken = time.monotonic() - current.began
        if taken >= self._tell_after:
            self._tell_after *= 2
            times = f"{taken / max(median, 1e-3):.0f} times the median of {median:.3g} s"
            say(f"{current.name} has taken {taken:.0f} s, {times}: {in_words(self._places())}")

    def _places(self) -> list[Place]:
        places = []
        for rank in range(self.world):
            if rank == self.rank:
                places.append(self._place)
            elif self.store is not None and self.store.check([str(rank)]):  # else reading it would wait
                places.append(tuple(json.loads(self.store.get(str(rank)))))
            else:
                places.append((-1, "not heard of"))
        return places


def in_words(places: list[Place]) -> str:
    """Where the processes are, those that are behind first."""
    ranks: dict[Place, list[str]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(str(rank))
    if len(ranks) == 1:
        return f"{'the process is' if len(places) == 1 else 'all processes are'} {places[0][1]}"
    groups = sorted(ranks.items(), key=lambda group: group[0][0])
    told = []
    for place, numbers in groups:
        alone, verb = len(numbers) == 1, "is" if len(numbers) == 1 else "are"
        who = f"process {numbers[0]}" if alone else f"processes {', '.join(numbers)}"
        if told and len(groups) == 2:
            who = "the other" if alone else "the others"
        told.append(f"{who} {verb} {place[1]}")
    return ", ".join(told)


class WatchedTrainer(CheckpointingTrainer):
    """A Trainer that leaves out steps whose loss or gradient norm is not finite, ends when there are several in a row,
    and has a watchdog.

    The ordinary skips of float16's loss scaler, while it looks for a scale, are none of these steps.

    Args:
        batches: this process's micro-batches of examples' keys, by which a step's examples are known afterwards.
        max_bad_steps: so many in a row end the run.
    """

    def __init__(self, *, batches: Any, max_bad_steps: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batches, self.max_bad_steps = batches, max_bad_steps
        self.watchdog = Watchdog(*rank_and_world(), default_store())
        self._losses: list[torch.Tensor] = []  # of the step's micro-batches
        self._bad_steps: list[str] = []  # the last ones, in a row
        self._unlogged: float | None = None  # a loss that was not finite, since the last line of the log

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, watched."""
        with self.watchdog:
            return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any) -> Any:
        prepared = super()._prepare_for_training(*args)
        if self.is_deepspeed_enabled:
            optimizer = self.model_wrapped.optimizer
            optimizer.check_grad_overflow = True  # a step is left out in bfloat16 too
            optimizer.loss_scaler.raise_error_at_min_scale = False  # then the examples can be told
        return prepared

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any) -> tuple[list, Any]:
        """The micro-batches of a step, which begins."""
        self.watchdog.begin("step", f"step {self.state.global_step + 1}")
        self._losses = []
        return super().get_batch_samples(self.watchdog.each(epoch_iterator, num_batches), num_batches, *args)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward; a loss that is not finite would stay in the Trainer's sums for ever."""
        number, count = len(self._losses) + 1, self.current_gradient_accumulation_steps
        self.watchdog.at(f"at micro-batch {number} of {count}")
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The step's, just before the optimizer's turn (under DeepSpeed, which has its own check, just after it)."""
        self.watchdog.at("at the end of the step")
        norm = super()._get_grad_norm(model, grad_norm)
        figures = torch.stack([torch.stack(self._losses).sum(), self._losses[0].new_tensor(0.0)]).double()
        if norm is not None:
            figures[1] = norm
        if dist.is_initialized():
            dist.all_reduce(figures)
        loss, total = (figures / rank_and_world()[1]).tolist()
        if not math.isfinite(loss):
            self._unlogged = loss
        if math.isfinite(loss) and 0 <= total < math.inf:  # DeepSpeed may say -1
            self._bad_steps = []
        elif not math.isfinite(loss) or self._loss_scale() <= 1:
            self._add_bad_step(loss, total)
            if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
                model.zero_grad()  # without gradients the optimizer leaves weights and its state as they are
        return norm

    def _loss_scale(self) -> float:
        """float16's, above 1 while a gradient that is not finite may be the scale's fault alone."""
        if self.is_deepspeed_enabled:
            return self.model_wrapped.optimizer.loss_scale
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    def _add_bad_step(self, loss: float, norm: float) -> None:
        step = self.state.global_step + 1
        told = f"step {step}: loss {loss:g}, gradient norm {norm:g}, {self._examples_of(step)}"
        self._bad_steps.append(told)
        say(f"left out {told}")
        if len(self._bad_steps) >= self.max_bad_steps:
            problems = "\n".join(f"  - {each}" for each in self._bad_steps)
            precision = ", or --bf16 instead of float16" if self.args.fp16 else ""
            raise UserError(
                f"loss or gradient norm was not finite in {len(self._bad_steps)} steps in a row (--max_bad_steps):\n"
                f"{problems}\nLook at these examples; if nothing is wrong with them, start again with a smaller "
                f"--learning_rate than {self.args.learning_rate:g}{precision}",
                everywhere=True,
            )

    def _examples_of(self, step: int) -> str:
        """The examples that every process had in a step just taken (together), micro-batch by micro-batch."""
        each = self.args.gradient_accumulation_steps
        batches = copy.copy(self.batches)  # the loader goes on with the other
        epoch, number = divmod(step - 1, len(batches) // each)
        batches.set_epoch(epoch)
        told = []
        own = itertools.islice(batches, number * each, (number + 1) * each)
        with opening_images_by(open_header):
            for keys, loss in zip(own, self._losses, strict=True):
                groups = keys if isinstance(batches, PackedBatchSampler) else [keys]
                names = dict.fromkeys(self._name(key) for group in groups for key in group)
                told.append(", ".join(names) + ("" if torch.isfinite(loss) else f" (loss {loss:g})"))
        everyone = [told]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, told)
        return "; ".join(f"examples of process {rank}: {' | '.join(told)}" for rank, told in enumerate(everyone))

    def _name(self, key: ExampleKey) -> str:
        try:
            return str(self.train_dataset.example(key.index, key.epoch).id)
        except Exception:  # nothing may hide what is to be told
            return f"example {key.index}"

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """None while steps are not finite: what has led to that may be in the weights."""
        step = self.state.global_step
        if self._bad_steps:
            say(f"checkpoint-{step} is not written: step {step} had no finite loss and gradient norm")
            return
        self.watchdog.begin("checkpoint", f"checkpoint-{step}", "writing a checkpoint")
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A mean over a loss that was not finite is not finite."""
        if "loss" in logs and self._unlogged is not None:
            logs["loss"], self._unlogged = self._unlogged, None
        super().log(logs, start_time)
