"""`make demo` as a user starts it: learned, on held-out digits, and from the pictures alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.launch import REPOSITORY, read_evaluation

# Task -> metric, the most before training, the least after it, and what chance gives on shuffled pictures (of docvqa
# a random number of four digits). The built-in checkpoint is an interim one, and so is the least: 0.90 is the aim.
BARS = {"docvqa": ("anls", 0.30, 0.20, 0.05)}


@pytest.mark.long
@pytest.mark.parametrize("task", BARS)
def test_demo(task, tmp_path):
    metric, most_before, least_after, chance = BARS[task]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        ["make", "demo", f"TASK={task}", f"DEMO={tmp_path}", f"VENV={sys.prefix}", "--assume-old=install"],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3000,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    folder = tmp_path / task
    before, after = (read_evaluation(folder / "output", name)[metric] for name in ("eval_before", "eval_after"))
    shuffled = read_evaluation(folder / "output_shuffled", "eval_only")
    assert before <= most_before
    assert after >= max(least_after, before + 0.1)
    # 200 examples or more: three standard errors are 0.11 at most
    assert shuffled["num_examples"] >= 200
    assert shuffled[metric] == pytest.approx(chance, abs=0.11)
    print(json.dumps({"task": task, "before": before, "after": after, "shuffled": shuffled[metric]}))
