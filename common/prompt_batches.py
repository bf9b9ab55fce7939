"""Which prompts are answered together, and the cache of what those about the same pictures begin with.

Notation used for tensor shapes
- examples: rows of a batch
- prefix: positions of what a group's prompts begin with, up to the last of their pictures' tokens
- columns: positions of a batch's longest prefix; shorter ones are padded on the left
- heads, head_size: of the decoder's keys and values
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from .collation import prefix_length
from .layers import causal_lm_of
from .phi3v import Phi3VProcessor

LOOK_AHEAD = 8  # batches whose prompts are sorted by length, so that few positions are padding
# Questions that take about as long to answer as a picture takes to become a prefix, for dealing: assumed.
PREFIX_WORK = 4

# Numbers and encoded prompts of examples about the same pictures; of one that cannot be made its `problem`.
Group = list[tuple[int, dict[str, Any]]]
# Of a prefix every decoder layer's keys and values, (heads, prefix, head_size) each.
States = list[tuple[torch.Tensor, torch.Tensor]]


class Part(NamedTuple):
    """Those of a group's prompts that are in one batch; where others are left they begin the next batch."""

    group: Group
    first: int
    stop: int

    @property
    def asked(self) -> Group:
        return self.group[self.first : self.stop]

    @property
    def goes_on(self) -> bool:
        return self.stop < len(self.group)


def deal(pictures: Sequence[int], most: int, world: int) -> list[list[list[int]]]:
    """Group examples about the same pictures, and deal the groups to the processes.

    The greatest are dealt first, each to the process that has the least to do until then. One that is larger than an
    equal share, and than a batch, is divided; so is one of more than a stretch of batches, which a worker of the loader
    would be long about.

    Args:
        pictures: for every example the number of its pictures.
        most: examples of a batch.
        world: how many processes there are.

    Returns:
        For every process its groups of examples' numbers, in the order of their first ones.
    """
    of_picture: dict[int, list[int]] = {}
    for number, picture in enumerate(pictures):
        of_picture.setdefault(picture, []).append(number)
    size = max(most, min(-(-len(pictures) // world), LOOK_AHEAD * most))
    groups = [
        numbers[start : start + size] for numbers in of_picture.values() for start in range(0, len(numbers), size)
    ]
    dealt: list[list[list[int]]] = [[] for _ in range(world)]
    work = [0] * world
    for group in sorted(groups, key=len, reverse=True):
        idlest = work.index(min(work))
        dealt[idlest].append(group)
        work[idlest] += PREFIX_WORK + len(group)
    return [sorted(own) for own in dealt]


def batches_by_length(groups: Iterable[Group], most: int, can_share: Callable[[Group], bool]) -> Iterator[list[Part]]:
    """Prompts of about the same length together, `most` at once: sorted, group by group, within a stretch of them.

    Args:
        can_share: of a group, whether its prompts can share what they begin with. Where any do, those that cannot are
            in batches of their own, for such a batch shares nothing.
    """
    stretch: list[Group] = []
    for group in groups:
        stretch.append(group)
        if sum(map(len, stretch)) >= LOOK_AHEAD * most:
            yield from _sorted_batches(stretch, most, can_share)
            stretch = []
    yield from _sorted_batches(stretch, most, can_share)


def _sorted_batches(groups: Sequence[Group], most: int, can_share: Callable[[Group], bool]) -> Iterator[list[Part]]:
    by_length = sorted(groups, key=lambda group: max(len(encoded["input_ids"]) for _, encoded in group))
    if any(len(group) > 1 and can_share(group) for group in by_length):
        yield from _full_batches([group for group in by_length if can_share(group)], most)
        yield from _full_batches([group for group in by_length if not can_share(group)], most)
    else:
        yield from _full_batches(by_length, most)


def _full_batches(groups: Sequence[Group], most: int) -> Iterator[list[Part]]:
    """In the groups' order; only the last batch may have fewer prompts than `most`."""
    batch: list[Part] = []
    room = most
    for group in groups:
        first = 0
        while first < len(group):
            part = Part(group, first, min(first + room, len(group)))
            batch.append(part)
            first, room = part.stop, room - len(part.asked)
            if room == 0:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


class Prefixes:
    """Makes what `generate` takes of one batch after the other; what a group's prompts begin with is computed once.

    Args:
        max_new_tokens: the longest answer.
    """

    def __init__(
        self, model: torch.nn.Module, processor: Phi3VProcessor, max_new_tokens: int, device: torch.device
    ) -> None:
        self.model, self.processor, self.max_new_tokens, self.device = model, processor, max_new_tokens, device
        self._kept: States | None = None  # of the group that goes on in the next batch

    def inputs(self, batch: Sequence[Part]) -> dict[str, Any]:
        """Padded on the left: whole prompts with their images, or where prompts share a prefix its cache with them."""
        kept, self._kept = self._kept, None
        groups = [part.group for part in batch]
        if all(len(group) == 1 for group in groups) or not all(map(self.can_share, groups)):
            return self._padded([encoded for part in batch for _, encoded in part.asked])
        known = [] if kept is None else [kept]
        states = known + self._compute(groups[len(known) :])
        if batch[-1].goes_on:  # as it is where nothing else is held with it, or else copied out of what all have
            alone = len(groups) == 1
            self._kept = [one if alone else (one[0].clone(), one[1].clone()) for one in states[-1]]
        rows = [row for row, part in enumerate(batch) for _ in part.asked]
        lengths = [self._prefix_length(group) for group in groups]
        cache = DynamicCache()
        for layer in range(len(states[0])):
            # each let go of as it is copied, (heads, prefix, head_size) -> (examples, heads, columns, head_size)
            keys, values = zip(*(of_group.pop(0) for of_group in states), strict=True)
            cache.update(_stack(keys, rows), _stack(values, rows), layer)
        prompts = [encoded["input_ids"] for part in batch for _, encoded in part.asked]
        own = [(ids[: lengths[row]], ids[lengths[row] :]) for ids, row in zip(prompts, rows, strict=True)]
        shared, rest = (self._padded([{"input_ids": ids} for ids in part]) for part in zip(*own, strict=True))
        # between a prefix and what follows it there may be padding, which the mask leaves out and no position counts
        return {name: torch.cat([shared[name], rest[name]], dim=1) for name in shared} | {"past_key_values": cache}

    def _padded(self, encoded: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in self.processor.pad(encoded, "left").items()}

    def _prefix_length(self, group: Group) -> int:
        return prefix_length(group[0][1]["input_ids"], self.processor.image_token_id)

    def can_share(self, group: Group) -> bool:
        """Whether its prompts have pictures and begin alike, and the rope's factors change in none after its prefix.

        Past that threshold the model rotates all of a row's positions by other factors, those of its pictures too.
        """
        first, length = group[0][1]["input_ids"], self._prefix_length(group)
        longest = max(len(encoded["input_ids"]) for _, encoded in group) + self.max_new_tokens
        begin_alike = all(torch.equal(encoded["input_ids"][:length], first[:length]) for _, encoded in group)
        threshold = causal_lm_of(self.model).config.original_max_position_embeddings
        return length > 0 and begin_alike and (length > threshold or longest <= threshold)

    def _compute(self, groups: Sequence[Group]) -> list[States]:
        """Run the decoder on the groups' prefixes, all together."""
        if not groups:
            return []
        lengths = [self._prefix_length(group) for group in groups]
        prefixes = [
            {**group[0][1], "input_ids": group[0][1]["input_ids"][:length]}
            for group, length in zip(groups, lengths, strict=True)
        ]
        cache = causal_lm_of(self.model).model(**self._padded(prefixes), use_cache=True).past_key_values
        # (groups, heads, columns, head_size) -> (heads, prefix, head_size)
        return [
            [(layer.keys[row, :, -length:], layer.values[row, :, -length:]) for layer in cache.layers]
            for row, length in enumerate(lengths)
        ]


def _stack(states: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """(heads, prefix, head_size) of every group -> (examples, heads, columns, head_size), padded on the left."""
    columns = max(one.shape[1] for one in states)
    padded = [F.pad(one, (0, 0, columns - one.shape[1], 0)) for one in states]
    return torch.stack([padded[row] for row in rows])
