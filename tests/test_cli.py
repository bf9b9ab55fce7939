"""The options: the published names and defaults, and every wrong value reported at once."""

import argparse
import ast
import contextlib
import copy
import errno
import importlib
import io
import re
import sys
import threading
from pathlib import Path

import datasets
import pytest
import torch
from transformers.training_args import OptimizerNames

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as ucf101
from common import cli, errors
from common.cli import OPTIMIZERS, PART_LEARNING_RATES
from common.errors import (
    NotLookedAtError,
    OptionsError,
    UserError,
    about_to_fetch,
    first_of,
    raise_all,
    run,
    try_all,
)

ROOT = Path(docvqa.__file__).parent
SCRIPTS = (docvqa, hateful_memes, nlvr2, ucf101)

# shared by all published scripts (name, default)
PUBLISHED = {
    "model_name_or_path": "microsoft/Phi-3.5-vision-instruct",
    "use_flash_attention": False,
    "bf16": False,
    "use_lora": False,
    "use_qlora": False,
    "batch_size": 16,
    "batch_size_per_gpu": 1,
    "num_crops": 16,
    "num_train_epochs": 1,
    "learning_rate": 4e-5,
    "wd": 0.01,
    "lora_rank": 64,
    "lora_alpha_ratio": 2,
    "lora_dropout": 0,
    "freeze_vision_model": False,
    "full_train": False,
    "tqdm": True,
    "warmup_steps": 50,
}


# not published: what a run without further options does
OURS = {
    "gradient_checkpointing": "full",
    "share_images": False,
    "max_tokens_per_gpu": None,
    "max_crops_per_call": None,
    "packs": False,
    "torch_compile": False,
    "check_images": True,
    "report_images": True,
    "revision": None,
}


def parse(monkeypatch, tmp_path, *arguments, processes=1, script=docvqa):
    monkeypatch.setattr(sys, "argv", ["finetune", "--output_dir", str(tmp_path / "out"), *map(str, arguments)])
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    return script.parse()


def on_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", capability if callable(capability) else lambda device: capability
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU" if device == 0 else "Another GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_published_defaults(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = vars(docvqa.parse())
    expected = PUBLISHED | OURS
    assert {name: options[name] for name in expected} == expected
    assert str(options["output_dir"]) == "output"


@pytest.mark.parametrize(("installed", "attention"), [(False, "sdpa"), (True, "flash_attention_2")])
def test_published_command(monkeypatch, tmp_path, installed, attention):
    on_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(cli, "is_flash_attn_2_available", lambda: installed)
    given = "--full_train --bf16 --use_flash_attention --batch_size 64 --learning_rate 5e-6 --num_train_epochs 2"
    options = parse(monkeypatch, tmp_path, *given.split(), processes=4)
    assert (options.accumulation, options.num_processes, options.method) == (16, 4, "full")
    assert (options.precision.name, options.precision.weights, options.precision.autocast) == (
        "bf16",
        torch.bfloat16,
        None,
    )
    assert options.attention == attention


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ((), "full"),
        (("--freeze_vision_model",), "frozen"),
        (("--use_lora",), "lora"),
        (("--use_qlora",), "qlora"),
        (("--use_lora", "--use_qlora"), "qlora"),
    ],
)
def test_method(monkeypatch, tmp_path, arguments, method):
    options = parse(monkeypatch, tmp_path, *arguments)
    assert options.method == method
    assert options.use_lora == (method in ("lora", "qlora"))


@pytest.mark.parametrize(
    ("arguments", "gpu", "expected"),
    [
        ((), False, ("fp32", torch.float32, None)),
        (("--bf16",), False, ("bf16", torch.bfloat16, None)),
        (("--bf16", "--use_lora"), False, ("bf16", torch.bfloat16, torch.bfloat16)),
        ((), True, ("fp16", torch.float16, None)),
        (("--use_flash_attention",), True, ("fp16", torch.float16, None)),  # alone it leaves fp16 in DocVQA
        (("--use_lora",), True, ("fp16", torch.float32, torch.float16)),
        (("--bf16",), True, ("bf16", torch.bfloat16, None)),
        (("--bf16", "--use_qlora"), True, ("bf16", torch.bfloat16, torch.bfloat16)),
    ],
)
def test_precision(monkeypatch, tmp_path, arguments, gpu, expected):
    if gpu:
        on_gpu(monkeypatch, (8, 0))
    precision = parse(monkeypatch, tmp_path, *arguments).precision
    assert (precision.name, precision.weights, precision.autocast) == expected


WRONG = [
    (("--num_crops", 17), "--num_crops 17: it must be 1 to 16"),
    (("--num_crops", 0), "--num_crops 0: it must be 1 to 16"),
    (("--batch_size", 0), "--batch_size 0: it must be at least 1"),
    (("--batch_size_per_gpu", 0), "--batch_size_per_gpu 0: it must be at least 1"),
    (("--num_train_epochs", 0), "--num_train_epochs 0: it must be at least 1"),
    (("--max_steps", 0), "--max_steps 0: it must be at least 1"),
    (("--eval_limit", -1), "--eval_limit -1: it must be at least 1"),
    (("--lora_rank", 0), "--lora_rank 0: it must be at least 1"),
    (("--lora_dropout", 1), "--lora_dropout 1.0: it must be at least 0 and under 1"),
    (("--learning_rate", 0), "--learning_rate 0.0: it must be above 0"),
    (("--learning_rate", "nan"), "--learning_rate nan: it must be above 0"),
    (("--wd", "nan"), "--wd nan: it must not be negative"),
    (("--vision_learning_rate", 0), "--vision_learning_rate 0.0: it must be above 0"),
    (("--projector_learning_rate", "inf"), "--projector_learning_rate inf: it must be above 0"),
    (
        ("--freeze_vision_model", "--vision_learning_rate", "1e-5"),
        "--vision_learning_rate is of what --freeze_vision_model does not train: leave one of them out",
    ),
    (("--wd", -1), "--wd -1.0: it must not be negative"),
    (("--use_flash_attention",), "--use_flash_attention needs a CUDA GPU and there is none"),
    (("--data_dir", "/no/such/folder"), "--data_dir /no/such/folder: there is no such file or folder; give one"),
    (("--train_data", "a/b/c"), "--train_data a/b/c: there is no such file or folder; give one, or a hub id"),
    (("--model_name_or_path", "./absent"), "--model_name_or_path ./absent: there is no such file or folder"),
    (("--use_lora", "--deepspeed", "ds_configs/zero3.json"), "is for full fine-tuning: leave it out here"),
    (
        ("--lora_rank", 4, "--lora_alpha_ratio", 0.1),
        "gives alpha 0: adapters of alpha 0 learn nothing",
    ),
    (("--batch_size", "many"), "--batch_size many: it must be a whole number"),
    (("--learning_rate", "1,5"), "--learning_rate 1,5: it must be a number"),
    (("--seed", 2**31), "--seed 2147483648: it must be at most 2147483647"),
    (("--lora_alpha_ratio", 1e308), "--lora_alpha_ratio 1e+308: it must be at most 2147483647"),
    (("--data_dir", ""), "--data_dir is given and empty: name something, or leave the option out"),
    (("--train_data", "x" * 300 + "/y/z"), "there is no such file or folder; give one, or a hub id"),
    (("--output_dir", "x" * 300), "cannot be written ([Errno 36] File name too long"),
    (("--resume", "x" * 300), "it is auto, never, or the folder of a checkpoint, and there is none"),
    (("--no_such_option", "1"), "--no_such_option 1: there is no such option (--help lists them)"),
    (("--dry_run", "--resume", "/"), "--dry_run takes the first step, and --resume / later ones"),
    (("--deepspeed", "absent.json"), "absent.json: there is no such file; ds_configs/ holds zero2"),
    (("--report_to", "neptune_of_old"), "--report_to neptune_of_old: not installed here"),
    (("--output_dir", "/proc/output"), "--output_dir /proc/output cannot be written"),
    (("--eval_steps", 5, "--deepspeed", "ds_configs/zero3.json"), "--eval_steps does not go with ZeRO-3"),
    (("--max_tokens_per_gpu", 0), "--max_tokens_per_gpu 0: it must be at least 1"),
    (
        ("--max_tokens_per_gpu", 9000, "--batch_size_per_gpu", 2),
        "--max_tokens_per_gpu 9000 and --batch_size_per_gpu 2 both say what goes through a GPU at once",
    ),
    (("--max_crops_per_call", 0), "--max_crops_per_call 0: it must be at least 1"),
    (("--max_crops_per_call", 8, "--deepspeed", "ds_configs/zero3.json"), "--max_crops_per_call does not go with"),
    (("--torch_compile", "--deepspeed", "ds_configs/zero3.json"), "--torch_compile does not go with ZeRO-3"),
    (("--use_liger",), "--use_liger needs a CUDA GPU and there is none: leave the option out"),
    (("--max_bad_steps", 0), "--max_bad_steps 0: it must be at least 1"),
    (("--save_steps", 0), "--save_steps 0: it must be at least 1"),
    (("--save_total_limit", 0), "--save_total_limit 0: it must be at least 1"),
    (("--grace_seconds", 0), "--grace_seconds 0.0: it must be above 0"),
    (("--timeout_minutes", "nan"), "--timeout_minutes nan: it must be above 0"),
    (("--resume", "later"), "--resume later: it is auto, never, or the folder of a checkpoint, and there is none"),
    (("--resume", ".", "--overwrite"), "goes on with a run, and --overwrite begins anew: leave one of them out"),
    (("--max_bad_fraction", 0.5), "--max_bad_fraction 0.5 is for --bad_examples skip: add that, or leave it out"),
    (("--max_new_tokens", 0), "--max_new_tokens 0: it must be at least 1"),
    (("--dry_run", "--eval_only"), "--dry_run tries out training, and --eval_only leaves it out"),
    (("--optim", "sgd"), "--optim sgd: it is one of adamw_torch, adamw_torch_fused"),
    (
        ("--optim", "adamw_8bit", "--deepspeed", "ds_configs/zero2_offload.json"),
        "--optim adamw_8bit does not go with",
    ),
    (("--revision", "", "--data_dir", "x"), "--revision is given and empty"),
    (
        ("--revision", "v1", "--model_name_or_path", "."),
        "--revision v1 is of a hub id, and . is a folder: leave it out",
    ),
    (("--gradient_checkpointing", "some"), "--gradient_checkpointing some: it is one of none, selective, full"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_option(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        parse(monkeypatch, tmp_path, *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_at_once(monkeypatch, tmp_path):
    others = ("--use_flash_attention", "--freeze_vision_model", "--projector_learning_rate", "1e-5")
    with pytest.raises(UserError) as error:
        parse(monkeypatch, tmp_path, "--num_crops", 17, "--batch_size", 6, *others, processes=4)
    text = str(error.value)
    assert text.startswith("4 problems:\n")
    assert "--batch_size 6 cannot be divided over 4 processes x --batch_size_per_gpu 1 = 4" in text
    assert "give a multiple of 4" in text
    assert "17" in text
    assert "--use_flash_attention" in text


def test_evaluation_alone_uploads_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("common.cli.push_problems", lambda repository: [])  # as where one is logged in
    with pytest.raises(UserError, match=r"^--push_to_hub a/b uploads what is trained, and --eval_only trains nothing"):
        parse(monkeypatch, tmp_path, "--eval_only", "--push_to_hub", "a/b")


def test_evaluation_alone_divides_no_batch(monkeypatch, tmp_path):
    assert parse(monkeypatch, tmp_path, "--eval_only", processes=3).eval_only


def test_deepspeed_that_divides_nothing(monkeypatch, tmp_path):
    (tmp_path / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(UserError, match=r"zero_optimization\.stage \(it is 0, not 1 to 3\)"):
        parse(monkeypatch, tmp_path, "--deepspeed", tmp_path / "zero0.json")


def test_names_of_data_that_do_not_go_together(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--full_train and --data_dir . name different data to train on: give a local"):
        parse(monkeypatch, tmp_path, "--full_train", "--data_dir", ".")
    for others in (("--train_data", "."), ("--eval_only",)):
        parse(monkeypatch, tmp_path, "--full_train", "--data_dir", ".", *others)
    for script in (nlvr2, hateful_memes):
        with pytest.raises(UserError, match="--eval_file dev is a file in --data_dir: give that folder, too"):
            parse(monkeypatch, tmp_path, "--eval_file", "dev", script=script)


def test_problems_with_zero3_at_once(monkeypatch, tmp_path):
    others = ("--eval_steps", 5, "--max_crops_per_call", 8, "--torch_compile", "--num_crops", 17)
    with pytest.raises(UserError, match=r"^4 problems:"):
        parse(monkeypatch, tmp_path, "--deepspeed", "ds_configs/zero3.json", *others)


@pytest.mark.parametrize(
    "arguments", [("--share_images",), ("--max_tokens_per_gpu", 9000), ("--share_images", "--batch_size_per_gpu", 3)]
)
def test_packs_need_no_equal_division(monkeypatch, tmp_path, arguments):
    options = parse(monkeypatch, tmp_path, "--batch_size", 10, *arguments, processes=4)
    assert (options.packs, options.accumulation) == (True, None)


def test_a_dry_run_reports_nowhere(monkeypatch, tmp_path):
    """Others would keep it."""
    assert parse(monkeypatch, tmp_path, "--report_to", "tensorboard").report_to == "tensorboard"
    assert parse(monkeypatch, tmp_path, "--report_to", "tensorboard", "--dry_run").report_to == "none"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_packing_is_of_all_scripts_and_sharing_of_two(monkeypatch, tmp_path, script):
    where = ("--data_dir", tmp_path)
    assert parse(monkeypatch, tmp_path, "--max_tokens_per_gpu", 9000, *where, script=script).packs
    if script in (docvqa, nlvr2):
        assert parse(monkeypatch, tmp_path, "--share_images", script=script).packs
    else:
        with pytest.raises(UserError, match="--share_images: there is no such option"):
            parse(monkeypatch, tmp_path, "--share_images", *where, script=script)


@pytest.mark.parametrize(
    ("arguments", "which"),
    [
        (("--no-gradient_checkpointing",), "none"),
        (("--gradient_checkpointing", "none"), "none"),
        (("--gradient_checkpointing", "selective"), "selective"),
    ],
)
def test_gradient_checkpointing(monkeypatch, tmp_path, arguments, which):
    assert parse(monkeypatch, tmp_path, *arguments).gradient_checkpointing == which


def test_liger(monkeypatch, tmp_path):
    """On where it is to be had, unless told otherwise; asked for and not there, an error."""
    installed = [False]
    monkeypatch.setattr("common.cli.liger_is_installed", lambda: installed[0])
    assert parse(monkeypatch, tmp_path).use_liger is False
    on_gpu(monkeypatch, (8, 0))
    assert parse(monkeypatch, tmp_path).use_liger is False
    with pytest.raises(UserError, match=r"--use_liger: liger-kernel 0.8.5 or newer is not installed: pip install -r"):
        parse(monkeypatch, tmp_path, "--use_liger")
    installed[0] = True
    assert parse(monkeypatch, tmp_path).use_liger is True
    assert parse(monkeypatch, tmp_path, "--no-use_liger").use_liger is False


def test_optimizer(monkeypatch, tmp_path):
    """Every name is one that the Trainer knows; fused where there is CUDA."""
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}
    assert parse(monkeypatch, tmp_path).optim == "adamw_torch"
    assert parse(monkeypatch, tmp_path, "--optim", "paged_adamw_8bit").optim == "paged_adamw_8bit"
    on_gpu(monkeypatch, (8, 0))
    assert parse(monkeypatch, tmp_path).optim == "adamw_torch_fused"


def test_old_gpu(monkeypatch, tmp_path):
    on_gpu(monkeypatch, (7, 0))
    with pytest.raises(UserError) as error:
        parse(monkeypatch, tmp_path, "--use_flash_attention", "--bf16")
    assert "--use_flash_attention needs compute capability 8.0 (Ampere) and Some GPU has 7.0" in str(error.value)
    assert "--bf16 needs compute capability 8.0" in str(error.value)


def test_an_old_gpu_beside_a_new_one(monkeypatch, tmp_path):
    """Told where one of the processes will have it."""
    on_gpu(monkeypatch, lambda device: (7, 0) if device == 1 else (8, 0))
    assert parse(monkeypatch, tmp_path, "--bf16").bf16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"--bf16 needs compute capability 8.0 \(Ampere\) and Another GPU has 7.0"):
        parse(monkeypatch, tmp_path, "--bf16", processes=2)


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pages").mkdir()
    options = parse(monkeypatch, tmp_path, "--data_dir=~/pages", "--output_dir=~/result")
    assert (options.data_dir, options.output_dir) == (f"{tmp_path}/pages", tmp_path / "result")


def test_more_processes_than_gpus(monkeypatch, tmp_path):
    on_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--nproc_per_node=4, but this machine has 2 GPUs: start one process for each"):
        parse(monkeypatch, tmp_path, processes=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}', "has its own optimizer: take it out"),
        (
            '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.5}',
            'own.json has gradient_clipping 0.5: write "auto" there, for this recipe\'s options set it',
        ),
        (
            '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": true}}',
            r"(?s)^2 problems:.*has train_micro_batch_size_per_gpu 4: .*has bf16.enabled True: ",
        ),
        ('{"zero_optimization": {"stage": 2}}', 'has no train_micro_batch_size_per_gpu: add it with the value "auto"'),
        ('{"zero_optimization": {}}', "no JSON with zero_optimization.stage"),
        ("{", "no JSON with zero_optimization.stage"),
        ("[" * 100_000, "no JSON with zero_optimization.stage"),
        ('{"zero_optimization": {"stage": "two"}}', "it is 'two', not 1 to 3"),
    ],
)
def test_deepspeed_configuration(monkeypatch, tmp_path, content, message):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(UserError, match=message):
        parse(monkeypatch, tmp_path, "--deepspeed", tmp_path / "own.json")


def test_used_output_folder(monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval_before.json").write_text("{}")
    refused = r"holds a run \({}\) that is not gone on with: choose another, or add --overwrite"
    with pytest.raises(UserError, match=refused.format("eval_before.json")):
        parse(monkeypatch, tmp_path)
    parse(monkeypatch, tmp_path, "--overwrite")
    parse(monkeypatch, tmp_path, "--eval_only")
    (tmp_path / "out" / "run.json").write_text("{}")  # its options are compared later
    parse(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=refused.format("eval_before.json, run.json")):
        parse(monkeypatch, tmp_path, "--resume", "never")
    parse(monkeypatch, tmp_path, "--resume", "never", "--overwrite")
    (tmp_path / "out" / cli.LOCK).write_text("a torchrun")
    for name in ("another one", "a torchrun"):  # the latter has started this process in place of another
        monkeypatch.setattr(cli, "launcher", lambda name=name: name)
        with contextlib.nullcontext() if name == "a torchrun" else pytest.raises(UserError, match="holds a run"):
            parse(monkeypatch, tmp_path, "--resume", "never")
    monkeypatch.setenv("RANK", "1")  # only the first process looks: it may be writing by now
    parse(monkeypatch, tmp_path)


def test_output_folder_that_training_starts_from(monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is the checkpoint that training starts from"):
        parse(monkeypatch, tmp_path, "--model_name_or_path", tmp_path / "out", "--overwrite")


def test_model_that_would_be_overwritten(monkeypatch, tmp_path):
    """A checkpoint of the run that is begun anew, and what is of no run."""
    folder = tmp_path / "out"
    model = folder / "checkpoint-300"
    model.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    for path in (model, tmp_path / "link"):
        with pytest.raises(UserError, match=f"^--overwrite would delete --model_name_or_path {path}, which lies in"):
            parse(monkeypatch, tmp_path, "--model_name_or_path", path, "--overwrite")
    (folder / "base").mkdir()
    parse(monkeypatch, tmp_path, "--model_name_or_path", folder / "base", "--overwrite")
    (folder / "model-00001-of-00002.safetensors").touch()
    parse(monkeypatch, tmp_path, "--overwrite")
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match=r"holds model-00001-of-00002.safetensors but no run.json, so of no run"):
        parse(monkeypatch, tmp_path, "--overwrite")


def test_what_cannot_be_shown_ends_no_run(monkeypatch):
    """As where both streams are a file on a full disk."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            self.write("")

    def main():
        print("step 1", flush=True)
        print("step 1", file=sys.stderr, flush=True)
        errors.say("step 1")
        sys.stdout.flush()
        ran.append(sys.stdout.isatty())

    ran = []
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    run(main)
    assert ran == [False]
    assert isinstance(sys.stdout, Full)


def test_run_prints_one_line_and_exits_with_2(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def fails():
        raise UserError("what is wrong")

    with pytest.raises(SystemExit) as ended:
        run(fails)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: what is wrong\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run(fails)
    assert capsys.readouterr().err == ""  # the node's first process has found the same
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(SystemExit):
        run(fails)
    assert capsys.readouterr().err == "error: what is wrong\n"  # later, nobody else has


def told_by(capsys, main, *checks):
    """What a script tells that has these steps, line by line."""
    with pytest.raises(SystemExit) as ended:
        run(main, *checks)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_options_checkpoint_and_data_are_told_at_once(capsys, monkeypatch):
    """What comes after the step that raises is asked, too; nothing is fetched then, and nothing told twice."""
    options = argparse.Namespace()
    monkeypatch.setattr(errors, "_options", options)
    asked = []

    def fetches(given):
        asked.append(("fetches", given is options))
        about_to_fetch()
        raise UserError("fetched")

    def finds(given):
        asked.append(("finds", given is options))
        raise_all(["no weights", "--b 2"])

    def breaks(given):
        asked.append(("breaks", given is options))
        raise KeyError("a consequence")

    def finds_another(given):
        asked.append(("finds_another", given is options))
        raise UserError("no row 3")

    def wrong_options():
        error = OptionsError("--a 1\n--b 2", problems=["--a 1", "--b 2"])
        error.options = options
        raise error

    checks = (fetches, finds, breaks, finds_another)
    listed = ["error: 4 problems:", "  - --a 1", "  - --b 2", "  - no weights", "  - no row 3"]
    assert told_by(capsys, wrong_options, *checks) == listed
    assert asked == [(check.__name__, True) for check in checks]
    asked.clear()
    listed = ["error: 3 problems:", "  - no weights", "  - --b 2", "  - no row 3"]
    assert told_by(capsys, lambda: finds(options), *checks) == listed
    assert [name for name, _ in asked] == ["finds", "breaks", "finds_another"]
    assert told_by(capsys, lambda: fetches(options), finds_another, fetches) == ["error: fetched"]

    def finds_many(given):
        raise UserError("25 problems, the first 2", problems=["1", "2"])

    assert told_by(capsys, lambda: finds_many(options), finds_many, fetches) == ["error: 25 problems, the first 2"]

    def later_step():
        raise UserError("a later step")

    asked.clear()
    assert told_by(capsys, later_step, *checks) == ["error: a later step"]
    assert asked == []


def test_all_of_several_steps_are_told(capsys):
    assert try_all(lambda: 1, lambda: None) == (1, None)

    def finds(*problems, everywhere):
        return lambda: raise_all(problems, everywhere)

    with pytest.raises(UserError) as error:
        try_all(finds("a", "b", everywhere=True), lambda: 1, finds("b", "c", everywhere=True))
    assert (error.value.problems, error.value.everywhere) == (("a", "b", "c"), True)
    with pytest.raises(UserError) as error:
        try_all(finds("a", everywhere=True), finds("a", everywhere=False))
    assert (str(error.value), error.value.everywhere) == ("a", False)


def test_options_for_later_checks(monkeypatch, tmp_path):
    """Those that a problem names are unknown to them, and one that was likely meant; the rest is as given."""
    given = ("--data_dir", "/no/such", "--optim", "sgd", "--num_crops", 99, "--seed", 7)
    given += ("--huh", "train_data", "--eval_splt", "test")
    with pytest.raises(OptionsError) as error:
        parse(monkeypatch, tmp_path, *given)
    assert len(error.value.problems) == 4
    assert (
        "--huh train_data --eval_splt test: there is no such option (--help lists them; meant may be --eval_split)"
        in str(error.value)
    )
    options = error.value.options
    assert (options.seed, options.output_dir, options.train_data) == (7, tmp_path / "out", None)
    for name in ("data_dir", "optim", "num_crops", "eval_split"):
        with pytest.raises(NotLookedAtError):
            getattr(options, name)
    assert copy.copy(options).seed == 7


@pytest.mark.parametrize("wrong", [("--eval_split", "val"), ("--bad_examples", "ignore"), ("--eval_data", "./typo")])
def test_no_data_is_blamed_for_a_wrong_option(monkeypatch, tmp_path, wrong):
    """There is no split of the default's name, and a row without an answer, which is fine where it is left out."""
    for split, answers in (("train", [["yes"], []]), ("validation", [["yes"], ["yes"]])):
        columns = {"image": [None] * 2, "query": [{"en": "Q?"}] * 2, "answers": answers}
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        rows.to_parquet(tmp_path / f"{split}.parquet")
    given = ["--data_dir", tmp_path, "--bad_examples", "skip", "--eval_split", "validation"]
    with pytest.raises(OptionsError) as error:
        parse(monkeypatch, tmp_path, *given, *wrong)
    (problem,) = error.value.problems
    assert problem.startswith(" ".join(wrong))
    with pytest.raises(NotLookedAtError):
        docvqa.load_data(error.value.options)


def test_what_is_here_is_looked_at_before_anything_is_fetched(monkeypatch):
    """And nothing is fetched once something is known to be wrong."""
    asked = []

    def fetches(name, problem=None):
        def call():
            asked.append(f"{name}?")
            about_to_fetch()
            asked.append(name)
            raise_all([problem] if problem else [])
            return name

        return call

    def here(problem=None):
        asked.append("here")
        raise_all([problem] if problem else [])

    assert try_all(fetches("a"), here, lambda: try_all(fetches("b"), here)) == ("a", None, ("b", None))
    assert asked == ["a?", "here", "b?", "here", "a?", "a", "b?", "here", "b?", "b"]
    asked.clear()
    with pytest.raises(UserError, match=r"^wrong$"):
        try_all(fetches("a"), lambda: here("wrong"))
    assert asked == ["a?", "here"]
    asked.clear()
    with pytest.raises(UserError, match=r"^no such set$"):
        try_all(fetches("a", "no such set"), fetches("b"))
    assert asked == ["a?", "b?", "a?", "a", "b?"]
    asked.clear()
    monkeypatch.setattr(errors, "_fetches", False)
    with pytest.raises(NotLookedAtError):
        try_all(here, fetches("a"))
    assert asked == ["here", "a?"]
    with pytest.raises(UserError, match=r"^2 problems:\n  - 1\n  - 2$"):
        try_all(lambda: here("1"), fetches("a"), lambda: here("2"))
    assert errors._fetches is False


def test_others_wait_for_the_one_that_tells(monkeypatch, tmp_path):
    """A node's first process may look at the rest for longer than the others would wait for one that does not come."""
    monkeypatch.setattr(errors, "SECONDS_FOR_THE_FIRST", 0.2)
    for rank in "01":
        (tmp_path / rank).mkdir()
    monkeypatch.setenv("LOCAL_RANK", "0")
    errors._wait_for_the_one_that_tells()  # not started by torchrun
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    errors._wait_for_the_one_that_tells()
    (mark,) = (tmp_path / "0").iterdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    waits = threading.Thread(target=errors._wait_for_the_one_that_tells)
    waits.start()
    waits.join(1)
    assert waits.is_alive()
    mark.unlink()
    waits.join(10)
    assert not waits.is_alive()


def test_many_problems_of_several_files_are_counted():
    """Each file's first ones, and how many more it has."""
    with pytest.raises(UserError) as error:
        try_all(*(lambda of=of: raise_all(first_of([f"{of} {n}" for n in range(25)], of, "see all")) for of in "ab"))
    lines = str(error.value).splitlines()
    assert lines[0] == "50 problems:"
    assert lines[20:22] == ["  - a 19", "  - and 5 more of a: see all"]
    assert lines[-1] == "  - and 5 more of b: see all"
    assert len(lines) == 43
    assert first_of(["1", "2", "3"], most=2) == ["1", "2", "and 1 more examples"]
    assert first_of(["1", "2"], most=2) == ["1", "2"]


def test_what_is_undone_when_a_script_fails(monkeypatch):
    """By the first process alone, after any error; not at the end that a signal asks for."""
    done = []
    monkeypatch.setattr(errors, "_undo", None)
    errors.undo_on_failure(lambda: done.append("undone"))
    monkeypatch.setattr(errors, "_end_in_time", lambda: None)

    def fails(error):
        with pytest.raises((SystemExit, RuntimeError)):
            run(lambda: (_ for _ in ()).throw(error))
        return len(done)

    assert fails(UserError("what is wrong")) == 1
    assert fails(RuntimeError("out of memory")) == 2
    assert fails(SystemExit(143)) == 2
    monkeypatch.setenv("RANK", "1")
    assert fails(UserError("what is wrong")) == 2


def parser_of(monkeypatch, script):
    """The script's parser, its own options included."""
    monkeypatch.setattr(script, "parse_options", lambda parser, **kwargs: parser)
    return script.parse()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_option_is_read_where_it_acts(monkeypatch, script):
    """An option that nothing but its own check reads would be one that changes nothing."""
    # by TrainingArguments, as `test_logs_elsewhere` shows; by name, as `test_learning_rates_of_the_parts` shows
    read = {"report_to", *PART_LEARNING_RATES}
    for file in (Path(script.__file__), *(ROOT / "common").glob("*.py")):
        for function in ast.walk(ast.parse(file.read_text())):
            checks_only = isinstance(function, ast.FunctionDef) and function.name.endswith("_problems")
            if isinstance(function, ast.FunctionDef) and not checks_only:
                read |= {
                    node.attr
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("options", "self.options")
                }
    names = {action.dest for action in parser_of(monkeypatch, script)._actions} - {"help"}
    assert names - read == set()


@pytest.mark.parametrize("columns", ["80", "100"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_is_two_screens(monkeypatch, capsys, script, columns):
    """Of 50 lines, also as wide as a terminal is where nobody has widened it."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        parser_of(monkeypatch, script).parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100
    assert any(re.fullmatch(r"  --learning_rate X +the peak \(4e-05\)", line) for line in lines)
    headings = [line for line in lines if line and line[0] != " " and line.endswith(":")]
    assert headings[-1] == "rarely needed:"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_script_is_read_once_downwards(script):
    """At most 150 lines, the steps last; no script imports another."""
    text = Path(script.__file__).read_text()
    assert len(text.splitlines()) <= 150
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert (functions[0], functions[-1]) == ("parse", "main")
    assert "finetune_hf_trainer" not in "".join(line for line in text.splitlines() if "import" in line)


@pytest.mark.parametrize("tool", ["app", "predict", "check_data"])
def test_a_tool_s_revision_of_a_folder(tool, tmp_path):
    """As for the scripts: it would change nothing."""
    options = ["--revision", "v1", "--checkpoint", str(tmp_path), "--question", "What?"]
    if tool == "check_data":
        options = ["--revision", "v1", "--model_name_or_path", str(tmp_path), "--image_dir", str(tmp_path), __file__]
    if tool == "app":
        options = options[:4]
    with pytest.raises(UserError, match=r"--revision v1 is of a hub id, and .* is a folder: leave it out"):
        importlib.import_module(f"tools.{tool}").parse(options)
