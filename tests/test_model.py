"""What the golden numbers do not cover: batches, losses, generation, files, and the libraries around the model.

The model is tiny: the published configuration shrunk, with a small vocabulary and a rope threshold of
400 positions instead of 4,096, so that rows on both sides of it are cheap. Its logits are of order 1.

Tolerance, where none is stated: 1e-5. A row in a batch is added up in another order than alone (other
matrix sizes), which moves its logits by about 2e-6; a wrong mask, position or picture moves them by
1e-2 and more. Files and everything else that is only copied must come back bit for bit.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from common.phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VModel
from common.phi3v.image_processing import ImageLayout
from common.phi3v.stock import enable_activation_checkpointing
from tests.model_helpers import published_layout, tiny_model, weights_of

ROUNDING = 1e-5
IMAGE_ID, PAD_ID, THRESHOLD = 511, 510, 400
SMALL = {
    "vocab_size": 512,
    "image_token_id": IMAGE_ID,
    "pad_token_id": PAD_ID,
    "original_max_position_embeddings": THRESHOLD,
}

Row = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def eager_model() -> Phi3VForCausalLM:
    return tiny_model("eager", **SMALL)


@pytest.fixture(scope="module")
def sdpa_model() -> Phi3VForCausalLM:
    return tiny_model("sdpa", **SMALL)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> Phi3VForCausalLM:
    """The tiny model with either attention; shared, so a test must not change it."""
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture(scope="module")
def saved_folder(eager_model: Phi3VForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk; shared, so a test must not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    eager_model.save_pretrained(folder)
    return folder


# Rows and batches


def make_row(seed: int, length: int, *grids: tuple[int, int]) -> Row:
    """A prompt of random ids with pictures of random pixels.

    Args:
        length: positions, image features included.
        grids: each picture's sub-images as (rows, columns).
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [(336 * rows, 336 * columns) for rows, columns in grids]
    layouts = [ImageLayout(height, width, height, width) for height, width in sizes]
    num_text = length - sum(layout.num_img_tokens for layout in layouts)
    text = torch.randint(3, 500, (num_text,), generator=generator).split(max(1, num_text // (len(grids) + 1)))
    pieces = [text[0]]
    for position, layout in enumerate(layouts):
        pieces += [torch.full((layout.num_img_tokens,), IMAGE_ID), *text[position + 1 : position + 2]]
    pieces += text[len(grids) + 1 :]
    row = {"input_ids": torch.cat(pieces)[None]}
    assert row["input_ids"].shape == (1, length)
    if grids:
        num_crops = sum(layout.num_crops for layout in layouts)
        row["pixel_values"] = torch.randn(num_crops, 3, 336, 336, generator=generator)
        row["image_sizes"] = torch.tensor(sizes)
    return row


def make_labels(row: Row, num_labels: int) -> torch.Tensor:
    labels = torch.full_like(row["input_ids"], -100)
    labels[0, -num_labels:] = row["input_ids"][0, -num_labels:]
    return labels


def real_positions(row: Row, longest: int, padding_side: str) -> slice:
    length = row["input_ids"].shape[1]
    return slice(longest - length, longest) if padding_side == "left" else slice(0, length)


def make_batch(rows: list[Row], padding_side: str, labels: list[torch.Tensor] | None = None) -> Row:
    """Pad with a token that is not the pad token: whatever stands there must not matter."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    input_ids = torch.full((len(rows), longest), 7)
    batch = {"input_ids": input_ids, "attention_mask": torch.zeros_like(input_ids)}
    if labels is not None:
        batch["labels"] = torch.full_like(input_ids, -100)
    for position, row in enumerate(rows):
        real = real_positions(row, longest, padding_side)
        input_ids[position, real] = row["input_ids"][0]
        batch["attention_mask"][position, real] = 1
        if labels is not None:
            batch["labels"][position, real] = labels[position][0]
    for name in ("pixel_values", "image_sizes"):
        if any(name in row for row in rows):
            batch[name] = torch.cat([row[name] for row in rows if name in row])
    return batch


@torch.no_grad()
def logits_of(model: Phi3VForCausalLM, inputs: Row) -> torch.Tensor:
    return model(**inputs).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = ROUNDING) -> None:
    assert found.shape == wanted.shape
    worst = (found - wanted).abs().max().item()
    assert worst <= tolerance, f"{worst:.3g} differs by more than {tolerance:.3g}"


def assert_same_weights(found: Iterable[tuple[str, torch.Tensor]], wanted: Iterable[tuple[str, torch.Tensor]]) -> None:
    found, wanted = dict(found), dict(wanted)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


ROWS = {
    "text_only": [make_row(0, 20), make_row(1, 90), make_row(2, 1)],
    "one_picture_each": [make_row(3, 330, (1, 1)), make_row(4, 350, (1, 1))],
    "with_and_without_pictures": [make_row(5, 30), make_row(6, 340, (1, 1)), make_row(7, 60)],
    # 650 positions: past the threshold, its neighbours not
    "different_numbers_of_pictures": [
        make_row(8, 650, (1, 1), (1, 1)),
        make_row(9, 40),
        make_row(10, 330, (1, 1)),
    ],
    "different_grids": [make_row(11, 480, (1, 2)), make_row(12, 335, (1, 1)), make_row(13, 490, (2, 1))],
}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_row_in_a_batch_is_as_alone(model: Phi3VForCausalLM, rows: list[Row], padding_side: str) -> None:
    batch = make_batch(rows, padding_side)
    logits = logits_of(model, batch)
    for position, row in enumerate(rows):
        real = real_positions(row, batch["input_ids"].shape[1], padding_side)
        assert_close(logits[position, real], logits_of(model, row)[0])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_row_past_the_threshold_leaves_the_others_alone(model: Phi3VForCausalLM, padding_side: str) -> None:
    """One row has one position too many: it alone takes the long factors."""
    at_threshold, past_it = make_row(20, THRESHOLD, (1, 1)), make_row(21, THRESHOLD + 1, (1, 1))
    batch = make_batch([at_threshold, past_it], padding_side)
    logits = logits_of(model, batch)
    for position, row in enumerate((at_threshold, past_it)):
        real = real_positions(row, THRESHOLD + 1, padding_side)
        assert_close(logits[position, real], logits_of(model, row)[0])
    # and the two lists of factors do differ: without its last id the longer row gives other logits
    cut = {**past_it, "input_ids": past_it["input_ids"][:, :-1]}
    assert (logits_of(model, cut)[0] - logits_of(model, past_it)[0, :-1]).abs().max() > 1e-2


def test_rope_factors_of_a_row() -> None:
    """Each position's angle is position / (factor * 10000^(2i / head)), the factor of the row's own list."""
    model = tiny_model(**SMALL)
    rope = model.config.rope_parameters
    position_ids = torch.stack([torch.arange(THRESHOLD + 5), torch.arange(THRESHOLD + 5).clamp(max=THRESHOLD - 1)])
    cosines, sines = model.model.rotary_emb(torch.zeros(1), position_ids)
    powers = 10_000.0 ** (torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    for row, factors in enumerate((rope["long_factor"], rope["short_factor"])):
        angles = position_ids[row][:, None] / (torch.tensor(factors, dtype=torch.float64) * powers)
        angles = torch.cat([angles, angles], dim=-1)
        scale = model.model.rotary_emb.attention_scaling
        # float32 angles of up to 400 radians carry 3e-5
        assert_close(cosines[row].double(), angles.cos() * scale, 2e-4)
        assert_close(sines[row].double(), angles.sin() * scale, 2e-4)


def test_pictures_matter(model: Phi3VForCausalLM) -> None:
    """Other pixels, other logits, from the first image position on and not before."""
    row = make_row(22, 340, (1, 1))
    changed = {**row, "pixel_values": row["pixel_values"].flip(0)}
    difference = (logits_of(model, row) - logits_of(model, changed))[0].abs().amax(-1)
    first = int((row["input_ids"][0] == IMAGE_ID).nonzero()[0])
    assert difference[:first].max() == 0
    assert difference[first:].min() > 1e-3


def test_logits_to_keep(model: Phi3VForCausalLM) -> None:
    row = make_row(23, 50)
    full = logits_of(model, row)
    assert full.shape == (1, 50, 512)
    assert_close(logits_of(model, {**row, "logits_to_keep": 3}), full[:, -3:])
    chosen = torch.tensor([4, 7, 30])
    assert_close(logits_of(model, {**row, "logits_to_keep": chosen}), full[:, chosen])


def test_attention_implementations_agree(eager_model: Phi3VForCausalLM, sdpa_model: Phi3VForCausalLM) -> None:
    batch = make_batch(ROWS["different_numbers_of_pictures"], "left")
    real = batch["attention_mask"] == 1
    assert eager_model.config._attn_implementation == "eager"
    assert sdpa_model.config._attn_implementation == "sdpa"
    layers = sdpa_model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers
    assert layers[0].self_attn.config._attn_implementation == "sdpa"
    assert_close(logits_of(sdpa_model, batch)[real], logits_of(eager_model, batch)[real])


@pytest.mark.long  # compiling its kernels takes most of a minute
def test_flex_attention(eager_model: Phi3VForCausalLM) -> None:
    """Forward only: on a CPU flex_attention has no backward pass."""
    flexible = tiny_model("flex_attention", **SMALL)
    row = make_row(24, 340, (1, 1))
    assert_close(logits_of(flexible, row), logits_of(eager_model, row))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_flash_attention_without_the_package(saved_folder: Path) -> None:
    """An error, and not another attention in its place."""
    with pytest.raises(ImportError, match=r"(?i)flash"):
        Phi3VForCausalLM.from_pretrained(saved_folder, attn_implementation="flash_attention_2")


# Inputs that do not fit


@pytest.mark.parametrize("change", [-2, 3])
def test_placeholders_and_features_must_be_equally_many(model: Phi3VForCausalLM, change: int) -> None:
    row = make_row(25, 330, (1, 1))
    input_ids = row["input_ids"].clone()
    image_places, text_places = (input_ids[0] == IMAGE_ID).nonzero(), (input_ids[0] != IMAGE_ID).nonzero()
    if change < 0:
        input_ids[0, image_places[:-change]] = 5
    else:
        input_ids[0, text_places[:change]] = IMAGE_ID
    with pytest.raises(ValueError, match=rf"has {313 + change} <\|image\|> tokens .*give 313 features"):
        model(**{**row, "input_ids": input_ids})


def test_placeholders_without_pictures(model: Phi3VForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"has 313 <\|image\|> tokens .*give 0 features"):
        model(input_ids=make_row(26, 330, (1, 1))["input_ids"])


def test_pictures_without_placeholders(model: Phi3VForCausalLM) -> None:
    row = make_row(27, 330, (1, 1))
    with pytest.raises(ValueError, match=r"has 0 <\|image\|> tokens .*give 313 features"):
        model(**{**row, "input_ids": torch.full((1, 330), 5)})


@pytest.mark.parametrize("num_crops", [1, 3])
def test_crops_and_sizes_must_match(model: Phi3VForCausalLM, num_crops: int) -> None:
    row = make_row(28, 330, (1, 1))
    crops = row["pixel_values"][[0, 1, 1]][:num_crops]
    with pytest.raises(ValueError, match=rf"has {num_crops} crops, image_sizes ask for 2"):
        model(**{**row, "pixel_values": crops})


def test_input_embeddings(model: Phi3VForCausalLM) -> None:
    """`inputs_embeds` in place of ids: the same logits; pictures cannot go with them."""
    row = make_row(29, 330, (1, 1))
    with torch.no_grad():
        embeddings = model.model.embed(**row)
        assert_close(model(inputs_embeds=embeddings).logits, logits_of(model, row), 0)
    with pytest.raises(ValueError, match="pixel_values go with input_ids"):
        model(**{name: value for name, value in row.items() if name != "input_ids"}, inputs_embeds=embeddings)


# Loss


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_loss_of_a_batch_is_the_mean_of_its_rows(model: Phi3VForCausalLM, padding_side: str) -> None:
    """Each row counts once, however many labels it has, and as much as its weight says."""
    rows = ROWS["with_and_without_pictures"]
    labels = [make_labels(row, number) for row, number in zip(rows, (2, 25, 7), strict=True)]
    with torch.no_grad():
        pairs = list(zip(rows, labels, strict=True))
        singles = torch.stack([model(**row, labels=row_labels).loss for row, row_labels in pairs])
        for row, row_labels, single in zip(rows, labels, singles, strict=True):
            targets = row_labels[0, 1:]
            wanted = F.cross_entropy(logits_of(model, row)[0, :-1].double(), targets, ignore_index=-100)
            assert_close(single.double(), wanted)
        batch = make_batch(rows, padding_side, labels)
        output = model(**batch)
        assert_close(output.loss, singles.mean())
        assert output.logits is None
        weights = torch.tensor([0.5, 0.0, 3.0])
        assert_close(model(**batch, loss_weights=weights).loss, (weights * singles).mean())


def test_loss_is_differentiated_row_by_row() -> None:
    """The gradient of a batch is the mean of its rows' gradients (float64, so that 1e-12 is rounding)."""
    model = tiny_model("sdpa", **SMALL).double()
    rows = [make_row(30, 25), make_row(31, 60)]
    labels = [make_labels(rows[0], 3), make_labels(rows[1], 30)]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, model.model.layers[0].self_attn.qkv_proj.weight)[0]

    singles = [gradient(model(**row, labels=row_labels).loss) for row, row_labels in zip(rows, labels, strict=True)]
    assert_close(gradient(model(**make_batch(rows, "right", labels)).loss), sum(singles) / 2, 1e-12)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_row_without_labels_counts_0(model: Phi3VForCausalLM, padding_side: str) -> None:
    rows = [make_row(32, 30), make_row(33, 50)]
    labels = [make_labels(rows[0], 5), torch.full((1, 50), -100)]
    with torch.no_grad():
        single = model(**rows[0], labels=labels[0]).loss
        assert_close(model(**make_batch(rows, padding_side, labels)).loss, single / 2)


def test_batch_without_any_label() -> None:
    """Loss 0 that can be differentiated, not NaN: distributed training needs a backward pass on every rank."""
    model = tiny_model(**SMALL)
    loss = model(**make_row(34, 30), labels=torch.full((1, 30), -100)).loss
    assert loss.item() == 0
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_last_network_runs_where_it_is_read() -> None:
    """The result is the whole one's, there; the last layer's feed-forward network sees no other position."""
    model = tiny_model("sdpa", **SMALL).double()
    batch = make_batch([make_row(37, 25), make_row(38, 60)], "right")
    read = torch.tensor([5, 24, 60, 61, 119])  # of 2 * 60 positions
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, states: seen.append(states[0].shape[:-1].numel()))
    with torch.no_grad():
        whole = model.model(**batch).last_hidden_state
        found = model.model(**batch, read_positions=read).last_hidden_state
        assert seen == [120, 120, 120, 120, 120, 5]
        assert_close(found, whole.flatten(0, 1)[read][None], 1e-12)
        seen.clear()
        labels = torch.full((2, 60), -100)
        labels[0, 24], labels[1, 0], labels[1, 30:33] = 7, 8, 9  # nothing stands before a row's first
        model(**batch, labels=labels)
    assert seen == [120, 120, 4]


def test_training_step_keeps_no_cache(eager_model: Phi3VForCausalLM) -> None:
    row = make_row(35, 30)
    with torch.no_grad():
        assert eager_model(**row, labels=make_labels(row, 3)).past_key_values is None
        assert eager_model(**row).past_key_values is not None


def test_bfloat16_loss_is_float32() -> None:
    """The loss is summed in float32; within 1 % of the float32 model's, bfloat16 having 8 bits."""
    row = make_row(36, 330, (1, 1))
    labels = make_labels(row, 10)
    with torch.no_grad():
        wanted = tiny_model(**SMALL)(**row, labels=labels).loss
        model = tiny_model(**SMALL).to(torch.bfloat16)
        found = model(**{**row, "pixel_values": row["pixel_values"].bfloat16()}, labels=labels).loss
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-2)


# Generation


def generate(model: Phi3VForCausalLM, inputs: Row, use_cache: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve greedy tokens (batch, 12) and the logits that they were chosen from (batch, 12, vocabulary)."""
    output = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, dim=1)


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(340, id="before_the_threshold"),
        pytest.param(THRESHOLD - 6, id="crossing"),
        pytest.param(THRESHOLD, id="crossing_with_the_first_token"),
        pytest.param(THRESHOLD + 1, id="past_it"),
    ],
)
def test_cached_generation_is_as_uncached(sdpa_model: Phi3VForCausalLM, length: int) -> None:
    """Also where the rope factors change, and so everything in the cache."""
    row = make_row(40, length, (1, 1))
    tokens, logits = generate(sdpa_model, row)
    uncached_tokens, uncached_logits = generate(sdpa_model, row, use_cache=False)
    assert_close(logits, uncached_logits)
    assert torch.equal(tokens, uncached_tokens)
    assert tokens.unique().numel() > 3, "the same token again and again would prove little"
    # both are what one pass over everything that came before the last token gives
    whole = {**row, "input_ids": torch.cat([row["input_ids"], tokens[:, :-1]], dim=1)}
    assert_close(logits[:, -1], logits_of(sdpa_model, whole)[:, -1])


def test_images_are_encoded_no_oftener_than_needed(sdpa_model: Phi3VForCausalLM) -> None:
    """Once, and once more where the factors change."""
    encoded = []
    hook = sdpa_model.model.vision_embed_tokens.register_forward_hook(lambda *_: encoded.append(1))
    try:
        generate(sdpa_model, make_row(41, 340, (1, 1)))
        assert len(encoded) == 1
        generate(sdpa_model, make_row(41, THRESHOLD - 6, (1, 1)))
        assert len(encoded) == 1 + 2
    finally:
        hook.remove()


@pytest.mark.parametrize("with_pictures", [True, False])
def test_batched_generation_is_as_alone(model: Phi3VForCausalLM, with_pictures: bool) -> None:
    """Left-padded rows, of which two cross the threshold at different steps and one stays far below."""
    picture = [(1, 1)] if with_pictures else []
    rows = [make_row(42, THRESHOLD - 6, *picture), make_row(43, 50), make_row(44, THRESHOLD - 2, *picture)]
    tokens, logits = generate(model, make_batch(rows, "left"))
    for position, row in enumerate(rows):
        alone_tokens, alone_logits = generate(model, {**row, "attention_mask": torch.ones_like(row["input_ids"])})
        assert_close(logits[position], alone_logits[0])
        assert torch.equal(tokens[position], alone_tokens[0])


def test_generated_image_token_is_just_a_token(sdpa_model: Phi3VForCausalLM) -> None:
    """A model that says `<|image|>` is not asked for a picture."""
    row = make_row(45, 330, (1, 1))
    others = [token for token in range(512) if token != IMAGE_ID]
    output = sdpa_model.generate(**row, max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=others)
    assert output[0, 330:].tolist() == [IMAGE_ID] * 4


# Gradients


def gradients_of(model: Phi3VForCausalLM, row: Row, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**row, labels=labels).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    """In float64, to 1e-12: rounding. Every layer, the tower's too, is run a second time."""
    model = tiny_model("sdpa", **SMALL).double().train()
    row = make_row(50, 410, (1, 1))
    row["pixel_values"] = row["pixel_values"].double()
    labels = make_labels(row, 20)
    wanted = gradients_of(model, row, labels)
    calls: dict[str, int] = {}
    tower_layers = model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers
    for kind, layers in (("decoder", model.model.layers), ("tower", tower_layers)):
        for number, layer in enumerate(layers):
            name = f"{kind} {number}"
            # inside of the layer: its own hooks may be run outside of what is repeated
            layer.self_attn.register_forward_pre_hook(
                lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}),
            )
    enable_activation_checkpointing(model)
    found = gradients_of(model, row, labels)
    assert calls == {"decoder 0": 2, "decoder 1": 2, "decoder 2": 2, "tower 0": 2, "tower 1": 2}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 1e-12)
    # the old, re-entrant kind refuses this
    name = "model.layers.0.self_attn.qkv_proj.weight"
    gradient = torch.autograd.grad(model(**row, labels=labels).loss, model.get_parameter(name))[0]
    assert_close(gradient, wanted[name], 1e-12)


def test_unused_weights_have_no_gradient() -> None:
    """The tower past the hidden state that is used, and nothing else."""
    model = tiny_model(**SMALL)
    row = make_row(51, 330, (1, 1))
    found = gradients_of(model, row, make_labels(row, 5))
    without = {name for name, _ in model.named_parameters()} - found.keys()
    assert without
    assert all(re.search(r"vision_model\.(encoder\.layers\.2|post_layernorm)\.", name) for name in without)


@pytest.mark.parametrize("frozen", ["tower", "tower_and_embeddings", "all_but_the_decoder_layers"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_decoder_layer_learns_with_a_frozen_tower(frozen: str, checkpointing: bool) -> None:
    """Activation checkpointing of a layer whose input needs no gradient must not lose the layer's own."""
    model = tiny_model("sdpa", **SMALL).train()
    parts = {
        "tower": [model.model.vision_embed_tokens.img_processor],
        "tower_and_embeddings": [model.model.vision_embed_tokens, model.model.embed_tokens],
        "all_but_the_decoder_layers": [
            *(model.model.vision_embed_tokens, model.model.embed_tokens, model.model.norm, model.lm_head),
        ],
    }
    for part in parts[frozen]:
        part.requires_grad_(False)
    if checkpointing:
        enable_activation_checkpointing(model)
    row = make_row(52, 330, (1, 1))
    found = gradients_of(model, row, make_labels(row, 5))
    for name, _ in model.model.layers.named_parameters():
        assert found[f"model.layers.{name}"].abs().max() > 0, name
    assert not any("img_processor" in name for name in found)


def tower_calls(model: Phi3VForCausalLM) -> list[int]:
    """A list that grows by the number of crops whenever the tower's first layer runs."""
    calls: list[int] = []
    layer = model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers[0]
    # inside of the layer: its own hooks may be run outside of what is repeated
    layer.self_attn.register_forward_pre_hook(
        lambda _, inputs, arguments: calls.append(len(arguments["hidden_states"])), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_tower_keeps_nothing_for_the_backward_pass(frozen: bool) -> None:
    """It runs once, also under activation checkpointing, and without a graph; its neighbours learn as before."""
    model = tiny_model("sdpa", **SMALL).train()
    tower = model.model.vision_embed_tokens.img_processor
    row = make_row(53, 330, (1, 1))
    wanted = gradients_of(model, row, make_labels(row, 5))
    tower.requires_grad_(not frozen)
    enable_activation_checkpointing(model)
    calls = tower_calls(model)
    found = gradients_of(model, row, make_labels(row, 5))
    assert calls == ([2] if frozen else [2, 2])
    assert tower(row["pixel_values"]).requires_grad == (not frozen)
    for name, gradient in wanted.items():
        if "img_processor" not in name:
            assert_close(found[name], gradient)
        assert (name in found) == ("img_processor" not in name or not frozen)


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_crops_per_call(most: int) -> None:
    """However many crops the tower takes at once: the same gradients (float64, so that 1e-12 is rounding)."""
    model = tiny_model("sdpa", **SMALL).double()
    row = make_row(54, 800, (1, 2), (1, 1))
    labels = make_labels(row, 5)
    calls = tower_calls(model)
    wanted = gradients_of(model, row, labels)
    assert calls == [5]
    calls.clear()
    model.model.vision_embed_tokens.img_processor.max_crops_per_call = most
    found = gradients_of(model, row, labels)
    assert calls == {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 9: [5]}[most]
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 1e-12)


# Files


def weights_on_disk(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_as_published_and_loaded_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(**SMALL).to(dtype)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert weights_on_disk(tmp_path) == published_layout(fields, fields["vision_config"])
    assert fields["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert fields["rope_scaling"].keys() == {"long_factor", "short_factor", "type"}
    assert fields["rope_scaling"]["type"] == "su"
    assert fields["architectures"] == ["Phi3VForCausalLM"]
    assert fields["model_type"] == "phi3_v"
    assert not {"dtype", "rope_parameters", "_attn_implementation"} & fields.keys()
    again = Phi3VForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert_same_weights(weights_of(again), weights_of(model))
    row = make_row(60, 410, (1, 1))
    row["pixel_values"] = row["pixel_values"].to(dtype)
    again.set_attn_implementation("eager")
    assert torch.equal(logits_of(again, row), logits_of(model, row))


def test_saved_after_training(tmp_path: Path) -> None:
    """Trained weights come back bit for bit; the tower's last layer, which is not used, as it was."""
    model = tiny_model("sdpa", **SMALL).train()
    before = dict(weights_of(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    row = make_row(61, 340, (1, 1))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**row, labels=make_labels(row, 10)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = Phi3VForCausalLM.from_pretrained(tmp_path)
    after = dict(weights_of(again))
    assert_same_weights(after.items(), weights_of(model))
    for name, weight in before.items():
        is_unused = re.search(r"vision_model\.(encoder\.layers\.2|post_layernorm)\.", name)
        assert torch.equal(after[name], weight) == bool(is_unused), name


def test_saved_again_is_the_same_file(saved_folder: Path, tmp_path: Path) -> None:
    """Loaded and saved without training: every file the same, byte for byte."""
    Phi3VForCausalLM.from_pretrained(saved_folder).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (saved_folder / name).read_bytes(), name


def test_several_files(saved_folder: Path, tmp_path: Path) -> None:
    """Split over several files, as the published checkpoints are."""
    model = Phi3VForCausalLM.from_pretrained(saved_folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["weight_map"].keys() == weights_on_disk(saved_folder).keys()
    assert_same_weights(weights_of(Phi3VForCausalLM.from_pretrained(tmp_path)), weights_of(model))


def changed_copy(saved_folder: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with weights replaced, added, or (None) removed."""
    weights = load_file(saved_folder / "model.safetensors") | changes
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((saved_folder / "config.json").read_text())
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.1.self_attn.qkv_proj.weight",
        "model.vision_embed_tokens.sub_GN",
        "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.2.mlp.fc1.bias",
    ],
)
def test_missing_weight(saved_folder: Path, tmp_path: Path, name: str) -> None:
    folder = changed_copy(saved_folder, tmp_path, **{name: None})
    with pytest.raises(ValueError, match=rf"missing from the checkpoint: \['{re.escape(name)}'\]"):
        Phi3VForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.vision_embed_tokens.extra", "other"])
def test_unexpected_weight(saved_folder: Path, tmp_path: Path, name: str) -> None:
    folder = changed_copy(saved_folder, tmp_path, **{name: torch.zeros(2)})
    with pytest.raises(ValueError, match=rf"does not have: \['{re.escape(name)}'\]"):
        Phi3VForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("arguments", [{}, {"ignore_mismatched_sizes": True}])
def test_weight_of_another_shape(saved_folder: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Named with both shapes, even to a caller who asks transformers to pass over it."""
    name = "model.vision_embed_tokens.img_projection.0.weight"
    folder = changed_copy(saved_folder, tmp_path, **{name: torch.zeros(64, 100)})
    with pytest.raises(ValueError, match=rf"of another shape: .*{re.escape(name)}: \[64, 100\], not \[64, 256\]"):
        Phi3VForCausalLM.from_pretrained(folder, **arguments)


def test_second_copy_of_the_embeddings_is_accepted(saved_folder: Path, tmp_path: Path) -> None:
    """Some checkpoints carry one; it is neither used nor written again."""
    weights = load_file(saved_folder / "model.safetensors")
    duplicate = {"model.vision_embed_tokens.wte.weight": weights["model.embed_tokens.weight"].clone()}
    model = Phi3VForCausalLM.from_pretrained(changed_copy(saved_folder, tmp_path, **duplicate))
    assert_same_weights(weights_of(model), weights.items())
    model.save_pretrained(tmp_path / "saved")
    assert weights_on_disk(tmp_path / "saved") == weights_on_disk(saved_folder)


def test_loading_information(saved_folder: Path) -> None:
    model, information = Phi3VForCausalLM.from_pretrained(saved_folder, output_loading_info=True)
    assert isinstance(model, Phi3VForCausalLM)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]


def test_auto_classes(saved_folder: Path, eager_model: Phi3VForCausalLM) -> None:
    assert type(AutoConfig.from_pretrained(saved_folder)) is Phi3VConfig
    causal = AutoModelForCausalLM.from_pretrained(saved_folder)
    assert type(causal) is Phi3VForCausalLM
    assert_same_weights(weights_of(causal), weights_of(eager_model))
    base = AutoModel.from_pretrained(saved_folder)
    assert type(base) is Phi3VModel
    assert_same_weights(weights_of(base), weights_of(eager_model.model))
    assert type(AutoModelForCausalLM.from_config(eager_model.config)) is Phi3VForCausalLM


def test_copy_of_a_model(eager_model: Phi3VForCausalLM) -> None:
    row = make_row(62, 410, (1, 1))
    assert torch.equal(logits_of(copy.deepcopy(eager_model), row), logits_of(eager_model, row))


# PEFT and bitsandbytes


def test_lora(saved_folder: Path) -> None:
    """LoRA wraps the model and learns; the base weights stay as they are."""
    peft = pytest.importorskip("peft")
    model = Phi3VForCausalLM.from_pretrained(saved_folder)
    before = dict(weights_of(model))
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).train()
    adapters = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 2 * len(targets) * model.config.num_hidden_layers
    start = {name: parameter.detach().clone() for name, parameter in adapters.items()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2, weight_decay=0.0)
    row = make_row(63, 340, (1, 1))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = wrapped(**row, labels=make_labels(row, 10)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == 1:  # A's gradient is 0 while B is 0
            assert all(not torch.equal(adapters[name], start[name]) for name in adapters if "lora_B" in name)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(adapters[name], start[name]) for name in adapters)
    after = {name.replace(".base_layer", ""): weight for name, weight in weights_of(model) if "lora_" not in name}
    assert_same_weights(after.items(), before.items())


def test_four_bits(saved_folder: Path, eager_model: Phi3VForCausalLM) -> None:
    """NF4 from disk, on a CPU: finite logits that resemble the full model's."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = Phi3VForCausalLM.from_pretrained(
        saved_folder, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    quantized = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert "model.layers.0.self_attn.qkv_proj" in quantized
    row = make_row(64, 340, (1, 1))
    logits = logits_of(model, row)
    assert logits.isfinite().all()
    # four bits leave a cosine of about 0.98 here; weights in a wrong place would leave about 0
    assert F.cosine_similarity(logits, logits_of(eager_model, row), dim=-1).mean() > 0.9
