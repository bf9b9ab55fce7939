"""Generated bad input to the readers, the options, the packer and the sampler.

Each example ends in a `UserError` that names the place, or in what the input says; 200 of each and more, the same in
every run. What is expected is worked out here from the input alone, by `json`, PIL or counting.
"""

import argparse
import io
import json
import math
import os
import re
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as ucf101
from common.cli import CHECKPOINTING, OPTIMIZERS
from common.collation import Example, Turn, encode_example, pack, share_pictures
from common.conversations import load_conversations
from common.data import ExampleKey, decode_image, open_header, opening_images_by, rows_of_file
from common.demo import CHECKPOINT
from common.errors import UserError
from common.packing import PackedBatchSampler, Questions
from common.phi3v import Phi3VProcessor
from common.phi3v.masks import SHARED
from common.training import GlobalBatchSampler, _EpochLoader

many = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def noise(width, height, mode="RGB", seed=0):
    values = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def outcome(make, *places, printable=True):
    """What `make` gives, and no message; or None and its `UserError`'s message, in which one of the places is named."""
    try:
        return make(), ""
    except UserError as error:
        text = str(error)
    assert not printable or all(line.isprintable() for line in text.split("\n")), ascii(text)
    assert any(str(place) in text for place in places), text
    return None, text


# --- lines of JSON

NAMES = ("0.png", "sub/1.png")
PICTURES = {name: noise(8 + number, 6, seed=number) for number, name in enumerate(NAMES)}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8).filter(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
TURNS = st.fixed_dictionaries(
    {"user": TEXTS, "assistant": TEXTS}, optional={"images": st.lists(st.sampled_from(NAMES), max_size=3)}
)
ROWS = st.fixed_dictionaries(
    {"conversations": st.lists(TURNS, min_size=1, max_size=3)}, optional={"source": TEXTS, "note": VALUES}
)

# In place of an answer, as the file has it: what no reader takes, and what a conversation does not take.
MARK = "in place of this"
NO_JSON = (
    *("NaN", "-Infinity", "[NaN]", "1" * 5000, "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000),
    *('"\\ud800"', '"a\\uDFFFb"', '"\\udc00\\ud800"', '"\x00"', '"\x1f"', '"a', "'a'", "", "Yes", '"A", "user": "B"'),
    *('{"a": 1, "a": 1}', '"A", "assistant": "A"', '"\\x"', '"A" "B"', '"A",', "01", "\ufeff1"),
)
NO_TURN = (
    *("null", "true", "7", "1e400", "[]", "{}", '""', '" \\n"', '"\u3000"', '"<|end|>"', '"a<|image_12|>"'),
    *('"A", "image": []', '"A", "images": null', '"A", "images": ["absent.png"]', '"A", "images": "0.png"'),
    *('"A", "images": ["../secret.png"]', '"A", "images": ["sub/../../secret.png"]', '"A", "images": ["/etc/passwd"]'),
    *('"A", "images": ["a\\u0000b"]', f'"A", "images": ["{"x" * 300}"]', '"A", "images": ["."]', '"A", "images": [""]'),
    *('"A", "images": ["no\\npicture"]', '"A", "images": ["text.png"]', '"A", "\\u001b[2J": 1'),
)


def nodes(value, path=()):
    """The places of everything in a JSON value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from nodes(part, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def as_bytes(draw, row):
    return json.dumps(row, ensure_ascii=draw(st.booleans())).encode()


@st.composite
def lines(draw, rows=ROWS, answer=lambda row: row["conversations"][-1], field="assistant", no_row=NO_TURN):
    """A line, and what it must be: good, no_json, no_row; None where that is not known."""
    row = draw(rows)
    kinds = ("good", "good", "bom", "no_json", "no_json", "no_row", "no_row", "bytes", "cut", "flipped", "node", "json")
    kind = draw(st.sampled_from(kinds))
    if kind == "good":
        return as_bytes(draw, row), "good"
    if kind == "bom":
        return b"\xef\xbb\xbf" + as_bytes(draw, row), "good"
    if kind in ("no_json", "no_row"):
        answer(row)[field] = MARK
        new = draw(st.sampled_from(NO_JSON if kind == "no_json" else no_row))
        return as_bytes(draw, row).replace(json.dumps(MARK).encode(), new.encode()), kind
    if kind == "bytes":
        return draw(st.binary(max_size=40)).replace(b"\n", b"\r"), None
    if kind == "json":
        return as_bytes(draw, draw(VALUES)), None
    if kind == "node":
        return as_bytes(draw, replaced(row, draw(st.sampled_from(list(nodes(row)))), draw(VALUES))), None
    line = bytearray(as_bytes(draw, row))
    if kind == "cut":
        return bytes(line[: draw(st.integers(0, len(line) - 1))]), None
    for _ in range(draw(st.integers(1, 3))):
        line[draw(st.integers(0, len(line) - 1))] = draw(st.integers(0, 255).filter(lambda value: value != 10))
    return bytes(line), None


def json_of(content):
    """The values of the lines, with their numbers, by `json` alone."""
    numbered = enumerate(content.split(b"\n"), start=1)
    return [(number, json.loads(line.decode("utf-8-sig"))) for number, line in numbered if line.strip()]


def read_lines(path, given_lines, read):
    """Write and read a file: what is read, or None and the numbers of the lines that are refused.

    Every line that must be is among them; one that is good never is.
    """
    path.write_bytes(b"\n".join(line for line, _ in given_lines))
    result, message = outcome(lambda: read(path), path)
    named = {int(number) for number in re.findall(rf"{re.escape(str(path))}, line (\d+)", message)}
    assert result is not None or named or "is empty" in message
    assert named.isdisjoint(number for number, (_, kind) in enumerate(given_lines, start=1) if kind == "good")
    event("read" if result is not None else "refused")
    return result, named


def numbers_of(given_lines, *kinds):
    return {number for number, (_, kind) in enumerate(given_lines, start=1) if kind in kinds}


def every_known_fault(test):
    """Each fault once by itself, whatever is drawn besides."""
    line = json.dumps({"conversations": [{"user": "Q?", "assistant": MARK}]})
    for kind, faults in (("no_json", NO_JSON), ("no_row", NO_TURN)):
        for fault in faults:
            test = example([(line.replace(json.dumps(MARK), fault).encode(), kind)])(test)
    return test


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    for name, picture in PICTURES.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / "images" / name)
    (folder / "images" / "dev").mkdir()
    for side in (0, 1):
        noise(8, 8).save(folder / "images" / "dev" / f"dev-1-0-img{side}.png")
    (folder / "images" / "text.png").write_text("no picture")
    noise(8, 8).save(folder / "secret.png")
    return folder


@settings(many, max_examples=400)
@given(st.lists(lines(), min_size=1, max_size=4))
@every_known_fault
def test_lines_of_conversations(folder, given_lines):
    """Refused with the number of every line at fault, or the very texts and pictures that the file names."""
    path, bad = folder / "data.jsonl", numbers_of(given_lines, "no_json", "no_row")
    data, named = read_lines(path, given_lines, lambda path: load_conversations(path, folder / "images"))
    assert bad <= named
    if data is None:
        return
    expected = json_of(path.read_bytes())
    assert list(zip(data.lines, data.records, strict=True)) == expected
    for index, (number, record) in enumerate(expected):
        made = data.example(index)
        assert made.id == f"{path}, line {number}"
        tag = 0
        for turn, told in zip(made.turns, record["conversations"], strict=True):
            names = told.get("images", [])
            tags = "".join(f"<|image_{tag + position}|>" for position in range(1, len(names) + 1))
            tag += len(names)
            assert (turn.user, turn.assistant) == ((f"{tags}\n" if tags else "") + told["user"], told["assistant"])
            assert len(turn.images) == len(names)
            for image, name in zip(turn.images, names, strict=True):
                assert image.tobytes() == PICTURES[name].tobytes()


@many
@given(st.lists(lines(), min_size=1, max_size=4))
@every_known_fault
def test_lines_of_dictionaries(folder, given_lines):
    """The reader of the tasks' original files: refused with every line at fault, or what `json` reads."""
    path, bad = folder / "records.jsonl", numbers_of(given_lines, "no_json")
    records = []

    def make_row(record, place):
        records.append((int(place.rpartition(" ")[2]), record))
        return {"id": place, "images": [], "texts": []}

    rows, named = read_lines(path, given_lines, lambda path: rows_of_file(path.parent, path.name, make_row))
    assert named >= bad
    if rows is not None:
        assert not bad
        assert records == json_of(path.read_bytes())
        assert len(rows) == len(records)


MEMES = st.fixed_dictionaries(
    {"img": st.sampled_from(NAMES), "label": st.sampled_from([0, 1])}, optional={"id": st.integers(), "text": TEXTS}
)
NO_MEME = ("null", "7", '""', '"../secret.png"', '"/etc/passwd"', '"a\\u0000b"', f'"{"x" * 300}"', '"absent.png"')
PAIRS = st.fixed_dictionaries(
    {"identifier": st.just("dev-1-0-0"), "sentence": TEXTS, "label": st.sampled_from(["True", "False"])},
    optional={"directory": st.integers()},
)
NO_PAIR = (
    "null",
    "7",
    '"../../secret-0-0"',
    '"/etc/passwd-0"',
    '"a\\u0000-0-0"',
    f'"dev-{"x" * 300}-0-0"',
    '"x-1-0-0"',
)
OWN = {
    "hateful_memes": lines(MEMES, lambda row: row, "img", NO_MEME),
    "nlvr2": lines(PAIRS, lambda row: row, "identifier", NO_PAIR),
}


@pytest.mark.parametrize("task", sorted(OWN))
@settings(max_examples=100)
@given(st.data())
def test_original_files_of_the_tasks(folder, task, data):
    """A broken line among good ones: the place of it, or rows as many as the file says."""
    given_lines = data.draw(st.lists(OWN[task], min_size=1, max_size=3))
    path = folder / "images" / "own.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in given_lines))
    options = argparse.Namespace(skip_missing=False)
    if task == "nlvr2":
        rows, _ = outcome(lambda: nlvr2.original_rows(path.parent, path.name, options, by_pair=False), path.parent)
    else:
        rows, _ = outcome(lambda: hateful_memes.challenge_rows(path.parent, path.name), path.parent)
    event("refused" if rows is None else "read")
    if rows is None:
        return
    assert not numbers_of(given_lines, "no_json", "no_row")
    records = [record for _, record in json_of(path.read_bytes())]
    if task == "hateful_memes":
        assert [row["images"][0]["path"] for row in rows] == [str(folder / "images" / one["img"]) for one in records]
    else:
        told = {text["user"].partition(" Is this statement")[0] for row in rows for text in row["texts"]}
        assert told == {one["sentence"] for one in records}


# --- pictures

SIZE = (24, 16)
FORMATS = {
    **{("PNG", mode): {} for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    **{("JPEG", mode): {} for mode in ("L", "RGB", "CMYK")},
    **{("GIF", mode): {} for mode in ("L", "P")},
    **{("TIFF", mode): {} for mode in ("1", "L", "I;16", "F", "RGB", "RGBA", "CMYK", "LAB")},
    ("TIFF", "RGB"): {"compression": "tiff_lzw"},
    **{("WEBP", mode): {} for mode in ("RGB", "RGBA")},
    **{("BMP", mode): {} for mode in ("L", "RGB")},
}


def encoded(kind, mode):
    picture = noise(*SIZE, {"I;16": "I", "LAB": "RGB"}.get(mode, mode))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 200)
    if mode == "LAB":
        picture = Image.merge("LAB", picture.split())
    content = io.BytesIO()
    picture.save(content, kind, **FORMATS[kind, mode])
    return content.getvalue()


WHOLE = {(kind, mode): encoded(kind, mode) for kind, mode in FORMATS}


def with_size(kind, content, width, height):
    """The same file with another size in its header."""
    changed = bytearray(content)
    if kind == "PNG":
        changed[16:24] = struct.pack(">II", width % 2**32, height % 2**32)
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    elif kind == "GIF":
        changed[6:10] = struct.pack("<HH", width % 2**16, height % 2**16)
    elif kind == "BMP":
        changed[18:26] = struct.pack("<II", width % 2**32, height % 2**32)
    elif kind == "JPEG":
        start = content.index(b"\xff\xc0") + 5
        changed[start : start + 4] = struct.pack(">HH", height % 2**16, width % 2**16)
    elif kind == "TIFF":
        for tag, size in ((256, width), (257, height)):
            start = content.index(struct.pack("<H", tag), struct.unpack("<I", content[4:8])[0])
            changed[start : start + 12] = struct.pack("<HHII", tag, 4, 1, size % 2**32)
    else:
        changed[26:30] = struct.pack("<HH", width % 2**14, height % 2**14)
    return bytes(changed)


@pytest.fixture(scope="module")
def processor():
    return Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=1)


def processed(processor, image):
    """What training makes of a picture: finite pixels of the shape that they must have."""
    made = encode_example(processor, Example("here", [Turn("<|image_1|>\nQ?", "A", [image])]))
    assert made["pixel_values"].shape == (2, 3, 336, 336)
    assert made["pixel_values"].isfinite().all()
    return made["pixel_values"]


@pytest.mark.parametrize(("kind", "mode"), sorted(FORMATS))
def test_whole_pictures_of_every_kind(processor, kind, mode):
    """As PIL converts them; without this the test below could refuse everything."""
    image = decode_image({"bytes": WHOLE[kind, mode]}, "here")
    assert (image.format, image.size) == (kind, SIZE)
    try:
        expected = Image.open(io.BytesIO(WHOLE[kind, mode])).convert("RGB")
    except ValueError:  # PIL itself does not convert them
        assert mode == "LAB"
        with pytest.raises(UserError, match=r"^here: "):
            processed(processor, image)
        return
    assert processed(processor, image).equal(processed(processor, expected))


SIDES = st.sampled_from([0, 1, 24, 600, 40_000, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1])
SIZES = st.tuples(SIDES, SIDES) | st.just((9460, 9460))  # just above what PIL warns of, far below what it refuses


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damage that PIL goes on after
@many
@given(st.data())
def test_damaged_pictures(processor, data):
    """Cut, flipped, of another size than they say, or none at all: told with the place, or a picture."""
    kind, mode = data.draw(st.sampled_from(sorted(FORMATS)), label="kind")
    damage = data.draw(
        st.sampled_from(["cut", "flipped", "size", "size", "header", "bytes", "zeros", "joined"]), label="damage"
    )
    whole, limit, must_fail, told = WHOLE[kind, mode], Image.MAX_IMAGE_PIXELS, False, ""
    content = bytearray(whole)
    if damage == "cut":
        length = data.draw(st.integers(0, len(whole) - 1))
        content, must_fail = content[:length], length <= len(whole) // 2
    elif damage == "flipped":
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "size":
        width, height = data.draw(SIZES)
        content = with_size(kind, whole, width, height)
        if kind == "PNG" and min(width, height) > 0 and max(width, height) < 2**31 and width * height > limit:
            must_fail, told = True, f"{width * height} pixels"
    elif damage == "header":
        for position in range(data.draw(st.integers(1, 12))):
            content[position] = data.draw(st.integers(0, 255))
    elif damage == "bytes":
        content = data.draw(st.binary(max_size=64))
    elif damage == "zeros":
        content, must_fail = bytes(data.draw(st.integers(0, len(whole)))), True
    else:  # the beginning of one, the end of another
        other = WHOLE[data.draw(st.sampled_from(sorted(FORMATS)))]
        content = content[: data.draw(st.integers(0, len(whole)))] + other[data.draw(st.integers(0, len(other))) :]
    cell, where = {"bytes": bytes(content)}, "set, row 7: the image"
    with opening_images_by(open_header):  # what is read of every picture before training
        image, _ = outcome(lambda: decode_image(cell, "set, row 7"), where)
    assert image is None or image.width * image.height <= limit
    image, message = outcome(lambda: decode_image(cell, "set, row 7"), where)
    event(f"{damage}: {'refused' if image is None else 'a picture'}")
    if image is None:
        assert f"({len(content)} bytes)" in message
        assert told in message
        return
    assert not must_fail
    assert image.width * image.height <= limit
    if image.width * image.height < 10**6:  # more is right, and slow
        outcome(lambda: processed(processor, image), "here: ")  # told: too thin, or of a mode that PIL does not convert


@many
@given(
    st.one_of(VALUES, st.binary(max_size=9)),
    st.sampled_from(["cell", "bytes", "path"]),
)
@example({"bytes": None, "path": None}, "cell")
@example("a\x00b", "path")
@example("x" * 300, "path")
@example("\x1b[2J", "path")
def test_cells_of_other_types(value, where):
    cell = value if where == "cell" else {where: value}
    assert outcome(lambda: decode_image(cell, "set, row 7"), "set, row 7: ")[0] is None


# --- options

SCRIPTS = {"docvqa": docvqa, "hateful_memes": hateful_memes, "nlvr2": nlvr2, "ucf101": ucf101}
HUGE = 2**31 - 1

# What an option's value must be at least; "above" for what must be more.
AT_LEAST_1 = {
    *("batch_size", "batch_size_per_gpu", "num_train_epochs", "lora_rank", "logging_steps", "max_tokens_per_gpu"),
    *("max_crops_per_call", "eval_batch_size_per_gpu", "save_steps", "save_total_limit", "max_steps", "eval_steps"),
    *("eval_limit", "max_bad_steps", "max_new_tokens"),
}
AT_LEAST_0 = {"warmup_steps", "wd", "num_workers", "seed"}
SHARES = {"lora_dropout", "max_bad_fraction"}  # at least 0 and under 1
ABOVE_0 = {
    *("learning_rate", "lora_alpha_ratio", "vision_learning_rate", "projector_learning_rate"),
    *("grace_seconds", "timeout_minutes"),
}
CHOICES = {"gradient_checkpointing": CHECKPOINTING, "optim": OPTIMIZERS, "eval_split": ("test", "validation", "val")}
INTEGERS = (
    *("1", "1", "2", "3", "4", "8", "16", "64", "0", "-1", "17", "+5", "٣", str(HUGE), str(HUGE + 1)),
    *("1" + "0" * 30, "1" + "0" * 400, "1" * 5000, "", " ", "1.0", "1e3", "nan", "inf", "many", "0x10", "½"),
)
FLOATS = (
    *("0.5", "1e-5", "2", "1", "0", "-0.0", "-1", "1e308", "-1e308", "1e400", "1e-400", "nan", "inf", "-inf"),
    *("", "x", "1,5", "0x1p3", "½", "1" * 400),
)
TEXTS_OF_OPTIONS = (
    *("", " ", "a", "a/b/c", "./absent", "/proc/absent", "~", "~nobody/x", "x" * 300, "/" + "x" * 300, "y/" * 3000),
    *("auto", "never", "none", "tensorboard,none", "id:configuration", "ünïcödé", "\udcff", "a\x1b[2Jb", "-", "{}"),
    *("FOLDER", "FOLDER/file", "FOLDER/file/below", "ds_configs/zero2.json", "ds_configs/zero3.json"),
    *("FOLDER/deep.json", "FOLDER/list.json", "FOLDER/bytes.json", "FOLDER/stage.json", "FOLDER/empty.json"),
)


def out_of_range(name, value):
    """Whether the documents exclude the value."""
    if name == "num_crops":
        return not 1 <= value <= 16
    return (
        not -HUGE <= value <= HUGE  # nan too
        or (name in AT_LEAST_1 and value < 1)
        or (name in AT_LEAST_0 and value < 0)
        or (name in ABOVE_0 and value <= 0)
        or (name in SHARES and not 0 <= value < 1)
    )


@pytest.fixture(scope="module")
def parsers():
    """Every script's parser, its own options included."""
    with pytest.MonkeyPatch.context() as patched:
        for script in SCRIPTS.values():
            patched.setattr(script, "parse_options", lambda parser, **_: parser)
        return {name: script.parse() for name, script in SCRIPTS.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, with some files, as on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "file").write_text("x")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "list.json").write_text("[]")
    (folder / "bytes.json").write_bytes(b"\xff\xfe{")
    (folder / "stage.json").write_text('{"zero_optimization": {"stage": "two"}}')
    (folder / "empty.json").write_text("")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(torch.cuda, "is_available", lambda: False)
        yield folder


@st.composite
def arguments(draw, parser, folder):
    """What stands on the command line, and of every option with a value the last one given."""
    actions = [action for action in parser._actions if action.dest != "help"]
    given_arguments, last = [], {}
    for action in draw(st.lists(st.sampled_from(actions), max_size=6)):
        name = draw(st.sampled_from(action.option_strings))
        if action.nargs == 0:
            given_arguments.append(name)
            continue
        pool = {int: INTEGERS, float: FLOATS}.get(action.type) or action.choices or TEXTS_OF_OPTIONS
        pool = (*pool, "wrong") if action.choices else pool
        text = draw(st.sampled_from(pool)).replace("FOLDER", str(folder))
        joined = text.startswith("-") or draw(st.booleans())
        given_arguments += [f"{name}={text}"] if joined else [name, text]
        last[action.dest] = (action.type or str, text)
    junk = draw(st.sampled_from([None] * 20 + ["--absent", "positional", "--batch_size", "-x", "--learning_rat=1"]))
    return given_arguments + ([junk] if junk else []), last


def read(kind, text):
    """A value of its option's type, or None."""
    try:
        return kind(text)
    except ValueError:
        return None


@settings(max_examples=150)
@pytest.mark.parametrize("task", sorted(SCRIPTS))
@given(st.data())
def test_options(parsers, place, task, data):
    """Every wrong number is told, or every option is what was given and the batch can be divided."""
    told, last = data.draw(arguments(parsers[task], place))
    world = data.draw(st.sampled_from([1, 1, 2, 3, 8]))
    if task == "ucf101":
        told = ["--data_dir", str(place), *told]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["finetune", *told])
        patched.setenv("WORLD_SIZE", str(world))
        options, message = outcome(SCRIPTS[task].parse, "--", "there is no such option", printable=False)
    event("accepted" if options else "refused by argparse" if "(--help lists the options)" in message else "refused")
    if options is None:
        assert set(re.findall(r"--(\w+) \S+: it must", message)) <= set(last)  # no default is wrong
        for name, (kind, text) in last.items():
            value = read(kind, text)
            if kind is str or "(--help lists the options)" in message:
                continue
            if value is None or out_of_range(name, value):
                assert f"--{name} " in message, (name, text, message)
            else:
                assert re.search(rf"--{name} \S+: it must", message) is None, (name, text, message)
        return
    for name, (kind, text) in last.items():
        value = read(kind, text)
        assert value is not None
        adapted = options.dry_run and name in ("eval_limit", "max_steps", "eval_steps", "report_to")
        if name not in ("output_dir", "gradient_checkpointing") and not adapted:
            assert getattr(options, name) in (value, os.path.expanduser(text)), name
    for name, value in vars(options).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert not out_of_range(name, value), name
    at_once = options.num_processes * options.batch_size_per_gpu
    assert options.num_processes == world
    assert options.packs or options.eval_only or options.batch_size == options.accumulation * at_once
    assert not options.packs or options.accumulation is None
    assert not (options.max_tokens_per_gpu and options.batch_size_per_gpu > 1)
    assert round(options.lora_rank * options.lora_alpha_ratio) >= 1
    assert options.method in ("full", "frozen", "lora", "qlora")
    assert (options.use_lora, options.use_qlora) == (options.method in ("lora", "qlora"), options.method == "qlora")
    assert (options.use_flash_attention, options.use_liger) == (False, False)  # there is no GPU
    assert isinstance(options.output_dir, Path)
    assert not (options.deepspeed or "").startswith(str(place))  # those are no configurations
    for name, choices in CHOICES.items():
        assert getattr(options, name, choices[0]) in choices


@pytest.mark.parametrize("task", sorted(SCRIPTS))
def test_every_number_has_a_range(parsers, task):
    """A new option must get one here, so that the test above knows what is wrong."""
    numbers = {action.dest for action in parsers[task]._actions if action.type in (int, float)}
    assert numbers - (AT_LEAST_1 | AT_LEAST_0 | ABOVE_0 | SHARES) == {"num_crops"}


@pytest.mark.parametrize("task", sorted(SCRIPTS))
def test_only_help_exits(parsers, monkeypatch, capsys, task):
    monkeypatch.setattr(sys, "argv", ["finetune", "--batch_size", "2", "--help"])
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[task].parse()
    assert ended.value.code == 0
    assert "--batch_size N" in capsys.readouterr().out


# --- packs

IMAGE_ID, IGNORED = 9, -100


@st.composite
def epochs(draw):
    """Questions of any length about few pictures, encoded; a question without a picture has a number of its own."""
    prefixes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    asked = draw(st.lists(st.tuples(st.integers(0, len(prefixes) - 1), st.integers(2, 40)), min_size=1, max_size=24))
    # one that parts the questions, where there are several lengths, or none does
    threshold = draw(st.sampled_from([10_000] * 5 + [prefixes[picture] + own - 1 for picture, own in asked]))
    numbers, pictures, picture_tokens, made = {}, [], [], []
    for question, (picture, own) in enumerate(asked):
        prefix = prefixes[picture]
        key = (picture, prefix + own > threshold) if prefix else ("alone", question)
        pictures.append(numbers.setdefault(key, len(numbers)))
        if len(picture_tokens) < len(numbers):
            picture_tokens.append(prefix)
        ids = torch.cat([torch.full((prefix,), IMAGE_ID), 1000 + 100 * question + torch.arange(own)])
        labels = torch.full_like(ids, IGNORED)
        labels[-1:] = ids[-1:]
        of_picture = {"pixel_values": torch.full((1, 1), picture), "image_sizes": torch.full((1, 2), picture)}
        made.append({"input_ids": ids, "labels": labels, **(of_picture if prefix else {})})
    questions = Questions(pictures, picture_tokens, [own for _, own in asked])
    return questions, made, threshold


def unpacked(batch):
    """A packed row's questions, each as it was: (ids, labels, weight)."""
    ids, labels, positions, branches = (
        batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids", "branch_ids")
    )
    found, prefix = [], []
    for place, branch in enumerate(branches):
        if branch == SHARED:
            if positions[place] == 0:
                prefix = []
            prefix.append(place)
            assert labels[place] == IGNORED
            continue
        if len(found) <= branch:
            found.append(list(prefix) if positions[place] else [])
        assert branch == len(found) - 1  # one after another
        assert positions[place] == len(found[-1])
        found[-1].append(place)
    weights = batch["loss_weights"].tolist()
    assert len(weights) == len(found)
    return [
        ([ids[place] for place in places], [labels[place] for place in places], weight)
        for places, weight in zip(found, weights, strict=True)
    ]


@many
@given(epochs(), st.integers(1, 4), st.integers(1, 12), st.integers(30, 400), st.integers(0, 3), st.integers(1, 2))
def test_packs(of, world, batch_size, max_tokens, seed, num_epochs):
    """Every question once per epoch, each as it was encoded; steps that are means; no pack too long; ranks in step."""
    questions, made, threshold = of
    longest = max(len(one["input_ids"]) for one in made)

    def samplers():
        return [
            PackedBatchSampler(questions, batch_size, max_tokens, rank, world, seed, num_epochs)
            for rank in range(world)
        ]

    ranks, message = outcome(samplers, f"--max_tokens_per_gpu {max_tokens}: example ")
    if ranks is None:
        named = int(re.search(r"example (\d+) alone has about (\d+) tokens", message)[1])
        assert len(made[named]["input_ids"]) == longest > max_tokens
        assert f"about {longest} tokens" in message
        return
    assert longest <= max_tokens
    micro_steps = ranks[0].micro_steps
    for epoch in range(num_epochs):
        seen: Counter[int] = Counter()
        for sampler in ranks:
            sampler.set_epoch(epoch)
        packs_of_ranks = [list(sampler) for sampler in ranks]
        assert (
            {len(packs) for packs in packs_of_ranks}
            == {len(ranks[0])}
            == {micro_steps * math.ceil(len(made) / batch_size)}
        )
        for start in range(0, len(ranks[0]), micro_steps):
            step = [one for packs in packs_of_ranks for one in packs[start : start + micro_steps]]
            own = [key for one in step for group in one for key in group if key.weight]
            assert len(own) <= batch_size
            counts = 0.0
            for groups in step:
                keys = [key for group in groups for key in group]
                documents = []
                for group in groups:
                    encoded_group = [made[key.index] | {"loss_weight": key.weight} for key in group]
                    documents += share_pictures(encoded_group, IMAGE_ID, threshold)
                batch = pack(documents)
                tokens = sum(questions.tokens([key.index for key in group]) for group in groups)
                assert batch["input_ids"].shape[1] == tokens <= max_tokens
                expected = [
                    (
                        made[key.index]["input_ids"].tolist(),
                        made[key.index]["labels"].tolist(),
                        torch.tensor(key.weight, dtype=torch.float32).item(),
                    )
                    for key in keys
                ]
                assert unpacked(batch) == expected
                with_pictures = [one["pixel_values"] for one in documents if "pixel_values" in one]
                assert ("pixel_values" in batch) == bool(with_pictures)
                assert not with_pictures or batch["pixel_values"].equal(torch.cat(with_pictures))
                mean = sum(key.weight for key in keys) / len(keys)  # the model's, over the pack
                counts += mean / len(step)
                assert all(key.epoch == epoch for key in keys)
                assert all(
                    key.weight / len(keys) / len(step) == pytest.approx(1 / len(own)) for key in keys if key.weight
                )
                assert all(key.weight for key in keys) or len(keys) == 1
            assert counts == pytest.approx(1)
            seen.update(key.index for key in own)
        assert seen == Counter(range(len(made)))


def change(one, name, place):
    """The same with one of its numbers another."""
    values = one[name].clone()
    values.view(-1)[place % values.numel()] += 1
    return {**one, name: values}


WRONG = {
    "a token of the prefix": lambda one, place, prefix: change(one, "input_ids", place % prefix),
    "a pixel": lambda one, place, prefix: change(one, "pixel_values", place),
    "a picture's size": lambda one, place, prefix: change(one, "image_sizes", place),
    "a label in the prefix": lambda one, place, prefix: change(one, "labels", place % prefix),
    "a label at a branch's first token": lambda one, place, prefix: change(one, "labels", prefix),
    "no pixels": lambda one, place, prefix: {name: one[name] for name in one if name != "pixel_values"},
    "no sizes": lambda one, place, prefix: {name: one[name] for name in one if name != "image_sizes"},
}


def about_one_picture(prefix, own):
    """Encoded questions with so many tokens of the picture, and of their own."""
    group = []
    for question, length in enumerate(own):
        ids = torch.cat([torch.full((prefix,), IMAGE_ID), 1000 + 100 * question + torch.arange(length)])
        labels = torch.full_like(ids, IGNORED)
        labels[-1:] = ids[-1:]
        pixels = {"pixel_values": torch.ones(2, 3), "image_sizes": torch.ones(1, 2)}
        group.append({"input_ids": ids, "labels": labels, **pixels})
    return group


def test_a_first_question_with_fewer_tokens_of_the_picture():
    """Of which the others' beginning is the same."""
    first, second = about_one_picture(2, [2, 2])
    with pytest.raises(ValueError, match="questions that share pictures must"):
        share_pictures([change(first, "input_ids", 1), second], IMAGE_ID, 10_000)


@many
@given(
    *(st.integers(1, 40), st.lists(st.integers(2, 20), min_size=2, max_size=5), st.sampled_from(sorted(WRONG))),
    *(st.integers(0, HUGE), st.data()),
)
def test_questions_that_cannot_share(prefix, own, wrong, place, data):
    """Pictures, or text before their end, that differ; labels there: told, and never packed."""
    group = about_one_picture(prefix, own)
    assert len(share_pictures(group, IMAGE_ID, 10_000)) == 1
    which = data.draw(st.integers(0, len(group) - 1))
    group[which] = WRONG[wrong](group[which], place, prefix)
    with pytest.raises(ValueError, match="questions that share pictures must"):
        share_pictures(group, IMAGE_ID, 10_000)


# --- batches


class Keys(torch.utils.data.Dataset):
    """Gives back what it is asked for."""

    def __getitem__(self, key):
        return key


def loader(batches):
    return _EpochLoader(Keys(), batch_sampler=batches, collate_fn=list)


@many
@given(
    *(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3)),
    *(st.integers(0, HUGE), st.data()),
)
def test_batches(size, accumulation, world, at_once, epoch, seed, data):
    """Every example once, weights that sum to the batch size, ranks in step, the same batches however divided, and
    the same order from any place in the epoch."""
    batch_size = accumulation * world * at_once

    def batches(at_once, rank, world):
        made = GlobalBatchSampler(size, batch_size, at_once, rank, world, seed)
        made.set_epoch(epoch)
        return made

    ranks = [list(batches(at_once, rank, world)) for rank in range(world)]
    assert (
        {len(own) for own in ranks}
        == {len(batches(at_once, 0, world))}
        == {accumulation * math.ceil(size / batch_size)}
    )
    assert all(len(keys) == at_once for own in ranks for keys in own)
    whole = list(batches(batch_size, 0, 1))
    seen = Counter()
    for step, expected in enumerate(whole):
        rows = range(step * accumulation, (step + 1) * accumulation)
        keys = [key for row in rows for own in ranks for key in own[row]]
        assert keys == expected
        assert sum(key.weight for key in keys) == pytest.approx(batch_size)
        assert len({key.weight for key in keys if key.weight}) == 1
        assert {key.epoch for key in keys} == {epoch}
        seen.update(key.index for key in keys if key.weight)
    assert seen == Counter(range(size))
    skipped = data.draw(st.integers(0, len(ranks[0])))
    rank = data.draw(st.integers(0, world - 1))
    # as the Trainer goes on from a checkpoint: the rest of the epoch, whose number is told to the sampler within
    resumed = skip_first_batches(loader(GlobalBatchSampler(size, batch_size, at_once, rank, world, seed)), skipped)
    resumed.batch_sampler.batch_sampler.set_epoch(epoch)
    assert list(resumed) == ranks[rank][skipped:]


@settings(max_examples=50)
@given(epochs(), st.integers(1, 3), st.integers(1, 9), st.integers(0, 1), st.data())
def test_packs_from_any_place(of, world, batch_size, epoch, data):
    rank = data.draw(st.integers(0, world - 1))

    def batches():
        return PackedBatchSampler(of[0], batch_size, 400, rank, world, 5, 2)

    whole = loader(batches())
    whole.set_epoch(epoch)
    expected = list(whole)
    skipped = data.draw(st.integers(0, len(expected)))
    resumed = skip_first_batches(loader(batches()), skipped)
    resumed.batch_sampler.batch_sampler.set_epoch(epoch)
    assert list(resumed) == expected[skipped:]
    assert all(isinstance(key, ExampleKey) for groups in expected for group in groups for key in group)
