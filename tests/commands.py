"""The commands of the documents: found, shortened for a machine with two processor cores, and started.

Shortened means: the built-in checkpoint (made for one view of a page, so `--num_crops 1`), small data in the published
layouts, one step, four examples to evaluate, two processes on one node. All else is as the document has it. Where
there is no CUDA GPU `--use_flash_attention` is left out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from torch.distributed.run import get_args_parser

from common.demo import CHECKPOINT
from tests.launch import REPOSITORY, free_port, run_script

PROGRAMS = ("torchrun", "python", "make")
# What else the documents' shell blocks have, and why it is not run.
NOT_RUN = {
    "python3": "makes the environment that the tests run in",
    "source": "activates that",
    "pip": "fills it; the files that are named to it are looked at by test_installation_lines",
    "conda": "is not installed here; the version is looked at by test_installation_lines",
    "export": "changes the reader's own shell",
    "cp": "makes a script that a test of its own follows (test_commands_on_a_script_to_be_made_have_a_test)",
    "hf": "downloads from the hub, and tests need no network",
    "sbatch": "needs Slurm; tests/test_launch_files.py starts what it would start",
    "az": "needs Azure; tests/test_launch_files.py looks at the file",
    "vllm": "is not installed here and needs a GPU",
    "sglang": "is not installed here and needs a GPU",
    "curl": "asks vLLM's server",
}
PROCESSES = min(2, torch.cuda.device_count() or 2)  # NCCL takes one process per GPU
EVALUATED = 4
TASK = re.compile(r"finetune_hf_trainer_(\w+)\.py")

# What the reader of a document is to fill in.
FILLED_IN = {
    "<num_nodes>": "1",
    "$MASTER_ADDR": "127.0.0.1",
    "$MASTER_PORT": "{port}",
    "$NODE_RANK": "0",
    "<lr>": "1e-4",
    "<epochs>": "1",
    "<output_dir>": "{out}/trained",
    "/path/to/converted_ucf101": "{ucf101}",
    "/path/to/docvqa_1200_examples": "{docvqa}",
    "/path/to/Phi-3.5-vision-instruct": str(CHECKPOINT),
}
DATA = {
    "docvqa": ("--train_data", "{docvqa}", "--eval_data", "{docvqa}"),
    "hateful_memes": ("--data_dir", "{hateful_memes}"),
    "nlvr2": ("--data_dir", "{nlvr2}"),
    "ucf101": ("--data_dir", "{ucf101}"),
}
FULL_DOCVQA = ("--train_data", "{docvqa_full}", "--eval_data", "{docvqa}")


def documents() -> list[Path]:
    """Everything with commands for the reader."""
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def fenced_blocks(text: str) -> list[str]:
    """The fenced blocks of shell commands."""
    return re.findall(r"^ *```(?:bash|sh|console|shell)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


def shell_blocks(text: str) -> list[str]:
    """The fenced blocks of shell commands and the indented blocks, dedented."""
    fenced = fenced_blocks(text)
    without = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4,}\S.*\n)+", without, flags=re.MULTILINE)
    return [re.sub(r"^ +", "", block, flags=re.MULTILINE) for block in (*fenced, *indented)]


def shell_lines(text: str) -> list[str]:
    """The commands of all shell blocks: continuation lines joined, comments left out."""
    lines = "\n".join(shell_blocks(text)).replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^|\s)#.*", "", line.strip().removeprefix("$ ")) for line in lines)
    return [" ".join(line.split()) for line in stripped if line.strip()]


def programs_of(text: str) -> set[str]:
    """The program of each command in a document's fenced shell blocks, which may be of several lines in quotes.

    Raises:
        ValueError: for a quote that a block does not close.
    """
    found = set()
    for block in fenced_blocks(text):
        command = ""
        for line in block.replace("\\\n", " ").splitlines():
            command += f"{line}\n"
            with contextlib.suppress(ValueError):  # a quote goes on in the next line
                words = shlex.split(command, comments=True)
                found.update(list(itertools.dropwhile(re.compile(r"\w+=").match, words))[:1])
                command = ""
        if command:
            raise ValueError(f"a quote is not closed: {command}")
    return found


def spans(text: str) -> list[str]:
    """The inline code of a document; a span may go on in the next line."""
    without = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without)]


def commands(text: str) -> list[str]:
    """Every torchrun, python and make command of a document, in shell blocks and in running text."""
    found = [*shell_lines(text), *spans(text)]
    return [one for one in found if one.split()[0] in PROGRAMS and len(one.split()) > 1]


def scripts_to_be_made(text: str) -> set[str]:
    """The scripts that a document has its reader make, by `cp`; its commands on them run in a test of their own."""
    return {line.split()[-1] for line in shell_lines(text) if line.startswith("cp ") and line.endswith(".py")}


def shorten(command: str) -> list[str]:
    """A command -> the words to run, in which `{docvqa}`, `{docvqa_full}`, `{hateful_memes}`, `{nlvr2}`, `{ucf101}`,
    `{archive}`, `{videos}`, `{picture}`, `{adapter}`, `{run}`, `{out}` and `{port}` stand for folders, files and a
    number that `fill_in` knows.

    Raises:
        ValueError: for a placeholder that this function does not know.
    """
    for placeholder, value in FILLED_IN.items():
        command = command.replace(placeholder, value)
    unknown = re.findall(r"<[\w ]+>|\$\w+|/path/to\S*", command)
    if unknown:
        raise ValueError(f"nobody knows what to fill in for {unknown} in: {command}")
    words = shlex.split(command)
    if not torch.cuda.is_available():
        words = [word for word in words if word != "--use_flash_attention"]
    if words[0] == "torchrun":
        return shorten_training(words)
    if words[0] == "python" and "--help" not in words:
        return shorten_tool(words)
    return words


def shorten_training(words: list[str]) -> list[str]:
    """torchrun's own options, the script and its options, each as given, then what shortens it."""
    place = next(number for number, word in enumerate(words) if word.endswith(".py"))
    launcher = [word for word in words[1:place] if not word.startswith(("--nproc_per_node", "--nnodes"))]
    if not any(word.startswith("--master_port") for word in launcher):
        launcher.append("--master_port={port}")
    launcher += [f"--nproc_per_node={PROCESSES}", "--nnodes=1"]
    return ["torchrun", *launcher, *words[place:], *shortening(words[place:])]


def shortening(words: list[str]) -> list[str]:
    """The options that shorten a script's run; the last of two equal options counts."""
    task = TASK.fullmatch(words[0])[1]
    data = FULL_DOCVQA if task == "docvqa" and "--full_train" in words else DATA[task]
    output = [] if "{out}/trained" in words else ["--output_dir", "{out}/trained"]
    model = ["--model_name_or_path", str(CHECKPOINT), "--num_crops", "1"]
    return [*model, *data, *output, "--max_steps", "1", "--eval_limit", str(EVALUATED), "--num_workers", "1"]


def shorten_tool(words: list[str]) -> list[str]:
    """The converter, and what is run with `python -m`."""
    if TASK.fullmatch(words[1]):
        return [*words, *shortening(words[1:])]
    if words[1] == "convert_ucf101.py":
        if "--archive" in words:
            words[words.index("--archive") + 1] = "{archive}"
        elif "--video_dir" in words:
            words[words.index("--video_dir") + 1] = "{videos}"
        else:
            words += ["--archive", "{archive}"]
        return [*words, "--out_dir", "{out}/converted"]
    module = words[2] if words[1] == "-m" else words[1]
    if module == "tools.recipes":
        return shorten_recipe(words)
    if module == "tools.check_data":
        words[3] = "{ucf101}/ucf101_train.jsonl"
        words[words.index("--image_dir") + 1] = "{ucf101}/images"
        return [*words, "--model_name_or_path", str(CHECKPOINT)]
    if module == "tools.predict":
        small = {"--checkpoint": str(CHECKPOINT), "--image": "{picture}", "--data": "{ucf101}/ucf101_test.jsonl"}
        small |= {"--image_dir": "{ucf101}/images", "--output": "{out}/answers.jsonl"}
        replaced = [words[0], *(small.get(option, word) for option, word in itertools.pairwise(words))]
        return [*replaced, "--num_crops", "1", "--max_new_tokens", "4"]
    if module == "tools.report":
        return [*words[:3], "{run}"]
    if module == "tools.app":
        small = {"--checkpoint": "{adapter}", "--compare": str(CHECKPOINT)}
        replaced = [words[0], *(small.get(option, word) for option, word in itertools.pairwise(words))]
        return [*replaced, "--port", "{port}", "--num_crops", "1", "--max_new_tokens", "4"]
    if module == "tools.merge":
        return [*words[:3], "{adapter}", "{out}/merged", *words[5:]]
    if module == "common.demo" and words[3] == "data":
        return [*words, "--out", "{out}/data", "--train_pages", "2"]
    if module == "common.demo_pretrain":
        return [*words, "--out", "{out}/checkpoint", "--scale", "0.001"]
    if module == "tools.plan":
        return words if "--gpu_memory" in words else [*words, "--gpu_memory", "80"]
    if module == "benchmarks.communication":
        return words
    if module == "pytest":
        return [*words, "--collect-only", "-q"]  # what it would run is run beside this
    if module == "benchmarks.render":
        return [*words, "--output", "{out}/RESULTS.md"]
    if module == "benchmarks.memory":
        return [*words, "--rows", "10", "--out", "{out}/figures.json"]
    if module == "benchmarks.sharing_score":
        return [*words, "--seeds", "1", "--train_pages", "8", "--eval_limit", "4", "--output", "{out}/figures.json"]
    if module == "benchmarks.convert":
        return [*words, "--rounds", "1", "--videos", "2", "--output", "{out}/figures.json"]
    raise ValueError(f"nobody knows how to shorten: {shlex.join(words)}")


def shorten_recipe(words: list[str]) -> list[str]:
    """`run` with the row's script shortened; `table --update` on a copy of the README; `--check` as it is."""
    if "--check" in words:
        return words
    words = [*words[:3], "--results", "{out}/results", *words[3:]]
    if "run" in words:
        from tools.recipes import find, script_command

        name = words[words.index("run") + 1]
        script = script_command(*find(name))
        given = words[words.index("--") :] if "--" in words else ["--"]
        own = words[: words.index("--")] if "--" in words else words
        launcher = [f"--nproc_per_node={PROCESSES}", "--master_port={port}"]
        return [*own, *launcher, *given, *shortening(script)]
    if "--update" in words:
        return [*words, "--readme", "{out}/README.md"]
    return words


def fill_in(words: list[str], places: dict[str, Path | str]) -> list[str]:
    """The words with `{name}` replaced by `places[name]`, and `{port}` by a free port."""
    places = {**places, "port": str(free_port())}
    return [re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]), word) for word in words]


def as_processes(words: list[str], environment: dict[str, str] | None) -> tuple[list[str], dict[str, str]]:
    """The words with this Python in the place of the programs, and the environment to start them in."""
    programs = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "python": [sys.executable]}
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    for name in () if environment else ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        inherited.pop(name, None)
    return [*programs.get(words[0], [words[0]]), *words[1:]], inherited


def start(
    words: list[str], timeout: int = 1200, environment: dict[str, str] | None = None, fresh: bool = True
) -> subprocess.CompletedProcess:
    """Run a command from the repository's folder; its output as text, both streams together.

    Args:
        fresh: by the program that it names. Else torchrun's options are read by torchrun's own parser, and the script's
            processes, or the one of `python`, forked as `run_script` does.
    """
    if words[0] == "torchrun" and not fresh:
        given = get_args_parser().parse_args(words[1:])
        script, arguments = given.training_script, given.training_script_args
        return run_script(script, *arguments, processes=int(given.nproc_per_node), timeout=timeout)
    if words[0] == "python" and not fresh:
        return run_script(*words[1:], processes=0, timeout=timeout)
    command, inherited = as_processes(words, environment)
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=inherited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def serve(words: list[str], log: Path, timeout: int = 600) -> str:
    """Start a command that serves a page and does not end, wait until the page is there, and end it.

    Args:
        words: with `--port` and a number.
        log: where what it prints goes.

    Returns:
        The page.
    """
    command, inherited = as_processes(words, None)
    address = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    with (
        open(log, "w") as file,
        subprocess.Popen(
            command, cwd=REPOSITORY, env=inherited, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            for _ in range(timeout):
                assert server.poll() is None, f"it has ended with code {server.returncode}: {log.read_text()[-3000:]}"
                with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as page:
                    return page.read().decode()
                time.sleep(1)
            raise AssertionError(f"no page at {address} in {timeout} s: {log.read_text()[-3000:]}")
        finally:
            server.terminate()
