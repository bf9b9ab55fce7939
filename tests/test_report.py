"""The report of runs in every state; its numbers against known ones; nothing from data gets out of its place."""

import argparse
import importlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from common import facts, report, training
from common.cli import Precision, make_parser, parse_options
from common.errors import UserError
from common.evaluation import Generated
from common.facts import published_row, run_facts
from common.report import estimate, estimate_gain, read_evaluation, read_log, read_run, render, save_pictures
from tests import report_runs, small_data
from tests.report_runs import HOSTILE, options_of, page, write_classes, write_documents, write_log, write_run
from tools import recipes
from tools import report as tool

ALL_PLOTS = report.QUANTITIES


@pytest.fixture(autouse=True)
def few_plots(monkeypatch):
    """Plots take most of the time of a page; one test has them all."""
    monkeypatch.setattr(report, "QUANTITIES", ALL_PLOTS[:1])


class Page(HTMLParser):
    """What a browser makes of the page's elements: texts, scripts, attributes; entities resolved."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.text = [], [], [], []
        self._script = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        self._script = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        (self.scripts if self._script is not None else self.text).append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def rendered(folder):
    return Page(render([folder], folder / "report.html"))


# --- the numbers


def test_interval_of_a_proportion(tmp_path):
    """400 of 1,000: mean +- 1.96 standard errors, 0.0155 each, is 0.3696 to 0.4304.

    2,000 resamples leave an end of the interval uncertain by about 0.0008 (standard error of a 2.5 % percentile of a
    normal distribution, 2.7 / sqrt(2000) standard deviations of 0.0155): 0.003 is three times that.
    """
    truth = ["yes"] * 1000
    write_classes(tmp_path, "before", ["no", "yes"], truth, ["yes"] * 400 + ["no"] * 600)
    found = estimate(read_evaluation(tmp_path / "eval_before.json"), "accuracy")
    assert found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(0.3696, abs=0.003)
    assert found.high == pytest.approx(0.4304, abs=0.003)
    assert found == estimate(read_evaluation(tmp_path / "eval_before.json"), "accuracy"), "the same every time"


def test_gain_is_resampled_in_pairs(tmp_path):
    """Every example gains the same: the gain's interval has no width, however wide those of the scores are."""
    examples = [{"id": str(number), "answers": ["x"], "generated": "x"} for number in range(200)]
    scores = np.random.RandomState(0).rand(200) / 2
    for name, more in (("before", 0.0), ("after", 0.25)):
        scored = [{**one, "overlap": score + more} for one, score in zip(examples, scores, strict=True)]
        scored = scored if name == "before" else scored[::-1]  # paired by id, not by place
        content = {"overlap": float(scores.mean()) + more, "num_examples": 200, "examples": scored}
        (tmp_path / f"eval_{name}.json").write_text(json.dumps(content))
    before, after = (read_evaluation(tmp_path / f"eval_{name}.json") for name in ("before", "after"))
    gain = estimate_gain(before, after, "overlap")
    assert gain == pytest.approx((0.25, 0.25, 0.25))
    assert estimate(after, "overlap").high - estimate(after, "overlap").low > 0.03


def test_gain_of_other_examples_has_no_interval(tmp_path):
    write_classes(tmp_path, "before", ["no", "yes"], ["yes"] * 20, ["yes"] * 5 + ["no"] * 15)
    write_classes(tmp_path, "after", ["no", "yes"], ["yes"] * 10, ["yes"] * 10)
    before, after = (read_evaluation(tmp_path / f"eval_{name}.json") for name in ("before", "after"))
    assert estimate_gain(before, after, "accuracy") == (0.75, None, None)


def test_auroc_of_resamples():
    """As scikit-learn computes it with weights; with ties, for the probabilities are rounded to a digit."""
    generator = np.random.default_rng(3)
    truth, probabilities = generator.random(60) < 0.4, generator.random(60).round(1)
    counts = generator.integers(4, size=(20, 60))
    expected = [roc_auc_score(truth, probabilities, sample_weight=row) for row in counts]
    assert report.weighted_auroc(truth, probabilities, counts) == pytest.approx(expected, abs=1e-12)
    alone = report.weighted_auroc(np.ones(5, dtype=bool), np.arange(5.0), np.ones((1, 5), dtype=int))
    assert np.isnan(alone).all(), "not defined for one class"


def test_smoothing():
    """A constant stays as it is from the first point on, also beside what is not finite."""
    assert report.smooth(np.array([2.0, np.nan, 2.0, np.inf, 2.0])) == pytest.approx([2.0] * 5)
    assert report.smooth(np.array([0.0, *[1.0] * 200]))[-1] > 0.99
    assert 0 < report.smooth(np.array([0.0, *[1.0] * 200]))[1] < 1


# --- one run


def test_groups_and_scores(tmp_path):
    found = rendered(write_run(tmp_path / "run"))
    data = found.data
    assert data["columns"] == ["before", "after"]
    # number % 4 of `write_run`: 0 wrong then right, 1 right then wrong, 2 wrong both times, 3 right both times
    assert [one["group"] for one in data["examples"]] == ["gained", "lost", "wrong", "right"] * 3
    first = data["examples"][0]
    assert (first["id"], first["answers"]) == ("test_0", ["1000", "1000.00"])
    assert first["given"] == [["nothing here", 0.0], ["1000", 1.0]]
    assert data["questions"][first["question"]] == "What is total 0?\nAnswer briefly."
    for label in ("gained 3", "lost 3", "still wrong 3", "right both times 3"):
        assert label in found.words
    assert "50.00" in found.words
    assert "may be chance" in found.words, "as many gained as lost"


def test_everything_of_a_run_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "QUANTITIES", ALL_PLOTS)
    folder = write_run(tmp_path / "run", steps=(50, 100))
    found = rendered(folder)
    names = (
        "loss",
        "learning_rate",
        "gradient_norm",
        "questions_per_second",
        "tokens_per_second",
        "memory",
        "data_wait",
    )
    for name in (*names, "score_anls"):
        with Image.open(folder / "plots" / f"{name}.png") as image:
            assert image.size == (690, 405)  # 4.6 x 2.7 inches of 150 dots
            assert len(image.convert("L").getcolors(256)) > 10, "not empty"
    assert found.tags.count("svg") == len(names) + 2  # two metrics while training
    for words in (
        "Learning rate",
        "2 min 55 s",
        "batch_size 8 given 16",
        "num_processes 1 derived",
        "left at their default",
    ):
        assert words in found.words, words
    for name in ("torch", "transformers"):
        assert facts.versions()[name] in found.words
    assert facts.commit() in found.words


def test_pictures_each_once(tmp_path):
    """Two questions about each page: 6 files and 6 thumbnails; a page larger than the limit is made smaller."""
    folder = write_run(tmp_path / "run")
    data = rendered(folder).data
    assert len(list((folder / "report_images").iterdir())) == len(data["pictures"]) == 6
    assert [one["images"] for one in data["examples"][:4]] == [[0], [0], [1], [1]]
    for picture in data["pictures"]:
        assert (folder / picture["href"]).is_file()
        assert picture["small"].startswith("data:image/webp;base64,")
    names = save_pictures(folder, [page(99, 2000, 3200), page(99, 2000, 3200), page(99, 3200, 2000)])
    assert names[0] == names[1] != names[2]
    with Image.open(folder / "report_images" / names[0]) as image:
        assert image.size == (1000, 1600)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def fail(image, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_pictures(tmp_path, [Image.new("RGB", (20, 30))])
    assert list((tmp_path / "report_images").iterdir()) == []


def test_pictures_of_a_later_evaluation_are_shown(tmp_path):
    """The first one was made with --no-report_images."""
    write_run(tmp_path)
    first = json.loads((tmp_path / "eval_before.json").read_text())
    for one in first["examples"]:
        one["images"] = []
    (tmp_path / "eval_before.json").write_text(json.dumps(first))
    both = [(name, read_evaluation(tmp_path / f"eval_{name}.json")) for name in ("before", "after")]
    assert all(one["images"] for one in report.compare_examples(both, "anls", report.GROUPS))


def test_evaluating_only_beside_a_run_leaves_its_report(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(training, "write_report", written.append)
    options = argparse.Namespace(eval_only=True, output_dir=tmp_path)
    evaluate = lambda options, name: {"name": name}  # noqa: E731
    assert training.once(evaluate, options, "eval_before") == {"name": "eval_only"}
    assert written == [options]
    (tmp_path / "run.json").touch()
    assert training.once(evaluate, options, "eval_before") == {"name": "eval_only"}
    assert written == [options]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_of_any_mode(tmp_path, mode):
    image = Image.new(mode, (20, 30))
    (name,) = save_pictures(tmp_path, [image])
    with Image.open(tmp_path / "report_images" / name) as saved:
        assert (saved.mode, saved.size) == ("RGB", (20, 30))
    assert image.mode == mode, "the model's picture is left as it is"


def test_thumbnails_keep_to_their_budget(tmp_path):
    names = save_pictures(tmp_path, [page(number) for number in range(40)])
    files = {name: tmp_path / "report_images" / name for name in names}
    large = report.thumbnails(files)
    small = report.thumbnails(files, budget=sum(map(len, large.values())) // 3)
    assert len(large) == len(small) == 40
    assert sum(map(len, small.values())) <= sum(map(len, large.values())) / 3
    some = report.thumbnails(files, budget=5000)
    assert 0 < len(some) < 40
    assert sum(map(len, some.values())) <= 5000


def test_no_picture_from_elsewhere(tmp_path):
    """Names that are none of `save_pictures`, as a path out of the folder, are passed over."""
    folder = write_run(tmp_path / "run", pictures=False)
    content = json.loads((folder / "eval_after.json").read_text())
    secret = tmp_path / "secret.jpg"
    page(1).save(secret)
    for one, name in zip(
        content["examples"], ["../../secret.jpg", str(secret), 7, None, "0" * 32 + ".jpg"] * 3, strict=False
    ):
        one["images"] = [name]
    (folder / "eval_after.json").write_text(json.dumps(content))
    assert rendered(folder).data["pictures"] == []


# --- as the scripts write it


def answering(script, texts):
    return mock.patch.object(script, "generate_answers", return_value=[Generated(text) for text in texts])


def test_docvqa_as_its_script_writes_it(tmp_path):
    script = importlib.import_module("finetune_hf_trainer_docvqa")
    mini, _ = small_data.write_docvqa_pages(tmp_path / "data")
    options = options_of(tmp_path / "run", "--data_dir", str(mini), "--eval_limit", "4")
    for name, default in (("train_data", None), ("eval_data", None), ("eval_split", "test")):
        setattr(options, name, default)
    options.eval_only = True
    _, rows = script.load_data(options)
    truth = [row["answers"][0] for row in rows.without_images()]
    for name, texts in (("eval_before", ["?"] * len(truth)), ("eval_after", truth)):
        with answering(script, texts):
            script.evaluate(None, None, rows, options, name)
    data = rendered(tmp_path / "run").data
    assert {one["group"] for one in data["examples"]} == {"gained"}
    assert [one["answers"][0] for one in data["examples"]] == truth
    assert all(data["questions"][one["question"]] for one in data["examples"])


def test_classes_as_the_script_writes_them(tmp_path):
    script = importlib.import_module("finetune_hf_trainer_ucf101")
    records = [
        {"id": f"test-{number:010}", "conversations": [{"images": [], "user": "Classify it.", "assistant": label}]}
        for number, label in enumerate(["Archery", "Archery", "Bowling", "Diving"])
    ]
    data = report_runs.conversations_of(tmp_path, records)
    options, classes = options_of(tmp_path / "run"), ["Archery", "Bowling", "Diving"]
    answers = {
        "eval_before": ["Bowling", "a dog", "Bowling", "Bowling"],
        "eval_after": ["archery.", "Diving", "Bowling", "Diving"],
    }
    for name, texts in answers.items():
        with answering(script, texts):
            script.evaluate(None, None, data, classes, options, name)
    found = rendered(tmp_path / "run")
    stored = [json.loads((tmp_path / "run" / f"{name}.json").read_text())["confusion"] for name in answers]
    runs = read_run(tmp_path / "run")
    columns = list(runs.evaluations.items())
    examples = report.compare_examples(columns, "accuracy", report.GROUPS)
    confusion = report.confusions(columns, examples)
    assert [matrix["rows"] for matrix in confusion["matrices"]] == [
        one["rows_true_columns_predicted"] for one in stored
    ]
    assert confusion["labels"] == stored[0]["labels"]
    assert confusion["matrices"][1]["accuracies"][:3] == [0.5, 1.0, 1.0]
    assert [(one["label"], one["said"]) for one in found.data["examples"]] == [
        (0, [1, 0]),
        (0, [3, 2]),
        (1, [1, 1]),
        (2, [1, 2]),
    ]
    assert "Archery 2 0.0 % 50.0 %" in found.words


def test_memes_as_the_script_writes_them(tmp_path):
    """Yes and no make a confusion matrix too; AUROC has an interval."""
    script = importlib.import_module("finetune_hf_trainer_hateful_memes")
    folder = small_data.write_hateful_memes(tmp_path / "data")
    options = options_of(tmp_path / "run", "--data_dir", str(folder), "--eval_limit", "40")
    options.eval_file = None
    _, rows = script.load_data(options)
    generator = random.Random(0)
    given = [Generated(generator.choice(["Yes.", "No."]), (1 - p, p)) for p in (generator.random() for _ in range(40))]
    with mock.patch.object(script, "generate_answers", return_value=given):
        totals = script.evaluate(None, None, rows, options, "eval_only")
    found = rendered(tmp_path / "run")
    area = estimate(read_evaluation(tmp_path / "run" / "eval_only.json"), "auroc")
    assert area.value == totals["auroc"]
    assert area.low < area.value < area.high
    assert found.data["labels"] == ["No.", "Yes.", "(other)"]
    assert {one["group"] for one in found.data["examples"]} == {"right", "wrong"}


def test_a_new_task_of_its_own_metric(tmp_path):
    """A score of another name, above 1, is shown as it is."""
    examples = [{"id": str(n), "answers": ["1"], "generated": "1", "points": 4.0 + n % 2} for n in range(50)]
    (tmp_path / "eval_only.json").write_text(json.dumps({"points": 4.5, "num_examples": 50, "examples": examples}))
    words = rendered(tmp_path).words
    assert "Points 4.5" in words
    assert re.search(r"4\.\d+ to 4\.\d+", words)


# --- partial and damaged folders


PARTS = ["eval_before.json", "eval_after.json", "train_log.jsonl", "run_facts.json", "report_images"]


@pytest.mark.parametrize(
    "kept", [[part] for part in PARTS[:3]] + [[one for one in PARTS if one != part] for part in PARTS]
)
def test_partial_folders(tmp_path, kept):
    folder = write_run(tmp_path / "run")
    for path in folder.iterdir():
        if path.name not in kept:
            path.rename(tmp_path / path.name)
    found = rendered(folder)
    assert ("Loss" in found.words) == ("train_log.jsonl" in kept)
    evaluated = [name for name in ("before", "after") if f"eval_{name}.json" in kept]
    assert ('data-group="gained"' in (folder / "report.html").read_text()) == (len(evaluated) == 2)
    if evaluated:
        assert found.data["columns"] == evaluated
        assert bool(found.data["pictures"]) == ("report_images" in kept)


def test_steps_alone(tmp_path):
    """A run that was stopped, which has evaluated while training only."""
    write_documents(tmp_path, "step_10", report_runs.document_examples(tmp_path, 4), ["1000"] * 4)
    write_log(tmp_path, finished=False)
    assert "ANLS while training" in rendered(tmp_path).words


def test_options_of_an_older_run(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "run_facts.json").unlink()
    (folder / "run.json").write_text(json.dumps({"script": "finetune_hf_trainer_docvqa.py", "batch_size": 24}))
    assert "batch_size 24 recorded" in rendered(folder).words


def test_a_loss_that_is_not_finite(tmp_path):
    write_run(tmp_path / "run")
    with open(tmp_path / "run" / "train_log.jsonl", "a") as file:
        file.write('{"step": 201, "loss": NaN, "grad_norm": Infinity, "learning_rate": 0.0}\n')
    assert "nan last loss" in rendered(tmp_path / "run").words


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no run: there is no eval_\*\.json and no train_log\.jsonl"):
        render([tmp_path], tmp_path / "report.html")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"anls": 1}', '{"examples": [1]}', "[" * 100_000])
@pytest.mark.parametrize("name", ["eval_before.json", "run_facts.json"])
def test_damaged_files_are_named(tmp_path, name, content):
    folder = write_run(tmp_path / "run", pictures=False)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        rendered(folder)


def test_damaged_log(tmp_path):
    write_log(tmp_path)
    lines = read_log(tmp_path / "train_log.jsonl")
    path = tmp_path / "train_log.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 999, "lo')
    assert read_log(path) == lines, "a line that is being written"
    path.write_text(whole + json.dumps({"step": 10, "loss": 7.0}) + "\n")
    assert [line["loss"] for line in read_log(path) if line["step"] == 10] == [7.0], "resumed: the later line counts"
    path.write_text(whole.replace('{"step": 20,', '{"step": ,'))
    with pytest.raises(UserError, match="line 3 is damaged"):
        read_log(path)


def test_damaged_picture(tmp_path):
    folder = write_run(tmp_path / "run")
    broken = next((folder / "report_images").iterdir())
    broken.write_bytes(b"no picture")
    with pytest.raises(UserError, match=re.escape(str(broken))):
        rendered(folder)


def test_a_run_does_not_fail_for_its_report(tmp_path, capsys):
    options = options_of(write_run(tmp_path / "run"))
    report.write_report(options)
    assert (tmp_path / "run" / "report.html").is_file()
    (tmp_path / "run" / "eval_after.json").write_text("{")
    report.write_report(options)
    said = capsys.readouterr().out
    assert f"report: {tmp_path / 'run' / 'report.html'}" in said
    assert "no report.html was written" in said
    assert str(tmp_path / "run" / "eval_after.json") in said


# --- nothing gets out of its place


def test_text_is_escaped(tmp_path):
    folder = tmp_path / "run <b>&"
    write_run(folder, pictures=False)
    hostile = [
        {"id": HOSTILE, "question": HOSTILE, "answers": [HOSTILE]},
        {"id": "\ud800", "question": "", "answers": ["a"]},
    ]
    write_documents(folder, "before", hostile[:1], [HOSTILE])
    content = json.loads((folder / "eval_before.json").read_text())
    content["examples"].append({**hostile[1], "generated": "\ud800", "anls": 0.0, "anls_recipe": 0.0})
    content[HOSTILE] = 0.5
    for name in ("before", "after"):
        (folder / f"eval_{name}.json").write_text(json.dumps(content))
    stored = json.loads((folder / "run_facts.json").read_text())
    stored["options"].append({"name": HOSTILE, "value": HOSTILE, "default": None, "origin": HOSTILE})
    stored |= {"commit": HOSTILE, "command": HOSTILE, "script": HOSTILE}
    stored |= {"versions": {HOSTILE: HOSTILE}, "data": {HOSTILE: {"source": HOSTILE, "fingerprint": HOSTILE}}}
    (folder / "run_facts.json").write_text(json.dumps(stored))
    found = rendered(folder)
    assert found.tags.count("script") == 2, "the data and the page's own"
    assert found.tags.count("img") == 1, "the enlarged picture"
    assert not any(name.startswith("on") for attributes in found.attributes for name in attributes)
    one = found.data["examples"][0]
    assert [one["id"], *one["answers"], one["given"][0][0], found.data["questions"][0]] == [HOSTILE] * 4
    assert found.words.count(" ".join(HOSTILE.split())) >= 8
    compared = Page(render([folder, write_run(tmp_path / "other")], tmp_path / "comparison.html"))
    assert compared.tags.count("script") == 2


def test_page_asks_for_nothing(tmp_path):
    """No element but links to the plots names another file, and the policy forbids what would be fetched."""
    path = render([write_run(tmp_path / "run")], tmp_path / "run" / "report.html")
    found = Page(path)
    links = {value for attributes in found.attributes for name, value in attributes.items() if name in ("href", "src")}
    assert {link for link in links if not link.startswith(("#", "plots/"))} == set()
    assert "http" not in path.read_text().replace("http-equiv", "").replace("http://www.w3.org/", "")
    assert any("default-src 'none'" in attributes.get("content", "") for attributes in found.attributes)


# --- several runs


def test_comparison(tmp_path):
    first, second = write_run(tmp_path / "one", seed=1), write_run(tmp_path / "two", seed=2)
    examples = report_runs.document_examples(second, 12)
    write_documents(second, "after", examples, [one["answers"][0] for one in examples])
    stored = json.loads((second / "run_facts.json").read_text())
    next(one for one in stored["options"] if one["name"] == "batch_size")["value"] = 32
    (second / "run_facts.json").write_text(json.dumps(stored))
    tool.main([str(first), str(second)])
    found = Page(first / "report_comparison.html")
    assert found.data["columns"] == ["one", "two"]
    assert [one["group"] for one in found.data["examples"]] == ["right", "differ", "differ", "right"] * 3
    assert "batch_size 8 32" in found.words
    assert "learning_rate" not in found.words.partition("Options that differ")[2]
    assert "+50.00" in found.words
    assert all((first / picture["href"]).is_file() for picture in found.data["pictures"])
    tool.main([str(second), "--output", str(tmp_path / "pages" / "two.html")])
    there = Page(tmp_path / "pages" / "two.html")
    assert all((tmp_path / "pages" / picture["href"]).is_file() for picture in there.data["pictures"])
    assert (tmp_path / "pages" / "plots" / "loss.png").is_file()


def test_other_examples_of_the_same_ids_are_not_paired(tmp_path):
    """Data sets are numbered alike; of the second run's examples some differ in one thing each."""
    first, second = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    examples = report_runs.document_examples(second, 11)
    examples[2]["question"] = "What is asked of another page?"
    examples[4]["answers"] = ["7"]
    examples[6]["images"] = save_pictures(second, [Image.new("RGB", (30, 20))])
    examples[8]["images"] = []  # as with --no-report_images
    write_documents(second, "after", examples, ["x"] * 11)
    found = Page(render([first, second], tmp_path / "page.html"))
    alone = [number for number, one in enumerate(found.data["examples"]) if one["given"][0] is None]
    assert alone == [2, 4, 6]
    assert "Over 12 examples in one; two over 11, of which one has 8; ranges" in found.words
    before, after = (read_run(folder).last for folder in (first, second))
    assert estimate_gain(before, after, "anls")[1:] == (None, None)
    write_documents(second, "after", report_runs.document_examples(second, 12), ["x"] * 12)
    assert "Over 12 examples; ranges" in Page(render([first, second], tmp_path / "page.html")).words


def test_runs_in_folders_of_the_same_name(tmp_path):
    folders = [write_run(tmp_path / name / "output", pictures=False) for name in "ab"]
    data = Page(render(folders, tmp_path / "page.html")).data
    assert data["columns"] == [str(folder) for folder in folders]


def test_missing_folders_are_all_named(tmp_path):
    with pytest.raises(UserError, match=r"2 problems:(?s:.*)nowhere(?s:.*)gone"):
        tool.main([str(tmp_path / "nowhere"), str(tmp_path / "gone")])


# --- facts


def test_origins_of_options(tmp_path):
    options = options_of(tmp_path, "--use_qlora", "--seed", "0", "--no-tqdm")
    options.stopping, options.resume_from = object(), None  # as `start` adds them, which are no options
    found = {one["name"]: one for one in run_facts(options, {})["options"]}
    assert found["use_qlora"]["origin"] == found["seed"]["origin"] == found["tqdm"]["origin"] == "given"
    assert found["use_lora"] == {"name": "use_lora", "value": True, "default": False, "origin": "derived"}
    assert found["batch_size"] == {"name": "batch_size", "value": 16, "default": 16, "origin": "default"}
    assert found["precision"]["value"] == "fp32"
    assert found["method"] == {"name": "method", "value": "qlora", "default": None, "origin": "derived"}
    assert {"given", "stopping", "resume_from"}.isdisjoint(found)


def test_output_folder_left_at_its_default():
    parser = make_parser("A test.")
    with mock.patch("sys.argv", ["script.py", "--overwrite"]):
        options = parse_options(parser)
    found = {one["name"]: one for one in run_facts(options, {})["options"]}
    assert found["output_dir"] == {"name": "output_dir", "value": "output", "default": "output", "origin": "default"}


def test_data_are_told(tmp_path):
    rows = report_runs.rows_of(small_data.write_docvqa_pages(tmp_path)[0], "train")
    record = {"id": "1", "conversations": [{"images": [], "user": "a", "assistant": "b"}]}
    lines = report_runs.conversations_of(tmp_path, [record])
    data = facts.describe_data({"train": rows, "evaluation": lines, "nothing": None})
    found = run_facts(options_of(tmp_path), data)["data"]
    assert list(found) == ["train", "evaluation"]
    assert found["train"]["source"].endswith("mini/data, split train")
    assert found["train"]["fingerprint"].startswith("12 rows, ")
    assert found["evaluation"]["source"] == str(tmp_path / "data.jsonl")
    assert found["evaluation"]["fingerprint"].startswith("1 rows, ")


def on_gpu(options, precision="bf16"):
    options.device, options.precision = "cuda", Precision(precision, None, None)
    return options


@pytest.mark.parametrize("name", [row.name for table in recipes.load_tables() for row in table.recipes if row.score])
def test_published_rows_are_found(tmp_path, name):
    """By the very command that `tools.recipes` shows for each row."""
    table, row = recipes.find(name)
    script, *words = recipes.script_command(table, row)
    words = [word for word in words if word != "--use_flash_attention"]  # refused without a GPU
    options = on_gpu(options_of(tmp_path, *words, "--output_dir", str(tmp_path), script=script), row.precision)
    found = published_row(options, table.task)
    assert found == {"name": name, "score": row.score, "metric": table.metric, "decimals": table.decimals}
    assert published_row(options, "ucf101") is None


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--seed", "7", "--num_workers", "0"], True),
        (["--max_steps", "10"], False),
        (["--eval_limit", "100"], False),
        (["--data_dir", "."], False),
        (["--learning_rate", "1.1e-5"], False),
        (["--batch_size", "32"], False),
    ],
)
def test_what_repeats_a_row(tmp_path, words, found):
    table, row = recipes.find("NLVR2-full")
    script, *own = recipes.script_command(table, row)
    own = [word for word in own if word != "--use_flash_attention"]
    options = on_gpu(options_of(tmp_path, *own, *words, "--output_dir", str(tmp_path), script=script))
    assert (published_row(options, "nlvr2") is not None) == found
    options.device = "cpu"
    assert published_row(options, "nlvr2") is None


def test_published_score_on_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    stored = json.loads((folder / "run_facts.json").read_text())
    stored["published"] = {"name": "DocVQA-full-bf16", "metric": "anls_recipe", "score": 83.65, "decimals": 2}
    (folder / "run_facts.json").write_text(json.dumps(stored))
    assert "published, DocVQA-full-bf16 83.65" in rendered(folder).words
