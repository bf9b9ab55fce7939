"""UCF-101: the converter's format, accuracy per class, confusion matrix, and a short run as a user starts it."""

import argparse
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import finetune_hf_trainer_ucf101 as ucf101
from common.demo import CHECKPOINT
from common.errors import UserError
from common.evaluation import Generated, write_confusion
from common.report import MOST_LABELS
from tests.launch import read_evaluation, read_log, run_script

FRAMES = 2
# No JSON; no conversations; no answer; one that is no text.
BAD_LINES = (
    '{"id": "a", ',
    '{"id": "b"}',
    *(f'{{"conversations": [{{"user": "a"{end}}}]}}' for end in ("", ', "assistant": [7]')),
)
USER = "Classify the video into one of the following classes: Archery, Bowling, Diving."
# Diving is seen in training only.
VIDEOS = {
    "train": ("Archery", "Bowling", "Diving", "Archery"),
    "val": ("Bowling",),
    "test": ("Archery", "Bowling", "Bowling"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `convert_ucf101.py` writes, with two frames a video."""
    folder = tmp_path_factory.mktemp("converted")
    number = 0
    for split, labels in VIDEOS.items():
        lines = []
        for label in labels:
            (folder / "images" / split / label).mkdir(parents=True, exist_ok=True)
            names = [f"{split}/{label}/v_{number}.{frame}.jpg" for frame in range(FRAMES)]
            for frame, name in enumerate(names):
                pixels = np.random.RandomState(FRAMES * number + frame).randint(0, 255, (24, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name)
            turn = {"images": names, "user": USER, "assistant": label}
            lines.append({"id": f"{split}-{number:010}", "source": "ucf101", "conversations": [turn]})
            number += 1
        (folder / f"ucf101_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def options_for(folder, **values):
    options = {
        "data_dir": str(folder),
        "eval_split": "test",
        "eval_limit": None,
        "eval_only": False,
        "bad_examples": "stop",
    }
    return argparse.Namespace(**{**options, **values})


def test_data(folder):
    train_data, eval_data, classes = ucf101.load_data(options_for(folder))
    assert (len(train_data), len(eval_data)) == (4, 3)
    assert classes == ["Archery", "Bowling", "Diving"]
    (turn,) = ucf101.make_example(train_data, 2).turns
    assert (turn.user, turn.assistant) == (f"<|image_1|><|image_2|>\n{USER}", "Diving")
    assert [image.size for image in turn.images] == [(32, 24)] * FRAMES
    assert len(ucf101.load_data(options_for(folder, eval_split="val"))[1]) == 1


def test_it_is_evaluated_on_val_as_published(monkeypatch, folder, tmp_path):
    options = ("--data_dir", str(folder), "--output_dir", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["script", *options])
    assert len(ucf101.load_data(ucf101.parse())[1]) == 1


def test_evaluation_needs_no_training_data(folder, tmp_path):
    (tmp_path / "images").symlink_to(folder / "images")
    (tmp_path / "ucf101_test.jsonl").write_text((folder / "ucf101_test.jsonl").read_text())
    train_data, eval_data, classes = ucf101.load_data(options_for(tmp_path, eval_only=True))
    assert (train_data, len(eval_data), classes) == (None, 3, ["Archery", "Bowling"])
    with pytest.raises(UserError, match=r"ucf101_train.jsonl cannot be read: No such file"):
        ucf101.load_data(options_for(tmp_path))


def test_folder_must_be_named(monkeypatch):
    """Together with whatever else is wrong."""
    monkeypatch.setattr(sys, "argv", ["script", "--num_crops", "17"])
    with pytest.raises(UserError, match=r"(?s)--data_dir is needed: the folder that convert_ucf101.py.*17: it must"):
        ucf101.parse()


@pytest.mark.parametrize(("split", "arguments"), [("train", ()), ("test", ()), ("test", ("--eval_only",))])
def test_lengths_are_checked_before_anything_runs(monkeypatch, folder, tmp_path, split, arguments):
    """A conversation longer than the model takes, of what is trained or evaluated on, is told with its line.

    A frame at one crop is 313 tokens: the third one takes the second video past the limit.
    """
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 900}))
    (tmp_path / "images").symlink_to(folder / "images")
    for name in ("train", "test"):
        records = [json.loads(line) for line in (folder / f"ucf101_{name}.jsonl").read_text().splitlines()]
        if name == split:
            records[1]["conversations"][0]["images"] += records[0]["conversations"][0]["images"][:1]
        (tmp_path / f"ucf101_{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--model_name_or_path", str(checkpoint), "--data_dir", str(tmp_path), "--num_crops", "1")
    options += ("--eval_split", "test")
    monkeypatch.setattr(sys, "argv", ["ucf101", *options, "--output_dir", str(tmp_path / "out"), *arguments])
    monkeypatch.setattr(ucf101, "load_model", lambda *ignored: pytest.fail("before the weights are loaded"))
    message = rf"^\S+ucf101_{split}.jsonl, line 2: \d+ tokens, the model takes 900: lower --num_crops"
    with pytest.raises(UserError, match=message):
        ucf101.main()


def evaluate(monkeypatch, folder, output, answers, **values):
    _, eval_data, classes = ucf101.load_data(options_for(folder, **values))
    monkeypatch.setattr(ucf101, "generate_answers", lambda *args, **kwargs: [Generated(answer) for answer in answers])
    totals = ucf101.evaluate(None, None, eval_data, classes, argparse.Namespace(output_dir=output), "eval_x")
    return totals, read_evaluation(output, "eval_x")


def test_accuracy_per_class_and_confusion(monkeypatch, folder, tmp_path):
    """Archery taken for Diving, a class of the training data alone; one Bowling right, one given no class's name."""
    totals, stored = evaluate(monkeypatch, folder, tmp_path / "out", ["Diving", " bowling.", "Bowling alley"])
    assert totals == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy_per_class": {"Archery": 0.0, "Bowling": 0.5},  # Diving has no videos here
    }
    assert stored["confusion"] == {
        "labels": ["Archery", "Bowling", "Diving", "(other)"],
        "rows_true_columns_predicted": [[0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
    }
    assert stored["num_examples"] == 3
    assert [one["id"] for one in stored["examples"]] == [f"test-{number:010}" for number in (5, 6, 7)]
    assert [one["correct"] for one in stored["examples"]] == [0.0, 1.0, 0.0]
    with Image.open(tmp_path / "out" / "confusion_eval_x.png") as drawn:
        assert min(drawn.size) > 200


def test_confusion_of_many_labels(tmp_path, capsys):
    labels = [f"label {number}" for number in range(MOST_LABELS)]
    matrix = write_confusion(tmp_path / "x.png", labels, labels, labels)
    assert [sum(row) for row in matrix] == [1] * MOST_LABELS
    (tmp_path / "x.png").unlink()
    assert write_confusion(tmp_path / "x.png", labels, labels, [*labels, "one more"]) is None
    assert f"no x.png: there are {MOST_LABELS + 1} labels" in capsys.readouterr().out
    assert not (tmp_path / "x.png").exists()


def test_a_limited_evaluation_knows_all_classes(monkeypatch, folder, tmp_path):
    _, stored = evaluate(monkeypatch, folder, tmp_path / "out", ["Bowling"], eval_limit=1)
    assert stored["confusion"]["rows_true_columns_predicted"][0] == [0, 1, 0, 0]


def test_run(folder, tmp_path):
    """Two processes, QLoRA: a short run to the end."""
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", folder, "--output_dir", tmp_path, "--num_crops", 1)
    options += ("--batch_size", 4, "--max_steps", 4, "--warmup_steps", 1, "--logging_steps", 1, "--num_workers", 1)
    options += ("--use_lora", "--use_qlora", "--lora_rank", 4, "--learning_rate", "1e-2", "--no-tqdm")
    options += ("--eval_split", "test")
    ended = run_script("finetune_hf_trainer_ucf101.py", *options)
    assert ended.returncode == 0, ended.stdout[-3000:]
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert losses[-1] < losses[0]
    after = read_evaluation(tmp_path, "eval_after")
    assert after["num_examples"] == sum(map(sum, after["confusion"]["rows_true_columns_predicted"])) == 3
    assert f"after training:  accuracy {after['accuracy']:.4f}" in ended.stdout
    assert {file.name for file in tmp_path.glob("*.png")} == {"confusion_eval_before.png", "confusion_eval_after.png"}


def test_run_that_skips(folder, tmp_path):
    """A frame cut off, lines that are none: all are told, with file and line, and the run goes on to its end."""
    data = shutil.copytree(folder, tmp_path / "data")
    frame = data / "images" / "train" / "Bowling" / "v_1.0.jpg"
    frame.write_bytes(frame.read_bytes()[:100])
    with open(data / "ucf101_train.jsonl", "a") as file:
        file.writelines(f"{line}\n" for line in BAD_LINES)
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", data, "--num_crops", 1, "--batch_size", 8)
    options += ("--max_steps", 2, "--logging_steps", 1, "--eval_limit", 1, "--num_workers", 1, "--no-tqdm")
    options += ("--use_lora", "--lora_rank", 4)
    stopped = run_script("finetune_hf_trainer_ucf101.py", *options, "--output_dir", tmp_path / "stopped", processes=0)
    assert stopped.returncode == 2
    bad_lines = [f"{data / 'ucf101_train.jsonl'}, line {number}: " for number in range(5, 5 + len(BAD_LINES))]
    assert all(place in stopped.stdout for place in bad_lines)
    skip = ("--bad_examples", "skip", "--max_bad_fraction", 0.8, "--output_dir", tmp_path / "out")
    ended = run_script("finetune_hf_trainer_ucf101.py", *options, *skip, processes=0)
    assert ended.returncode == 0, ended.stdout[-3000:]
    problems = [json.loads(line)["problem"] for line in (tmp_path / "out" / "bad_examples.jsonl").open()]
    assert len(problems) == 1 + len(BAD_LINES)
    for place in (str(frame), *bad_lines):
        assert any(place in problem for problem in problems), problems
    assert [line["step"] for line in read_log(tmp_path / "out")][-1] == 2
    assert read_evaluation(tmp_path / "out", "eval_after")["num_examples"] == 1


@pytest.mark.long
def test_a_mended_frame_lets_the_run_go_on(folder, tmp_path):
    """The same command, after it had given up for too many bad examples."""
    data = shutil.copytree(folder, tmp_path / "data")
    frame = data / "images" / "train" / "Bowling" / "v_1.0.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(whole[:100])
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", data, "--num_crops", 1, "--batch_size", 4)
    options += ("--max_steps", 2, "--eval_limit", 1, "--num_workers", 1, "--no-tqdm", "--use_lora", "--lora_rank", 4)
    options += ("--bad_examples", "skip", "--max_bad_fraction", 0.1, "--output_dir", tmp_path / "out")
    for mended in (False, False, True):
        frame.write_bytes(whole if mended else whole[:100])
        ended = run_script("finetune_hf_trainer_ucf101.py", *options, processes=0)
        assert (ended.returncode == 0) == mended, ended.stdout[-3000:]
        assert ("1 of 1 bad examples can be made by now" in ended.stdout) == mended
