"""Recomputation, Liger's kernels and torch.compile change nothing but speed and memory.

Tolerances: recomputed layers give the same bits. In float32 Liger and compiled layers add up in another order: 1e-5
of a parameter's gradient; found are 2e-6. A norm or a rotation that is left out gives 1e-1.
"""

from __future__ import annotations

import functools
import sys

import peft
import pytest
import torch
from transformers.models.phi3 import modeling_phi3

from common.collation import pack
from common.layers import causal_lm_of, compile_layers, recompute_layers, stacks_of, use_liger_kernels
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


def test_parts_that_are_compiled_where_packed_rows_are_computed_again(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic=None: compiled.append((self, dynamic)))
    model = training_model("sdpa", torch.float32)
    recompute_layers(model, "selective")
    compile_layers(model, packs=True)
    (again, kept, *_), tower = stacks_of(model)
    parts = [again.self_attn, again.mlp, again.input_layernorm, again.post_attention_layernorm]
    assert {part for part, dynamic in compiled if dynamic} >= {*parts, kept}
    assert again not in {part for part, _ in compiled}
    assert [part for part, dynamic in compiled if not dynamic] == tower


@pytest.mark.parametrize(
    ("method", "which", "of_decoder"),
    [
        # what a layer does before, in and after its attention, and the last layer's own
        ("lora", "none", 6),
        ("frozen", "none", 6),
        # a norm, what is before attention and after it, the network
        ("lora", "full", 4),
        ("frozen", "full", 4),
    ],
)
def test_layers_are_compiled_once(monkeypatch, method: str, which: str, of_decoder: int) -> None:
    """A stack's first layer as the others, and for any length and number of crops: to compile takes a GPU minutes.

    What is frozen before a stack must not matter, nor a text without a picture.
    """
    tower_graphs, decoder_graphs = [], []

    def trace_only(graph: torch.fx.GraphModule, inputs: list) -> torch.nn.Module:
        # 577 positions in the tower
        is_tower = any(isinstance(each, torch.Tensor) and each.shape[1:2] == (577,) for each in inputs)
        (tower_graphs if is_tower else decoder_graphs).append(graph)
        return graph.forward

    stock_compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(stock_compile, backend=trace_only))
    model = training_model("sdpa", torch.float32)
    if method == "lora":
        tower_targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", *tower_targets]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    else:
        model = frozen_vision(model)
        model.model.embed_tokens.requires_grad_(False)
    recompute_layers(model, which)
    compile_layers(model, packs=True)
    counts = []
    for grids in ([(1, 1)], [(1, 2), (2, 1)], [(1, 3)], []):
        pages = [questions(1, grids, [(9, 3), (20, 1)])] if grids else []
        batch = pack(shared([*pages, questions(2, [], [(25, 6)])]))
        packed_gradients(model, batch)
        counts.append((len(tower_graphs), len(decoder_graphs)))
    assert set(counts) == {(1, counts[0][1])}
    assert counts[0][1] == of_decoder


@pytest.mark.long  # compiling takes half a minute
@pytest.mark.parametrize("which", ["none", "selective"])
def test_compiled_layers(batch, which: str) -> None:
    model = training_model("sdpa", torch.float32)
    wanted = packed_gradients(model, batch)
    recompute_layers(model, which)
    compile_layers(model, packs=True)
    difference, name = worst_difference(model, packed_gradients(model, batch), wanted)
    assert difference <= 1e-5, name
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks
    assert all("attend_by_document" in reason for reason in breaks)  # it calls PyTorch's own kernels
    breaks.clear()
    difference, name = worst_difference(model, packed_gradients(model, batch, "sdpa"), wanted)
    assert difference <= 1e-5, name
    assert not breaks


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
