"""Which questions make a step, and which of them go together through which process.

A global batch is `batch_size` questions, the same however many processes there are and however many
tokens each takes at once. Its questions are put into packs of at most so many tokens; questions about
one picture stay together, so that `share_pictures` finds them in one pack.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .collation import prefix_length
from .conversations import counting_processor, encode_without_pixels
from .data import (
    ExampleDataset,
    ExampleKey,
    Problem,
    WholeOnce,
    check_length,
    gather_in_order,
    loader_context,
    open_header,
    opening_images_by,
)
from .errors import UserError, first_of, raise_all, rank_and_world
from .phi3v import Phi3VProcessor
from .progress import progress_bar
from .together import together

Group = list[int]  # questions about one picture
Pack = list[Group]  # what goes through the model at once


@dataclass(frozen=True)
class Questions:
    """What the sampler knows of an epoch's questions; token numbers may be estimates.

    Attributes:
        pictures: for every question the number of its picture (or pair of pictures), counted from 0.
            Questions that are not to share anything have a number each.
        picture_tokens: for every picture the tokens that its questions share.
        own_tokens: for every question the tokens that it adds, its answer's included.
        problems: of those that cannot be made, which keep their places in the shuffle and are left out of their steps:
            so a run that is gone on with has the same steps when by then they can be made, or others cannot.
    """

    pictures: Sequence[int]
    picture_tokens: Sequence[int]
    own_tokens: Sequence[int]
    problems: Sequence[Problem] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    @functools.cached_property
    def bad(self) -> frozenset[int]:
        """Those that cannot be made."""
        return frozenset(problem.index for problem in self.problems)

    def tokens(self, group: Group) -> int:
        """Tokens of some questions about one picture, the picture's counted once."""
        return self.picture_tokens[self.pictures[group[0]]] + sum(self.own_tokens[question] for question in group)

    def longest_picture(self) -> int:
        """The most tokens that a picture has with all its questions."""
        totals = list(self.picture_tokens)
        for picture, own in zip(self.pictures, self.own_tokens, strict=True):
            totals[picture] += own
        return max(totals)


class _Lengths(torch.utils.data.Dataset):
    """Of every example the tokens up to its last picture's, and all.

    Args:
        epochs_of: an example's number -> the epochs in which it is drawn.
        decodes: pictures are decoded, each once; else only their headers are read.
    """

    def __init__(
        self,
        dataset: ExampleDataset,
        processor: Phi3VProcessor,
        epochs_of: Callable[[int], Iterable[int]],
        decodes: bool,
    ) -> None:
        self.dataset, self.epochs_of = dataset, epochs_of
        self.opener = WholeOnce() if decodes else open_header
        self.counting = counting_processor(processor)

    def __getitem__(self, index: int) -> tuple[int, int] | Problem:
        lengths = []
        with opening_images_by(functools.cache(self.opener)):
            for epoch in self.epochs_of(index):  # what is drawn for it, and so its length, may differ
                try:
                    lengths.append(self._measure(index, epoch))
                except UserError as error:
                    return Problem(index, epoch, str(error))
        return max(prefix for prefix, _ in lengths), max(length for _, length in lengths)

    def _measure(self, index: int, epoch: int) -> tuple[int, int]:
        example = self.dataset.example(index, epoch)
        ids = encode_without_pixels(self.counting, example)["input_ids"]
        if self.dataset.max_tokens is not None:
            check_length(example.id, len(ids), self.dataset.max_tokens)
        return prefix_length(ids, self.counting.image_token_id), len(ids)


def _look_at_share(
    indices: Sequence[int], lengths: _Lengths, num_workers: int, shows_progress: bool
) -> Iterator[tuple[int, int] | Problem]:
    """Of this process's share of the examples, in order; the first process shows how far it is."""
    rank, world = rank_and_world()
    own = indices[rank::world]
    num_workers = min(num_workers, len(own))
    loader = torch.utils.data.DataLoader(
        lengths,
        sampler=own,
        batch_size=16,
        num_workers=num_workers,
        multiprocessing_context=loader_context(num_workers),
        collate_fn=list,
    )
    title = "count tokens" if lengths.opener is open_header else "check pictures"
    with progress_bar(title, len(own), "example", shows_progress) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))


def check_examples(
    drawn: Mapping[int, Iterable[int]],
    dataset: ExampleDataset,
    processor: Phi3VProcessor,
    num_workers: int,
    shows_progress: bool,
    decodes: bool,
) -> None:
    """Make examples as the run will and count their tokens (together).

    Args:
        drawn: the examples' numbers, each with the epochs in which it is drawn.
        num_workers, shows_progress, decodes: as of `measure_questions`.

    Raises:
        UserError: on every process, with the first 20 examples that cannot be made or are too long.
    """
    lengths = _Lengths(dataset, processor, drawn.__getitem__, decodes)
    own = [one for one in _look_at_share(list(drawn), lengths, num_workers, shows_progress) if isinstance(one, Problem)]
    problems = sorted({one for share in together(lambda: own) for one in share})
    raise_all(first_of([one.text for one in problems]), everywhere=True)


def measure_questions(
    dataset: ExampleDataset,
    processor: Phi3VProcessor,
    rope_threshold: int,
    epochs: int,
    num_workers: int,
    shows_progress: bool = False,
    decodes: bool = False,
) -> Questions:
    """What the sampler must know of a data set (together).

    Every process measures its share. Where something is drawn by chance, as one of several accepted
    answers, the longest of the run's epochs counts. Where bad examples are skipped, one that cannot be made
    in any of the epochs is left out of all, and counts as of no tokens.

    Args:
        dataset: with its `pictures` where they are to be shared.
        rope_threshold: the checkpoint's `original_max_position_embeddings`: examples on both sides of it
            cannot share a picture (see `share_pictures`).
        epochs: of the run.
        num_workers: loader processes.
        shows_progress: the first process's, over its share.
        decodes: every picture is decoded, to find damage; else only headers are read.

    Raises:
        UserError: an example that cannot be made, unless such are skipped.
    """
    lengths_of = _Lengths(dataset, processor, lambda index: range(epochs), decodes)
    of_share = list(_look_at_share(range(len(dataset)), lengths_of, num_workers, shows_progress))
    measured = gather_in_order(of_share, rank_and_world()[1])
    problems = [one for one in measured if isinstance(one, Problem)]
    if problems and not dataset.skips_bad:
        raise_all(first_of([one.text for one in problems]), everywhere=True)
    lengths = [(0, 0) if isinstance(one, Problem) else one for one in measured]
    if dataset.pictures is None:
        return Questions(range(len(lengths)), [0] * len(lengths), [length for _, length in lengths], problems)
    of_picture: dict[tuple[int, bool], int] = {}
    pictures, picture_tokens = [], []
    for picture, (prefix, length) in zip(dataset.pictures, lengths, strict=True):
        pictures.append(of_picture.setdefault((picture, length > rope_threshold), len(of_picture)))
        if len(picture_tokens) < len(of_picture):
            picture_tokens.append(prefix)
        elif not picture_tokens[pictures[-1]]:  # the first question cannot be made
            picture_tokens[pictures[-1]] = prefix
    return Questions(pictures, picture_tokens, [length - prefix for prefix, length in lengths], problems)


def check_fits(questions: Questions, max_tokens: int) -> None:
    """Every process knows of all questions, and finds the same.

    Raises:
        UserError: a question that alone has more than `max_tokens`.
    """
    longest = max(range(len(questions)), key=lambda question: questions.tokens([question]), default=None)
    if longest is not None and (tokens := questions.tokens([longest])) > max_tokens:
        raise UserError(
            f"--max_tokens_per_gpu {max_tokens}: example {longest} alone has about {tokens} tokens; "
            f"give at least {tokens}, or fewer --num_crops",
            everywhere=True,
        )


class PackedBatchSampler:
    """The packs of one process, as groups of `ExampleKey`s.

    An epoch is a shuffle of the pictures, and of each picture's questions, that depends on the seed and
    the epoch alone, cut into global batches; a picture at a cut has some of its questions in either
    batch. Every question is seen exactly once per epoch, but for those that cannot be made. Where no picture
    is shared, the global batches are those of `GlobalBatchSampler`.

    Every step takes `micro_steps` packs on every process, the fewest with which every step of the run
    keeps to `max_tokens`. The longest groups are placed first, each into the pack that holds the fewest
    tokens, which makes the packs about equal. Where a step has fewer groups than packs, the rest hold the
    epoch's shortest question with weight 0, so that all processes take part in every step.

    A question's weight is such that the mean over a pack's questions (the model's loss), averaged over
    the step's packs, is the mean over the step's questions.

    Args:
        questions: the epoch's.
        batch_size: questions per global batch.
        max_tokens: the most tokens in a pack.
        rank, world: this process and how many there are.
        seed: of the shuffle.
        epochs: how many the run has, begun ones included.

    Raises:
        UserError: a question that alone has more than `max_tokens`.
    """

    def __init__(
        self,
        questions: Questions,
        batch_size: int,
        max_tokens: int,
        rank: int,
        world: int,
        seed: int,
        epochs: int = 1,
    ) -> None:
        self.questions, self.batch_size, self.max_tokens = questions, batch_size, max_tokens
        self.rank, self.world, self.seed, self.epochs = rank, world, seed, epochs
        self.epoch = 0
        check_fits(questions, max_tokens)
        good = (question for question in range(len(questions)) if question not in questions.bad)
        self.shortest = min(good, key=lambda question: questions.tokens([question]))
        # the first question about each picture stands for it in the shuffle
        self._stands_for: dict[int, int] = {}
        for question, picture in enumerate(questions.pictures):
            self._stands_for.setdefault(picture, question)
        self.micro_steps = 1
        for epoch in range(epochs):
            for batch in self.global_batches(epoch):
                while max(map(self._pack_tokens, self.divide(batch))) > max_tokens:
                    self.micro_steps += 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose shuffle comes next."""
        if epoch >= self.epochs:
            raise ValueError(f"epoch {epoch} of a sampler for {self.epochs} epochs")
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.questions) // self.batch_size) * self.micro_steps

    def __iter__(self) -> Iterator[list[list[ExampleKey]]]:
        for batch in self.global_batches(self.epoch):
            num_questions = sum(map(len, batch))
            packs = self.divide(batch)
            for pack in packs[self.rank :: self.world]:
                share = sum(map(len, pack)) / max(1, num_questions)
                weight = share * self.micro_steps * self.world
                keys = [[self._key(question, weight) for question in group] for group in pack]
                yield keys or [[self._key(self.shortest, 0.0)]]

    def _key(self, question: int, weight: float) -> ExampleKey:
        return ExampleKey(question, self.epoch, weight)

    def global_batches(self, epoch: int) -> Iterator[list[Group]]:
        """An epoch's global batches, whose groups fit into a pack each."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.questions), generator=generator).tolist()
        place = {question: position for position, question in enumerate(order)}
        pictures = self.questions.pictures
        order.sort(key=lambda question: place[self._stands_for[pictures[question]]])  # stable: theirs stay shuffled
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield self._group([question for question in batch if question not in self.questions.bad])

    def _group(self, batch: Sequence[int]) -> list[Group]:
        """A new group for another picture, and where the pack would be too long."""
        groups: list[Group] = []
        for question in batch:
            fits = (
                groups
                and self.questions.pictures[groups[-1][0]] == self.questions.pictures[question]
                and self.questions.tokens([*groups[-1], question]) <= self.max_tokens
            )
            if fits:
                groups[-1].append(question)
            else:
                groups.append([question])
        return groups

    def divide(self, batch: Sequence[Group]) -> list[Pack]:
        """A global batch's packs, micro-step by micro-step and process by process: (micro_steps * world)."""
        emptiest = [(0, number) for number in range(self.micro_steps * self.world)]
        packs: list[Pack] = [[] for _ in emptiest]
        for group in sorted(batch, key=self.questions.tokens, reverse=True):
            tokens, number = emptiest[0]
            packs[number].append(group)
            heapq.heapreplace(emptiest, (tokens + self.questions.tokens(group), number))
        # equals side by side, for processes may wait for each other in every micro-step; to and fro
        packs.sort(key=self._pack_tokens, reverse=True)
        rows = [packs[start : start + self.world] for start in range(0, len(packs), self.world)]
        return [pack for number, row in enumerate(rows) for pack in (row[::-1] if number % 2 else row)]

    def _pack_tokens(self, pack: Pack) -> int:
        return sum(map(self.questions.tokens, pack))

    def spread(self, epoch: int) -> float:
        """How much longer an epoch's steps are than if its questions' tokens were divided equally: see `spread`.

        A filler, which a process without questions of its own computes, lengthens a step and is no share of it.
        """
        filler = self.questions.tokens([self.shortest])
        loads, tokens = [], []
        for batch in self.global_batches(epoch):
            packs = [self._pack_tokens(pack) for pack in self.divide(batch)]
            tokens.append(sum(packs))
            loads.append([sum(pack or filler for pack in packs[rank :: self.world]) for rank in range(self.world)])
        return spread(loads, tokens)


def spread(tokens_per_process: Sequence[Sequence[int]], tokens: Sequence[int]) -> float:
    """How much longer steps are than with perfectly equal processes: 0.1 for a tenth.

    Args:
        tokens_per_process: (steps, world), what each process computes.
        tokens: (steps,), what is to be divided.
    """
    busiest = sum(max(loads) for loads in tokens_per_process)
    equal = sum(total / len(loads) for total, loads in zip(tokens, tokens_per_process, strict=True))
    return busiest / equal - 1
