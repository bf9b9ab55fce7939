"""NLVR2: both layouts, questions as turns or apart, missing images, and a short run as a user starts it."""

import argparse
import json

import datasets
import numpy as np
import pytest
from PIL import Image

import finetune_hf_trainer_nlvr2 as nlvr2
from common.cli import BAD_EXAMPLES
from common.data import number_questions
from common.demo import CHECKPOINT
from common.errors import UserError
from common.evaluation import Generated
from tests.launch import read_evaluation, read_log, run_script


def picture(seed):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (24, 32, 3), dtype=np.uint8))


def options_for(folder, **values):
    options = {"data_dir": str(folder), "eval_file": None, "eval_limit": None, "eval_only": False}
    options |= {"separate_questions": False, "share_images": False, "skip_missing": False, "bad_examples": "stop"}
    return argparse.Namespace(**{**options, **values})


@pytest.fixture(scope="module")
def cauldron(tmp_path_factory):
    """A local copy in the_cauldron's layout: 500 rows to evaluate on and 12 to train on, of 1 to 3 questions."""
    folder = tmp_path_factory.mktemp("the_cauldron") / "nlvr2"
    text = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    rows = [
        {
            "images": [picture(2 * k), picture(2 * k + 1)],
            "texts": [
                {"user": f"Q{k}.{q}", "assistant": ("No.", "Yes.")[(k + q) % 2], "source": "nlvr2"}
                for q in range(1 + k % 3)
            ],
        }
        for k in range(512)
    ]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(text)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(params=["images", "."])
def original(tmp_path, request):
    """The original files: two training pairs in numbered sub-folders, one of three sentences; a dev and a test pair."""
    root = tmp_path / request.param
    records = {"train": [], "dev": [], "test1": []}
    pairs = (("train", "train-10-0", 3, 57), ("train", "train-11-1", 1, 58), ("dev", "dev-850-0", 2, None))
    pairs += (("test1", "test1-0-1", 1, None),)
    for number, (split, pair, sentences, directory) in enumerate(pairs):
        folder = root / split / str(directory) if directory else root / split
        folder.mkdir(parents=True)
        for side in (0, 1):
            # JPEG content under a PNG's name, and a JPEG's name: both occur
            ending = ".png" if side else ".jpg"
            with open(folder / f"{pair}-img{side}{ending}", "wb") as file:
                picture(2 * number + side).save(file, "JPEG")
        for sentence in range(sentences):
            record = {
                "identifier": f"{pair}-{sentence}",
                "sentence": f"S {pair} {sentence}.",
                "label": ("True", "False")[sentence % 2],
            }
            records[split].append(record | ({"directory": directory} if directory else {}))
    for split, lines in records.items():
        (tmp_path / f"{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_cauldron_is_split_as_published(cauldron):
    train_rows, eval_rows = nlvr2.load_data(options_for(cauldron))
    assert (len(train_rows), len(eval_rows)) == (12, 500)
    assert eval_rows[499]["texts"][0]["user"] == "Q499.0"


def test_further_questions_are_further_turns(cauldron):
    train_rows, _ = nlvr2.load_data(options_for(cauldron))
    numbers = number_questions(train_rows, each=False)
    assert len(numbers) == 12
    turns = nlvr2.make_example(train_rows, numbers, 0).turns  # row 500: 500 % 3 = 2, so three questions
    assert [turn.user for turn in turns] == ["<|image_1|><|image_2|>\nQ500.0", "Q500.1", "Q500.2"]
    assert [turn.assistant for turn in turns] == ["No.", "Yes.", "No."]
    assert [len(turn.images) for turn in turns] == [2, 0, 0]
    for image, seed in zip(turns[0].images, (1000, 1001), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(picture(seed)))


def test_separate_questions(cauldron):
    options = options_for(cauldron, separate_questions=True)
    train_rows, _ = nlvr2.load_data(options)
    numbers = number_questions(train_rows, each=True)
    assert len(numbers) == sum(1 + k % 3 for k in range(500, 512))
    users = [nlvr2.make_example(train_rows, numbers, index).turns for index in range(3)]
    assert [[turn.user for turn in turns] for turns in users] == [
        [f"<|image_1|><|image_2|>\nQ500.{number}"] for number in range(3)
    ]


def test_original_files(original):
    train_rows, eval_rows = nlvr2.load_data(options_for(original))
    assert (len(train_rows), len(eval_rows)) == (2, 2)  # pairs to train on, sentences to evaluate on
    turns = nlvr2.make_example(train_rows, [(0, None)], 0).turns
    assert [turn.user for turn in turns] == [
        "<|image_1|><|image_2|>\nS train-10-0 0. Is this statement true? Answer yes or no.",
        "S train-10-0 1. Is this statement true? Answer yes or no.",
        "S train-10-0 2. Is this statement true? Answer yes or no.",
    ]
    assert [turn.assistant for turn in turns] == ["Yes", "No", "Yes"]
    assert [image.size for image in turns[0].images] == [(32, 24)] * 2


def test_every_sentence_of_the_original_files_is_evaluated(original, monkeypatch, tmp_path):
    """Each is an example with its own identifier; the_cauldron's rows, as published, are asked their first question."""
    _, eval_rows = nlvr2.load_data(options_for(original))
    asked = []

    def generate_answers(model, processor, count, make_example, options, title, pictures):
        assert len(pictures) == count
        asked.extend(make_example(index).turns for index in range(count))
        return [Generated("Yes"), Generated("yes.")]

    monkeypatch.setattr(nlvr2, "generate_answers", generate_answers)
    totals = nlvr2.evaluate(None, None, eval_rows, argparse.Namespace(output_dir=tmp_path / "out"), "eval_x")
    assert [turns[0].user.split(" Is")[0] for turns in asked] == [
        f"<|image_1|><|image_2|>\nS dev-850-0 {sentence}." for sentence in (0, 1)
    ]
    assert [len(turns) for turns in asked] == [1, 1]
    assert totals == {"accuracy": 0.5}
    examples = read_evaluation(tmp_path / "out", "eval_x")["examples"]
    assert [one["id"] for one in examples] == ["dev-850-0-0", "dev-850-0-1"]
    assert [(one["answers"], one["correct"]) for one in examples] == [(["Yes"], 1.0), (["No"], 0.0)]


def test_another_file_to_evaluate_on(original, cauldron):
    """The identifiers tell the folder of the pictures, so the balanced subsets of the original repository work too."""
    test1 = nlvr2.load_data(options_for(original, eval_file="test1.json"))[1]
    assert [row["id"] for row in test1.without_images()] == ["test1-0-1-0"]
    (original / "balanced_dev.json").write_text((original / "dev.json").read_text().splitlines()[1] + "\n")
    (original / "train.json").unlink()
    train_rows, rows = nlvr2.load_data(options_for(original, eval_file="balanced_dev.json", eval_only=True))
    assert (train_rows, [row["id"] for row in rows.without_images()]) == (None, ["dev-850-0-1"])
    assert nlvr2.make_example(rows, [(0, 0)], 0).turns[0].images[0].size == (32, 24)
    assert len(nlvr2.load_data(options_for(original, eval_only=True))[1]) == 2
    with pytest.raises(UserError, match=r"dev.json cannot be read: No such file"):  # not passed over in silence
        nlvr2.load_data(options_for(cauldron, eval_file="dev.json"))


def test_missing_image(original, capsys):
    for file in original.rglob("train-11-1-img1.png"):
        file.unlink()
    with pytest.raises(UserError, match=r"1 examples of .*/train.json whose .*: train-11-1-0; .*add --skip_missing"):
        nlvr2.load_data(options_for(original))
    (original / "images" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no folder saved by datasets, and no train.json: give one that does"):
        nlvr2.load_data(options_for(original / "images" / "empty"))
    train_rows, _ = nlvr2.load_data(options_for(original, skip_missing=True))
    assert len(train_rows) == 1
    assert "left out 1 examples of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"identifier": "a-0-0", "sentence": "S", "label": "Maybe"}, "line 1: needs identifier, sentence and label"),
        ({"identifier": "a-0-0", "label": "True"}, "line 1: needs identifier, sentence and label"),
        ({"identifier": "../../x-0", "sentence": "S", "label": "True"}, "line 1: the path .* leaves the folder"),
    ],
)
def test_faults_in_the_original_files(original, record, message):
    (original / "dev.json").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        nlvr2.load_data(options_for(original))


def test_run(cauldron, tmp_path):
    """Two processes with two examples at once, full fine-tuning: a short run to the end."""
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", cauldron, "--output_dir", tmp_path, "--num_crops", 1)
    options += ("--batch_size", 8, "--batch_size_per_gpu", 2, "--max_steps", 3, "--warmup_steps", 1, "--eval_limit", 3)
    ended = run_script(
        "finetune_hf_trainer_nlvr2.py", *options, "--logging_steps", 1, "--learning_rate", "1e-3", "--no-tqdm"
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert losses[-1] < losses[0]
    after = read_evaluation(tmp_path, "eval_after")
    assert after["num_examples"] == 3
    assert [one["question"] for one in after["examples"]] == ["Q0.0", "Q1.0", "Q2.0"]


def test_shared_pairs_train_as_separate_questions(cauldron, tmp_path):
    """Two epochs of one step with all 24 questions about 12 pairs; 1e-5 relative, float32 sums in another order."""
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", cauldron, "--num_crops", 1, "--num_train_epochs", 2)
    options += ("--batch_size", 24, "--warmup_steps", 0, "--eval_limit", 1, "--logging_steps", 1, "--no-tqdm")
    logs = []
    for name, how in (("apart", ("--separate_questions",)), ("shared", ("--share_images",))):
        run = (*options, *how, "--batch_size_per_gpu", 4, "--learning_rate", "1e-3", "--output_dir", tmp_path / name)
        ended = run_script("finetune_hf_trainer_nlvr2.py", *run, processes=0)
        assert ended.returncode == 0, ended.stdout[-3000:]
        logs.append([line["loss"] for line in read_log(tmp_path / name)])
    assert "24 examples about 12 pictures in an epoch" in ended.stdout
    assert len(logs[0]) == 2
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


@pytest.mark.parametrize("share", [(), ("--share_images",)])
def test_run_that_leaves_bad_lines_out(original, tmp_path, share):
    """Of the original file: no JSON, and a pair without its second picture; also where sentences share their pair."""
    path = original / "train.json"
    path.write_text("{broken\n" + path.read_text())
    for file in original.rglob("train-11-1-img1.png"):
        file.unlink()
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", original, "--output_dir", tmp_path / "out")
    options += ("--num_crops", 1, "--batch_size", 2, "--eval_limit", 1, "--use_lora", "--lora_rank", 4, "--no-tqdm")
    skip = ("--bad_examples", "skip", "--max_bad_fraction", 0.7)
    ended = run_script("finetune_hf_trainer_nlvr2.py", *options, *share, *skip)
    assert ended.returncode == 0, ended.stdout[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / BAD_EXAMPLES).read_text().splitlines()]
    broken, missing = sorted((line["problem"] for line in lines), key=lambda problem: "missing" in problem)
    assert broken.startswith(f"{path}, line 1: no JSON in UTF-8")
    assert missing.endswith(": train-11-1-0: its image is missing")
