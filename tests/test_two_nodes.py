"""Two nodes whose cable is pulled: the run ends within its time limit, and goes on when the cable is back.

The nodes are two network namespaces of this machine, joined by a pair of virtual devices, and share its disk. gloo
learns of a cut only by waiting; the limit is `--timeout_minutes`, for every group of processes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.demo import CHECKPOINT, write_docvqa
from tests.launch import read_log, run_script, start_logged

SCRIPT = "finetune_hf_trainer_docvqa.py"
STEPS, LIMIT = 8, 120  # seconds: on a busy machine one may well be a minute behind the other
ADDRESSES = ("10.203.77.1", "10.203.77.2")
METHODS = {
    "zero2": ("--learning_rate", "5e-4"),
    "ddp": ("--use_lora", "--lora_rank", 8, "--learning_rate", "1e-3"),
}
TELLING = re.compile(r"Timed out|will restart worker group|going on from|restart_count=|local_ranks=|processes x|gain:")
pytestmark = pytest.mark.long


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def delete(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def nodes():
    """Two namespaces with a device `cable` each."""
    names = [f"phi3v-{os.getpid()}-{node}" for node in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        delete(names)
        pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', '') or error}")
    yield names
    delete(names)


class Node:
    """One node's torchrun, its output in a file."""

    def __init__(self, name: str, number: int, log: Path, *arguments: object) -> None:
        self.log = log
        launcher = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        launcher += ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={number}", "--max_restarts=1"]
        launcher += [f"--master_addr={ADDRESSES[0]}", "--master_port=29400"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable", "LOGLEVEL": "INFO"}
        self.process = start_logged([*launcher, SCRIPT, *arguments], log, environment)

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """End it and, as torchrun does when it is told to, its process."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


def wait_until(happened, running: list[Node], seconds: float) -> float:
    """Wait for something; how long it took."""
    began = time.monotonic()
    while not happened():
        for node in running:
            assert node.process.poll() is None, node.text()[-4000:]
        assert time.monotonic() - began < seconds, [node.text()[-4000:] for node in running]
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.parametrize("method", METHODS)
def test_cable_is_pulled(nodes, tmp_path, method, capsys):
    data = write_docvqa(tmp_path / "pages", train_pages=16, test_pages=2, seed=1)
    folder = tmp_path / "out"
    options = (
        *("--model_name_or_path", CHECKPOINT, "--data_dir", data, "--num_crops", 1, "--batch_size", 4),
        *("--batch_size_per_gpu", 2, "--max_steps", STEPS, "--warmup_steps", 2, "--logging_steps", 1),
        *("--num_workers", 1, "--eval_limit", 2, "--save_steps", 2, "--timeout_minutes", LIMIT / 60, "--no-tqdm"),
        *METHODS[method],
    )
    both = []
    try:
        for number, name in enumerate(nodes):
            log = tmp_path / f"node_{number}.log"
            both.append(Node(name, number, log, *options, "--output_dir", folder))
        wait_until((folder / "checkpoint-2").is_dir, both, 1200)
        ip("-n", nodes[1], "link", "set", "cable", "down")
        pulled = time.monotonic()

        def all_ended():
            return all("will restart worker group" in node.text() for node in both)

        wait_until(all_ended, both, LIMIT + 300)
        noticed = time.monotonic() - pulled
        steps_done = len(read_log(folder))
        ip("-n", nodes[1], "link", "set", "cable", "up")
        for node in both:
            node.process.wait(1200)
    finally:
        for node in both:
            node.end()
    for number, node in enumerate(both):
        with capsys.disabled():
            for line in node.text().splitlines():
                if TELLING.search(line):
                    print(f"{method} node {number}: {line[:230]}")
    assert [node.process.returncode for node in both] == [0, 0], [node.text()[-4000:] for node in both]
    # what it takes besides: the step under way, the process's end, and the machine's own slowness
    assert LIMIT - 1 < noticed < LIMIT + 60
    assert any(re.search(rf"Timed out waiting {LIMIT * 1000}ms", node.text()) for node in both)
    assert f"going on from {folder}/checkpoint-" in both[0].text()
    assert steps_done < STEPS
    ended = run_script(SCRIPT, *options, "--output_dir", tmp_path / "uninterrupted", timeout=1800)
    assert ended.returncode == 0, ended.stdout[-4000:]
    file = "adapter_model.safetensors" if method == "ddp" else "model.safetensors"
    expected, own = (load_file(path / file) for path in (tmp_path / "uninterrupted", folder))
    assert [name for name in expected if not torch.equal(expected[name], own[name])] == []
