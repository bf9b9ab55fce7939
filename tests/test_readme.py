"""What the README, `docs/` and CONTRIBUTING.md say can be run, runs; what they name, exists.

Every torchrun, python and make command is taken from the text and run, shortened as `tests/commands.py` says; commands
that are the same once shortened run once. `make test` and `make test-all` would run these tests again: of them make
only says what it would do.
"""

import ast
import dataclasses
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from PIL import Image

import finetune_hf_trainer_docvqa as docvqa
from benchmarks import demos, render
from benchmarks.measuring import RESULTS
from common import demo
from common.cli import make_parser
from common.conversations import load_conversations
from common.demo import CHECKPOINT
from common.errors import UserError
from common.memory import Setting
from common.phi3v.image_processing import CROP, plan_layout
from tests import small_data, test_demo_runs, test_parity
from tests.commands import (
    EVALUATED,
    NOT_RUN,
    PROGRAMS,
    REPOSITORY,
    TASK,
    commands,
    documents,
    fill_in,
    programs_of,
    scripts_to_be_made,
    serve,
    shell_lines,
    shorten,
    start,
)
from tests.launch import read_evaluation, run_script
from tests.report_runs import write_run
from tests.test_merge import save_adapter
from tools import plan

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in documents()}
ALL = "\n".join(TEXTS.values())
RECURSIVE = ("make test", "make test-all")
RUN_WHOLE = "make demo"  # for every task, by tests/test_demo_runs.py
WRITTEN_BY_RUNS = {"eval_before.json", "eval_after.json", "eval_step_N.json", "train_log.jsonl", "train.jsonl"}
WRITTEN_BY_RUNS |= {"run.json", "run_facts.json", "stages.json", "manifest.json", "report.html", "bad_examples.jsonl"}
WRITTEN_BY_RUNS |= {"dev_seen.jsonl", "train.json", "dev.json", "img/", "images/", "results/", ".venv/"}
WRITTEN_BY_RUNS |= {"adapter_config.json", "config.json", "generation_config.json", "preprocessor_config.json"}
WRITTEN_BY_RUNS |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
WRITTEN_BY_RUNS |= {f"ucf101_{split}.jsonl" for split in ("train", "val", "test")}
WRITTEN_BY_RUNS |= {"eval_only.json", "model.safetensors.index.json"}
OF_THE_OFFICIAL_CODE = {"modeling_phi3_v.py"}
OTHERS_OPTIONS = {  # conda's, pip's, torchrun's, sbatch's, az's
    *("--no-build-isolation", "--index-url", "--nproc_per_node", "--nnodes", "--nodes", "--master_addr"),
    *("--master_port", "--node_rank", "--file", "--set", "--help", "--max_restarts"),
    # vLLM's and SGLang's
    *("--trust-remote-code", "--max-model-len", "--limit-mm-per-prompt", "--mm-processor-kwargs", "--quantization"),
    "--model-path",
    *("--repo-type", "--local-dir"),  # hf's
    "--collect-only",  # pytest's
}


def all_commands():
    """Those of all documents, but for what runs a script that the reader is to make first."""
    for text in TEXTS.values():
        made = scripts_to_be_made(text)
        yield from (command for command in commands(text) if not made & set(command.split()))


def run_once():
    """The commands that take long: one pytest parameter for each that differs once shortened, and whether torchrun
    or python itself is to start it: each script's first one, and the first of `python`."""
    seen, first = {}, {}
    for command in all_commands():
        if not command.startswith("make ") and not is_quick(command):
            seen.setdefault(tuple(shorten(command)), command)
    for words in seen:
        first.setdefault(next(filter(TASK.fullmatch, words)) if words[0] == "torchrun" else words[0], words)
    return [pytest.param(list(words), words in first.values(), id=command) for words, command in seen.items()]


def is_quick(command):
    """Commands that need no model."""
    return command.startswith("python -m tools.recipes ") and " run " not in command


# --- what the documents name


def test_commands_are_found():
    """The parser sees fenced, indented and inline commands; the published ones are all there."""
    text = (
        "Run `make\nfoo`.\n\n    make bar  # why\n\n- so:\n\n  ```bash\n  # first\n  torchrun \\\n    a.py --x\n  ```\n"
    )
    assert sorted(commands(text)) == ["make bar", "make foo", "torchrun a.py --x"]
    found = list(all_commands())
    assert {"make demo", "make test"} <= set(found)
    scripts = {word for command in found for word in command.split() if TASK.fullmatch(word)}
    assert scripts == {path.name for path in REPOSITORY.glob("finetune_hf_trainer_*.py")}
    assert sum(command.startswith("torchrun") for command in found) >= 10


def test_every_program_is_run_or_said_why_not():
    """A command of a program that is neither would be believed to be tested."""
    block = "A=1 B='2 3' made up  # why\n  curl -d '{\n  1}'\ntorchrun \\\n  b\n\n# make\n"
    text = f"```bash\n{block}```\n    error: of no program\n"
    assert programs_of(text) == {"made", "curl", "torchrun"}
    found = set.union(*map(programs_of, TEXTS.values()))
    assert found - set(PROGRAMS) == set(NOT_RUN)


def test_what_is_marked_as_tested():
    """docs/serving.md says of each command whether it is tested here: where pip alone is not run, it is."""
    marks_found = []
    for section in re.split(r"^## ", TEXTS["serving.md"], flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```(?:bash|python)$", section, flags=re.MULTILINE)
        marks = re.findall(r"\((Tested here|[Nn]ot tested here)[.)]", section)
        if blocks:
            assert len(marks) == len(blocks), section
            is_run = programs_of(section) <= {*PROGRAMS, "pip"}
            assert {mark.lower() for mark in marks} == {"tested here" if is_run else "not tested here"}, section
            marks_found += marks
    assert len(marks_found) > 8


def test_nothing_is_dropped_but_flash_attention():
    """A shortened command still has every word of the document's that is not the launcher's or a placeholder."""
    for command in all_commands():
        if command.startswith("torchrun"):
            script = shlex.split(re.sub(r"<\w+>", "", command[command.index("finetune_") :]))
            kept = shorten(command)
            given = {word for word in script if not word.startswith("/")} - {"--use_flash_attention"}
            assert given <= set(kept), command


def test_unknown_placeholders_are_told():
    with pytest.raises(ValueError, match=r"nobody knows what to fill in for \['<answer>', '\$HERE', '/path/to/y'\]"):
        shorten("torchrun finetune_hf_trainer_docvqa.py --wd <answer> --data_dir $HERE --eval_data /path/to/y")


def test_commands_on_a_script_to_be_made_have_a_test():
    for name, text in TEXTS.items():
        if scripts_to_be_made(text):
            tests = [path for path in (REPOSITORY / "tests").glob("test_*.py") if name in path.read_text()]
            assert tests, f"no test follows {name}"


def test_every_file_named_exists():
    named = re.findall(r"`([\w./-]+(?:\.py|\.json|\.jsonl|\.txt|\.yml|\.sbatch|/))`", ALL)
    assert len(named) > 20
    missing = [name for name in set(named) - WRITTEN_BY_RUNS - OF_THE_OFFICIAL_CODE if not (REPOSITORY / name).exists()]
    assert missing == []


def test_every_link_within_the_repository_leads_somewhere():
    for path in documents():
        for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path.name]):
            if not link.startswith("https://"):
                file, _, anchor = link.partition("#")
                target = path.parent / file if file else path
                assert target.exists(), f"{path.name}: {link}"
                assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link}"


def anchors(text):
    """Of a document's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_page_is_listed():
    listed = re.findall(r"\]\((docs/[\w.]+)\)", TEXTS["README.md"].partition("## Documentation\n")[2])
    assert set(listed) == {f"docs/{path.name}" for path in documents() if path.parent.name == "docs"}


def test_the_first_command_is_on_the_first_screen():
    first = "\n".join(TEXTS["README.md"].splitlines()[:25])
    assert {"make demo", "torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py"} <= set(commands(first + "\n```"))


def test_every_function_and_test_named_exists():
    """`file.py::name`, a function, class or test."""
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", ALL)
    assert len(named) > 80
    for file, name in set(named):
        body = ast.parse((REPOSITORY / file).read_text(encoding="utf-8")).body
        assert name in {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}, file


def test_a_page_in_numbers():
    """The picture that docs/how_it_works.md follows through the code."""
    text = TEXTS["how_it_works.md"]
    width, height = map(int, re.search(r"A page of (\d+) x (\d+) pixels", text).groups())
    layout = plan_layout(width, height, int(re.search(r"at `--num_crops (\d+)`", text)[1]))
    rows, columns = layout.padded_height // CROP, layout.padded_width // CROP
    assert f"`pixel_values` ({layout.num_crops}, 3, {CROP}, {CROP})" in text
    assert f"then {rows} x {columns} sub-images" in text
    assert f"{layout.num_img_tokens:,} times the id of" in text
    sum_in_words = f"{layout.num_crops} x 144 + ({rows} + 1) x 12 + 1 = {layout.num_img_tokens:,}"
    assert sum_in_words in " ".join(text.split())


def test_tolerances_of_the_model_s_page():
    limits = {
        "pixels": test_parity.PIXELS,
        "loss": test_parity.LOSS,
        "losses of ten AdamW steps": test_parity.ADAMW_LOSS,
    }
    limits |= {"logits, of order 1 to 5, also past 4,096 positions": test_parity.LOGITS}
    for what, limit in limits.items():
        digits, _, exponent = f"{limit:.0e}".partition("e")
        assert f"| {what} | {digits}e{int(exponent)} |" in TEXTS["model.md"]
    assert test_parity.GRADIENT_NORM == 1e-5
    assert "| norm of every weight's gradient | 1e-5, relative |" in TEXTS["model.md"]


def test_the_memory_page_has_what_is_estimated(capsys):
    """Every row of its table is what `tools.plan` proposes for the row's cards, method and data type."""
    rows = re.findall(
        r"^\| (\d+) GB \| (\d+) \| (full|frozen|lora|qlora) \| (bf16|fp16) \| (.+) \| (.+) \|$",
        TEXTS["memory.md"],
        flags=re.MULTILINE,
    )
    assert len(rows) > 8
    for size, gpus, method, precision, proposed, needed in rows:
        words = ["--gpu_memory", size, "--gpus", gpus, "--method", method, *(["--bf16"] if precision == "bf16" else [])]
        code = plan.main(words)
        shown = capsys.readouterr().out
        if proposed.startswith("nothing fits"):
            assert code == 1
            lacking = re.search(r"lacks ([\d.]+) GB", shown)[1]
            assert proposed == f"nothing fits, {lacking} GB are lacking"
        else:
            assert shown.startswith(f"fastest that fits {size} GB: {proposed.strip('`')}\n"), words
        assert needed == re.search(r"^needed +([\d.]+) GB", shown, flags=re.MULTILINE)[1], words


def test_the_demos_figures_are_those_measured():
    measured = json.loads((RESULTS / "demos.json").read_text())["demos"]
    assert set(measured) == set(demos.TASKS) == set(demo.WRITERS)
    assert demos.table(measured) in TEXTS["demo.md"]
    for task, one in measured.items():  # of training, on two cores
        assert one["training_seconds"] <= 60 * (5 if task == "docvqa" else 6), task


def test_the_demos_options_are_the_makefile_s():
    told = subprocess.run(["make", "-n", "demo"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in told.replace("\\\n", "").splitlines()]
    data = next(words for words in lines if "data" in words)
    training = next(words for words in lines if words[0] == "torchrun")
    section = re.search("## The demo's options\n(.*?)\n## ", TEXTS["README.md"], flags=re.DOTALL)[1]
    assert f"{int(data[data.index('--train_pages') + 1]):,} built-in pages" in section
    stated = set(" ".join(re.findall("`([^`]+)`", section)).split()) - {"make", "demo"}
    options = training[next(number for number, word in enumerate(training) if word.endswith(".py")) + 1 :]
    for option in ("--model_name_or_path", "--data_dir", "--output_dir"):
        place = options.index(option)
        del options[place : place + 2]
    assert stated == set(options) - {"--overwrite"}


def test_every_option_named_exists():
    known = {option for action in make_parser("")._actions for option in action.option_strings} | OTHERS_OPTIONS
    known |= {f"--{field.name}" for field in dataclasses.fields(Setting)}  # which tools.plan takes
    for folder in (".", "tools", "benchmarks", "common"):
        for path in REPOSITORY.glob(f"{folder}/*.py"):
            known |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]+", re.sub(r"<!--.*?-->", "", ALL)))
    assert len(named) > 20
    assert named - known == set()


def test_installation_lines():
    """Files named to pip exist; Python and torch are of the versions that the project takes."""
    lines = [line for text in TEXTS.values() for line in shell_lines(text)]
    pip = [shlex.split(line) for line in lines if re.search(r"(^|\s)pip install", line)]
    assert len(pip) >= 4
    for words in pip:
        for option, name in itertools.pairwise(words):
            if option in ("-r", "-c"):
                assert (REPOSITORY / name).is_file(), name
    lowest = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    conda = [re.search(r"python=(\d+)\.(\d+)", line) for line in lines if line.startswith("conda create")]
    assert conda
    for version in conda:
        assert tuple(map(int, version.groups())) >= tuple(map(int, lowest.removeprefix(">=").split(".")))


@pytest.mark.skipif(not torch.version.cuda, reason="a torch built without CUDA names no GPU architectures")
def test_pinned_torch_has_no_kernels_for_the_v100():
    """What the README says of the V100: 7.0 is not among the architectures, 7.5 (Turing) is."""
    pinned = re.search(r"^torch==(\d+\.\d+)", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    if not torch.__version__.startswith(pinned):
        pytest.skip(f"the README speaks of the pinned torch {pinned}, here is {torch.__version__}")
    architectures = torch._C._cuda_getArchFlags().split()
    assert f"torch {pinned} has no kernels for GPUs before Turing" in " ".join(ALL.split())
    assert "sm_75" in architectures
    assert not {"sm_60", "sm_70"} & set(architectures)


def test_lines_of_the_data_format(tmp_path):
    """The documents' example lines pass the checks that training makes."""
    blocks = re.findall(r"```json\n(.*?)```", ALL, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 2
    for name in {name for line in lines for turn in json.loads(line)["conversations"] for name in turn["images"]}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n")
    assert len(load_conversations(tmp_path / "lines.jsonl", tmp_path)) == len(lines)


# --- small data


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Every task's data, small; UCF-101's is what the converter makes of an archive, by the README's command."""
    folder = tmp_path_factory.mktemp("small")
    mini, full = small_data.write_docvqa_pages(folder)
    archive = small_data.write_ucf101_archive(folder / "UCF101_subset.tar.gz")
    convert = next(one for one in commands(TEXTS["README.md"]) if one.startswith("python convert_ucf101.py"))
    places = {"archive": archive, "ucf101": folder / "published", "out": folder}
    ended = start(fill_in(shorten(convert), places))
    assert ended.returncode == 0, ended.stdout
    return {
        "docvqa": mini,
        "docvqa_full": full,
        "hateful_memes": small_data.write_hateful_memes(folder),
        "nlvr2": small_data.write_nlvr2(folder),
        "ucf101": folder / "converted",
        "archive": archive,
        "picture": next((folder / "converted" / "images").rglob("*.jpg")),
        "adapter": save_adapter(folder / "adapter"),
        "run": write_run(folder / "run"),
    }


def test_converted_tree_is_the_one_shown(small):
    """The tree of docs/data.md: its folders and files, and image names of its form."""
    shown = re.search(r"```\n/path/to/converted_ucf101\n(.*?)```", TEXTS["data.md"], flags=re.DOTALL)[1]
    names = re.findall(r"─ (\S+)$", shown, flags=re.MULTILINE)
    for name in names:
        if name.endswith(".jsonl") or name == "images":
            assert (small["ucf101"] / name).exists()
        elif name in ("train", "val", "test"):
            assert (small["ucf101"] / "images" / name).is_dir()
    form = re.compile(r"v_\w+_g\d\d_c\d\d\.[0-7]\.jpg")
    assert sum(bool(form.fullmatch(name)) for name in names) == 2
    images = [path.name for path in (small["ucf101"] / "images").rglob("*.jpg")]
    assert len(images) == 12 * 8
    assert all(form.fullmatch(name) for name in images)


# --- running the commands


@pytest.mark.parametrize("command", [one for one in all_commands() if is_quick(one)])
def test_quick_command(command, tmp_path):
    text = (REPOSITORY / "README.md").read_text()
    outdated = re.sub(r"(<!-- table \w+ -->\n).*?(<!-- /table -->)", r"\1\2", text, flags=re.DOTALL)
    assert outdated != text
    (tmp_path / "README.md").write_text(outdated)
    ended = start(fill_in(shorten(command), {"out": tmp_path}))
    assert ended.returncode == 0, ended.stdout
    if "--update" in command:
        assert (tmp_path / "README.md").read_text() == text
    elif "--check" not in command:
        assert "NLVR2-full" in ended.stdout or "torchrun" in ended.stdout


@pytest.mark.long
@pytest.mark.parametrize(("words", "fresh"), run_once())
def test_command(words, fresh, small, tmp_path):
    """Exit code 0, and the evaluation after training is there."""
    words = fill_in(words, {**small, "out": tmp_path})
    if "tools.app" in words:
        pytest.importorskip("gradio")
        assert "gradio" in serve(words, tmp_path / "app.log")
        return
    ended = start(words, fresh=fresh)
    assert ended.returncode == 0, ended.stdout[-3000:]
    if "--max_steps" in words:
        assert read_evaluation(tmp_path / "trained", "eval_after")["num_examples"] == EVALUATED
        assert (tmp_path / "trained" / "train_log.jsonl").exists()


@pytest.mark.parametrize("command", sorted({one for one in all_commands() if one.startswith("make ")}))
def test_make_target(command):
    ended = subprocess.run(["make", "-n", *command.split()[1:]], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if command in RECURSIVE:
        assert "pytest" in ended.stdout


def make_commands():
    """Those that no other test runs."""
    commands = {one for one in all_commands() if one.startswith("make ") and one not in RECURSIVE}
    demos_run = {RUN_WHOLE, *(f"{RUN_WHOLE} TASK={task}" for task in test_demo_runs.BARS)}
    return sorted(commands - demos_run)


@pytest.mark.long
@pytest.mark.parametrize("command", make_commands())
def test_make(command, tmp_path):
    """In a copy of the repository, with an environment whose `python` adds what shortens a run."""
    copy = tmp_path / "repository"
    kept_out = shutil.ignore_patterns(
        ".venv", ".git", "demo_runs", "demo_data*", "demo_output*", "output", "__pycache__", ".*_cache"
    )
    shutil.copytree(REPOSITORY, copy, ignore=kept_out)
    binaries = copy / "venv" / "bin"
    binaries.mkdir(parents=True)
    wrappers = {
        "python": f"""case "$*" in
  "-m tests.faults.harness "*) exec {sys.executable} "$@" --seeds 1 --bad_inputs 0 ;;
  "-m benchmarks.cpu") exec {sys.executable} "$@" --size tiny --rounds 1 --page_width 340 ;;
  *) exec {sys.executable} "$@" ;;
esac""",
        "ruff": f'exec {sys.executable} -m ruff "$@"',
    }
    for name, body in wrappers.items():
        (binaries / name).write_text(f"#!/bin/sh\n{body}\n")
        (binaries / name).chmod(0o755)
    for stamp in (".installed", ".installed-dev"):
        (copy / "venv" / stamp).touch()
    ended = subprocess.run(
        [*command.split(), "VENV=venv"],
        cwd=copy,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },  # without what `make test-all` hands on: a make within a make has a last line of its own
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    if "bench" in command:  # the JSON holds the ratios, the last line prints them, and the page is made from it
        last = json.loads(ended.stdout.splitlines()[-1])
        named = {"ratio_full", "ratio_full_shared", "ratio_frozen_shared", "memory_ratio", "ratio_preprocess"}
        assert last.keys() >= named | {"ratio_evaluate"}
        results = copy / "benchmarks" / "results"
        stored = json.loads((results / "cpu.json").read_text())
        assert {name: stored[name] for name in last} == last
        assert all(value > 0 for value in last.values())
        assert "| `ratio_full_shared` |" in render.render(results)
    if "soak" in command:
        assert "faults 1 recovered 1 bad inputs 0 clear 0" in ended.stdout, ended.stdout[-3000:]


@pytest.mark.parametrize("script", sorted(path.stem for path in REPOSITORY.glob("finetune_hf_trainer_*.py")))
def test_flash_attention_without_a_gpu(script, monkeypatch):
    """The option that the tests leave out: without a CUDA GPU it is refused before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script, "--use_flash_attention"])
    with pytest.raises(
        UserError, match="--use_flash_attention needs a CUDA GPU and there is none: leave the option out"
    ):
        importlib.import_module(script).parse()


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """A folder with what a full run and a LoRA run leave, named as the documents name them."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("--model_name_or_path", CHECKPOINT, "--data_dir", small["docvqa"], "--max_steps", 1, "--num_crops", 1)
    options += ("--save_steps", 1, "--eval_steps", 1, "--eval_limit", EVALUATED, "--report_to", "tensorboard")
    for name, extra in (("output", ()), ("output_lora", ("--use_lora", "--lora_rank", 4))):
        ended = run_script(
            "finetune_hf_trainer_docvqa.py", *options, "--output_dir", folder / name, *extra, processes=0
        )
        assert ended.returncode == 0, ended.stdout[-3000:]
    return folder


def test_rows_of_ones_own_become_a_file(tmp_path, monkeypatch):
    """The Python of docs/data.md."""
    (block,) = re.findall(r"```python\n(.*?)```", TEXTS["data.md"], flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pages").mkdir()
    Image.new("RGB", (30, 40), "red").save(tmp_path / "pages" / "1.png")
    exec(block, {})  # the page's own text
    (tmp_path / "pages" / "1.png").unlink()  # the file has the picture itself
    rows = docvqa.load_rows("train.parquet", "train", docvqa.LAYOUTS, "--train_data")
    assert docvqa.questions(rows[0]) == [("What is the date?\nAnswer briefly.", ["8 May", "May 8"])]
    assert docvqa.ask(rows, 0).turns[0].images[0].size == (30, 40)


@pytest.mark.long
def test_python_blocks(runs, tmp_path):
    """The Python of docs/serving.md, from top to bottom, on what the runs leave; the question is answered."""
    blocks = re.findall(r"```python\n(.*?)```", TEXTS["serving.md"], flags=re.DOTALL)
    assert len(blocks) == 3
    assert "```python" not in "".join(text for name, text in TEXTS.items() if name not in ("serving.md", "data.md"))
    Image.new("RGB", (336, 336), "white").save(tmp_path / "page.png")
    names = {}
    for block in blocks:
        block = block.replace("microsoft/Phi-3.5-vision-instruct", str(CHECKPOINT))
        block = block.replace('"page.png"', repr(str(tmp_path / "page.png")))
        block = re.sub(r'"(output\w*)"', lambda found: repr(str(runs / found[1])), block)
        exec(block, names)  # the page's own text
        assert names["model"].num_parameters() > 0
        assert names["processor"].image_processor.num_crops == 1
    prompt = names["inputs"]["input_ids"]
    assert torch.equal(names["generated"][:, : prompt.shape[1]], prompt)
    assert names["generated"].shape[1] > prompt.shape[1]


@pytest.mark.long
def test_files_of_a_run_are_listed(runs):
    """Every file that the runs leave is in the README's list, and all of the list is there, but for other runs'."""
    listing = re.search(r"<!-- listing -->(.*?)<!-- /listing -->", TEXTS["README.md"], flags=re.DOTALL)[1]
    patterns = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", listing, flags=re.MULTILINE)))
    files = [str(path.relative_to(run)) for run in runs.iterdir() for path in run.rglob("*") if path.is_file()]
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in patterns)] == []
    of_others = {"eval_only.json", "confusion_*.png", "model.safetensors.index.json", "bad_examples.jsonl"}
    assert {one for one in patterns if not any(fnmatch(file, one) for file in files)} == of_others
