"""The validator: every kind of fault with its file and line, token counts equal to training's, exit codes."""

import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.collation import encode_example
from common.conversations import check_lengths, load_conversations, measure_image
from common.demo import CHECKPOINT
from common.errors import UserError
from common.phi3v import Phi3VProcessor
from tests.launch import REPOSITORY
from tests.model_helpers import published_folder
from tools import check_data

SIZES = ((32, 24), (640, 480), (300, 900), (1000, 150), (336, 336))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number, (width, height) in enumerate(SIZES):
        noise(width, height, number).save(tmp_path / "images" / f"{number}.jpg")
    return tmp_path


def turn(user="Q?", assistant="A", **fields):
    return {"user": user, "assistant": assistant, **fields}


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def good_rows():
    """Rows with several turns, with several pictures, without pictures, of different lengths."""
    return [
        {
            "id": "a",
            "source": "mine",
            "conversations": [turn(images=["0.jpg", "1.jpg"]), turn("And?"), turn(images=[])],
        },
        {"id": 7, "conversations": [turn("Words only, ünïcødé. " * 3)]},
        {"conversations": [turn(images=["2.jpg"]), turn("Compare.", "No.", images=["3.jpg", "4.jpg", "0.jpg"])]},
        {"conversations": [turn(images=["1.jpg"])], "licence": "what else one notes down is not looked at"},
    ]


def check(monkeypatch, capsys, *arguments):
    """Run the tool in this process; exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["check_data", *map(str, arguments)])
    code = 0
    try:
        check_data.main()
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().out


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Check rows with the built-in checkpoint's tokenizer."""

    def run(*records, options=("--num_crops", 4)):
        path = write(folder / "data.jsonl", *records)
        return check(
            monkeypatch,
            capsys,
            *(path, "--image_dir", folder / "images", "--model_name_or_path", CHECKPOINT, "--num_workers", 1),
            *options,
        )

    return run


def table(output):
    """File name -> the numbers of its row."""
    rows = re.findall(
        r"^(\S+\.jsonl) +(\d+) +(\d+) +([\d-]+) +([\d-]+) +([\d-]+) +([\d-]+) +(\d+)$", output, re.MULTILINE
    )
    return {Path(row[0]).name: row[1:] for row in rows}


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_tokens_are_those_of_training(folder, run, num_crops):
    """Counted from the pictures' sizes, against what training encodes from the pictures."""
    code, output = run(*good_rows(), options=("--num_crops", num_crops))
    assert code == 0
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=num_crops)
    data = load_conversations(folder / "data.jsonl", folder / "images")
    lengths = [len(encode_example(processor, data.example(index))["input_ids"]) for index in range(len(data))]
    assert len(set(lengths)) == 4
    low, lower, upper, high = sorted(lengths)
    longest = lengths.index(high) + 1
    middle = f"{(lower + upper) / 2:.0f}"
    assert table(output) == {"data.jsonl": ("4", "7", str(low), middle, str(high), str(longest), "0")}
    assert f"tokens of 4 of 4 rows, at --num_crops {num_crops}, by the tokenizer of {CHECKPOINT}" in output
    assert "the model takes 131072" in output


@pytest.mark.skipif(
    published_folder("phi-3.5-vision-instruct") is None, reason="no published tokenizer on this machine"
)
def test_the_given_checkpoint_counts(folder, run):
    published = published_folder("phi-3.5-vision-instruct")
    counts = []
    for checkpoint in (published, CHECKPOINT):
        _, output = run(good_rows()[1], options=("--num_crops", 4, "--model_name_or_path", checkpoint))
        counts.append(int(table(output)["data.jsonl"][2]))
    processor = Phi3VProcessor.from_pretrained(published, num_crops=4)
    example = load_conversations(folder / "data.jsonl", folder / "images").example(0)
    assert counts[0] == len(encode_example(processor, example)["input_ids"])
    assert counts[0] != counts[1]


FAULTS = [
    ("{", "no JSON in UTF-8"),
    ("[" * 100_000, "no JSON in UTF-8"),
    ("[]", "list instead of a dictionary"),
    ({}, "conversations must be a list with at least one turn"),
    ({"conversations": {}}, "conversations must be a list with at least one turn"),
    ({"conversations": [5]}, "turn 1 is int, not a dictionary"),
    ({"conversations": [turn(), turn(None)]}, "turn 2: user must be a text that is not empty"),
    ({"conversations": [turn(assistant=" \n")]}, "turn 1: assistant must be a text that is not empty"),
    ({"conversations": [{"user": "Q?"}]}, "turn 1: assistant must be a text that is not empty"),
    ({"conversations": [turn(images="0.jpg")]}, "turn 1: images must be a list of paths"),
    ({"conversations": [turn(images=None)]}, "turn 1: images must be a list of paths"),
    ({"conversations": [turn(image=["0.jpg"])]}, "turn 1: unknown field 'image'; a turn has images, user, assistant"),
    ({"images": ["0.jpg"], "conversations": [turn()]}, "images stands in a turn, not beside conversations"),
    ({"image": "0.jpg", "conversations": [turn()]}, "image is not read: a turn's pictures are its list images"),
    ({"system": "Be brief.", "conversations": [turn()]}, "system is not read: write it at the beginning of the user's"),
    ({"id": 1.5, "conversations": [turn()]}, "id must be a text or a whole number, not float"),
    ({"source": 3, "conversations": [turn()]}, "source must be a text, not int"),
    ({"conversations": [turn(images=["9.jpg"])]}, "turn 1: IMAGES/9.jpg: there is no such file"),
    ({"conversations": [turn(images=[""])]}, "turn 1: IMAGES: there is no such file"),
    ({"conversations": [turn(images=["../data.jsonl"])]}, "turn 1: the path ../data.jsonl leaves the folder IMAGES"),
    ({"conversations": [turn(images=["/etc/passwd"])]}, "turn 1: the path /etc/passwd leaves the folder IMAGES"),
    ({"conversations": [turn(images=["a\0b"])]}, r"turn 1: 'a\x00b' can be no file's path"),
    ({"conversations": [turn(images=["x" * 300])]}, f"turn 1: {'x' * 300} can be no file's path"),
    ({"conversations": [turn(images=["a\n\x1b[2J"])]}, r"a\n\x1b[2J': there is no such file"),
    ({"conversations": [turn("<|image_1|>\nQ?")]}, "turn 1: user holds <|image_1|>, which is no text"),
    ({"conversations": [turn("<|image_1|>\nQ?", images=["0.jpg"])]}, "turn 1: user holds <|image_1|>"),
    ({"conversations": [turn("What is <|image|>?")]}, "turn 1: user holds <|image|>"),
    ({"conversations": [turn(assistant="A<|end|>\n<|endoftext|>")]}, "turn 1: assistant holds <|end|>"),
    ({"conversations": [turn("a <s>word</s>")]}, "turn 1: user holds <s>"),
    ({"conversations": [turn(assistant="<unk>")]}, "turn 1: assistant holds <unk>"),
    ({"conversations": [turn(assistant="\ud800")]}, "half a character, '\\ud800'"),
    ('{"conversations": [{"user": "Q?", "user": "Why?", "assistant": "A"}]}', "the field 'user' stands twice in one"),
    ('{"weight": NaN, "conversations": [{"user": "Q?", "assistant": "A"}]}', "NaN is no number in JSON: write null"),
    ('{"id": %s, "conversations": [{"user": "Q?", "assistant": "A"}]}' % ("1" * 5000), "no JSON in UTF-8 (Exceeds the"),
    ('{"conversations": [{"user": "Q?", "assistant": "\0"}]}', "no JSON in UTF-8 (Invalid control character"),
    ({"conversations": [turn(images=["thin.png"])]}, "a picture of 2000x1 pixels is too thin"),
    ({"conversations": [turn(images=["broken.jpg"])]}, "turn 1: IMAGES/broken.jpg: the image cannot be decoded"),
    ({"conversations": [turn(images=["text.jpg"])]}, "turn 1: IMAGES/text.jpg: the image cannot be decoded"),
    ({"conversations": [turn(images=["big.png"])]}, "10000x10000 = 100000000 pixels are above the limit of"),
]


@pytest.fixture
def bad_pictures(folder):
    noise(2000, 1).save(folder / "images" / "thin.png")
    whole = (folder / "images" / "1.jpg").read_bytes()
    (folder / "images" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "text.jpg").write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(folder / "images" / "big.png")  # 12 kB


def test_every_fault_has_its_line(folder, bad_pictures, run):
    """All at once, each between good rows, which stay without one."""
    records = [record for fault, _ in FAULTS for record in (fault, good_rows()[3])]
    code, output = run(*records)
    assert code == 1
    listed = output[: output.index("\n\n")].splitlines()
    assert len(listed) == len(FAULTS)
    for position, (line, (_, problem)) in enumerate(zip(listed, FAULTS, strict=True)):
        assert line.startswith(f"{folder / 'data.jsonl'}, line {2 * position + 1}: ")
        assert problem.replace("IMAGES", str(folder / "images")) in line
    rows, _, _, _, _, _, faults = table(output)["data.jsonl"]
    assert (rows, faults) == (str(2 * len(FAULTS)), str(len(FAULTS)))
    assert f"tokens of {len(FAULTS)} of {2 * len(FAULTS)} rows" in output


def test_training_finds_the_same_on_load(folder, bad_pictures, run):
    """Every fault but those in the pixels stops `load_conversations`, or `check_lengths` where it takes a tokenizer."""
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4)
    passed = []
    for record, problem in FAULTS:
        code, output = run(record)
        assert code == 1
        reported = output.splitlines()[0]
        found = None
        try:
            check_lengths(load_conversations(folder / "data.jsonl", folder / "images"), processor, 131072)
            passed.append(problem)
        except UserError as error:
            found = str(error).replace("cannot be opened", "cannot be decoded")
        assert found in (reported, None)
    assert passed == ["turn 1: IMAGES/broken.jpg: the image cannot be decoded"]


def test_several_faults_in_one_line(run):
    code, output = run({"id": [], "conversations": [turn("", images=["9.jpg", "8.jpg"]), turn(assistant="<|end|>")]})
    assert code == 1
    assert output.count("line 1: ") == 5


def test_bad_bytes_blank_lines_and_double_ids(folder, run):
    row = '{"id": "%s", "conversations": [{"user": "Q?", "assistant": "A"}]}'
    (folder / "data.jsonl").write_bytes(
        b"\n".join([row.encode() % b"x", b"  ", row.encode() % b"\xff", row.encode() % b"x"])
    )
    content = (folder / "data.jsonl").read_bytes()
    code, output = run()
    assert code == 1  # `run` wrote an empty file
    assert f"{folder / 'data.jsonl'} is empty" in output
    (folder / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_conversations(folder / "data.jsonl", folder / "images")
    assert "line 3: no JSON in UTF-8" in str(error.value)
    assert "line 4: line 1 has the id 'x' already" in str(error.value)
    code, output = run({"id": 1, **good_rows()[3]}, {"id": "1", **good_rows()[3]})
    assert "line 2: line 1 has the id '1' already" in output


def test_too_long_for_the_model(run):
    """Sixty pictures of 2,509 tokens are more than the model's 131,072."""
    row = {"conversations": [turn(images=["4.jpg"] * 60)]}
    code, output = run(row, options=("--num_crops", 16))
    assert code == 1
    assert re.search(r"line 1: 15\d{4} tokens, the model takes 131072: lower --num_crops", output)
    assert run(row, options=("--num_crops", 1))[0] == 0


def test_pictures_are_decoded_once_in_any_number_of_processes(folder, bad_pictures, monkeypatch, capsys):
    """Several files that name the same pictures; the same faults and numbers from one process and from three."""
    fault = {"conversations": [turn(images=["broken.jpg", "0.jpg", "broken.jpg"])]}
    paths = [write(folder / f"{name}.jsonl", *good_rows(), fault) for name in ("train", "val")]
    for number in range(100):
        noise(8 + number, 8).save(folder / "images" / f"many_{number}.png")
    many = [{"conversations": [turn(images=[f"many_{number}.png"])]} for number in range(100)]
    paths.append(write(folder / "many.jsonl", *many))
    options = (*paths, "--image_dir", folder / "images", "--model_name_or_path", CHECKPOINT, "--num_workers")
    decoded = []

    def counted(file, decode=False):
        decoded.append(file)
        return measure_image(file, decode)

    with monkeypatch.context() as patched:
        patched.setattr(check_data, "measure_image", counted)
        alone = check(monkeypatch, capsys, *options, 1)
    assert len(decoded) == len(set(decoded)) == len(SIZES) + 1 + 100
    assert alone[0] == 1
    assert alone[1].count("the image cannot be decoded") == 4
    assert set(table(alone[1])) == {"train.jsonl", "val.jsonl", "many.jsonl"}
    assert check(monkeypatch, capsys, *options, 3) == alone


def die(file, decode=False):
    os._exit(9)


def test_a_worker_that_dies_is_reported(folder, monkeypatch, capsys):
    monkeypatch.setattr(check_data, "measure_image", die)
    path = write(folder / "data.jsonl", *good_rows())
    with pytest.raises(UserError, match=r"a worker process died .*0\.jpg or one named after it"):
        check(
            monkeypatch,
            capsys,
            *(path, "--image_dir", folder / "images", "--model_name_or_path", CHECKPOINT, "--num_workers", 2),
        )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_no_broken_file_crashes(tmp_path, kind):
    """Files cut off or with bytes changed are a size or a problem in words, never an exception."""
    content = io.BytesIO()
    noise(40, 30).save(content, kind)
    generator = random.Random(kind)
    whole, file, problems = content.getvalue(), tmp_path / "picture", 0
    for trial in range(60):
        broken = bytearray(whole[: generator.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(trial % 4):
            if broken:
                broken[generator.randrange(len(broken))] = generator.randrange(256)
        file.write_bytes(broken)
        for decode in (False, True):
            found = measure_image(file, decode)
            if isinstance(found, str):
                assert found.startswith(f"{file}: the image cannot be ")
                assert "\n" not in found
                problems += decode
    assert problems >= 15
    file.write_bytes(whole)
    assert measure_image(file, decode=True) == measure_image(file) == (40, 30)


def test_without_a_tokenizer_only_pictures_are_counted(folder, monkeypatch, capsys):
    """The default checkpoint out of reach: no other tokenizer takes its place, and the table says so."""
    monkeypatch.setattr(check_data, "DEFAULT_MODEL", "nobody/has-this-model")
    path = write(
        folder / "data.jsonl", good_rows()[1], good_rows()[3], {"conversations": [turn(images=["4.jpg"] * 60)]}
    )
    code, output = check(monkeypatch, capsys, path, "--image_dir", folder / "images", "--num_crops", 16)
    assert code == 0
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=16)
    ids = encode_example(processor, load_conversations(path, folder / "images").example(1))["input_ids"]
    pictures = int((ids == processor.image_token_id).sum())
    assert table(output)["data.jsonl"][2:5] == ("0", str(pictures), str(60 * 2509))
    assert "tokens of the PICTURES ONLY, of 3 of 3 rows" in output
    assert "nobody/has-this-model cannot be reached, so texts were not counted and no length was checked" in output
    noise(2000, 1).save(folder / "images" / "thin.png")
    write(path, {"conversations": [turn(images=["thin.png"])]})
    code, output = check(monkeypatch, capsys, path, "--image_dir", folder / "images", "--num_crops", 4)
    assert code == 1
    assert "line 1: a picture of 2000x1 pixels is too thin" in output


def test_a_checkpoint_that_was_asked_for_must_be_there(folder, monkeypatch, capsys):
    path = write(folder / "data.jsonl", *good_rows())
    for name, message in (("nobody/has-this-model", "could not be fetched"), (folder, "is not a checkpoint folder")):
        with pytest.raises(UserError, match=message):
            check(monkeypatch, capsys, path, "--image_dir", folder / "images", "--model_name_or_path", name)
    (folder / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    with pytest.raises(UserError, match="its processor cannot be read"):
        check(monkeypatch, capsys, path, "--image_dir", folder / "images", "--model_name_or_path", folder)


def test_as_a_user_starts_it(folder):
    """Exit code 1 with faults, 2 with wrong options, all at once (0 without either: the tests above)."""

    def start(*arguments):
        command = [sys.executable, "-m", "tools.check_data", *map(str, arguments)]
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
        return ended.returncode, ended.stdout, ended.stderr

    path = write(folder / "data.jsonl", *good_rows(), {"conversations": [turn(images=["9.jpg"])]})
    options = ("--image_dir", folder / "images", "--num_crops", 4, "--model_name_or_path", CHECKPOINT)
    code, output, errors = start(path, *options)
    assert (code, errors) == (1, "")
    assert output.startswith(f"{path}, line 5: turn 1: {folder / 'images' / '9.jpg'}: there is no such file\n")
    assert table(output)["data.jsonl"][-1] == "1"
    code, output, errors = start(folder / "no.jsonl", "--image_dir", path, "--num_crops", 17, "--num_workers", 0)
    assert (code, output) == (2, "")
    assert errors.startswith("error: 4 problems:")
    for part in (
        "no.jsonl: there is no such file",
        "--image_dir",
        "--num_crops 17: it must be 1 to 16",
        "--num_workers",
    ):
        assert part in errors
