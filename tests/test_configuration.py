"""The configuration reads and writes the published `config.json`; the real model has the published layout.

Everything here is compared exactly: fields, names, shapes and counts have no rounding.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from common.phi3v import Phi3VConfig, Phi3VForCausalLM
from common.phi3v.configuration import CLIP_LARGE_336, OFFICIAL_REPOSITORY
from tests.model_helpers import (
    REPOSITORY,
    published_config,
    published_layout,
    tiny_config,
    tiny_model,
    write_stand_in_checkpoint,
)

ABSENT = "(absent)"


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def saved(config: Phi3VConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


# The published files


def test_published_file_comes_back(published: Path, tmp_path: Path) -> None:
    """What is loaded from a published `config.json` and saved differs from it in these fields only."""
    before = json.loads((published / "config.json").read_text())
    after = saved(Phi3VConfig.from_pretrained(published), tmp_path)
    intended = {
        # the library that wrote the file
        "transformers_version": ("4.38.1", transformers.__version__),
        # the official code does not lie beside what we save
        "auto_map": (
            before["auto_map"],
            {name: f"{OFFICIAL_REPOSITORY}--{target}" for name, target in before["auto_map"].items()},
        ),
        # this project's own field
        "image_token_id": (ABSENT, 32044),
        # said where the file lay and what the machine that wrote it had
        "_name_or_path": (before["_name_or_path"], ABSENT),
        "_attn_implementation": ("flash_attention_2", ABSENT),
    }
    if "128k" in published.name:
        # defaults of the reference, which phi-3.5's file states
        intended |= {"embd_pdrop": (ABSENT, 0.0), "resid_pdrop": (ABSENT, 0.0), "pad_token_id": (ABSENT, 32000)}
    differences = {
        name: (before.get(name, ABSENT), after.get(name, ABSENT))
        for name in before.keys() | after.keys()
        if before.get(name, ABSENT) != after.get(name, ABSENT)
    }
    assert differences == intended


def test_saving_again_changes_nothing(published: Path, tmp_path: Path) -> None:
    """A file that this package wrote comes back as it is, and so does `to_dict`."""
    config = Phi3VConfig.from_pretrained(published)
    first = saved(config, tmp_path / "first")
    again = Phi3VConfig.from_pretrained(tmp_path / "first")
    assert saved(again, tmp_path / "second") == first
    # but for the folder that the configuration was loaded from
    assert without(again.to_dict(), "_name_or_path") == without(config.to_dict(), "_name_or_path")


def test_helpers_hold_the_published_fields(published_instruct: Path) -> None:
    """The configuration that the tests use where no published file is there is the published one."""
    official = json.loads((published_instruct / "config.json").read_text())
    assert published_config() == without(
        official, "_name_or_path", "_attn_implementation", "auto_map", "transformers_version"
    )


def test_meaning_of_published_fields() -> None:
    """What the model is built from, read from the published fields."""
    config = Phi3VConfig.from_dict(published_config())
    tower = config.tower_config()
    assert {name: getattr(tower, name) for name in CLIP_LARGE_336} == CLIP_LARGE_336
    assert (config.image_feature_layer, config.num_tower_layers_used) == (-2, 23)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (3072, 32, 32064)
    assert (config.sliding_window, config.original_max_position_embeddings) == (262144, 4096)
    assert config.dtype == torch.bfloat16
    assert config._attn_implementation in (None, "sdpa", "eager")  # not the file's flash_attention_2


# Rope


@pytest.mark.parametrize("name_of_type", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_rope_is_longrope_inside_and_su_on_disk(kind: str, name_of_type: str, tmp_path: Path) -> None:
    fields = published_config()
    factors = {name: fields["rope_scaling"][name] for name in ("long_factor", "short_factor")}
    fields["rope_scaling"] = {**factors, name_of_type: kind}
    given = copy.deepcopy(fields)
    config = Phi3VConfig.from_dict(fields)
    assert fields == given, "the caller's fields were changed"
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"]) == ("longrope", 10_000.0)
    assert {name: rope[name] for name in factors} == factors
    written = saved(config, tmp_path)
    assert written["rope_scaling"] == {**factors, "type": "su"}
    assert "rope_parameters" not in written
    assert written["rope_theta"] == 10_000.0
    assert Phi3VConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_rope_attention_scaling() -> None:
    """sqrt(1 + ln(131072 / 4096) / ln(4096)), the published code's scale of cosines and sines (to rounding)."""
    rotary = Phi3VForCausalLM(tiny_config()).model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)), rel=1e-12)


@pytest.mark.parametrize("factor", ["short_factor", "long_factor"])
@pytest.mark.parametrize("length", [0, 47, 49])
def test_wrong_factor_length(factor: str, length: int) -> None:
    fields = published_config()
    fields["rope_scaling"][factor] = [1.0] * length
    with pytest.raises(ValueError, match=rf"{factor} has {length} entries, half a head has 48"):
        Phi3VConfig.from_dict(fields)


def test_other_rope_type() -> None:
    fields = published_config()
    fields["rope_scaling"]["type"] = "linear"
    with pytest.raises(ValueError, match=r'type "linear"; Phi-3\.5-vision uses "su"'):
        Phi3VConfig.from_dict(fields)


# The image side


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_cls", "audio"),
        ("hd_transform_order", "glb_sub"),
        ("projection_cls", "linear"),
        ("use_hd_transform", False),
        ("with_learnable_separator", False),
    ],
)
def test_other_image_embedding(key: str, value: Any) -> None:
    fields = published_config()
    published_value = fields["embd_layer"][key]
    fields["embd_layer"][key] = value
    with pytest.raises(ValueError, match=rf"embd_layer\.{key} is {value!r}; only {published_value!r}"):
        Phi3VConfig.from_dict(fields)


def test_tower_width_mismatch() -> None:
    fields = published_config()
    fields["img_processor"]["image_dim_out"] = 768
    with pytest.raises(ValueError, match=r"image_dim_out is 768, but the tower's hidden_size is 1024"):
        Phi3VConfig.from_dict(fields)


@pytest.mark.parametrize(("key", "value"), [("image_size", 224), ("patch_size", 16)])
def test_other_patches(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{key} {value}.*needs 336 and 14"):
        Phi3VConfig.from_dict(published_config() | {"vision_config": {key: value}})


@pytest.mark.parametrize("layer", [0, 3, -26])
def test_no_such_tower_layer(layer: int) -> None:
    fields = published_config()
    fields["img_processor"]["layer_idx"] = layer
    with pytest.raises(ValueError, match=rf"layer_idx is {layer}; a tower of 24 layers"):
        Phi3VConfig.from_dict(fields)


# Round trips


def test_tiny_configuration_is_the_published_one_shrunk() -> None:
    """Only sizes differ; both rope lists are there, half a head long, and differ from each other."""
    fields, original = tiny_config().to_dict(), Phi3VConfig.from_dict(published_config()).to_dict()
    sizes = {
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
        *("vision_config", "img_processor", "rope_scaling", "dtype"),
    }
    assert {name for name in fields.keys() | original.keys() if fields.get(name) != original.get(name)} == sizes
    rope = fields["rope_scaling"]
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == 16
    assert rope["short_factor"] != rope["long_factor"]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"original_max_position_embeddings": 400},
        {"image_token_id": 7, "pad_token_id": 3, "rope_theta": 5000.0},
        {"rope_scaling": None},
    ],
)
def test_round_trip(overrides: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    again = Phi3VConfig.from_pretrained(tmp_path)
    assert without(again.to_dict(), "_name_or_path") == without(config.to_dict(), "_name_or_path")
    assert again.rope_parameters == config.rope_parameters
    for name, value in overrides.items():
        assert again.to_dict()[name] == value
    copied = copy.deepcopy(config)
    assert copied.to_dict() == config.to_dict()
    assert copied.rope_parameters == config.rope_parameters


# The real model


def count_by_arithmetic(config: dict[str, Any], tower: dict[str, int]) -> int:
    """The number of parameters, from the sizes alone."""
    hidden, wide, width, tower_wide = (
        config["hidden_size"],
        config["intermediate_size"],
        tower["hidden_size"],
        tower["intermediate_size"],
    )
    embedding_and_head = 2 * config["vocab_size"] * hidden
    attention = 3 * hidden * hidden + hidden * hidden
    multilayer_perceptron = hidden * 2 * wide + wide * hidden
    decoder_layer = attention + multilayer_perceptron + 2 * hidden
    tower_layer = (
        4 * (width * width + width)
        + (width * tower_wide + tower_wide)
        + (tower_wide * width + width)
        + 2 * (width + width)
    )
    class_token, patches, positions = width, width * 3 * 14 * 14, (24 * 24 + 1) * width
    tower_norms = 2 * (width + width)
    projection = (4 * width * hidden + hidden) + (hidden * hidden + hidden)
    separators = 2 * 4 * width
    return (
        embedding_and_head
        + config["num_hidden_layers"] * decoder_layer
        + hidden
        + tower["num_hidden_layers"] * tower_layer
        + (class_token + patches + positions + tower_norms)
        + projection
        + separators
    )


def test_real_size() -> None:
    """The 4.15 billion parameters of the published model: every name, every shape, and their number.

    On the meta device, where a tensor has a shape and no memory.
    """
    fields = published_config()
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_dict(fields))
    layout = published_layout(fields, CLIP_LARGE_336)
    assert {name: list(parameter.shape) for name, parameter in model.named_parameters()} == layout
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == layout
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == count_by_arithmetic(fields, CLIP_LARGE_336) == 4_146_621_440


# Loading says nothing and asks nothing

LOAD_EVERYTHING = """
import json, os, sys, tempfile

import torch
import common.phi3v as phi3v
import transformers

folder, has_weights = sys.argv[1], sys.argv[2] == "weights"
transformers.utils.logging.disable_progress_bar()
loaders = {name: getattr(phi3v, name) for name in ("Phi3VConfig", "Phi3VProcessor", "Phi3VImageProcessor")}
for name in ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer"):
    loaders[name] = getattr(transformers, name)
if has_weights:
    loaders |= {"Phi3VForCausalLM": phi3v.Phi3VForCausalLM}
    loaders |= {name: getattr(transformers, name) for name in ("AutoModel", "AutoModelForCausalLM")}
results, terminal = {}, os.dup(2)
for name, loader in loaders.items():
    for arguments in ({}, {"trust_remote_code": False}):
        with tempfile.TemporaryFile("w+") as said:
            os.dup2(said.fileno(), 2)
            try:
                loaded = type(loader.from_pretrained(folder, **arguments))
                outcome = f"{loaded.__module__}.{loaded.__name__}"
            except BaseException as error:
                outcome = repr(error)
            finally:
                sys.stderr.flush()
                os.dup2(terminal, 2)
            said.seek(0)
            results[f"{name} {arguments}"] = [outcome, said.read()]
print(json.dumps(results))
"""


def load_everything(folder: Path, what: str) -> None:
    """Load a checkpoint in every way, in a process without a terminal; assert that nothing is said or asked."""
    # stdin is closed: a question could only end in an error
    process = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", sys.executable, "-c", LOAD_EVERYTHING, str(folder), what],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 1, f"printed while loading: {lines[:-1]}"
    results = json.loads(lines[0])
    assert {name: said for name, (_, said) in results.items() if said} == {}
    ours = {"AutoModel": "Phi3VModel", "AutoModelForCausalLM": "Phi3VForCausalLM"}
    for name, (outcome, _) in results.items():
        loader = name.split()[0]
        if loader == "AutoTokenizer":
            assert outcome.startswith("transformers.tokenization_utils"), outcome
        else:
            wanted = ours.get(loader, loader.replace("Auto", "Phi3V"))
            assert outcome.startswith("common.phi3v."), f"{name}: {outcome}"
            assert outcome.endswith(f".{wanted}"), f"{name}: {outcome}"
    assert "warn" not in process.stderr.lower(), process.stderr


def test_loading_published_files_is_silent(published: Path) -> None:
    """Configuration, processor and tokenizer of the published folders, which name remote code."""
    load_everything(published, "no weights")


def test_loading_a_checkpoint_is_silent(tmp_path: Path) -> None:
    """The same for a whole checkpoint, weights included, whose files name remote code."""
    write_stand_in_checkpoint(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["auto_map"] = {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    }
    fields["_attn_implementation"] = "flash_attention_2"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    load_everything(tmp_path, "weights")
