"""Hateful Memes: both layouts, both metrics, and a short run as a user starts it."""

import argparse
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import finetune_hf_trainer_hateful_memes as memes
from common.cli import BAD_EXAMPLES
from common.demo import CHECKPOINT
from common.errors import UserError
from common.evaluation import Generated
from tests.launch import read_evaluation, read_log, run_script


def picture(seed):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (24, 32, 3), dtype=np.uint8))


def options_for(folder, **values):
    options = {"data_dir": str(folder), "eval_file": None, "eval_limit": None, "eval_only": False}
    return argparse.Namespace(**{**options, "bad_examples": "stop", **values})


@pytest.fixture(scope="module")
def cauldron(tmp_path_factory):
    """A local copy in the_cauldron's layout: 500 rows to evaluate on and 24 to train on."""
    folder = tmp_path_factory.mktemp("the_cauldron") / "hateful_memes"
    text = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    rows = [
        {
            "images": [picture(k)],
            "texts": [{"user": f"Hateful {k}?", "assistant": ("No.", "Yes.")[k % 2], "source": "hateful_memes"}],
        }
        for k in range(524)
    ]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(text)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture
def challenge(tmp_path):
    """The original challenge's folder."""
    (tmp_path / "img").mkdir()
    for name, ids in (("train", range(6)), ("dev_seen", range(6, 10)), ("dev_unseen", range(10, 12))):
        lines = []
        for k in ids:
            picture(k).save(tmp_path / "img" / f"{k:05}.png")
            lines.append(json.dumps({"id": k, "img": f"img/{k:05}.png", "label": k % 2, "text": f"text {k}"}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_the_cauldron_is_split_as_published(cauldron):
    train_rows, eval_rows = memes.load_data(options_for(cauldron))
    assert (len(train_rows), len(eval_rows)) == (24, 500)
    turn = memes.make_example(train_rows, 0).turns[0]
    assert (turn.user, turn.assistant) == ("<|image_1|>\nHateful 500?", "No.")
    assert np.array_equal(np.asarray(turn.images[0]), np.asarray(picture(500)))
    assert memes.make_example(eval_rows, 499).turns[0].user == "<|image_1|>\nHateful 499?"
    assert len(memes.load_data(options_for(cauldron, eval_limit=3))[1]) == 3


def test_few_rows_can_be_evaluated(cauldron, tmp_path):
    rows = datasets.Dataset.from_parquet(str(cauldron / "train-00000-of-00001.parquet")).select(range(9))
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="has 9 rows; the first 500 are for evaluation: none to train on"):
        memes.load_data(options_for(tmp_path))
    train_rows, eval_rows = memes.load_data(options_for(tmp_path, eval_only=True))
    assert (train_rows, len(eval_rows)) == (None, 9)


@pytest.mark.parametrize("texts", [None, [], [{"user": "Hateful?", "assistant": None, "source": "hateful_memes"}]])
def test_rows_without_an_answer(cauldron, tmp_path, texts):
    """Are told before anything is loaded; of those that are trained on only where bad ones are not left out."""
    rows = datasets.Dataset.from_parquet(str(cauldron / "train-00000-of-00001.parquet"))

    def broken(number):
        features, records = rows.features, rows.with_format("arrow")[:].to_pylist()
        records[number]["texts"] = texts
        path = tmp_path / f"{number}" / "train.parquet"
        datasets.Dataset.from_list(records, features=features).to_parquet(path)
        return path.parent

    in_training, in_evaluation = broken(510), broken(7)
    with pytest.raises(UserError, match="row 510 has "):
        memes.load_data(options_for(in_training))
    assert len(memes.load_data(options_for(in_training, bad_examples="skip"))[0]) == 24
    assert len(memes.load_data(options_for(in_training, eval_only=True))[1]) == 500
    with pytest.raises(UserError, match="row 7 has "):
        memes.load_data(options_for(in_evaluation, bad_examples="skip"))


def test_too_few_rows(cauldron, tmp_path):
    rows = datasets.Dataset.from_parquet(str(cauldron / "train-00000-of-00001.parquet")).select(range(500))
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="has 500 rows; the first 500 are for evaluation: none to train on"):
        memes.load_data(options_for(tmp_path))


def test_original_challenge(challenge):
    train_rows, eval_rows = memes.load_data(options_for(challenge))
    assert (len(train_rows), len(eval_rows)) == (6, 4)
    turn = memes.make_example(eval_rows, 1).turns[0]
    # shared/recipe: picture and question only; the file's "text 7" is not told
    assert turn.user == "<|image_1|>\nIs this meme hateful? Answer yes or no."
    assert turn.assistant == "Yes"
    assert np.array_equal(np.asarray(turn.images[0]), np.asarray(picture(7)))
    assert len(memes.load_data(options_for(challenge, eval_file="dev_unseen.jsonl"))[1]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "img": "../secret.png", "label": 0}', r"line 1: the path ../secret.png leaves the folder"),
        ('{"id": 1, "img": "img/1.png"}', r"line 1: needs img, a path, and label, 0 or 1"),
        ('{"id": 1, "img": 5, "label": 0}', r"line 1: needs img, a path, and label, 0 or 1"),
        ("[1]", r"line 1: list instead of a dictionary"),
        ("{broken", r"line 1: no JSON in UTF-8"),
        ("", r"is empty"),
    ],
)
def test_faults_in_the_challenge_files(challenge, line, message):
    (challenge / "train.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        memes.load_data(options_for(challenge))


def test_pictures_that_are_missing_or_broken(challenge):
    (challenge / "img" / "00007.png").write_bytes(b"no picture")
    rows = memes.load_data(options_for(challenge))[1]
    with pytest.raises(UserError, match=r"dev_seen.jsonl, line 2: the image .*/img/00007.png cannot be decoded"):
        memes.make_example(rows, 1)
    for name in ("00006.png", "00008.png"):
        (challenge / "img" / name).unlink()
    with pytest.raises(UserError, match=r"2 examples of .*/dev_seen.jsonl whose images are missing: 6, 8; see"):
        memes.load_data(options_for(challenge))


def test_which_files_are_read(challenge, cauldron):
    there = r"dev_seen.jsonl, .*train.jsonl"
    with pytest.raises(UserError, match=rf"test_seen.jsonl cannot be read: No such file or directory \(.* has {there}"):
        memes.load_data(options_for(challenge, eval_file="test_seen.jsonl"))
    with pytest.raises(UserError, match=r"dev_seen.jsonl cannot be read: No such file"):  # not passed over in silence
        memes.load_data(options_for(cauldron, eval_file="dev_seen.jsonl"))
    (challenge / "train.jsonl").unlink()
    train_rows, eval_rows = memes.load_data(options_for(challenge, eval_only=True, eval_file="dev_unseen.jsonl"))
    assert (train_rows, len(eval_rows)) == (None, 2)  # an evaluation needs no training data
    assert len(memes.load_data(options_for(challenge, eval_only=True))[1]) == 4
    message = "holds no parquet files, and no folder saved by datasets, and no train.jsonl: give one that does"
    with pytest.raises(UserError, match=message):
        memes.load_data(options_for(challenge / "img"))


def evaluate_with(monkeypatch, rows, answers, folder):
    asked = {}

    def generate_answers(*args, candidates, **kwargs):
        asked["candidates"] = candidates
        return answers

    monkeypatch.setattr(memes, "generate_answers", generate_answers)
    return memes.evaluate(None, None, rows, argparse.Namespace(output_dir=folder), "eval_x"), asked


def test_accuracy_and_auroc(monkeypatch, challenge, tmp_path):
    """Labels no, yes, no, yes. Of the four pairs (yes, no), three are ranked right: AUROC 0.75."""
    rows = memes.load_data(options_for(challenge))[1]
    answers = [
        Generated(" no.", (0.3, 0.1)),  # P(yes) = 0.25
        Generated("Yes.", (0.1, 0.4)),  # 0.8
        Generated("maybe", (0.2, 0.3)),  # 0.6
        Generated("No", (0.5, 0.5)),  # 0.5
    ]
    totals, asked = evaluate_with(monkeypatch, rows, answers, tmp_path / "out")
    assert totals == {"accuracy": 0.5, "auroc": 0.75}
    assert list(asked["candidates"]) == ["No", "Yes"]
    stored = read_evaluation(tmp_path / "out", "eval_x")
    assert [one["probability_yes"] for one in stored["examples"]] == pytest.approx([0.25, 0.8, 0.6, 0.5])
    assert stored["num_examples"] == 4
    assert [one["id"] for one in stored["examples"]] == ["6", "7", "8", "9"]  # the challenge's own


def test_candidates_are_written_as_in_the_data(monkeypatch, cauldron, tmp_path):
    rows = memes.load_data(options_for(cauldron, eval_limit=2))[1]
    _, asked = evaluate_with(monkeypatch, rows, [Generated("x", (0.0, 0.0))] * 2, tmp_path)
    assert list(asked["candidates"]) == ["No.", "Yes."]


def test_one_class_has_no_auroc(monkeypatch, cauldron, tmp_path):
    rows = memes.load_data(options_for(cauldron, eval_limit=1))[1]
    totals, _ = evaluate_with(monkeypatch, rows, [Generated("no", (0.5, 0.5))], tmp_path)
    assert totals == {"accuracy": 1.0, "auroc": None}
    assert "only one class" in memes.in_words(totals)


def test_run(cauldron, tmp_path):
    """Two processes, LoRA: a short run to the end."""
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", cauldron, "--output_dir", tmp_path, "--num_crops", 1)
    options += ("--batch_size", 8, "--max_steps", 4, "--warmup_steps", 1, "--logging_steps", 1, "--eval_limit", 3)
    ended = run_script(
        "finetune_hf_trainer_hateful_memes.py",
        *options,
        "--use_lora",
        "--lora_rank",
        4,
        "--learning_rate",
        "1e-2",
        "--no-tqdm",
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert losses[-1] < losses[0]
    after = read_evaluation(tmp_path, "eval_after")
    assert after["num_examples"] == 3
    assert all(0 <= one["probability_yes"] <= 1 for one in after["examples"])
    assert f"accuracy {after['accuracy']:.4f}" in ended.stdout
    assert torch.isfinite(torch.tensor(losses)).all()


def test_run_that_leaves_bad_lines_out(challenge, tmp_path):
    """Of the challenge's own file: no JSON, and a picture that is missing; each told once, with file and line."""
    path = challenge / "train.jsonl"
    path.write_text("{broken\n" + path.read_text())
    (challenge / "img" / "00003.png").unlink()
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", challenge, "--output_dir", tmp_path / "out")
    options += ("--num_crops", 1, "--batch_size", 2, "--eval_limit", 1, "--use_lora", "--lora_rank", 4, "--no-tqdm")
    ended = run_script("finetune_hf_trainer_hateful_memes.py", *options)
    assert ended.returncode != 0
    assert f"  - {path}, line 1: no JSON in UTF-8" in ended.stdout
    assert (
        f"  - there are 1 examples of {path} whose images are missing: 3; see that the images lie below" in ended.stdout
    )
    skip = ("--bad_examples", "skip", "--max_bad_fraction", 0.5)
    ended = run_script("finetune_hf_trainer_hateful_memes.py", *options, *skip)
    assert ended.returncode == 0, ended.stdout[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / BAD_EXAMPLES).read_text().splitlines()]
    problems = {line["index"]: line["problem"] for line in lines}
    assert sorted(problems) == [0, 4]
    assert problems[0].startswith(f"{path}, line 1: no JSON in UTF-8")
    assert problems[4] == f"{path}, line 5: 3: its image is missing"
