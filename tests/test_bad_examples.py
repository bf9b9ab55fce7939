"""Examples that cannot be made: each stops the run, or is left out of its step and told once (`--bad_examples`).

The gradients of steps that leave examples out are those of steps without these, 1e-6 relative: the model is in
float64, and the loss weights, which are float32, round at 1e-7. An example left out whose share of the step is not
given to the others makes a difference of 1e-1.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import struct
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
from common.bad_examples import BadExamples
from common.cli import BAD_EXAMPLES
from common.collation import Example, Turn, collate, encode_example
from common.conversations import measure_image
from common.data import (
    ExampleDataset,
    ExampleKey,
    Problem,
    decode_image,
    number_pictures,
    number_questions,
    opening_images_by,
)
from common.errors import UserError
from common.evaluation import Generated, generate_answers
from common.packing import PackedBatchSampler, measure_questions
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import plan_layout
from common.training import GlobalBatchSampler, make_batches, make_collator
from tests.launch import read_evaluation, read_log, run_script
from tests.model_helpers import picture, tiny_config, tiny_model, write_stand_in_checkpoint

CONFIG = tiny_config()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def processor(stand_in):
    return Phi3VProcessor.from_pretrained(stand_in, num_crops=1)


# Bad pictures, as the bytes of a cell or a file


def encoded_as(kind: str, seed: int = 0) -> bytes:
    content = io.BytesIO()
    picture(90 + seed, 60, seed).save(content, kind)
    return content.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A grey PNG that says so of itself and holds a single row."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    row = zlib.compress(bytes(1 + width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(100) + content[middle + 100 :]


BAD_PICTURES = {
    "zero bytes": b"",
    "damaged PNG": damaged(encoded_as("PNG")),
    "truncated PNG": encoded_as("PNG")[:-300],
    "truncated JPEG": encoded_as("JPEG")[:-300],
    "header only": encoded_as("PNG")[:60],
    "no picture": b"<html>404</html>",
    "decompression bomb": png_of_size(20_000, 20_000),
    "too thin": png_of_size(1000, 1),
}


def mini_rows(folder, cells, **columns):
    """Rows as in nielsr/docvqa_1200_examples; `cells` are pictures' bytes, or None for no picture."""
    text = datasets.Value("string")
    features = {"image": datasets.Image(), "query": {"en": text}, "answers": datasets.List(text)}
    rows = {
        "image": [None if cell is None else {"bytes": cell, "path": None} for cell in cells],
        "query": [{"en": f"What is {number}?"} for number in range(len(cells))],
        "answers": [["yes" * (1 + number)] for number in range(len(cells))],
        **columns,
    }
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(folder / "train.parquet")
    return docvqa.load_rows(str(folder), "train", docvqa.LAYOUTS, "--data_dir")


def options_for(**values):
    options = {"share_images": False, "all_questions": False, "max_tokens_per_gpu": None, "batch_size_per_gpu": 1}
    options |= {"batch_size": 8, "seed": 0, "num_train_epochs": 1, "max_steps": None, "num_workers": 0}
    options |= {"attention": "sdpa", "device": "cpu", "bad_examples": "skip", "report_images": False}
    options |= {"tqdm": False, **values}
    packs = options["share_images"] or options["max_tokens_per_gpu"] is not None
    return argparse.Namespace(**options, packs=packs)


def memes(folder, content: bytes):
    """Two memes as in the challenge's files, the first a file of that content."""
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "0.png").write_bytes(content)
    (folder / "img" / "1.jpg").write_bytes(encoded_as("PNG", 1))  # a good picture, mislabelled
    files = ("img/0.png", "img/1.jpg")
    lines = [{"id": number, "img": file, "label": number, "text": ""} for number, file in enumerate(files)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = hateful_memes.challenge_rows(folder, "train.jsonl")
    return rows, lambda index, generator: hateful_memes.make_example(rows, index)


def check_both_ways(dataset, wanted: str, good: int = 1, bad: int = 0):
    """The bad example is an error that names it, or a filler of weight 0; the good one is the same in both ways."""
    with pytest.raises(UserError, match=wanted):
        dataset[ExampleKey(bad, 0, 1.0)]
    alone = dataset[ExampleKey(good, 0, 2.0)]
    dataset.skips_bad = True
    filler, beside = dataset[ExampleKey(bad, 3, 1.5)], dataset[ExampleKey(good, 0, 2.0)]
    assert filler["problem"][:2] == (bad, 3)
    assert re.search(wanted, filler["problem"].text)
    assert filler["loss_weight"] == 0
    assert "pixel_values" not in filler
    assert (filler["labels"] != -100).any()
    assert len(filler["input_ids"]) < 60
    assert beside.keys() == alone.keys()
    assert all(torch.equal(beside[name], alone[name]) for name in ("input_ids", "labels", "pixel_values"))
    assert beside["loss_weight"] == 2.0


@pytest.mark.parametrize("kind", [*BAD_PICTURES, "none"])
def test_bad_picture_in_a_parquet_file(tmp_path, processor, kind):
    rows = mini_rows(tmp_path, [BAD_PICTURES.get(kind), encoded_as("PNG")])
    check_both_ways(docvqa.training_set(rows, processor, options_for()), f"{tmp_path}, split train, row 0: ")


@pytest.mark.parametrize("kind", [*BAD_PICTURES, "missing"])
def test_bad_picture_in_a_file(tmp_path, processor, kind):
    rows, make_example = memes(tmp_path, BAD_PICTURES.get(kind, b""))
    if kind == "missing":  # when the run has begun
        (tmp_path / "img" / "0.png").unlink()
    # told by the file's line, as one who mends it looks it up
    check_both_ways(ExampleDataset(len(rows), make_example, processor), f"{tmp_path}/train.jsonl, line 1: .*0.png")


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"answers": [[" \n\t"], ["a"]]}, "row 0: the answer is empty"),
        ({"answers": [[None], ["a"]]}, "row 0: the answer is NoneType, not a text"),
        ({"answers": [[], ["a"]]}, "row 0: the answer is empty"),
        ({"answers": [["<|image|>"], ["a"]]}, r"row 0: the answer holds <\|image\|>"),
        ({"query": [{"en": "is <|image|> it?"}, {"en": "q"}]}, r"row 0: the question holds <\|image\|>"),
        ({"query": [{"en": "<|image_2|>?"}, {"en": "q"}]}, "row 0: the prompt has 2 image tags .* and 1 images"),
        ({"query": [None, {"en": "q"}]}, "row 0: there is no question"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_text(tmp_path, processor, columns, wanted):
    rows = mini_rows(tmp_path, [encoded_as("PNG")] * 2, **columns)
    check_both_ways(docvqa.training_set(rows, processor, options_for()), wanted)


def test_an_error_in_a_script_s_own_lines(processor):
    """What a user's edit raises is told with its line; the run that skips goes on."""

    def make_example(index, generator):
        texts = {1: "yes"}
        return Example(f"row {index}", [Turn("<|image_1|>", texts[index], [Image.new("RGB", (30, 20))])])

    wanted = r"example 0 cannot be made .*KeyError: 0 \(test_bad_examples.py, line \d+: return .*texts\[index\]"
    check_both_ways(ExampleDataset(2, make_example, processor), wanted)


def test_longer_than_the_model_s_limit(tmp_path, processor):
    rows = mini_rows(tmp_path, [encoded_as("PNG")] * 2, answers=[["many words" * 9], ["a"]])
    dataset = docvqa.training_set(rows, processor, options_for())
    lengths = [len(dataset[index]["input_ids"]) for index in range(2)]
    dataset.max_tokens = lengths[0]
    assert len(dataset[0]["input_ids"]) == lengths[0]
    dataset.max_tokens -= 1
    check_both_ways(dataset, f"row 0: {lengths[0]} tokens, the model takes {lengths[0] - 1}: ")


def test_no_picture_has_more_than_4096_tokens():
    """With the most sub-images that `--num_crops` allows, of any shape: 2,653 at most. Several together may have more,
    which the model takes up to `max_position_embeddings`."""
    sides = [*range(10, 60), 100, 336, 1000, 1600]
    tokens = [plan_layout(width, height, 16).num_img_tokens for width in sides for height in sides]
    assert max(tokens) == 17 * 144 + 17 * 12 + 1


def test_pixels_that_are_not_finite(tmp_path, processor, stand_in, monkeypatch):
    rows = mini_rows(tmp_path, [encoded_as("PNG"), encoded_as("PNG", 1)])
    cut, calls = type(processor.image_processor).cut, []

    def cut_with_nan(self, padded, crops):  # of the bad example, which is made first and third
        cut(self, padded, crops)
        calls.append("nan" if not calls else "inf" if len(calls) == 2 else "0")
        crops[-1, 2, 335, 335] += float(calls[-1])

    monkeypatch.setattr(type(processor.image_processor), "cut", cut_with_nan)
    check_both_ways(docvqa.training_set(rows, processor, options_for()), "row 0: a picture has pixels that are not fin")


def test_a_fault_of_the_machine_is_no_bad_example(processor):
    def make_example(index, generator):
        raise MemoryError

    dataset = ExampleDataset(1, make_example, processor)
    dataset.skips_bad = True
    with pytest.raises(MemoryError):
        dataset[0]


def test_storage_that_fails_is_no_bad_picture(processor, tmp_path, monkeypatch):
    """Else a hiccup of it would drop good examples in silence; a file that cannot be read is another matter."""
    (tmp_path / "page.png").write_bytes(encoded_as("PNG"))
    cell = {"bytes": None, "path": str(tmp_path / "page.png")}
    dataset = ExampleDataset(1, lambda index, generator: decode_image(cell, "row 0"), processor)
    dataset.skips_bad = True

    def fails(*given):
        raise OSError(number, os.strerror(number))

    for number in (errno.EIO, errno.ESTALE, errno.EMFILE):
        with opening_images_by(fails), pytest.raises(OSError, match=re.escape(os.strerror(number))):
            decode_image(cell, "row 0")
        with monkeypatch.context() as patched:
            for opener in ("common.data.open_pixels", "common.conversations.open_header"):
                patched.setattr(opener, fails)
            with pytest.raises(OSError, match=re.escape(os.strerror(number))):
                dataset[0]
            with pytest.raises(UserError, match=r"page\.png cannot be read now: .* again$"):
                measure_image(tmp_path / "page.png")
    number = errno.EACCES
    with (
        opening_images_by(fails),
        pytest.raises(UserError, match=r"^row 0: the image .* cannot be decoded: .*Permission"),
    ):
        decode_image(cell, "row 0")


# Groups about one picture


PAGES = [encoded_as("PNG"), encoded_as("PNG", 1)[:-300], encoded_as("JPEG", 2), b"", encoded_as("PNG", 4)]
ANSWERS = [["one"], ["two", "three"], ["four", " ", "fifth"], ["six", "seven"], ["eight"]]
BAD_QUESTIONS = {1: 1, 2: 1, 4: 2, 6: 3, 7: 3}  # number -> its page's row
SIZE = sum(map(len, ANSWERS))
PAGE_OF = [row for row, answers in enumerate(ANSWERS) for _ in answers]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages in the_cauldron's layout: the second's picture is truncated, the fourth's has no bytes, one answer is
    empty."""
    folder = tmp_path_factory.mktemp("pages")
    text = {name: datasets.Value("string") for name in ("user", "assistant")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(text)})
    rows = [
        {
            "images": [{"bytes": content, "path": None}],
            "texts": [{"user": f"Which{'?' * number}", "assistant": answer} for number, answer in enumerate(answers)],
        }
        for content, answers in zip(PAGES, ANSWERS, strict=True)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return docvqa.load_rows(str(folder), "train", docvqa.LAYOUTS, "--data_dir")


def dataset_of(pages, processor, **values):
    dataset = docvqa.training_set(pages, processor, options_for(**values))
    dataset.skips_bad = True
    return dataset


def test_of_a_group_the_bad_ones_are_left_out(pages, processor):
    """Where the picture is bad, all of them."""
    dataset = dataset_of(pages, processor, share_images=True)
    groups = [[3, 4, 5], [6, 7]]
    encoded = [dataset[[ExampleKey(index, 0, 1.0 + index) for index in group]] for group in groups]
    assert [["problem" in one for one in group] for group in encoded] == [[False, True, False], [True, True]]
    collated = make_collator(processor, options_for(share_images=True), CONFIG)(encoded)
    assert collated["image_sizes"].shape[0] == 1
    assert collated["loss_weights"].tolist() == [4.0, 6.0, 0.0, 0.0, 0.0]
    assert [problem.index for problem in collated["problems"]] == [4, 6, 7]
    assert collated["branch_ids"][0].unique_consecutive().tolist() == [-1, 0, 1, 2, 3, 4]


# A step's gradient


@pytest.fixture(scope="module")
def model():
    return tiny_model("sdpa").double()


def gradient(model, batches):
    model.zero_grad()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.fixture(scope="module")
def wanted(model, pages, processor):
    """The mean over the good examples, each in a pass of its own."""
    dataset = dataset_of(pages, processor, all_questions=True)
    good = [dataset[index] for index in range(SIZE) if index not in BAD_QUESTIONS]
    return gradient(model, [collate(processor, [one]) for one in good])


def step_of(values, pages, processor, folder):
    """The micro-batches of the first step, without the bad examples, and what was told of these."""
    options = options_for(**{"all_questions": True, "batch_size": SIZE, **values})
    dataset = dataset_of(pages, processor, all_questions=True, share_images=options.share_images)
    bad = BadExamples(folder, SIZE, most=0.9)
    arguments = SimpleNamespace(process_index=0, world_size=1, deepspeed_plugin=None)
    sampler = make_batches(dataset, processor, arguments, options, CONFIG, bad)
    collator = make_collator(processor, options, CONFIG)
    batches = [collator([dataset[key] for key in keys]) for keys in sampler]
    bad.leave_out(batches, 1, CPU)
    assert all("problems" not in batch for batch in batches)
    return batches, lines_of(folder)


@pytest.mark.parametrize(
    ("values", "measured"),
    [
        ({"batch_size_per_gpu": 1}, ()),
        ({"batch_size_per_gpu": 3}, ()),
        ({"max_tokens_per_gpu": 800}, (4, 6, 7)),
        ({"share_images": True}, (4, 6, 7)),
        ({"share_images": True, "max_tokens_per_gpu": 1100}, (4, 6, 7)),
    ],
    ids=str,
)
def test_step_is_the_mean_over_its_good_examples(model, pages, processor, wanted, tmp_path, values, measured):
    """Packs are made without those that are seen to be bad when tokens are counted, before the first step."""
    batches, lines = step_of(values, pages, processor, tmp_path)
    assert {line["index"] for line in lines} == set(BAD_QUESTIONS)
    for line in lines:
        assert f"row {BAD_QUESTIONS[line['index']]}: " in line["problem"]
        assert (line["step"], line["epoch"]) == (0 if line["index"] in measured else 1, 0)
    found = gradient(model, batches)
    assert (found - wanted).norm() / wanted.norm() < 1e-6
    assert len(batches) > 1


def test_nothing_changes_where_nothing_is_bad(processor, tmp_path):
    """The same tensors; the file is not made."""
    rows = mini_rows(tmp_path / "data", [encoded_as("PNG", seed) for seed in range(5)])
    seen = []
    for skips in (False, True):
        dataset = docvqa.training_set(rows, processor, options_for())
        dataset.skips_bad = skips
        batches = [collate(processor, [dataset[key] for key in keys]) for keys in GlobalBatchSampler(5, 8, 2, 0, 1, 0)]
        if skips:
            before = [batch["loss_weights"] for batch in batches]
            BadExamples(tmp_path, 5, 0.5).leave_out(batches, 1, CPU)
            assert all(batch["loss_weights"] is each for batch, each in zip(batches, before, strict=True))
        seen.append(batches)
    for one, other in zip(*seen, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / BAD_EXAMPLES).exists()


def test_step_of_bad_examples_alone(model, processor, tmp_path, capsys):
    """Every weight is 0 and every gradient there is; said in a line."""
    rows = mini_rows(tmp_path / "data", [b"", b"", b""])
    dataset = docvqa.training_set(rows, processor, options_for())
    dataset.skips_bad = True
    batches = [collate(processor, [dataset[key] for key in keys]) for keys in GlobalBatchSampler(3, 4, 2, 0, 1, 0)]
    bad = BadExamples(tmp_path, 3, 0.5)
    bad.leave_out(batches, 7, CPU)
    assert "step 7: all of its examples are bad, so its gradient is 0" in capsys.readouterr().out
    found = gradient(model, batches)
    assert len(found) > 0
    assert not found.any()
    assert sorted(line["index"] for line in lines_of(tmp_path)) == [0, 1, 2]


# Telling of them, and giving up


def problems(*indices, epoch=0):
    return [Problem(index, epoch, f"rows.parquet, row {index}: bad") for index in indices]


def lines_of(folder):
    return [json.loads(line) for line in (folder / BAD_EXAMPLES).read_text(encoding="utf-8").splitlines() if line]


def test_each_is_told_once(tmp_path, capsys):
    bad = BadExamples(tmp_path, 100, 0.03)
    bad.add(problems(5, 7, 5), step=2)
    bad.add(problems(7, 5, epoch=1), step=9)
    assert lines_of(tmp_path) == [
        {"step": 2, "epoch": 0, "index": index, "problem": f"rows.parquet, row {index}: bad"} for index in (5, 7)
    ]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"bad examples left out: 2, so far 2 of 100 ({tmp_path / BAD_EXAMPLES}); rows.parquet, row 5: bad"]


def test_gives_up_above_the_fraction(tmp_path):
    bad = BadExamples(tmp_path, 100, 0.29)  # 0.29 * 100 is less than 29 in floating point
    bad.add(problems(*range(29)), step=1)
    assert bad.excess() is None
    bad.check()
    bad.add(problems(29), step=2)
    with pytest.raises(UserError, match=r"30 of 100 .* --max_bad_fraction 0.29 .*the last: rows.parquet, row 29: bad"):
        bad.check()


def test_those_mended_since_are_forgotten(tmp_path, capsys):
    """Not so those that are still bad; the question of the same epoch is tried."""
    BadExamples(tmp_path, 10, 0.1).add(problems(3, 4, 5, epoch=2), step=1)
    bad = BadExamples(tmp_path, 10, 0.1)
    assert bad.excess() is not None
    bad.try_again(lambda index, epoch: (index, epoch) == (4, 2))
    assert bad.excess() is None
    assert [line["index"] for line in lines_of(tmp_path)] == [4]
    assert "2 of 3 bad examples can be made by now" in capsys.readouterr().out
    assert list(BadExamples(tmp_path, 10, 0.1).found) == [4]


def test_a_full_disk_costs_no_line(tmp_path, capsys):
    file = tmp_path / BAD_EXAMPLES
    file.symlink_to("/dev/full")
    bad = BadExamples(tmp_path, 10, 0.5)
    bad.add(problems(3), step=1)
    assert f"{file} could not be written" in capsys.readouterr().out
    file.unlink()
    bad.add(problems(4), step=2)
    assert [line["index"] for line in lines_of(tmp_path)] == [3, 4]


@pytest.mark.parametrize("value", ["-0.01", "1", "nan"])
def test_fraction_out_of_range(monkeypatch, tmp_path, value):
    monkeypatch.setattr(sys, "argv", ["finetune", "--output_dir", str(tmp_path), "--max_bad_fraction", value])
    with pytest.raises(UserError, match=f"--max_bad_fraction {float(value)}: it must be at least 0 and under 1"):
        docvqa.parse()


def test_a_resumed_run_counts_on(tmp_path):
    """Also where it was killed in the middle of a line, which is then told again."""
    bad = BadExamples(tmp_path, 100, 0.02)
    bad.add([Problem(3, 0, "Zeile drei: \u201ekaputt\u201c\u2028")], step=1)
    bad.add(problems(4), step=1)
    file = tmp_path / BAD_EXAMPLES
    file.write_text(file.read_text()[:-5])
    resumed = BadExamples(tmp_path, 100, 0.02)
    assert resumed.found == {3: "Zeile drei: \u201ekaputt\u201c\u2028"}
    resumed.add(problems(3, 4, 5), step=2)
    assert BadExamples(tmp_path, 100, 0.02).found.keys() == {3, 4, 5}
    with pytest.raises(UserError, match="3 of 100"):
        BadExamples(tmp_path, 100, 0.02).check()


def test_packs_of_bad_examples_alone(pages, processor, tmp_path):
    """More than the fraction is bad before the first step."""
    options = options_for(max_tokens_per_gpu=800, all_questions=True)
    dataset = dataset_of(pages, processor, all_questions=True)
    arguments = SimpleNamespace(process_index=0, world_size=1, deepspeed_plugin=None)
    with pytest.raises(UserError, match=f"3 of {SIZE} examples are bad, more than --max_bad_fraction 0.1 "):
        make_batches(dataset, processor, arguments, options, CONFIG, BadExamples(tmp_path, SIZE, 0.1))


@pytest.mark.parametrize("shares", [False, True])
def test_bad_examples_keep_their_places_in_packed_epochs(pages, processor, tmp_path, shares):
    """Eight steps of two are two epochs of nine questions, bad ones included: so a run that goes on when pictures were
    mended, or have broken, has the steps that it had, and sees every other question once an epoch."""
    options = options_for(max_tokens_per_gpu=800, all_questions=True, batch_size=2, max_steps=8, share_images=shares)
    dataset = dataset_of(pages, processor, all_questions=True, share_images=shares)
    arguments = SimpleNamespace(process_index=0, world_size=1, deepspeed_plugin=None)
    sampler = make_batches(dataset, processor, arguments, options, CONFIG, BadExamples(tmp_path, SIZE, 0.5))
    assert (sampler.epochs, len(sampler.questions)) == (2, SIZE)
    assert sampler.questions.bad == {4, 6, 7}
    mended = PackedBatchSampler(replace(sampler.questions, problems=()), 2, 800, 0, 1, options.seed, epochs=2)
    for epoch in range(2):
        steps, of_mended = (
            [[one for group in batch for one in group] for batch in each.global_batches(epoch)]
            for each in (sampler, mended)
        )
        assert steps == [[one for one in step if one not in sampler.questions.bad] for step in of_mended]
        assert sorted(one for step in of_mended for one in step) == list(range(SIZE))
        if not shares:
            unpacked = GlobalBatchSampler(SIZE, 2, 2, 0, 1, options.seed)
            unpacked.set_epoch(epoch)
            assert of_mended == [[key.index for key in keys if key.weight] for keys in unpacked]
        sampler.set_epoch(epoch)
        keys = [key for pack in sampler for group in pack for key in group if key.weight]
        assert sorted(key.index for key in keys) == [0, 1, 2, 3, 5, 8]


def test_a_picture_whose_first_question_is_bad_has_its_tokens_all_the_same(pages, processor):
    """Of a page whose first answer is empty; a page without bytes has none."""
    dataset = dataset_of(pages, processor, all_questions=True, share_images=True)
    whole = measure_questions(dataset, processor, CONFIG.original_max_position_embeddings, 1, 0)
    make = dataset.make_example

    def without_the_first(index, generator):
        if index == 3:
            raise UserError("no answer")
        return make(index, generator)

    dataset.make_example = without_the_first
    measured = measure_questions(dataset, processor, CONFIG.original_max_position_embeddings, 1, 0)
    assert measured.bad == whole.bad | {3}
    for question in range(SIZE):
        tokens = 0 if question == 3 else whole.tokens([question])
        assert measured.tokens([question]) - (measured.picture_tokens[2] if question == 3 else 0) == tokens
    assert measured.picture_tokens == whole.picture_tokens


# Evaluation


def test_bad_prompts_count_as_wrong(pages, processor, capsys):
    """Said with their places; the answers of the others are what they are without them."""
    options = options_for(eval_batch_size_per_gpu=4, precision=SimpleNamespace(autocast=None), tqdm=False, device=CPU)
    numbers = number_questions(pages, each=True)

    def ask(which, index):
        row, question = numbers[which[index]]
        return docvqa.ask(pages, row, docvqa.questions(pages[row])[question][0])

    def answers(which, **arguments):
        model = tiny_model()
        return generate_answers(
            model, processor, len(which), lambda index: ask(which, index), options, max_new_tokens=3, **arguments
        )

    pictures = number_pictures(pages, numbers)
    found = answers(range(SIZE), candidates=("A", "B"), pictures=pictures)
    said = capsys.readouterr().out.splitlines()
    bad = [index for index, page in enumerate(PAGE_OF) if page in (1, 3)]  # answers are not looked at
    assert len(said) == len(bad)
    assert all(f"row {PAGE_OF[index]}: the image" in line for index, line in zip(bad, said, strict=True))
    good = [index for index in range(SIZE) if index not in bad]
    assert [found[index] for index in bad] == [Generated("", (0.5, 0.5))] * len(bad)
    wanted = answers(good, pictures=[pictures[index] for index in good])
    assert [found[index].text for index in good] == [one.text for one in wanted]
    options.bad_examples = "stop"
    with pytest.raises(UserError, match="row 1: the image"):
        answers(range(SIZE))


def test_prompt_longer_than_the_model_s_limit(processor, capsys):
    options = options_for(eval_batch_size_per_gpu=2, precision=SimpleNamespace(autocast=None), tqdm=False, device=CPU)
    model = tiny_model(max_position_embeddings=200)

    def ask(index):
        return Example(f"line {index}", [Turn("why" * (1 + 80 * index))])

    found = generate_answers(model, processor, 2, ask, options, max_new_tokens=2)
    assert found[1].text == ""
    assert "line 1: 2" in capsys.readouterr().out
    assert found[0].text


# The script itself


BAD_ROWS = {2: BAD_PICTURES["truncated PNG"], 5: b""}
METHODS = {
    "lora": ("--use_lora", "--lora_rank", 4),
    "full": (),
    "frozen": ("--freeze_vision_model",),
    "packed": ("--max_tokens_per_gpu", 1000),
    "shared": ("--share_images",),
    "zero3": ("--deepspeed", "ds_configs/zero3.json"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny checkpoint; eight pages of which two are bad, the six others alone; four to evaluate, the last bad."""
    folder = write_stand_in_checkpoint(tmp_path_factory.mktemp("runs"))
    tiny_model().save_pretrained(folder)
    cells = [BAD_ROWS.get(number, encoded_as("PNG", number)) for number in range(8)]
    for name, chosen in (("eight", range(8)), ("six", [number for number in range(8) if number not in BAD_ROWS])):
        columns = {"query": [{"en": f"What is {number}?"} for number in chosen]}
        columns["answers"] = [["yes" * (1 + number)] for number in chosen]
        mini_rows(folder / name, [cells[number] for number in chosen], **columns)
    mini_rows(folder / "eval", [*(encoded_as("PNG", number) for number in (20, 21, 22)), damaged(encoded_as("PNG"))])
    (folder / "eval" / "train.parquet").rename(folder / "eval" / "test.parquet")
    return folder


def run(folder, data, output, *options, processes=2):
    shared = ("--model_name_or_path", folder, "--train_data", folder / data, "--eval_data", folder / "eval")
    shared += ("--output_dir", output, "--num_crops", 1, "--warmup_steps", 0, "--learning_rate", "1e-3")
    shared += ("--logging_steps", 1, "--num_train_epochs", 2, "--num_workers", 1, "--no-tqdm")
    return run_script("finetune_hf_trainer_docvqa.py", *shared, *options, processes=processes)


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(each, marks=pytest.mark.long) for each in METHODS if each != "lora")]
)
def test_run_that_skips(runs, tmp_path, method):
    """Two processes, two epochs of one step. The first loss is the mean over the good examples; the others, and the
    gradients, are compared with a run on the good examples alone (by `long`). 1e-5: sums in another order."""
    skip = ("--bad_examples", "skip", "--max_bad_fraction", 0.25)
    ended = run(runs, "eight", tmp_path / "skip", "--batch_size", 8, *skip, *METHODS[method])
    assert ended.returncode == 0, ended.stdout[-3000:]
    lines = lines_of(tmp_path / "skip")
    assert sorted(line["index"] for line in lines) == sorted(BAD_ROWS)
    for line in lines:
        assert f"{runs / 'eight'}, split train, row {line['index']}: the image" in line["problem"]
        measured = method in ("packed", "shared") and line["index"] == 5
        assert (line["step"], line["epoch"]) == (0 if measured else 1, 0)
    assert f"of 8 ({tmp_path / 'skip' / BAD_EXAMPLES})" in ended.stdout
    for name in ("eval_before", "eval_after"):
        assert [one["generated"] == "" for one in read_evaluation(tmp_path / "skip", name)["examples"]][3]
    assert ended.stdout.count("row 3: the image") == 2
    log = read_log(tmp_path / "skip")
    assert len(log) == 2
    assert log[0]["loss"] == pytest.approx(first_loss(runs), rel=1e-5)
    if method == "lora":
        return
    skip = ("--bad_examples", "skip")
    ended = run(runs, "six", tmp_path / "six", "--batch_size", 6, *skip, *METHODS[method])
    assert ended.returncode == 0, ended.stdout[-3000:]
    for one, other in zip(log, read_log(tmp_path / "six"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def first_loss(folder):
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    rows = docvqa.load_rows(str(folder / "six"), "train", docvqa.LAYOUTS, "--data_dir")
    losses = []
    for index in range(len(rows)):
        question, (answer,) = docvqa.questions(rows[index])[0]
        with torch.no_grad():
            encoded = encode_example(processor, docvqa.ask(rows, index, question, answer))
            losses.append(tiny_model()(**collate(processor, [encoded])).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.long
@pytest.mark.parametrize("way", ["stop", "fraction"])
def test_run_that_gives_up(runs, tmp_path, way):
    """With the places of the bad examples, exit code not 0, and a checkpoint of what was learnt until then."""
    extra = ("--bad_examples", "skip", "--max_bad_fraction", 0.2) if way == "fraction" else ()
    options = ("--batch_size", 2, "--eval_limit", 3, "--use_lora", "--lora_rank", 4, *extra)
    ended = run(runs, "eight", tmp_path / "out", *options)
    assert ended.returncode != 0
    if way == "stop":
        for row in BAD_ROWS:  # both at once, before the first step: so few examples are all looked at
            assert f"  - {runs / 'eight'}, split train, row {row}: the image" in ended.stdout
        assert not (tmp_path / "out" / "train_log.jsonl").exists()
    else:
        assert ended.stdout.count("error: 2 of 8 examples are bad, more than --max_bad_fraction 0.2") == 1
        assert len(lines_of(tmp_path / "out")) == 2
        last = max(line["step"] for line in lines_of(tmp_path / "out"))
        assert (tmp_path / "out" / f"checkpoint-{last}" / "manifest.json").is_file()
        ended = run(runs, "eight", tmp_path / "out", *options[:-1], 0.25)
        assert ended.returncode == 0, ended.stdout[-3000:]
        assert f"going on from {tmp_path / 'out' / f'checkpoint-{last}'}" in ended.stdout
        assert len(lines_of(tmp_path / "out")) == 2
