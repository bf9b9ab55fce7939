"""Recomputation, Liger's kernels and torch.compile change nothing but speed and memory.

Tolerances: recomputed layers give the same bits. In float32 Liger and compiled layers add up in another order: 1e-5
of a parameter's gradient; found are 2e-6. A norm or a rotation that is left out gives 1e-1.
"""

from __future__ import annotations

import sys

import peft
import pytest
import torch
from peft.tuners import lora
from transformers.models.phi3 import modeling_phi3

from common.collation import pack
from common.layers import (
    AdaptedLinear,
    add_in_product,
    causal_lm_of,
    compile_layers,
    recompute_layers,
    stacks_of,
    use_kernels_for_any_length,
    use_liger_kernels,
)
from tests.packed_helpers import packed_gradients, questions, shared, training_model, worst_difference

GROUPS = [questions(1, [(1, 1)], [(9, 3), (20, 1)]), questions(2, [], [(25, 6)])]


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return pack(shared(GROUPS))


def frozen_vision(model: torch.nn.Module) -> torch.nn.Module:
    model.model.vision_embed_tokens.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("which", "decoder", "tower"),
    [("none", [0, 0, 0], [0, 0]), ("selective", [1, 0, 1], [1, 0]), ("full", [1, 1, 1], [1, 1])],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_recomputed_layers(batch, which: str, decoder: list[int], tower: list[int], frozen: bool) -> None:
    """A layer whose activations are recomputed runs twice in a step, any other once; the gradients are the same."""
    model = training_model("sdpa", torch.float32)
    model = frozen_vision(model) if frozen else model
    wanted = packed_gradients(model, batch)
    recompute_layers(model, which)
    runs = []
    for stack in stacks_of(model):
        for layer in stack:
            norm = layer.input_layernorm if hasattr(layer, "input_layernorm") else layer.layer_norm1
            runs.append([norm, 0])
            norm.register_forward_pre_hook(lambda _, inputs, count=runs[-1]: count.__setitem__(1, count[1] + 1))
    found = packed_gradients(model, batch)
    expected = decoder + ([0, 0] if frozen else tower)
    assert [count - 1 for _, count in runs] == expected
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_recomputed_layers_under_an_adapter(batch) -> None:
    config = peft.LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(training_model("sdpa", torch.float32), config)
    wanted = packed_gradients(model, batch)
    recompute_layers(model, "full")
    decoder, tower = stacks_of(model)
    assert all(layer.gradient_checkpointing for layer in decoder)
    assert not any(layer.gradient_checkpointing for layer in tower)  # nothing in it trains
    found = packed_gradients(model, batch)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    assert causal_lm_of(model) is model.base_model.model


def test_layers_that_are_compiled(monkeypatch) -> None:
    """Those that run, and no other module: whole models take minutes."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic=None: compiled.append((self, dynamic)))
    model = training_model("sdpa", torch.float32)
    compile_layers(model)
    decoder, tower = stacks_of(model)
    assert compiled == [*((layer, True) for layer in decoder), *((layer, None) for layer in tower)]
    assert len(tower) == 2  # of three, the last of which is not run


@pytest.mark.long  # compiling takes half a minute
@pytest.mark.parametrize("which", ["none", "selective"])
def test_compiled_layers(batch, which: str) -> None:
    model = training_model("sdpa", torch.float32)
    wanted = packed_gradients(model, batch)
    recompute_layers(model, which)
    compile_layers(model)
    difference, name = worst_difference(model, packed_gradients(model, batch), wanted)
    assert difference <= 1e-5, name
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks
    assert all("attend_by_document" in reason for reason in breaks)  # it calls PyTorch's own kernels
    breaks.clear()
    difference, name = worst_difference(model, packed_gradients(model, batch, "sdpa"), wanted)
    assert difference <= 1e-5, name
    assert not breaks


# Adapters


def adapted(batch: dict[str, torch.Tensor], dtype: torch.dtype, **config) -> tuple[peft.PeftModel, dict]:
    """A model with LoRA as PEFT computes it, both of its halves drawn, and its gradients."""
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "fc1", "q_proj", "img_projection.0"]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **config)
    model = peft.get_peft_model(training_model("sdpa", dtype), config).to(dtype)
    return model, packed_gradients(model, batch)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adapters_products_are_added_in_one(batch, dtype: torch.dtype, tolerance: float) -> None:
    model, wanted = adapted(batch, dtype)
    names = [name for name, _ in model.named_parameters()]
    add_in_product(model)
    layers = [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
    assert {type(layer) for layer in layers} == {AdaptedLinear}
    assert [name for name, _ in model.named_parameters()] == names
    called = []
    for layer in layers:
        layer.register_forward_hook(lambda *ignored: called.append(True))
    products = []
    original = torch.addmm

    def addmm(*arguments):
        products.append(True)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "addmm", addmm)
        found = packed_gradients(model, batch)
    assert len(products) == len(called) == len(layers) - 2  # the tower's last layer is not run
    assert len(wanted) == len(found) == 2 * len(called)
    for name, gradient in wanted.items():
        norm = max(gradient.norm(), 1e-8)
        assert (found[name] - gradient).norm() <= tolerance * norm, name


def test_adapters_that_are_not_alone(batch) -> None:
    """Switched off, merged, several at once, or in another precision without autocast: as PEFT computes them."""
    model, _ = adapted(batch, torch.float32)
    other = peft.LoraConfig(r=2, target_modules=["qkv_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("other", other)
    layer = model.base_model.model.model.layers[0].self_attn.qkv_proj
    states = torch.randn(2, 3, layer.in_features)

    def outputs() -> list[torch.Tensor]:
        found = []
        for names in ("default", "other", ["default", "other"]):
            model.base_model.set_adapter(names)
            found.append(layer(states))
        with model.disable_adapter():
            found.append(layer(states))
        model.base_model.set_adapter("default")
        layer.merge()
        found.append(layer(states))
        layer.unmerge()
        layer.to(torch.bfloat16)
        layer.lora_A["default"].float(), layer.lora_B["default"].float()
        found.append(layer(states.bfloat16()).float())
        layer.to(torch.float32)
        return found

    states_before = {name: value.clone() for name, value in layer.state_dict().items()}
    wanted = outputs()
    layer.load_state_dict(states_before)
    add_in_product(model)
    for found, one in zip(outputs(), wanted, strict=True):
        assert (found - one).norm() <= 1e-6 * one.norm()


def test_adapters_drop_out(batch) -> None:
    """The same places of the input, of the same scale, given the same random state."""
    model, _ = adapted(batch, torch.float64, lora_dropout=0.5)
    model.train()
    torch.manual_seed(2)
    wanted = packed_gradients(model, batch)
    add_in_product(model)
    torch.manual_seed(2)
    found = packed_gradients(model, batch)
    assert all((found[name] - one).norm() <= 1e-12 * max(one.norm(), 1e-8) for name, one in wanted.items())
    torch.manual_seed(3)
    again = packed_gradients(model, batch)
    assert any((again[name] - one).norm() > 0.1 * one.norm() for name, one in wanted.items())


def test_adapters_under_autocast(batch) -> None:
    """Float32 adapters over bfloat16 weights: nearer to exact than PEFT's way, which rounds three times."""
    model, exact = adapted(batch, torch.float64)
    halves = []
    for change in (lambda model: None, add_in_product):
        model, _ = adapted(batch, torch.float32)
        for name, weight in model.named_parameters():
            if "lora_" not in name:
                weight.data = weight.data.bfloat16()
        change(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            halves.append(packed_gradients(model, batch))
    assert all(gradient.dtype == torch.float32 for gradient in halves[1].values())
    theirs, ours = (
        sum((found[name].double() - one).square().sum() for name, one in exact.items()).sqrt() for found in halves
    )
    whole = sum(one.square().sum() for one in exact.values()).sqrt()
    assert ours <= 1.2 * theirs
    assert theirs <= 0.05 * whole


def test_no_kernels_that_are_made_for_one_length() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    use_kernels_for_any_length()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_liger_kernels(batch, monkeypatch) -> None:
    """Norms, SwiGLU and rotation as they are; Triton's interpreter does not run all of them."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    if not torch.cuda.is_available():
        pytest.skip("Liger's kernels need CUDA")
    monkeypatch.setattr(modeling_phi3, "apply_rotary_pos_emb", modeling_phi3.apply_rotary_pos_emb)
    batch = {name: value.to("cuda") for name, value in batch.items()}
    model = training_model("sdpa", torch.float32).to("cuda")
    wanted = packed_gradients(model, batch)
    use_liger_kernels(model)
    difference, name = worst_difference(model, packed_gradients(model, batch), wanted)
    assert difference <= 1e-4, name  # float32, sums in another order; found on an H200: 2.5e-5


def test_what_liger_computes(batch, monkeypatch) -> None:
    """Which modules its functions take over, shown to stand-ins: they are called with the modules' own weights."""
    functions = type("functional", (), {})()
    calls = []

    def rms_norm(states, weight, eps):
        calls.append("rms_norm")
        return torch.nn.functional.rms_norm(states, weight.shape, weight, eps)

    def layer_norm(states, weight, bias, eps):
        calls.append("layer_norm")
        return torch.nn.functional.layer_norm(states, weight.shape, weight, bias, eps)

    def swiglu(gate, up):
        calls.append("swiglu")
        return torch.nn.functional.silu(gate) * up

    stock_rope = modeling_phi3.apply_rotary_pos_emb

    def rope(query, key, cosines, sines):
        calls.append("rope")
        return stock_rope(query, key, cosines, sines)

    functions.liger_rms_norm, functions.liger_layer_norm = rms_norm, layer_norm
    functions.liger_swiglu, functions.liger_rope = swiglu, rope
    package = type("transformers", (), {"functional": functions})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(modeling_phi3, "apply_rotary_pos_emb", stock_rope)
    model = training_model()
    wanted = packed_gradients(model, batch)
    use_liger_kernels(model)
    difference, name = worst_difference(model, packed_gradients(model, batch), wanted)
    assert difference <= 1e-9, name
    # three decoder layers and the last norm; two tower layers and the norm before them
    assert {name: calls.count(name) for name in set(calls)} == {"rms_norm": 7, "layer_norm": 5, "swiglu": 3, "rope": 3}
