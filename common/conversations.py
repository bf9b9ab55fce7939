"""The JSONL format for anyone's own data: one conversation per line.

    {"id": "…", "source": "…", "conversations": [{"images": ["a/b.jpg"], "user": "…", "assistant": "…"}, …]}

A turn has any number of images, also none; paths are relative to the image folder and may not leave
it. `id` and `source` are optional. Images are numbered through the whole conversation; their tags
are put before the turn's text, which holds none itself.

Every fault has its file and line. Loading for training checks everything but the pixels: it opens
each picture and reads its header, 0.1 ms on a local disk, and decodes none. `tools/check_data.py`
runs the same functions and decodes every picture.
"""

from __future__ import annotations

import os
import re
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .collation import Example, Turn, encode_example
from .data import (
    check_length,
    decode_image,
    is_fault_of_the_machine,
    one_line,
    open_header,
    parse_line,
    path_inside,
    readable,
)
from .errors import UserError, first_of, raise_all
from .phi3v import Phi3VProcessor
from .phi3v.image_processing import CROP, plan_layout

ALL_FAULTS = "python -m tools.check_data lists all"
TURN_FIELDS = ("images", "user", "assistant")
# Of other formats, beside conversations: what the model would be trained without.
OTHERS_FIELDS = dict.fromkeys(("image", "video", "videos"), "a turn's pictures are its list images")
OTHERS_FIELDS |= {
    "messages": "turns are the list conversations",
    "system": "write it at the beginning of the user's text",
}
# What the tokenizer or the processor would not take as text: tags of images, marks of the chat template and of the
# beginning and end of a text, also where they are meant as HTML's.
CONTROL = re.compile(r"<\|(?:image(?:_\d+)?|user|assistant|system|end|endoftext|placeholder\d+)\|>|</?s>|<unk>")

Size = tuple[int, int]  # width and height in pixels


class Picture(NamedTuple):
    """An image that a line names."""

    turn: int  # from 1
    file: Path


@dataclass(frozen=True)
class Line:
    """One line of a file and what is wrong with it, its pictures not yet looked at.

    Attributes:
        number: from 1.
        record: the line's dictionary; empty where it holds none.
        pictures: in the order of their tags, without those whose path is refused.
        problems: without file and line.
        begin, length: where it stands in its file, in bytes.
    """

    number: int
    record: dict[str, Any]
    pictures: tuple[Picture, ...]
    problems: tuple[str, ...]
    begin: int = 0
    length: int = 0


class Records(Sequence[dict[str, Any]]):
    """The dictionaries of some of a file's lines, read when they are asked for: of a line 16 bytes are held.

    Args:
        path: the file, whose lines were checked.
        begins, lengths: of the lines, in bytes.
    """

    def __init__(self, path: Path, begins: array[int], lengths: array[int]) -> None:
        self.path, self.begins, self.lengths = path, begins, lengths
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: Any) -> Any:
        """A dictionary; for a slice the same for fewer lines.

        Raises:
            UserError: the file is another by now.
        """
        if isinstance(index, slice):
            return Records(self.path, self.begins[index], self.lengths[index])
        begin = self.begins[index]
        # at a place of its own, for the processes forked from this one read from the same file
        record, problem = parse_line(os.pread(self._file, self.lengths[index], begin))
        if record is None:
            raise UserError(f"{self.path}, byte {begin}: the file has changed since it was read ({problem})")
        return record


@dataclass(frozen=True)
class Conversations:
    """The checked lines of one file; images are opened when an example is asked for.

    Attributes:
        sizes: for every line, the sizes of its pictures in the order of their tags.
        faults: what is wrong with bad lines, by the lines' numbers, where these are examples that cannot be made
            (`--bad_examples skip`); None where a bad line is an error.
    """

    path: Path
    image_dir: Path
    lines: Sequence[int]
    records: Sequence[dict[str, Any]]
    sizes: Sequence[tuple[Size, ...]]
    faults: Mapping[int, str] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> str:
        """File and line of an example, for messages."""
        return f"{self.path}, line {self.lines[index]}"

    def first(self, count: int | None) -> Conversations:
        """The first `count` conversations; all of them where it is None."""
        first = {"lines": self.lines[:count], "records": self.records[:count], "sizes": self.sizes[:count]}
        return replace(self, **first)

    def without_images(self) -> Iterator[dict[str, Any]]:
        """The dictionaries of the lines one after another, which name their images; a bad line may hold none.

        One whose picture is damaged holds its own, so that a run whose picture was mended is known again.
        """
        for index in range(len(self)):
            try:
                record = self.records[index]
            except UserError:
                if not self._is_bad(index):
                    raise
                continue
            yield record

    def without_bad(self) -> Iterator[dict[str, Any]]:
        """The dictionaries of the lines that are not bad, so with every field, one after another."""
        return (self.records[index] for index in range(len(self)) if not self._is_bad(index))

    def _is_bad(self, index: int) -> bool:
        return self.faults is not None and self.lines[index] in self.faults

    def example(self, index: int) -> Example:
        """One conversation; the tags of a turn's images stand before its text, as in the published recipe.

        Raises:
            UserError: a bad line, or a picture that cannot be decoded.
        """
        place = self.place(index)
        if self._is_bad(index):
            raise UserError(f"{place}: {self.faults[self.lines[index]]}")
        record = self.records[index]
        files = [
            path_inside(self.image_dir, name, place)
            for turn in record["conversations"]
            for name in turn.get("images", ())
        ]
        images = [decode_image({"path": str(file)}, f"{place}, {readable(file)}") for file in files]
        return Example(place, make_turns(record, images))


class _SizesOnly:
    """In place of the image processor: (width, height) instead of pictures, token counts and no pixels."""

    def __init__(self, num_crops: int) -> None:
        self.num_crops = num_crops

    def __call__(self, sizes: Sequence[Size], num_crops: int | None = None) -> dict[str, Any]:
        return {
            "num_img_tokens": [plan_layout(*size, num_crops or self.num_crops).num_img_tokens for size in sizes],
            "pixel_values": torch.zeros(0, 3, CROP, CROP),
            "image_sizes": torch.zeros(0, 2, dtype=torch.long),
        }


def make_turns(record: dict[str, Any], images: Sequence[Any]) -> list[Turn]:
    """A line's turns, each with its own of the conversation's images and their tags."""
    turns, used = [], 0
    for turn in record["conversations"]:
        own = images[used : used + len(turn.get("images", ()))]
        tags = "".join(f"<|image_{number}|>" for number in range(used + 1, used + len(own) + 1))
        used += len(own)
        turns.append(Turn(f"{tags}\n{turn['user']}" if tags else turn["user"], turn["assistant"], own))
    return turns


def load_conversations(path: str | Path, image_dir: str | Path, bad_examples: str = "stop") -> Conversations:
    """Read a file and check every line: fields, types, tags, ids, and the pictures' presence and headers.

    Args:
        path: the JSONL file.
        image_dir: the folder that the image paths are relative to.
        bad_examples: with "skip" a bad line is an example that cannot be made, which training leaves out.

    Raises:
        UserError: with the file and line of every fault (the first 20 of them), unless bad lines are left out.
    """
    path, image_dir = Path(path), Path(image_dir)
    numbers, begins, lengths = array("Q"), array("Q"), array("Q")
    all_problems: list[str] = []
    faults: dict[int, str] = {}
    measured: dict[Path, Size | str] = {}
    sizes: list[tuple[Size, ...]] = []
    equal: dict[Any, Any] = {}  # of equal sizes one is kept
    for line in each_line(path, image_dir):
        for file in picture_files([line]):
            if file not in measured:
                size = measure_image(file)
                measured[file] = equal.setdefault(size, size)
        problems = find_problems(line, measured)
        all_problems += [f"{path}, line {line.number}: {problem}" for problem in problems]
        faults |= {line.number: "; ".join(problems)} if problems else {}
        own = () if problems else tuple(measured[picture.file] for picture in line.pictures)
        numbers.append(line.number)
        begins.append(line.begin)
        lengths.append(line.length)
        sizes.append(equal.setdefault(own, own))
    if bad_examples == "stop":
        raise_all(first_of(all_problems, str(path), ALL_FAULTS))
    if not numbers:
        raise UserError(f"{path} is empty")
    records = Records(path, begins, lengths)
    return Conversations(path, image_dir, numbers, records, tuple(sizes), faults if bad_examples == "skip" else None)


def check_lengths(data: Conversations, processor: Phi3VProcessor, limit: int) -> None:
    """Check, on every process alike, that every conversation can be encoded and is not too long for the model.

    Where bad lines are left out, training leaves these out too, and nothing is checked.

    Args:
        limit: the model's, in tokens (`max_position_embeddings`).

    Raises:
        UserError: with the file and line of every fault (the first 20 of them).
    """
    if data.faults is None:
        problems = [problem for _, problem in measure_lengths(data, processor, limit) if problem]
        raise_all(first_of(problems, str(data.path), ALL_FAULTS), everywhere=True)


def counting_processor(processor: Phi3VProcessor) -> Phi3VProcessor:
    """The same for (width, height) instead of pictures: the same tokens and no pixels."""
    return Phi3VProcessor(_SizesOnly(processor.image_processor.num_crops), processor.tokenizer)


def encode_without_pixels(counting: Phi3VProcessor, example: Example) -> dict[str, Any]:
    """An example as `encode_example` has it, of its pictures their sizes alone.

    Args:
        counting: as `counting_processor` makes it.
    """
    turns = [Turn(turn.user, turn.assistant, [image.size for image in turn.images]) for turn in example.turns]
    return encode_example(counting, Example(example.id, turns))


def measure_lengths(data: Conversations, processor: Phi3VProcessor, limit: int) -> list[tuple[int | None, str | None]]:
    """Encode every conversation as training does, but for the pixels; no picture is opened.

    Returns:
        The tokens, None where it cannot be encoded, and the fault with its place, None where there is none.
    """
    counting = counting_processor(processor)
    measured: list[tuple[int | None, str | None]] = []
    for index in range(len(data)):
        example, tokens = Example(data.place(index), make_turns(data.records[index], data.sizes[index])), None
        try:
            tokens = len(encode_example(counting, example)["input_ids"])
            check_length(example.id, tokens, limit)
            measured.append((tokens, None))
        except UserError as error:
            measured.append((tokens, str(error)))
    return measured


def read_lines(path: Path, image_dir: Path) -> list[Line]:
    """All that `each_line` gives."""
    return list(each_line(path, image_dir))


def each_line(path: Path, image_dir: Path) -> Iterator[Line]:
    """Read a file; check everything but the pictures themselves. Empty lines are passed over.

    Raises:
        UserError: when there is no such file.
    """
    line_of_id: dict[str, int] = {}
    end = 0
    try:
        with open(path, "rb") as file:
            for number, text in enumerate(file, start=1):
                begin, end = end, end + len(text)
                if not text.strip():
                    continue
                record, problem = parse_line(text)
                if record is None:
                    yield Line(number, {}, (), (problem,), begin, len(text))
                    continue
                problems, pictures = _check_record(record, image_dir)
                if isinstance(record.get("id"), str | int):
                    earlier = line_of_id.setdefault(str(record["id"]), number)
                    if earlier != number:
                        problems.append(f"line {earlier} has the id {record['id']!r} already")
                yield Line(number, record, tuple(pictures), tuple(problems), begin, len(text))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _check_record(record: dict[str, Any], image_dir: Path) -> tuple[list[str], list[Picture]]:
    """What is wrong with one line's dictionary, and the pictures it names."""
    problems, pictures = [], []
    if "id" in record and (not isinstance(record["id"], str | int) or isinstance(record["id"], bool)):
        problems.append(f"id must be a text or a whole number, not {type(record['id']).__name__}")
    if "source" in record and not isinstance(record["source"], str):
        problems.append(f"source must be a text, not {type(record['source']).__name__}")
    problems += [f"{name} stands in a turn, not beside conversations" for name in TURN_FIELDS if name in record]
    problems += [f"{name} is not read: {what}" for name, what in OTHERS_FIELDS.items() if name in record]
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return [*problems, "conversations must be a list with at least one turn"], []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            problems.append(f"turn {number} is {type(turn).__name__}, not a dictionary")
            continue
        problems += [f"turn {number}: {problem}" for problem in _check_turn(turn)]
        for name in _names(turn) or ():
            try:
                pictures.append(Picture(number, path_inside(image_dir, name, f"turn {number}")))
            except UserError as error:
                problems.append(str(error))
    return problems, pictures


def _check_turn(turn: dict[str, Any]) -> list[str]:
    problems = []
    for field in ("user", "assistant"):
        text = turn.get(field)
        if not isinstance(text, str) or not text.strip():
            problems.append(f"{field} must be a text that is not empty")
            continue
        if found := CONTROL.search(text):
            problems.append(
                f"{field} holds {found[0]}, which is no text to the model (the tags of images and the end of a "
                "turn are put there in training): take it out"
            )
    if _names(turn) is None:
        problems.append("images must be a list of paths")
    unknown = [name for name in turn if name not in TURN_FIELDS]  # a misspelt `images` would train without pictures
    return problems + [f"unknown field {name!r}; a turn has {', '.join(TURN_FIELDS)}" for name in unknown]


def _names(turn: dict[str, Any]) -> list[str] | None:
    """The images that a turn names; None where the field is no list of texts."""
    names = turn.get("images", [])
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def picture_files(lines: Iterable[Line]) -> list[Path]:
    """The files of all pictures, each once."""
    return list(dict.fromkeys(picture.file for line in lines for picture in line.pictures))


def measure_image(file: Path, decode: bool = False) -> Size | str:
    """A picture's size, or what is wrong with it.

    Args:
        decode: read all of it, as training will; else its header.

    Raises:
        UserError: the storage or the machine fails, which is no fault of the picture.
    """
    name = readable(file)
    try:
        if not file.is_file():
            return f"{name}: there is no such file"
        if decode:
            return decode_image({"path": str(file)}, name).convert("RGB").size
        with open_header(None, str(file)) as image:
            return image.size
    except Exception as error:  # a broken file can raise nearly anything in the decoder of its format
        if is_fault_of_the_machine(error):
            raise UserError(f"{name} cannot be read now: {one_line(error)}; see to that, then start again") from error
        return f"{name}: the image cannot be {'decoded' if decode else 'opened'}: {one_line(error.__cause__ or error)}"


def find_problems(line: Line, sizes: Mapping[Path, Size | str]) -> list[str]:
    """All that is wrong with a line, its pictures included."""
    wrong = [(picture, sizes[picture.file]) for picture in line.pictures if isinstance(sizes[picture.file], str)]
    return [*line.problems, *(f"turn {picture.turn}: {problem}" for picture, problem in wrong)]


def gather(path: Path, image_dir: Path, lines: Sequence[Line], sizes: Mapping[Path, Size | str]) -> Conversations:
    """The conversations of lines without faults."""
    return Conversations(
        path,
        image_dir,
        tuple(line.number for line in lines),
        tuple(line.record for line in lines),
        tuple(tuple(sizes[picture.file] for picture in line.pictures) for line in lines),
    )
