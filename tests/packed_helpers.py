"""Encoded examples of random ids and pixels, and the gradients of a packed batch beside those of its examples alone.

The model is the tiny one with a small vocabulary and a rope threshold of 400 positions instead of 4,096.
A picture of one sub-image has 313 tokens, one of two 457.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from common.collation import share_pictures
from common.phi3v import Phi3VForCausalLM
from common.phi3v.image_processing import ImageLayout
from common.phi3v.masks import BY_DOCUMENT
from common.training import using_attention
from tests.model_helpers import tiny_model

IMAGE_ID, THRESHOLD = 511, 400
SMALL = {
    "vocab_size": 512,
    "image_token_id": IMAGE_ID,
    "pad_token_id": 510,
    "original_max_position_embeddings": THRESHOLD,
}
# A gradient that is 0 in exact arithmetic: a key's bias moves all of a query's scores alike.
NO_GRADIENT = "k_proj.bias"

Encoded = dict[str, Any]


def training_model(attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Phi3VForCausalLM:
    """The tiny model as it is trained: of the tower's layers only those that run."""
    model = tiny_model(attention, **SMALL).to(dtype).train()
    tower = model.model.vision_embed_tokens.img_processor
    for unused in (tower.vision_model.post_layernorm, *tower.vision_model.encoder.layers[tower.num_layers_used :]):
        unused.requires_grad_(False)
    return model


def questions(
    seed: int, grids: Sequence[tuple[int, int]], own: Sequence[tuple[int, int]], weights: Sequence[float] | None = None
) -> list[Encoded]:
    """Questions about the same pictures, as `encode_questions` makes them.

    Args:
        grids: each picture's sub-images as (rows, columns).
        own: of each question the tokens of its text and of its answer.
        weights: what each question's loss counts.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(3, 500, (count,), generator=generator)

    sizes = [(336 * rows, 336 * columns) for rows, columns in grids]
    layouts = [ImageLayout(height, width, height, width) for height, width in sizes]
    pieces = [draw(4)]
    for layout in layouts:  # a few ids before every picture, as the reference's own BOS of every chunk
        pieces += [draw(2), torch.full((layout.num_img_tokens,), IMAGE_ID)]
    pictures = {}
    if grids:
        num_crops = sum(layout.num_crops for layout in layouts)
        pixels = torch.randn(num_crops, 3, 336, 336, generator=generator)
        pictures = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    encoded = []
    for number, (text, answer) in enumerate(own):
        ids = torch.cat([*pieces, draw(text), draw(answer)])
        labels = torch.full_like(ids, -100)
        labels[-answer:] = ids[-answer:]
        weight = {} if weights is None else {"loss_weight": weights[number]}
        encoded.append({"input_ids": ids, "labels": labels, **pictures, **weight})
    return encoded


def shared(groups: Sequence[Sequence[Encoded]]) -> list[Encoded]:
    """Groups of questions about one picture each -> documents."""
    return [document for group in groups for document in share_pictures(group, IMAGE_ID, THRESHOLD)]


def alone(one: Encoded) -> dict[str, torch.Tensor]:
    """An encoded example as a batch of one ordinary row."""
    inputs = {name: one[name] for name in ("pixel_values", "image_sizes") if name in one}
    return inputs | {name: one[name][None] for name in ("input_ids", "labels")}


def separate_gradients(model: torch.nn.Module, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Gradients of the examples' weighted mean loss, every example in a row and a pass of its own."""
    model.zero_grad()
    for one in encoded:
        (model(**alone(one)).loss * one.get("loss_weight", 1.0) / len(encoded)).backward()
    return collect_gradients(model)


def packed_gradients(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], attention: str = BY_DOCUMENT
) -> dict[str, torch.Tensor]:
    """Gradients of one batch, by default with the attention that packed rows are trained with."""
    model.zero_grad()
    with using_attention(model, attention):
        model(**batch).loss.backward()
    return collect_gradients(model)


def collect_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def worst_difference(
    model: torch.nn.Module, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """The largest relative difference of a parameter's gradient (norm of the difference over norm), and whose.

    Every parameter that trains must have a gradient in both, and one that is not 0. `k_proj.bias` of the
    tower, which has none in exact arithmetic, is compared with the norm of the whole gradient.
    """
    training = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert found.keys() == wanted.keys() == training
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    differences = []
    for name, gradient in wanted.items():
        norm = whole if name.endswith(NO_GRADIENT) else gradient.norm().item()
        assert norm > 0, name
        differences.append(((found[name] - gradient).norm().item() / norm, name))
    return max(differences)
