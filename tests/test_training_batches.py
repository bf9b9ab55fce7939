"""A step's gradient is the mean over the global batch's examples, however the batch is divided.

First by hand in float64, then by the DocVQA script as a user starts it. The last test holds the script to letting
go of what it has trained before it loads what it has saved.
"""

import json
import re
from collections import Counter

import datasets
import pytest
import torch

import finetune_hf_trainer_docvqa as docvqa
from common.collation import collate, encode_example
from common.phi3v import Phi3VProcessor
from common.training import GlobalBatchSampler
from tests.launch import REPOSITORY, read_evaluation, read_log, run_script
from tests.model_helpers import picture, tiny_model, write_stand_in_checkpoint

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
    return tiny_model("sdpa").double()  # eager attention's softmax is float32 also here


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


# The script itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint and eight pages whose answers have from 1 to 22 tokens (the stand-in's are characters)."""
    folder = write_stand_in_checkpoint(tmp_path_factory.mktemp("batches"))
    tiny_model().save_pretrained(folder)
    rows = [
        {
            "image": picture(60 + 9 * k, 70, k),
            "query": {"en": "What?" + " Say." * (k % 3)},
            "answers": ["x" * (1 + 3 * k)],
        }
        for k in range(8)
    ]
    text = datasets.Value("string")
    features = datasets.Features(
        {"image": datasets.Image(), "query": {"en": text}, "answers": datasets.List(text)},
    )
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def options_for(folder, output, *options):
    shared = ("--model_name_or_path", folder, "--data_dir", folder, "--output_dir", output, "--num_crops", 1)
    shared += ("--batch_size", 8, "--warmup_steps", 0, "--learning_rate", "1e-3", "--logging_steps", 1)
    return (*shared, "--num_train_epochs", 2, "--num_workers", 1, "--eval_limit", 3, "--no-tqdm", *options)


@pytest.fixture(scope="module")
def expected_loss(folder):
    """The mean over the eight examples of the mean over each one's own answer tokens."""
    model, processor = tiny_model(), Phi3VProcessor.from_pretrained(folder, num_crops=1)
    rows = docvqa.load_rows(str(folder), "train", docvqa.LAYOUTS, "--data_dir")
    losses = []
    for index in range(len(rows)):
        question, (answer,) = docvqa.questions(rows[index])[0]
        encoded = encode_example(processor, docvqa.ask(rows, index, question, answer))
        with torch.no_grad():
            losses.append(model(**collate(processor, [encoded])).loss.item())
    assert max(losses) - min(losses) > 0.5  # else a weighting by token would hardly show
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("method", "divisions"), [("full", ((0, 1), (2, 1), (2, 4))), ("lora", ((0, 1), (2, 2)))], ids=["full", "lora"]
)
def test_script_s_steps_do_not_depend_on_the_division(folder, tmp_path, expected_loss, method, divisions):
    """Answers of different lengths, two steps: float32 sums in another order, 1e-5 relative."""
    extra = ("--use_lora", "--lora_rank", 4) if method == "lora" else ()
    logs, evaluations = [], []
    for processes, at_once in divisions:
        output = tmp_path / f"{processes}_{at_once}"
        options = options_for(folder, output, "--batch_size_per_gpu", at_once, *extra)
        ended = run_script("finetune_hf_trainer_docvqa.py", *options, processes=processes)
        assert ended.returncode == 0, ended.stdout[-3000:]
        logs.append([(line["loss"], line["grad_norm"]) for line in read_log(output)])
        evaluations.append(read_evaluation(output, "eval_before")["examples"])
    for log in logs:
        assert len(log) == 2
        assert log[0][0] == pytest.approx(expected_loss, rel=1e-5)
        for step, expected in zip(log, logs[0], strict=True):
            assert step == pytest.approx(expected, rel=1e-5)
    assert all(evaluation == evaluations[0] for evaluation in evaluations)


@pytest.fixture(scope="module")
def conversations(folder):
    """Eight conversations for the UCF-101 script, three of them with a picture."""
    (folder / "images").mkdir()
    lines = []
    for k in range(8):
        turn = {"user": "Say it." * (1 + k % 3), "assistant": "AB"[k % 2] * (1 + 2 * k)}
        if k % 3 == 0:
            picture(60 + 9 * k, 70, k).save(folder / "images" / f"{k}.png")
            turn["images"] = [f"{k}.png"]
        lines.append(json.dumps({"conversations": [turn]}) + "\n")
    for split in ("train", "val"):
        (folder / f"ucf101_{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    "method", ["full", "lora", *(pytest.param(one, marks=pytest.mark.long) for one in ("zero3", "zero3_frozen"))]
)
def test_processes_with_and_without_pictures(conversations, tmp_path, method):
    """A process whose examples hold no picture takes part in every gradient all the same.

    DDP would stop with an error and DeepSpeed might average the tower's gradient with something else's. Under ZeRO-3
    the tower's weights lie in pieces, frozen or not, and a process that did not run it would put none together.
    """
    extra = {"lora": ("--use_lora", "--lora_rank", 4), "zero3": ("--deepspeed", "ds_configs/zero3.json")}
    extra["zero3_frozen"] = (*extra["zero3"], "--freeze_vision_model")
    extra = extra.get(method, ())
    logs = []
    for processes in (0, 2):
        output = tmp_path / str(processes)
        ended = run_script(
            "finetune_hf_trainer_ucf101.py", *options_for(conversations, output, *extra), processes=processes
        )
        assert ended.returncode == 0, ended.stdout[-3000:]
        logs.append([(line["loss"], line["grad_norm"]) for line in read_log(output)])
    assert len(logs[0]) == 2
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


WATCHED = """
import gc, weakref
import torch
import finetune_hf_trainer_docvqa as docvqa
from common.phi3v import Phi3VForCausalLM

trained = []
from_pretrained, train = Phi3VForCausalLM.from_pretrained, docvqa.train


def watched_train(model, *arguments):
    trainer = train(model, *arguments)
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    parts = [model, trainer.model_wrapped, trainer.optimizer, inner, *model.parameters()]
    trained.extend((type(part).__name__, weakref.ref(part)) for part in parts)
    return trainer


def tensor_bytes():
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def watched_load(*arguments, **given):
    if trained:
        alive = [name for name, reference in trained if reference() is not None]
        # in one write, for the other process prints too
        print(f"AT THE RELOAD {len(trained)} {alive} {tensor_bytes() - bytes_before}\\n", end="", flush=True)
    return from_pretrained(*arguments, **given)


bytes_before = tensor_bytes()
Phi3VForCausalLM.from_pretrained, docvqa.train = watched_load, watched_train
docvqa.run(docvqa.main)
"""


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_trained_is_let_go_before_the_reload(folder, tmp_path, method):
    """Model, engine, optimizer and every parameter: two of a model of real size would not fit into memory.

    The tensors there are besides take less than a tenth of the weights.
    """
    script = tmp_path / "watched.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{WATCHED}")
    extra = ("--use_lora", "--lora_rank", 4) if method == "lora" else ()
    ended = run_script(script, *options_for(folder, tmp_path / "out", "--max_steps", 1, "--eval_steps", 1, *extra))
    assert ended.returncode == 0, ended.stdout[-3000:]
    found = re.findall(r"AT THE RELOAD (\d+) (\[.*?\]) (-?\d+)", ended.stdout)
    assert len(found) == 2  # one line a process
    weights = sum(parameter.nbytes for parameter in tiny_model().parameters())
    for watched, alive, left in found:
        assert int(watched) > 50
        assert alive == "[]"
        assert int(left) < weights / 10
