"""A build of DeepSpeed's extensions that was killed: its lock is found, and taken away when nobody holds it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from common import extensions
from common.extensions import LOCK, folders_of, wait_for_builds
from common.training import EXTENSIONS
from tests.faults.harness import COMMON, write_pages
from tests.launch import run_script

NAME = "deepspeed_shm_comm"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "INTERVAL", 0.02)
    return Path(cpp_extension._get_build_directory(NAME, False))


def leave_lock(folder: Path, seconds: float) -> Path:
    """As a build that was killed some seconds ago."""
    (folder / LOCK).touch()
    then = time.time() - seconds
    for path in (folder / LOCK, folder):
        os.utime(path, (then, then))
    return folder / LOCK


def test_names_are_deepspeed_s():
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder

    assert set(EXTENSIONS) == {CPUAdamBuilder.NAME, ShareMemCommBuilder.NAME}


def test_folders_are_pytorch_s(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders_of([NAME]) == []
    assert folders_of([NAME]) == [] != [Path(cpp_extension._get_build_directory(NAME, False))]
    assert folders_of([NAME, "cpu_adam"]) == [Path(cpp_extension._get_build_directory(NAME, False))]


def test_a_lock_that_was_left_is_removed(folder, capsys):
    lock = leave_lock(folder, seconds=1000)
    wait_for_builds([NAME])
    assert not lock.exists()
    assert capsys.readouterr().out == f"removed {lock}, which a build that was ended has left\n"
    wait_for_builds([NAME])
    assert capsys.readouterr().out == ""


def test_a_lock_of_now_is_given_time(folder, capsys):
    lock = leave_lock(folder, seconds=0)
    began = time.monotonic()
    wait_for_builds([NAME], patience=0.5)
    assert time.monotonic() - began >= 0.4
    assert not lock.exists()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"waiting for DeepSpeed's extension {NAME} until {lock} is gone, or until nothing")
    assert second.startswith(f"removed {lock}")


def test_who_builds_is_waited_for(folder, capsys):
    """However long nothing changes: a large file is compiled."""
    baton = FileBaton(str(folder / LOCK))
    assert baton.try_acquire()
    leave_lock(folder, seconds=1000)
    threading.Timer(0.5, baton.release).start()
    wait_for_builds([NAME])
    text = capsys.readouterr().out
    assert "removed" not in text
    assert text.endswith("is gone, another process builds it\n")


def test_the_machine_s_first_process_removes(folder, monkeypatch, capsys):
    lock = leave_lock(folder, seconds=1000)
    monkeypatch.setenv("LOCAL_RANK", "1")
    waiting = threading.Thread(target=wait_for_builds, args=([NAME],), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert lock.exists()
    lock.unlink()
    waiting.join(10)
    assert not waiting.is_alive()
    assert capsys.readouterr().out == ""


def test_run_after_a_killed_build(tmp_path, monkeypatch):
    """It would have waited for ever. What was built elsewhere is used where it is there: a build takes a minute."""
    built = Path(cpp_extension._get_build_directory(NAME, False))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    folder = Path(shutil.copytree(built, tmp_path / "extensions" / NAME, ignore=shutil.ignore_patterns(LOCK)))
    lock = leave_lock(folder, seconds=1000)
    pages = write_pages(tmp_path / "pages")
    options = (*COMMON, "--batch_size_per_gpu", 2, "--max_steps", 1, "--output_dir", tmp_path / "out")
    ended = run_script("finetune_hf_trainer_docvqa.py", *pages, *options, processes=1)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert f"removed {lock}, which" in ended.stdout
