"""What SECURITY.md says of checkpoints, and that the tests it names exist."""

import argparse
import ast
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from common.cli import Precision
from common.errors import UserError
from common.loading import load_model, load_processor
from tests.launch import REPOSITORY
from tests.model_helpers import tiny_model, write_stand_in_checkpoint

LOCAL_CODE = {
    "config.json": {"AutoConfig": "code.Evil", "AutoModel": "code.Evil", "AutoModelForCausalLM": "code.Evil"},
    "preprocessor_config.json": {"AutoImageProcessor": "code.Evil", "AutoProcessor": "code.Evil"},
    "processor_config.json": {"AutoProcessor": "code.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Evil", "code.Evil"], "AutoProcessor": "code.Evil"},
}


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_stand_in_checkpoint(folder)
    tiny_model().save_pretrained(folder)
    return folder


def options_of(folder):
    return argparse.Namespace(
        model_name_or_path=str(folder),
        num_crops=1,
        precision=Precision("fp32", torch.float32, None),
        **dict.fromkeys(("use_qlora", "use_liger", "torch_compile", "eval_only"), False),
        attention="sdpa",
        device="cpu",
        max_crops_per_call=None,
        revision=None,
    )


def test_code_in_a_checkpoint_is_not_run(checkpoint, tmp_path, monkeypatch):
    """Files of Python that every configuration names: not run for this model, nor before another is refused."""
    marker = tmp_path / "marker"
    (checkpoint / "code.py").write_text(
        f"from pathlib import Path\nfrom transformers import PretrainedConfig\nPath({str(marker)!r}).touch()\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    for name, auto_map in LOCAL_CODE.items():
        fields = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**fields, "auto_map": auto_map}))
    options = options_of(checkpoint)
    load_processor(options)
    load_model(checkpoint, options)
    assert not marker.exists()
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**fields, "model_type": "evil"}))
    for load in (lambda: load_processor(options), lambda: load_model(checkpoint, options)):
        with pytest.raises(UserError, match=r"is not a checkpoint folder \("):
            load()
    assert not marker.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    assert marker.exists()  # else this test could not fail


def test_pickled_weights_are_refused(checkpoint, tmp_path):
    """Beside safetensors of another name, so that the folder passes for a checkpoint."""
    marker = tmp_path / "marker"
    (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    torch.save({"evil": Touch(marker)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be loaded: .*model\.safetensors"):
        load_model(checkpoint, options_of(checkpoint))
    assert not marker.exists()
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # else this test could not fail


def test_pickled_adapters_are_refused(checkpoint, tmp_path):
    marker = tmp_path / "marker"
    adapter = {"base_model_name_or_path": str(checkpoint), "peft_type": "LORA", "r": 4, "target_modules": ["lm_head"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"evil": Touch(marker)}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"is an adapter without adapter_model\.safetensors"):
        load_model(tmp_path / "adapter", options_of(checkpoint))
    assert not marker.exists()


def test_every_test_named_exists():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, name in named:
        functions = ast.parse((REPOSITORY / file).read_text(encoding="utf-8")).body
        assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
