"""The built-in data and checkpoint: layout, honesty of the data, completeness of the checkpoint."""

from __future__ import annotations

import collections
import importlib
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import Features, Image, List, Value, load_dataset
from transformers.utils import logging as transformers_logging

from common import demo, demo_pretrain
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from tests.launch import run_script

# As the hub shows it for nielsr/docvqa_1200_examples.
DOCVQA_FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "query": {language: Value("string") for language in ("de", "en", "es", "fr", "it")},
        "answers": List(Value("string")),
        "words": List(Value("string")),
        "bounding_boxes": List(List(Value("float32"))),
        "answer": {
            "match_score": Value("float64"),
            "matched_text": Value("string"),
            "start": Value("int64"),
            "text": Value("string"),
        },
    }
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>", "<unk>", "<s>"]


# --- data


@pytest.fixture(scope="module")
def docvqa(tmp_path_factory):
    return demo.write_docvqa(tmp_path_factory.mktemp("docvqa"), train_pages=60, test_pages=20, seed=3)


@pytest.fixture(scope="module")
def many_rows():
    """Rows of the test split, enough for statistics, without their pictures."""
    return [
        {name: row[name] for name in ("query", "answers", "words", "bounding_boxes", "answer")}
        for row in demo.docvqa_rows("test", 400, seed=0)
    ]


def test_layout_is_the_published_one(docvqa, tmp_path):
    data = load_dataset(str(docvqa), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 60, "test": 20}
    assert sorted(path.name for path in docvqa.rglob("*.parquet")) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    for rows in data.values():
        assert rows.features == DOCVQA_FEATURES
        assert len(set(rows["id"])) == len(rows)
        for row in rows:
            assert row["image"].mode == "RGB"
            assert row["image"].size == (demo.SIDE, demo.SIDE)
            assert len(row["words"]) == len(row["bounding_boxes"])
            assert all(
                0 <= left < right <= 1 and 0 <= top < bottom <= 1 for left, top, right, bottom in row["bounding_boxes"]
            )
            assert row["words"][row["answer"]["start"]] == row["answer"]["text"] == row["answers"][0]


def test_boxes_hold_the_ink(docvqa):
    rows = pyarrow.parquet.read_table(docvqa / "data" / "test-00000-of-00001.parquet").to_pylist()
    for row, page in zip(rows, demo_pages("test", len(rows), seed=3), strict=True):
        pixels = np.asarray(page.picture, dtype=int)
        is_ink = np.abs(pixels - pixels[-1, -1]).max(axis=-1) > 100  # the outlines of boxes are paler
        for left, top, right, bottom in (np.array(row["bounding_boxes"]) * demo.SIDE).round().astype(int):
            assert is_ink[top:bottom, left:right].any()
            is_ink[top:bottom, left:right] = False
        assert not is_ink.any()


def demo_pages(split, pages, seed):
    for number in range(pages):
        random = np.random.default_rng([seed, demo.SPLITS.index(split), number])
        yield demo.random_document(random, demo.digit_scans(split))


def test_splits_share_no_scan():
    train, test = (
        {scan.tobytes() for scans in demo.digit_scans(split).values() for scan in scans} for split in ("train", "test")
    )
    assert len(test) > 300
    assert len(train) > 1000
    assert not train & test


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match='split is "validation"'):
        demo.digit_scans("validation")


def test_a_seed_gives_the_same_rows(docvqa, tmp_path):
    again = demo.write_docvqa(tmp_path / "again", train_pages=60, test_pages=20, seed=3)
    other = demo.write_docvqa(tmp_path / "other", train_pages=2, test_pages=2, seed=4)
    for split in demo.SPLITS:
        tables = [
            pyarrow.parquet.read_table(folder / "data" / f"{split}-00000-of-00001.parquet")
            for folder in (docvqa, again, other)
        ]
        assert tables[0].equals(tables[1])  # the pictures' bytes too
        assert tables[0].column("image")[0] != tables[2].column("image")[0]


def test_more_pages_leave_the_first_as_they_are():
    few, more = (list(demo.docvqa_rows("train", pages, seed=0)) for pages in (3, 5))
    assert more[:3] == few


def test_digits_are_uniform(many_rows):
    counts = np.zeros((4, 10))
    for row in many_rows:
        for position, digit in enumerate(row["answers"][0]):
            counts[position, int(digit)] += 1
    expected = len(many_rows) / 10
    chi_squared = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert (chi_squared < 27.9).all()  # 9 degrees of freedom, p = 0.001
    assert len({row["answers"][0] for row in many_rows}) > 0.9 * len(many_rows)


@pytest.mark.parametrize("what", ["question", "place", "number of words", "title"])
def test_nothing_but_the_pixels_tells_the_answer(many_rows, what):
    """What can be known without reading the value goes with no digit of it."""
    known = {
        "question": lambda row: row["query"]["en"],
        "place": lambda row: row["answer"]["start"],
        "number of words": lambda row: len(row["words"]),
        "title": lambda row: row["words"][0],
    }[what]
    groups = collections.defaultdict(list)
    for row in many_rows:
        groups[known(row)].append([int(digit) for digit in row["answers"][0]])
    answers = np.array([[int(digit) for digit in row["answers"][0]] for row in many_rows])
    for digits in map(np.array, groups.values()):
        error = answers.std(axis=0) / np.sqrt(len(digits))
        assert (np.abs(digits.mean(axis=0) - 4.5) < 4.5 * error + 0.05).all()


def test_every_field_and_place_is_asked_for(many_rows):
    labels = collections.Counter(row["words"][row["answer"]["start"] - 1] for row in many_rows)
    assert set(labels) == set(demo.LABELS)
    assert min(labels.values()) > 0.5 * len(many_rows) / len(demo.LABELS)
    first = np.mean([row["answer"]["start"] == 3 for row in many_rows])
    assert first == pytest.approx(np.mean([1 / 3, 1 / 4, 1 / 5, 1 / 6]), abs=0.06)


def test_command_line_writes_the_data(tmp_path, capsys):
    demo.main(["data", "--task", "docvqa", "--out", str(tmp_path), "--train_pages", "2", "--test_pages", "1"])
    assert capsys.readouterr().out.strip() == str(tmp_path)
    assert pyarrow.parquet.read_metadata(tmp_path / "data" / "train-00000-of-00001.parquet").num_rows == 2


def test_command_line_refuses_no_pages(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["data", "--out", str(tmp_path), "--train_pages", "0"])
    assert "0 is not positive" in capsys.readouterr().err


def test_command_line_refuses_what_would_mix_the_splits(tmp_path, capsys):
    words = ["data", "--task", "nlvr2", "--train_pages", "1", "--test_pages", "2", "--out"]
    with pytest.raises(SystemExit):
        demo.main([*words, str(tmp_path / "hub")])
    assert (
        "--test_pages 2: of nlvr2 in the hub's layout the script evaluates on the first 500" in capsys.readouterr().err
    )
    demo.main([*words, str(tmp_path / "original"), "--layout", "original"])
    assert len((tmp_path / "original" / "dev.json").read_text().splitlines()) >= 2


# --- the other tasks

CAULDRON_FEATURES = Features(
    {
        "images": List(Image()),
        "texts": List({"user": Value("string"), "assistant": Value("string"), "source": Value("string")}),
    }
)


@pytest.mark.parametrize(("task", "num_images"), [("hateful_memes", 1), ("nlvr2", 2)])
def test_the_cauldron_s_layout(task, num_images, tmp_path):
    """The first rows are for evaluation, and their pictures are the test split's."""
    demo.WRITERS[task](tmp_path / "data", train_pages=3, test_pages=2, seed=1)
    rows = load_dataset(str(tmp_path / "data" / task), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows.features == CAULDRON_FEATURES
    assert len(rows) == 5
    assert all(len(row["images"]) == num_images for row in rows)
    assert {text["assistant"] for row in rows for text in row["texts"]} <= {"Yes.", "No."}
    make = {"hateful_memes": demo.random_meme, "nlvr2": demo.random_pair}[task]
    first, _ = make(np.random.default_rng([1, 10 if num_images == 1 else 20, 1, 0]), demo.digit_scans("test"))
    pages = first if num_images == 2 else (first,)
    for image, page in zip(rows[0]["images"], pages, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(page.picture))


def script_rows(script, monkeypatch, *options):
    """What a script's own `load_data` reads."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    module = importlib.import_module(script)
    return module.load_data(module.parse())


@pytest.mark.parametrize("task", ["hateful_memes", "nlvr2"])
def test_the_scripts_read_both_layouts(task, tmp_path, monkeypatch):
    """The original layout holds the same pictures and answers as the hub's."""
    found = {}
    for layout in ("hub", "original"):
        monkeypatch.setattr(demo, "EVAL_ROWS", 2)
        folder = demo.WRITERS[task](tmp_path / layout, train_pages=5, test_pages=3, seed=1, layout=layout)
        script = f"finetune_hf_trainer_{task}"
        monkeypatch.setattr(importlib.import_module(script), "EVAL_ROWS", 3)
        options = ("--data_dir", folder, "--output_dir", tmp_path / "out")
        train_rows, eval_rows = script_rows(script, monkeypatch, *options)
        assert len(train_rows) >= 5
        assert len(eval_rows) >= 3
        content = []
        for rows in (train_rows, eval_rows):
            for row in rows.table:
                pictures = [cell["bytes"] or Path(cell["path"]).read_bytes() for cell in row["images"]]
                content += [(pictures, text["assistant"].strip(".")) for text in row["texts"]]
        found[layout] = content
    unique = [{(tuple(pictures), answer) for pictures, answer in content} for content in found.values()]
    assert unique[0] == unique[1]


def test_neither_the_digit_nor_the_caption_tells_a_meme():
    scans = demo.digit_scans("test")
    memes = [demo.random_meme(np.random.default_rng(seed), scans) for seed in range(600)]
    labels = np.array([label for _, label in memes])
    assert labels.mean() == pytest.approx(0.5, abs=0.07)  # three standard errors
    for known in (lambda page: min(page.squares.items())[1], lambda page: max(page.squares.items())[1]):
        groups = collections.defaultdict(list)
        for page, label in memes:
            groups[known(page)].append(label)
        best = sum(max(sum(group), len(group) - sum(group)) for group in groups.values()) / len(memes)
        assert best < 0.85  # 0.8 by the rule, and three standard errors
    for page, label in memes:
        (_, digit), (_, caption) = sorted(page.squares.items())
        assert label == (int(digit) >= 5 and caption in demo.RUDE)


def test_pairs_are_balanced():
    scans = demo.digit_scans("test")
    pairs = [demo.random_pair(np.random.default_rng(seed), scans) for seed in range(400)]
    for sentence in demo.SENTENCES:
        truth = [is_true for _, asked in pairs for one, is_true in asked if one == sentence]
        assert np.mean(truth) == pytest.approx(0.5, abs=0.1)
    assert {len(asked) for _, asked in pairs} == {1, 2}
    for pages, asked in pairs[:50]:
        left, right = (int(*page.squares.values()) for page in pages)
        assert left != right
        assert all(is_true == (left > right) for _, is_true in asked)


def ink_place(picture):
    """(row, column) of the square that holds the ink."""
    pixels = np.asarray(picture, dtype=int)
    rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).max(axis=-1) > 100)
    if len(rows) == 0:  # the ink lies over the corner
        rows, columns = np.nonzero(np.abs(pixels - pixels[-1, -1]).max(axis=-1) > 100)
    return int((rows.min() + rows.max()) / 2 / demo.SQUARE), int((columns.min() + columns.max()) / 2 / demo.SQUARE)


def test_motion_tells_the_class_and_a_frame_does_not():
    """The digit moves as the class says; the best guess from a single frame is right half the time."""
    scans = demo.digit_scans("test")
    places = {}  # class -> (videos, frames, 2)
    for label, changes in demo.MOTIONS.items():
        videos = [demo.random_video(np.random.default_rng([seed]), scans, label) for seed in range(150)]
        places[label] = np.array([[ink_place(frame) for frame in video[::2]] for video in videos])
        assert (np.diff(places[label], axis=1) == demo.STRIDE * np.array(changes)).all()
    found = np.stack(list(places.values()))
    assert (found.min(), found.max()) == (0, demo.SQUARES - 1)
    # what may be known of one axis and one frame: how often each class has the digit in each row or column
    for frame in range(found.shape[2]):
        for axis in range(2):
            counts = np.stack([np.bincount(one[:, frame, axis], minlength=demo.SQUARES) for one in found])
            assert counts.max(axis=0).sum() / counts.sum() < 0.6  # 1/2, and what 600 videos scatter


@pytest.mark.parametrize("layout", ["hub", "original"])
def test_the_converter_reads_the_videos(layout, tmp_path, monkeypatch):
    folder = demo.write_ucf101(tmp_path / "data", train_pages=8, test_pages=4, seed=1, layout=layout)
    source = ("--archive", folder / "UCF101_subset.tar.gz") if layout == "hub" else ("--video_dir", folder)
    options = (*source, "--out_dir", tmp_path / "converted", "--num_frames", 4, "--num_workers", 1)
    ended = run_script("convert_ucf101.py", *options, processes=0)
    assert ended.returncode == 0, ended.stdout
    train_data, eval_data, classes = script_rows(
        "finetune_hf_trainer_ucf101",
        monkeypatch,
        "--data_dir",
        tmp_path / "converted",
        "--output_dir",
        tmp_path / "o",
        "--eval_split",
        "test",
    )
    assert (len(train_data), len(eval_data), classes) == (8, 4, sorted(demo.MOTIONS))
    for index, record in enumerate(eval_data.records):
        turn = eval_data.example(index).turns[0]
        assert len(turn.images) == 4
        assert turn.assistant == record["conversations"][0]["images"][0].split("/")[1]
        places = np.array([ink_place(image) for image in turn.images])
        assert tuple(np.sign(places[-1] - places[0]).tolist()) == demo.MOTIONS[turn.assistant]


@pytest.mark.parametrize("task", demo.WRITERS)
def test_shuffled_pictures(task, tmp_path):
    """Questions and answers stay, and every evaluation example has the pictures of another one."""
    data = demo.WRITERS[task](tmp_path / "data", train_pages=4, test_pages=demo.EVAL_ROWS if task == "nlvr2" else 8)
    if task == "ucf101":
        options = ("--archive", data / "UCF101_subset.tar.gz", "--out_dir", tmp_path / "converted", "--num_workers", 1)
        assert run_script("convert_ucf101.py", *options, processes=0).returncode == 0
        data = tmp_path / "converted"
    demo.main(["shuffle", str(data), "--task", task, "--out", str(tmp_path / "shuffled")])
    pairs = []
    for folder in (data, tmp_path / "shuffled"):
        if task == "ucf101":
            records = [json.loads(line) for line in (folder / "ucf101_test.jsonl").read_text().splitlines()]
            pairs.append([(one["conversations"][0].pop("images"), one) for one in records])
            assert all((folder / "images" / name).is_file() for images, _ in pairs[-1] for name in images)
        else:
            file = "data/test" if task == "docvqa" else f"{task}/train"
            rows = pyarrow.parquet.read_table(folder / f"{file}-00000-of-00001.parquet").to_pylist()
            pairs.append([(row.pop("image", None) or row.pop("images"), row) for row in rows])
    before, after = pairs
    assert [row for _, row in before] == [row for _, row in after]
    num_eval = {"docvqa": 8, "ucf101": 8}.get(task, min(len(before), demo.EVAL_ROWS))
    assert all(mine != dealt for (mine, _), (dealt, _) in zip(before[:num_eval], after, strict=False))
    assert sorted(map(str, (mine for mine, _ in before))) == sorted(map(str, (dealt for dealt, _ in after)))


# --- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Phi3VProcessor.from_pretrained(demo.CHECKPOINT).tokenizer


def pieces(tokenizer, text, **kwargs):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **kwargs).input_ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|user|>\n", ["<|user|>", "▁", "<0x0A>"]),
        ("<|end|>\n<|assistant|>\n", ["<|end|>", "▁", "<0x0A>", "<|assistant|>"]),  # which takes the line's end
        ("\n", ["▁", "<0x0A>"]),
        ("", []),
        ("4821<|end|>\n<|endoftext|>", ["▁", "4", "8", "2", "1", "<|end|>", "▁", "<0x0A>", "<|endoftext|>"]),
        ("<|image|> No", ["<|image|>", "▁No"]),
        ("</s> No", ["</s>", "▁No"]),
        ("<|system|> No", ["<|system|>", "▁", "▁No"]),
        ("No\n\nYes", ["▁No", "<0x0A>", "<0x0A>", "Yes"]),
        ("No\tYes", ["▁No", "<0x09>", "Yes"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("0.5<|end|>", ["▁", "0", ".", "5", "<|end|>"]),
    ],
)
def test_tokenizer_splits_as_the_published_one(tokenizer, text, expected):
    assert pieces(tokenizer, text, add_special_tokens=False) == expected
    assert pieces(tokenizer, text) == ["<s>", *expected]


@pytest.mark.parametrize(
    "text",
    ["Yes", " leading", "  two", "a\n\nb", "မြန်မာ", "日本語 text", "", "\n", "tab\there", "$1,234.56", "éàü", "0.5"],
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_special_tokens(tokenizer):
    for token in [*SPECIAL_TOKENS, *(f"<|placeholder{number}|>" for number in range(1, 40))]:
        assert pieces(tokenizer, token, add_special_tokens=False) == [token]
        assert tokenizer.decode(tokenizer.convert_tokens_to_ids([token]), skip_special_tokens=True) == ""
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(["</s>"]), skip_special_tokens=True) == "</s>"


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>\na<|end|>\n<|user|>\nb<|end|>\n<|assistant|>\n"


# --- checkpoint


def test_checkpoint_is_complete_and_small(tokenizer):
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "pretraining.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in demo.CHECKPOINT.iterdir()} == expected
    assert sum(path.stat().st_size for path in demo.CHECKPOINT.iterdir()) <= 4_000_000
    config = json.loads((demo.CHECKPOINT / "config.json").read_text())
    rope = config["rope_scaling"]
    half_head = config["hidden_size"] // config["num_attention_heads"] // 2
    assert set(rope) == {"type", "short_factor", "long_factor"}
    assert rope["type"] == "su"
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == half_head
    assert rope["short_factor"] != rope["long_factor"]
    assert (config["original_max_position_embeddings"], config["max_position_embeddings"]) == (4096, 131072)
    assert config["img_processor"]["image_dim_out"] == config["vision_config"]["hidden_size"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] == len(tokenizer)
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image|>")
    assert config["pad_token_id"] == tokenizer.pad_token_id
    ends = json.loads((demo.CHECKPOINT / "generation_config.json").read_text())["eos_token_id"]
    assert ends == tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])


def test_pretraining_log():
    """The log that lies beside the weights is of the stages that the command has now, and ended well."""
    record = json.loads((demo.CHECKPOINT / "pretraining.json").read_text())
    assert record["stages"] == [asdict(stage) for stage in demo_pretrain.STAGES]
    assert list(dict.fromkeys(entry["stage"] for entry in record["log"])) == ["see", "skim", "read"]
    assert f"--seed {record['seed']} --scale 1.0" in record["command"]
    assert record["log"][-1]["first"] > 0.9  # of the figures that are not to be guessed from others


def test_pretraining_command(tmp_path):
    """A few steps of every stage, and a complete folder."""
    demo_pretrain.main(["--out", str(tmp_path), "--scale", "0.001", "--threads", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in demo.CHECKPOINT.iterdir()}
    assert (tmp_path / "tokenizer.json").read_bytes() == (demo.CHECKPOINT / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (demo.CHECKPOINT / "config.json").read_text()
    )


def test_checkpoint_loads_without_a_warning(caplog):
    transformers_logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level("WARNING"):
            warnings.simplefilter("error")
            model = Phi3VForCausalLM.from_pretrained(demo.CHECKPOINT)
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records
    assert next(model.parameters()).dtype == torch.bfloat16
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_checkpoint_spells(tokenizer):
    """What it was pre-trained for, on pages it has not seen: nearly always right where chance gives a tenth."""
    processor = Phi3VProcessor.from_pretrained(demo.CHECKPOINT, num_crops=1)
    model = Phi3VForCausalLM.from_pretrained(demo.CHECKPOINT, dtype=torch.float32)
    pages = list(demo_pages("test", 16, seed=5))
    prompts = [
        f"<|user|>\n<|image_1|>\nSpell the {page.lines[-1][0].lower()} number.<|end|>\n<|assistant|>\n"
        for page in pages
    ]
    inputs = processor(prompts, [[page.picture] for page in pages])
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = 0
    for page, text in zip(pages, texts, strict=True):
        value = page.lines[-1][1]
        figures, *words = text.split() or [""]
        assert len(words) == demo.DIGITS_PER_VALUE, text  # first in figures, then spelled
        found += sum(one == right for one, right in zip(figures, value, strict=False))
    assert found > 0.85 * demo.DIGITS_PER_VALUE * len(pages), texts
