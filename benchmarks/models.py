"""Models of any size with random weights made in place, prepared for each method, and what their steps compute.

No weights are read and nothing is downloaded: the tokenizer and the prompts are the built-in checkpoint's, the
vocabulary is as large as the published one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from common.cli import choose_precision, make_parser
from common.demo import CHECKPOINT
from common.layers import (
    compile_layers,
    leave_layers_uncompiled,
    use_kernels_for_any_length,
    use_liger_kernels,
)
from common.loading import prepare_for_training
from common.phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from common.phi3v.modeling import IGNORED_LABEL
from common.phi3v.stock import modeling_phi3

STOCK_ROTATION = modeling_phi3.apply_rotary_pos_emb
METHODS = ("full", "frozen", "lora", "qlora")

# Fields of config.json and of the tower's size; what is left out is as in the published checkpoints.
SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    # tests
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
    # checks of gradients: heads as wide as the published ones
    "small": (
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2},
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
    # a decoder whose layers have 106 M parameters, heads as wide as the published ones, and its own tower's four layers
    "cpu": (
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 15, "num_attention_heads": 8},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16},
    ),
    "published": (
        {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32},
        {},
    ),
}


def make_config(size: str, processor: Phi3VProcessor) -> Phi3VConfig:
    """The published configuration in another size; the rope factors are made up."""
    decoder, tower = SIZES[size]
    half_head = decoder["hidden_size"] // decoder["num_attention_heads"] // 2
    factors = {"short_factor": [1.0 + place / half_head for place in range(half_head)]}
    factors["long_factor"] = [1.0 + place for place in range(half_head)]
    return Phi3VConfig.from_dict(
        {
            **decoder,
            "num_key_value_heads": decoder["num_attention_heads"],
            "vocab_size": 32064,
            "image_token_id": processor.image_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "su", **factors},
            "sliding_window": 262144,
            "tie_word_embeddings": False,
            "vision_config": tower or None,
            "img_processor": {"image_dim_out": tower.get("hidden_size", 1024)},
        }
    )


def make_processor(num_crops: int) -> Phi3VProcessor:
    """The built-in checkpoint's."""
    return Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=num_crops)


def make_model(
    size: str, processor: Phi3VProcessor, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Phi3VForCausalLM:
    """A model with random weights on its device."""
    use_kernels_for_any_length()
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(
            make_config(size, processor), dtype=dtype, attn_implementation="sdpa"
        ).train()


def prepare(model: Phi3VForCausalLM, processor: Phi3VProcessor, method: str) -> Phi3VForCausalLM | PeftModel:
    """Ready for a method's training, as `common/loading.py` makes it; every layer can be recomputed."""
    if method == "qlora":
        quantize(model)
    options = make_parser("").parse_args([])  # the scripts' defaults: every layer recomputed, adapters of rank 64
    options.use_lora, options.freeze_vision_model = method in ("lora", "qlora"), method == "frozen"
    options.bf16, options.device = model.dtype == torch.bfloat16, model.device.type
    options.precision = choose_precision(options)
    prepared = prepare_for_training(model, processor, options).train()
    # transformers 5 has the inputs of layers that can be recomputed require a gradient, a frozen tower's too, which the
    # published releases did not and recomputation without re-entering autograd does not need
    model.disable_input_require_grads()
    return prepared


def quantize(model: Phi3VForCausalLM) -> None:
    """Every linear layer but the head to NF4, one after another, as transformers does while it loads a checkpoint."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or child is model.lm_head:
                continue
            weight = child.weight.data
            small = Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            small.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=small).to(
                weight.device
            )
            small.bias = child.bias
            small.support_avx512bf16_for_cpu = False  # as common/loading.py
            setattr(module, name, small)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def set_kernels(model: Phi3VForCausalLM, which: str, packs: bool = False) -> None:
    """Let Liger ("liger"), torch.compile ("compiled") or neither ("none") compute the layers, whatever did before.

    `common/layers.py` sets them once for a run; here variants take turns on one model.

    Args:
        model: what is computed again chosen already.
        packs: rows are packed, of which layers that are computed again are compiled part by part.

    Raises:
        ImportError: Liger is not installed.
    """
    for module in model.modules():
        module.__dict__.pop("forward", None)  # Liger's stand on the modules themselves
    leave_layers_uncompiled(model)
    modeling_phi3.apply_rotary_pos_emb = STOCK_ROTATION
    model.fuses_loss = False
    if which == "liger":
        use_liger_kernels(model)
        model.fuses_loss = True
    elif which == "compiled":
        compile_layers(model, packs)


def recomputed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of decoder and tower, which can be recomputed in the backward pass."""
    for name, module in model.named_modules():
        if hasattr(module, "_gradient_checkpointing_func") and "layers." in name:
            yield name, module


# --- what a step computes


def training_flops(model: Phi3VForCausalLM | PeftModel, method: str, batch: dict[str, torch.Tensor]) -> float:
    """The operations that a batch's forward and backward pass need: those of the model, whatever is done beyond them.

    Counted are matrix products: two operations a weight and position forwards, twice that backwards (once for weights
    that only pass gradients on, never for a frozen tower), attention over the pairs that see each other, the head at
    labelled positions, and so the last layer's feed-forward network. Not counted: what is recomputed, padding crops,
    what nothing reads (these two at other positions, the tower's last layer).
    """
    config = model.config
    tower = config.tower_config()
    tokens = int(batch["input_ids"].numel())
    positions = batch.get("position_ids")
    pairs = int((positions + 1).sum()) if positions is not None else tokens * (tokens + 1) // 2
    labelled = int((batch["labels"] != IGNORED_LABEL).sum())
    hidden, width = config.hidden_size, tower.hidden_size
    layer = 4 * hidden**2 + 3 * hidden * config.intermediate_size  # no fewer key heads than query heads
    decoder = config.num_hidden_layers * (2 * layer * tokens + 4 * hidden * pairs)
    decoder += 2 * hidden * config.vocab_size * labelled
    decoder -= 2 * 3 * hidden * config.intermediate_size * (tokens - labelled)  # the last layer's feed-forward network

    grids = (batch["image_sizes"] // 336).tolist()
    crops = sum(1 + rows * columns for rows, columns in grids)
    features = sum((rows * 12) * (columns * 12 + 1) + 12 * 13 + 1 for rows, columns in grids)
    patches = (tower.image_size // tower.patch_size) ** 2
    views = patches + 1
    tower_layer = 2 * (4 * width**2 + 2 * width * tower.intermediate_size) * views + 4 * width * views**2
    encoder = crops * (config.num_tower_layers_used * tower_layer + 2 * 3 * tower.patch_size**2 * width * patches)
    projection = 2 * (4 * width * hidden + hidden**2) * features

    if method == "full":
        return 3.0 * (decoder + encoder + projection)
    if method == "frozen":
        return 3.0 * decoder + encoder + projection
    return 2.0 * (decoder + encoder + projection) + 3.0 * adapter_flops(
        model, tokens, labelled, crops * views, features
    )


def adapter_flops(model: nn.Module, tokens: int, labelled: int, views: int, features: int) -> float:
    """The adapters' forward products: two operations a weight and position that it sees."""
    flops, last_network = 0.0, f".layers.{model.config.num_hidden_layers - 1}.mlp."
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            seen = views if "img_processor" in name else features if "img_projection" in name else tokens
            if "lm_head" in name or (last_network in name and "img_processor" not in name):
                seen = labelled
            flops += 2.0 * parameter.numel() * seen
    return flops


def count_parameters(model: Phi3VForCausalLM | PeftModel) -> dict[str, int]:
    """Weights of the decoder's layers, by the configuration; the tower's layers and width; the weights that train."""
    config, tower = model.config, model.config.tower_config()
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    return {
        "decoder_layers": config.num_hidden_layers * layer,
        "tower_layers": tower.num_hidden_layers,
        "tower_width": tower.hidden_size,
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
