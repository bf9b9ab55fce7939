"""The reference way of training and answering, written from its description, to measure ours against in the same run.

What it does that ours does not: turns a tall picture on its side and back, pads every picture's crops with zeros to
`num_crops + 1`, encodes the padding too, runs the tower's last layer, whose output is not used (but for adapters,
where the published script drops it), takes one question at a time, recomputes every layer, and computes the logits of
the whole sequence. Its loss and its gradients are ours (`tests/test_benchmarks.py`).

Notation used for tensor shapes
- crops: num_crops + 1, of one picture: the global view, its sub-images row by row, zeros
- seq: positions of the one row
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torchvision.transforms.functional as vision
from peft import PeftModel
from PIL import Image
from torch.nn import functional as F

from common.collation import Example, encode_example
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.phi3v.image_processing import CLIP_MEAN, CLIP_STD
from common.phi3v.modeling import IGNORED_LABEL, assemble_grid, merge_patches

SIDE = 336
Batch = dict[str, torch.Tensor]


# --- pictures


def process_picture(picture: Image.Image, num_crops: int) -> dict[str, torch.Tensor]:
    """One picture -> `pixel_values` (1, crops, 3, 336, 336), `image_sizes` (1, 2), `num_img_tokens` (1,)."""
    pixels = vision.normalize(vision.to_tensor(resize_and_pad(picture.convert("RGB"), num_crops)), CLIP_MEAN, CLIP_STD)
    _, height, width = pixels.shape
    rows, columns = height // SIDE, width // SIDE
    global_view = F.interpolate(pixels[None].float(), size=(SIDE, SIDE), mode="bicubic")
    # (3, rows * 336, columns * 336) -> (rows * columns, 3, 336, 336)
    grid = pixels.reshape(3, rows, SIDE, columns, SIDE).permute(1, 3, 0, 2, 4).reshape(-1, 3, SIDE, SIDE).contiguous()
    crops = torch.cat([global_view, grid])
    num_tokens = (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
    return {
        "pixel_values": pad_crops(crops, num_crops)[None],
        "image_sizes": torch.tensor([[height, width]]),
        "num_img_tokens": torch.tensor([num_tokens]),
    }


def resize_and_pad(picture: Image.Image, num_crops: int) -> Image.Image:
    """To the largest grid of its proportions, white above and below; a tall picture lies on its side meanwhile."""
    is_tall = picture.height > picture.width
    if is_tall:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    ratio = picture.width / picture.height
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= num_crops:
        columns += 1
    width = columns * SIDE
    height = int(width / ratio)
    picture = vision.resize(picture, [height, width])
    missing = math.ceil(height / SIDE) * SIDE - height
    picture = vision.pad(picture, [0, missing // 2, 0, missing - missing // 2], fill=[255, 255, 255])
    return picture.transpose(Image.Transpose.TRANSPOSE) if is_tall else picture


def pad_crops(crops: torch.Tensor, num_crops: int) -> torch.Tensor:
    """(1 + rows * columns, 3, 336, 336) -> (num_crops + 1, 3, 336, 336), zeros after the picture's own."""
    return torch.cat([crops, crops.new_zeros(num_crops + 1 - len(crops), *crops.shape[1:])])


class _ReferenceProcessor:
    """The processor with the reference's pictures; everything else is ours."""

    def __init__(self, processor: Phi3VProcessor) -> None:
        self.processor = processor
        self.encode = Phi3VProcessor.encode.__get__(self)
        self.image_processor = self._process

    def _process(self, pictures: list[Image.Image], num_crops: int | None = None) -> Batch:
        (picture,) = pictures
        return process_picture(picture, num_crops or self.processor.image_processor.num_crops)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


def encode(processor: Phi3VProcessor, example: Example, with_answer: bool = True) -> Batch:
    """One question about one picture -> a batch of one: ids, labels and mask (1, seq), and the picture."""
    encoded = encode_example(_ReferenceProcessor(processor), example, with_answer)
    batch = {name: encoded[name][None] for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch | {name: encoded[name] for name in ("pixel_values", "image_sizes")}


# --- the model


def image_features(model: Phi3VForCausalLM | PeftModel, pixel_values: torch.Tensor, size: list[int]) -> torch.Tensor:
    """pixel_values (1, crops, 3, 336, 336), the padding included, and `[height, width]` -> (features, hidden)"""
    embedding = inner(model).model.vision_embed_tokens
    tower = embedding.img_processor.vision_model
    chosen = embedding.img_processor.num_layers_used
    num_layers = chosen if isinstance(model, PeftModel) else len(tower.encoder.layers)
    weight = tower.embeddings.patch_embedding.weight
    states = [tower.pre_layrnorm(tower.embeddings(pixel_values.flatten(0, 1).to(weight.dtype)))]
    for layer in tower.encoder.layers[:num_layers]:
        states.append(layer(states[-1], None))  # all hidden states are kept, as the reference asks for them
    patches = states[chosen][:, 1:]
    rows, columns = size[0] // SIDE, size[1] // SIDE
    merged = merge_patches(patches)  # (crops, 12, 12, 4 * width)
    features = [
        with_row_ends(assemble_grid(merged[1 : 1 + rows * columns], rows, columns), embedding.sub_GN),
        embedding.glb_GN[0],
        with_row_ends(merged[0], embedding.sub_GN),
    ]
    return embedding.img_projection(torch.cat(features))


def with_row_ends(grid: torch.Tensor, row_end: torch.Tensor) -> torch.Tensor:
    """(grid rows, grid columns, 4 * width) -> (grid rows * (grid columns + 1), 4 * width)"""
    return torch.cat([grid, row_end[0].expand(len(grid), 1, -1)], dim=1).flatten(0, 1)


def run_model(model: Phi3VForCausalLM | PeftModel, batch: Batch, cache: Any = None) -> torch.Tensor:
    """Logits of every position, (1, seq, vocabulary), in float32."""
    decoder = inner(model).model
    features = image_features(model, batch["pixel_values"], batch["image_sizes"][0].tolist())
    embeddings = decoder.embed_tokens(batch["input_ids"])
    places = (batch["input_ids"] == decoder.config.image_token_id).nonzero(as_tuple=True)
    embeddings = embeddings.index_put(places, features.to(embeddings.dtype))
    states = decoder(
        inputs_embeds=embeddings,
        attention_mask=batch["attention_mask"],
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return in_float(inner(model).lm_head(states))


def loss(model: Phi3VForCausalLM | PeftModel, batch: Batch) -> torch.Tensor:
    """The mean over the answer's tokens of one question."""
    logits = run_model(model, batch)
    logits, labels = logits[..., :-1, :].contiguous(), batch["labels"][..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=IGNORED_LABEL)


@torch.no_grad()
def answer(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, example: Example, end_ids: list[int], max_new_tokens: int
) -> str:
    """Greedy, one question at a time, the picture encoded for it alone; with a cache."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in encode(processor, example, with_answer=False).items()}
    decoder, cache = inner(model).model, DynamicCache(config=model.config)
    token = run_model(model, batch, cache)[:, -1].argmax(-1)
    tokens = [int(token)]
    while tokens[-1] not in end_ids and len(tokens) < max_new_tokens:
        states = decoder(inputs_embeds=decoder.embed_tokens(token[None]), past_key_values=cache, use_cache=True)
        token = in_float(inner(model).lm_head(states.last_hidden_state))[:, -1].argmax(-1)
        tokens.append(int(token))
    return processor.decode(tokens, skip_special_tokens=True)


def inner(model: Phi3VForCausalLM | PeftModel) -> Phi3VForCausalLM:
    """The model without PEFT's wrapper, its adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def in_float(logits: torch.Tensor) -> torch.Tensor:
    """To float32, which is the reference's; float64 stays, for checks of gradients."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
