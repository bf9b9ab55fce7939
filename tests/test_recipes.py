"""The published rows as commands, runs recorded beside them, the README's tables made of both."""

import importlib
import importlib.metadata
import json
import re
import shlex
import sys

import pytest
import torch

from common import facts
from common.cli import make_parser
from common.errors import UserError
from tests import small_data
from tests.commands import REPOSITORY, fill_in, shortening, start
from tests.launch import free_port
from tools import recipes

# The published tables, typed in a second time: method, data type, rank, alpha, batch, learning rate, epochs, score.
PUBLISHED = {
    "NLVR2": """
        full   bf16 -   -   64 1e-5 3 89.40
        frozen bf16 -   -   64 2e-5 2 89.20""",
    "DocVQA": """
        full   bf16 -   -   64 5e-6 2 83.65
        full   fp16 -   -   64 5e-6 2 82.60
        frozen bf16 -   -   64 1e-4 2 79.19
        frozen fp16 -   -   64 1e-4 2 78.74
        lora   bf16 32  16  64 2e-4 2 82.46
        lora   fp16 32  16  64 2e-4 2 82.34
        qlora  bf16 32  16  64 2e-4 2 81.85
        qlora  fp16 32  16  64 2e-4 2 81.85""",
    "HatefulMemes": """
        full   bf16 -   -   64 5e-5 2 86.4
        full   fp16 -   -   64 5e-5 2 85.4
        frozen bf16 -   -   64 1e-4 3 79.4
        frozen fp16 -   -   64 1e-4 3 78.6
        lora   bf16 128 256 64 2e-4 2 86.6
        lora   fp16 128 256 64 2e-4 2 85.2
        qlora  bf16 128 256 64 2e-4 2 84.0
        qlora  fp16 128 256 64 2e-4 2 83.8""",
}
# method, nodes, GPUs, flash attention, images per second, speedup, GB
PUBLISHED_SPEED = {
    "speed-A100": """
        full 1 8 no 5.041 1.00 42; full 1 8 yes 8.657 1.72 36; full 2 16 yes 16.903 3.35 29
        full 4 32 yes 33.433 6.63 26; frozen 1 8 no 17.578 3.49 29; frozen 1 8 yes 31.736 6.30 27
        lora 1 8 no 5.591 1.11 50; lora 1 8 yes 12.127 2.41 16
        qlora 1 8 no 4.831 0.96 32; qlora 1 8 yes 10.545 2.09 10""",
    "speed-V100": """
        full 1 8 no 2.462 1.00 32; full 2 16 no 4.182 1.70 32; full 4 32 no 5.465 2.22 32
        frozen 1 8 no 8.942 3.63 27; lora 1 8 no 2.807 1.14 30""",
}
COMING_SOON = {"NLVR2": {"lora", "qlora"}, "DocVQA35": set(recipes.METHODS), "HatefulMemes35": set(recipes.METHODS)}


def all_recipes():
    return [(table, recipe) for table in recipes.load_tables() for recipe in table.recipes]


def cells(recipe):
    """A row as it is typed above, without its score."""
    values = (recipe.method, recipe.precision, recipe.lora_rank, recipe.lora_alpha, recipe.batch_size)
    return ["-" if value is None else str(value) for value in (*values, recipe.learning_rate, recipe.epochs)]


# --- the published rows


def test_rows_are_the_published_ones():
    tables = {table.name: table for table in recipes.load_tables()}
    assert set(tables) == {*PUBLISHED, "DocVQA35", "HatefulMemes35"}
    for name, typed in PUBLISHED.items():
        scored = [recipe for recipe in tables[name].recipes if recipe.score is not None]
        rows = [[*cells(recipe), f"{recipe.score:.{tables[name].decimals}f}"] for recipe in scored]
        assert rows == [line.split() for line in typed.split("\n")[1:]]


def test_rows_coming_soon():
    """No score; the settings of a published row, which is named."""
    by_name = {recipe.name: recipe for _, recipe in all_recipes()}
    without = [(table, recipe) for table, recipe in all_recipes() if recipe.score is None]
    assert {table.name: {one.method for where, one in without if where is table} for table, _ in without} == COMING_SOON
    for table, recipe in without:
        source = by_name[recipe.settings_of]
        assert source.score is not None
        assert cells(recipe) == cells(source)
        assert table.model == "microsoft/Phi-3.5-vision-instruct"


def test_names():
    names = [recipe.name for _, recipe in all_recipes()]
    assert len(set(names)) == len(names) == 36
    for table, recipe in all_recipes():
        precision = "" if table.name == "NLVR2" else f"-{recipe.precision}"  # published in bf16 alone
        assert recipe.name == f"{table.name}-{recipe.method}{precision}"


def test_speed_tables_are_the_published_ones():
    rendered = dict(recipes.render_tables(REPOSITORY / "results"))
    for name, typed in PUBLISHED_SPEED.items():
        rows = []
        for row in re.split(r"[;\n]", typed.strip()):
            method, nodes, gpus, flash, speed, speedup, memory = row.split()
            flash = "yes" if flash == "yes" else ""
            method = recipes.METHODS[method]
            rows.append(f"| {method} | {nodes} | {gpus} | {flash} | 64 | {speed} | {speedup}x | ~{memory} GB |")
        assert rendered[name].splitlines()[2:] == rows


# --- commands


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "NLVR2-full",
            "torchrun --nproc_per_node=4 finetune_hf_trainer_nlvr2.py --bf16 --use_flash_attention --batch_size 64 "
            "--output_dir output/NLVR2-full --learning_rate 1e-5 --num_train_epochs 3",
        ),
        (
            "NLVR2-frozen",
            "torchrun --nproc_per_node=4 finetune_hf_trainer_nlvr2.py --bf16 --use_flash_attention "
            "--freeze_vision_model --batch_size 64 --output_dir output/NLVR2-frozen --learning_rate 2e-5 "
            "--num_train_epochs 2",
        ),
        (
            "DocVQA-lora-bf16",
            "torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --full_train "
            "--model_name_or_path microsoft/Phi-3-vision-128k-instruct --bf16 --use_flash_attention --use_lora "
            "--lora_rank 32 --lora_alpha_ratio 0.5 --batch_size 64 --output_dir output/DocVQA-lora-bf16 "
            "--learning_rate 2e-4 --num_train_epochs 2",
        ),
        (
            "DocVQA-qlora-fp16",
            "torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --full_train "
            "--model_name_or_path microsoft/Phi-3-vision-128k-instruct --use_lora --use_qlora "
            "--lora_rank 32 --lora_alpha_ratio 0.5 --batch_size 64 --output_dir output/DocVQA-qlora-fp16 "
            "--learning_rate 2e-4 --num_train_epochs 2",
        ),
        (
            "HatefulMemes-frozen-fp16",
            "torchrun --nproc_per_node=4 finetune_hf_trainer_hateful_memes.py "
            "--model_name_or_path microsoft/Phi-3-vision-128k-instruct --freeze_vision_model --batch_size 64 "
            "--output_dir output/HatefulMemes-frozen-fp16 --learning_rate 1e-4 --num_train_epochs 3",
        ),
        (
            "HatefulMemes35-lora-fp16",
            "torchrun --nproc_per_node=4 finetune_hf_trainer_hateful_memes.py --use_lora --lora_rank 128 "
            "--lora_alpha_ratio 2 --batch_size 64 --output_dir output/HatefulMemes35-lora-fp16 --learning_rate 2e-4 "
            "--num_train_epochs 2",
        ),
    ],
)
def test_show(capsys, name, expected):
    assert recipes.main(["show", name]) == 0
    shown = [line for line in capsys.readouterr().out.replace("\\\n", "").splitlines() if not line.startswith("#")]
    assert [" ".join(line.split()) for line in shown] == [expected]


@pytest.mark.parametrize(("table", "recipe"), [pytest.param(*one, id=one[1].name) for one in all_recipes()])
def test_every_command_is_accepted_by_its_script(monkeypatch, tmp_path, table, recipe):
    """Parsed by the script itself, as on a GPU of the Ampere generation, with four processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "stand-in")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", str(recipes.PUBLISHED_PROCESSES))
    words = recipes.script_command(table, recipe)
    monkeypatch.setattr(sys, "argv", words)
    options = importlib.import_module(words[0].removesuffix(".py")).parse()
    assert (options.method, options.precision.name) == (recipe.method, recipe.precision)
    assert options.model_name_or_path == table.model
    assert (options.batch_size, options.num_train_epochs) == (recipe.batch_size, recipe.epochs)
    assert options.learning_rate == float(recipe.learning_rate)
    if recipe.lora_rank:
        assert (options.lora_rank, options.lora_rank * options.lora_alpha_ratio) == (32, 16) or table.task != "docvqa"
        assert round(options.lora_rank * options.lora_alpha_ratio) == recipe.lora_alpha


def test_launcher_and_extra_options(capsys):
    launcher = "--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr first --master_port 2345"
    recipes.main(["show", "NLVR2-lora", *launcher.split(), "--", "--seed", "3"])
    shown = capsys.readouterr().out
    assert shown.startswith("# nothing is published for this row; its settings are those of HatefulMemes-lora-bf16\n")
    words = shlex.split(shown.replace("\\\n", ""), comments=True)
    launched = "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=first --master_port=2345"
    assert " ".join(words).startswith(launched)
    assert words[-2:] == ["--seed", "3"]


def test_list(capsys):
    assert recipes.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 37
    row = next(line for line in lines if line.startswith("DocVQA-lora-fp16 ")).split()
    expected = "DocVQA-lora-fp16 DocVQA Phi-3-vision-128k-instruct LoRA fp16 32 16 64 2e-4 2 ANLS 82.34"
    assert row[: len(expected.split())] == expected.split()


def test_wrong_names_and_options():
    with pytest.raises(UserError, match=r"there is no recipe DocVQA-lora; did you mean .*DocVQA-lora-bf16"):
        recipes.main(["show", "DocVQA-lora"])
    with pytest.raises(UserError, match="list runs no script, so nothing may follow after --: --seed 3"):
        recipes.main(["list", "--", "--seed", "3"])


# --- what counts as a measurement


@pytest.mark.parametrize(
    ("extra", "changed"),
    [
        ("", {}),
        ("--seed 3 --output_dir elsewhere --batch_size_per_gpu=4 --no-tqdm --overwrite", {}),
        ("--learning_rate 0.00001 --batch_size 64", {}),  # what the row has
        ("--deepspeed ds_configs/zero3.json", {}),
        ("--deepspeed /my/own.json", {"--deepspeed": {"recipe": None, "run": "/my/own.json"}}),
        ("--max_steps 5", {"--max_steps": {"recipe": None, "run": "5"}}),
        ("--learning_rate=2e-5", {"--learning_rate": {"recipe": "1e-5", "run": "2e-5"}}),
        ("--eval_limit 10 --seed 1", {"--eval_limit": {"recipe": None, "run": "10"}}),
        ("--data_dir copy", {"--data_dir": {"recipe": None, "run": "copy"}}),
        ("--model_name_or_path m", {"--model_name_or_path": {"recipe": None, "run": "m"}}),
        ("--use_lora", {"--use_lora": {"recipe": None, "run": ""}}),
        ("--num_crops 4", {"--num_crops": {"recipe": None, "run": "4"}}),
    ],
)
def test_differences(monkeypatch, extra, changed):
    monkeypatch.chdir(REPOSITORY)
    assert recipes.differences(*recipes.find("NLVR2-full"), extra.split()) == changed


# Options that make another run of a row: other weights, data, numbers or kernels, or none that ends as the row's.
DIFFERENT = {
    *("--help", "--model_name_or_path", "--revision", "--use_lora", "--use_qlora", "--lora_rank", "--bf16"),
    *("--lora_alpha_ratio", "--lora_dropout", "--freeze_vision_model", "--use_flash_attention", "--data_dir"),
    *("--num_crops", "--bad_examples", "--max_bad_fraction", "--batch_size", "--num_train_epochs", "--max_steps"),
    *("--learning_rate", "--warmup_steps", "--wd", "--dry_run", "--eval_only", "--eval_limit", "--max_tokens_per_gpu"),
    *("--optim", "--use_liger", "--no-use_liger", "--torch_compile", "--vision_learning_rate", "--deepspeed"),
    *("--projector_learning_rate", "--max_new_tokens"),
}


def test_every_option_is_neutral_or_makes_another_run(monkeypatch):
    """One that is added to the parser must be judged; the report and the recipes judge alike."""
    monkeypatch.chdir(REPOSITORY)
    known = {option for action in make_parser("")._actions for option in action.option_strings} - {"-h"}
    row = recipes.find("NLVR2-full")
    neutral = {option for option in known if not recipes.differences(*row, [option, "x"])}
    assert known == neutral | DIFFERENT
    assert not neutral & DIFFERENT
    assert {option.removeprefix("--").removeprefix("no-") for option in neutral} == facts.NEUTRAL_OPTIONS


# --- runs recorded


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Instead of hours on GPUs: what a run leaves in its output folder, and a machine with a GPU."""

    def leave(scores=(0.5, 0.8), returncode=0, gpu="NVIDIA A100-SXM4-80GB"):
        commands = []

        def launch(command):
            commands.append(command)
            output = tmp_path / "out"
            output.mkdir(exist_ok=True)
            for name, score in zip(("before", "after"), scores or (), strict=False):
                content = {"anls": score / 2, "anls_recipe": score, "accuracy": score, "num_examples": 200}
                content["time"] = f"2026-01-01T00:00:{len(commands):02}+0000"
                (output / f"eval_{name}.json").write_text(json.dumps(content))
            return returncode

        monkeypatch.setattr(recipes, "launch", launch)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: gpu)
        return commands

    return leave


def record(tmp_path, name, *extra, launcher=()):
    words = ["--results", str(tmp_path / "results"), "run", name, *launcher]
    return recipes.main([*words, "--", "--output_dir", str(tmp_path / "out"), *extra])


def stored(tmp_path, task):
    return json.loads((tmp_path / "results" / f"{task}.json").read_text())


def test_run_is_recorded(pretend, tmp_path, capsys):
    commands = pretend(scores=(0.31, 0.8229))
    assert record(tmp_path, "DocVQA-lora-bf16", "--seed", "7", launcher=("--nproc_per_node", "8")) == 0
    assert commands[0][:3] == ["torchrun", "--nproc_per_node=8", "finetune_hf_trainer_docvqa.py"]
    (entry,) = stored(tmp_path, "docvqa")
    expected = {"name": "DocVQA-lora-bf16", "metric": "anls_recipe", "published": 82.46, "measured": 82.29}
    expected |= {"difference": -0.17, "reproduction": True, "differs": {}, "before_training": 31.0, "seed": 7}
    expected |= {"num_examples": 200, "command": shlex.join(commands[0])}
    assert expected.items() <= entry.items()
    assert entry["machine"]["gpu"] == "NVIDIA A100-SXM4-80GB"
    assert entry["machine"]["processes"] == 8
    assert entry["machine"]["cpu"]
    assert entry["versions"]["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", entry["date"])
    assert "DocVQA-lora-bf16: ANLS 82.29 (published 82.46), recorded in" in capsys.readouterr().out


def test_runs_are_appended(pretend, tmp_path):
    for score in (0.80, 0.82):
        pretend(scores=(0.5, score))
        (tmp_path / "out" / "eval_after.json").unlink(missing_ok=True)
        record(tmp_path, "HatefulMemes-full-bf16")
    assert [entry["measured"] for entry in stored(tmp_path, "hateful_memes")] == [80.0, 82.0]
    rows = dict(recipes.render_tables(tmp_path / "results"))["HatefulMemes"].splitlines()
    assert "| 86.4 | 81.0 (mean of 2) | -5.4 |" in rows[2]
    assert "| 85.4 | not run | - |" in rows[3]


def test_shortened_run_stands_in_no_table(pretend, tmp_path, capsys):
    pretend()
    record(tmp_path, "NLVR2-full", "--max_steps", "5", "--model_name_or_path", "m")
    (entry,) = stored(tmp_path, "nlvr2")
    assert not entry["reproduction"]
    assert set(entry["differs"]) == {"--max_steps", "--model_name_or_path"}
    assert "not a measurement of the row, for --max_steps is 5, --model_name_or_path is m" in capsys.readouterr().out
    assert "| 89.40 | not run | - |" in dict(recipes.render_tables(tmp_path / "results"))["NLVR2"]


def test_run_without_a_gpu_is_no_measurement(pretend, tmp_path):
    pretend(gpu=None)
    record(tmp_path, "DocVQA-full-fp16")
    (entry,) = stored(tmp_path, "docvqa")
    assert not entry["reproduction"]
    assert entry["differs"] == {"device": {"recipe": "cuda", "run": "cpu"}}


def test_row_without_a_published_score(pretend, tmp_path, capsys):
    pretend(scores=(0.5, 0.875))
    record(tmp_path, "NLVR2-lora")
    (entry,) = stored(tmp_path, "nlvr2")
    assert (entry["published"], entry["measured"], entry["difference"]) == (None, 87.5, None)
    assert "(none published)" in capsys.readouterr().out
    assert "| - | 87.50 | - |" in dict(recipes.render_tables(tmp_path / "results"))["NLVR2"]


def test_failed_run_is_not_recorded(pretend, tmp_path):
    pretend(returncode=3)
    assert record(tmp_path, "NLVR2-full") == 3
    assert not (tmp_path / "results").exists()


def test_only_the_first_node_records(pretend, tmp_path):
    pretend()
    launcher = ("--nnodes", "2", "--master_addr", "first", "--node_rank")
    assert record(tmp_path, "NLVR2-full", launcher=(*launcher, "1")) == 0
    assert not (tmp_path / "results").exists()
    (tmp_path / "out" / "eval_after.json").unlink()
    assert record(tmp_path, "NLVR2-full", launcher=(*launcher, "0")) == 0
    (entry,) = stored(tmp_path, "nlvr2")
    assert (entry["machine"]["nodes"], entry["machine"]["processes"]) == (2, 8)


def test_an_earlier_run_is_not_taken_for_this_one(pretend, tmp_path):
    """As with `--eval_only`, which writes no `eval_after.json`."""
    pretend()
    record(tmp_path, "NLVR2-full")
    pretend(scores=None)
    with pytest.raises(UserError, match=r"the run has written no .*eval_after.json, so there is no score to record"):
        record(tmp_path, "NLVR2-full", "--eval_only")
    assert len(stored(tmp_path, "nlvr2")) == 1


def test_a_run_that_had_ended_is_recorded_once(pretend, tmp_path):
    """As where recording was killed; the script, run again, trains and evaluates nothing."""
    pretend(scores=(0.5, 0.8))
    record(tmp_path, "NLVR2-full")
    (tmp_path / "results" / "nlvr2.json").unlink()
    pretend(scores=None)
    assert record(tmp_path, "NLVR2-full") == 0
    (entry,) = stored(tmp_path, "nlvr2")
    assert (entry["measured"], entry["seconds"], entry["reproduction"]) == (80.0, None, True)
    with pytest.raises(UserError, match=rf"recorded on {re.escape(entry['date'])}: --overwrite runs it again"):
        record(tmp_path, "NLVR2-full")
    assert len(stored(tmp_path, "nlvr2")) == 1


def test_broken_results_are_told_before_the_run(pretend, tmp_path):
    commands = pretend()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "nlvr2.json").write_text('[{"name": "NLVR2-full"}]')
    with pytest.raises(UserError, match=r"nlvr2.json holds no list of runs \(a run without .*mend it, or move it away"):
        record(tmp_path, "NLVR2-full")
    assert commands == []


# --- tables


def test_readme_holds_the_tables(capsys):
    """The README's tables are those of the recorded results, to the letter."""
    code = recipes.main(["table", "--check"])
    assert code == 0, capsys.readouterr().out


def test_recorded_results_are_of_known_rows():
    names = {table.task: {one.name for one in table.recipes} for table in recipes.load_tables()}
    for path in (REPOSITORY / "results").glob("*.json"):
        for entry in recipes.read_results(REPOSITORY / "results", path.stem):
            assert any(entry["name"] in rows for task, rows in names.items() if task == path.stem)


def test_check_and_update(pretend, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text((REPOSITORY / "README.md").read_text())
    table = ["--results", str(tmp_path / "results"), "table", "--readme", str(readme)]
    recipes.main([*table, "--update"])
    pretend(scores=(0.5, 0.9))
    record(tmp_path, "NLVR2-frozen")
    capsys.readouterr()
    assert recipes.main([*table, "--check"]) == 1
    assert "table --update` mends it" in capsys.readouterr().out
    assert recipes.main([*table, "--update"]) == 0
    assert "| 89.20 | 90.00 | +0.80 |" in readme.read_text()
    assert recipes.main([*table, "--check"]) == 0
    readme.write_text(readme.read_text().replace("<!-- table NLVR2 -->", ""))
    with pytest.raises(UserError, match=r"it needs one for each of"):
        recipes.main([*table, "--check"])


# --- real runs


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the row runs")
def test_row_with_flash_attention_without_a_gpu(tmp_path):
    """The script's own error and exit code; nothing is recorded."""
    words = ["python", "-m", "tools.recipes", "--results", str(tmp_path / "results"), "run", "NLVR2-full"]
    launcher = ["--nproc_per_node=1", f"--master_port={free_port()}"]
    ended = start([*words, *launcher, "--", "--output_dir", str(tmp_path / "out")])
    assert ended.returncode != 0
    assert "error: --use_flash_attention needs a CUDA GPU and there is none" in ended.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", ["HatefulMemes-full-fp16", "DocVQA-qlora-fp16"])
def test_row_runs(tmp_path, name):
    """A row's own command, shortened, to the recorded score: the one in the run's evaluation file, in percent."""
    mini, full = small_data.write_docvqa_pages(tmp_path)
    places = {"docvqa": mini, "docvqa_full": full, "out": tmp_path}
    places["hateful_memes"] = small_data.write_hateful_memes(tmp_path)
    table, recipe = recipes.find(name)
    words = ["python", "-m", "tools.recipes", "--results", "{out}/results", "run", name]
    extra = shortening(recipes.script_command(table, recipe))
    launcher = ["--nproc_per_node=1", "--master_port={port}"]
    ended = start(fill_in([*words, *launcher, "--", *extra], places))
    assert ended.returncode == 0, ended.stdout[-3000:]
    (entry,) = stored(tmp_path, table.task)
    evaluation = json.loads((tmp_path / "trained" / "eval_after.json").read_text())
    assert entry["measured"] == pytest.approx(100 * evaluation[table.metric])
    assert entry["num_examples"] == evaluation["num_examples"] == 4
    assert not entry["reproduction"]
    assert {"--model_name_or_path", "--max_steps", "--eval_limit", "--num_crops"} <= set(entry["differs"])
