"""Bad inputs for training, generated; a script is started with each, ends with code 2 and names the place.

A kind is a function: (folder, random generator) -> the script, its options, and what the message has to name.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from common.demo import CHECKPOINT
from tests.forked import DOCVQA, UCF101, exit_code, fork

Case = tuple[str, tuple[Any, ...], tuple[str, ...]]
Make = Callable[[Path, random.Random], Case]
ROWS = 6
TEXT = {name: datasets.Value("string") for name in ("user", "assistant")}
LAYOUT = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(TEXT)})


def picture(seed: int, kind: str = "PNG") -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.RandomState(seed).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


# --- a parquet file for DocVQA


def rows() -> list[dict[str, Any]]:
    """In the layout of the_cauldron."""
    return [
        {
            "images": [{"bytes": picture(number), "path": None}],
            "texts": [{"user": f"What is {number}?", "assistant": str(number)}],
        }
        for number in range(ROWS)
    ]


def write(folder: Path, content: list[dict[str, Any]], features: datasets.Features | None = LAYOUT) -> Path:
    """Rows to a parquet file."""
    file = folder / "train.parquet"
    datasets.Dataset.from_list(content, features=features).to_parquet(file)
    return file


def bad_row(change: Callable[[dict[str, Any], random.Random], None], *named: str) -> Make:
    """One row of the file is changed; its number has to be named, and what else is given."""

    def make(folder: Path, generator: random.Random) -> Case:
        content, number = rows(), generator.randrange(ROWS)
        change(content[number], generator)
        file = write(folder, content)
        return DOCVQA, ("--train_data", file), (f"{file}, split train, row {number}", *named)

    return make


def bad_picture(change: Callable[[random.Random], bytes | None], *named: str) -> Make:
    """One row's picture is another."""
    return bad_row(lambda row, generator: row.update(images=[{"bytes": change(generator), "path": None}]), *named)


def truncated_picture(generator: random.Random) -> bytes:
    """Of either common format, cut off in its pixels."""
    whole = picture(generator.randrange(100), generator.choice(("PNG", "JPEG")))
    return whole[: generator.randrange(len(whole) // 4, len(whole) * 3 // 4)]


def bomb(generator: random.Random) -> bytes:
    """A PNG whose header promises more pixels than memory holds."""
    side = generator.randrange(10_000, 60_000)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def bad_file(change: Callable[[bytes, random.Random], bytes]) -> Make:
    """The file is no longer what it was; its name has to be named."""

    def make(folder: Path, generator: random.Random) -> Case:
        file = write(folder, rows())
        file.write_bytes(change(file.read_bytes(), generator))
        return DOCVQA, ("--train_data", file), (str(file),)

    return make


def bad_columns(change: Callable[[dict[str, Any], str], Any], *named: str) -> Make:
    """Every row has other columns or types."""

    def make(folder: Path, generator: random.Random) -> Case:
        name = generator.choice(("images", "texts"))
        file = write(folder, [change(row, name) for row in rows()], None)
        return DOCVQA, ("--train_data", file), (str(file), *named)

    return make


def other_fields(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Pairs of other names."""
    pairs = [{"question": text["user"], "answer": text["assistant"]} for text in row["texts"]]
    return {**row, "texts": pairs}


# --- JSON lines for UCF-101


def bad_line(change: Callable[[dict[str, Any], random.Random, Path], Any]) -> Make:
    """One line of the training file is another: bytes as they are, else as JSON; file and line have to be named."""

    def make(folder: Path, generator: random.Random) -> Case:
        images = folder / "images"
        images.mkdir()
        lines = []
        for number in range(ROWS):
            (images / f"{number}.png").write_bytes(picture(number))
            turn = {"images": [f"{number}.png"], "user": "Which?", "assistant": "Archery"}
            lines.append({"id": str(number), "source": "ucf101", "conversations": [turn]})
        good = [json.dumps(line).encode() for line in lines]
        (folder / "ucf101_val.jsonl").write_bytes(good[0])
        place = generator.randrange(1, ROWS)  # the first one's picture is the evaluation's too
        bad = change(lines[place], generator, images)
        content = [*good[:place], bad if isinstance(bad, bytes) else json.dumps(bad).encode(), *good[place + 1 :]]
        file = folder / "ucf101_train.jsonl"
        file.write_bytes(b"\n".join(content) + b"\n")
        return UCF101, ("--data_dir", folder), (f"{file}, line {place + 1}",)

    return make


def in_turn(**fields: Any) -> Make:
    """The turn of a line has other values; None for a field that is missing."""

    def change(line: dict[str, Any], generator: random.Random, images: Path) -> dict[str, Any]:
        turn = line["conversations"][0] | fields
        return {**line, "conversations": [{name: value for name, value in turn.items() if value is not None}]}

    return bad_line(change)


def cut_line(line: dict[str, Any], generator: random.Random, images: Path) -> bytes:
    """As of a copy that was interrupted."""
    text = json.dumps(line).encode()
    return text[: generator.randrange(1, len(text) - 1)]


def cut_picture(line: dict[str, Any], generator: random.Random, images: Path) -> dict[str, Any]:
    """Its header is whole, its pixels are not."""
    (images / line["conversations"][0]["images"][0]).write_bytes(truncated_picture(generator))
    return line


def wrong_encoding(line: dict[str, Any], generator: random.Random, images: Path) -> bytes:
    """Latin-1."""
    return json.dumps({**line, "source": "é"}, ensure_ascii=False).encode("latin-1")


# --- options


def options(*given: Any, named: tuple[str, ...]) -> Make:
    """Options as they are."""
    return lambda folder, generator: (DOCVQA, ("--train_data", write(folder, rows()), *given), named)


def wrong_numbers(folder: Path, generator: random.Random) -> Case:
    """Three at once, all of which are to be named."""
    names = ("batch_size", "save_steps", "lora_rank", "num_train_epochs", "eval_limit", "learning_rate", "wd")
    chosen = [f"--{name}" for name in generator.sample(names, 3)]
    values = [word for name in chosen for word in (name, -generator.randrange(1, 100))]
    return DOCVQA, ("--train_data", write(folder, rows()), *values), tuple(chosen)


def indivisible(folder: Path, generator: random.Random) -> Case:
    """A global batch that the micro-batch does not divide."""
    at_once = generator.randrange(2, 9)
    size = at_once * generator.randrange(1, 9) + generator.randrange(1, at_once)
    given = ("--batch_size", size, "--batch_size_per_gpu", at_once)
    return DOCVQA, ("--train_data", write(folder, rows()), *given), (f"--batch_size {size}", f"= {at_once}")


def below_a_file(folder: Path, generator: random.Random) -> Case:
    """An output folder that cannot be made."""
    (folder / "file").touch()
    given = ("--output_dir", folder / "file" / "out")
    return DOCVQA, ("--train_data", write(folder, rows()), *given), (f"--output_dir {folder}/file/out",)


def bad_checkpoint(change: Callable[[Path, random.Random], None]) -> Make:
    """The checkpoint to start from is damaged; its folder has to be named."""

    def make(folder: Path, generator: random.Random) -> Case:
        copy = folder / "checkpoint"
        shutil.copytree(CHECKPOINT, copy)
        change(copy, generator)
        return DOCVQA, ("--train_data", write(folder, rows()), "--model_name_or_path", copy), (str(copy),)

    return make


def bad_adapter(name: str) -> Make:
    """The adapter to train further has a file that is cut off; it has to be named."""

    def make(folder: Path, generator: random.Random) -> Case:
        copy = folder / "adapter"
        copy.mkdir()
        config = LoraConfig(base_model_name_or_path=str(CHECKPOINT), r=4, target_modules="lm_head")
        config.save_pretrained(copy)
        save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 96)}, copy / "adapter_model.safetensors")
        cut(name)(copy, generator)
        given = ("--train_data", write(folder, rows()), "--model_name_or_path", copy, "--use_lora", "--lora_rank", 4)
        return DOCVQA, given, (f"{copy}/{name}",)

    return make


def cut(name: str) -> Callable[[Path, random.Random], None]:
    """A file of the checkpoint is cut off."""

    def change(copy: Path, generator: random.Random) -> None:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: generator.randrange(len(content) // 2)])

    return change


def bad_deepspeed(folder: Path, generator: random.Random) -> Case:
    """A DeepSpeed configuration that is no JSON, or says nothing of ZeRO."""
    file = folder / "deepspeed.json"
    file.write_text(generator.choice(('{"zero_optimization": {"stage": 2}', "{}", "[]", "")))
    return DOCVQA, ("--train_data", write(folder, rows()), "--deepspeed", file), (f"--deepspeed {file}",)


KINDS: dict[str, Make] = {
    "picture cut off": bad_picture(truncated_picture),
    "picture of no bytes": bad_picture(lambda generator: b""),
    "picture of random bytes": bad_picture(lambda generator: generator.randbytes(500)),
    "picture that is a PDF": bad_picture(lambda generator: b"%PDF-1.7\n" + generator.randbytes(300)),
    "picture with too many pixels": bad_picture(bomb, "pixels", "limit of"),
    "no picture": bad_row(lambda row, generator: row.update(images=[])),
    "no question": bad_row(lambda row, generator: row.update(texts=[])),
    "empty answer": bad_row(lambda row, generator: row["texts"][0].update(assistant="")),
    "no answer": bad_row(lambda row, generator: row["texts"][0].update(assistant=None)),
    "parquet file cut off": bad_file(lambda content, generator: content[: generator.randrange(10, len(content) - 10)]),
    "parquet file of no bytes": bad_file(lambda content, generator: b""),
    "parquet file that is a web page": bad_file(lambda content, generator: b"<!DOCTYPE html><p>404</p>"),
    "column missing": bad_columns(lambda row, name: {name: row[name]}, "has the columns"),
    "column of another type": bad_columns(lambda row, name: {**row, "images": ["page.png"]}, "images"),
    "questions with other fields": bad_columns(other_fields, "split train, row 0"),
    "data set that is not there": options("--train_data", "./no/such", named=("--train_data ./no/such",)),
    "line cut off": bad_line(cut_line),
    "line that is a list": bad_line(lambda line, generator, images: [line]),
    "line not in UTF-8": bad_line(wrong_encoding),
    "line without conversations": bad_line(lambda line, generator, images: {"id": line["id"]}),
    "turn without an answer": in_turn(assistant=None),
    "turn without a user": in_turn(user=None),
    "turn whose images are a text": in_turn(images="0.png"),
    "turn whose answer is a number": in_turn(assistant=7),
    "image file that is not there": in_turn(images=["absent.png"]),
    "image path out of the folder": in_turn(images=["../ucf101_val.jsonl"]),
    "image file cut off": bad_line(cut_picture),
    "wrong numbers": wrong_numbers,
    "batch that cannot be divided": indivisible,
    "option that does not exist": options("--learning_rat", 1, named=("--learning_rat",)),
    "option that is no number": options("--max_steps", "many", named=("--max_steps", "many")),
    "output folder that cannot be written": options("--output_dir", "/proc/out", named=("--output_dir /proc/out",)),
    "output folder below a file": below_a_file,
    "checkpoint to resume that is not there": options("--resume", "checkpoint-7", named=("--resume checkpoint-7",)),
    "model's weights cut off": bad_checkpoint(cut("model.safetensors")),
    "model's configuration cut off": bad_checkpoint(cut("config.json")),
    "model without a tokenizer": bad_checkpoint(lambda copy, generator: (copy / "tokenizer.json").unlink()),
    "adapter's weights cut off": bad_adapter("adapter_model.safetensors"),
    "adapter's configuration cut off": bad_adapter("adapter_config.json"),
    "DeepSpeed's configuration broken": bad_deepspeed,
}


def try_bad_input(kind: str, number: int, folder: Path) -> dict[str, Any]:
    """Start the script with an input of a kind.

    Args:
        number: which of the kind; it decides where the fault is.
        folder: for the input, not there yet.

    Returns:
        Exit code, seconds, the message's end, and whether it is `clear`: code 2, the place named, no traceback.
    """
    folder.mkdir()
    generator = random.Random(f"{kind}-{number}")
    script, given, named = KINDS[kind](folder, generator)
    shared = ("--model_name_or_path", CHECKPOINT, "--output_dir", folder / "out", "--num_crops", 1, "--no-tqdm")
    shared += ("--max_steps", 1, "--batch_size", ROWS, "--eval_limit", 1, "--num_workers", number % 2)
    if script == DOCVQA:
        (folder / "eval").mkdir()
        datasets.Dataset.from_list(rows()[:1], features=LAYOUT).to_parquet(folder / "eval" / "test.parquet")
        shared += ("--eval_data", folder / "eval" / "test.parquet")
    log, began = folder / "log", time.monotonic()
    code = exit_code(fork(script, *shared, *given, log=log), timeout=300)
    text = log.read_text(errors="replace")
    clear = code == 2 and "Traceback" not in text and all(name in text for name in named)
    about = {"kind": kind, "number": number, "exit_code": code, "seconds": round(time.monotonic() - began, 1)}
    text = text.replace(f"{folder}/", "").replace(str(folder), ".")  # where that lay says nothing
    return {**about, "clear": clear, "message": text.partition("error: ")[2].strip()[-300:] or text[-300:]}
