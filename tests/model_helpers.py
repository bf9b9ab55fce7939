"""What several tests share: the golden numbers, the golden model, tiny models and a stand-in tokenizer.

The golden numbers (`tests/golden/`) were measured on the code published with the checkpoints
(microsoft/Phi-3.5-vision-instruct) under transformers 4.43, float32, eager attention, CPU. Pictures
and weights are made by rule, so that none has to be stored.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from common.cli import Precision
from common.phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).parent.parent
IMAGE_TOKEN_ID = 32044
END_OF_TEXT_ID = 32000
CASES = ("single", "multi", "text", "long")
PUBLISHED_NAMES = ("phi-3.5-vision-instruct", "phi-3-vision-128k-instruct")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}"
    "{% endif %}"
)


# The golden numbers


@functools.cache
def golden(name: str) -> Any:
    """`golden("cases.json")`: a file of `tests/golden`, read once (do not change what it returns)."""
    path = GOLDEN / name
    return dict(np.load(path)) if path.suffix == ".npz" else json.loads(path.read_text())


def picture(width: int, height: int, seed: int) -> Image.Image:
    """The golden numbers' picture `[width, height, seed]`."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = (x * (3 + seed) + y * 2) % 256
    green = ((x // 7) * (11 + seed) + (y // 5) * 13) % 256
    blue = (x * y + seed * 17) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8), "RGB")


def write_pictures(folder: Path) -> None:
    """`1.png`, `2.png` and `3.png`, of one sub-image each, and `broken.png`, which is cut short."""
    for number in (1, 2, 3):
        picture(336, 336, number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:3000])


def expand_runs(runs: list[list[int]]) -> list[int]:
    """Runs `[id, count]` -> ids; the reference's `-i` for image i becomes the id of `<|image|>`."""
    return [IMAGE_TOKEN_ID if token < 0 else token for token, count in runs for _ in range(count)]


def make_weight(name: str, shape: list[int] | torch.Size) -> torch.Tensor:
    """The golden model's weight of that name: drawn from a generator that the name seeds."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        weight = 1 + 0.1 * drawn
    elif name.endswith("bias"):
        weight = 0.02 * drawn
    elif (
        name == "model.embed_tokens.weight"
        or "position_embedding" in name
        or "class_embedding" in name
        or name.endswith("_GN")
    ):
        weight = drawn
    else:
        weight = drawn / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(weight.astype(np.float32).reshape(tuple(shape)))


def golden_config() -> dict[str, Any]:
    """The golden model's `config.json`: the published fields, and the size of its tower."""
    model = golden("model.json")
    return copy.deepcopy({**model["config"], "vision_config": model["vision_config"]})


def write_golden_checkpoint(folder: Path) -> Path:
    """Write the golden model as the published checkpoints lie on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: make_weight(name, shape) for name, shape in golden("model.json")["parameters"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(golden_config(), indent=2))
    return folder


@functools.cache
def golden_inputs(case: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A golden case's model inputs, made from the stored ids (no tokenizer), and its labels."""
    stored = golden("cases.json")[case]
    inputs = {"input_ids": torch.tensor([expand_runs(stored["input_ids_rle"])])}
    if stored["pictures"]:
        pictures = [picture(*description) for description in stored["pictures"]]
        features = Phi3VImageProcessor(num_crops=stored["num_crops"])(pictures)
        inputs |= {name: features[name] for name in ("pixel_values", "image_sizes")}
    labels = torch.full_like(inputs["input_ids"], -100)
    num_answer_ids = len(stored["answer_ids"])
    labels[0, -num_answer_ids:] = inputs["input_ids"][0, -num_answer_ids:]
    return inputs, labels


def golden_prompt(case: str) -> dict[str, torch.Tensor]:
    """A golden case's inputs without the answer, to generate from."""
    inputs, _ = golden_inputs(case)
    num_answer_ids = len(golden("cases.json")[case]["answer_ids"])
    return {**inputs, "input_ids": inputs["input_ids"][:, :-num_answer_ids]}


# The published files


def published_config() -> dict[str, Any]:
    """The fields of phi-3.5-vision-instruct's `config.json` that describe the model.

    The golden model has them all, both rope lists included, and differs in size only;
    `test_configuration.py` compares this with the published file where that is there.
    """
    config = golden_config()
    del config["vision_config"]
    return config | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "torch_dtype": "bfloat16",
    }


def published_folder(name: str) -> Path | None:
    """The folder with a published checkpoint's small files, or None where it is not there."""
    root = os.environ.get("PHI3V_CHECKPOINTS")
    folder = (Path(root) if root else REPOSITORY.parent / "shared" / "checkpoints") / name
    return folder if (folder / "tokenizer.json").is_file() else None


def published_layout(config: dict[str, Any], tower: dict[str, int]) -> dict[str, list[int]]:
    """Every weight's name and shape in a published checkpoint of the given size.

    Scaled by rule from the golden model's list, which was read from the published code: layer 0
    stands for every layer, and every dimension is replaced by what it means.
    """
    hidden, wide, width = config["hidden_size"], config["intermediate_size"], tower["hidden_size"]
    dimension_meanings = {  # golden model's dimension -> meaning, in the decoder and in the tower
        "decoder": {32064: config["vocab_size"], 192: hidden, 576: 3 * hidden, 512: 2 * wide, 256: wide},
        "tower": {1024: width, 256: tower["intermediate_size"], 3: 3, 14: 14, 577: 577},
        "embedding": {1: 1, 4096: 4 * width, 192: hidden},
    }
    layout = {}
    for name, shape in golden("model.json")["parameters"].items():
        part = "tower" if ".vision_model." in name else "embedding" if "vision_embed_tokens" in name else "decoder"
        scaled = [dimension_meanings[part][dimension] for dimension in shape]
        if ".layers." not in name:
            layout[name] = scaled
        elif ".layers.0." in name:
            num_layers = (tower if part == "tower" else config)["num_hidden_layers"]
            layout |= {name.replace(".layers.0.", f".layers.{layer}."): scaled for layer in range(num_layers)}
    return layout


# Tiny models


def tiny_config(**overrides: Any) -> Phi3VConfig:
    """The published configuration shrunk in size only: published vocabulary and ids, both rope lists.

    A head is 32 wide, so of each list every third factor is kept (16, half a head). Small enough that
    a forward pass of a picture (313 positions, 2 views) takes milliseconds. Every size is a multiple
    of 64, the block that 4-bit weights are stored in.

    Args:
        overrides: fields of `config.json` to set.
    """
    fields = published_config()
    for name in ("long_factor", "short_factor"):
        fields["rope_scaling"][name] = fields["rope_scaling"][name][::3]
    fields["img_processor"]["image_dim_out"] = 64
    fields |= {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "torch_dtype": "float32",
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
    }
    return Phi3VConfig.from_dict(fields | overrides)


def tiny_model(attn_implementation: str = "eager", **overrides: Any) -> Phi3VForCausalLM:
    """A model of `tiny_config(**overrides)` with the golden rule's weights, in evaluation mode.

    Not transformers' initial weights: those leave the separators 0 and every activation so small
    that a wrong position or a wrong picture would hardly show in the logits.
    """
    config = tiny_config(**overrides)
    config._attn_implementation = attn_implementation
    model = Phi3VForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(make_weight(name, parameter.shape))
    return model.eval()


def weights_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and copies of a model's weights."""
    return ((name, weight.detach().clone()) for name, weight in model.state_dict().items())


# A tokenizer where the published one is not there


def write_stand_in_checkpoint(folder: Path) -> Path:
    """Write a processor's files in the published layout with a made-up tokenizer.

    One token a character, the published ids for the special tokens, the published chat template,
    `<|endoftext|>` as padding, as end of text and as a token of the text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    special = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<|endoftext|>", 32001: "<|assistant|>"}
    special |= {32006: "<|system|>", 32007: "<|end|>", 32010: "<|user|>", 32044: "<|image|>"}
    characters = {3 + position: chr(code) for position, code in enumerate([10, *range(32, 127)])}
    names = {token: f"<filler_{token}>" for token in range(32045)} | characters | special
    tokenizer = Tokenizer(models.WordLevel({name: token for token, name in names.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special.values()])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    remote = "processing_phi3_v.Phi3VProcessor"
    files = {
        "config.json": published_config(),
        "tokenizer_config.json": {
            "auto_map": {"AutoProcessor": remote},
            "bos_token": "<s>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "padding_side": "right",
            "processor_class": "Phi3VProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "processor_config.json": {"auto_map": {"AutoProcessor": remote}, "processor_class": "Phi3VProcessor"},
        "preprocessor_config.json": {
            "auto_map": {"AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor", "AutoProcessor": remote},
            "do_convert_rgb": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "Phi3VImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "num_crops": 4,
            "num_img_tokens": 144,
            "processor_class": "Phi3VProcessor",
        },
    }
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields, indent=2))
    return folder


def loading_options(checkpoint: str | Path, **values: Any) -> argparse.Namespace:
    """What loading a model, preparing it for training and reading its processor ask of a script's options."""
    options = {
        "model_name_or_path": str(checkpoint),
        "num_crops": 1,
        "precision": Precision("fp32", torch.float32, None),
        "attention": "sdpa",
        "device": torch.device("cpu"),
        "seed": 0,
        "use_lora": False,
        "use_qlora": False,
        "lora_rank": 4,
        "lora_alpha_ratio": 2,
        "lora_dropout": 0.0,
        "given": (),
        "freeze_vision_model": False,
        "gradient_checkpointing": "none",
        "max_crops_per_call": None,
        "use_liger": False,
        "torch_compile": False,
        "packs": False,
        "eval_only": False,
        "bf16": False,
        "output_dir": Path("unused"),
        "report_images": False,
        "revision": None,
    }
    return argparse.Namespace(**{**options, **values})
