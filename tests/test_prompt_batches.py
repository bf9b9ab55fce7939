"""Which process answers which prompts, and which are answered together."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.prompt_batches import LOOK_AHEAD, PREFIX_WORK, batches_by_length, deal

PICTURES = st.lists(st.integers(0, 6), max_size=60)


@given(pictures=PICTURES, most=st.integers(1, 8), world=st.integers(1, 5))
def test_every_example_is_dealt_once_with_those_about_the_same_pictures(pictures, most, world):
    dealt = deal(pictures, most, world)
    assert len(dealt) == world
    groups = [group for own in dealt for group in own]
    assert sorted(number for group in groups for number in group) == list(range(len(pictures)))
    assert all(len({pictures[number] for number in group}) == 1 for group in groups)
    assert all(own == sorted(own) for own in dealt)
    # a group is divided only where it is larger than a batch, and than an equal share or a stretch
    of_each = Counter(pictures[group[0]] for group in groups)
    size = max(most, min(-(-len(pictures) // world), LOOK_AHEAD * most))
    assert of_each == {picture: -(-count // size) for picture, count in Counter(pictures).items()}
    # and whoever has the most to do had the least before its last group
    work = [sum(PREFIX_WORK + len(group) for group in own) for own in dealt]
    assert max(work) - min(work) <= PREFIX_WORK + max(map(len, groups), default=0)


def test_one_picture_for_all_is_answered_by_all_processes():
    assert [sum(map(len, own)) for own in deal([0] * 20, 4, 4)] == [5, 5, 5, 5]


def test_processes_have_about_the_same_to_do():
    """A page with eight questions counts less than eight pages with one, and more than one of them."""
    dealt = deal([0] * 8 + list(range(1, 13)), 8, 2)
    assert [len(own) for own in dealt] == [6, 7]
    assert [sum(map(len, own)) for own in dealt] == [8 + 5, 7]


def group_of(length, count, first):
    """Prompts about one picture, the last with so many tokens."""
    return [(first + turn, {"input_ids": torch.zeros(length - count + 1 + turn)}) for turn in range(count)]


@given(sizes=st.lists(st.tuples(st.integers(20, 30), st.integers(1, 9)), max_size=30), most=st.integers(1, 8))
def test_batches_are_full_and_a_group_goes_on_where_it_was_left(sizes, most):
    groups = [group_of(length, count, 100 * number) for number, (length, count) in enumerate(sizes)]
    batches = list(batches_by_length(groups, most, lambda group: True))
    asked = [number for batch in batches for part in batch for number, _ in part.asked]
    assert sorted(asked) == [number for group in groups for number, _ in group]
    sizes_of_batches = [sum(len(part.asked) for part in batch) for batch in batches]
    assert all(1 <= size <= most for size in sizes_of_batches)
    # but for the last of each stretch, which has so many batches or more
    assert sum(size < most for size in sizes_of_batches) <= 1 + len(asked) // (LOOK_AHEAD * most)
    for before, after in itertools.pairwise(batches):
        assert not any(part.goes_on for part in before[:-1])
        if before[-1].goes_on:
            assert after[0].group is before[-1].group
            assert after[0].first == before[-1].stop
        else:
            assert after[0].first == 0
    assert not batches or not batches[-1][-1].goes_on


def test_prompts_of_a_stretch_are_sorted():
    groups = [group_of(length, 1, length) for length in (9, 3, 7, 5)]
    assert [[part.asked[0][0] for part in batch] for batch in batches_by_length(groups, 2, len)] == [[3, 5], [7, 9]]


def test_prompts_that_cannot_share_are_apart_where_any_share():
    """The shorter ones with an odd length cannot; of groups of one each nothing is shared anyway."""

    def lengths(count):
        groups = [group_of(length, count, 10 * length) for length in (11, 14, 12, 13)]
        batches = batches_by_length(groups, 3, lambda group: len(group[-1][1]["input_ids"]) % 2 == 0)
        return [[len(encoded["input_ids"]) for part in batch for _, encoded in part.asked] for batch in batches]

    assert lengths(1) == [[11, 12, 13], [14]]
    assert lengths(2) == [[11, 12, 13], [14], [10, 11, 12], [13]]


@pytest.mark.parametrize("most", [1, 4])
def test_of_a_long_line_of_prompts_only_a_stretch_is_waited_for(most):
    taken = []

    def groups():
        for number in range(10 * LOOK_AHEAD * most):
            taken.append(number)
            yield group_of(8, 1, number)

    next(batches_by_length(groups(), most, len))
    assert len(taken) == LOOK_AHEAD * most
