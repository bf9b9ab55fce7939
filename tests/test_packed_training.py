"""`--share_images` and `--max_tokens_per_gpu` as a user starts them: the same losses, step by step, as without.

The built-in checkpoint in float32 on pages of one to four questions. Where pages are shared, a global batch is a whole
epoch, so that every step holds the same questions as without; packs alone leave the batches as they are. Tolerance
1e-5 relative: sums in another order. A question seen by another, counted twice or left out gives 1e-2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from types import SimpleNamespace

import datasets
import pytest
import torch

from common.collation import Example, Turn
from common.data import ExampleDataset, ExampleKey
from common.demo import CHECKPOINT, write_docvqa
from common.errors import NotWrittenError
from common.packing import measure_questions
from common.phi3v import Phi3VConfig, Phi3VProcessor
from common.phi3v.masks import BY_DOCUMENT
from common.training import _WhileTraining, attention_in_training, make_batches, make_collator, using_attention
from common.watching import Watchdog
from tests.launch import REPOSITORY, read_evaluation, read_log, run_script
from tests.model_helpers import picture
from tests.packed_helpers import training_model

SCRIPT = "finetune_hf_trainer_docvqa.py"
QUESTIONS_PER_PAGE = (1, 4, 2, 3, 2)
COUNT = sum(QUESTIONS_PER_PAGE)
CONFIG = Phi3VConfig.from_pretrained(CHECKPOINT)
STACKS = [range(CONFIG.num_hidden_layers), range(CONFIG.num_tower_layers_used)]
METHODS = {
    "full": (),
    "frozen": ("--freeze_vision_model",),
    "lora": ("--use_lora", "--lora_rank", 4, "--learning_rate", "3e-3"),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The demo's pages in the_cauldron's layout, the questions of a page all about its one number."""
    folder = tmp_path_factory.mktemp("pages")
    mini = write_docvqa(folder / "mini", train_pages=len(QUESTIONS_PER_PAGE), test_pages=1, seed=3) / "data"
    rows = datasets.Dataset.from_parquet(str(mini / "train-00000-of-00001.parquet"))
    endings = ("", "\nAnswer briefly.", " Say it.", " Give the number alone, please.")
    shared = [
        {
            "images": [row["image"]],
            "texts": [
                {"user": row["query"]["en"] + ending, "assistant": row["answers"][0] + "0" * number}
                for number, ending in enumerate(endings[:count])
            ],
        }
        for row, count in zip(rows, QUESTIONS_PER_PAGE, strict=True)
    ]
    text = {name: datasets.Value("string") for name in ("user", "assistant")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(text)})
    datasets.Dataset.from_list(shared, features=features).to_parquet(folder / "train.parquet")
    return folder / "train.parquet", mini


@pytest.fixture(scope="module")
def log_of(pages, tmp_path_factory):
    """(processes, options) -> the run's log; each run once."""
    logs = {}

    def run(processes, *options):
        if (processes, options) not in logs:
            output = tmp_path_factory.mktemp("output")
            data = ("--train_data", pages[0], "--eval_data", pages[1], "--eval_limit", 1, "--num_crops", 1)
            shared = ("--model_name_or_path", CHECKPOINT, "--output_dir", output, "--warmup_steps", 0, "--no-tqdm")
            shared += ("--logging_steps", 1, "--num_workers", 1)
            ended = run_script(SCRIPT, *data, *shared, *options, processes=processes)
            assert ended.returncode == 0, ended.stdout[-4000:]
            logs[processes, options] = read_log(output)
        return logs[processes, options]

    return run


def check_equal(found, wanted, steps):
    assert len(found) == len(wanted) == steps
    for one, other in zip(found, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)  # each gradient is 1e-5 exact


@pytest.mark.parametrize(
    ("method", "processes"), [("full", 0), ("full", 2), ("frozen", 2), ("lora", 2)], ids=lambda value: str(value)
)
def test_shared_pages_train_as_pages_apart(log_of, method, processes):
    """Three epochs of one step each; a page's image tokens count once, and every question counts."""
    options = (*METHODS[method], "--batch_size", COUNT, "--num_train_epochs", 3)
    apart = log_of(0, *options, "--all_questions", "--batch_size_per_gpu", 4)
    shared = log_of(processes, *options, "--share_images", "--batch_size_per_gpu", 2)
    check_equal(shared, apart, steps=3)
    assert apart[0]["loss"] > apart[2]["loss"] + 0.1
    for one in (*shared, *apart):
        assert 0 <= one["data_wait_share"] < 1
    per_question = [log[0]["tokens_per_second"] / log[0]["examples_per_second"] for log in (shared, apart)]
    assert per_question[0] < 0.6 * per_question[1]  # found: 184 and 345 tokens a question


def test_packs_train_as_padded_rows(log_of):
    """Three steps, the last of which is short, in one process and, packed, in two."""
    options = ("--batch_size", 5, "--all_questions")
    padded = log_of(0, *options, "--batch_size_per_gpu", 5)
    check_equal(log_of(2, *options, "--max_tokens_per_gpu", 1100), padded, steps=3)


WATCHED = """
import json
import finetune_hf_trainer_docvqa as docvqa
from common.layers import causal_lm_of, stacks_of

train = docvqa.train


def watched_train(model, *arguments):
    trainer = train(model, *arguments)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found = {
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "bits": optimizer.get_config(0, 0, optimizer.param_groups[0])["optim_bits"],
        "recomputed": [[layer.gradient_checkpointing for layer in stack] for stack in stacks_of(model)],
        "compiled": [
            [[each._compiled_call_impl is not None for each in (layer, layer.mlp)] for layer in stack]
            for stack in stacks_of(model)
        ],
        "crops": causal_lm_of(model).model.vision_embed_tokens.img_processor.max_crops_per_call,
        "micro_steps": trainer.args.gradient_accumulation_steps,
    }
    print("FOUND", json.dumps(found), flush=True)
    return trainer


docvqa.train = watched_train
docvqa.run(docvqa.main)
"""


@pytest.mark.parametrize(("compiles", "bits"), [(False, 8), pytest.param(True, 32, marks=pytest.mark.long)])
def test_options_reach_what_they_change(pages, tmp_path, compiles, bits):
    """One run with many options, evaluated before, between and after; compiling takes half a minute."""
    script = tmp_path / "watched.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{WATCHED}")
    options = ("--train_data", pages[0], "--eval_data", pages[1], "--eval_limit", 1, "--num_crops", 1, "--use_lora")
    options += ("--model_name_or_path", CHECKPOINT, "--output_dir", tmp_path / "out", "--no-tqdm", "--num_workers", 0)
    options += ("--max_steps", 2, "--eval_steps", 1, "--logging_steps", 1, "--batch_size", 6, "--share_images")
    options += ("--max_tokens_per_gpu", 900, "--max_crops_per_call", 3, "--optim", f"paged_adamw_{bits}bit")
    options += ("--gradient_checkpointing", "selective", *(("--torch_compile",) if compiles else ()))
    ended = run_script(script, *options, processes=0)
    assert ended.returncode == 0, ended.stdout[-4000:]
    found = json.loads(re.search("FOUND (.*)", ended.stdout)[1])
    assert found["optimizer"] == "bitsandbytes.optim.adamw.AdamW"
    assert found["bits"] == bits
    assert found["recomputed"] == [[True, False] * (len(stack) // 2) + [True] * (len(stack) % 2) for stack in STACKS]
    # as a whole or, of packed rows of the decoder that are computed again, the network by itself
    whole_and_part = [[[compiles, False]] * len(stack) for stack in STACKS]
    whole_and_part[0][::2] = [[False, compiles]] * len(whole_and_part[0][::2])
    assert found["compiled"] == whole_and_part
    assert found["crops"] == 3
    assert f"x {found['micro_steps']} packs of at most 900 tokens" in ended.stdout
    assert found["micro_steps"] > 1
    assert len(read_log(tmp_path / "out")) == 2
    names = ("eval_before", "eval_step_1", "eval_step_2", "eval_after")
    answers = [read_evaluation(tmp_path / "out", name)["examples"] for name in names]
    assert answers[2] == answers[3]


# Without a run


def options_for(**values):
    options = {"share_images": False, "max_tokens_per_gpu": None, "batch_size_per_gpu": 1, "batch_size": 4, "seed": 0}
    options |= {"num_train_epochs": 1, "max_steps": None, "num_workers": 0, "attention": "sdpa", "device": "cpu"}
    options |= {"tqdm": False, **values}
    packs = options["share_images"] or options["max_tokens_per_gpu"] is not None
    return argparse.Namespace(**options, packs=packs)


@pytest.fixture(scope="module")
def processor(stand_in):
    return Phi3VProcessor.from_pretrained(stand_in, num_crops=1)


@pytest.fixture
def dataset(processor):
    """Six questions about three pictures; the accepted answers have different lengths."""
    pictures = [picture(60, 40 + 9 * number, number) for number in range(3)]

    def make_example(index, generator):
        turn = Turn("<|image_1|>\n" + "Why? " * index, generator.choice(["a", "abcdef"]), [pictures[index // 2]])
        return Example(str(index), [turn])

    return ExampleDataset(6, make_example, processor, pictures=[0, 0, 1, 1, 2, 2])


def measured(dataset, processor, threshold=4096, epochs=3):
    return measure_questions(dataset, processor, threshold, epochs, num_workers=0)


def test_tokens_are_counted_without_pixels(processor, dataset, monkeypatch):
    """As encoding in full gives them, the longest answer of the epochs counted."""
    ids = [[dataset[ExampleKey(index, epoch, 1.0)]["input_ids"] for epoch in range(3)] for index in range(6)]
    longest = [max(map(len, each)) for each in ids]
    assert longest != [len(each[0]) for each in ids]
    prefixes = [int((each[0] == processor.image_token_id).nonzero()[-1]) + 1 for each in ids]
    monkeypatch.setattr(type(processor.image_processor), "cut", None)  # what makes pixels
    questions = measured(dataset, processor)
    assert [questions.tokens([index]) for index in range(6)] == longest
    assert questions.pictures == [0, 0, 1, 1, 2, 2]
    assert questions.picture_tokens == prefixes[::2]
    assert questions.longest_picture() == max(questions.tokens([first, first + 1]) for first in (0, 2, 4))
    dataset.pictures = None  # nothing shared
    questions = measured(dataset, processor)
    assert [questions.tokens([index]) for index in range(6)] == longest
    assert len(set(questions.pictures)) == 6


def test_questions_on_both_sides_of_the_rope_threshold_are_apart(processor, dataset):
    """They cannot share a picture, so that its tokens count for either."""
    together = measured(dataset, processor)
    alone = [together.tokens([index]) for index in range(6)]
    questions = measured(dataset, processor, threshold=max(alone[:3]))
    assert [questions.tokens([index]) for index in range(6)] == alone
    assert questions.pictures == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("values", [{"max_tokens_per_gpu": 800}, {"share_images": True}, {"max_steps": 5}])
def test_the_trainer_is_told_how_many_packs_make_a_step(processor, dataset, values):
    options = options_for(**({"share_images": "max_tokens_per_gpu" not in values} | values))
    if not options.share_images:
        dataset.pictures = None
    arguments = SimpleNamespace(process_index=0, world_size=1, deepspeed_plugin=None)
    config = SimpleNamespace(original_max_position_embeddings=4096)
    batches = make_batches(dataset, processor, arguments, options, config)
    assert arguments.gradient_accumulation_steps == batches.micro_steps == len(batches) // 2
    assert batches.micro_steps > 1
    # one picture at a time, where no number of tokens is given
    assert batches.max_tokens == (options.max_tokens_per_gpu or batches.questions.longest_picture())
    assert batches.epochs == (3 if options.max_steps else 1)  # five steps, of which an epoch has two


def test_what_goes_through_the_model(processor, dataset):
    """From the sampler's groups by data set and collator to one row: every picture once, the weights in order."""
    config = SimpleNamespace(original_max_position_embeddings=4096, image_token_id=processor.image_token_id)
    collate = make_collator(processor, options_for(share_images=True), config)
    groups = [[ExampleKey(3, 0, 2.0), ExampleKey(2, 0, 0.5)], [ExampleKey(4, 0, 1.5)]]
    batch = collate([dataset[group] for group in groups])
    assert batch["image_sizes"].shape[0] == 2
    assert batch["loss_weights"].tolist() == [2.0, 0.5, 1.5]
    assert batch["branch_ids"][0].unique_consecutive().tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize(
    ("values", "attention"),
    [
        ({}, "flash_attention_2"),
        ({"max_tokens_per_gpu": 9000}, "flash_attention_2"),
        ({"share_images": True}, BY_DOCUMENT),
        ({"share_images": True, "device": "cpu", "attention": "sdpa"}, BY_DOCUMENT),
    ],
)
def test_attention_in_training(values, attention):
    options = options_for(**({"attention": "flash_attention_2", "device": "cuda"} | values))
    assert attention_in_training(options) == attention


def test_evaluation_in_between_has_its_own_attention(capsys):
    model = training_model("sdpa", torch.float32)
    seen = []
    told_to_stop = False
    stopping = SimpleNamespace(agreed=lambda device: told_to_stop)
    options = argparse.Namespace(eval_steps=1, attention="sdpa", stopping=stopping)
    arguments = SimpleNamespace(device="cpu")
    logged = []

    def evaluate(_, name):
        seen.append((name, model.config._attn_implementation))
        return {"accuracy": 0.5, "auroc": None, "per_class": {"yes": 0.5}}

    callback = _WhileTraining(options, evaluate)
    control = SimpleNamespace(should_log=True)

    def log(scores):
        logged.append(scores)
        control.should_log = False  # as the Trainer has it

    callback.trainer = SimpleNamespace(model=model, not_counted=contextlib.nullcontext, watchdog=Watchdog(), log=log)
    with using_attention(model, "eager"):
        callback.on_step_end(arguments, SimpleNamespace(global_step=1), control)
        assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert seen == [("eval_step_1", "sdpa")]
    assert logged == [{"eval_accuracy": 0.5}]
    assert control.should_log
    assert model.config._attn_implementation == "sdpa"

    def fail(*_):
        raise NotWrittenError("no room")

    callback.evaluate, evaluate = fail, callback.evaluate
    callback.on_step_end(arguments, SimpleNamespace(global_step=2), control)
    assert "the evaluation after step 2 is lost: no room" in capsys.readouterr().out
    callback.evaluate = evaluate
    told_to_stop = True  # then what time there is goes to the checkpoint
    callback.on_step_end(arguments, SimpleNamespace(global_step=3), control)
    assert seen == [("eval_step_1", "sdpa")]
