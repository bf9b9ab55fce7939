"""`tools.merge`: an adapter folded into a complete checkpoint, and what it does where that fails."""

import errno
import json
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from common.demo import CHECKPOINT
from common.errors import UserError
from common.loading import load_model
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from tests.model_helpers import picture
from tools import merge, predict

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "fc1", "img_projection.0")
SCALE = 2.0  # alpha / rank


def save_adapter(folder: Path, in_four_bits: bool = False) -> Path:
    """An adapter whose every part changes the answers a little, saved as training does."""
    torch.manual_seed(0)
    how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": {"": "cpu"}}
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, **(how if in_four_bits else {}))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4 * SCALE, target_modules=list(TARGETS))
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


def run_merge(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tools.merge", *map(str, arguments)])
    merge.main()


def folded(adapter):
    """The merged weights by arithmetic in float32, and the sizes of what is summed: what rounding is relative to."""
    weights = {name: weight.float() for name, weight in load_file(CHECKPOINT / "model.safetensors").items()}
    sizes = {name: weight.abs() for name, weight in weights.items()}
    parts = load_file(adapter / "adapter_model.safetensors")
    names = [name for name in parts if "lora_A" in name]
    assert len(names) == 4 * 4 + 1 + 2 + 1  # four decoder layers, the head, two tower layers, the projection
    for name in names:
        down, up = parts[name], parts[name.replace("lora_A", "lora_B")]
        target = name.removeprefix("base_model.model.").replace("lora_A.", "")
        weights[target] += SCALE * up @ down
        sizes[target] += SCALE * up.abs() @ down.abs()
    return weights, sizes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merged(dtype, adapter, tmp_path, monkeypatch, capsys):
    """The weights are the base's plus what the adapter adds, rounded to the precision, under the base's names."""
    run_merge(monkeypatch, adapter, tmp_path / "merged", "--dtype", dtype)
    printed = capsys.readouterr().out
    assert "largest difference of a logit" in printed
    assert f"merged into {tmp_path}/merged" in printed
    merged, (wanted, sizes) = load_file(tmp_path / "merged" / "model.safetensors"), folded(adapter)
    assert {name: weight.shape for name, weight in merged.items()} == {n: w.shape for n, w in wanted.items()}
    assert {weight.dtype for weight in merged.values()} == {getattr(torch, dtype)}
    # what is added is rounded and then the sum, each by half a unit in the last place at most
    unit = torch.finfo(getattr(torch, dtype)).eps
    for name, weight in merged.items():
        assert ((weight.float() - wanted[name]).abs() <= unit * sizes[name]).all(), name
    assert not list(tmp_path.glob("*.incomplete"))


def test_merged_is_a_complete_checkpoint(adapter, tmp_path, monkeypatch):
    """It loads by itself and has the adapter's answers, its number of crops, and the end tokens."""
    run_merge(monkeypatch, adapter, tmp_path / "merged", "--dtype", "float32")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in CHECKPOINT.iterdir()} - {"pretraining.json"}
    assert json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())["num_crops"] == 2
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    official = json.loads((CHECKPOINT / "generation_config.json").read_text())
    assert generation == official
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((CHECKPOINT / "config.json").read_text()) | {"torch_dtype": "float32"}
    alone = load_model(tmp_path / "merged", predict.how_to_load(tmp_path / "merged")).eval()
    beside = load_model(adapter, predict.how_to_load(adapter)).eval()
    processor = Phi3VProcessor.from_pretrained(tmp_path / "merged", num_crops=1)
    inputs = processor("<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n", [picture(336, 336, 1)])
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (alone, beside)]
    # float32's rounding through six layers: 1e-5 seen, relative to the largest logit
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[1].abs().max()


def test_a_qlora_adapter_is_merged_into_unquantised_weights(tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter", in_four_bits=True)
    run_merge(monkeypatch, adapter, tmp_path / "merged", "--dtype", "float32")
    merged, (wanted, sizes) = load_file(tmp_path / "merged" / "model.safetensors"), folded(adapter)
    for name, weight in merged.items():  # to float32's rounding; NF4's would be 1e-2 and more
        assert ((weight - wanted[name]).abs() <= 1e-6 * sizes[name]).all(), name
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_picture_of_ones_own(adapter, tmp_path, monkeypatch, capsys):
    picture(200, 300, 1).save(tmp_path / "page.png")
    seen, encode = [], merge.encode_example
    monkeypatch.setattr(merge, "encode_example", lambda *a, **k: seen.append(a[1].turns[0]) or encode(*a, **k))
    asked = ("--image", tmp_path / "page.png", "--question", "Where is it?")
    run_merge(monkeypatch, adapter, tmp_path / "merged", *asked)
    assert [one.images[0].size for one in seen] == [(200, 300)] * 2
    assert {one.user for one in seen} == {"<|image_1|>\nWhere is it?"}


# --- what fails leaves nothing behind


def assert_nothing_left(folder):
    assert not list(folder.glob("merged*"))


def test_another_answer_is_a_failure(adapter, tmp_path, monkeypatch, capsys):
    """As where the adapter is left out of what is written."""
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda model, **_: model.unload(), raising=False)
    with pytest.raises(SystemExit) as error:
        run_merge(monkeypatch, adapter, tmp_path / "merged")
    assert error.value.code == 1
    assert "not merged: " in capsys.readouterr().err
    assert_nothing_left(tmp_path)


def test_a_difference_above_the_bound_is_a_failure(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(merge.BOUNDS, "bfloat16", 1e-6)
    with pytest.raises(SystemExit) as error:
        run_merge(monkeypatch, adapter, tmp_path / "merged")
    assert error.value.code == 1
    assert "a logit differs by" in capsys.readouterr().err
    assert_nothing_left(tmp_path)


def test_weights_that_are_not_finite(adapter, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "broken")
    parts = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    next(iter(parts.values()))[0] = float("nan")
    save_file(parts, tmp_path / "broken" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"broken cannot be merged: .*NaN"):
        run_merge(monkeypatch, tmp_path / "broken", tmp_path / "merged")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_disk_that_fails(failure, adapter, tmp_path, monkeypatch):
    def fail(model, folder, **_):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").touch()
        raise failure

    monkeypatch.setattr(Phi3VForCausalLM, "save_pretrained", fail)
    with pytest.raises(UserError, match="merged cannot be written: "):
        run_merge(monkeypatch, adapter, tmp_path / "merged")
    assert_nothing_left(tmp_path)


def test_too_little_room(adapter, tmp_path, monkeypatch):
    """Told before any weight is read, with both numbers."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: usage(10, 10, 2_000_000))
    monkeypatch.setattr(merge, "load_model", None)
    size = (CHECKPOINT / "model.safetensors").stat().st_size  # but for the names, 1 % of it
    with pytest.raises(UserError, match=r"would take [\d.]+ GB and .* has 0.002 GB free") as error:
        run_merge(monkeypatch, adapter, tmp_path / "merged")
    assert float(re.search(r"take ([\d.]+)", str(error.value))[1]) == pytest.approx(size / 1e9, rel=0.01)
    assert_nothing_left(tmp_path)


def test_where_something_is(adapter, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for place in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(UserError, match="is there already"):
            run_merge(monkeypatch, adapter, place)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.incomplete").mkdir()  # of a merge that was killed
    (tmp_path / "empty.incomplete" / "model-00009-of-00009.safetensors").touch()
    run_merge(monkeypatch, adapter, tmp_path / "empty")
    names = {path.name for path in (tmp_path / "empty").iterdir()}
    assert "model.safetensors" in names
    assert "model-00009-of-00009.safetensors" not in names


def test_nothing_to_merge(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a complete checkpoint"):
        run_merge(monkeypatch, CHECKPOINT, tmp_path / "merged")
    with pytest.raises(UserError, match=f"^{tmp_path} is not a checkpoint folder"):
        run_merge(monkeypatch, tmp_path, tmp_path / "merged")


def test_all_wrong_options_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        merge.parse([str(tmp_path), str(Path(__file__).parent), "--image", "no.png", "--question", "<|end|>"])
    for part in ("3 problems", "is there already", "--image no.png", "--question holds <|end|>"):
        assert part in str(error.value)
