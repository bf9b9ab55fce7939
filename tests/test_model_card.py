"""The model card, and what `--push_to_hub` uploads."""

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.cli import hf
from huggingface_hub.utils import filter_repo_objects

from common import model_card
from common.cli import Precision
from common.model_card import push_problems, push_to_hub, write_model_card
from tools import predict

OFFICIAL = "microsoft/Phi-3.5-vision-instruct"
MINI = "nielsr/docvqa_1200_examples"
BEFORE, AFTER = {"anls": 0.25, "anls_recipe": 0.2}, {"anls": 0.87654, "anls_recipe": 0.5}
# What a run leaves that is its user's own.
PRIVATE = ("eval_before.json", "eval_after.json", "eval_step_5.json", "train_log.jsonl", "run.json", "stages.json")
PRIVATE += (
    "report.html",
    "confusion_eval_after.png",
    "bad_examples.jsonl",
    "run_facts.json",
    "runs/events.out",
    "x.txt",
)
PRIVATE += ("checkpoint-5/model.safetensors", "checkpoint-5/config.json", "checkpoint-5/optimizer.pt")
PRIVATE += ("report_images/0.png", "model.incomplete/model.safetensors", "config.json.incomplete")
PUBLIC = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
PUBLIC += ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
PUBLIC += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md")


def options_for(folder, **values):
    options = {
        "output_dir": folder / "trained",
        "model_name_or_path": OFFICIAL,
        "push_to_hub": None,
        "method": "full",
        "use_lora": False,
        "freeze_vision_model": False,
        "precision": Precision("bf16", torch.bfloat16, None),
        "revision": None,
        "max_steps": None,
        "num_train_epochs": 2,
        "batch_size": 64,
        "learning_rate": 2e-4,
        "vision_learning_rate": None,
        "projector_learning_rate": None,
        "warmup_steps": 50,
        "wd": 0.01,
        "num_crops": 16,
        "seed": 3,
    }
    (folder / "trained").mkdir(exist_ok=True)
    return argparse.Namespace(**{**options, **values})


def data_of(source):
    """`Rows` or, of a JSONL file, `Conversations`, as far as a card is made of them."""
    named = {"path": source} if str(source).endswith(".jsonl") else {"source": str(source)}
    return argparse.Namespace(**named)


def write(options, before=BEFORE, after=AFTER, trained_on=MINI, evaluated_on=MINI, metrics=None):
    data = data_of(trained_on), data_of(evaluated_on)
    write_model_card(options, *data, before, after, "DocVQA", metrics or {"anls": "ANLS"})
    return ModelCard.load(options.output_dir / "README.md")


def write_adapter(options, base):
    fields = {"base_model_name_or_path": str(base), "r": 32, "lora_alpha": 16, "lora_dropout": 0.0}
    (options.output_dir / "adapter_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("a/b", "[a/b](https://huggingface.co/datasets/a/b)"),
        ("a/b:c", "[a/b](https://huggingface.co/datasets/a/b), configuration `c`"),
        ("a/b@v1", "[a/b](https://huggingface.co/datasets/a/b), revision `v1`"),
        ("a/b:c@v1", "[a/b](https://huggingface.co/datasets/a/b), configuration `c`, revision `v1`"),
        ("/data/b@v1", "`b@v1` (local)"),
    ],
)
def test_sources_in_words(source, told):
    assert model_card.in_words(source) == told
    assert model_card.hub_id(source) == ("a/b" if source.startswith("a/b") else None)


def test_metadata(tmp_path):
    data = write(options_for(tmp_path)).data
    assert (data.base_model, data.datasets, data.language, data.license) == (OFFICIAL, [MINI], "en", "mit")
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("transformers", "image-text-to-text", ["anls"])
    assert data.to_dict()["base_model_relation"] == "finetune"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("anls", "ANLS", 0.8765)
    assert (result.dataset_type, result.dataset_name, result.task_name) == (MINI, MINI, "DocVQA")


def test_ones_own_data_are_not_taken_for_the_published_ones(tmp_path):
    card = write(options_for(tmp_path), trained_on="/data/b", evaluated_on="/data/c")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name, result.task_name) == ("local", "c", None)
    assert "fine-tuned by the recipe for DocVQA of `phi3v-recipes`" in card.text


def test_parts_own_learning_rates(tmp_path):
    text = write(options_for(tmp_path)).text
    assert "of the tower" not in text
    text = write(options_for(tmp_path, vision_learning_rate=1e-6, projector_learning_rate=3e-5)).text
    assert "| learning rate of the tower | 1e-06, likewise |\n" in text
    assert "| learning rate of projection and separators | 3e-05, likewise |\n" in text


def test_text(tmp_path):
    text = write(options_for(tmp_path), trained_on="HuggingFaceM4/the_cauldron:docvqa").text
    assert "| ANLS | 0.2500 | 0.8765 |" in text
    assert "anls_recipe" not in text  # which was not named as a score
    link = "[HuggingFaceM4/the_cauldron](https://huggingface.co/datasets/HuggingFaceM4/the_cauldron)"
    assert f"{link}, configuration `docvqa`" in text
    for line in (
        *("| method | full fine-tuning |", "| data type | bf16 |", "| length | 2 epochs |", "| seed | 3 |"),
        *("| examples per step | 64 |", "| learning rate | 0.0002, 50 warm-up steps, then linear decay |"),
    ):
        assert line in text
    assert 'AutoModelForCausalLM.from_pretrained("trained")' in text
    assert "peft" not in text


def test_its_command_is_one_that_tools_predict_takes(tmp_path, monkeypatch):
    text = write(options_for(tmp_path)).text
    words = shlex.split(text.partition("```bash\n")[2].partition("\n```")[0])
    assert words[:3] == ["python", "-m", "tools.predict"]
    monkeypatch.chdir(tmp_path)
    Path("picture.png").touch()
    assert predict.parse(words[3:]).checkpoint == "trained"


@pytest.mark.parametrize(
    ("method", "precision", "wanted"),
    [("full", "bf16", ["--bf16"]), ("lora", "fp16", []), ("qlora", "bf16", ["--bf16", "--load_in_4bit"])],
)
def test_its_command_has_the_run_s_precision(tmp_path, monkeypatch, method, precision, wanted):
    options = options_for(tmp_path, method=method, precision=argparse.Namespace(name=precision))
    words = shlex.split(write(options).text.partition("```bash\n")[2].partition("\n```")[0])
    assert words[3:5] == wanted + words[3 + len(wanted) : 5]
    assert [word for word in words if word in ("--bf16", "--load_in_4bit")] == wanted


def test_the_base_s_revision_is_told(tmp_path):
    options = options_for(tmp_path, method="lora", use_lora=True, revision="c0ffee")
    write_adapter(options, OFFICIAL)
    text = write(options).text
    assert "at revision `c0ffee`" in text
    assert f'AutoModelForCausalLM.from_pretrained("{OFFICIAL}", revision="c0ffee")' in text


def test_adapter(tmp_path):
    options = options_for(tmp_path, method="qlora", use_lora=True, push_to_hub="me/forms", max_steps=70)
    write_adapter(options, OFFICIAL)
    (options.output_dir / "README.md").write_text("---\nlibrary_name: peft\n---\nPEFT's own")
    card = write(options)
    assert (card.data.base_model, card.data.library_name) == (OFFICIAL, "peft")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "| method | QLoRA (base in NF4), rank 32, alpha 16, dropout 0 |" in card.text
    assert "| length | 70 steps |" in card.text
    assert f'AutoModelForCausalLM.from_pretrained("{OFFICIAL}")' in card.text
    assert 'PeftModel.from_pretrained(model, "me/forms")' in card.text
    assert "--checkpoint me/forms" in card.text
    assert "PEFT's own" not in card.text


@pytest.mark.parametrize("is_adapter", [False, True])
def test_local_folders_are_not_told(is_adapter, tmp_path):
    """Neither in the metadata, where only a hub's ids may stand, nor by their paths."""
    base, data = tmp_path / "home" / "base", tmp_path / "home" / "pages.jsonl"
    base.mkdir(parents=True)
    data.touch()
    options = options_for(tmp_path, model_name_or_path=str(base), use_lora=is_adapter)
    if is_adapter:
        write_adapter(options, base)
    card = write(options, trained_on=data, evaluated_on=data)
    fields = card.data.to_dict()
    assert not {"base_model", "datasets", "language"} & set(fields)
    assert card.data.eval_results[0].dataset_name == "pages.jsonl"
    assert "`pages.jsonl` (local)" in card.text
    assert str(tmp_path) not in (options.output_dir / "README.md").read_text()


def test_scores_that_are_not_there(tmp_path):
    """As AUROC where the evaluation had one class only."""
    scores = {"accuracy": "accuracy", "auroc": "AUROC"}
    card = write(options_for(tmp_path), {"accuracy": 0.5}, {"accuracy": 1, "auroc": None, "matrix": []}, metrics=scores)
    assert card.data.metrics == ["accuracy"]
    assert "AUROC" not in card.text
    assert "| accuracy | 0.5000 | 1.0000 |" in card.text


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    options = options_for(tmp_path, push_to_hub="me/forms")
    write_model_card(options, data_of(MINI), data_of(MINI), BEFORE, AFTER, "DocVQA", {})
    monkeypatch.setattr(model_card, "HfApi", None)
    push_to_hub(options)
    assert not list(options.output_dir.iterdir())


# --- the upload


@pytest.fixture
def hub(monkeypatch):
    """The hub, as far as a run talks to it: what is made and uploaded there."""
    calls = argparse.Namespace(repositories=[], uploaded=[])

    def create_repo(self, repo_id, **keywords):
        calls.repositories.append((repo_id, keywords))
        return argparse.Namespace(repo_id=repo_id, __str__=lambda: repo_id)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns, **_):
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        kept = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        calls.uploaded += [(repo_id, name) for name in kept]

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def fill(options):
    for name in (*PRIVATE, *PUBLIC):
        (options.output_dir / name).parent.mkdir(exist_ok=True)
        (options.output_dir / name).touch()


def test_what_is_uploaded(hub, tmp_path):
    options = options_for(tmp_path, push_to_hub="me/forms")
    fill(options)
    push_to_hub(options)
    assert {name for _, name in hub.uploaded} == set(PUBLIC)
    assert {repository for repository, _ in hub.uploaded} == {"me/forms"}
    assert hub.repositories == [("me/forms", {"private": True, "exist_ok": True})]


def test_an_adapter_on_a_local_base(hub, tmp_path, capsys):
    options = options_for(tmp_path, push_to_hub="me/forms")
    write_adapter(options, tmp_path)
    (options.output_dir / "adapter_model.safetensors").touch()
    push_to_hub(options)
    assert {name for _, name in hub.uploaded} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "the adapter's base is a local folder" in capsys.readouterr().out


def test_nothing_is_uploaded_unasked(hub, tmp_path):
    push_to_hub(options_for(tmp_path))
    assert not hub.repositories


@pytest.mark.parametrize("where", ["create_repo", "upload_folder"])
def test_a_failure_is_one_line_with_the_command(where, hub, tmp_path, monkeypatch, capsys):
    """The run goes on; the command, given to the hub's own program, uploads the same files."""

    def fail(*arguments, **keywords):
        raise ConnectionError("no route\nto host")

    options = options_for(tmp_path, push_to_hub="me/forms")
    fill(options)
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, where, fail)
        push_to_hub(options)
    (line,) = capsys.readouterr().out.splitlines()
    assert "not uploaded to me/forms (no route to host)" in line
    words = shlex.split(line.partition("by hand: ")[2])
    assert words[0] == "hf"
    monkeypatch.setattr(sys, "argv", words)
    hub.repositories.clear()
    with contextlib.suppress(SystemExit):
        hf.main()
    assert set(hub.uploaded) == {("me/forms", name) for name in PUBLIC}
    assert hub.repositories[0][1]["private"]


def test_problems_found_before_training(monkeypatch):
    monkeypatch.setattr(model_card, "get_token", lambda: "hf_x")
    assert push_problems(None) == push_problems("me/forms") == []
    assert push_problems("me/a/b")[0].startswith("--push_to_hub me/a/b: ")
    monkeypatch.setattr(model_card, "get_token", lambda: None)
    assert "not logged in" in push_problems("me/forms")[0]
