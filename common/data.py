"""Rows of a data set on the hub or on disk, and the examples that are made of them.

Images stay encoded until an example is asked for: a row costs what its bytes cost, and a picture
that cannot be decoded is reported with its data set, split and row.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import random
import re
import traceback
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import datasets
import pyarrow.parquet as parquet
import torch
import torch.distributed as dist
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from .collation import Example, Turn, encode_questions
from .errors import UserError, about_to_fetch, first_of, is_first_process, raise_all, try_all
from .phi3v import Phi3VProcessor

# How a parquet file's name tells its split: `train-00000-of-00004.parquet`, `validation.parquet`.
SPLIT_NAMES = {"train": "train", "test": "test", "validation": "validation", "val": "validation", "valid": "validation"}
TEXT_FILES = (".jsonl", ".json", ".csv", ".tsv")  # that a data set of rows may be kept in elsewhere
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # of those beyond 16 bits, as JSON writes it
PICTURE = {"bytes", "path"}  # the fields of a picture's cell
FAULT = "fault"  # of a bad line, beside the fields of a row
SEEN_LATELY = 256  # pictures that need not be decoded again
# of storage that fails or a limit that is reached: the same picture may be read well a minute later
FAULTS_OF_THE_MACHINE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# About so many items a process's loader has ready at most, however many are taken at once: of one page at 16 crops
# each, 64 * 17 * 3 * 336 * 336 floats, 1.5 GB. Besides, there are those that were taken.
MOST_READY = 64
MAX_NAME = 255  # bytes in a part of a path, on every common file system

# What PIL warns of, `open_header` refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Rows:
    """One split of one data set, its images undecoded.

    Attributes:
        folders: where pictures may lie that are files of their own.
        numbers: of some rows of a split, which they are; None: all.
        faults: what is wrong with bad rows, by their numbers in the split.
        file, lines: of a split made of a file's lines, from which line each row begins, counted from 1.
    """

    source: str
    split: str
    table: datasets.Dataset
    folders: tuple[Path, ...]
    numbers: tuple[int, ...] | None = None
    faults: Mapping[int, str] = field(default_factory=dict)
    file: Path | None = None
    lines: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row.

        Raises:
            UserError: a bad row, no question, no pictures, or a picture's path that leaves the folders.
        """
        fault = self.faults.get(index if self.numbers is None else self.numbers[index])
        if fault is not None:
            raise UserError(fault)
        row = self.table[index]
        if not _asks(row):
            raise UserError(f"{self.place(index)}: there is no question, or one without text")
        cells = row["images"] if "images" in row else [row.get("image")]
        if not cells:
            raise UserError(f"{self.place(index)}: there is no image")
        for cell in cells:
            if cell and cell["bytes"] is None and cell["path"] is not None:
                cell["path"] = str(path_inside_one(self.folders, cell["path"], self.place(index)))
        return row

    @property
    def columns(self) -> set[str]:
        """The names of the columns."""
        return set(self.table.column_names)

    def without_images(self) -> Iterator[dict[str, Any]]:
        """The rows one after another, their images left where they are."""
        return iter(self.table.remove_columns(_image_columns(self.columns)))

    @functools.cached_property
    def picture_numbers(self) -> list[int]:
        """See `number_pictures`; all pictures are read for it, so once."""
        numbers: dict[tuple[Any, ...], int] = {}
        columns = _image_columns(self.columns)
        of_row = []
        for row in self.table.select_columns(columns):
            cells = [cell for name in columns for cell in ((row[name] or ()) if name == "images" else [row[name]])]
            of_row.append(numbers.setdefault(tuple(map(_identify, cells)), len(numbers)))
        return of_row

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        number = index if self.numbers is None else self.numbers[index]
        if self.file is not None:
            return f"{self.file}, line {self.lines[number]}"
        return f"{self.source}, split {self.split}, row {number}"

    def first(self, count: int | None) -> Rows:
        """The first `count` rows; all of them where it is None."""
        return self if count is None or count >= len(self) else self.select(range(count))

    def select(self, indices: Iterable[int]) -> Rows:
        """Some of the rows, in the order given."""
        chosen = list(indices)
        numbers = chosen if self.numbers is None else [self.numbers[index] for index in chosen]
        return replace(self, table=self.table.select(chosen), numbers=tuple(numbers))


def _asks(row: dict[str, Any]) -> bool:
    """Whether every question of a row has a text, as far as a column of a known layout holds them."""
    if "texts" in row:
        return bool(row["texts"]) and all((text or {}).get("user") for text in row["texts"])
    question = row.get("question", row.get("query", "there is no such column"))
    return bool(question.get("en") if isinstance(question, dict) else question)


def _image_columns(names: Iterable[str]) -> list[str]:
    return sorted({"image", "images"}.intersection(names))


def load_rows(source: str, split: str, layouts: Sequence[Sequence[str]], option: str, else_file: str = "") -> Rows:
    """Load a split from the hub or from disk.

    Args:
        source: a hub id, with a configuration where the data set has several (`ID:CONFIG`) and a commit, branch or
            tag where it is not the newest that is meant (`ID@REVISION`, `ID:CONFIG@REVISION`), a folder of
            parquet files, one parquet file, or a folder written by `datasets`' `save_to_disk`.
        split: `train`, `validation` or `test`.
        layouts: the known sets of columns; the rows must have all columns of one of them.
        option: the option that names the source, for messages. With `--data_dir`, which names one
            source for training and evaluation, the files must tell their split.
        else_file: the file that a folder of another layout would hold, for messages.

    Raises:
        UserError: a folder that is missing or holds no data, a split that is not there, a hub that
            cannot be reached, columns of no known layout or of other types, no rows.
    """
    path = Path(source).expanduser()
    is_local = os.path.exists(path)  # of a name too long Path.exists raises an error
    table = _load_local(path, split, option, else_file) if is_local else _load_from_hub(source, split, option)
    if not any(set(layout) <= set(table.column_names) for layout in layouts):
        known = "; ".join("+".join(layout) for layout in layouts)
        raise UserError(
            f"{source}, split {split}, has the columns {sorted(table.column_names)}; {option} needs {known}"
        )
    if len(table) == 0:
        raise UserError(f"{source}, split {split}, is empty: give {option} a data set with rows")
    table = _leave_images_encoded(table)
    for name in _image_columns(table.column_names):
        feature = table.features[name] if name == "image" else getattr(table.features[name], "feature", None)
        if not isinstance(feature, datasets.Image) and set(feature if isinstance(feature, dict) else ()) != PICTURE:
            raise UserError(f"{source}, split {split}: its column {name} holds {table.features[name]} and no pictures")
    if "answers" in table.column_names and not _holds_texts(table.features["answers"]):
        held = table.features["answers"]
        raise UserError(f"{source}, split {split}: its column answers holds {held} and no lists of texts")
    # a hub's data set that is a folder of pictures lies in the hub's cache, its archives in that of `datasets`
    here = path if path.is_dir() else path.parent
    folders = (here,) if is_local else (Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE))
    return Rows(source, split, table, folders)


def _holds_texts(feature: Any) -> bool:
    """Whether a column is of lists of texts, or of nothing; from a text single letters would be drawn as answers."""
    within = getattr(feature, "feature", feature if getattr(feature, "dtype", None) == "null" else None)
    return getattr(within, "dtype", None) in ("string", "large_string", "string_view", "null")


def _load_local(path: Path, split: str, option: str, else_file: str) -> datasets.Dataset:
    datasets.disable_progress_bars()
    if (path / "dataset_dict.json").is_file():
        tables = datasets.load_from_disk(str(path))
        # under its own name or another for the same: `val`
        name_of = {SPLIT_NAMES.get(name, name): name for name in tables} | {name: name for name in tables}
        _check_split(path, split, option, name_of)
        return tables[name_of[split]]
    if (path / "state.json").is_file():
        table = datasets.load_from_disk(str(path))
        name = str(table.split) if table.split is not None else None
        _check_split(path, split, option, [SPLIT_NAMES.get(name, name)])
        return table
    if path.is_file() and path.suffix.lower() in TEXT_FILES:
        raise UserError(
            f"{option} {path} is no parquet file: docs/data.md shows how one is made of rows and their pictures' files "
            "(conversations in JSONL are for finetune_hf_trainer_ucf101.py)"
        )
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        known = ["parquet files", "folder saved by datasets", *([else_file] if else_file else [])]
        raise UserError(f"{option} {path} holds no {', and no '.join(known)}: give one that does")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        stem = file.name.removesuffix(".parquet").split("-")[0].split("_")[0].split(".")[0]
        by_split.setdefault(SPLIT_NAMES.get(stem), []).append(file)
    _check_split(path, split, option, by_split)
    chosen = by_split.get(split) or by_split.get(None) or files
    folders = sorted({str(file.parent) for file in chosen})
    if len(folders) > 1:
        raise UserError(f"{option} {path} holds several data sets: give one of their folders, {', '.join(folders)}")
    try:
        if not any(parquet.read_metadata(file).num_rows for file in chosen):
            raise UserError(f"{path}, split {split}, is empty: give {option} a data set with rows")
        return datasets.Dataset.from_parquet([str(file) for file in chosen])
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if errno.ENOSPC in (getattr(one, "errno", None) for one in (error, error.__cause__)):
            raise UserError(
                f"{option} {chosen[0]} does not fit on the disk of {datasets.config.HF_DATASETS_CACHE}, where a copy "
                "is made: make room, or name another folder in the environment's HF_DATASETS_CACHE"
            ) from error
        raise UserError(
            f"{option} {chosen[0]} cannot be read as parquet ({one_line(error)}): fetch it again"
        ) from error


def _check_split(path: Path, split: str, option: str, found: Iterable[str | None]) -> None:
    """`found`: the splits that are there; None for one that does not tell its name."""
    known = {name for name in found if name is not None}
    # a file that is named for one use is that split, whatever it is called
    if split in known or (option != "--data_dir" and (None in found or path.is_file())):
        return
    if None in found:
        raise UserError(
            f"{option} {path} does not tell which split it is: call its file {split}.parquet, or save a dictionary of "
            "splits"
        )
    other = ", or add --eval_split validation" if split == "test" and "validation" in known else ""
    raise UserError(f"{option} {path} has the splits {sorted(known)}, not {split}: give a copy that has it{other}")


def _load_from_hub(source: str, split: str, option: str) -> datasets.Dataset:
    named, _, revision = source.partition("@")
    if source.startswith((".", "/", "~")) or named.count("/") > 1:
        raise UserError(f"{option} {source}: there is no such file or folder; give one, or a hub id")
    about_to_fetch()
    name, _, configuration = named.partition(":")
    try:
        return _load_split(name, configuration or None, split, revision or None)
    except ValueError as error:  # an unknown configuration or split: the library's message lists those there are
        raise UserError(f"{option} {source}: {one_line(error)} (a configuration is named ID:CONFIG)") from error
    except Exception as error:  # the hub's errors are of many kinds: connection, time-out, not found, gated
        raise UserError(
            f"{source} is no file or folder here, and could not be fetched from the hub as a data set "
            f"({type(error).__name__}: {one_line(error)}); "
            f"give a local copy with {' or '.join(sorted({'--data_dir', option}))}, or try `make demo`, which needs no "
            "network"
        ) from error


def _load_split(name: str, configuration: str | None, split: str, revision: str | None) -> datasets.Dataset:
    """A split of the hub, also under another name for the same (`val` for `validation`)."""
    try:
        return datasets.load_dataset(name, configuration, split=split, revision=revision)
    except ValueError as error:
        for other in (other for other, known in SPLIT_NAMES.items() if known == split and other != split):
            with contextlib.suppress(ValueError):
                return datasets.load_dataset(name, configuration, split=other, revision=revision)
        raise error


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing. PIL's name a place in memory, left out here."""
    return " ".join(re.sub(r"<_io\.BytesIO object at \w+>", "", str(error)).split())[:300] or type(error).__name__


def readable(name: object) -> str:
    """A name from the data for messages: escaped where a terminal would not show it as it is."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def _leave_images_encoded(table: datasets.Dataset) -> datasets.Dataset:
    encoded = datasets.Image(decode=False)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, encoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(encoded))
    return table


def open_header(content: bytes | None, path: str | None) -> Image.Image:
    """A picture whose size is known and whose pixels are not read yet.

    Raises:
        DecompressionBombError: for more pixels than PIL's limit, above which PIL itself only warns.
        ValueError: for PostScript, which PIL would have Ghostscript run.
        Exception: of nearly any kind, from the decoder of a broken file's format.
    """
    image = Image.open(io.BytesIO(content) if content is not None else path)
    if image.format == "EPS":
        raise ValueError("it is PostScript, a program and no picture: convert it to PNG")
    return _within_limit(image)


def _within_limit(image: Image.Image) -> Image.Image:
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if pixels > limit:
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} = {pixels} pixels are above the limit of {limit}: scale it down"
        )
    return image


def open_pixels(content: bytes | None, path: str | None) -> Image.Image:
    """A picture, decoded; errors as of `open_header`."""
    image = open_header(content, path)
    image.load()
    return _within_limit(image)  # some formats hold a picture of another size than they say


class WholeOnce:
    """Decodes pictures, to find damage; of one that was seen lately, as for another question, only the header."""

    def __init__(self) -> None:
        self._seen: deque[bytes | str | None] = deque(maxlen=SEEN_LATELY)

    def __call__(self, content: bytes | None, path: str | None) -> Image.Image:
        """A picture, of the size it has; errors as of `open_pixels`."""
        which = _identify({"bytes": content, "path": path})
        if which in self._seen:
            return open_header(content, path)
        image = open_pixels(content, path)
        self._seen.append(which)
        return image


_opener: ContextVar[Callable[[bytes | None, str | None], Image.Image]] = ContextVar("opener", default=open_pixels)


@contextlib.contextmanager
def opening_images_by(opener: Callable[[bytes | None, str | None], Image.Image]) -> Iterator[None]:
    """Let `decode_image` open pictures in another way: their headers only, or each once.

    Args:
        opener: (content, path), one of them None -> the picture.
    """
    token = _opener.set(opener)
    try:
        yield
    finally:
        _opener.reset(token)


def is_fault_of_the_machine(error: Exception) -> bool:
    """Whether the storage or the machine failed, for what is read then may be in order."""
    return isinstance(error, OSError) and error.errno in FAULTS_OF_THE_MACHINE


def decode_image(cell: Any, place: str) -> Image.Image:
    """An image column's cell -> a decoded PIL image of the file's own mode.

    Args:
        cell: `{"bytes": …, "path": …}` as image columns hold it, or a PIL image.
        place: where it stands, for the message.

    Raises:
        UserError: no image there, or a file that cannot be decoded.
        OSError: the storage or the machine fails, which is no fault of the image.
    """
    if isinstance(cell, Image.Image):
        return cell
    cell = {} if cell is None else cell
    if not isinstance(cell, dict):
        raise UserError(f"{place}: there is no image but {type(cell).__name__}")
    content, path = cell.get("bytes"), cell.get("path")
    if content is None and path is None:
        raise UserError(f"{place}: there is no image")
    try:
        return _opener.get()(content, None if content is not None else path)
    except Exception as error:  # a broken file can raise nearly anything in the decoder of its format
        if is_fault_of_the_machine(error):
            raise
        size = f" ({len(content)} bytes)" if isinstance(content, bytes) else ""
        which = size if content is not None or readable(path) in place else f" {readable(path)}"
        raise UserError(f"{place}: the image{which} cannot be decoded: {one_line(error)}") from error


def check_answers(
    rows: Rows,
    questions_of: Callable[[dict[str, Any]], Sequence[Any]],
    bad_examples: str = "stop",
    advice: str = "leave the row out",
) -> Rows:
    """Check, without decoding an image, that every row has answers, before hours depend on it.

    Args:
        questions_of: a row without its image columns -> its questions, each with its accepted answers.
        bad_examples: with "skip" nothing is checked here: an example without an answer is left out in training.
        advice: what to do, for the message.

    Returns:
        The same rows.

    Raises:
        UserError: with the places of rows without answers, or with fields of other types (the first 20 of them).
    """
    if bad_examples == "skip":
        return rows
    problems = []
    for index, row in enumerate(rows.without_images()):
        try:
            questions = questions_of(row)
            if not questions or not all(accepted and all(accepted) for _, accepted in questions):
                problems.append(f"{rows.place(index)} has no answer: {advice}")
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(f"{rows.place(index)} has not the fields of its layout ({one_line(error)})")
    raise_all(first_of(problems, f"{rows.source}, split {rows.split}"))
    return rows


def with_answers(train_rows: Rows | None, eval_rows: Rows, options: argparse.Namespace) -> tuple[Rows | None, Rows]:
    """Rows of the_cauldron's layout, once it is known that every text has an answer; see `check_answers`.

    Args:
        train_rows: None where nothing is trained.
        options: of which `bad_examples` counts.
    """

    def questions(row: dict[str, Any]) -> list[tuple[str, list[str]]]:
        return [(text["user"], [text["assistant"]]) for text in row["texts"]]

    def check_train_rows() -> None:
        if train_rows is not None:
            check_answers(train_rows, questions, options.bad_examples)

    try_all(lambda: check_answers(eval_rows, questions, advice="evaluate on rows with answers"), check_train_rows)
    return train_rows, eval_rows


def fingerprint(rows: Any) -> str:
    """How many rows there are and a digest of all but their pictures' pixels, by which a data set is known again.

    Args:
        rows: with `without_images()`, as `Rows` and `Conversations` have it.
    """
    digest = hashlib.blake2b(digest_size=8)
    for record in rows.without_images():
        digest.update(repr(sorted(record.items())).encode("utf-8", "surrogatepass"))
    return f"{len(rows)} rows, {digest.hexdigest()}"


def split_off_first(rows: Rows, count: int, options: argparse.Namespace) -> tuple[Rows | None, Rows]:
    """The rows from `count` on, to train on, and the first `count`, to evaluate on: as published for the_cauldron.

    With `--eval_only` there are none to train on.

    Raises:
        UserError: when nothing is left to train on.
    """
    if options.eval_only:
        return None, rows.first(count)
    if len(rows) <= count:
        raise UserError(f"{rows.source} has {len(rows)} rows; the first {count} are for evaluation: none to train on")
    return rows.select(range(count, len(rows))), rows.select(range(count))


def number_questions(rows: Rows, each: bool) -> list[tuple[int, int | None]]:
    """What an epoch holds, as (row, question): each of a row's `texts`, or every row once, its question None."""
    if not each or "texts" not in rows.columns:
        return [(row, None) for row in range(len(rows))]
    texts = rows.table.select_columns(["texts"])
    # a row without any counts as one: what is wrong with it is told where it would be asked
    counts = [max(1, len(row["texts"] or ())) for row in texts]
    return [(number, question) for number, count in enumerate(counts) for question in range(count)]


def number_pictures(rows: Rows, questions: Sequence[tuple[int, int | None]] | None = None) -> list[int]:
    """For every question the number of its row's pictures, counted from 0; nothing is decoded.

    Rows whose pictures have the same content, or lie in the same files, have the same number.

    Args:
        questions: what `number_questions` made; without it every row counts once.
    """
    of_row = rows.picture_numbers
    return of_row if questions is None else [of_row[row] for row, _ in questions]


def _identify(cell: dict[str, Any] | None) -> bytes | str | None:
    """What is the same for the same picture: a digest of its content, or its path."""
    content = (cell or {}).get("bytes")
    return (cell or {}).get("path") if content is None else hashlib.blake2b(content, digest_size=16).digest()


def parse_line(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """A line's dictionary, or None and what is wrong.

    Python's reader also takes NaN and Infinity, halves of characters, and of a field given twice the last one; all
    of these are refused. A byte order mark, as some editors put before the first line, is no part of it.
    """
    try:
        text = line.decode("utf-8-sig")
        record = json.loads(text, parse_constant=_refuse_number, object_pairs_hook=_fields_once)
        if HALF_CHARACTER.search(text):  # two halves may have made a whole
            json.dumps(record, ensure_ascii=False).encode()
    except UserError as error:
        return None, str(error)
    except UnicodeEncodeError as error:
        return None, f"half a character, {error.object[error.start : error.end]!a}"
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return None, f"no JSON in UTF-8 ({one_line(error)})"
    if not isinstance(record, dict):
        return None, f"{type(record).__name__} instead of a dictionary"
    return record, ""


def _refuse_number(name: str) -> NoReturn:
    raise UserError(f"{name} is no number in JSON: write null, or leave the field out")


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise UserError(f"the field {twice!r} stands twice in one dictionary")
    return fields


def rows_of_file(
    folder: Path,
    name: str,
    make_row: Callable[[dict[str, Any], str], dict[str, Any]],
    bad_examples: str = "stop",
    skip_missing: bool | None = None,
    merge_by: str | None = None,
) -> Rows:
    """The rows of a file with one JSON value per line; empty lines are passed over.

    Args:
        folder: with the data.
        name: of the file in it.
        make_row: (a line's dictionary, file and line for messages) -> a row in the_cauldron's layout, with an `id`, and
            in `images` the pictures' files, None for one that is not there.
        bad_examples: with "skip" a bad line is an example that cannot be made, which training leaves out. One whose
            picture is missing keeps its text, so that it is the same run when the picture is there.
        skip_missing: whether lines whose images are missing make no rows; None where that is not offered.
        merge_by: a row's field: lines that have the same there make one row, whose `id` it becomes, with all `texts`.

    Raises:
        UserError: no such file; lines that `parse_line` or `make_row` refuse, with file and line, and examples whose
            images are missing (the first ten of them), unless they are left out; no rows.
    """
    path = folder / name
    problems, missing, lines = [], [], array("Q")
    rows: dict[Any, dict[str, Any]] = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row, fault = _make_row(line, place, make_row), ""
                except UserError as error:
                    row, fault = {"id": f"{name}, line {number}", "images": [], "texts": []}, str(error)
                    problems.append(fault)
                if None in row["images"]:
                    if skip_missing or bad_examples == "stop":
                        missing.append(row["id"])
                        continue
                    fault = f"{place}: {readable(row['id'])}: its image is missing"
                row["images"] = [{"bytes": None, "path": picture and str(picture)} for picture in row["images"]]
                row |= {FAULT: fault} if fault else {}
                key = number if merge_by is None else row.pop(merge_by, number)
                if key in rows:
                    rows[key]["texts"] += row["texts"]
                else:
                    rows[key] = row if key == number else {**row, "id": key}
                    lines.append(number)
    except OSError as error:
        there = sorted(one.name for one in folder.glob(f"*{path.suffix}")) if folder.is_dir() else []
        there = f" ({folder} has {', '.join(map(readable, there[:10]))})" if there else ""
        raise UserError(f"{path} cannot be read: {error.strerror}{there}") from error
    found = problems if bad_examples == "stop" else []
    try_all(
        lambda: raise_all(first_of(found, str(path))), lambda: report_missing(path, missing, skip_missing, not rows)
    )
    if not rows:
        raise UserError(f"{path} is empty: it holds no line with an example")
    of_lines = rows_of_records(str(folder), os.path.splitext(name)[0], list(rows.values()))
    return replace(of_lines, file=path, lines=lines)


def _make_row(line: bytes, place: str, make_row: Callable[[dict[str, Any], str], dict[str, Any]]) -> dict[str, Any]:
    record, problem = parse_line(line)
    if record is None:
        raise UserError(f"{place}: {problem}")
    try:
        row = make_row(record, place)
        images = [picture if picture is not None and picture.is_file() else None for picture in row["images"]]
        return {**row, "images": images}
    except OSError as error:  # of a name too long, or a folder that may not be read
        raise UserError(f"{place}: {error.strerror}: {readable(str(error.filename)[:100])}") from error


def rows_of_records(source: str, split: str, records: Sequence[dict[str, Any]]) -> Rows:
    """Rows of dictionaries, one or more, where a picture is `{"bytes": None, "path": …}`; a fault makes one bad."""
    faults = {number: record[FAULT] for number, record in enumerate(records) if FAULT in record}
    kept = [{name: value for name, value in record.items() if name != FAULT} for record in records]
    return Rows(source, split, datasets.Dataset.from_list(kept), (Path(source),), faults=faults)


def path_inside(folder: Path, name: str, place: str) -> Path:
    """A file named in the data, which must lie inside the data's folder.

    Where links lead does not matter: data are often kept elsewhere, and the hub's own cache is made of links.

    Raises:
        UserError: for a path that leaves the folder, or that no file can have.
    """
    return path_inside_one((folder,), name, place)


def path_inside_one(folders: Sequence[Path], name: str, place: str) -> Path:
    """As `path_inside`, of several folders; a relative path is the first one's."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        parts = []
    if not parts or b"\0" in b"".join(parts) or max(map(len, parts)) > MAX_NAME:
        raise UserError(f"{place}: {readable(name)} can be no file's path")
    path = Path(os.path.abspath(folders[0] / name))
    if not any(path.is_relative_to(os.path.abspath(folder)) for folder in folders):
        outside = " or ".join(map(str, folders))
        raise UserError(f"{place}: the path {readable(name)} leaves the folder {outside}")
    return path


class ImageFinder:
    """The pictures of a folder by their names without an ending, which tells nothing about the format.

    Every sub-folder is listed once.

    Args:
        folder: that the pictures may not leave.
        inside: its sub-folders where the names may begin, in order.
    """

    def __init__(self, folder: Path, inside: Sequence[str] = (".",)) -> None:
        self.folder, self.inside = folder, inside
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, name: str, place: str) -> Path | None:
        """The file `<folder>/<inside>/<name>.*`, of several the first by name; None where there is none.

        Raises:
            UserError: for a path that leaves the folder.
        """
        for inside in self.inside:
            path = path_inside(self.folder, f"{inside}/{name}", place)
            if path.parent not in self._listed:
                files = sorted(path.parent.iterdir(), reverse=True) if path.parent.is_dir() else []
                self._listed[path.parent] = {file.stem: file for file in files}
            if path.name in self._listed[path.parent]:
                return self._listed[path.parent][path.name]
        return None


def report_missing(file: Path, missing: Sequence[Any], skip: bool | None = None, everywhere: bool = False) -> None:
    """Tell of examples whose images are missing.

    Args:
        file: that names them.
        missing: the examples' ids.
        skip: whether the user wants to go on without them (`--skip_missing`); None where that is not offered.
        everywhere: no other example is left.

    Raises:
        UserError: unless there are none, or they are to be skipped.
    """
    if not missing:
        return
    which = f"{len(missing)} examples of {file} whose images are missing: " + ", ".join(map(readable, missing[:10]))
    if len(missing) > 10:
        which += f" and {len(missing) - 10} more"
    if everywhere or not skip:
        remedy = f"see that the images lie below {file.parent} as they are published, or fetch them again"
        if skip is not None and not everywhere:
            remedy += ", or add --skip_missing to leave such examples out"
        raise UserError(f"there are {which}{' (and none that has them)' if everywhere else ''}; {remedy}")
    if is_first_process():
        print(f"left out {which}", flush=True)


class ExampleKey(NamedTuple):
    """What the sampler asks the data set for."""

    index: int
    epoch: int
    weight: float


class Problem(NamedTuple):
    """What is wrong with an example; `text` names its place."""

    index: int
    epoch: int
    text: str


class ExampleDataset(torch.utils.data.Dataset):
    """Examples by number; whatever is drawn by chance depends on the seed, the epoch and the number alone.

    So an epoch can be begun anywhere, by any process, and draws the same.

    Args:
        size: how many examples an epoch has.
        make_example: (number, random generator) -> the example.
        processor: encodes the examples, in the loader's workers.
        seed: of all draws.
        pictures: for every example the number of its pictures, where examples with the same ones are to
            share them (`number_pictures`).

    Attributes:
        max_tokens: of an example, the model's limit; None for no limit.
        skips_bad: whether a filler takes the place of an example that cannot be made (`--bad_examples skip`);
            else it is an error.
        measured: what `common.packing.measure_questions` has found of the run's epochs; None before.
    """

    def __init__(
        self,
        size: int,
        make_example: Callable[[int, random.Random], Example],
        processor: Phi3VProcessor,
        seed: int = 0,
        pictures: Sequence[int] | None = None,
    ) -> None:
        self.size = size
        self.make_example = make_example
        self.processor = processor
        self.seed = seed
        self.pictures = pictures
        self.max_tokens: int | None = None
        self.skips_bad = False
        self.measured: Any = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: ExampleKey | int | list[ExampleKey]) -> dict[str, Any] | list[dict[str, Any]]:
        """An encoded example with its `loss_weight`; for a list of keys, a group about the same pictures, each one.

        Raises:
            UserError: an example that cannot be made, unless such are skipped. Then a few tokens without a picture
                stand for it, with weight 0 and a `problem`.
        """
        if not isinstance(key, list):
            return self[[key if isinstance(key, ExampleKey) else ExampleKey(key, 0, 1.0)]][0]
        try:
            return self._encode(key)
        except UserError as error:
            if not self.skips_bad:
                raise
            if len(key) > 1:
                return [self[one] for one in key]  # each by itself, for some may be good
            (filler,) = encode_questions(self.processor, [Example("filler", [Turn("", "-")])])
            problem = Problem(key[0].index, key[0].epoch, str(error))
            return [{**filler, "loss_weight": 0.0, "problem": problem}]

    def _encode(self, keys: Sequence[ExampleKey]) -> list[dict[str, Any]]:
        with opening_images_by(functools.cache(open_pixels)):  # every picture decoded once, and the same object
            examples = [self.example(one.index, one.epoch) for one in keys]
        encoded = encode_questions(self.processor, examples)
        if self.max_tokens is not None:
            for example, one in zip(examples, encoded, strict=True):
                check_length(example.id, len(one["input_ids"]), self.max_tokens)
        return [{**one, "loss_weight": key.weight} for one, key in zip(encoded, keys, strict=True)]

    def example(self, index: int, epoch: int) -> Example:
        """The example as it is drawn in that epoch.

        Raises:
            UserError: an example that cannot be made.
        """
        generator = random.Random(f"{self.seed}-{epoch}-{index}")
        return made(functools.partial(self.make_example, index, generator), index)


def made(make: Callable[[], Example], index: int) -> Example:
    """The example that `make` makes; what goes wrong in it, as where a row has no value, as an error for the user.

    Raises:
        UserError: with the example's number and the line of code that failed.
        OSError: the storage or the machine fails, which is no fault of the example.
    """
    try:
        return make()
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        if is_fault_of_the_machine(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)[1:2]
        where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})" for frame in frames)
        raise UserError(
            f"example {index} cannot be made of its row: {type(error).__name__}: {one_line(error)}{where}"
        ) from error


def check_length(place: str, tokens: int, limit: int) -> None:
    """Check an example's length against the model's limit.

    Raises:
        UserError: with both numbers.
    """
    if tokens > limit:
        raise UserError(
            f"{place}: {tokens} tokens, the model takes {limit}: lower --num_crops, give fewer pictures or turns, or "
            "leave it out"
        )


def loader_context(num_workers: int) -> str | None:
    """How loaders start their workers: forked, so that they share the rows and need not be sent them."""
    return "fork" if num_workers else None


def prefetch_factor(ahead: int, num_workers: int) -> int | None:
    """How many items each worker of a loader has begun or keeps ready, for all to have `ahead`, at most about
    `MOST_READY`; None without workers."""
    if num_workers == 0:
        return None
    return max(2, -(-min(ahead, MOST_READY) // num_workers))


def gather_in_order(own: list[Any], world: int) -> list[Any]:
    """Process r holds what belongs to examples r, r + world, …; every process gets all of it, in order."""
    if world == 1:
        return own
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, own)
    longest = max(len(share) for share in shares)
    return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]
