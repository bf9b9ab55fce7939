"""`tools.app` without a browser: its options, the prompts and their tokens, the drawings, the answers, the examples."""

import base64
import io
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.collation import Turn
from common.demo import CHECKPOINT
from common.errors import UserError
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import plan_layout
from tests.model_helpers import picture, write_pictures
from tests.report_runs import HOSTILE, document_examples, write_documents, write_run
from tests.test_predict import full_model, reference, run_predict, save_adapter
from tools import app, predict

FEW = ("--num_crops", "1", "--max_new_tokens", "6")  # the built-in checkpoint is made for one view


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, and files that are none."""
    folder = tmp_path_factory.mktemp("images")
    write_pictures(folder)
    (folder / "letter.txt").write_text("Dear Sir or Madam")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def sides():
    return app.load_sides(app.parse(["--checkpoint", str(CHECKPOINT), *FEW]))


@pytest.fixture
def page(sides):
    return app.Page(sides, app.Evaluated(), 6)


def last(iterator):
    *_, found = iterator
    return found


# --- options


def test_all_wrong_options_at_once():
    words = "--checkpoint x --compare x --eval gone --port 0 --num_crops 17 --max_new_tokens 0"
    with pytest.raises(UserError) as error:
        app.parse(words.split())
    for part in ("5 problems", "--compare x", "--eval gone", "--port 0", "--num_crops 17", "--max_new_tokens 0"):
        assert part in str(error.value), part


def test_without_gradio(monkeypatch):
    monkeypatch.setattr(app, "gradio", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-app\.txt"):
        app.parse(["--checkpoint", "x"])


def test_checkpoints_that_are_none(tmp_path):
    with pytest.raises(UserError, match=f"^--checkpoint {tmp_path} is not a checkpoint folder"):
        app.load_sides(app.parse(["--checkpoint", str(tmp_path)]))
    with pytest.raises(UserError, match=f"^--compare {tmp_path} is not a checkpoint folder"):
        app.load_sides(app.parse(["--checkpoint", str(CHECKPOINT), "--compare", str(tmp_path)]))


# --- answers


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_the_answer_is_that_of_predict(folder, page, pictures, monkeypatch, capsys):
    files = [str(folder / f"{number}.png") for number in range(1, pictures + 1)]
    words = [word for file in files for word in ("--image", file)]
    run_predict(monkeypatch, "--checkpoint", CHECKPOINT, *words, "--question", "What is it?\nSay it.", *FEW)
    told = list(page.ask(files, "What is it?\nSay it."))
    assert f"{told[-1][1]}\n" == capsys.readouterr().out
    assert told[0][1] == ""  # the answer before is gone at once
    lengths = [len(text) for _, text in told]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2 or not pictures, "it grows; the answer about no picture is one word"
    most = r"6 tokens, the most that it may have \(--max_new_tokens\)"
    assert re.search(rf"{most if pictures else '3 tokens'}, \d+\.\d s", told[-1][0])


def test_an_adapter_beside_its_base(folder, adapter, monkeypatch):
    """One load, two answers: `tools.predict`'s of the adapter, and of the base that it names."""
    loaded, load = [], app.load_model
    monkeypatch.setattr(app, "load_model", lambda *arguments: loaded.append(arguments) or load(*arguments))
    options = app.parse(["--checkpoint", str(adapter), "--compare", str(CHECKPOINT), *FEW])
    sides = app.load_sides(options)
    assert len(loaded) == 1
    question = [Turn("What is it?", images=[Image.open(folder / "1.png")])]
    for _ in range(2):  # the adapter is on again
        _, adapted, base = last(app.Page(sides, app.Evaluated(), 6).ask([str(folder / "1.png")], "What is it?"))
        assert base == reference(full_model(), question)
        assert adapted == reference(predict.load_model(adapter, predict.how_to_load(adapter)).eval(), question)
        assert adapted != base


def test_two_checkpoints(folder, adapter, sides):
    """The other way round both are loaded; the second cuts pictures as the first does."""
    given = ["--checkpoint", str(CHECKPOINT), "--compare", str(adapter), *FEW]
    both = app.load_sides(app.parse(given))
    assert both[0].model is not both[1].model
    assert {side.processor.image_processor.num_crops for side in both} == {1}
    file = str(folder / "1.png")
    _, base, adapted = last(app.Page(both, app.Evaluated(), 6).ask([file], "What is it?"))
    assert (base,) == last(app.Page(sides, app.Evaluated(), 6).ask([file], "What is it?"))[1:]
    assert adapted != base


def test_an_empty_answer_is_called_so(page, monkeypatch):
    monkeypatch.setattr(app, "stream", lambda *_: iter([app.Answer("", 1, 0.25)]))
    assert "demo_checkpoint: an empty answer, 1 tokens, 0.2 s" in last(page.ask([], "What?"))[0]


@pytest.mark.parametrize("closes", [False, True], ids=["who leaves", "Ctrl-C"])
def test_an_answer_is_stopped(folder, sides, monkeypatch, closes):
    monkeypatch.setattr(app, "CLOSED", threading.Event())
    monkeypatch.setattr(app, "end_token_ids", lambda _: [0])  # the answer does not end by itself
    page = app.Page(sides, app.Evaluated(), 5000)
    asked = page.ask([str(folder / "1.png")], "What is it?")
    while not next(asked)[1]:
        pass
    app.CLOSED.set() if closes else asked.close()
    begun = time.perf_counter()
    page.worker.submit(int).result()
    assert time.perf_counter() - begun < 5, "the worker is free for the next"


# --- what cannot be asked


def test_wrong_files(folder, page, monkeypatch):
    files = [str(folder / name) for name in ("letter.txt", "1.png", "broken.png", "gone.png")]
    told, text = last(page.ask(files, "What is it?"))
    drawn = page.draw(files)
    for part in ("letter.txt: the image", "broken.png: the image", "cannot be decoded", "Remove it", "drop it again"):
        assert part in told
        assert part in drawn
    assert text == ""
    assert drawn.count("<svg") == 1
    assert str(folder) not in told
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 336 * 335)
    told, _ = last(page.ask(files[1:2], "What is it?"))
    assert "1.png: the image" in told
    assert "336x336 = 112896 pixels are above the limit of 112560: scale it down" in told
    monkeypatch.undo()
    assert last(page.ask(files[1:2], "What is it?"))[1], "the page goes on"


def test_prompts_that_cannot_be_asked(folder, page, sides, monkeypatch):
    file = str(folder / "1.png")
    assert "write one" in last(page.ask([file], " \n"))[0]
    assert "holds &lt;|image_1|&gt;" in last(page.ask([file], "<|image_1|>\nWhat?"))[0]
    assert "holds &lt;|end|&gt;" in page.count([file], "Stop.<|end|>")
    thin = folder / "thin.png"
    Image.new("RGB", (2000, 1)).save(thin)
    assert "is too thin" in last(page.ask([str(thin)], "What is it?"))[0]
    assert "is too thin" in page.draw([str(thin)])
    assert "is too thin" in page.count([str(thin)], "What is it?")
    monkeypatch.setattr(sides[0].model.config, "max_position_embeddings", 400)
    assert last(page.ask([file], "What is it?"))[1]
    told, text = last(page.ask([file], "What is it? " * 30))
    assert re.search(r"The prompt is \d+ tokens long, and the model takes 394 .*: shorten the question", told)
    assert text == ""
    assert 'class="problem"' in page.count([file], "What is it? " * 30)


def test_memory_that_runs_out(folder, page, sides, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sides[0].model, "generate", fail)
    assert "Memory ran out: give fewer pictures" in last(page.ask([str(folder / "1.png")], "What?"))[0]
    monkeypatch.setattr(sides[0].model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last(page.ask([], "What?"))


# --- drawings and tokens


@pytest.mark.parametrize(
    ("width", "height", "num_crops"), [(336, 336, 1), (850, 1100, 16), (1100, 400, 4), (30, 20, 9)]
)
def test_drawing(width, height, num_crops):
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=num_crops)
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * turn) for turn in range(3)])  # smooth, for JPEG
    image = image.resize((width, height))
    drawn = app.draw_picture(processor, image, "1. page.png")
    features = processor.image_processor([image])
    layout = plan_layout(width, height, num_crops)
    rows, columns = layout.padded_height // 336, layout.padded_width // 336
    assert re.findall(r"<text [^>]*>(\d+)</text>", drawn) == [str(number + 1) for number in range(rows * columns)]
    assert len(features["pixel_values"]) == rows * columns + 1
    assert f"<b>{int(features['num_img_tokens'][0]):,} tokens</b>" in drawn
    assert f"{columns} × {rows} sub-images" in drawn
    cut, view = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB"), dtype=float)
        for one in re.findall(r'"data:image/jpeg;base64,([^"]*)"', drawn)
    )
    assert cut.shape[0] / cut.shape[1] == pytest.approx(rows / columns, rel=0.01)
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    seen = ((features["pixel_values"][0].permute(1, 2, 0).numpy() * std + mean) * 255).clip(0, 255)
    assert np.abs(view - seen).mean() < 3, "what the model sees, but for JPEG"


@pytest.mark.parametrize("sizes", [[], [(336, 336)], [(850, 1100), (1100, 400)]])
def test_tokens(folder, sides, sizes):
    pictures = [picture(*size, 1) for size in sizes]
    example = app.make_example(pictures, "What is the date?")
    prompt = sides[0].processor.apply_chat_template(
        [{"role": "user", "content": example.turns[0].user}], add_generation_prompt=True
    )
    wanted = sides[0].processor(prompt, pictures)["input_ids"][0]
    of_pictures = int((wanted == sides[0].processor.image_token_id).sum())
    assert sides[0].count_tokens(sizes, "What is the date?") == (of_pictures, len(wanted))


def test_tokens_in_words(folder, page):
    files = [str(folder / "1.png"), str(folder / "letter.txt"), str(folder / "2.png")]
    pictures = int(re.search(r"([\d,]+) of the pictures", page.count(files, "What?"))[1].replace(",", ""))
    assert pictures == 2 * 313
    assert " of at most 131,066 tokens" in page.count(None, "")


def test_no_pictures(page):
    assert page.draw(None) == page.draw([]) == ""
    assert "tokens: 0 of the pictures, 8 of the text" in page.count(None, "")


# --- examples


def test_examples_of_a_run(tmp_path):
    write_run(tmp_path)
    evaluated = app.read_evaluated(tmp_path)
    assert evaluated.columns == ("before", "after")
    assert evaluated.find("gained", "") == [0, 4, 8]
    assert evaluated.find(app.ALL, "TOTAL 7 ") == [7]
    assert evaluated.find("lost", "nobody says this") == []
    assert evaluated.row(evaluated.examples[1]) == [
        *("test_1", "What is total 1?\nAnswer briefly.", "1001 / 1001.00", "1001", "no idea", "lost")
    ]
    page = app.Page([], evaluated, 6)
    (file,), question, told = page.choose(1, [0, 5, 9])
    assert Path(file).parent == tmp_path / "report_images"
    assert question == "What is total 5?\nAnswer briefly."
    assert re.sub(r"(<[^>]*>|\s)+", " ", told).strip() == (
        "Example test_5 accepted 1005 / 1005.00 before 1005 after no idea"
    )


def test_evaluations_that_stand_alone(tmp_path):
    write_run(tmp_path)
    (tmp_path / "eval_after.json").rename(tmp_path / "eval_only.json")
    evaluated = app.read_evaluated(tmp_path)
    assert evaluated.columns == ("after",)
    assert set(evaluated.groups) == {"wrong", "right"}
    assert app.read_evaluated(tmp_path / "eval_before.json").columns == ("before",)
    assert app.read_evaluated(tmp_path / "none") == app.Evaluated()
    (tmp_path / "eval_only.json").write_text("{")
    with pytest.raises(UserError, match=r"eval_only\.json is damaged"):
        app.read_evaluated(tmp_path)


def test_examples_of_other_kinds(tmp_path):
    """Without scores, questions or pictures; with names of pictures that are none of an evaluation's."""
    (tmp_path / "secret.jpg").write_bytes(b"")
    examples = [
        {"id": 3, "generated": "x", "images": ["../secret.jpg", "0" * 32 + ".jpg", 7]},
        {"id": 4, "generated": "y"},
    ]
    (tmp_path / "eval_after.json").write_text(json.dumps({"examples": examples}))
    evaluated = app.read_evaluated(tmp_path)
    page = app.Page([], evaluated, 6)
    assert evaluated.groups == {}
    assert evaluated.row(evaluated.examples[0]) == ["3", "", "", "x"]
    for position in (0, 1):
        pictures, question, told = page.choose(position, [0, 1])
        assert (pictures, question) == (None, "")
        assert "No pictures of it were kept" in told


def test_texts_stay_texts(tmp_path, sides):
    """Of data, of models, of files' names."""
    examples = [{**document_examples(tmp_path, 1)[0], "id": HOSTILE, "question": HOSTILE, "answers": [HOSTILE]}]
    write_documents(tmp_path, "after", examples, [HOSTILE])
    page = app.Page(sides, app.read_evaluated(tmp_path), 6)
    files, _, told = page.choose(0, [0])
    hostile = tmp_path / "<img src=x onerror=alert(1)>.png"
    hostile.write_bytes(Path(files[0]).read_bytes())
    for shown in (told, page.draw([str(hostile)]), page.draw([str(hostile) + "x"]), app.PARTS.words(HOSTILE)):
        assert "onerror" in shown
        assert "<script" not in shown
        assert "<img src=x" not in shown


def test_halves_of_characters(tmp_path, sides):
    """Of a damaged answer, which would keep the whole page from being sent."""
    example = {"id": "\ud83d", "question": "What\udc00?", "generated": "1 \ud83d", "answers": ["\ud83d"], "images": []}
    (tmp_path / "eval_after.json").write_text(json.dumps({"examples": [example]}))
    page = app.Page(sides, app.read_evaluated(tmp_path), 6)
    assert page.list_examples()[1]["samples"] == [["?", "What??", "?", "1 ?"]]
    json.dumps(page.build().get_config_file(), ensure_ascii=False, default=str).encode()
