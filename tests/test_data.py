"""Reading rows: every layout and every way to store it; each fault an error that names its place."""

import errno
import io
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import finetune_hf_trainer_docvqa as docvqa
from common.collation import Example, Turn
from common.data import (
    ExampleDataset,
    ExampleKey,
    ImageFinder,
    check_answers,
    decode_image,
    fingerprint,
    gather_in_order,
    load_rows,
    number_pictures,
    number_questions,
    open_header,
    open_pixels,
    opening_images_by,
    path_inside,
    report_missing,
    rows_of_file,
    rows_of_records,
)
from common.errors import UserError


def picture(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def mini(count):
    """Rows as in nielsr/docvqa_1200_examples."""
    return datasets.Dataset.from_list(
        [
            {
                "id": f"row_{k}",
                "image": picture(k),
                "query": {"en": f"What is {k}?", "de": "?"},
                "answers": [str(k), "x"],
            }
            for k in range(count)
        ],
        features=datasets.Features(
            {
                "id": datasets.Value("string"),
                "image": datasets.Image(),
                "query": {"en": datasets.Value("string"), "de": datasets.Value("string")},
                "answers": datasets.List(datasets.Value("string")),
            }
        ),
    )


def cauldron(questions_per_page):
    """Rows as in HuggingFaceM4/the_cauldron."""
    text = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    return datasets.Dataset.from_list(
        [
            {
                "images": [picture(k)],
                "texts": [{"user": f"Q{k}.{q}", "assistant": f"A{k}.{q}", "source": "docvqa"} for q in range(count)],
            }
            for k, count in enumerate(questions_per_page)
        ],
        features=datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(text)}),
    )


def official(count):
    """Rows as in lmms-lab/DocVQA."""
    return datasets.Dataset.from_list(
        [
            {"questionId": str(k), "image": picture(k), "question": f"Which {k}?", "answers": ["a"]}
            for k in range(count)
        ],
        features=datasets.Features(
            {
                "questionId": datasets.Value("string"),
                "image": datasets.Image(),
                "question": datasets.Value("string"),
                "answers": datasets.List(datasets.Value("string")),
            }
        ),
    )


def load(folder, split="train"):
    return load_rows(str(folder), split, docvqa.LAYOUTS, "--train_data")


def page(rows, index):
    return docvqa.ask(rows, index, "?").turns[0].images[0]


@pytest.mark.parametrize("table", [mini(3), cauldron([1, 3]), official(2)], ids=["mini", "cauldron", "official"])
@pytest.mark.parametrize("storage", ["parquet_folder", "parquet_file", "hub_folder", "saved", "saved_dict"])
def test_every_layout_in_every_storage(tmp_path, table, storage):
    folder = tmp_path / "copy"
    if storage == "parquet_folder":
        table.to_parquet(folder / "train-00000-of-00001.parquet")
    elif storage == "parquet_file":
        folder = tmp_path / "anything.parquet"
        table.to_parquet(folder)
    elif storage == "hub_folder":  # a cloned hub repository: the configuration is a folder
        table.to_parquet(folder / "docvqa" / "train-00000-of-00002.parquet")
    elif storage == "saved":
        table.save_to_disk(folder)
    else:
        datasets.DatasetDict({"train": table}).save_to_disk(folder)
    rows = load(folder)
    assert len(rows) == len(table)
    for index in range(len(rows)):
        expected = table[index]
        assert docvqa.questions(rows[index]) == docvqa.questions(expected)
        original = expected["images"][0] if "images" in expected else expected["image"]
        assert np.array_equal(np.asarray(page(rows, index)), np.asarray(original))


def test_prompts_of_the_layouts():
    # shared/recipe: the mini set and the official one ask for a brief answer, the_cauldron's text is taken as it is
    assert docvqa.questions(mini(1)[0]) == [("What is 0?\nAnswer briefly.", ["0", "x"])]
    assert docvqa.questions(official(1)[0]) == [("Which 0?\nAnswer briefly.", ["a"])]
    assert docvqa.questions(cauldron([2])[0]) == [("Q0.0", ["A0.0"]), ("Q0.1", ["A0.1"])]


def test_splits_are_told_by_file_names(tmp_path):
    mini(4).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    mini(2).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert (len(load(tmp_path, "train")), len(load(tmp_path, "test"))) == (4, 2)
    with pytest.raises(
        UserError, match=r"has the splits \['test', 'train'\], not validation: give a copy that has it$"
    ):
        load(tmp_path, "validation")


@pytest.mark.parametrize("storage", ["parquet", "saved"])
def test_one_source_for_both_must_tell_its_split(tmp_path, storage):
    """Else a run would train on the rows it is evaluated on, and report a gain."""
    if storage == "parquet":
        mini(2).to_parquet(tmp_path / "rows.parquet")
    else:
        mini(2).save_to_disk(tmp_path)
    assert len(load(tmp_path)) == 2  # named by --train_data
    with pytest.raises(UserError, match=r"--data_dir .* does not tell which split it is: call its file train.parquet"):
        load_rows(str(tmp_path), "train", docvqa.LAYOUTS, "--data_dir")


def test_several_data_sets_in_one_folder(tmp_path):
    for name in ("DocVQA", "InfographicVQA"):
        official(2).to_parquet(tmp_path / name / "validation-00000-of-00001.parquet")
    with pytest.raises(UserError, match=rf"holds several data sets: give one of their folders, {tmp_path}/DocVQA, "):
        load(tmp_path, "validation")
    assert len(load(tmp_path / "DocVQA", "validation")) == 2


@pytest.mark.parametrize("answers", [[], [""], None])
def test_row_without_answers(tmp_path, answers):
    rows = [{**row, "answers": answers if k == 1 else ["a"]} for k, row in enumerate(mini(3))]
    datasets.Dataset.from_list(rows, features=mini(1).features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="split train, row 1 has no answer: leave it out"):
        check_answers(load(tmp_path), docvqa.questions, advice="leave it out")
    check_answers(load(tmp_path).select([0, 2]), docvqa.questions, advice="leave it out")


def test_unknown_columns(tmp_path):
    datasets.Dataset.from_dict({"picture": [1], "text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"has the columns \['picture', 'text'\]; --train_data needs image\+query"):
        load(tmp_path)


def test_no_rows(tmp_path):
    mini(1).select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="split train, is empty"):
        load(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_cache_without_room(tmp_path, monkeypatch, wrapped):
    """It is not the files that are at fault."""
    mini(1).to_parquet(tmp_path / "train.parquet")

    def fails(files):
        full = OSError(errno.ENOSPC, "No space left on device")
        if wrapped:
            raise datasets.exceptions.DatasetGenerationError from full
        raise full

    monkeypatch.setattr(datasets.Dataset, "from_parquet", fails)
    cache = re.escape(str(datasets.config.HF_DATASETS_CACHE))
    with pytest.raises(UserError, match=rf"train.parquet does not fit on the disk of {cache}, where a copy is made"):
        load(tmp_path)


def test_folder_without_data(tmp_path):
    with pytest.raises(UserError, match="holds no parquet files"):
        load(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load(tmp_path / "absent")


def test_file_that_is_no_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"not a parquet file")
    with pytest.raises(UserError, match=r"cannot be read as parquet .* fetch it again"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["train.jsonl", "rows.CSV"])
def test_file_of_text(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"{name} is no parquet file: docs/data\.md shows how one is made"):
        load(tmp_path / name)


def test_a_file_named_for_one_use_may_have_any_name(tmp_path):
    """But not where one source is for both; the other name of a split's option is told."""
    mini(3).to_parquet(tmp_path / "validation.parquet")
    file = str(tmp_path / "validation.parquet")
    assert len(docvqa.load_rows(file, "test", docvqa.LAYOUTS, "--eval_data")) == 3
    for source, option in ((file, "--data_dir"), (str(tmp_path), "--eval_data")):
        with pytest.raises(
            UserError, match=r"has the splits \['validation'\], not test: .*, or add --eval_split valid"
        ):
            docvqa.load_rows(source, "test", docvqa.LAYOUTS, option)


def test_hub_that_cannot_be_reached(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        UserError,
        match=r"nielsr/x is no file or folder here, and could not be fetched .*--data_dir or --train_data.*make demo",
    ) as error:
        load("nielsr/x")
    assert "\n" not in str(error.value)


def test_hub_id_with_a_configuration(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split, revision):
        asked.append((name, configuration, split, revision))
        return cauldron([1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load("HuggingFaceM4/the_cauldron:docvqa")
    load("some/data")
    load("HuggingFaceM4/the_cauldron:docvqa@refs/pr/1")
    load("some/data@0123abc")
    assert asked == [
        ("HuggingFaceM4/the_cauldron", "docvqa", "train", None),
        ("some/data", None, "train", None),
        ("HuggingFaceM4/the_cauldron", "docvqa", "train", "refs/pr/1"),
        ("some/data", None, "train", "0123abc"),
    ]


def test_rows_keep_their_numbers(tmp_path):
    """The place of a selected row is its row in the split, however often was selected."""
    mini(6).to_parquet(tmp_path / "train.parquet")
    chosen = load(tmp_path).select([1, 3, 5]).select([2, 0])
    assert [chosen.place(index) for index in range(2)] == [f"{tmp_path}, split train, row {row}" for row in (5, 1)]
    assert [chosen[index]["id"] for index in range(2)] == ["row_5", "row_1"]
    assert load(tmp_path).first(2).place(1).endswith("row 1")


def test_missing_questions_and_pictures_are_told_with_their_place(tmp_path):
    """Nulls in the columns neither stop what only counts, nor become a question's text."""
    rows = cauldron([1, 2, 1, 1, 1])
    cells = [*rows]
    cells[0] |= {"texts": None}
    cells[1]["texts"][1] |= {"user": None}
    cells[2] |= {"images": None}
    cells[3] |= {"texts": []}
    datasets.Dataset.from_list(cells, features=rows.features).to_parquet(tmp_path / "train.parquet")
    loaded = load(tmp_path)
    numbers = number_questions(loaded, each=True)
    assert numbers == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]
    assert len(set(number_pictures(loaded, numbers))) == 5
    for row, problem in ((0, "no question"), (1, "or one without text"), (2, "there is no image"), (3, "no question")):
        with pytest.raises(UserError, match=rf"train, row {row}: .*{problem}"):
            loaded[row]
    assert loaded[4]["texts"][0]["user"] == "Q4.0"
    table = mini(2).map(lambda row: {"query": {"en": None, "de": "?"}})
    table.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 1: there is no question"):
        load(tmp_path)[1]


def test_undecodable_image_names_data_set_split_and_row(tmp_path):
    rows = [
        {**row, "image": {"bytes": b"\x89PNG broken", "path": None}} if k == 2 else row for k, row in enumerate(mini(4))
    ]
    datasets.Dataset.from_list(rows, features=mini(1).features).to_parquet(tmp_path / "train.parquet")
    loaded = load(tmp_path)
    page(loaded, 1)
    with pytest.raises(UserError, match=rf"{tmp_path}, split train, row 2: the image \(11 bytes\) cannot be decoded"):
        page(loaded, 2)


def test_decode_image_faults():
    buffer = io.BytesIO()
    picture(size=(200, 200)).save(buffer, "PNG")
    for cell in (None, {}, {"bytes": None, "path": None}):
        with pytest.raises(UserError, match="here: there is no image"):
            decode_image(cell, "here")
    for content in (b"", b"GIF89a", buffer.getvalue()[:500]):
        with pytest.raises(UserError, match=r"here: the image .* cannot be decoded"):
            decode_image({"bytes": content}, "here")


def test_undecodable_file_is_named(tmp_path):
    (tmp_path / "page.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"^row 3: the image {tmp_path}/page.png cannot be decoded"):
        decode_image({"bytes": None, "path": str(tmp_path / "page.png")}, "row 3")


def test_path_inside(tmp_path, monkeypatch):
    """A path must not lead out of its folder; a link may, as in the hub's cache and where data are kept elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    assert path_inside(tmp_path / "data", "images/a.png", "here") == tmp_path / "data" / "images" / "a.png"
    assert path_inside(tmp_path / "data", "images/../a.png", "here") == tmp_path / "data" / "a.png"
    monkeypatch.chdir(tmp_path / "data")
    for folder in (tmp_path / "data", Path("."), Path("../data")):
        for name in ("../a.png", "images/../../a.png", "/etc/passwd", "../data2/a.png", "..", "//etc/passwd"):
            with pytest.raises(UserError, match=r"here: the path .* leaves the folder"):
                path_inside(folder, name, "here")
        for name in ("a.png\0/../../x", "x" * 256, "a/" + "ü" * 128 + "/b.png", "\ud800.png"):
            with pytest.raises(UserError, match=r"here: .* can be no file's path") as error:
                path_inside(folder, name, "here")
            assert str(error.value).isprintable()
    # here a backslash and a drive are parts of a name, wherever the data come from
    for name in (r"..\..\a.png", r"C:\a.png", r"\\server\a.png"):
        assert path_inside(tmp_path / "data", name, "here") == tmp_path / "data" / name


@pytest.mark.parametrize("nested", [False, True], ids=["image", "images"])
def test_pictures_of_a_table_lie_in_its_folder(tmp_path, nested):
    """A table may name files instead of holding them; those of its own folder are read, others are refused."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    picture().save(tmp_path / "secret.png")
    picture(1).save(tmp_path / "data" / "sub" / "a.png")
    paths = ["sub/a.png", str(tmp_path / "data" / "sub" / "a.png"), "../secret.png", str(tmp_path / "secret.png"), "\0"]
    rows = list(cauldron([1] * 6) if nested else mini(6))
    for row, path in zip(rows, paths, strict=False):
        cell = {"bytes": None, "path": path}
        row.update({"images": [cell]} if nested else {"image": cell})
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}  # to_parquet reads no files for it
    features = (cauldron([1]) if nested else mini(1)).features
    features["images" if nested else "image"] = datasets.List(plain) if nested else plain
    encoded = {"bytes": b"x", "path": None}
    rows[5].update({"images": []} if nested else {"image": encoded})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    loaded = load(tmp_path / "data")
    for index in (0, 1):
        assert np.array_equal(np.asarray(page(loaded, index)), np.asarray(picture(1)))
    for index, message in ((2, "leaves the folder"), (3, "leaves the folder"), (4, "can be no file's path")):
        with pytest.raises(UserError, match=rf"split train, row {index}: .* {message}"):
            page(loaded, index)
    with pytest.raises(
        UserError, match="row 5: there is no image" if nested else "row 5: the image .1 bytes. cannot be"
    ):
        page(loaded, 5)
    with pytest.raises(UserError, match=r"row 3: the path .* leaves the folder"):
        page(loaded.select([3]), 0)


def test_columns_without_pictures(tmp_path):
    for column, values in (("image", [1]), ("image", ["a.png"]), ("images", [["a.png"]]), ("images", ["a.png"])):
        rows = {"question": ["Q"], "answers": [["a"]], "texts": [[{"user": "Q", "assistant": "A"}]], column: values}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(UserError, match=rf"split train: its column {column} holds .* and no pictures"):
            load(tmp_path)


def test_fields_of_other_types(tmp_path):
    rows = [{**row, "query": "no dictionary"} for row in mini(2)]
    features = mini(1).features
    features["query"] = datasets.Value("string")
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"split train, row 0 has not the fields of its layout \("):
        check_answers(load(tmp_path), docvqa.questions, advice="leave it out")


@pytest.mark.parametrize(("answers", "kind"), [("4821", "string"), ([1988], "int64")])
def test_answers_that_are_no_texts(tmp_path, answers, kind):
    """From a text letters would be drawn, and compared with."""
    rows = [{**row, "answers": answers} for row in mini(2)]
    features = mini(1).features
    features["answers"] = datasets.Value(kind) if isinstance(answers, str) else [datasets.Value(kind)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=rf"split train: its column answers holds .*{kind}.* and no lists of texts"):
        load(tmp_path)


def test_image_finder(tmp_path):
    """The ending is not asked for; the folders are looked through in order; nothing is found by half a name."""
    for name in ("images/dev/a-1.jpg", "images/dev/a-1.png", "dev/a-1.gif", "dev/b.1.jpeg", "images/dev/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    finder = ImageFinder(tmp_path, inside=("images", "."))
    found = {name: finder.find(f"dev/{name}", "here") for name in ("a-1", "b.1", "c", "a", "d")}
    assert found == {
        "a-1": tmp_path / "images/dev/a-1.jpg",
        "b.1": tmp_path / "dev/b.1.jpeg",
        "c": tmp_path / "images/dev/c",
        "a": None,
        "d": None,
    }
    assert finder.find("train/0/a-1", "here") is None
    with pytest.raises(UserError, match=r"here: the path .* leaves the folder"):
        finder.find("../../a", "here")


def test_missing_images_are_told(tmp_path, capsys):
    report_missing(tmp_path, [])
    with pytest.raises(
        UserError, match=r"12 examples of f.json whose .* missing: 0, 1, .*, 9 and 2 more; .* fetch them again$"
    ):
        report_missing(Path("f.json"), range(12))
    with pytest.raises(UserError, match=r"1 examples of f.json whose .* missing: a; .*, or add --skip_missing"):
        report_missing(Path("f.json"), ["a"], skip=False)
    advice = "; see that the images lie below pages as they are published, or fetch them again"
    for skip in (None, False, True):  # of a wrong folder to leave out everything is no help
        with pytest.raises(UserError, match=rf"1 examples .* missing: a \(and none that has them\){advice}$"):
            report_missing(Path("pages/f.json"), ["a"], skip, everywhere=True)
    assert capsys.readouterr().out == ""
    report_missing(Path("f.json"), ["a"], skip=True)
    assert capsys.readouterr().out == "left out 1 examples of f.json whose images are missing: a\n"


def test_user_error_from_a_worker_keeps_its_message_only():
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File …\n"
    assert str(UserError(text + "common.errors.UserError: row 2: bad")) == "row 2: bad"
    assert str(UserError("two\nlines")) == "two\nlines"


def options_for(**values):
    return type("Options", (), {"all_questions": False, "share_images": False, "seed": 7, **values})


class FakeProcessor:
    """Takes the place of the encoding, which other tests cover."""


def drawn(dataset, epoch):
    return [dataset[ExampleKey(index, epoch, 1.0)]["text"] for index in range(len(dataset))]


@pytest.fixture
def as_ids(monkeypatch):
    monkeypatch.setattr("common.data.encode_questions", lambda _, examples: [{"id": one.id} for one in examples])


@pytest.fixture
def as_text(monkeypatch):
    monkeypatch.setattr(
        "common.data.encode_questions",
        lambda _, examples: [{"text": (one.turns[0].user, one.turns[0].assistant)} for one in examples],
    )


def test_one_question_is_drawn_per_page_and_epoch(tmp_path, as_text):
    cauldron([4] * 8).to_parquet(tmp_path / "train.parquet")
    dataset = docvqa.training_set(load(tmp_path), FakeProcessor(), options_for())
    epochs = [drawn(dataset, epoch) for epoch in range(3)]
    assert len(dataset) == 8
    assert epochs[0] == drawn(dataset, 0)  # the same again, whoever asks
    assert epochs[0] != epochs[1] != epochs[2]
    other_seed = docvqa.training_set(load(tmp_path), FakeProcessor(), options_for(seed=8))
    assert drawn(other_seed, 0) != epochs[0]
    for user, assistant in epochs[0]:
        assert user.removeprefix("<|image_1|>\nQ") == assistant.removeprefix("A")


def test_all_questions(tmp_path, as_text):
    cauldron([1, 3, 2]).to_parquet(tmp_path / "train.parquet")
    dataset = docvqa.training_set(load(tmp_path), FakeProcessor(), options_for(all_questions=True))
    assert [answer for _, answer in drawn(dataset, 0)] == ["A0.0", "A1.0", "A1.1", "A1.2", "A2.0", "A2.1"]


def test_an_accepted_answer_is_drawn_per_epoch(tmp_path, as_text):
    mini(8).to_parquet(tmp_path / "train.parquet")
    dataset = docvqa.training_set(load(tmp_path), FakeProcessor(), options_for())
    answers = {answer for epoch in range(6) for _, answer in drawn(dataset, epoch)[:1]}
    assert answers == {"0", "x"}


def test_example_dataset_hands_on_the_weight(as_ids):
    dataset = ExampleDataset(2, lambda index, generator: Example(str(index), [Turn("q", "a")]), FakeProcessor())
    assert dataset[ExampleKey(1, 0, 0.25)] == {"id": "1", "loss_weight": 0.25}


# Pictures that several questions share


def test_pictures_are_numbered_by_their_content(tmp_path):
    """The mini set's way, a row per question: rows 0 and 2 hold the same page; nothing is decoded."""
    rows = [{"image": {"bytes": content, "path": None}} for content in (b"page 1", b"page 2", b"page 1")]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    loaded = load_rows(str(tmp_path), "train", [("image",)], "--train_data")
    assert number_pictures(loaded, number_questions(loaded, each=True)) == [0, 1, 0]


def test_pictures_are_read_once(tmp_path, monkeypatch):
    """However often they are asked for: evaluation asks before training, in between and after."""
    cauldron([1, 3]).to_parquet(tmp_path / "train.parquet")
    rows = load(tmp_path)
    first = number_pictures(rows)
    monkeypatch.setattr("common.data._identify", lambda cell: pytest.fail("read again"))
    assert number_pictures(rows) == first == [0, 1]


def test_pictures_are_numbered_by_their_files_and_in_their_order():
    pairs = (("a", "b"), ("b", "a"), ("a", "b"))
    records = [
        {"images": [{"bytes": None, "path": name} for name in pair], "texts": [{"user": "Q"}] * 2} for pair in pairs
    ]
    rows = rows_of_records("set", "train", records)
    assert number_pictures(rows, number_questions(rows, each=True)) == [0, 0, 1, 1, 0, 0]


def test_pages_of_the_cauldron_are_numbered_by_row(tmp_path):
    cauldron([1, 3, 2]).to_parquet(tmp_path / "train.parquet")
    rows = load(tmp_path)
    assert number_pictures(rows, number_questions(rows, each=True)) == [0, 1, 1, 1, 2, 2]


def test_a_group_decodes_its_page_once(tmp_path, monkeypatch):
    """The questions of a group hold the same picture object; the weights and draws are each question's own."""
    cauldron([1, 3, 2]).to_parquet(tmp_path / "train.parquet")
    decoded = Counter()
    monkeypatch.setattr(
        "common.data.open_pixels", lambda content, path: (decoded.update("x"), open_header(content, path))[1]
    )
    monkeypatch.setattr("common.data.encode_questions", lambda _, examples: [{"example": one} for one in examples])
    dataset = docvqa.training_set(load(tmp_path), FakeProcessor(), options_for(share_images=True))
    assert dataset.pictures == [0, 1, 1, 1, 2, 2]
    group = dataset[[ExampleKey(3, 0, 0.5), ExampleKey(1, 0, 2.0)]]
    assert decoded["x"] == 1
    assert [one["loss_weight"] for one in group] == [0.5, 2.0]
    turns = [one["example"].turns[0] for one in group]
    assert [turn.assistant for turn in turns] == ["A1.2", "A1.0"]
    assert turns[0].images[0] is turns[1].images[0]


def test_a_group_that_shares_nothing_is_its_examples(as_ids):
    dataset = ExampleDataset(2, lambda index, generator: Example(str(index), [Turn("q", "a")]), FakeProcessor())
    assert dataset[[ExampleKey(1, 0, 0.25)]] == [{"id": "1", "loss_weight": 0.25}]


def test_headers_only(tmp_path):
    """A picture whose pixels are cut off has a size; decoding it is an error, also after the other way was used."""
    content = io.BytesIO()
    picture(size=(90, 60)).save(content, "PNG")
    cell = {"bytes": content.getvalue()[:200], "path": None}
    with opening_images_by(open_header):
        assert decode_image(cell, "here").size == (90, 60)
    with pytest.raises(UserError, match=r"here: the image .200 bytes. cannot be decoded"):
        decode_image(cell, "here")


def test_gathered_in_order(monkeypatch):
    """Three processes with seven examples."""
    shares = [[0, 3, 6], [1, 4], [2, 5]]
    monkeypatch.setattr("common.data.dist.all_gather_object", lambda into, own: into.__setitem__(slice(None), shares))
    assert gather_in_order(shares[1], 3) == list(range(7))
    assert gather_in_order([1, 2], 1) == [1, 2]


# Splits under another name


def test_hub_split_named_val(monkeypatch):
    """Asked for `validation`; a split that is there under no name is told as the library tells it."""
    asked = []

    def load_dataset(name, configuration, split, revision):
        asked.append(split)
        if split == "val":
            return mini(2)
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'val'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("some/set", "validation", docvqa.LAYOUTS, "--eval_data")
    assert (len(rows), asked) == (2, ["validation", "val"])
    with pytest.raises(UserError, match=r'--eval_data some/set: Unknown split "test"'):
        load_rows("some/set", "test", docvqa.LAYOUTS, "--eval_data")


def test_saved_split_named_val(tmp_path):
    datasets.DatasetDict({"train": mini(3), "val": mini(2)}).save_to_disk(str(tmp_path / "saved"))
    assert len(load_rows(str(tmp_path / "saved"), "validation", docvqa.LAYOUTS, "--eval_data")) == 2


# Pictures that are an attack


@pytest.mark.parametrize("reader", [open_header, open_pixels])
def test_decompression_bomb(monkeypatch, reader):
    """A whole picture of more pixels than PIL allows, of which PIL itself only warns up to twice as many."""
    content = io.BytesIO()
    picture(size=(40, 30)).save(content, "PNG")
    cell = {"bytes": content.getvalue()}
    with opening_images_by(reader):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
        assert decode_image(cell, "here").size == (40, 30)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
        with pytest.raises(
            UserError, match=r"^here: the image .* 40x30 = 1200 pixels are above the limit of 1199: scale"
        ):
            decode_image(cell, "here")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
        with pytest.raises(UserError, match=r"^here: the image .*1200 pixels.* limit of 1198 pixels"):
            decode_image(cell, "here")


def test_postscript_is_not_run(monkeypatch):
    """PIL hands it to Ghostscript, where that is installed."""
    content = io.BytesIO()
    picture().save(content, "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(UserError, match=r"here: the image .* it is PostScript, a program and no picture"):
        decode_image({"bytes": content.getvalue()}, "here")


# Lines of JSON


def read_json_lines(path):
    """The lines' dictionaries, with their numbers."""
    records = []

    def make_row(record, place):
        records.append((int(place.rpartition(" ")[2]), record))
        return {"id": place, "images": [], "texts": []}

    rows_of_file(path.parent, path.name, make_row)
    return records


def texts_of(record, place):
    """A row of a line that holds its own `id` and `text`; those of absent pictures have `image` false."""
    if "text" not in record:
        raise UserError(f"{place}: needs text")
    image = Path(place.partition(", line")[0]) if record.get("image", True) else None
    if record.get("image") == "long":
        image = image / (("a" * 200 + "/") * 30)
    texts = [{"user": record["text"], "assistant": "yes"}]
    return {"id": record["id"], "pair": record["id"], "images": [image], "texts": texts}


BAD_LINES = '{"id": "a", "text": "1"}\n{broken\n{"id": "b", "text": "2", "image": false}\n\n{"id": "c"}\n'
BAD_LINES += '{"id": "a", "text": "3"}\n'


def test_all_bad_lines_of_a_file_are_told_at_once(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(BAD_LINES)
    with pytest.raises(UserError) as error:
        rows_of_file(tmp_path, "train.json", texts_of, skip_missing=False)
    broken, needs, missing = error.value.problems
    assert broken.startswith(f"{path}, line 2: no JSON in UTF-8")
    assert needs == f"{path}, line 5: needs text"
    assert missing.startswith(f"there are 1 examples of {path} whose images are missing: b; see that the images lie")
    path.write_text("{broken\n" * 25)
    with pytest.raises(UserError) as error:
        rows_of_file(tmp_path, "train.json", texts_of)
    assert len(error.value.problems) == 21
    assert error.value.problems[-1] == f"and 5 more of {path}"
    assert str(error.value).startswith("25 problems:\n")


def test_ids_that_a_terminal_would_obey_are_escaped(tmp_path, capsys):
    """Of examples whose images are missing: in the error, in what is left out, and in the fault of a row."""
    (tmp_path / "train.json").write_text(
        '{"id": "a", "text": "1"}\n{"id": "\\u001b[2J", "text": "2", "image": false}\n'
    )
    with pytest.raises(UserError) as error:
        rows_of_file(tmp_path, "train.json", texts_of)
    rows_of_file(tmp_path, "train.json", texts_of, skip_missing=True)
    with pytest.raises(UserError) as fault:
        rows_of_file(tmp_path, "train.json", texts_of, "skip")[1]
    for told in (str(error.value), capsys.readouterr().out.strip(), str(fault.value)):
        assert r"'\x1b[2J'" in told
        assert told.isprintable()


@pytest.mark.parametrize("skip_missing", [None, True])
def test_bad_lines_of_a_file_are_left_out(tmp_path, capsys, skip_missing):
    """Each is an example that cannot be made, wherever its row stands among those that are chosen."""
    path = tmp_path / "train.json"
    path.write_text(BAD_LINES)
    rows = rows_of_file(tmp_path, "train.json", texts_of, "skip", skip_missing)
    texts = []
    for index in range(len(rows)):
        try:
            texts.append(rows[index]["texts"][0]["user"])
        except UserError as error:
            texts.append(str(error).partition(": ")[0].removeprefix(f"{path}, "))
    missing = [] if skip_missing else ["line 3"]
    assert texts == ["1", "line 2", *missing, "line 5", "3"]
    assert rows.place(len(rows) - 1) == rows.select([0, len(rows) - 1]).place(1) == f"{path}, line 6"
    assert ("left out 1 examples" in capsys.readouterr().out) == bool(skip_missing)
    with pytest.raises(UserError, match="line 5: needs text"):
        rows.select([len(rows) - 1, len(rows) - 2])[1]
    assert number_questions(rows, each=True) == [(index, 0) for index in range(len(rows))]
    numbers = number_pictures(rows)
    assert numbers[0] == numbers[-1]
    assert all(number != numbers[0] for number in numbers[1:-1])


def test_lines_of_one_id_make_one_row(tmp_path):
    (tmp_path / "train.json").write_text(
        '{"id": "a", "text": "1"}\n{"id": "b", "text": "2"}\n{"id": "a", "text": "3"}\n'
    )
    of_rows = [
        [
            [text["user"] for text in row["texts"]]
            for row in rows_of_file(tmp_path, "train.json", texts_of, merge_by=merge_by)
        ]
        for merge_by in (None, "pair")
    ]
    assert of_rows == [[["1"], ["2"], ["3"]], [["1", "3"], ["2"]]]


def test_with_its_picture_mended_it_is_the_same_run(tmp_path):
    """As many rows, in the same order, of the same texts, wherever the folder lies: what resuming compares."""
    prints = []
    for folder, lines in (
        ("with", '{"id": "a", "text": "1"}\n{"id": "b", "text": "2"}\n{"id": "a", "text": "3"}\n{broken\n'),
        (
            "without",
            '{"id": "a", "text": "1", "image": false}\n{"id": "b", "text": "2", "image": false}\n'
            '{"id": "a", "text": "3", "image": false}\n{broken\n',
        ),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.json").write_text(lines)
        rows = rows_of_file(tmp_path / folder, "train.json", texts_of, "skip", merge_by="pair")
        assert len(rows) == 3
        prints.append(fingerprint(rows))
    assert prints[0] == prints[1]
    for index, message in ((0, "line 1: a: its image is missing"), (1, "line 2: b: its image is missing")):
        with pytest.raises(UserError, match=message):
            rows[index]


def test_a_path_that_no_file_can_have_is_told_with_its_line(tmp_path):
    """Too long as a whole, though each of its parts is not."""
    path = tmp_path / "train.json"
    path.write_text('{"id": "a", "text": "1"}\n{"id": "b", "text": "2", "image": "long"}\n')
    with pytest.raises(UserError, match=f"^{path}, line 2: File name too long: {path}/aaa"):
        rows_of_file(tmp_path, "train.json", texts_of)
    rows = rows_of_file(tmp_path, "train.json", texts_of, "skip")
    assert rows[0]["texts"][0]["user"] == "1"
    with pytest.raises(UserError, match="line 2: File name too long"):
        rows[1]


def test_lines_that_mean_two_things(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}\r\n\n{"b": "\\\\ud800"}')
    assert read_json_lines(path) == [(1, {"a": "😀"}), (3, {"b": r"\ud800"})]
    for line, message in (
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the field 'c' stands twice in one dictionary"),
        ('{"a": [-Infinity]}', "-Infinity is no number in JSON: write null, or leave the field out"),
        (r'{"\ud800": 1}', r"half a character, '\ud800'"),
        ("[" * 100_000, "no JSON in UTF-8 (maximum recursion depth exceeded"),
        ("5", "int instead of a dictionary"),
    ):
        path.write_text("{}\n" + line)
        with pytest.raises(UserError) as error:
            read_json_lines(path)
        assert str(error.value).startswith(f"{path}, line 2: {message}")
