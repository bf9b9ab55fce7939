"""Conversations -> `input_ids`, `labels`, `pixel_values`; padding.

Notation used for tensor shapes
- batch, seq: rows and positions
- crops, images: of all rows together, in the order of their tags in the text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .errors import UserError
from .phi3v import Phi3VProcessor
from .phi3v.modeling import IGNORED_LABEL

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
        UserError: tags that do not match the pictures, a picture that cannot be processed, an answer
            without tokens, each with the example's id.
    """
    ids, labels, pixels, sizes = [], [], [], []
    num_images = 0
    for position, turn in enumerate(example.turns):
        text = processor.apply_chat_template([{"role": "user", "content": turn.user}], add_generation_prompt=True)
        try:
            prompt = processor.encode(text, turn.images, first_tag=num_images + 1)
        except ValueError as error:
            raise UserError(f"{example.id}: {error}") from error
        num_images += len(turn.images)
        ids.append(prompt["input_ids"])
        labels.append(torch.full_like(prompt["input_ids"], IGNORED_LABEL))
        if turn.images:
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
        encoded |= {"pixel_values": torch.cat(pixels), "image_sizes": torch.cat(sizes)}
    return encoded


def collate(
    processor: Phi3VProcessor, encoded: Sequence[dict[str, Any]], padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """Encoded examples -> one batch.

    Returns:
        `input_ids`, `attention_mask`, `labels` (batch, seq), `loss_weights` (batch,), and where any
        example has pictures `pixel_values` (crops, 3, 336, 336) and `image_sizes` (images, 2).
    """
    batch = dict(processor.pad(encoded, padding_side))
    labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
    # the mask is made from the lengths, so it says where each row's own positions are
    labels[batch["attention_mask"].bool()] = torch.cat([one["labels"] for one in encoded])
    weights = torch.tensor([one.get("loss_weight", 1.0) for one in encoded], dtype=torch.float32)
    return {**batch, "labels": labels, "loss_weights": weights}
