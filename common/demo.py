"""The built-in data: small data sets of every task, made of real handwritten digits, in the real layouts.

    python -m common.demo data --task docvqa|hateful_memes|nlvr2|ucf101 --out DIR
    python -m common.demo shuffle DIR --task TASK --out OTHER    the same data, its evaluation pictures dealt anew

The digits are the 8 x 8 scans that come with scikit-learn, each enlarged to a square of 28 pixels; pictures are
336 pixels wide and high, so that a picture is one view of the model and a square one of its 144 features.
Training and evaluation pictures share no scan. Nothing but the pictures tells the answers: on shuffled pictures
a score is what chance gives.

`CHECKPOINT` is a small but complete Phi-3.5-vision checkpoint, made by `common/demo_pretrain.py`. It knows digits,
printed labels and places, and spells digits as words; it has met none of these tasks.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHECKPOINT = Path(__file__).resolve().parent / "demo_checkpoint"

SPLITS = ("train", "test")
SIDE = 336  # pixels of a picture
SQUARE = 28  # pixels
SQUARES = SIDE // SQUARE  # in a row, and in a column
DIGITS_PER_VALUE = 4
FIRST_BOX = 7  # the column of a form's first box
LABELS = (
    *("Account", "Batch", "Customer", "Folder", "Invoice", "Kit"),
    *("Member", "Order", "Permit", "Room", "Ticket", "Vessel"),
)
TITLES = ("DELIVERY NOTE", "INTAKE FORM", "CASH BOOK", "SERVICE CARD", "STOCK LIST", "DAILY REPORT")

# A question in every language of the data set. Labels stand on the page in English.
QUESTIONS = (
    {
        "de": "Welche Nummer steht bei „{label}“?",
        "en": "What is the {label} number?",
        "es": "¿Cuál es el número junto a «{label}»?",
        "fr": "Quel est le numéro à côté de « {label} » ?",
        "it": "Qual è il numero accanto a «{label}»?",
    },
    {
        "de": "Welcher Wert ist für „{label}“ eingetragen?",
        "en": "Which number is written beside {label}?",
        "es": "¿Qué valor está escrito para «{label}»?",
        "fr": "Quelle valeur est inscrite pour « {label} » ?",
        "it": "Quale valore è scritto per «{label}»?",
    },
)
EVAL_ROWS = 500  # of the_cauldron's rows, which the scripts evaluate on, as published


# --- drawing


@functools.cache
def digit_scans(split: str) -> dict[int, np.ndarray]:
    """The handwritten digits that pictures of a split may use.

    Args:
        split: "train" (also for pre-training) or "test": every fifth scan. No scan is in both.

    Returns:
        digit -> uint8 (scans, 8, 8), 255 where there is ink.
    """
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise ValueError(f'split is "{split}"; it must be one of {", ".join(SPLITS)}')
    scans = load_digits()
    is_test = np.arange(len(scans.target)) % 5 == 4
    chosen = is_test if split == "test" else ~is_test
    pixels = (scans.images * (255 / 16)).round().astype(np.uint8)
    return {digit: pixels[chosen & (scans.target == digit)] for digit in range(10)}


@dataclass(frozen=True)
class Mark:
    """One thing on a page: a printed word or one handwritten digit."""

    text: str
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Page:
    """A picture and what stands on it.

    `lines` holds, from top to bottom, a label and a value; `line_marks` the marks of each of them,
    the label first; `title` the marks of the printed title; `squares` what stands in which square:
    (row, column) -> a digit, or the label that begins there.
    """

    picture: Image.Image
    lines: tuple[tuple[str, str], ...] = ()
    line_marks: tuple[tuple[Mark, ...], ...] = ()
    title: tuple[Mark, ...] = ()
    squares: dict[tuple[int, int], str] | None = None

    def words(self) -> Iterator[tuple[str, list[float]]]:
        """The words from top to bottom, each with its normalised [left, top, right, bottom]."""
        for mark in self.title:
            yield mark.text, (np.array(mark.box) / SIDE).tolist()
        for (label, value), (printed, *digits) in zip(self.lines, self.line_marks, strict=True):
            yield label, (np.array(printed.box) / SIDE).tolist()
            boxes = np.array([mark.box for mark in digits])
            yield value, (np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]) / SIDE).tolist()


class Pen:
    """Draws on one picture: paper, ink and print are a little different on each."""

    def __init__(self, random: np.random.Generator, scans: dict[int, np.ndarray]) -> None:
        self.random, self.scans = random, scans
        paper = tuple(int(shade) for shade in random.integers(238, 256, size=3))
        self.ink = tuple(int(shade) for shade in random.integers((0, 0, 20), (60, 60, 120)))
        self.picture = Image.new("RGB", (SIDE, SIDE), paper)
        self.lines = ImageDraw.Draw(self.picture)

    def write(self, digit: int, row: float, column: float) -> Mark:
        """A handwritten digit in a square, up to two pixels off its centre."""
        scans = self.scans[digit]
        scan = Image.fromarray(scans[self.random.integers(len(scans))])
        scan = scan.crop(scan.getbbox())
        height = int(self.random.integers(20, 25))
        width = min(26, max(4, round(height * scan.width / scan.height)))
        shift = self.random.integers(-2, 3, size=2)
        left = min(max(round(column * SQUARE) + (SQUARE - width) // 2 + int(shift[0]), 0), SIDE - width)
        top = min(max(round(row * SQUARE) + (SQUARE - height) // 2 + int(shift[1]), 0), SIDE - height)
        mask = scan.resize((width, height), Image.Resampling.BICUBIC)
        self.picture.paste(self.ink, (left, top), mask)
        return Mark(str(digit), (left, top, left + width, top + height))

    def print(self, word: str, row: int, column: int) -> Mark:
        """A printed word that begins in a square."""
        mask = draw_word(word, 20)
        shift = self.random.integers(-1, 2, size=2)
        left = column * SQUARE + 4 + int(shift[0])
        top = row * SQUARE + (SQUARE - mask.height) // 2 + int(shift[1])
        self.picture.paste((30, 30, 30), (left, top), mask)
        return Mark(word, (left, top, left + mask.width, top + mask.height))

    def box(self, row: int, column: int) -> None:
        """The outline of a square, as forms have it for a digit."""
        left, top = column * SQUARE, row * SQUARE
        self.lines.rectangle([left, top, left + SQUARE, top + SQUARE], outline=(190, 190, 190))


@functools.cache
def draw_word(text: str, size: int) -> Image.Image:
    """The mask of a printed word, cut to its ink."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    mask = Image.new("L", (right - left + 2, bottom - top + 2), 0)
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=font)
    return mask.crop(mask.getbbox())


def draw_form(
    random: np.random.Generator, scans: dict[int, np.ndarray], fewest: int = 3, most: int = 6, title: str = ""
) -> Page:
    """A form: a title, and `fewest` to `most` labels in random order, each with a value in boxes."""
    pen = Pen(random, scans)
    squares, lines, line_marks, title_marks = {}, [], [], []
    left = float(random.integers(8, 60))
    for word in title.split():
        mask = draw_word(word, 16)
        pen.picture.paste((30, 30, 30), (int(left), 7), mask)
        title_marks.append(Mark(word, (left, 7, left + mask.width, 7 + mask.height)))
        left += mask.width + 6
    num_lines = int(random.integers(fewest, most + 1))
    rows = np.sort(1 + random.permutation(SQUARES - 1)[:num_lines])
    margin = int(random.integers(3))
    for row, label in zip(rows.tolist(), random.permutation(LABELS).tolist(), strict=False):
        value = "".join(str(digit) for digit in random.integers(10, size=DIGITS_PER_VALUE))
        marks = [pen.print(label, row, margin)]
        squares[row, margin] = label
        for column, digit in enumerate(value, start=FIRST_BOX):
            pen.box(row, column)
            marks.append(pen.write(int(digit), row, column))
            squares[row, column] = digit
        lines.append((label, value))
        line_marks.append(tuple(marks))
    return Page(pen.picture, tuple(lines), tuple(line_marks), tuple(title_marks), squares)


def draw_scattered(
    random: np.random.Generator, scans: dict[int, np.ndarray], digits: Sequence[int], caption: str = ""
) -> Page:
    """Digits in any squares but those of the last row, where a caption may stand."""
    pen, squares = Pen(random, scans), {}
    for digit, place in zip(digits, random.permutation(SQUARES * (SQUARES - 1)).tolist(), strict=False):
        row, column = divmod(place, SQUARES)
        pen.write(int(digit), row, column)
        squares[row, column] = str(digit)
    if caption:
        column = int(random.integers(9))
        pen.print(caption, SQUARES - 1, column)
        squares[SQUARES - 1, column] = caption
    return Page(pen.picture, squares=squares)


def as_png(picture: Image.Image) -> bytes:
    """The picture's file."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def as_cell(picture: Image.Image) -> dict[str, Any]:
    """The picture as an image column holds it."""
    return {"bytes": as_png(picture), "path": None}


# --- DocVQA: a question on one field of a form


def random_document(random: np.random.Generator, scans: dict[int, np.ndarray]) -> Page:
    """A page of the DocVQA kind."""
    return draw_form(random, scans, title=str(random.choice(TITLES)))


def docvqa_rows(split: str, pages: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the DocVQA layout: a page, a question on one of its fields, and the answer.

    What is asked, how, and where the field stands are drawn independently of the value.
    """
    for number in range(pages):
        random = np.random.default_rng([seed, SPLITS.index(split), number])
        page = random_document(random, digit_scans(split))
        label, value = page.lines[random.integers(len(page.lines))]
        question = QUESTIONS[random.integers(len(QUESTIONS))]
        words, boxes = zip(*page.words(), strict=True)
        yield {
            "id": f"{split}_{number}",
            "image": as_cell(page.picture),
            "query": {language: text.format(label=label.lower()) for language, text in question.items()},
            "answers": [value],
            "words": list(words),
            "bounding_boxes": list(boxes),
            "answer": {"match_score": 1.0, "matched_text": value, "start": words.index(label) + 1, "text": value},
        }


def write_docvqa(
    folder: str | Path, train_pages: int = 1000, test_pages: int = 200, seed: int = 0, layout: str = "hub"
) -> Path:
    """Write the built-in DocVQA data, in the layout of `nielsr/docvqa_1200_examples`.

    Args:
        folder: to write to; the files are `data/train-00000-of-00001.parquet` and `data/test-...`.
        train_pages, test_pages: rows of each file.
        seed: decides everything; the same seed gives the same rows.
        layout: the hub's is the only one.

    Returns:
        The folder.
    """
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    answer = {"match_score": Value("float64"), "matched_text": text, "start": Value("int64"), "text": text}
    features = Features(
        {
            "id": text,
            "image": ImageFeature(),
            "query": dict.fromkeys(sorted(QUESTIONS[0]), text),
            "answers": List(text),
            "words": List(text),
            "bounding_boxes": List(List(Value("float32"))),
            "answer": answer,
        }
    )
    for split, pages in (("train", train_pages), ("test", test_pages)):
        file = Path(folder) / "data" / f"{split}-00000-of-00001.parquet"
        _write_parquet(list(docvqa_rows(split, pages, seed)), features, file)
    return Path(folder)


def _write_parquet(rows: list[dict[str, Any]], features: Any, file: Path) -> None:
    from datasets import Dataset

    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(file)


def _write_cauldron(rows: list[dict[str, Any]], file: Path) -> None:
    """`images`, `texts[{user, assistant, source}]`: the layout of `HuggingFaceM4/the_cauldron`."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = {name: Value("string") for name in ("user", "assistant", "source")}
    _write_parquet(rows, Features({"images": List(ImageFeature()), "texts": List(text)}), file)


# --- Hateful Memes: neither the digit nor the caption alone tells

CAPTIONS = LABELS[:4]
RUDE = CAPTIONS[::2]  # the captions with which a meme with a high digit is "hateful"


def random_meme(random: np.random.Generator, scans: dict[int, np.ndarray]) -> tuple[Page, int]:
    """A picture and its label: 1 where the digit is 5 or more and the caption is one of `RUDE`; half are."""
    label = int(random.integers(2))
    # where it is not: mostly one of the two, so that by digit or caption alone one is right 8 times in 10
    kinds = [(True, True)] if label else [(True, False), (False, True), (False, False)]
    is_high, is_rude = kinds[random.choice(len(kinds), p=None if label else [0.4, 0.4, 0.2])]
    digit = int(random.integers(5)) + 5 * is_high
    caption = str(random.choice([one for one in CAPTIONS if (one in RUDE) == is_rude]))
    return draw_scattered(random, scans, [digit], caption), label


def write_hateful_memes(
    folder: str | Path, train_pages: int = 2000, test_pages: int = EVAL_ROWS, seed: int = 0, layout: str = "hub"
) -> Path:
    """Write the built-in memes.

    Args:
        folder: to write to.
        train_pages, test_pages: memes to train on and to evaluate on. The hub's layout holds both in
            one split, of which the script evaluates on the first 500: `test_pages` must be that.
        layout: "hub": `hateful_memes/train-00000-of-00001.parquet` as in `HuggingFaceM4/the_cauldron`;
            "original": `img/`, `train.jsonl` and `dev_seen.jsonl`, as the challenge's folder.

    Returns:
        The folder.
    """
    folder = Path(folder)
    memes = {
        split: [
            random_meme(np.random.default_rng([seed, 10, SPLITS.index(split), number]), digit_scans(split))
            for number in range(count)
        ]
        for split, count in (("train", train_pages), ("test", test_pages))
    }
    if layout == "hub":
        question = "Is this meme hateful? Answer yes or no."
        rows = [
            {
                "images": [as_cell(page.picture)],
                "texts": [{"user": question, "assistant": ("No.", "Yes.")[label], "source": "hateful_memes"}],
            }
            for page, label in (*memes["test"], *memes["train"])
        ]
        _write_cauldron(rows, folder / "hateful_memes" / "train-00000-of-00001.parquet")
        return folder
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for first, split, name in ((10000, "train", "train"), (50000, "test", "dev_seen")):
        records = []
        for number, (page, label) in enumerate(memes[split], start=first):
            (folder / "img" / f"{number}.png").write_bytes(as_png(page.picture))
            caption = page.squares[max(page.squares)].lower()  # the last row's
            records.append({"id": number, "img": f"img/{number}.png", "label": label, "text": caption})
        _write_json_lines(folder / f"{name}.jsonl", records)
    return folder


def _write_json_lines(file: Path, records: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


# --- NLVR2: which of two pictures shows the larger digit?

SENTENCES = (
    "The digit of the left image is larger than that of the right image.",
    "The digit of the right image is smaller than that of the left image.",
)


def random_pair(random: np.random.Generator, scans: dict[int, np.ndarray]) -> tuple[tuple[Page, Page], list]:
    """Two pictures of one digit each, and one or both of the sentences, each with whether it is true."""
    digits = random.permutation(10)[:2].tolist()
    pages = tuple(draw_scattered(random, scans, [digit]) for digit in digits)
    return pages, [(SENTENCES[one], digits[0] > digits[1]) for one in random.permutation(2)[: random.integers(1, 3)]]


def write_nlvr2(
    folder: str | Path, train_pages: int = 2000, test_pages: int = EVAL_ROWS, seed: int = 0, layout: str = "hub"
) -> Path:
    """Write the built-in pairs of pictures.

    Args:
        train_pages, test_pages: pairs to train on and to evaluate on; see `write_hateful_memes`.
        layout: "hub": `nlvr2/train-00000-of-00001.parquet` as in `HuggingFaceM4/the_cauldron`; "original":
            `train.json`, `dev.json` and `images/{train/<directory>,dev}/<split>-<set>-<pair>-img{0,1}.png`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    pairs = {
        split: [
            random_pair(np.random.default_rng([seed, 20, SPLITS.index(split), number]), digit_scans(split))
            for number in range(count)
        ]
        for split, count in (("train", train_pages), ("test", test_pages))
    }
    if layout == "hub":
        question = "Is this statement true? Answer yes or no."
        rows = [
            {
                "images": [as_cell(page.picture) for page in pages],
                "texts": [
                    {"user": f"{sentence} {question}", "assistant": ("No.", "Yes.")[truth], "source": "nlvr2"}
                    for sentence, truth in sentences
                ],
            }
            for pages, sentences in (*pairs["test"], *pairs["train"])
        ]
        _write_cauldron(rows, folder / "nlvr2" / "train-00000-of-00001.parquet")
        return folder
    for split, name in (("train", "train"), ("test", "dev")):
        records = []
        for number, (pages, sentences) in enumerate(pairs[split]):
            pair = f"{name}-{number}-0"
            directory = {"directory": number % 100} if name == "train" else {}
            images = folder / "images" / name / str(directory.get("directory", ""))
            images.mkdir(parents=True, exist_ok=True)
            for side, page in enumerate(pages):
                (images / f"{pair}-img{side}.png").write_bytes(as_png(page.picture))
            for turn, (sentence, truth) in enumerate(sentences):
                label = ("False", "True")[truth]
                records.append({"identifier": f"{pair}-{turn}", "sentence": sentence, "label": label, **directory})
        _write_json_lines(folder / f"{name}.json", records)
    return folder


# --- UCF-101: four kinds of motion

# class -> how the digit's row and column change from one step to the next
MOTIONS = {"ClimbingUp": (-1, 0), "FallingDown": (1, 0), "RunningLeft": (0, -1), "RunningRight": (0, 1)}
FRAMES = 8  # of a video, two of each place
STRIDE = 2  # squares from one place to the next


def random_video(random: np.random.Generator, scans: dict[int, np.ndarray], label: str) -> list[Image.Image]:
    """The frames of one digit that moves in a straight line, from any place from which it stays on the picture.

    A single frame does not tell the class: the best guess from one is right half the time.
    """
    digit, look, step = random.integers(10), int(random.integers(2**31)), STRIDE * np.array(MOTIONS[label])
    way = step * (FRAMES // 2 - 1)
    start = [random.integers(max(0, -change), SQUARES - max(0, change)) for change in way.tolist()]
    frames = []
    for frame in range(FRAMES):
        row, column = (np.array(start) + step * (frame // 2)).tolist()
        pen = Pen(np.random.default_rng(look), scans)  # the same paper, scan and place in the square
        pen.write(int(digit), row, column)
        frames.append(pen.picture)
    return frames


def write_ucf101(
    folder: str | Path, train_pages: int = 1200, test_pages: int = 200, seed: int = 0, layout: str = "hub"
) -> Path:
    """Write the built-in videos: `UCF101_subset.tar.gz`, a plain tar of MPEG-4 .avi files, as on the hub.

    Args:
        train_pages, test_pages: videos; a few more are for validation.
        layout: "hub"; "original" leaves the same files unpacked, `{train,val,test}/<Class>/*.avi`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    videos = ucf101_videos({"train": train_pages, "val": 4, "test": test_pages}, seed)
    if layout == "original":
        for name, content in videos:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder
    with tarfile.open(folder / "UCF101_subset.tar.gz", "w") as archive:
        for name, content in videos:
            member = tarfile.TarInfo(f"UCF101_subset/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def ucf101_videos(counts: dict[str, int], seed: int) -> Iterator[tuple[str, bytes]]:
    """`<split>/<Class>/<video>.avi` and the file's bytes, the classes equally often."""
    for split_number, (split, count) in enumerate(counts.items()):
        for number in range(count):
            random = np.random.default_rng([seed, 30, split_number, number])
            label = list(MOTIONS)[number % len(MOTIONS)]
            frames = random_video(random, digit_scans("train" if split == "train" else "test"), label)
            name = f"v_{label}_g{number // 28 + 1:02}_c{number // 4 % 7 + 1:02}.avi"
            yield f"{split}/{label}/{name}", encode_video(frames)


def encode_video(frames: Sequence[Image.Image]) -> bytes:
    """Frames -> the bytes of an .avi file (MPEG-4, 25 frames per second)."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 2  # as little loss as the codec has
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))
    return file.getvalue()


# --- shuffled pictures


def shuffle_pictures(folder: str | Path, task: str, out: str | Path) -> Path:
    """Copy a built-in data set with the pictures of its evaluation examples dealt to other examples.

    Questions and answers stay, so that the score of a model on the copy shows what can be known
    without looking: it must be what chance gives. Reads the layouts that `make demo` uses.

    Args:
        folder: what `write_<task>` wrote in the hub's layout, or for UCF-101 what the converter made of it.
        task: whose data it is.
        out: to write to.

    Returns:
        `out`.
    """
    from datasets import Dataset
    from datasets import Image as ImageFeature

    folder, out = Path(folder), Path(out)
    if task == "ucf101":
        for split in ("train", "val", "test"):
            records = [json.loads(line) for line in (folder / f"ucf101_{split}.jsonl").read_text().splitlines()]
            turns = [record["conversations"][0] for record in records]
            dealt = _dealt([turn["images"] for turn in turns])
            for turn, images in zip(turns, dealt, strict=True):
                turn["images"] = images
            out.mkdir(parents=True, exist_ok=True)
            _write_json_lines(out / f"ucf101_{split}.jsonl", records)
        shutil.copytree(folder / "images", out / "images", dirs_exist_ok=True)
        return out
    name, column = ("data/test", "image") if task == "docvqa" else (f"{task}/train", "images")
    rows = Dataset.from_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
    encoded = ImageFeature(decode=False)
    features = rows.features
    rows = rows.cast_column(column, encoded if column == "image" else [encoded])
    num_shuffled = len(rows) if task == "docvqa" else EVAL_ROWS
    records = rows.to_list()
    dealt = _dealt([record[column] for record in records[:num_shuffled]])
    for record, pictures in zip(records, dealt, strict=False):
        record[column] = pictures
    _write_parquet(records, features, out / f"{name}-00000-of-00001.parquet")
    if task == "docvqa":
        shutil.copy(folder / "data" / "train-00000-of-00001.parquet", out / "data")
    return out


def _dealt(pictures: list) -> list:
    """In an order in which nobody keeps their own: moved on along a random ring."""
    ring = np.random.default_rng(0).permutation(len(pictures))
    dealt = list(pictures)
    for here, following in zip(ring, np.roll(ring, 1), strict=True):
        dealt[here] = pictures[following]
    return dealt


# --- command line

# task -> what writes its built-in data
WRITERS: dict[str, Callable[..., Path]] = {
    "docvqa": write_docvqa,
    "hateful_memes": write_hateful_memes,
    "nlvr2": write_nlvr2,
    "ucf101": write_ucf101,
}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m common.demo", description="The built-in data.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write built-in data")
    data.add_argument("--task", choices=sorted(WRITERS), default="docvqa", help="what the data is for (%(default)s)")
    data.add_argument("--out", type=Path, required=True, help="folder to write to")
    data.add_argument("--train_pages", type=_positive, help="examples to train on (1,000 to 2,000)")
    data.add_argument("--test_pages", type=_positive, help="examples to evaluate on (200 or 500)")
    data.add_argument("--seed", type=int, default=0, help="another seed gives other pictures (%(default)s)")
    data.add_argument(
        "--layout", choices=("hub", "original"), default="hub", help="as on the hub or as first published (%(default)s)"
    )
    shuffle = commands.add_parser("shuffle", help="copy built-in data, its evaluation pictures dealt anew")
    shuffle.add_argument("folder", type=Path, help="what `data` or the converter wrote")
    shuffle.add_argument("--task", choices=sorted(WRITERS), default="docvqa", help="whose data it is (%(default)s)")
    shuffle.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    if options.command == "shuffle":
        print(shuffle_pictures(options.folder, options.task, options.out))
        return
    in_one_split = options.layout == "hub" and options.task in ("hateful_memes", "nlvr2")
    if in_one_split and options.test_pages not in (None, EVAL_ROWS):
        parser.error(
            f"--test_pages {options.test_pages}: of {options.task} in the hub's layout the script evaluates on the "
            f"first {EVAL_ROWS} rows: leave it out, or take --layout original"
        )
    counts = {name: getattr(options, name) for name in ("train_pages", "test_pages") if getattr(options, name)}
    print(WRITERS[options.task](options.out, seed=options.seed, layout=options.layout, **counts))


if __name__ == "__main__":
    main()
