"""What the README says can be run, runs; what it names, exists."""

import re
import shlex
from pathlib import Path

import datasets
import pytest

from common.demo import CHECKPOINT, write_docvqa
from tests.launch import REPOSITORY, read_evaluation, run_script

README = (REPOSITORY / "README.md").read_text()
PLACEHOLDERS = {"<lr>": "1e-3", "<epochs>": "1"}


def commands(program):
    """The commands of the README's shell blocks that start with `program`, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip().startswith(program + " ")]


def test_commands_are_found():
    assert len(commands("torchrun")) >= 2
    assert "make demo" in README
    assert "make test" in README


def test_every_file_named_exists():
    named = re.findall(r"`([\w./-]+(?:\.py|\.json|\.txt|/))`", README)
    written_by_runs = {"eval_before.json", "eval_after.json", "train_log.jsonl", "eval_step_N.json"}
    assert len(named) > 10
    for name in set(named) - written_by_runs:
        assert (REPOSITORY / name).exists(), name


def test_every_option_named_exists():
    from common.cli import make_parser

    known = {option for action in make_parser("")._actions for option in action.option_strings}
    source = (REPOSITORY / "finetune_hf_trainer_docvqa.py").read_text()
    known |= set(re.findall(r'"(--[\w-]+)"', source)) | {"--nproc_per_node", "--no-build-isolation"}
    assert set(re.findall(r"--[a-zA-Z][\w-]+", README)) - known == set()


def test_every_make_target_named_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The built-in pages as the mini set, and in the layout of the full training set."""
    folder = write_docvqa(tmp_path_factory.mktemp("pages"), train_pages=12, test_pages=4, seed=2)
    rows = datasets.Dataset.from_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    texts = [
        [{"user": row["query"]["en"], "assistant": row["answers"][0], "source": "docvqa"}] * 2
        for row in rows.remove_columns("image")
    ]
    text = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    full = datasets.Dataset.from_dict(
        {"images": [[image] for image in rows["image"]], "texts": texts},
        features=datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(text)}),
    )
    full.to_parquet(folder / "the_cauldron" / "docvqa" / "train-00000-of-00001.parquet")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("command", commands("torchrun"))
def test_command(command, pages, tmp_path):
    """Shortened only: the built-in checkpoint and pages, one step, two processes, no flash attention on a CPU."""
    for placeholder, value in {**PLACEHOLDERS, "<output_dir>": str(tmp_path / "out")}.items():
        command = command.replace(placeholder, value)
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    arguments = [word for word in words[words.index(script) + 1 :] if word != "--use_flash_attention"]
    train = pages / ("the_cauldron" if "--full_train" in arguments else "data")
    shortened = ("--model_name_or_path", CHECKPOINT, "--train_data", train, "--eval_data", pages / "data")
    shortened += ("--output_dir", tmp_path / "out", "--max_steps", 1, "--num_crops", 1, "--num_workers", 1, "--no-tqdm")
    ended = run_script(script, *arguments, *shortened)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert read_evaluation(tmp_path / "out", "eval_after")["num_examples"] == 4


@pytest.mark.long
def test_python_blocks(pages, tmp_path):
    """The README's Python, run on what a LoRA run and a full run leave."""
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", pages / "data", "--max_steps", 1, "--num_crops", 1)
    for name, extra in (("output", ()), ("output_lora", ("--use_lora", "--lora_rank", 4))):
        ended = run_script(
            "finetune_hf_trainer_docvqa.py", *options, "--output_dir", tmp_path / name, *extra, processes=0
        )
        assert ended.returncode == 0, ended.stdout[-3000:]
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        block = block.replace("microsoft/Phi-3.5-vision-instruct", str(CHECKPOINT))
        block = re.sub(r'"(output\w*)"', lambda found: repr(str(tmp_path / found[1])), block)
        names = {}
        exec(block, names)  # the README's own text
        assert names["model"].num_parameters() > 0
        assert names["processor"].image_processor.num_crops == 1
        assert Path(tmp_path / "output").exists()
