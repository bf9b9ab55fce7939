"""The memory that a training step needs of a GPU, from its parts: arithmetic on shapes, nothing is measured.

Parameters are counted on the model itself, which is built without memory. Sizes are in bytes. `peak` estimates what
PyTorch has allocated at most, which is `memory_peak_gb` in the training log; `needed` adds an allowance. How close the
parts come on a CPU, and the sum to the peaks measured on a GPU: tests/test_plan.py and docs/scaling.md.

Left out: Liger's kernels, which keep less; an evaluation's cache; ZeRO-3. What a compiled layer keeps is what
torch.compile's division into forward and backward pass leaves: of a row of operations that are fused it keeps the
input, and computes the others again.

Notation
- rows: positions of all sequences on a GPU at once, or patches of all their sub-images
- hidden, wide, kv_width: the decoder's state, its MLP, its keys; width: the tower's state
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .cli import (
    BITSANDBYTES_MOST,
    BITSANDBYTES_OPTIMIZERS,
    DEEPSPEED,
    MAX_NUM_CROPS,
    choose_precision,
    deepspeed_file,
    offloads_optimizer,
)
from .loading import add_adapters, choose_weights
from .phi3v import Phi3VConfig, Phi3VForCausalLM

T = TypeVar("T")
METHODS = ("full", "frozen", "lora", "qlora")  # the greediest first
NF4_BLOCK, EIGHT_BIT_BLOCK = 64, 256  # elements that share a float32 scale in bitsandbytes
SMALLEST_IN_8_BITS, SMALLEST_PAGED = 4096, 100_000  # smaller tensors keep 32 bits, stay on the GPU
ZERO_BUCKET = 500_000_000  # elements, DeepSpeed's own where a file has no reduce_bucket_size
CUDA_CONTEXT = 1.5e9  # assumed: CUDA context, cuBLAS workspaces, NCCL's channels
FRAGMENTATION = 0.05  # assumed: of the peak, what PyTorch's allocator holds and cannot use


@dataclasses.dataclass(frozen=True)
class Setting:
    """A configuration of a run, as the scripts' options name it.

    `tokens`, `answer_tokens` and `images` are an example's. With `max_tokens_per_gpu` rows are packed: a pass takes as
    many examples as have so many tokens together, instead of `batch_size_per_gpu`.
    """

    method: str = "full"
    gpus: int = 1
    bf16: bool = True
    gradient_checkpointing: str = "full"
    optim: str = "adamw_torch_fused"
    batch_size: int = 16
    batch_size_per_gpu: int = 1
    tokens: int = 2443  # of a page of DocVQA at 16 sub-images
    answer_tokens: int = 10
    images: int = 1
    num_crops: int = MAX_NUM_CROPS
    lora_rank: int = 64
    attention: str = "sdpa"
    deepspeed: str = DEEPSPEED
    freeze_vision_model: bool = False
    torch_compile: bool = False
    max_tokens_per_gpu: int | None = None

    @property
    def uses_lora(self) -> bool:
        return self.method in ("lora", "qlora")

    @property
    def freezes_vision(self) -> bool:
        """Whether nothing of the image side trains, neither weights nor adapters."""
        return self.method == "frozen" or self.freeze_vision_model

    @property
    def stored(self) -> int:
        """Bytes of a weight, and of the decoder's state between layers: float32 under float16 autocast."""
        options = argparse.Namespace(bf16=self.bf16, device="cuda", use_lora=self.uses_lora)
        return choose_precision(options).weights.itemsize

    @property
    def packs(self) -> bool:
        return self.max_tokens_per_gpu is not None

    @property
    def at_once(self) -> Fraction:
        """Examples that go through a GPU together; on the mean, where rows are packed."""
        if self.max_tokens_per_gpu is None:
            return Fraction(self.batch_size_per_gpu)
        # as many as fit, but no more than a process has of a step, dealt by tokens: its share and one
        return max(
            Fraction(1),
            min(Fraction(self.max_tokens_per_gpu, self.tokens), Fraction(self.batch_size, self.gpus) + 1),
        )

    def in_a_pass(self, number: int) -> int:
        """Of what an example has so many of, how many go through a GPU together."""
        return math.ceil(number * self.at_once)


COMPUTE = 2  # bytes of what linear layers and attention take and give
AUTOCAST_NORM = 4  # and of what autocast gives the tower's norms, on CUDA


class Part(NamedTuple):
    """Memory for one purpose; phase: "held" all along, in "backward" or the optimizer's "step", "outside" the GPU."""

    name: str
    phase: str
    size: float
    about: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """Elements of the tensors that train, elements and bytes of all others, the elements of them in NF4."""

    trained: tuple[int, ...]
    frozen: int
    frozen_bytes: int
    quantized: int


@functools.lru_cache
def count_weights(config: str, method: str, lora_rank: int, stored: int, freezes_vision: bool = False) -> Weights:
    """What a method trains and keeps of the model of a configuration (as JSON), counted on the model itself."""
    options = argparse.Namespace(lora_rank=lora_rank, lora_alpha_ratio=1, lora_dropout=0.0, model_name_or_path="")
    options.freeze_vision_model, options.revision = method == "frozen" or freezes_vision, None
    with torch.device("meta"):
        model: nn.Module = Phi3VForCausalLM(Phi3VConfig.from_dict(json.loads(config)))
        in_nf4 = {module.weight for module in model.modules() if type(module) is nn.Linear} - {model.lm_head.weight}
        if method in ("lora", "qlora"):
            model = add_adapters(model, options)
        else:
            choose_weights(model, options)
    trained, frozen, frozen_bytes, quantized = [], 0, 0, 0
    for weight in model.parameters():
        if weight.requires_grad:
            trained.append(weight.numel())
            continue
        frozen += weight.numel()
        if method == "qlora" and weight in in_nf4:
            quantized += weight.numel()
            frozen_bytes += nf4_bytes(weight.numel())
        else:
            frozen_bytes += stored * weight.numel()
    return Weights(tuple(trained), frozen, frozen_bytes, quantized)


def weights_of_run(options: argparse.Namespace, config: Phi3VConfig) -> Weights:
    """Those of a script's run."""
    shape = (options.method, options.lora_rank, options.precision.weights.itemsize, options.freeze_vision_model)
    return count_weights(json.dumps(config.to_dict()), *shape)


def nf4_bytes(elements: int) -> int:
    """Four bits an element and a float32 scale for every 64: the scripts do not quantise the scales once more."""
    return -(-elements // 2) + 4 * -(-elements // NF4_BLOCK)


def optimizer_bytes(optim: str, tensors: Sequence[int]) -> tuple[int, int]:
    """AdamW's state for float32 tensors of so many elements: bytes on the GPU, and in memory that can leave it."""
    fixed = paged = 0
    for elements in tensors:
        state = 8 * elements
        if optim.endswith("8bit") and elements >= SMALLEST_IN_8_BITS:
            state = 2 * elements
            fixed += 8 * -(-elements // EIGHT_BIT_BLOCK)  # the scales are never paged
        if optim.startswith("paged") and elements >= SMALLEST_PAGED:
            paged += state
        else:
            fixed += state
    return fixed + (
        4 * len(tensors) if optim.startswith("adamw_torch") else 0
    ), paged  # PyTorch counts every tensor's steps


def in_parts(tensors: Sequence[T], elements_of: Callable[[T], int], most: float) -> list[list[T]]:
    """Tensors one after another in lists of at most so many elements together, as bitsandbytes' groups are made."""
    parts: list[list[T]] = [[]]
    elements = 0
    for tensor in tensors:
        if parts[-1] and elements + elements_of(tensor) > most:
            parts.append([])
            elements = 0
        parts[-1].append(tensor)
        elements += elements_of(tensor)
    return parts


# --- activations


class Linear(NamedTuple):
    """A linear layer's sizes; `keeps_input`: a training weight keeps its input, which nothing else keeps already."""

    inputs: int
    outputs: int
    keeps_input: bool = True


def linears_kept(setting: Setting, trains: bool, rows: int, linears: Sequence[Linear]) -> int:
    """What linear layers keep of their forward pass for the backward pass, in bytes."""
    if not setting.uses_lora:
        return COMPUTE * rows * sum(one.inputs for one in linears if one.keeps_input) if trains else 0
    rank, kept = setting.lora_rank, 0
    for one in linears:  # every adapter casts its two matrices for itself
        inputs = one.inputs if one.keeps_input else 0
        kept += COMPUTE * (rows * (inputs + rank) + rank * (one.inputs + one.outputs))
        if setting.stored != COMPUTE and setting.method != "qlora":
            kept += COMPUTE * one.inputs * one.outputs  # and so is the base's weight
    return kept


def attention_kept(config: Phi3VConfig, setting: Setting, rows: int, length: int) -> int:
    """What the first half of a decoder layer keeps for its backward pass where it is not computed again, in bytes."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_width = hidden // heads * config.num_key_value_heads
    # queries, keys and values as projected (the values lie there), queries and keys as rotated
    attention = COMPUTE * (hidden + 2 * kv_width + hidden + kv_width)
    # the probabilities in float32 and rounded, or the output and a float32 for every head
    eager = setting.attention == "eager"
    attention += heads * length * (4 + COMPUTE) if eager else COMPUTE * hidden + 4 * heads
    # Attention's output lies head by head, as the rotated queries do, and is copied. Compiled, both lie position by
    # position, but for packed rows' output where it is put together from documents. (That their kernel for all lengths
    # needs no such copy is left out: not every GPU has it, nor does it take pictures that are shared.)
    copies = setting.packs or not setting.torch_compile
    linears = (Linear(hidden, hidden + 2 * kv_width), Linear(hidden, hidden, keeps_input=copies))
    norm = norm_kept_per_position(config, setting, setting.stored)
    return rows * (norm + attention) + linears_kept(setting, True, rows, linears)


def network_kept(config: Phi3VConfig, setting: Setting, rows: int) -> int:
    """What the second half of a decoder layer, the feed-forward network, keeps for its backward pass, in bytes."""
    hidden, wide = config.hidden_size, config.intermediate_size
    # gate and up; the activated gate, unless it is computed again where it is fused with what follows
    activated = COMPUTE * (2 if setting.torch_compile else 3) * wide
    linears = (Linear(hidden, 2 * wide), Linear(wide, hidden))
    norm = norm_kept_per_position(config, setting, COMPUTE)  # what the first half adds to the layer's input
    return rows * (norm + activated) + linears_kept(setting, True, rows, linears)


def norm_kept_per_position(config: Phi3VConfig, setting: Setting, compiled_from: int | None = None) -> int:
    """In bytes: the input in float32, and if the weight trains what it is multiplied with.

    Args:
        compiled_from: of a compiled norm, which computes these again: the bytes of a number of what it does so from.
    """
    if setting.torch_compile and compiled_from:
        return compiled_from * config.hidden_size + 4
    return 4 * config.hidden_size + 4 + (0 if setting.uses_lora else setting.stored * config.hidden_size)


def tower_state(setting: Setting) -> int:
    """Bytes of a number between the tower's layers, which autocast makes those of what its norms give."""
    return AUTOCAST_NORM if setting.uses_lora else setting.stored


def tower_layer_kept(config: Phi3VConfig, setting: Setting, rows: int) -> int:
    """What a layer of a tower that trains keeps for its backward pass where it is not computed again, in bytes."""
    tower = config.tower_config()
    width, wide, heads = tower.hidden_size, tower.intermediate_size, tower.num_attention_heads
    eager = setting.attention == "eager"
    patches = (tower.image_size // tower.patch_size) ** 2 + 1
    # Compiled, norms are fused with the casts of what they give and with what the second one's input is the sum of, and
    # so are the two steps of the activation.
    fuses, state = setting.torch_compile, tower_state(setting)
    norms = (state + (COMPUTE if fuses else state)) * width + 2 * 8
    # each adapter for itself what the norm gives all three
    casts = setting.uses_lora and not fuses and AUTOCAST_NORM != COMPUTE
    attention = COMPUTE * 3 * width
    attention += heads * patches * (4 + COMPUTE) if eager else COMPUTE * width + 4 * heads
    mlp = COMPUTE * (2 if tower.hidden_act == "quick_gelu" and not fuses else 1) * wide
    linears = (
        *(Linear(width, width), Linear(width, width, keeps_input=casts), Linear(width, width, keeps_input=casts)),
        Linear(width, width, keeps_input=eager),
        *(Linear(width, wide), Linear(wide, width)),
    )
    return rows * (norms + attention + mlp) + linears_kept(setting, True, rows, linears)


def computed_again(setting: Setting, layers: int) -> list[bool]:
    """Which layers of a stack are computed again in the backward pass, as `common/layers.py` chooses them."""
    which = setting.gradient_checkpointing
    return [which == "full" or (which == "selective" and number % 2 == 0) for number in range(layers)]


def stack_kept(setting: Setting, layers: Sequence[int], state: int) -> list[int]:
    """What each layer of a stack keeps as the backward pass begins.

    Args:
        layers, state: bytes that each layer keeps if it is not computed again, and of the state between layers.
    """
    return [
        state if again else layer for layer, again in zip(layers, computed_again(setting, len(layers)), strict=True)
    ]


def decoder_layers_kept(config: Phi3VConfig, setting: Setting) -> list[int]:
    """What each of the decoder's layers keeps for its backward pass where it is not computed again, in bytes."""
    rows, labelled = setting.in_a_pass(setting.tokens), setting.in_a_pass(setting.answer_tokens)
    attention = attention_kept(config, setting, rows, setting.tokens)
    # behind the last layer's attention no other positions are used
    last = attention + network_kept(config, setting, labelled)
    return [attention + network_kept(config, setting, rows)] * (config.num_hidden_layers - 1) + [last]


def activation_parts(config: Phi3VConfig, setting: Setting) -> Iterator[Part]:
    """Everything that the forward pass leaves for the backward pass, and what that needs beside it as it begins."""
    tower = config.tower_config()
    hidden, width = config.hidden_size, tower.hidden_size
    rows, views = setting.in_a_pass(setting.tokens), setting.in_a_pass(setting.images * (setting.num_crops + 1))
    patch_rows = views * ((tower.image_size // tower.patch_size) ** 2 + 1)
    features = min(rows, 149 * views)  # 144 a view and the separators
    labelled = setting.in_a_pass(setting.answer_tokens)
    layers = decoder_layers_kept(config, setting)
    kept_by_layer = stack_kept(setting, layers, setting.stored * rows * hidden)
    # What comes into a stack has no gradient where nothing before it trains, and its first norm does not keep it,
    # unless it is made to require one: with checkpointing, and where layers are compiled (common/layers.py).
    checkpoints = setting.gradient_checkpointing != "none"
    first_keeps_less = not (checkpoints or setting.torch_compile)
    if setting.freezes_vision and first_keeps_less:
        kept_by_layer[0] -= rows * (4 * hidden + 4)
    # the last norm, which is no layer's; the rotation, which all layers share
    kept = sum(kept_by_layer) + labelled * norm_kept_per_position(config, setting)
    kept += 2 * COMPUTE * rows * hidden // config.num_attention_heads
    if setting.method != "full" and not first_keeps_less:
        kept += setting.stored * rows * hidden  # so are the embeddings, before the image features are put among them
    if setting.attention == "eager" and checkpoints:
        kept += setting.stored * rows * setting.tokens  # the mask, for what is computed again
    again_in_words = f"checkpointing {setting.gradient_checkpointing}"
    yield Part("activations, decoder", "backward", kept, f"{rows} positions, {again_in_words}")
    pixels = 3 * tower.image_size**2 * views
    kept_image, about = 4 * pixels, f"{views} sub-images, nothing kept of a frozen tower"
    if not setting.freezes_vision:
        one = tower_layer_kept(config, setting, patch_rows)
        state = tower_state(setting) * patch_rows * width
        kept_image += sum(stack_kept(setting, [one] * config.num_tower_layers_used, state))
        if setting.uses_lora and first_keeps_less:
            kept_image -= patch_rows * (AUTOCAST_NORM * width + 8)
        # the patches and what the norm before the layers is given
        patches = setting.stored * patch_rows * width
        kept_image += (patches + state) * checkpoints if setting.uses_lora else setting.stored * pixels + state
        projection = (Linear(4 * width, hidden), Linear(hidden, hidden))
        kept_image += COMPUTE * features * hidden + linears_kept(setting, True, features, projection)
        about = f"{views} sub-images of {patch_rows // views} patches, {again_in_words}"
    yield Part("activations, image side", "backward", kept_image, about)
    # Either the last layer with the gradients of its attention on their way, or the one before it with those of its
    # network's two halves (an adapter's of float16 come in float32), when what the last one kept is free again.
    # Of packed rows a layer that is computed again is compiled part by part (common/layers.py), and then needs about
    # what it needs uncompiled.
    again = computed_again(setting, len(layers))
    compiled = setting.torch_compile and not setting.packs
    worked = decoder_layers_kept(config, dataclasses.replace(setting, torch_compile=compiled))
    eager = setting.attention == "eager"
    flowing = rows * (config.num_attention_heads * setting.tokens * (4 + COMPUTE) if eager else 4 * COMPUTE * hidden)
    at_work = flowing + (worked[-1] if again[-1] else 0)
    if len(layers) > 1:
        flowing = rows * config.intermediate_size * COMPUTE * (3 if setting.stored == COMPUTE else 4)
        at_work = max(at_work, flowing + (worked[-2] if again[-2] else 0) - kept_by_layer[-1])
    yield Part("a decoder layer at work", "backward", at_work, "computed again, gradients on their way")
    logits = labelled * config.vocab_size * (2 * COMPUTE + 3 * 4)
    yield Part("logits", "backward", logits, f"{setting.answer_tokens} labelled positions an example")


# --- a setting's memory


def read_zero_configuration(name: str) -> tuple[dict[str, Any], list[str]]:
    """A DeepSpeed file's `zero_optimization`, and what is wrong with it."""
    file = deepspeed_file(argparse.Namespace(deepspeed=name))
    try:
        zero = json.loads(file.read_text())["zero_optimization"]
        stage = zero["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, [f"--deepspeed {name}: no JSON with zero_optimization.stage ({error})"]
    return zero, [] if stage == 2 else [f"--deepspeed {name} is of stage {stage}: only stage 2 is estimated"]


def estimate(config: Phi3VConfig, setting: Setting) -> list[Part]:
    """A setting's parts."""
    shape = (setting.method, setting.lora_rank, setting.stored, setting.freezes_vision)
    weights = count_weights(json.dumps(config.to_dict()), *shape)
    trained = sum(weights.trained)
    parts = [*activation_parts(config, setting)]
    if setting.uses_lora:
        about = f"{weights.frozen:,} parameters" + (
            f", {weights.quantized:,} of them in NF4" if weights.quantized else ""
        )
        parts += [
            Part("weights, frozen", "held", weights.frozen_bytes, about),
            Part("adapters", "held", 4 * trained, f"{trained:,} parameters of rank {setting.lora_rank} in float32"),
            Part("gradients", "held", 4 * trained, "of the adapters, float32"),
        ]
        if setting.gpus > 1:
            parts.append(Part("DDP's buckets", "held", 4 * trained, "a copy of the gradients"))
        state, paged = optimizer_bytes(setting.optim, weights.trained)
        step = 0
    else:
        zero, _ = read_zero_configuration(setting.deepspeed)
        offloads = offloads_optimizer(zero)
        share = -(-trained // setting.gpus)
        held = 0 if offloads else share
        where = "in the computer's memory" if offloads else f"a {setting.gpus}th part" if setting.gpus > 1 else "whole"
        parts += [
            Part("weights", "held", 2 * trained + weights.frozen_bytes, f"{trained + weights.frozen:,} parameters"),
            Part("master copies", "held", 4 * held, f"float32, {where}"),
            Part("gradients", "held", 2 * held, f"of {trained:,} parameters, {where}"),
        ]
        bucket = zero.get("reduce_bucket_size")
        if bucket == "auto":
            bucket = config.hidden_size**2  # as transformers fills it in
        elif not isinstance(bucket, (int, float)):
            bucket = ZERO_BUCKET
        copies = 2 if zero.get("overlap_comm") else 1
        size = int(copies * 2 * bucket) + 2 * max(weights.trained)
        parts.append(
            Part("gradient buckets", "backward", size, f"{copies} of {bucket:.0e} elements, a weight's gradient")
        )
        if setting.batch_size > setting.at_once * setting.gpus:
            parts.append(Part("gradients, accumulated", "backward", 2 * held, "beside a micro-batch's own"))
        if offloads:
            parts.append(Part("masters, gradients, state", "outside", 16 * share, "float32, on the computer's side"))
        state, paged = optimizer_bytes(setting.optim, [held] if held else [])
        step = 6 * held  # flattened, and in float32
        if setting.optim in BITSANDBYTES_OPTIMIZERS:  # group by group, where these are of a size
            largest = max(map(sum, in_parts(weights.trained, int, BITSANDBYTES_MOST)))
            step = min(step, 6 * -(-largest // setting.gpus))
    parts.append(Part("optimizer state", "held", state, setting.optim))
    if paged:
        parts.append(
            Part("optimizer state, paged", "outside", paged, "in memory that leaves the GPU where it is short")
        )
    if setting.optim == "adamw_torch":  # works on whole lists of tensors
        step += 4 * (trained if setting.uses_lora else held)
    if step:
        parts.append(Part("the optimizer at work", "step", step, "gradients flattened and in float32, or temporary"))
    order = ("weights", "weights, frozen", "adapters", "master copies", "optimizer state", "gradients")
    return sorted(parts, key=lambda part: order.index(part.name) if part.name in order else len(order))


def peak(parts: Sequence[Part]) -> float:
    """What PyTorch has allocated at most, in bytes: what is held, and what the greedier of both phases adds."""
    sums = {phase: sum(part.size for part in parts if part.phase == phase) for phase in ("held", "backward", "step")}
    return sums["held"] + max(sums["backward"], sums["step"])


def needed(parts: Sequence[Part]) -> float:
    """The peak and what a GPU must have beyond it, in bytes."""
    return peak(parts) * (1 + FRAGMENTATION) + CUDA_CONTEXT


# --- a run, as its options describe it


def tokens_of_a_row(options: argparse.Namespace, tokens: int) -> int:
    """A packed row's at most: of pictures that are shared without a number of tokens as many as examples would be.

    Args:
        tokens: an example's.
    """
    return options.max_tokens_per_gpu or options.batch_size_per_gpu * tokens


def setting_of(options: argparse.Namespace, world: int, **sizes: int) -> Setting:
    """The setting of a run of `world` processes; `sizes` are the fields of `Setting` that describe an example."""
    names = ("method", "bf16", "gradient_checkpointing", "optim", "batch_size", "batch_size_per_gpu", "num_crops")
    names += ("lora_rank", "attention", "freeze_vision_model", "torch_compile")
    given = {name: getattr(options, name) for name in names}
    if options.packs:
        given |= {"max_tokens_per_gpu": tokens_of_a_row(options, sizes["tokens"]), "batch_size_per_gpu": 1}
    return Setting(**{**given, "gpus": world, "deepspeed": options.deepspeed or DEEPSPEED, **sizes})


def estimated_peak(
    options: argparse.Namespace, config: Phi3VConfig, world: int, share: float = 1.0, **sizes: int
) -> float | None:
    """What a run of `world` processes has allocated of a GPU at most, in GB: a training step, see `setting_of`, or
    with `--eval_only` the weights. None where that is not estimated (ZeRO-3).

    Args:
        share: of what is not held all along, such as activations: 1 for the best estimate, less for what is certain.
    """
    setting = setting_of(options, world, **sizes)
    if not setting.uses_lora and read_zero_configuration(setting.deepspeed)[1]:
        return None
    parts = estimate(config, setting)
    if options.eval_only:
        return sum(part.size for part in parts if part.name in ("weights", "weights, frozen", "adapters")) / 1e9
    held = sum(part.size for part in parts if part.phase == "held")
    return (held + share * (peak(parts) - held)) / 1e9


def sizes_on_disk(options: argparse.Namespace, config: Phi3VConfig) -> tuple[int, int]:
    """Bytes of the model that a run saves, and of one of its checkpoints; without the processor's files.

    A checkpoint of adapters holds them and their optimizer's state; one of DeepSpeed's the weights twice (its own copy
    and the safetensors), and of all processes together the float32 masters and the optimizer's state.
    """
    stored, weights = options.precision.weights.itemsize, weights_of_run(options, config)
    trained = sum(weights.trained)
    if options.use_lora:
        return 4 * trained, 4 * trained + sum(optimizer_bytes(options.optim, weights.trained))
    model = stored * trained + weights.frozen_bytes
    return model, 2 * model + 4 * trained + sum(optimizer_bytes(options.optim, [trained]))
