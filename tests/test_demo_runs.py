"""`make demo` as a user starts it: learned, on held-out digits, and from the pictures alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.launch import REPOSITORY, read_evaluation

# Task -> metric, the most before training, the least after it, and what the score is on shuffled pictures: of docvqa
# a random number's of four digits, else chance. Before training the answers are mostly of another form, so that it
# may be less than chance.
BARS = {
    "docvqa": ("anls", 0.30, 0.90, 0.05),
    "hateful_memes": ("accuracy", 0.60, 0.90, 0.50),
    "nlvr2": ("accuracy", 0.60, 0.80, 0.50),
    "ucf101": ("accuracy", 0.35, 0.80, 0.25),
}


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
    last = (folder / "output" / "train_log.jsonl").read_text().splitlines()[-1]
    seconds = json.loads(last)["train_runtime"]
    scores = {"before": before, "after": after, "shuffled": shuffled[metric]}
    print(json.dumps({"task": task, **scores, "training_minutes": round(seconds / 60, 1)}))
