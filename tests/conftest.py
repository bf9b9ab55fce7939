"""Fixtures that several test files share, and the parity table at the end of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never reaches for the network
# Most tests are too small for several threads to help, and on a busy machine threads that wait for
# each other make them ten times slower. Set it to the number of idle cores to hasten the parity tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from common.phi3v import Phi3VForCausalLM
from tests.launch import WAIT
from tests.model_helpers import (
    PUBLISHED_NAMES,
    published_folder,
    write_golden_checkpoint,
    write_stand_in_checkpoint,
)

PARITY = "parity"
# The files that take longest, begun first: of several workers none is left with one of them at the end.
LONGEST = (
    *("test_readme", "test_faults", "test_demo_runs", "test_deepspeed_variants", "test_two_nodes", "test_recipes"),
    *("test_docvqa_methods", "test_resuming", "test_training_batches", "test_packed_training", "test_parity"),
    *("test_demo", "test_benchmarks", "test_plan", "test_evaluation", "test_watching", "test_nlvr2"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# The same examples in every run; no time limit for one, for the machine may be busy.
settings.register_profile("phi3v", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("phi3v")


def folder_or_skip(name: str) -> Path:
    folder = published_folder(name)
    if folder is None:
        pytest.skip(f"no {name} (config and tokenizer files) in $PHI3V_CHECKPOINTS or ../shared/checkpoints")
    return folder


@pytest.fixture(params=PUBLISHED_NAMES)
def published(request: pytest.FixtureRequest) -> Path:
    """Each published checkpoint's folder (its small files) in turn."""
    return folder_or_skip(request.param)


@pytest.fixture
def published_instruct() -> Path:
    """The folder of phi-3.5-vision-instruct."""
    return folder_or_skip("phi-3.5-vision-instruct")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a made-up tokenizer, for what holds with any tokenizer."""
    return write_stand_in_checkpoint(tmp_path_factory.mktemp("stand_in"))


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model on disk."""
    return write_golden_checkpoint(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def golden_eager(golden_folder: Path) -> Phi3VForCausalLM:
    """The golden model with the attention that the golden numbers were measured with."""
    return Phi3VForCausalLM.from_pretrained(golden_folder, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def golden_sdpa(golden_folder: Path) -> Phi3VForCausalLM:
    """The golden model with torch's attention."""
    return Phi3VForCausalLM.from_pretrained(golden_folder, attn_implementation="sdpa").eval()


@pytest.fixture
def within(request: pytest.FixtureRequest) -> Callable[[str, str, float, float], None]:
    """`within(case, quantity, worst, tolerance)`: assert, and put a line into the parity table."""

    def check(case: str, quantity: str, worst: float, tolerance: float) -> None:
        # kept with the test's report, so that the table is whole with pytest-xdist too
        request.node.user_properties.append((PARITY, [case, quantity, float(worst), tolerance]))
        assert worst <= tolerance, f"{case}, {quantity}: {worst:.3g} differs by more than {tolerance:.3g}"

    return check


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files in the order of `LONGEST`, the others after them as they were."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the parity tests measured: case, quantity, worst difference, tolerance."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
        for name, value in report.user_properties
        if name == PARITY
    ]
    if not rows:
        return
    terminalreporter.section("parity with the reference implementation")
    terminalreporter.write_line(f"{'case':<26} {'quantity':<36} {'worst difference':>16} {'tolerance':>10}")
    for case, quantity, worst, tolerance in rows:
        mark = "" if worst <= tolerance else "  FAILED"
        terminalreporter.write_line(f"{case:<26} {quantity:<36} {worst:>16.2e} {tolerance:>10.0e}{mark}")


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window; Playwright drives the installed one."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed (`apt-get install chromium`)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=WAIT)
        yield browser
        browser.close()
