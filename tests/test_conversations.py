"""The JSONL format, and the UCF-101 script that reads it."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

import finetune_hf_trainer_ucf101 as ucf101
from common.conversations import load_conversations
from common.demo import CHECKPOINT
from common.errors import UserError
from common.evaluation import Generated
from tests.launch import read_evaluation, read_log, run_script

CLASSES = ("Archery", "BabyCrawling", "BalanceBeam")


def picture(seed):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (24, 32, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def write(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(folder):
    return load_conversations(folder / "data.jsonl", folder / "images")


def one(**turn):
    return {"conversations": [{"user": "Q?", "assistant": "A", **turn}]}


def test_images_are_numbered_through_the_conversation(folder):
    turns = [
        {"images": ["0.png", "1.png"], "user": "Both?", "assistant": "yes"},
        {"user": "Only text, ü?", "assistant": "no"},
        {"images": ["2.png"], "user": "This?", "assistant": "maybe"},
    ]
    write(folder, {"id": "x", "source": "mine", "conversations": turns}, "", one())
    data = load(folder)
    assert len(data) == 2
    example = data.example(0)
    assert [turn.user for turn in example.turns] == [
        "<|image_1|><|image_2|>\nBoth?",
        "Only text, ü?",
        "<|image_3|>\nThis?",
    ]
    assert [turn.assistant for turn in example.turns] == ["yes", "no", "maybe"]
    seeds = [seed for turn in example.turns for seed in turn.images]
    for image, number in zip(seeds, range(3), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(picture(number)))
    assert data.place(1) == f"{folder / 'data.jsonl'}, line 3"  # the empty line counts
    assert [turn.user for turn in data.example(1).turns] == ["Q?"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({}, "line 1: conversations must be a list with at least one turn"),
        ({"conversations": []}, "line 1: conversations must be a list with at least one turn"),
        ({"conversations": ["text"]}, "line 1: turn 1 is str, not a dictionary"),
        (one(user=None), "line 1: turn 1 needs user, a text that is not empty"),
        (one(assistant=" "), "line 1: turn 1 needs assistant, a text that is not empty"),
        (one(images="0.png"), "line 1: turn 1: images must be a list of paths"),
        (one(images=[3]), "line 1: turn 1: images must be a list of paths"),
        (one(images=["absent.png"]), "line 1: turn 1: there is no image absent.png"),
        (one(images=["../data.jsonl"]), "line 1: turn 1: the path ../data.jsonl leaves the folder"),
        (one(images=["/etc/hostname"]), "line 1: turn 1: the path /etc/hostname leaves the folder"),
        ("[]", "line 1: list instead of a dictionary"),
        ("{", "line 1: no JSON in UTF-8"),
    ],
)
def test_faults(folder, record, problem):
    write(folder, record)
    with pytest.raises(UserError) as error:
        load(folder)
    assert problem in str(error.value)
    assert str(folder / "data.jsonl") in str(error.value)


def test_all_faults_at_once(folder):
    write(folder, one(), one(user=1), one(images=["absent.png"]), {})
    with pytest.raises(UserError) as error:
        load(folder)
    text = str(error.value)
    assert text.startswith("3 problems:")
    assert all(f"line {number}: " in text for number in (2, 3, 4))
    write(folder, *[{}] * 100)
    with pytest.raises(UserError, match="and 80 more"):
        load(folder)


def test_wrong_encoding_empty_and_missing_file(folder):
    (folder / "data.jsonl").write_bytes(b'{"conversations": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: no JSON in UTF-8"):
        load(folder)
    (folder / "data.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        load(folder)
    (folder / "data.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load(folder)


def test_undecodable_image_is_named(folder):
    (folder / "images" / "0.png").write_bytes(b"not a picture")
    write(folder, one(), one(images=["0.png"]))
    with pytest.raises(UserError, match=r"line 2, .*0\.png: the image cannot be decoded"):
        load(folder).example(1)


@pytest.fixture
def videos(tmp_path):
    """The converter's tree: three classes, frames of a class alike."""
    for split, count in (("train", 8), ("test", 3), ("val", 2)):
        lines = []
        for number in range(count):
            label = CLASSES[number % 3]
            names = [f"{split}/{label}/v{number}.{frame}.jpg" for frame in range(2)]
            for name in names:
                path = tmp_path / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(number % 3).save(path)
            user = f"Classify the video into one of the following classes: {', '.join(CLASSES)}."
            turn = {"images": names, "user": user, "assistant": label}
            lines.append(json.dumps({"id": f"{split}-{number}", "source": "ucf101", "conversations": [turn]}))
        (tmp_path / f"ucf101_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_ucf101_splits_and_prompt(videos):
    options = argparse.Namespace(data_dir=str(videos), eval_split="test", eval_limit=None)
    train_data, eval_data = ucf101.load_data(options)
    assert (len(train_data), len(eval_data)) == (8, 3)
    turn = ucf101.make_example(train_data, 1).turns[0]
    assert turn.user.startswith(
        "<|image_1|><|image_2|>\nClassify the video into one of the following classes: Archery,"
    )
    assert turn.assistant == "BabyCrawling"
    assert len(ucf101.load_data(argparse.Namespace(**{**vars(options), "eval_split": "val"}))[1]) == 2
    with pytest.raises(UserError, match="--data_dir is needed"):
        ucf101.load_data(argparse.Namespace(**{**vars(options), "data_dir": None}))


def test_ucf101_accuracy_per_class_and_confusion(videos, monkeypatch, tmp_path):
    options = argparse.Namespace(data_dir=str(videos), eval_split="test", eval_limit=None, output_dir=tmp_path / "out")
    data = ucf101.load_data(options)[1]
    answers = [Generated("archery."), Generated("Archery"), Generated("a balance beam")]
    monkeypatch.setattr(ucf101, "generate_answers", lambda *args, **kwargs: answers)
    totals = ucf101.evaluate(None, None, data, options, "eval_x")
    assert totals["accuracy"] == pytest.approx(1 / 3)
    assert totals["accuracy_per_class"] == {"Archery": 1.0, "BabyCrawling": 0.0, "BalanceBeam": 0.0}
    stored = read_evaluation(tmp_path / "out", "eval_x")
    assert stored["confusion"]["labels"] == [*CLASSES, "(other)"]
    assert stored["confusion"]["rows_true_columns_predicted"] == [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]
    assert [example["id"] for example in stored["examples"]] == ["test-0", "test-1", "test-2"]
    with Image.open(tmp_path / "out" / "confusion_eval_x.png") as image:
        assert min(image.size) > 200


def test_ucf101_run(videos, tmp_path):
    """Two processes, frozen vision: a short run to the end."""
    folder = tmp_path / "out"
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", videos, "--output_dir", folder, "--num_crops", 1)
    options += ("--batch_size", 4, "--max_steps", 3, "--warmup_steps", 1, "--logging_steps", 1, "--no-tqdm")
    ended = run_script("finetune_hf_trainer_ucf101.py", *options, "--freeze_vision_model", "--learning_rate", "1e-3")
    assert ended.returncode == 0, ended.stdout[-3000:]
    losses = [line["loss"] for line in read_log(folder)]
    assert losses[-1] < losses[0]
    assert read_evaluation(folder, "eval_after")["num_examples"] == 3
    assert (folder / "confusion_eval_after.png").stat().st_size > 1000
