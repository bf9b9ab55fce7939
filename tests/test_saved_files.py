"""What training leaves, file by file and key by key against the published checkpoints, and as others load it.

A small model with the published small files (configuration, tokenizer, processor) is loaded, prepared and saved as a
run does it. Where the published files are there, everything saved is theirs but for the short lists below. Everything
here is compared exactly.
"""

from __future__ import annotations

import argparse
import builtins
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import common.phi3v
from common.cli import Precision
from common.demo import CHECKPOINT
from common.loading import load_model, load_processor, prepare_for_training
from common.phi3v import Phi3VConfig, Phi3VForCausalLM
from common.phi3v.configuration import OFFICIAL_REPOSITORY
from common.training import write_model
from tests.conftest import folder_or_skip
from tests.model_helpers import (
    PUBLISHED_NAMES,
    REPOSITORY,
    loading_options,
    picture,
    published_layout,
    tiny_config,
    write_stand_in_checkpoint,
)
from tests.test_merge import save_adapter

ABSENT = "(absent)"
NUM_CROPS = 7  # as trained; published are 4 and 16
ENDS = [32007, 32000]  # <|end|>, <|endoftext|>
TEXT_FILES = {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
REMOTE = "processing_phi3_v.Phi3VImageProcessor"


def official(name: str) -> str:
    """A class of the official code, as `auto_map` names it from elsewhere."""
    return f"{OFFICIAL_REPOSITORY}--{name}"


PROCESSOR = official("processing_phi3_v.Phi3VProcessor")
IMAGE_PROCESSOR = official(REMOTE)

# What is meant to differ from phi-3.5-vision's files: file -> key -> what is saved.
INTENDED: dict[str, dict[str, Any]] = {
    "config.json": {
        "transformers_version": transformers.__version__,
        "auto_map": {
            "AutoConfig": official("configuration_phi3_v.Phi3VConfig"),
            "AutoModelForCausalLM": official("modeling_phi3_v.Phi3VForCausalLM"),
        },
        "image_token_id": 32044,  # this project's own field
        "_name_or_path": ABSENT,  # where the file lay
        "_attn_implementation": ABSENT,  # of the machine that wrote it
    },
    "generation_config.json": {
        "eos_token_id": ENDS,  # published: 2, which the model never says
        "transformers_version": transformers.__version__,
    },
    "preprocessor_config.json": {
        "auto_map": {"AutoImageProcessor": IMAGE_PROCESSOR, "AutoProcessor": PROCESSOR},
        "num_crops": NUM_CROPS,
    },
    "processor_config.json": {"auto_map": {"AutoProcessor": PROCESSOR}},
    "tokenizer.json": {},
    "tokenizer_config.json": {"auto_map": {"AutoProcessor": PROCESSOR}},
    "special_tokens_map.json": {},
}
# Phi-3-vision's files lack what those of Phi-3.5-vision state, two of them altogether.
INTENDED_OF_PHI_3 = {
    "config.json": {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "pad_token_id": 32000},
    "preprocessor_config.json": {"do_convert_rgb": True},
    "generation_config.json": {"bos_token_id": 1, "pad_token_id": 32000, "use_cache": True, "_from_model_config": True},
    "processor_config.json": {"processor_class": "Phi3VProcessor"},
}


def options_for(checkpoint: Path, **values: Any) -> argparse.Namespace:
    return loading_options(
        checkpoint, **{"num_crops": NUM_CROPS, "precision": Precision("bf16", torch.bfloat16, None), **values}
    )


def shrink(source: Path, folder: Path) -> Path:
    """A checkpoint with the small files of another one, whose `config.json` differs in the model's size alone."""
    folder.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)
    fields, small = json.loads((source / "config.json").read_text()), tiny_config().to_dict()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    fields |= {name: small[name] for name in (*names, "vision_config")}
    fields["img_processor"]["image_dim_out"] = small["img_processor"]["image_dim_out"]
    for name in ("long_factor", "short_factor"):
        fields["rope_scaling"][name] = fields["rope_scaling"][name][::3]  # half a head is 16 wide instead of 48
    (folder / "config.json").write_text(json.dumps(fields))
    model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(folder)).to(torch.bfloat16)
    texts = {path: path.read_bytes() for path in folder.iterdir()}
    model.save_pretrained(folder)
    for path, content in texts.items():  # as published, not as saved by us
        path.write_bytes(content)
    if not (source / "generation_config.json").exists():
        (folder / "generation_config.json").unlink()
    return folder


def save(checkpoint: Path, folder: Path, **values: Any) -> Path:
    """What a run saves that trains a checkpoint."""
    options = options_for(checkpoint, **values)
    processor = load_processor(options)
    model = prepare_for_training(load_model(checkpoint, options), processor, options)
    folder.mkdir()
    write_model(model, processor, folder)
    return folder


@pytest.fixture(scope="module", params=["stand-in", *PUBLISHED_NAMES])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint that is trained: with the published files, and with made-up ones where there are none."""
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    if request.param != "stand-in":
        return shrink(folder_or_skip(request.param), folder)
    return shrink(write_stand_in_checkpoint(tmp_path_factory.mktemp("made_up")), folder)


@pytest.fixture(scope="module")
def saved(source: Path) -> Path:
    return save(source, source.with_name("saved"))


@pytest.fixture(scope="module")
def adapter(source: Path) -> Path:
    return save(source, source.with_name("adapter"), use_lora=True)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text()) if (folder / name).exists() else {}


def differences(source: Path, saved: Path, name: str) -> dict[str, Any]:
    before, after = read(source, name), read(saved, name)
    keys = before.keys() | after.keys()
    return {key: after.get(key, ABSENT) for key in keys if before.get(key, ABSENT) != after.get(key, ABSENT)}


def intended(source: Path, name: str) -> dict[str, Any]:
    """What is on the lists for a file, as far as the source's own does not say it already."""
    has_less = "128k" in source.name or not (source / name).exists()
    listed = INTENDED[name] | (INTENDED_OF_PHI_3.get(name, {}) if has_less else {})
    before = read(source, name)
    if name == "tokenizer_config.json" and "auto_map" not in before:
        return {}  # Phi-3-vision's names no processor; the file is left as it is
    return {key: value for key, value in listed.items() if before.get(key, ABSENT) != value}


# --- the complete checkpoint


def test_files(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"model.safetensors"} | TEXT_FILES | TOKENIZER


@pytest.mark.parametrize("name", sorted(INTENDED))
def test_every_key(name: str, source: Path, saved: Path) -> None:
    """Saved is what is published, but for the lists; and nothing is on them that does not differ."""
    assert (saved / name).is_file()
    assert differences(source, saved, name) == intended(source, name)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json"])
def test_tokenizer_byte_for_byte(name: str, source: Path, saved: Path, adapter: Path) -> None:
    for folder in (saved, adapter):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_weights_have_the_official_names(source: Path, saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    config = read(source, "config.json")
    assert shapes == published_layout(config, config["vision_config"])


def test_generation_stops_without_being_told(saved: Path) -> None:
    """`generate` by itself heeds both end tokens."""
    model = Phi3VForCausalLM.from_pretrained(saved)
    assert model.generation_config.eos_token_id == ENDS
    model.lm_head.weight.data.zero_()  # all logits equal: the first token, `<unk>`, is chosen
    ids = torch.tensor([[1, 5, 6]])
    assert model.generate(ids, max_new_tokens=4).shape == (1, 7)
    for end in ENDS:
        model.lm_head.weight.data.zero_()
        hidden = model.model(ids).last_hidden_state[0, -1]
        model.lm_head.weight.data[end] = hidden
        assert model.generate(ids, max_new_tokens=4).tolist() == [[1, 5, 6, end]]


# --- as others load it


@pytest.fixture
def no_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may ask on the terminal or fetch a class from a repository."""

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError(f"asked for {arguments}")

    monkeypatch.setattr(builtins, "input", refuse)
    for module in (
        transformers.dynamic_module_utils,
        transformers.models.auto.auto_factory,
        transformers.models.auto.configuration_auto,
        transformers.models.auto.image_processing_auto,
        transformers.models.auto.processing_auto,
        transformers.models.auto.tokenization_auto,
    ):
        monkeypatch.setattr(module, "get_class_from_dynamic_module", refuse)


@pytest.mark.parametrize("what", ["saved", "adapter"])
def test_auto_classes_are_ours(what: str, saved: Path, adapter: Path, no_remote_code: None) -> None:
    """Although `auto_map` names the official code."""
    folder = saved if what == "saved" else adapter
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is common.phi3v.Phi3VProcessor
    assert processor.image_processor.num_crops == NUM_CROPS
    assert type(AutoConfig.from_pretrained(folder)) is common.phi3v.Phi3VConfig
    assert type(AutoImageProcessor.from_pretrained(folder)) is common.phi3v.Phi3VImageProcessor
    prompt = "<|user|>\nWhat is it?<|end|>\n<|assistant|>\n"
    assert AutoTokenizer.from_pretrained(folder)(prompt).input_ids == processor.tokenizer(prompt).input_ids
    if what == "saved":
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is common.phi3v.Phi3VForCausalLM


def test_processor_of_what_is_saved_is_that_of_the_source(source: Path, saved: Path, adapter: Path) -> None:
    text = "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n"
    folders = [(source, {"num_crops": NUM_CROPS}), (saved, {}), (adapter, {})]
    wanted, *others = (
        AutoProcessor.from_pretrained(one, **more)(text, [picture(500, 300, 1)]) for one, more in folders
    )
    for found in others:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- the adapter


def test_files_of_an_adapter(source: Path, saved: Path, adapter: Path) -> None:
    """Beside PEFT's own (with its README) those of the complete checkpoint, the same, but for what generates."""
    own = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in adapter.iterdir()} == own | TOKENIZER | TEXT_FILES - {"generation_config.json"}
    for name in TOKENIZER | TEXT_FILES - {"generation_config.json"}:
        assert read(adapter, name) == read(saved, name), name
    assert read(adapter, "adapter_config.json")["base_model_name_or_path"] == str(source.resolve())


def test_peft_loads_the_adapter(source: Path, adapter: Path, no_remote_code: None) -> None:
    """On the base by plain transformers and PEFT, every weight of the adapter in its place."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), adapter)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = {name.replace(".default", ""): weight for name, weight in model.named_parameters() if "lora_" in name}
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], weight) for name, weight in stored.items())


# --- docs/serving.md


def test_python_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Run as it stands, with the built-in checkpoint in the place of the reader's and of the base."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "serving.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "output").symlink_to(CHECKPOINT)
    save_adapter(tmp_path / "output_lora")
    picture(336, 336, 1).save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace(OFFICIAL_REPOSITORY, str(CHECKPOINT)), names)
    assert capsys.readouterr().out.strip()
    assert type(names["model"]).__name__ == "Phi3VForCausalLM"
    assert any(type(module).__name__ == "Linear4bit" for module in names["model"].modules())
