"""The job files of `launch/`: what they ask for, and what they start, as two nodes on this machine.

Stand-ins take the place of Slurm (`scontrol`, `srun`) and of Azure (its environment variables): they start the two
nodes' commands side by side, one process each, over gloo.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from tests import small_data
from tests.commands import EVALUATED, REPOSITORY, shell_lines, shortening
from tests.launch import free_port, read_evaluation, read_log

SLURM = REPOSITORY / "launch" / "slurm.sbatch"
AZURE = REPOSITORY / "launch" / "azureml.yml"
README, PAGE = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/azure.md"))


def job():
    return yaml.safe_load(AZURE.read_text(encoding="utf-8"))


def torchrun_of_job():
    """The job's torchrun command, of its commands joined by &&."""
    return job()["command"].split("&& ")[-1]


# --- what the files ask for


def test_azure_job():
    """Keys and values that Azure's commandJob schema asks for; one process per node, which torchrun multiplies."""
    content = job()
    assert content["$schema"] == "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json"
    assert content["type"] == "command"
    assert content["compute"].startswith("azureml:")
    assert content["resources"]["instance_count"] >= 2
    assert content["distribution"] == {"type": "pytorch", "process_count_per_instance": 1}
    assert (AZURE.parent / content["code"]).resolve() == REPOSITORY
    assert set(re.findall(r"\$\{\{outputs\.(\w+)\}\}", content["command"])) == set(content["outputs"])
    for output in content["outputs"].values():  # a path of its own, for the next job to go on there
        assert output["mode"] == "rw_mount"
        assert output["path"].startswith("azureml://datastores/workspaceblobstore/paths/")
    python = next(one for one in content["environment"]["conda_file"]["dependencies"] if one.startswith("python="))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= (3, 11)
    install = shlex.split(content["command"].split("&& ")[0])
    assert install[:2] == ["pip", "install"]
    assert [name for name in install[2:] if name.endswith(".txt") and not (REPOSITORY / name).is_file()] == []


def published(command):
    """A command as the README has it: what is to be filled in stands in place of Azure's own names for it."""
    command = command.replace("$WORLD_SIZE", "<num_nodes>").replace("${{outputs.trained}}", "<output_dir>")
    return sorted(command.replace(" --no-tqdm", "").split())


def test_azure_job_runs_the_published_command():
    assert published(torchrun_of_job()) in [sorted(line.split()) for line in shell_lines(README)]


def test_slurm_asks_for_one_task_per_node():
    text = SLURM.read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    assert int(asked["nodes"]) >= 2
    assert asked["ntasks-per-node"] == "1"
    assert {"gpus-per-node", "cpus-per-task", "time"} <= set(asked)
    # Slurm reads no line beginning with #SBATCH once a command has come
    assert text.index("#SBATCH --output") < text.index("set -euo pipefail")
    subprocess.run(["bash", "-n", SLURM], check=True)


def test_slurm_without_a_script(tmp_path):
    ended = subprocess.run(["bash", SLURM], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "usage: sbatch launch/slurm.sbatch SCRIPT [OPTIONS]\n"


def test_the_page_names_the_files_as_they_are_used():
    lines = shell_lines(PAGE)
    azure = next(shlex.split(line.replace("<cluster>", "c")) for line in lines if line.startswith("az "))
    assert (REPOSITORY / azure[azure.index("--file") + 1]) == AZURE
    for setting in (azure[place + 1] for place, word in enumerate(azure) if word == "--set"):
        value = job()
        for key in setting.split("=")[0].split("."):
            value = value[key]
    slurm = next(line for line in lines if line.startswith("sbatch "))
    assert f"launch/{SLURM.name} finetune_" in slurm


# --- what they start


@pytest.fixture
def output(tmp_path):
    return tmp_path / "trained"


def shortened(tmp_path, output):
    """The options that shorten the published command."""
    words = shortening(["finetune_hf_trainer_hateful_memes.py"])
    data = small_data.write_hateful_memes(tmp_path)
    places = {"{hateful_memes}": str(data), "{out}/trained": str(output)}
    return [places.get(word, word) for word in words]


def environment(**values):
    """Without a GPU, for two nodes cannot share one; the environment's own `torchrun`."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **values}
    own["PATH"] = f"{os.path.dirname(sys.executable)}:{own['PATH']}"
    return own


def check_two_nodes(outputs, folder):
    """One run of two processes: both say so, and the batch of 64 is divided between them."""
    assert any("64 examples per step = 2 processes x 1 at once x 32 accumulated" in text for text in outputs), outputs
    assert read_evaluation(folder, "eval_after")["num_examples"] == EVALUATED
    assert [line["step"] for line in read_log(folder)] == [1]


@pytest.mark.long
def test_azure_command_on_two_nodes(tmp_path, output):
    """Each node with the variables that Azure sets: those of a process, which torchrun must not mistake for its own."""
    command = torchrun_of_job().replace("${{outputs.trained}}", str(output)).replace(" --use_flash_attention", "")
    assert "--nproc_per_node=8" in command
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=1")
    command += " " + shlex.join(shortened(tmp_path, output))
    port, nodes = str(free_port()), []
    for rank in ("0", "1"):
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": rank, "RANK": rank}
        variables |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        with open(tmp_path / f"node{rank}.log", "w") as log:
            nodes.append(
                subprocess.Popen(
                    ["bash", "-c", command], cwd=REPOSITORY, env=environment(**variables), stdout=log, stderr=log
                )
            )
    try:
        codes = [node.wait(timeout=1200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    outputs = [(tmp_path / f"node{rank}.log").read_text() for rank in ("0", "1")]
    assert codes == [0, 0], outputs
    check_two_nodes(outputs, output)


SRUN = """#!{python}
# Stand-in for srun: the command on two nodes, side by side; the first exit code that is not 0.
import json, os, subprocess, sys
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")][:2]
command = words[words.index("bash"):]
with open(os.environ["SRUN_SEEN"], "w") as file:
    json.dump({{"options": options, "given": words[words.index("torchrun") + 1:]}}, file)
nodes = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_NODEID": str(node), "SLURM_GPUS_ON_NODE": "1"}})
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
sys.exit(max(node.wait() for node in nodes))
"""


@pytest.mark.long
def test_slurm_batch_file_on_two_nodes(tmp_path, output):
    """The sbatch command of docs/azure.md: the file runs once, srun starts its torchrun on both nodes."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    stand_ins = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames here[1-2]" ] && printf "127.0.0.1\\nother\\n"\n',
    }
    for name, text in stand_ins.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    line = next(line for line in shell_lines(PAGE) if line.startswith("sbatch "))
    words = [word for word in shlex.split(line.replace("<output_dir>", str(output))) if word != "--use_flash_attention"]
    script = words[words.index(f"launch/{SLURM.name}") + 1 :]
    variables = {"SLURM_JOB_NODELIST": "here[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": str(free_port())}
    variables |= {"SLURM_CPUS_PER_TASK": "64", "SRUN_SEEN": str(tmp_path / "srun.json"), "VENV": sys.prefix}
    own = environment(**variables)
    own["PATH"] = f"{binaries}:{own['PATH']}"
    ended = subprocess.run(
        ["bash", SLURM, *script, *shortened(tmp_path, output)],
        cwd=REPOSITORY,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    seen = json.loads((tmp_path / "srun.json").read_text())
    assert seen["options"] == ["--kill-on-bad-exit=1", "--cpus-per-task=64"]
    # what the command says comes after, and so holds
    assert seen["given"][:4] == [script[0], "--grace_seconds", "160", script[1]]
    check_two_nodes([ended.stdout], output)
