"""The training's loader: a whole step is ready before it is asked for, in the order it has without workers, and the
time that it is waited for stands in the log.
"""

import argparse
import errno
import functools
import statistics
import time

import pytest
import torch
from accelerate.data_loader import skip_first_batches
from torch.distributed import distributed_c10d
from transformers import TrainerCallback

from common.data import MOST_READY, prefetch_factor
from common.packing import PackedBatchSampler, Questions
from common.stopping import Stopping
from common.training import GlobalBatchSampler, RecipeTrainer, _WhileTraining, start
from tests.launch import read_log
from tests.resumable import AT_ONCE, BATCH, SIZE, small_arguments, write_weights

STEPS_PER_EPOCH = -(-SIZE // BATCH)


class Keys(torch.utils.data.Dataset):
    """Gives back what it is asked for, after so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return SIZE

    def __getitem__(self, key):
        time.sleep(self.seconds)
        return key


class Model(torch.nn.Module):
    """Keeps what it was given; a forward pass takes so many seconds."""

    def __init__(self, seconds):
        super().__init__()
        self.weight, self.seconds, self.seen = torch.nn.Parameter(torch.ones(1)), seconds, []

    def forward(self, input_ids, loss_weights):
        time.sleep(self.seconds)
        self.seen.append((input_ids.tolist(), loss_weights.tolist()))
        return {"loss": (self.weight * loss_weights).mean()}


def collate(examples):
    """Keys, or groups of them -> their numbers and epochs in the tokens' place."""
    keys = [key for one in examples for key in (one if isinstance(one, list) else [one])]
    numbers = torch.tensor([[key.index, key.epoch] for key in keys])
    return {"input_ids": numbers, "loss_weights": torch.tensor([key.weight for key in keys])}


class CountingBatches:
    """A sampler, and how many micro-batches it was asked for."""

    def __init__(self, batches):
        self.batches, self.asked = batches, 0

    def set_epoch(self, epoch):
        self.batches.set_epoch(epoch)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for keys in self.batches:
            self.asked += 1
            yield keys


def make_batches(packs):
    """Of a run of two epochs, with four micro-batches a step, or packs of at most three questions."""
    if not packs:
        return GlobalBatchSampler(SIZE, BATCH, AT_ONCE, rank=0, world=1, seed=7)
    questions = Questions([number // 2 for number in range(SIZE)], [5] * (SIZE // 2), [1] * SIZE)
    return PackedBatchSampler(questions, BATCH, 13, rank=0, world=1, seed=7, epochs=2)


def make_trainer(folder, packs=False, workers=0, example_seconds=0.0, pass_seconds=0.0, **given):
    """A run alone with the recipe's own Trainer, batches and loader."""
    batches = make_batches(packs)
    micro_steps = batches.micro_steps if packs else BATCH // AT_ONCE
    given = {"logging_steps": 1, "num_train_epochs": 2, "dataloader_num_workers": workers, **given}
    arguments = small_arguments(folder, gradient_accumulation_steps=micro_steps, **given)
    options = argparse.Namespace(output_dir=folder, learning_rate=0.01, max_bad_steps=3, stopping=Stopping(20))
    options.vision_learning_rate = options.projector_learning_rate = options.eval_steps = None
    options.method, options.num_processes, options.freeze_vision_model = "lora", 1, True
    options.packs, options.dry_run = packs, False
    model, callback = Model(pass_seconds), _WhileTraining(options, evaluate=None)
    callback.trainer = RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=Keys(example_seconds),
        data_collator=collate,
        options=options,
        batches=CountingBatches(batches),
        bad_examples=None,
        write_model=functools.partial(write_weights, model),
        stopping=options.stopping,
        callbacks=[callback],
    )
    return callback.trainer


@pytest.mark.parametrize(
    ("micro_steps", "num_workers", "factor"),
    [(1, 4, 2), (8, 4, 2), (9, 4, 3), (64, 4, 16), (64, 5, 13), (16, 1, 16), (1, 0, None), (64, 0, None)],
)
def test_workers_have_a_step_ready(micro_steps, num_workers, factor):
    assert prefetch_factor(micro_steps, num_workers) == factor


@pytest.mark.parametrize("num_workers", [1, 4, 5, 48])
def test_what_is_ready_has_an_end(num_workers):
    """A step of very many micro-batches would not fit into memory twice; two for each worker is torch's default."""
    most = prefetch_factor(100_000, num_workers) * num_workers
    assert MOST_READY <= most < max(MOST_READY + num_workers, 2 * num_workers + 1)


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_the_last_line_tells_no_speed_of_packs(tmp_path, packs):
    """The Trainer would take each for an example."""
    trainer = make_trainer(tmp_path, packs, max_steps=2)
    trainer.train()
    last = trainer.state.log_history[-1]
    assert "train_steps_per_second" in last
    assert ("train_samples_per_second" in last) != packs


@pytest.mark.parametrize(("warmup_steps", "highest"), [(3, None), (4, "0.0075"), (10, "0.003")])
def test_a_warm_up_longer_than_the_run_is_told(tmp_path, capsys, warmup_steps, highest):
    """Of four steps at a peak of 0.01 the highest rate, which is that of the last one."""
    trainer = make_trainer(tmp_path, max_steps=4, warmup_steps=warmup_steps, lr_scheduler_type="linear")
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    told = f"--warmup_steps {warmup_steps} leave no step of 4 at --learning_rate 0.01: the highest is {highest}\n"
    assert (told in capsys.readouterr().out) == (highest is not None)
    assert max(rates) == pytest.approx(float(highest or 0.01))


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_the_next_step_is_begun_while_one_is_computed(tmp_path, packs):
    """As many micro-batches as make a step, at the epoch's begin, after a step, and where a run goes on."""
    trainer = make_trainer(tmp_path, packs, workers=1)
    batches, micro_steps = trainer.batches, trainer.args.gradient_accumulation_steps
    assert micro_steps > 2  # more than torch's default
    loader = trainer.get_train_dataloader()
    began = iter(loader)
    assert batches.asked == micro_steps
    trainer.get_batch_samples(began, micro_steps, trainer.args.device)
    assert batches.asked == 2 * micro_steps
    batches.asked = 0
    iter(skip_first_batches(loader, 2 * micro_steps))
    assert batches.asked == 3 * micro_steps


@pytest.mark.parametrize("on_gpu", [False, True])
def test_batches_for_a_gpu_lie_in_pinned_memory(tmp_path, monkeypatch, on_gpu):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    assert trainer.get_train_dataloader().pin_memory == on_gpu


@pytest.mark.parametrize(("device", "precision"), [("cuda", "high"), ("cpu", "highest")])
def test_float32_may_be_tf32_on_a_gpu(monkeypatch, device, precision):
    """Set before the processes find each other, which is as far as this gets without a GPU."""

    class FoundEachOtherError(Exception):
        pass

    def begin_group(backend, limit):
        raise FoundEachOtherError(backend, limit)

    monkeypatch.setattr("common.training.begin_group", begin_group)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # for it to be set back
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    for name in ("WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    options = argparse.Namespace(method="lora", eval_only=False, timeout_minutes=1, device=device)
    try:
        with pytest.raises(FoundEachOtherError):
            start(options, None, None)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("optim", "sizes"), [("adamw_torch", [60, 7]), ("adamw_8bit", [25, 25, 10, 7])])
def test_no_group_is_too_large_for_bitsandbytes(tmp_path, monkeypatch, optim, sizes):
    """Where it counts a tensor's elements in few bits: ZeRO-2 makes one tensor of a group's weights (their biases are
    the group that does not decay)."""
    monkeypatch.setattr("common.training.BITSANDBYTES_MOST", 29)
    shapes = [(5, 3), (5, 2), (5, 2), (5, 3), (5, 2)]
    model = torch.nn.ParameterDict({f"part_{number}": torch.ones(shape) for number, shape in enumerate(shapes)})
    model["bias"] = torch.nn.Parameter(torch.ones(7))
    trainer = make_trainer(tmp_path, optim=optim)
    groups = trainer.create_optimizer(model).param_groups
    assert [sum(one.numel() for one in group["params"]) for group in groups] == sizes
    assert [id(one) for group in groups for one in group["params"]] == [id(one) for one in model.parameters()]
    assert [group["weight_decay"] for group in groups] == [trainer.args.weight_decay] * (len(sizes) - 1) + [0.0]


def test_memory_of_evaluations_is_not_trainings(tmp_path, monkeypatch):
    """The log has the most that training held, at its first step (a GPU's memory, for which this has a stand-in)."""
    held = [16.0]  # by the evaluation before training

    class Evaluating(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            held[0] = max(held[0], 5.0 if state.global_step else 7.0)

        def on_step_end(self, args, state, control, **kwargs):
            with trainer.not_counted():
                held[0] = 16.0

    monkeypatch.setattr("common.training.memory_peak", lambda: held[0])
    monkeypatch.setattr("common.training.forget_memory_peak", lambda: held.__setitem__(0, 2.0))
    trainer = make_trainer(tmp_path)
    trainer.add_callback(Evaluating())
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["memory_peak_gb"] for line in lines] == [7.0] * (2 * STEPS_PER_EPOCH)


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_a_run_goes_on_where_it_was_however_far_the_workers_were(tmp_path, packs):
    """In the middle of an epoch, when the next steps' micro-batches were fetched already: none is lost or had twice."""
    whole = make_trainer(tmp_path / "whole", packs)
    whole.train()
    micro_steps = whole.args.gradient_accumulation_steps
    assert len(whole.model.seen) == 2 * STEPS_PER_EPOCH * micro_steps
    for step in (2, STEPS_PER_EPOCH + 1):
        folder = tmp_path / str(step)
        interrupted = make_trainer(folder, packs, workers=2, save_steps=step)
        interrupted.train()
        assert interrupted.model.seen == whole.model.seen
        again = make_trainer(folder, packs, workers=1)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert again.model.seen == whole.model.seen[step * micro_steps :]


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    """As TensorBoard's on a full disk; the run's own log is whole."""

    class Reports(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.add_callback(Reports())
    trainer.train()
    assert "step 2 is not reported everywhere: [Errno 28] No space left on device" in capsys.readouterr().out
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]


def test_the_time_that_data_are_waited_for_is_logged(tmp_path):
    """Of two runs that sleep as long, one over its examples and one over its passes.

    What a busy machine adds to a step is small beside 0.16 s, and in the second run all of these are no waiting. Found
    are 0.95 and 0.01. Were a line's time or waiting not its own, but the run's so far, it would be 0.2 or above 1.
    """
    shares = {}
    for name, seconds in {"examples": {"example_seconds": 0.02}, "passes": {"pass_seconds": 0.04}}.items():
        make_trainer(tmp_path / name, max_steps=8, **seconds).train()
        logged = [line["data_wait_share"] for line in read_log(tmp_path / name)]
        assert len(logged) == 8
        assert all(0 <= share <= 1 for share in logged)
        shares[name] = statistics.median(logged)
    assert shares["examples"] > 0.3
    assert shares["passes"] < shares["examples"]
