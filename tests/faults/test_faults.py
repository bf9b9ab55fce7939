"""Runs to which one thing is done at a random moment; inputs that no run can use. See harness.py and bad_inputs.py."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks import render
from tests.faults import bad_inputs, harness
from tests.faults.harness import CONFIGURATIONS, KINDS, MOST_LOST, References, drawn, try_fault
from tests.launch import REPOSITORY, free_port
from tools.recipes import with_tables

SHORT, ALL = 4, 20  # `make soak` takes more


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize(
    "seed", [*range(SHORT), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(SHORT, ALL))]
)
def test_fault(seed, references, tmp_path):
    found = try_fault(seed, references, tmp_path / "run")
    if "left_out" in found:
        pytest.skip(found["left_out"])
    print(json.dumps(found))
    assert found["recovered"], found["problem"]
    assert found["steps_lost"] <= MOST_LOST[found["kind"]]


def test_processes_end_with_torchrun_while_they_import(tmp_path):
    """Whatever they are doing: here they have nothing but `common`, and would sleep for ten minutes."""
    script = tmp_path / "script.py"
    (tmp_path / "common").symlink_to(REPOSITORY / "common")
    script.write_text("import common, time\nprint('imported', flush=True)\ntime.sleep(600)\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={harness.PROCESSES}"]
    with harness.starting([*launcher, f"--master_port={free_port()}", script], tmp_path / "log") as start:
        while start.text().count("imported") < harness.PROCESSES:
            assert start.running(), start.text()
            time.sleep(0.05)
        start.process.kill()
        start.wait_gone(harness.GONE_WITHIN)


def test_every_kind_meets_every_configuration():
    met = {drawn(seed) for seed in range(len(KINDS) * len(CONFIGURATIONS))}
    assert len(met) == len(KINDS) * len(CONFIGURATIONS)
    assert {kind for kind, _ in map(drawn, range(len(KINDS)))} == set(KINDS)


def test_a_kind_that_is_not_possible_here_is_left_out(monkeypatch, tmp_path):
    """Said by the harness and below the table."""
    seed = list(KINDS).index("network cut")
    references = {drawn(seed)[1]: None}
    monkeypatch.setenv("PATH", str(tmp_path))  # without `ip`
    found = try_fault(seed, references, tmp_path / "run")
    assert found["left_out"].startswith("no network namespace can be made here: ")
    (tmp_path / "faults.json").write_text(json.dumps({"faults": [found] * 2, "bad_inputs": []}))
    page = render.reliability_tables(tmp_path)["faults"]
    assert page.count("Left out: network cut (no network namespace can be made here: ") == 1


@pytest.mark.parametrize("kind", bad_inputs.KINDS)
def test_bad_input(kind, tmp_path):
    found = bad_inputs.try_bad_input(kind, 0, tmp_path / "input")
    assert found["clear"], found


def test_a_result_that_differs_is_told(tmp_path):
    """Else nothing here could fail."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "train_log.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens_per_second": 7}\n')
        (tmp_path / name / "eval_after.json").write_text('{"examples": [{"generated": "5"}]}')
    result, other = harness.Result.of(tmp_path / "one"), tmp_path / "other"
    (other / "train_log.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens_per_second": 8}\n')
    result.check_same(other)
    for name, content, message in (
        ("train_log.jsonl", '{"step": 1, "loss": 2.6}\n', "losses"),
        ("model.safetensors", "weighs", "weights"),
        ("eval_after.json", '{"examples": [{"generated": "6"}]}', "answers"),
    ):
        kept = (other / name).read_bytes()
        (other / name).write_text(content)
        with pytest.raises(harness.NotHeldError, match=message):
            result.check_same(other)
        (other / name).write_bytes(kept)


def test_the_page_holds_what_was_measured():
    text = render.RELIABILITY.read_text(encoding="utf-8")
    made = with_tables(text, render.reliability_tables(render.RESULTS), render.RELIABILITY)
    assert made == text, "python -m benchmarks.render mends it"
