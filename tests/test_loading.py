"""What is loaded, what trains, and checkpoints that cannot be used."""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from common import errors, loading
from common.checkpoints import record_of
from common.cli import Precision
from common.demo import CHECKPOINT
from common.errors import NotLookedAtError, UserError
from common.layers import stacks_of
from common.loading import (
    check_checkpoint,
    checkpoint_of,
    find_adapter,
    load_model,
    load_processor,
    longest_sequence,
    prepare_for_training,
)
from common.phi3v.stock import find_file
from common.training import run_vision_without_pictures, write_model
from tests.model_helpers import loading_options, tiny_model, write_stand_in_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_stand_in_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    tiny_model().save_pretrained(folder)
    return folder


def load_for_training(options):
    processor = load_processor(options)
    return prepare_for_training(load_model(options.model_name_or_path, options), processor, options), processor


def inputs_of(processor):
    text = processor.apply_chat_template(
        [{"role": "user", "content": "<|image_1|>\nWhat?"}], add_generation_prompt=True
    )
    from tests.model_helpers import picture

    inputs = dict(processor(text, [picture(60, 40, 1)]))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    return {**inputs, "labels": labels}


def gradients(model, inputs):
    model.zero_grad()
    model.train()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_num_crops_is_that_of_the_options(checkpoint):
    assert load_processor(loading_options(checkpoint, num_crops=7)).image_processor.num_crops == 7


def test_generation_stops_at_both_end_tokens(checkpoint):
    model, processor = load_for_training(loading_options(checkpoint))
    assert model.generation_config.eos_token_id == [32007, 32000]
    assert loading.end_token_ids(processor) == [32007, 32000]


def test_full_training_leaves_out_what_is_not_run(checkpoint):
    model, _ = load_for_training(loading_options(checkpoint))
    kept = {name for name, p in model.named_parameters() if not p.requires_grad}
    prefix = "model.vision_embed_tokens.img_processor.vision_model."
    assert kept == {
        name
        for name, _ in model.named_parameters()
        if name.startswith((prefix + "post_layernorm", prefix + "encoder.layers.2"))
    }


def test_frozen_vision_still_trains_every_decoder_layer(checkpoint):
    model, processor = load_for_training(
        loading_options(checkpoint, freeze_vision_model=True, gradient_checkpointing="full")
    )
    found = gradients(model, inputs_of(processor))
    expected = {name for name, _ in model.named_parameters() if "embed_tokens" not in name}
    assert set(found) == expected
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_text_alone_gives_every_trained_parameter_a_gradient(checkpoint):
    """Zero for the vision side; loss and the other gradients are those of the model as it was loaded."""
    trained, processor = load_for_training(loading_options(checkpoint))
    loaded = load_model(str(checkpoint), loading_options(checkpoint))
    inputs = {
        name: value for name, value in inputs_of(processor).items() if name not in ("pixel_values", "image_sizes")
    }
    for name in ("input_ids", "labels"):
        inputs[name] = inputs[name].masked_fill(inputs["input_ids"] == loaded.config.image_token_id, 13)
    run_vision_without_pictures(trained)
    found, expected = gradients(trained, inputs), gradients(loaded, inputs)
    assert set(found) == {name for name, p in trained.named_parameters() if p.requires_grad}
    for name, gradient in found.items():
        assert torch.equal(gradient, expected.get(name, torch.zeros_like(gradient))), name
        assert ("vision_embed_tokens" in name) == (name not in expected), name


def test_text_alone_changes_nothing_where_the_blank_picture_overflows(checkpoint):
    """As float16 may: 0 times a feature that is not finite would be no 0."""
    model, processor = load_for_training(loading_options(checkpoint))
    run_vision_without_pictures(model)
    inputs = {
        name: value for name, value in inputs_of(processor).items() if name not in ("pixel_values", "image_sizes")
    }
    for name in ("input_ids", "labels"):
        inputs[name] = inputs[name].masked_fill(inputs["input_ids"] == model.config.image_token_id, 13)
    with torch.no_grad():
        wanted = model.train()(**inputs).loss
        model.model.vision_embed_tokens.img_projection[2].bias.fill_(float("inf"))
        assert torch.equal(model(**inputs).loss, wanted)


def test_crops_per_call(checkpoint):
    """At most so many at a time, with the same loss to float32's rounding.

    All parts go through a layer before the next one: its weights' gradients wait for its parts alone.
    """
    calls, order, losses = [], [], []
    for most in (None, 1):
        model, processor = load_for_training(loading_options(checkpoint, max_crops_per_call=most))
        _, tower = stacks_of(model)
        tower[0].register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        for number, layer in enumerate(tower):
            layer.register_forward_pre_hook(lambda *_, number=number: order.append(number))
        with torch.no_grad():
            losses.append(model(**inputs_of(processor)).loss.item())
    assert calls == [2, 1, 1]
    assert order == [*range(len(tower)), *(number for number in range(len(tower)) for _ in range(2))]
    assert len(tower) > 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("compiles", [False, True])
def test_layers_are_compiled_where_asked_for(checkpoint, compiles):
    """Compiled, that is, once they are called: nothing is here."""
    model, _ = load_for_training(loading_options(checkpoint, torch_compile=compiles))
    for stack in stacks_of(model):
        assert all((layer._compiled_call_impl is not None) == compiles for layer in stack)


def test_packed_rows_are_compiled_part_by_part_where_computed_again(checkpoint):
    options = loading_options(checkpoint, torch_compile=True, packs=True, gradient_checkpointing="full")
    decoder, tower = stacks_of(load_for_training(options)[0])
    assert all(layer._compiled_call_impl is None and layer.mlp._compiled_call_impl is not None for layer in decoder)
    assert all(layer._compiled_call_impl is not None for layer in tower)


@pytest.mark.parametrize(
    ("use_liger", "torch_compile", "kernels"), [(False, False, 0), (True, False, 1), (True, True, 0)]
)
def test_liger_where_asked_for(checkpoint, monkeypatch, use_liger, torch_compile, kernels):
    """The loss in any case; the layers only where torch.compile does not fuse them itself."""
    used = []
    monkeypatch.setattr(loading, "use_liger_kernels", used.append)
    options = loading_options(checkpoint, use_liger=use_liger, torch_compile=torch_compile)
    model = load_model(options.model_name_or_path, options)
    assert used == [model] * kernels
    assert model.fuses_loss == use_liger


def test_no_kernels_that_are_made_for_one_length(checkpoint):
    """cuDNN's attention makes a plan for every length."""
    options, was_on = loading_options(checkpoint), torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        load_model(options.model_name_or_path, options)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_on)


@pytest.mark.parametrize("frozen", [False, True])
def test_lora_targets(checkpoint, frozen):
    model, processor = load_for_training(
        loading_options(checkpoint, use_lora=True, freeze_vision_model=frozen, lora_alpha_ratio=0.5)
    )
    adapted = {name.rsplit(".lora_A", 1)[0] for name, p in model.named_parameters() if "lora_A" in name}
    decoder = {name for name in adapted if ".layers." in name and "vision" not in name}
    assert len(decoder) == 3 * 4
    assert any(name.endswith("lm_head") for name in adapted)
    vision = adapted - decoder - {name for name in adapted if name.endswith("lm_head")}
    assert len(vision) == (0 if frozen else 2 * 6 + 2)  # two of the three tower layers are run
    assert model.peft_config["default"].lora_alpha == 2
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert all(
        gradient.abs().sum() > 0
        for name, gradient in gradients(model, inputs_of(processor)).items()
        if "lora_B" in name
    )


def test_lora_target_that_matches_nothing(checkpoint, monkeypatch):
    # one name among several that do match
    monkeypatch.setattr(loading, "DECODER_TARGETS", (*loading.DECODER_TARGETS[:-1], "lm_heed"))
    with pytest.raises(UserError, match="matches no module of the model"):
        load_for_training(loading_options(checkpoint, use_lora=True))


def test_bf16_adapters_are_float32(checkpoint):
    precision = Precision("bf16", torch.bfloat16, torch.bfloat16)
    model, _ = load_for_training(loading_options(checkpoint, use_lora=True, precision=precision))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_adapters_take_their_input_in_half_precision(checkpoint):
    """As PEFT computes it, bit for bit, without its copies of every input in float32."""
    precision = Precision("bf16", torch.bfloat16, torch.bfloat16)
    model, processor = load_for_training(loading_options(checkpoint, use_lora=True, precision=precision))
    for name, parameter in model.named_parameters():  # B starts at 0, where no gradient reaches A or what is below
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    seen = set()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))

    def found() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(model, inputs_of(processor))

    ours = found()
    assert seen == {torch.bfloat16}
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    theirs = found()
    assert torch.float32 in seen
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_qlora_is_nf4_and_its_gradients_survive_an_evaluation(checkpoint):
    """bitsandbytes repacks NF4 weights at evaluation on CPUs with AVX512-BF16 and then loses gradient in silence."""
    import bitsandbytes

    model, processor = load_for_training(loading_options(checkpoint, use_lora=True, use_qlora=True))
    quantised = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert quantised
    assert all(module.weight.quant_type == "nf4" for module in quantised)
    assert not any(module.support_avx512bf16_for_cpu for module in quantised)
    for name, parameter in model.named_parameters():  # B starts at 0, where no gradient reaches A or what is below
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = inputs_of(processor)
    before = gradients(model, inputs)
    model.eval()
    with torch.no_grad():
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    after = gradients(model, inputs)
    assert set(before) == set(after)
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


def test_adapter_is_loaded_on_the_base_it_names(checkpoint, tmp_path):
    options = loading_options(checkpoint, use_lora=True)
    model, processor = load_for_training(options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = load_model(tmp_path / "adapter", loading_options(checkpoint, eval_only=True))
    assert isinstance(again, PeftModel)
    inputs = inputs_of(processor)
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, again(**inputs).loss)
    assert not any(p.requires_grad for p in again.parameters())


def test_processor_of_an_adapter_is_its_base_s(tmp_path):
    """Tokenizer files of the published kind without a config.json beside them are read as another tokenizer."""
    for file in CHECKPOINT.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    fields = {"base_model_name_or_path": str(CHECKPOINT), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    texts = "<|user|>\nWhat is it?<|end|>\n<|assistant|>\n"
    ids = [load_processor(loading_options(folder)).tokenizer(texts).input_ids for folder in (CHECKPOINT, tmp_path)]
    assert ids[0] == ids[1]


def test_another_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match='is a "llama" model; this recipe trains "phi3_v"'):
        find_adapter(str(tmp_path))


def test_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"is not a checkpoint folder.*make demo"):
        find_adapter(str(tmp_path))


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--model_name_or_path no/such could not be fetched from the hub") as error:
        find_adapter("no/such")
    assert "\n" not in str(error.value)
    assert "make demo" in str(error.value)


def put_into_hub_cache(cache, repository, commits, main):
    """Folders as the hub's cache holds a repository: one for each commit, and what its main branch and tag are at."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(main)
    for number, (commit, folder) in enumerate(commits.items()):
        shutil.copytree(folder, root / "snapshots" / commit)
        (root / "refs" / f"v{number}").write_text(commit)


def test_pinned_revision(checkpoint, tmp_path, monkeypatch):
    """Weights and processor are those of the commit, branch or tag; which it was is among the run's options, and an
    adapter finds the same base again."""
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    model = tiny_model()
    torch.nn.init.ones_(model.lm_head.weight)
    model.save_pretrained(other)
    old, new = "0" * 39 + "1", "0" * 39 + "2"
    put_into_hub_cache(tmp_path / "cache", "some/model", {old: other, new: checkpoint}, main=new)
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def load(**values):
        options = loading_options("some/model", **values)
        check_checkpoint(options)
        return options, load_model(options.model_name_or_path, options)

    for revision, commit, ones in ((None, new, False), ("main", new, False), ("v0", old, True), (old, old, True)):
        options, model = load(revision=revision)
        assert options.revision == commit
        assert record_of(options)["revision"] == commit
        assert bool((model.lm_head.weight == 1).all()) is ones
        load_processor(options)
        assert longest_sequence(options) == model.config.max_position_embeddings
    with pytest.raises(UserError, match="some/model could not be fetched from the hub at --revision v7"):
        load(revision="v7")

    options, model = load(revision="v0", use_lora=True)
    processor = load_processor(options)
    write_model(prepare_for_training(model, processor, options), processor, tmp_path / "adapter")
    assert checkpoint_of(tmp_path / "adapter") == ("some/model", old)
    again = load_model(tmp_path / "adapter", loading_options(tmp_path / "adapter", eval_only=True, use_lora=True))
    assert bool((again.base_model.model.lm_head.base_layer.weight == 1).all())


def test_checkpoint_with_a_weight_missing(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing from the checkpoint: \['model.norm.weight'\]"):
        load_model(tmp_path / "copy", loading_options(tmp_path / "copy"))


def test_checkpoint_that_was_not_copied_whole(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"--model_name_or_path {tmp_path}/copy cannot be loaded: ") as error:
        load_model(tmp_path / "copy", loading_options(tmp_path / "copy"))
    assert "\n" not in str(error.value)


def test_options_of_adapters_without_any(checkpoint):
    """Else all weights would be trained, and nothing told of the rank."""
    with pytest.raises(UserError, match=r"^--lora_rank, --lora_dropout: of adapters, .* or leave them out$"):
        check_checkpoint(loading_options(checkpoint, given=("bf16", "lora_rank", "lora_dropout")))
    for method in ("use_lora", "eval_only"):
        check_checkpoint(loading_options(checkpoint, given=("lora_rank",), **{method: True}))


def test_training_an_adapter_further(checkpoint, tmp_path):
    model, _ = load_for_training(loading_options(checkpoint, use_lora=True))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    evaluated = loading_options(tmp_path / "adapter", eval_only=True, bf16=True)
    check_checkpoint(evaluated)
    assert (evaluated.method, evaluated.precision.autocast) == ("lora", torch.bfloat16)  # as adapters are trained
    check_checkpoint(loading_options(tmp_path / "adapter", use_lora=True))
    for values, message in (
        ({"lora_rank": 64}, "--lora_rank 64, the adapter has 4"),
        ({"lora_alpha_ratio": 7}, "alpha .* 28, the adapter has 8"),
        ({"lora_dropout": 0.5}, "--lora_dropout 0.5, the adapter has 0.0"),
        ({"freeze_vision_model": True}, "--freeze_vision_model True, the adapter has False"),
    ):
        with pytest.raises(UserError, match=message):
            check_checkpoint(loading_options(tmp_path / "adapter", use_lora=True, **values))
    file = tmp_path / "adapter" / "adapter_config.json"
    stored = json.loads(file.read_text())
    for names, frozen in ((["qkv_proj", "img_projection.0"], False), (["qkv_proj", "o_proj"], True)):
        file.write_text(json.dumps({**stored, "target_modules": names}))  # as the published recipe's adapters have them
        check_checkpoint(loading_options(tmp_path / "adapter", use_lora=True, freeze_vision_model=frozen))
        with pytest.raises(UserError, match=f"--freeze_vision_model {not frozen}, the adapter has {frozen}"):
            check_checkpoint(loading_options(tmp_path / "adapter", use_lora=True, freeze_vision_model=not frozen))
    file.write_text(json.dumps({**stored, "base_model_name_or_path": str(tmp_path / "gone" / "base")}))
    with pytest.raises(UserError, match="gone/base"):
        check_checkpoint(loading_options(tmp_path / "adapter", use_lora=True))
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="is the base of the adapter to train"):
        check_checkpoint(loading_options(tmp_path / "adapter", use_lora=True, output_dir=checkpoint))
    again = load_model(tmp_path / "adapter", loading_options(tmp_path / "adapter", use_lora=True))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_a_hub_s_checkpoint_is_not_blamed_for_not_being_looked_at(monkeypatch):
    monkeypatch.setattr(errors, "_fetches", False)
    with pytest.raises(NotLookedAtError):
        find_adapter("some/adapter")


def test_an_adapter_s_weights_are_not_fetched_for_wrong_options(checkpoint, tmp_path, monkeypatch):
    """A hub's adapter, here in its cache, on a base that is a folder; what is wrong with the base is told, too."""
    model, _ = load_for_training(loading_options(checkpoint, use_lora=True))
    base = shutil.copytree(checkpoint, tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    commit = "0" * 40
    put_into_hub_cache(tmp_path / "cache", "some/adapter", {commit: tmp_path / "adapter"}, main=commit)
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []

    def find(name, file, **hub):
        asked.append(file)
        return find_file(name, file, **hub)

    monkeypatch.setattr(loading, "find_file", find)
    check_checkpoint(loading_options("some/adapter", use_lora=True))
    assert "adapter_model.safetensors" in asked
    asked.clear()
    (base / "tokenizer.json").unlink()
    with pytest.raises(UserError) as error:
        check_checkpoint(loading_options("some/adapter", use_lora=True, lora_rank=64))
    options, files = error.value.problems
    assert "--lora_rank 64, the adapter has 4" in options
    assert files.endswith("it has no tokenizer.json")
    assert "adapter_model.safetensors" not in asked


def test_damaged_adapter(checkpoint, tmp_path, monkeypatch):
    """Told before the base is read, but for weights that only the model made of both shows to be missing."""
    model, processor = load_for_training(loading_options(checkpoint, use_lora=True))
    write_model(model, processor, tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    first = next(name for name in weights if "lora_A" in name)

    def damaged(name: str, change: Callable[[Path], None]) -> argparse.Namespace:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "whole", folder)
        change(folder / name)
        return loading_options(folder, eval_only=True)

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-20])

    def other(**changes: Any) -> Callable[[Path], None]:
        return lambda file: file.write_text(json.dumps({**config, **changes}))

    def stored(**changes: torch.Tensor) -> Callable[[Path], None]:
        return lambda file: save_file({**weights, **changes}, file)

    def without_first(file: Path) -> None:
        save_file({name: weight for name, weight in weights.items() if name != first}, file)

    for name, change, message in (
        ("adapter_config.json", cut, r"adapter_config\.json is cut off, or names no base .*: fetch the adapter anew"),
        ("adapter_config.json", other(base_model_name_or_path=None), r"names no base"),
        ("adapter_config.json", other(peft_type="IA3"), r"is of a IA3 adapter: only LoRA's are known here"),
        ("adapter_model.safetensors", cut, r"adapter_model\.safetensors cannot be read .*: fetch the adapter anew"),
        ("adapter_model.safetensors", Path.unlink, r"is an adapter without adapter_model\.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            check_checkpoint(damaged(name, change))
    training = damaged("adapter_config.json", other(r=None))
    training.eval_only = False
    with pytest.raises(UserError, match=r"adapter_config\.json has no r: such an adapter cannot be trained further"):
        check_checkpoint(training)
    unknown = {"base_model.model.model.layers.7.lora_A.weight": torch.zeros(4, 4)}
    for change, message in (
        (without_first, rf"1 weights missing from it \({re.escape(first)}\)"),
        (stored(**unknown), r"1 weights not expected \(base_model\.model\.model\.layers\.7\.lora_A\.weight\)"),
        (stored(**{first: torch.zeros(1, 1)}), r"its adapter cannot be loaded: .*size mismatch"),
    ):
        options = damaged("adapter_model.safetensors", change)
        check_checkpoint(options)
        with pytest.raises(UserError, match=message):
            load_model(options.model_name_or_path, options)
    # the adapted head itself, which PEFT stores by default
    head = {"base_model.model.lm_head.base_layer.weight": model.base_model.model.lm_head.base_layer.weight.detach()}
    again = damaged("adapter_model.safetensors", stored(**head))
    assert isinstance(load_model(again.model_name_or_path, again), PeftModel)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_processor_that_was_not_copied_whole(checkpoint, tmp_path, name):
    shutil.copytree(checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{tmp_path}/copy: its processor cannot be read .*fetch them anew") as error:
        check_checkpoint(loading_options(tmp_path / "copy"))
    assert "\n" not in str(error.value)


def test_incomplete_checkpoint(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "preprocessor_config.json").unlink()
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"it has no preprocessor_config.json, no \*.safetensors"):
        check_checkpoint(loading_options(tmp_path / "copy"))
