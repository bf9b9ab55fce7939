"""Every import of a moving internal of transformers, in one place.

The rest of the package imports transformers' names from here only; when a release moves one of
them, this is the file to mend. Tested with the versions named in `requirements.txt` (the lower
bounds) and `constraints.txt` (what CI runs).
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch
from packaging.version import Version
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    Phi3PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3 import modeling_phi3
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm, Phi3RotaryEmbedding
from transformers.processing_utils import ImagesKwargs, ProcessorMixin
from transformers.utils.hub import cached_file as find_file
from transformers.utils.hub import extract_commit_hash

# The one that was tested. Before 0.8.2 the fused loss's gradients were wrong, and its loss right, where positions count
# differently, as they do here (Liger-Kernel's pull request 1298).
OLDEST_LIGER = "0.8.5"


def register_with_auto_classes(config, base_model, causal_lm, image_processor, processor) -> None:
    """Make the Auto classes resolve `model_type` "phi3_v" to this package."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base_model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    # under both backends' names: asked for the one that is not there, transformers would warn
    backends = {"torchvision": image_processor, "pil": image_processor}
    AutoImageProcessor.register(config, image_processor_classes=backends, exist_ok=True)
    AutoProcessor.register(config, processor, exist_ok=True)


def enable_activation_checkpointing(model) -> None:
    """Recompute every layer in the backward pass, without re-entering autograd (as published)."""
    # renamed between the oldest and the newest release that the tests cover
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@functools.cache
def find_fused_cross_entropy(
    device_type: str,
) -> Callable[[torch.Tensor, nn.Linear, torch.Tensor], torch.Tensor] | None:
    """Liger's fused linear cross-entropy, which never holds all logits at once; None where it is not there or too old.

    Returns:
        (labelled, hidden), the head, targets (labelled,) -> losses (labelled,).
    """
    if device_type != "cuda":
        return None
    try:
        version = importlib.metadata.version("liger_kernel")
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:  # what importlib.metadata raises is one, too
        return None
    if Version(version) < Version(OLDEST_LIGER):
        return None

    def token_losses(hidden_states: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
        return liger_fused_linear_cross_entropy(hidden_states, head.weight, targets, bias=head.bias, reduction="none")

    return token_losses


__all__ = [
    "ROPE_INIT_FUNCTIONS",
    "AttentionInterface",
    "BaseImageProcessor",
    "BaseModelOutputWithPast",
    "BatchFeature",
    "BlockMask",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "CausalLMOutputWithPast",
    "GenerationMixin",
    "ImagesKwargs",
    "Phi3Config",
    "Phi3DecoderLayer",
    "Phi3ForCausalLM",
    "Phi3Model",
    "Phi3PreTrainedModel",
    "Phi3RMSNorm",
    "Phi3RotaryEmbedding",
    "PreTrainedTokenizerFast",
    "ProcessorMixin",
    "create_block_mask",
    "enable_activation_checkpointing",
    "extract_commit_hash",
    "find_file",
    "find_fused_cross_entropy",
    "modeling_phi3",
    "register_with_auto_classes",
    "varlen_attn",
]
