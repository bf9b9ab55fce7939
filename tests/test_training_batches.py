"""A step's gradient is the mean over the global batch's examples, however the batch is divided."""

from collections import Counter

import pytest
import torch

from common.collation import collate
from common.training import GlobalBatchSampler
from tests.model_helpers import tiny_model

ANSWER_LENGTHS = (1, 7, 2, 5, 3, 1, 4, 6, 2, 3)  # of different lengths, so that weighting by token would show


class PadOnly:
    """What `collate` needs of a processor."""

    from common.phi3v.processing import Phi3VProcessor

    pad = Phi3VProcessor.pad
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})


def examples(vocab_size):
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for number, answer in enumerate(ANSWER_LENGTHS):
        ids = torch.randint(3, vocab_size - 60, (5 + number % 4 + answer,), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[-answer:] = ids[-answer:]
        encoded.append({"input_ids": ids, "labels": labels})
    return encoded


def gradient(model):
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients)


def divided_gradient(model, encoded, batch, world, at_once, batch_size):
    """Global batch `batch`, as the processes of a run would compute it: mean over micro-steps and processes."""
    model.zero_grad()
    accumulation = batch_size // (world * at_once)
    for rank in range(world):
        sampler = GlobalBatchSampler(len(encoded), batch_size, at_once, rank, world, seed=3)
        micro_batches = list(sampler)[batch * accumulation : (batch + 1) * accumulation]
        for keys in micro_batches:
            inputs = collate(PadOnly(), [{**encoded[key.index], "loss_weight": key.weight} for key in keys])
            (model(**inputs).loss / accumulation / world).backward()
    return gradient(model)


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize(("world", "at_once"), [(1, 2), (1, 8), (2, 1), (4, 2), (8, 1)])
def test_gradient_does_not_depend_on_the_division(model, batch, world, at_once):
    """float64, so that what is left is the order of summation: 1e-12 relative. Batch 1 is the short last one."""
    encoded = examples(model.config.vocab_size)
    order = [key.index for keys in GlobalBatchSampler(len(encoded), 8, 1, 0, 1, seed=3) for key in keys if key.weight]
    own = order[:8] if batch == 0 else order[8:]
    model.zero_grad()
    for index in own:
        (model(**collate(PadOnly(), [encoded[index]])).loss / len(own)).backward()
    expected = gradient(model)
    actual = divided_gradient(model, encoded, batch, world, at_once, batch_size=8)
    assert (actual - expected).norm() / expected.norm() < 1e-12


def test_a_long_answer_counts_no_more_than_a_short_one(model):
    encoded = examples(model.config.vocab_size)
    with torch.no_grad():
        each = [model(**collate(PadOnly(), [one])).loss.item() for one in encoded]
        together = model(**collate(PadOnly(), encoded)).loss.item()
    assert together == pytest.approx(sum(each) / len(each), abs=1e-12)


@pytest.mark.parametrize(
    ("size", "batch_size", "at_once", "world"), [(10, 4, 1, 2), (16, 8, 2, 4), (5, 8, 1, 8), (7, 7, 1, 1)]
)
def test_every_example_exactly_once_per_epoch(size, batch_size, at_once, world):
    orders = []
    for epoch in range(2):
        seen, weights = Counter(), Counter()
        lengths, order = set(), []
        for rank in range(world):
            sampler = GlobalBatchSampler(size, batch_size, at_once, rank, world, seed=1)
            sampler.set_epoch(epoch)
            micro_batches = list(sampler)
            lengths.add(len(micro_batches))
            assert len(micro_batches) == len(sampler)
            for keys in micro_batches:
                assert len(keys) == at_once
                for key in keys:
                    assert key.epoch == epoch
                    seen[key.index] += key.weight > 0
                    weights[key.index] += key.weight
                    order.append(key.index)
        assert len(lengths) == 1  # no process waits for another's missing step
        assert seen == Counter(dict.fromkeys(range(size), 1))
        assert sum(weights.values()) == pytest.approx(-(-size // batch_size) * batch_size)
        orders.append(order)
    assert orders[0] != orders[1]


def test_global_batches_are_the_same_however_divided():
    def batches(world, at_once):
        samplers = [list(GlobalBatchSampler(20, 8, at_once, rank, world, seed=5)) for rank in range(world)]
        steps = 8 // (world * at_once)
        return [
            {key for share in samplers for keys in share[start : start + steps] for key in keys}
            for start in range(0, len(samplers[0]), steps)
        ]

    assert batches(1, 1) == batches(2, 1) == batches(4, 2) == batches(1, 8)
