"""The JSONL format for anyone's own data: one conversation per line.

    {"id": "…", "source": "…", "conversations": [{"images": ["a/b.jpg"], "user": "…", "assistant": "…"}, …]}

A turn has any number of images, also none; paths are relative to the image folder and may not leave
it. `id` and `source` are optional. Images are numbered through the whole conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .collation import Example, Turn
from .data import decode_image, path_inside, read_json_lines
from .errors import UserError, raise_all

MOST_PROBLEMS = 20  # in one message


@dataclass(frozen=True)
class Conversations:
    """The checked lines of one file; images are opened when an example is asked for."""

    path: Path
    image_dir: Path
    lines: tuple[int, ...]
    records: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> str:
        """File and line of an example, for messages."""
        return f"{self.path}, line {self.lines[index]}"

    def first(self, count: int | None) -> Conversations:
        """The first `count` conversations; all of them where it is None."""
        return Conversations(self.path, self.image_dir, self.lines[:count], self.records[:count])

    def example(self, index: int) -> Example:
        """One conversation; the tags of a turn's images stand before its text, as in the published recipe."""
        place, turns, tag = self.place(index), [], 1
        for turn in self.records[index]["conversations"]:
            files = [path_inside(self.image_dir, name, place) for name in turn.get("images", ())]
            images = [decode_image({"path": str(file)}, f"{place}, {file}") for file in files]
            tags = "".join(f"<|image_{number}|>" for number in range(tag, tag + len(images)))
            tag += len(images)
            turns.append(Turn(f"{tags}\n{turn['user']}" if tags else turn["user"], turn["assistant"], images))
        return Example(place, turns)


def load_conversations(path: str | Path, image_dir: str | Path) -> Conversations:
    """Read a file and check every line: fields, types, and that the images are there.

    Args:
        path: the JSONL file.
        image_dir: the folder that the image paths are relative to.

    Raises:
        UserError: with the file and line of every fault (the first 20 of them).
    """
    path, image_dir = Path(path), Path(image_dir)
    numbered = read_json_lines(path)
    problems = [
        f"{path}, line {number}: {problem}"
        for number, record in numbered
        for problem in find_problems(record, image_dir)
    ]
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    raise_all(problems)
    if not numbered:
        raise UserError(f"{path} is empty")
    return Conversations(path, image_dir, *zip(*numbered, strict=True))


def find_problems(record: dict[str, Any], image_dir: Path) -> list[str]:
    """What is wrong with one line's dictionary."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return ["conversations must be a list with at least one turn"]
    problems = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            problems.append(f"turn {number} is {type(turn).__name__}, not a dictionary")
            continue
        for field in ("user", "assistant"):
            if not isinstance(turn.get(field), str) or not turn[field].strip():
                problems.append(f"turn {number} needs {field}, a text that is not empty")
        images = turn.get("images", [])
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            problems.append(f"turn {number}: images must be a list of paths")
            continue
        for name in images:
            try:
                file = path_inside(image_dir, name, f"turn {number}")
            except UserError as error:
                problems.append(str(error))
                continue
            if not file.is_file():
                problems.append(f"turn {number}: there is no image {name} in {image_dir}")
    return problems
