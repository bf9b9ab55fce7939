"""The built-in data and checkpoint: layout, honesty of the data, completeness of the checkpoint."""

from __future__ import annotations

import collections
import json
import warnings

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import Features, Image, List, Value, load_dataset
from transformers.utils import logging as transformers_logging

from common import demo
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor

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
            assert row["image"].size == (demo.PAGE_SIDE, demo.PAGE_SIDE)
            assert len(row["words"]) == len(row["bounding_boxes"])
            assert all(
                0 <= left < right <= 1 and 0 <= top < bottom <= 1 for left, top, right, bottom in row["bounding_boxes"]
            )
            assert row["words"][row["answer"]["start"]] == row["answer"]["text"] == row["answers"][0]


def test_boxes_hold_the_ink(docvqa):
    rows = pyarrow.parquet.read_table(docvqa / "data" / "test-00000-of-00001.parquet").to_pylist()
    for row, page in zip(rows, demo_pages("test", len(rows), seed=3), strict=True):
        pixels = np.asarray(page.picture, dtype=int)
        is_ink = np.abs(pixels - pixels[-1, -1]).max(axis=-1) > 60
        for left, top, right, bottom in (np.array(row["bounding_boxes"]) * demo.PAGE_SIDE).round().astype(int):
            assert is_ink[top:bottom, left:right].any()
            is_ink[top:bottom, left:right] = False
        is_ink[31:34] = False  # the line under the title
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


def test_a_page_that_cannot_hold_its_lines_is_an_error():
    with pytest.raises(ValueError, match="do not fit"):
        demo.draw_page(np.random.default_rng(0), demo.digit_scans("train"), [("Order", "1234567890")])


def test_command_line_writes_the_data(tmp_path, capsys):
    demo.main(["data", "--task", "docvqa", "--out", str(tmp_path), "--train_pages", "2", "--test_pages", "1"])
    assert capsys.readouterr().out.strip() == str(tmp_path)
    assert pyarrow.parquet.read_metadata(tmp_path / "data" / "train-00000-of-00001.parquet").num_rows == 2


def test_command_line_refuses_no_pages(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["data", "--out", str(tmp_path), "--train_pages", "0"])
    assert "0 is not positive" in capsys.readouterr().err


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


def test_pretraining_log_names_its_seed_and_stages():
    record = json.loads((demo.CHECKPOINT / "pretraining.json").read_text())
    assert isinstance(record["seed"], int)
    assert [stage["name"] for stage in record["stages"]] == list(
        dict.fromkeys(entry["stage"] for entry in record["log"])
    )
    # an interim checkpoint says so; a finished one must read
    assert record.get("interim") or record["log"][-1]["digit_accuracy"] > 0.8


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


def test_checkpoint_transcribes(tokenizer):
    """What it was pre-trained for, on pages it has not seen; questions it answers with a transcription too."""
    processor = Phi3VProcessor.from_pretrained(demo.CHECKPOINT, num_crops=1)
    model = Phi3VForCausalLM.from_pretrained(demo.CHECKPOINT, dtype=torch.float32)
    pages = list(demo_pages("test", 8, seed=5))
    prompt = "<|user|>\n<|image_1|>\nTranscribe the fields.<|end|>\n<|assistant|>\n"
    inputs = processor([prompt] * len(pages), [[page.picture] for page in pages])
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = total = 0
    for page, text in zip(pages, texts, strict=True):
        lines = [" ".join(line) for line in page.lines]
        total += len("".join(lines))
        found += sum(a == b for a, b in zip("\n".join(lines), text.strip(), strict=False))
    is_interim = json.loads((demo.CHECKPOINT / "pretraining.json").read_text()).get("interim")
    assert found > (0.25 if is_interim else 0.7) * total  # by chance: a tenth
