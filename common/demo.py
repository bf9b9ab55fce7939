"""The built-in data: document pages with handwritten digits, in the layout of the hub data set it stands in for.

Every page holds real handwritten digits (the 8 x 8 scans that come with scikit-learn) beside printed labels.
`write_docvqa` writes pages with questions in the layout of `nielsr/docvqa_1200_examples`, and `CHECKPOINT` is a
small but complete Phi-3.5-vision checkpoint that `common/demo_pretrain.py` made by learning to transcribe such
pages. Together they let the recipes run within minutes on a processor, without a download.

Training and test pages share no digit scan, and neither was any scan of a test page used to make the checkpoint.

    python -m common.demo data --task docvqa --out DIR      write the built-in data
    python -m common.demo pretrain --out DIR                make the built-in checkpoint anew
"""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHECKPOINT = Path(__file__).resolve().parent / "demo_checkpoint"

SPLITS = ("train", "test")
PAGE_SIDE = 448  # pixels; a page is read as one view of 336
LABELS = (
    "Account",
    "Batch",
    "Customer",
    "Folder",
    "Invoice",
    "Kit",
    "Member",
    "Order",
    "Permit",
    "Room",
    "Ticket",
    "Vessel",
)
TITLES = ("DELIVERY NOTE", "INTAKE FORM", "CASH BOOK", "SERVICE CARD", "STOCK LIST", "DAILY REPORT")
DIGITS_PER_VALUE = 4

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


@functools.cache
def digit_scans(split: str) -> dict[int, np.ndarray]:
    """The handwritten digits that pages of a split may use.

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
class Style:
    """How a page looks. Lengths are in pixels of the page."""

    digit_height: int = 32
    digit_pitch: float = 38
    label_size: int = 26
    paper: tuple[int, int, int] = (255, 255, 255)
    ink: tuple[int, int, int] = (20, 20, 40)
    print_ink: tuple[int, int, int] = (30, 30, 30)


@dataclass(frozen=True)
class Mark:
    """One thing on a page: a printed word or one handwritten digit."""

    text: str
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Page:
    """A picture and what stands on it.

    `lines` holds, from top to bottom, a label (which may be empty) and a value; `line_marks` the
    marks of each of them, the label first; `title` the marks of the printed title.
    """

    picture: Image.Image
    lines: tuple[tuple[str, str], ...]
    line_marks: tuple[tuple[Mark, ...], ...]
    title: tuple[Mark, ...] = ()

    def words(self) -> Iterator[tuple[str, list[float]]]:
        """The words from top to bottom, each with its normalised [left, top, right, bottom]."""
        width, height = self.picture.size
        scale = np.array([width, height, width, height])
        for mark in self.title:
            yield mark.text, (np.array(mark.box) / scale).tolist()
        for (label, value), marks in zip(self.lines, self.line_marks, strict=True):
            if label:
                yield label, (np.array(marks[0].box) / scale).tolist()
            boxes = np.array([mark.box for mark in marks[-len(value) :]])
            hull = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
            yield value, (hull / scale).tolist()


@functools.cache
def draw_word(text: str, size: int) -> Image.Image:
    """The mask of a printed word, cut to its ink."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    mask = Image.new("L", (right - left + 2, bottom - top + 2), 0)
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=font)
    return mask.crop(mask.getbbox())


def draw_digit(random: np.random.Generator, scans: dict[int, np.ndarray], digit: int, height: int) -> Image.Image:
    """The mask of a handwritten digit: a scan of it, enlarged and cut to its ink."""
    scan = Image.fromarray(scans[digit][random.integers(len(scans[digit]))])
    scan = scan.crop(scan.getbbox())
    height = max(4, round(height * random.uniform(0.9, 1.1)))
    width = max(3, round(height * scan.width / scan.height))
    return scan.resize((width, height), Image.Resampling.BICUBIC)


def draw_page(
    random: np.random.Generator,
    scans: dict[int, np.ndarray],
    lines: Sequence[tuple[str, str]],
    style: Style = Style(),
    title: str = "",
    side: int = PAGE_SIDE,
) -> Page:
    """Draw a page.

    Args:
        random: decides the scans and the places.
        scans: see `digit_scans`.
        lines: from top to bottom, a label (may be empty) and a value of digits.
        title: printed at the top; none where empty.
        side: of the square page in pixels.

    Raises:
        ValueError: when the lines do not fit on the page.
    """
    picture = Image.new("RGB", (side, side), style.paper)
    pen = ImageDraw.Draw(picture)
    top = 6.0
    title_marks = []
    if title:
        left = float(random.integers(8, 60))
        for word in title.split():
            mask = draw_word(word, 17)
            picture.paste(style.print_ink, (int(left), 10), mask)
            title_marks.append(Mark(word, (left, 10, left + mask.width, 10 + mask.height)))
            left += mask.width + 6
        pen.line([(8, 32), (side - 8, 32)], fill=style.print_ink)
        top = 38.0

    line_height = 1.2 * max(style.digit_height, style.label_size)
    spare = side - top - 4 - line_height * len(lines)
    labels = [draw_word(label, style.label_size) if label else None for label, _ in lines]
    label_width = max((label.width + 0.35 * style.digit_pitch for label in labels if label), default=0)
    widths = [label_width + len(value) * style.digit_pitch for _, value in lines]
    if spare < 0 or max(widths) > side - 8:
        raise ValueError(f"{len(lines)} lines of {max(widths):.0f} x {line_height:.0f} do not fit on {side} pixels")
    gaps = random.dirichlet(np.ones(len(lines) + 1)) * spare
    page_left = random.uniform(4, side - 4 - max(widths))

    line_marks = []
    for (label, value), label_mask, gap in zip(lines, labels, gaps, strict=False):
        top += gap
        middle, left, marks = top + line_height / 2, page_left, []
        if label_mask:
            place = (round(left), round(middle - label_mask.height / 2))
            picture.paste(style.print_ink, place, label_mask)
            marks.append(Mark(label, (*place, place[0] + label_mask.width, place[1] + label_mask.height)))
        for position, digit in enumerate(value):
            mask = draw_digit(random, scans, int(digit), style.digit_height)
            centre = left + label_width + (position + 0.5) * style.digit_pitch
            shift = random.uniform(-0.05, 0.05, 2) * style.digit_height
            place = (round(centre - mask.width / 2 + shift[0]), round(middle - mask.height / 2 + shift[1]))
            place = (min(max(place[0], 0), side - mask.width), min(max(place[1], 0), side - mask.height))
            picture.paste(style.ink, place, mask)
            marks.append(Mark(digit, (*place, place[0] + mask.width, place[1] + mask.height)))
        line_marks.append(tuple(marks))
        top += line_height
    return Page(picture, tuple(lines), tuple(line_marks), tuple(title_marks))


def random_value(random: np.random.Generator, length: int = DIGITS_PER_VALUE) -> str:
    """Digits, each as likely as any other."""
    return "".join(str(digit) for digit in random.integers(10, size=length))


def random_document(random: np.random.Generator, scans: dict[int, np.ndarray]) -> Page:
    """A page of the DocVQA kind: a title and three to six labelled values in random order."""
    labels = random.permutation(LABELS)[: random.integers(3, 7)]
    paper = tuple(int(shade) for shade in random.integers(235, 256, size=3))
    ink = tuple(int(shade) for shade in random.integers((0, 0, 20), (60, 60, 120)))
    style = Style(paper=paper, ink=ink)
    lines = [(str(label), random_value(random)) for label in labels]
    return draw_page(random, scans, lines, style, title=str(random.choice(TITLES)))


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
        file = io.BytesIO()
        page.picture.save(file, format="PNG")
        yield {
            "id": f"{split}_{number}",
            "image": {"bytes": file.getvalue(), "path": None},
            "query": {language: text.format(label=label.lower()) for language, text in question.items()},
            "answers": [value],
            "words": list(words),
            "bounding_boxes": list(boxes),
            "answer": {"match_score": 1.0, "matched_text": value, "start": words.index(label) + 1, "text": value},
        }


def write_docvqa(folder: str | Path, train_pages: int = 1000, test_pages: int = 200, seed: int = 0) -> Path:
    """Write the built-in DocVQA data.

    Args:
        folder: to write to; the files are `data/train-00000-of-00001.parquet` and `data/test-...`.
        train_pages, test_pages: rows of each file.
        seed: decides everything; the same seed gives the same rows.

    Returns:
        The folder.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "id": Value("string"),
            "image": ImageFeature(),
            "query": {language: Value("string") for language in sorted(QUESTIONS[0])},
            "answers": List(Value("string")),
            "words": List(Value("string")),
            "bounding_boxes": List(List(Value("float32"))),
            "answer": {
                "match_score": Value("float64"),
                "matched_text": Value("string"),
                "start": Value("int64"),
                "text": Value("string"),
            },
        }
    )
    folder = Path(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, pages in (("train", train_pages), ("test", test_pages)):
        rows = Dataset.from_list(list(docvqa_rows(split, pages, seed)), features=features, split=split)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


# task -> what writes its built-in data
WRITERS: dict[str, Callable[..., Path]] = {"docvqa": write_docvqa}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m common.demo", description="The built-in data and checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = argparse.ArgumentDefaultsHelpFormatter

    data = commands.add_parser("data", help="write built-in data", formatter_class=defaults)
    data.add_argument("--task", choices=sorted(WRITERS), default="docvqa", help="what the data is for")
    data.add_argument("--out", type=Path, required=True, help="folder to write to")
    data.add_argument("--train_pages", type=_positive, default=1000, help="pages to train on")
    data.add_argument("--test_pages", type=_positive, default=200, help="pages to evaluate on")
    data.add_argument("--seed", type=int, default=0, help="another seed gives other pages")

    pretrain = commands.add_parser("pretrain", help="make the built-in checkpoint anew", formatter_class=defaults)
    pretrain.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    pretrain.add_argument("--seed", type=int, default=0, help="of the weights and the pages")
    pretrain.add_argument("--scale", type=float, default=1.0, help="share of the steps to do, to try it out")
    pretrain.add_argument("--threads", type=_positive, default=2, help="processor threads to compute with")

    options = parser.parse_args(arguments)
    if options.command == "data":
        write = WRITERS[options.task]
        print(write(options.out, options.train_pages, options.test_pages, options.seed))
    else:
        from .demo_pretrain import pretrain as run_pretraining

        run_pretraining(options.out, seed=options.seed, scale=options.scale, threads=options.threads)


if __name__ == "__main__":
    main()
