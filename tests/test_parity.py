"""The numbers of the reference implementation, reproduced.

`tests/golden` holds what the code published with the checkpoints gave under transformers 4.43 in
float32 with eager attention on a CPU. The model is written to disk as the published checkpoints
are and loaded from there; its inputs come from stored ids, so that only the tests of the tokenizer
need a published tokenizer. What was measured is printed as a table at the end of the run.

Tolerances. The reference and this package add the same float32 numbers in another order (merged
attention kernels, all pictures in one call), on machines that may differ. Seen: logits 4e-6, losses
2e-6, gradient norms 2e-6 relative; each tolerance leaves a factor of five to ten for other CPUs
and torch versions, and a single wrong position, patch or separator is off by 1e-2 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.phi3v import Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor
from common.phi3v.image_processing import plan_layout
from tests.model_helpers import (
    CASES,
    END_OF_TEXT_ID,
    expand_runs,
    golden,
    golden_inputs,
    golden_prompt,
    picture,
)

Within = Callable[[str, str, float, float], None]

PIXELS = 1e-6  # as stated for the golden numbers; seen: 0, the same float32 operations in the same order
LOGITS = 5e-5  # the logits are of order 1 to 5
LOSS = 1e-5
GRADIENT_NORM = 1e-5  # relative
# The gradient of a tower's k_proj.bias is 0 in exact arithmetic (softmax does not see what all keys
# share); its norm is rounding of about 1e-9, far below any other norm.
KEY_BIAS_NORM = 1e-7
ADAMW_LOSS = 1e-4  # ten steps let differences grow


# Geometry, pixels and tokens


def test_geometry(within: Within) -> None:
    """Padded sizes and token counts of 304 sizes and crop limits: whole numbers, so exactly."""
    rows = golden("geometry.json")
    assert len(rows) == 304
    different = []
    for row in rows:
        layout = plan_layout(row["width"], row["height"], row["num_crops"])
        found = (layout.padded_height, layout.padded_width, layout.num_img_tokens)
        wanted = (row["padded_height"], row["padded_width"], row["num_img_tokens"])
        if found != wanted:
            different.append((row, found))
    within("304 sizes", "geometry, rows different", len(different), 0)
    assert not different


@pytest.mark.parametrize("index", range(6))
def test_pixels(index: int, within: Within) -> None:
    """2,000 pixels of each picture, and mean and deviation of every crop."""
    row, arrays = golden("pixels.json")[index], golden("pixels.npz")
    source = picture(row["width"], row["height"], row["picture_seed"])
    features = Phi3VImageProcessor(num_crops=row["num_crops"])(source)
    assert features["image_sizes"].tolist() == [row["image_size"]]
    assert features["num_img_tokens"].tolist() == [row["num_img_tokens"]]
    pixel_values = features["pixel_values"]
    assert pixel_values.shape == (row["crops"], 3, 336, 336)
    assert pixel_values.dtype == torch.float32
    case = f"picture {row['width']}x{row['height']}, {row['num_crops']} crops"
    sampled = pixel_values.numpy().ravel()[arrays[f"p{index}_index"]]
    within(case, "pixels", np.abs(sampled - arrays[f"p{index}_value"]).max(), PIXELS)
    crops = pixel_values.double().flatten(1)
    within(case, "crop means", np.abs(crops.mean(1).numpy() - arrays[f"p{index}_crop_mean"]).max(), PIXELS)
    deviations = crops.std(1, correction=0).numpy()
    within(case, "crop deviations", np.abs(deviations - arrays[f"p{index}_crop_std"]).max(), PIXELS)


def test_tokens(published_instruct: Path) -> None:
    """The tokenizer's ids, with and without BOS: whole numbers, so exactly."""
    tokenizer = Phi3VProcessor.from_pretrained(published_instruct).tokenizer
    for row in golden("tokens.json"):
        assert tokenizer(row["text"]).input_ids == row["with_bos"], row["text"]
        assert tokenizer(row["text"], add_special_tokens=False).input_ids == row["without_bos"], row["text"]


def test_prompts(published_instruct: Path) -> None:
    """Chat template, then ids of prompt and pictures: exactly."""
    processor = Phi3VProcessor.from_pretrained(published_instruct)
    for row in golden("prompts.json"):
        text = processor.apply_chat_template(row["messages"], add_generation_prompt=True)
        assert text == row["text"]
        pictures = [picture(*description) for description in row["pictures"]]
        input_ids = processor(text, pictures, num_crops=row["num_crops"])["input_ids"]
        assert input_ids.tolist() == [expand_runs(row["input_ids_rle"])]
        assert input_ids.shape[1] == row["length"]


@pytest.mark.parametrize("case", CASES)
def test_case_inputs_from_text(case: str, published_instruct: Path) -> None:
    """The stored ids of the cases are what the processor makes of their messages and answers."""
    stored = golden("cases.json")[case]
    processor = Phi3VProcessor.from_pretrained(published_instruct)
    text = processor.apply_chat_template(stored["messages"], add_generation_prompt=True)
    pictures = [picture(*description) for description in stored["pictures"]]
    prompt_ids = processor(text, pictures, num_crops=stored["num_crops"])["input_ids"][0].tolist()
    answer = stored["answer"] + "<|end|>\n<|endoftext|>"
    answer_ids = processor.tokenizer(answer, add_special_tokens=False).input_ids
    assert answer_ids == stored["answer_ids"]
    assert prompt_ids + answer_ids == golden_inputs(case)[0]["input_ids"][0].tolist()


# The model


def test_parameter_names(golden_eager: Phi3VForCausalLM) -> None:
    """Every parameter has the published name and shape, and there is no other."""
    shapes = {name: list(parameter.shape) for name, parameter in golden_eager.named_parameters()}
    assert shapes == golden("model.json")["parameters"]


def check_logits(label: str, case: str, logits: torch.Tensor, within: Within) -> None:
    """Compare the logits (stored positions, vocabulary) with the stored columns and log-sum-exp."""
    arrays = golden("model.npz")
    columns = logits[:, arrays[f"{case}_vocab"]].numpy()
    within(label, "logits", np.abs(columns - arrays[f"{case}_logits"]).max(), LOGITS)
    logsumexp = logits.double().logsumexp(-1).numpy()
    within(label, "log-sum-exp", np.abs(logsumexp - arrays[f"{case}_logsumexp"]).max(), LOGITS)


def stored_positions(case: str) -> torch.Tensor:
    return torch.from_numpy(golden("model.npz")[f"{case}_positions"])


ALL_CASES = [(attention, case) for attention in ("eager", "sdpa") for case in CASES]
# The longest case takes longest, so that with each attention it is run once: with sdpa for its logits,
# with eager for its loss and gradients, and its logits on the way.
LOGITS_CASES = [pair for pair in ALL_CASES if pair != ("eager", "long")]
LOSS_CASES = [pair for pair in ALL_CASES if pair != ("sdpa", "long")]


@pytest.mark.parametrize(("attention", "case"), LOGITS_CASES)
def test_logits(attention: str, case: str, within: Within, request: pytest.FixtureRequest) -> None:
    """Stored rows and columns of the logits, and the log of the sum of each row's exponentials."""
    model = request.getfixturevalue(f"golden_{attention}")
    inputs, _ = golden_inputs(case)
    assert inputs["input_ids"].shape[1] == golden("cases.json")[case]["length"]
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=stored_positions(case)).logits[0]
    check_logits(f"{case}, {attention}", case, logits, within)


@pytest.mark.parametrize(("attention", "case"), LOSS_CASES)
def test_loss_and_gradients(attention: str, case: str, within: Within, request: pytest.FixtureRequest) -> None:
    """The loss, and the norm of its gradient for every parameter, summed in float64."""
    model = request.getfixturevalue(f"golden_{attention}")
    inputs, labels = golden_inputs(case)
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    norms = {
        name: 0.0 if parameter.grad is None else parameter.grad.double().norm().item()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad()
    label = f"{case}, {attention}"
    within(label, "loss", abs(loss.item() - golden("cases.json")[case]["loss"]), LOSS)
    worst_relative = worst_key_bias = 0.0
    wanted_norms = golden("model.npz")[f"{case}_grad_norms"]
    for name, wanted in zip(golden("model.json")["parameters"], wanted_norms, strict=True):
        difference = abs(norms[name] - wanted)
        if name.endswith("k_proj.bias"):
            worst_key_bias = max(worst_key_bias, difference)
        elif wanted == 0:
            assert norms[name] == 0, f"{name} takes no part, yet has a gradient"
        else:
            worst_relative = max(worst_relative, difference / wanted)
    within(label, "gradient norms, relative", worst_relative, GRADIENT_NORM)
    within(label, "gradient norms, k_proj.bias", worst_key_bias, KEY_BIAS_NORM)
    if (attention, case) not in LOGITS_CASES:
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=stored_positions(case)).logits[0]
        check_logits(label, case, logits, within)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("case", ["single", "multi"])
def test_greedy_tokens(
    golden_sdpa: Phi3VForCausalLM, case: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve tokens, equal. The images come with the first step, and without the cache with every step."""
    prompt = golden_prompt(case)
    embedding = golden_sdpa.model.vision_embed_tokens
    features = embedding(prompt["pixel_values"], prompt["image_sizes"]).detach()
    encoded = []

    def remembered_features(pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        # encoding the same pictures twelve times would take most of the test's time
        assert torch.equal(pixel_values, prompt["pixel_values"])
        assert torch.equal(image_sizes, prompt["image_sizes"])
        encoded.append(1)
        return features

    monkeypatch.setattr(embedding, "forward", remembered_features)
    output = golden_sdpa.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None)
    assert output[0, prompt["input_ids"].shape[1] :].tolist() == golden("cases.json")["greedy"][case]
    assert len(encoded) == (1 if use_cache else 12)


def test_greedy_tokens_batched(golden_sdpa: Phi3VForCausalLM) -> None:
    """Both prompts in one left-padded batch give the tokens that each gives alone."""
    prompts = [golden_prompt(case) for case in ("single", "multi")]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    input_ids = torch.full((2, longest), END_OF_TEXT_ID)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        length = prompt["input_ids"].shape[1]
        input_ids[row, longest - length :] = prompt["input_ids"][0]
        attention_mask[row, longest - length :] = 1
    output = golden_sdpa.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=torch.cat([prompt["pixel_values"] for prompt in prompts]),
        image_sizes=torch.cat([prompt["image_sizes"] for prompt in prompts]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    greedy = golden("cases.json")["greedy"]
    assert output[:, longest:].tolist() == [greedy["single"], greedy["multi"]]


def test_adamw_losses(golden_folder: Path, within: Within) -> None:
    """Ten training steps of every parameter, the gradient's norm clipped to 1."""
    model = Phi3VForCausalLM.from_pretrained(golden_folder, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.01)
    worst = 0.0
    for step, wanted in enumerate(golden("cases.json")["adamw_losses"]):
        inputs, labels = golden_inputs(("single", "multi")[step % 2])
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        worst = max(worst, abs(loss.item() - wanted))
    within("single and multi, sdpa", "losses of ten AdamW steps", worst, ADAMW_LOSS)
