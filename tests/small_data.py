"""A few rows of every task's data in the layouts of the published data sets, for short runs."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
from PIL import Image

from common.demo import write_docvqa

EVAL_ROWS = 500  # the first rows of the_cauldron's sets are for evaluation, so there must be more
CLASSES = ("ApplyLipstick", "Archery")
VIDEOS_PER_CLASS = {"train": 3, "val": 2, "test": 1}


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (24, 32, 3), dtype=np.uint8))


def _write_cauldron(folder: Path, rows: list[dict[str, Any]]) -> Path:
    text = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(text)})
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def write_docvqa_pages(folder: Path) -> tuple[Path, Path]:
    """The mini set in `folder/mini/data`, and its training pages in the layout of the_cauldron."""
    mini = write_docvqa(folder / "mini", train_pages=12, test_pages=4, seed=2) / "data"
    pages = datasets.Dataset.from_parquet(str(mini / "train-00000-of-00001.parquet"))
    rows = [
        {
            "images": [page["image"]],
            "texts": [{"user": page["query"]["en"], "assistant": page["answers"][0], "source": "docvqa"}] * 2,
        }
        for page in pages
    ]
    return mini, _write_cauldron(folder / "the_cauldron" / "docvqa", rows)


def write_hateful_memes(folder: Path, train_rows: int = 8) -> Path:
    """the_cauldron's `hateful_memes`: one picture, one question."""
    rows = [
        {
            "images": [_picture(number)],
            "texts": [{"user": "Is it hateful?", "assistant": ("No.", "Yes.")[number % 2], "source": "hateful_memes"}],
        }
        for number in range(EVAL_ROWS + train_rows)
    ]
    return _write_cauldron(folder / "the_cauldron" / "hateful_memes", rows)


def write_nlvr2(folder: Path, train_rows: int = 8) -> Path:
    """the_cauldron's `nlvr2`: two pictures, one to three questions."""
    rows = [
        {
            "images": [_picture(2 * number), _picture(2 * number + 1)],
            "texts": [
                {"user": f"True? {turn}", "assistant": ("No.", "Yes.")[(number + turn) % 2], "source": "nlvr2"}
                for turn in range(1 + number % 3)
            ],
        }
        for number in range(EVAL_ROWS + train_rows)
    ]
    return _write_cauldron(folder / "the_cauldron" / "nlvr2", rows)


def _video(seed: int, frames: int = 10) -> bytes:
    """An AVI in UCF-101's codec."""
    content = io.BytesIO()
    with av.open(content, "w", format="avi") as output:
        stream = output.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = _picture(100 * seed + number).resize((64, 48))
            output.mux(stream.encode(av.VideoFrame.from_image(picture)))
        output.mux(stream.encode())
    return content.getvalue()


def write_ucf101_archive(path: Path) -> Path:
    """The hub's archive: a plain tar, whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for split, count in VIDEOS_PER_CLASS.items():
            for label in CLASSES:
                for number in range(count):
                    content = _video(seed=len(tar.getmembers()))
                    member = tarfile.TarInfo(f"UCF101_subset/{split}/{label}/v_{label}_g{number + 1:02}_c01.avi")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return path
