"""Conversations -> `input_ids`, `labels`, `pixel_values`; padding, sharing pictures, packing.

Notation used for tensor shapes
- batch, seq: rows and positions
- crops, images: of all rows together, in the order of their tags in the text
- examples: of all rows together
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .errors import UserError
from .phi3v import Phi3VProcessor
from .phi3v.masks import SHARED
from .phi3v.modeling import IGNORED_LABEL
from .phi3v.processing import IMAGE_TOKEN

# What follows every answer in the published recipe; generation stops at the first of the two.
ANSWER_END = "<|end|>\n<|endoftext|>"


@dataclass(frozen=True)
class Turn:
    """A question with its pictures, and the answer to learn.

    The tags in `user` are numbered through the whole conversation: the first turn with two pictures
    holds `<|image_1|><|image_2|>`, the next turn's picture is `<|image_3|>`.
    """

    user: str
    assistant: str = ""
    images: Sequence[Image.Image] = field(default=())


@dataclass(frozen=True)
class Example:
    """One conversation; `id` names it in files and messages."""

    id: str
    turns: Sequence[Turn]


def encode_example(processor: Phi3VProcessor, example: Example, with_answer: bool = True) -> dict[str, Any]:
    """Token ids, labels and pixels of one conversation.

    As published, every turn's prompt is tokenised on its own (chat template with generation prompt,
    its own BOS) and followed by the answer without BOS; only answers are labelled.

    Args:
        with_answer: False leaves the last turn's answer out, for generation.

    Returns:
        `input_ids` and `labels` (seq,), and with pictures `pixel_values` (crops, 3, 336, 336) and
        `image_sizes` (images, 2).

    Raises:
        UserError: a question or an answer that is no text, or holds `<|image|>`; tags that do not match the
            pictures; a picture that cannot be processed, or whose pixels are not finite; an answer of nothing
            but white space; each with the example's id.
    """
    ids, labels, pixels, sizes = [], [], [], []
    num_images = 0
    for position, turn in enumerate(example.turns):
        _check_texts(turn, example.id)
        text = processor.apply_chat_template([{"role": "user", "content": turn.user}], add_generation_prompt=True)
        try:
            prompt = processor.encode(text, turn.images, first_tag=num_images + 1)
        except ValueError as error:
            raise UserError(f"{example.id}: {error}") from error
        num_images += len(turn.images)
        ids.append(prompt["input_ids"])
        labels.append(torch.full_like(prompt["input_ids"], IGNORED_LABEL))
        if turn.images:
            if not prompt["pixel_values"].sum().isfinite():  # which it is where all of them are
                raise UserError(f"{example.id}: a picture has pixels that are not finite after processing")
            pixels.append(prompt["pixel_values"])
            sizes.append(prompt["image_sizes"])
        if with_answer or position + 1 < len(example.turns):
            if not turn.assistant.strip():
                raise UserError(f"{example.id}: the answer is empty")
            answer = processor.tokenizer(turn.assistant + ANSWER_END, add_special_tokens=False).input_ids
            ids.append(torch.tensor(answer, dtype=torch.long))
            labels.append(ids[-1])
    encoded = {"input_ids": torch.cat(ids), "labels": torch.cat(labels)}
    if pixels:
        # a single turn's pixels as they are, so that questions about one picture hold the same tensor
        encoded |= {
            name: parts[0] if len(parts) == 1 else torch.cat(parts)
            for name, parts in (("pixel_values", pixels), ("image_sizes", sizes))
        }
    return encoded


def _check_texts(turn: Turn, place: str) -> None:
    for name, text in (("question", turn.user), ("answer", turn.assistant)):
        if not isinstance(text, str):
            raise UserError(f"{place}: the {name} is {type(text).__name__}, not a text")
        if IMAGE_TOKEN in text:
            raise UserError(f"{place}: the {name} holds {IMAGE_TOKEN}, which stands for a picture: take it out")


def encode_questions(
    processor: Phi3VProcessor, examples: Sequence[Example], with_answer: bool = True
) -> list[dict[str, Any]]:
    """`encode_example` of each; pictures that several of them hold as the same object are processed once."""
    known: dict[tuple[int, ...], Any] = {}

    def process(images: Sequence[Image.Image], num_crops: int | None = None) -> Any:
        key = tuple(map(id, images))
        if key not in known:
            known[key] = processor.image_processor(images, num_crops=num_crops)
        return known[key]

    processing_once = copy.copy(processor)
    processing_once.image_processor = process
    return [encode_example(processing_once, example, with_answer) for example in examples]


def collate(
    processor: Phi3VProcessor, encoded: Sequence[dict[str, Any]], padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """Encoded examples -> one batch.

    Returns:
        `input_ids`, `attention_mask`, `labels` (batch, seq), `loss_weights` (batch,), and where any
        example has pictures `pixel_values` (crops, 3, 336, 336) and `image_sizes` (images, 2);
        `problems`, a list, where fillers take the places of bad examples.
    """
    batch = dict(processor.pad(encoded, padding_side))
    labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
    # the mask is made from the lengths, so it says where each row's own positions are
    labels[batch["attention_mask"].bool()] = torch.cat([one["labels"] for one in encoded])
    weights = torch.tensor([one.get("loss_weight", 1.0) for one in encoded], dtype=torch.float32)
    return {**batch, "labels": labels, "loss_weights": weights, **_problems(encoded)}


def _problems(encoded: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    problems = [one["problem"] for one in encoded if "problem" in one]
    return {"problems": problems} if problems else {}


def prefix_length(input_ids: torch.Tensor, image_token_id: int) -> int:
    """Positions of a (seq,) row up to the last picture's last, which questions about the pictures share; 0 without."""
    places = (input_ids == image_token_id).nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def share_pictures(encoded: Sequence[dict[str, Any]], image_token_id: int, rope_threshold: int) -> list[dict[str, Any]]:
    """Questions about the same pictures -> documents `[prefix with the image tokens | question, answer | …]`.

    The prefix is what the questions have in common up to the last image token, and each branch is the
    rest of one question, so that every branch reads exactly what it would read alone. All of them make
    one document, but for questions on both sides of `rope_threshold`: the model rotates a longer
    example's positions by other factors, those of its prefix too, so they make two.

    Args:
        encoded: what `encode_questions` made, each with its `loss_weight` if it has one.
        image_token_id: of `<|image|>`.
        rope_threshold: the checkpoint's `original_max_position_embeddings`.

    Returns:
        Documents for `pack`, in the order of their first questions; fillers of bad examples come last, each alone.

    Raises:
        ValueError: pictures or texts before the last image token that are not the same, or labels there.
    """
    sides: dict[bool, list[dict[str, Any]]] = {}
    for one in encoded:
        if "problem" not in one:
            sides.setdefault(len(one["input_ids"]) > rope_threshold, []).append(one)
    documents = [_share(side, image_token_id) if len(side) > 1 else side[0] for side in sides.values()]
    return documents + [one for one in encoded if "problem" in one]


def _share(encoded: Sequence[dict[str, Any]], image_token_id: int) -> dict[str, Any]:
    first = encoded[0]
    length = prefix_length(first["input_ids"], image_token_id)
    prefix = first["input_ids"][:length]
    for one in encoded:
        same_pictures = all(
            one.get(name) is first.get(name) or (name in one and name in first and torch.equal(one[name], first[name]))
            for name in ("pixel_values", "image_sizes")
        )
        same_length = prefix_length(one["input_ids"], image_token_id) == length > 0
        if not (same_length and same_pictures and torch.equal(one["input_ids"][:length], prefix)):
            raise ValueError("questions that share pictures must have the same pictures and the same text before them")
        if (one["labels"][: length + 1] != IGNORED_LABEL).any():
            raise ValueError("questions that share pictures must not be labelled before their own text")
    branches = [one["input_ids"][length:] for one in encoded]
    document = {
        "input_ids": torch.cat([prefix, *branches]),
        "labels": torch.cat([first["labels"][:length], *(one["labels"][length:] for one in encoded)]),
        "position_ids": torch.cat(
            [torch.arange(length), *(torch.arange(length, length + len(one)) for one in branches)]
        ),
        "branch_ids": torch.cat(
            [
                torch.full((length,), SHARED),
                *(torch.full((len(one),), number) for number, one in enumerate(branches)),
            ]
        ),
        "loss_weights": [one.get("loss_weight", 1.0) for one in encoded],
    }
    return document | {name: first[name] for name in ("pixel_values", "image_sizes")}


def pack(documents: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Encoded examples, and documents of `share_pictures`, one after another in one row without padding.

    Returns:
        `input_ids`, `labels`, `position_ids`, `branch_ids` (1, seq) as `common/phi3v/masks.py`
        describes them, `loss_weights` (examples,), and where any document has pictures `pixel_values`
        (crops, 3, 336, 336) and `image_sizes` (images, 2); `problems` as in `collate`.

    Raises:
        ValueError: a document whose first token is labelled: nothing stands before it to predict it from.
    """
    positions, branches, weights = [], [], []
    for one in documents:
        length = len(one["input_ids"])
        if one["labels"][0] != IGNORED_LABEL:
            raise ValueError("the first token of a document cannot be labelled")
        positions.append(one.get("position_ids", torch.arange(length)))
        branch_ids = one.get("branch_ids", torch.zeros(length, dtype=torch.long))
        branches.append(torch.where(branch_ids == SHARED, SHARED, branch_ids + len(weights)))
        weights += one.get("loss_weights", [one.get("loss_weight", 1.0)])
    batch = {
        "input_ids": torch.cat([one["input_ids"] for one in documents])[None],
        "labels": torch.cat([one["labels"] for one in documents])[None],
        "position_ids": torch.cat(positions)[None],
        "branch_ids": torch.cat(branches)[None],
        "loss_weights": torch.tensor(weights, dtype=torch.float32),
    }
    for name in ("pixel_values", "image_sizes"):
        parts = [one[name] for one in documents if name in one]
        if parts:
            batch[name] = torch.cat(parts)
    return batch | _problems(documents)
