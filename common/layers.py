"""What is done to the layers for speed or memory: kernels of attention, recomputation, Liger's, torch.compile.

Each leaves the layers' names, weights and results (but for rounding) as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .phi3v import Phi3VForCausalLM
from .phi3v.stock import enable_activation_checkpointing, modeling_phi3

RECOMPILE_LIMIT = 64


def causal_lm_of(model: nn.Module) -> Phi3VForCausalLM:
    """The model itself, also inside a `PeftModel`."""
    return next(module for module in model.modules() if isinstance(module, Phi3VForCausalLM))


def stacks_of(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The layers that run: the decoder's, then the tower's."""
    decoder = causal_lm_of(model).model
    tower = decoder.vision_embed_tokens.img_processor
    yield list(decoder.layers)
    yield list(tower.vision_model.encoder.layers[: tower.num_layers_used])


def use_kernels_for_any_length() -> None:
    """Keep PyTorch's attention from cuDNN's kernels, for this process.

    It prefers them on Hopper and data-centre Blackwell, and cuDNN makes a plan for every length, while hardly two
    passes have the same: new lengths then take longer than lengths seen before.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def recompute_layers(model: nn.Module, which: str) -> None:
    """Choose the layers whose activations are computed again in the backward pass, from the layer's input.

    A frozen stack has no backward pass and recomputes nothing.

    Args:
        model: what trains chosen already.
        which: "none", "full" (all) or "selective" (every second, beginning with the first).
    """
    if which == "none":
        return
    enable_activation_checkpointing(causal_lm_of(model))
    decoder, tower = stacks_of(model)
    for stack, has_backward in ((decoder, True), (tower, any(each.requires_grad for each in _weights(tower)))):
        for number, layer in enumerate(stack):
            layer.gradient_checkpointing = has_backward and (which == "full" or number % 2 == 0)


def _weights(layers: list[nn.Module]) -> Iterator[nn.Parameter]:
    for layer in layers:
        yield from layer.parameters()


def use_liger_kernels(model: Phi3VForCausalLM) -> None:
    """Let Liger compute the model's norms and SwiGLU, and the rotation of all Phi-3 models of this process.

    Needs CUDA (or Triton's interpreter) and liger-kernel.
    """
    from liger_kernel.transformers import functional

    def rms_norm(module: nn.Module):
        return lambda states: functional.liger_rms_norm(states, module.weight, module.variance_epsilon)

    def layer_norm(module: nn.LayerNorm):
        return lambda states: functional.liger_layer_norm(states, module.weight, module.bias, module.eps)

    def swiglu(module: nn.Module):
        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
            return module.down_proj(functional.liger_swiglu(gate, up))

        return forward

    for module in model.modules():
        if isinstance(module, modeling_phi3.Phi3RMSNorm):
            module.forward = rms_norm(module)
        elif isinstance(module, nn.LayerNorm):
            module.forward = layer_norm(module)
        elif isinstance(module, modeling_phi3.Phi3MLP) and model.config.hidden_act == "silu":
            module.forward = swiglu(module)
    modeling_phi3.apply_rotary_pos_emb = functional.liger_rope


def compile_layers(model: nn.Module, packs: bool = False) -> None:
    """Compile every layer that runs; those of one stack that do the same share what is compiled.

    The decoder's for any length at once, since two steps are hardly ever equally long; the tower's for any number of
    a picture's parts, which all have one size. The two stacks, the decoder's last layer, and recomputed and kept
    layers are compiled apart: more than the eight of one function after which torch gives up.

    Args:
        model: what is computed again (`recompute_layers`) chosen already.
        packs: the decoder's rows are packed.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    decoder, tower = stacks_of(model)
    for layer in decoder:
        # Packed rows' attention is not compiled. It divides what is around it in two, but not what is computed again,
        # which the compiler takes as a whole or leaves as a whole.
        for each in _parts(layer) if packs and layer.gradient_checkpointing else (layer,):
            each.compile(dynamic=True)
    for layer in tower:
        layer.compile()
    for module in _before_first_layers(model):
        module.register_forward_hook(_as_between_layers)


def leave_layers_uncompiled(model: nn.Module) -> None:
    """Undo `compile_layers`; nothing where nothing was compiled."""
    for stack in stacks_of(model):
        for layer in stack:
            for each in (layer, *_parts(layer)):
                each._compiled_call_impl = None
    for module in _before_first_layers(model):
        for key, hook in list(module._forward_hooks.items()):
            if hook is _as_between_layers:
                del module._forward_hooks[key]


def _parts(layer: nn.Module) -> list[nn.Module]:
    """Attention, network and norms, and no dropout."""
    return [part for part in layer.children() if next(part.parameters(), None) is not None]


def _before_first_layers(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What makes the states that a stack's first layer takes: the decoder's, then the tower's."""
    decoder = causal_lm_of(model).model
    return decoder.embed_tokens, decoder.vision_embed_tokens.img_processor.vision_model.pre_layrnorm


def _as_between_layers(module: nn.Module, inputs: object, states: torch.Tensor) -> None:
    """Let a stack's first layer be compiled as its others are, instead of once more.

    Theirs need a gradient where anything trains, and the first one's would not where all before it is frozen. The
    first number of crops (in the tower alone a norm stands before the layers) would be compiled for by itself.
    """
    if isinstance(module, nn.LayerNorm):
        torch._dynamo.maybe_mark_dynamic(states, 0)
    if torch.is_grad_enabled():
        states.requires_grad_()
