"""One thing is done to a real training run at a moment drawn from a seed; then the same command is started again.

    python -m tests.faults.harness --seeds 24 --output benchmarks/results/faults.json

A run is `torchrun` with two processes on the built-in checkpoint. The seed decides what is done (`KINDS` in turn), the
method and options (`CONFIGURATIONS`, each meets every kind), and the moment: one of the run's stretches, start-up to
final evaluation, and a place in it, by the time that the uninterrupted run of the same options took for it.

Demanded of every one: what kills ends every process of the run within a minute (a cut network, two minutes after the
processes' own limit), with an exit code that is not 0; the same command, at most three times, ends with code 0; then
the weights are the uninterrupted run's bit for bit, and so are the log of losses and the answers of the final
evaluation; no more steps are taken twice than `MOST_LOST` has.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.launch import free_port, start_logged

SCRIPT = "finetune_hf_trainer_docvqa.py"
STEPS, SAVE_STEPS, PROCESSES = 8, 3, 2
GONE_WITHIN = 60  # seconds
CUT_LIMIT = 60  # seconds, of --timeout_minutes: on a busy machine one process may well be half a minute behind
MOST_STARTS = 3
MARK = "FAULTS_START"  # in the environment of every process of a start

# Two steps an epoch, the second one short; checkpoint 3 lies within an epoch, checkpoint 6 at the end of one.
COMMON = ("--num_crops", 1, "--batch_size", 8, "--max_steps", STEPS, "--save_steps", SAVE_STEPS, "--logging_steps", 1)
COMMON += ("--warmup_steps", 2, "--num_workers", 1, "--eval_limit", 2, "--grace_seconds", 20, "--no-tqdm")
LORA = ("--use_lora", "--lora_rank", 4, "--learning_rate", "3e-3")
CONFIGURATIONS = {
    "full": ("--batch_size_per_gpu", 2),
    "lora": (*LORA, "--lora_dropout", 0.1, "--batch_size_per_gpu", 2),
    "frozen, pages shared": ("--freeze_vision_model", "--share_images", "--batch_size_per_gpu", 2),
    "qlora, packed": (*LORA, "--use_qlora", "--max_tokens_per_gpu", 700),
    "frozen": ("--freeze_vision_model",),
    "qlora": (*LORA, "--use_qlora", "--lora_dropout", 0.1),
}

# The stretches of a run, by what ends them; the last one ends with the run.
STRETCHES = ("start-up", "evaluation before", *(f"step {step}" for step in range(1, STEPS + 1)), "saving")
STRETCHES += ("evaluation after",)
FIRST_DAMAGE = STRETCHES.index(f"step {SAVE_STEPS + 2}")  # by then the first checkpoint is complete


class NotHeldError(Exception):
    """A run did not do what is demanded."""


class NotPossibleError(Exception):
    """This machine does not let it be done."""


# --- data and results


def write_pages(folder: Path) -> tuple[str, ...]:
    """Twelve pages with two or three questions each, and two to evaluate; the options that name them."""
    import datasets

    from common.demo import CHECKPOINT, write_docvqa

    mini = write_docvqa(folder / "mini", train_pages=12, test_pages=2, seed=4) / "data"
    endings = ("\nAnswer briefly.", " Say it.", " Give the number alone, please.")
    rows = [
        {
            "images": [row["image"]],
            "texts": [
                {"user": row["query"]["en"] + ending, "assistant": row["answers"][0] + "0" * place}
                for place, ending in enumerate(endings[: 2 + number % 2])
            ],
        }
        for number, row in enumerate(datasets.Dataset.from_parquet(str(mini / "train-00000-of-00001.parquet")))
    ]
    text = {name: datasets.Value("string") for name in ("user", "assistant")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(text)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    model = ("--model_name_or_path", str(CHECKPOINT))
    return (*model, "--train_data", str(folder / "train.parquet"), "--eval_data", str(mini))


def read(path: Path) -> Any:
    """A JSON file; an empty dictionary where there is none yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def losses(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log without times, speeds and memory."""
    try:
        lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # not there yet, or being written
        return []
    measured = re.compile(r".*(_per_second|_runtime|_share|_gb)|resumed_from_step")
    return [{name: value for name, value in line.items() if not measured.fullmatch(name)} for line in lines]


def steps_taken(folder: Path) -> int:
    """The steps of the log."""
    return max((line["step"] for line in losses(folder) if "loss" in line), default=0)


def weights(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of final weights."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def progress(folder: Path) -> int:
    """In which stretch a run is."""
    if not (folder / "run.json").exists():
        return 0
    stages = read(folder / "stages.json")
    if "save" in stages:
        return len(STRETCHES) - 1
    return 2 + steps_taken(folder) if "eval_before" in stages else 1


def checkpoints(folder: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    return sorted(int(path.parent.name.partition("-")[2]) for path in folder.glob("checkpoint-*[0-9]/manifest.json"))


@dataclass(frozen=True)
class Result:
    """What a finished run has left that has to be the same."""

    weights: dict[str, str]
    losses: list[dict[str, Any]]
    answers: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Result:
        """Of the run in a folder."""
        return cls(weights(folder), losses(folder), read(folder / "eval_after.json").get("examples", []))

    def check_same(self, folder: Path) -> None:
        """Demand the same of another folder.

        Raises:
            NotHeldError: naming what differs.
        """
        other = Result.of(folder)
        if other.losses != self.losses:
            pairs = zip(self.losses, other.losses, strict=False)
            first = next((f"{mine} there, {its} here" for mine, its in pairs if mine != its), "another length")
            raise NotHeldError(f"the logs of losses differ: {first}")
        if not self.weights or other.weights != self.weights:
            raise NotHeldError(f"other weights: {sorted(self.weights)} there, {sorted(other.weights)} here")
        if not self.answers or other.answers != self.answers:
            raise NotHeldError("other answers in the final evaluation")


# --- processes


class Start:
    """One start of a command: torchrun, its workers and theirs, known by a mark in their environment."""

    def __init__(self, command: Sequence[Any], log: Path) -> None:
        self.mark, self.log = f"{MARK}={uuid.uuid4().hex}", log
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= dict([self.mark.split("=")])
        self.process = start_logged(command, log, environment)
        self.began = time.monotonic()

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """All that are alive, whatever session they are in and whoever their parent is."""
        mark, found = self.mark.encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def worker(self, rank: int) -> int | None:
        """The process of a rank."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                its = f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if parent == self.process.pid and its:
                    return pid
        return None

    def running(self) -> bool:
        """Whether the first process, torchrun's, has not ended."""
        return self.process.poll() is None

    def finished(self) -> bool:
        """Whether it has come to the end of what a run does."""
        return "gain:" in self.text()

    def wait_gone(self, timeout: float, or_finished: bool = False) -> None:
        """Until no process is left.

        Args:
            or_finished: or until the run has nothing left to do but to end.

        Raises:
            NotHeldError: when some are after `timeout` seconds; then they are killed.
        """
        end = time.monotonic() + timeout
        while self.running() or self.processes():
            if or_finished and self.finished():
                return
            if time.monotonic() > end:
                left = [Path(f"/proc/{pid}/cmdline").read_bytes()[-60:] for pid in self.processes()]
                self.kill()
                raise NotHeldError(f"{len(left)} processes are left after {timeout:g} seconds: {left}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to all, until none is left."""
        while self.running() or self.processes():
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def wait(self, timeout: float = 900) -> int:
        """Its exit code; negative for a signal.

        Raises:
            NotHeldError: when it has not ended in time; then it is killed.
        """
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise NotHeldError(f"not ended after {timeout:g} seconds: {self.text()[-1000:]}") from error


@contextlib.contextmanager
def starting(command: Sequence[Any], log: Path) -> Iterator[Start]:
    """A start of which nothing is left afterwards."""
    start = Start(command, log)
    try:
        yield start
    finally:
        start.kill()


def command_for(configuration: str, pages: Sequence[str], folder: Path, network: str | None = None) -> list[Any]:
    """torchrun's command of a configuration that writes into `folder`; the same port at every start.

    Args:
        network: the name of that in which the processes are to be, with a time limit to notice a cut; None for the
            machine's own.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={PROCESSES}"]
    options = [*pages, *COMMON, *CONFIGURATIONS[configuration], "--output_dir", folder]
    if network is not None:
        launcher = ["ip", "netns", "exec", network, *launcher]
        options += ["--timeout_minutes", CUT_LIMIT / 60]
    return [*launcher, f"--master_port={free_port()}", SCRIPT, *options]


@dataclass(frozen=True)
class Reference:
    """A run that nothing was done to.

    Attributes:
        began: seconds from the start to the beginning of every stretch, and to the end.
    """

    result: Result
    began: list[float]

    def length(self, stretch: int) -> float:
        """A stretch's seconds."""
        return self.began[stretch + 1] - self.began[stretch]


class References:
    """The uninterrupted runs, each made when first asked for.

    Args:
        work: a folder for the data and the runs; it stays there.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.folder_of: dict[str, Path] = {}
        self._made: dict[str, Reference] = {}

    @functools.cached_property
    def pages(self) -> tuple[str, ...]:
        """The options that name model and data."""
        return write_pages(self.work / "pages")

    def __getitem__(self, configuration: str) -> Reference:
        if configuration not in self._made:
            folder = self.folder_of[configuration] = self.work / f"reference {configuration}"
            with starting(command_for(configuration, self.pages, folder), self.work / "reference.log") as start:
                began = [0.0]
                while start.running():
                    while len(began) <= progress(folder):
                        began.append(time.monotonic() - start.began)
                    time.sleep(0.03)
                began.append(time.monotonic() - start.began)
                if start.wait() != 0:
                    raise RuntimeError(f"the run without a fault failed: {start.text()[-3000:]}")
            if len(began) != len(STRETCHES) + 1:
                raise RuntimeError(f"the run went through {len(began) - 1} stretches, not {len(STRETCHES)}")
            self._made[configuration] = Reference(Result.of(folder), began)
        return self._made[configuration]


# --- faults


@dataclass
class Run:
    """A run that something is done to.

    Attributes:
        pause: seconds that a full disk stays full.
        network: the name of that in which its processes are; None for the machine's own.
    """

    start: Start
    folder: Path
    generator: random.Random
    pause: float
    network: str | None = None

    def newest_file(self) -> Path:
        """One of the files of the newest checkpoint, after the run was killed."""
        self.start.kill()
        newest = self.folder / f"checkpoint-{checkpoints(self.folder)[-1]}"
        return self.generator.choice(sorted(path for path in newest.rglob("*") if path.is_file()))


def kill_process(run: Run) -> None:
    """SIGKILL to one of torchrun's workers."""
    rank = run.generator.randrange(PROCESSES)
    while run.start.running() and (pid := run.start.worker(rank)) is None:
        time.sleep(0.03)
    if run.start.running():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_launcher(run: Run) -> None:
    """SIGKILL to torchrun: nobody tells its workers."""
    run.start.process.kill()


def terminate_launcher(run: Run) -> None:
    """SIGTERM to torchrun, which hands it on."""
    run.start.process.terminate()


def flip_byte(run: Run) -> None:
    """Kill the run; change a byte of its newest checkpoint."""
    path = run.newest_file()
    content = bytearray(path.read_bytes())
    content[run.generator.randrange(len(content))] ^= 1 << run.generator.randrange(8)
    path.write_bytes(content)


def truncate(run: Run) -> None:
    """Kill the run; cut a file of its newest checkpoint off."""
    path = run.newest_file()
    os.truncate(path, run.generator.randrange(path.stat().st_size))


def fill_disk(run: Run) -> None:
    """Write into the file system of the output folder until nothing more goes in, for a while."""
    filler = run.folder.parent / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    end = time.monotonic() + run.pause
    while run.start.running() and time.monotonic() < end:
        time.sleep(0.02)
    filler.unlink()


def cut_network(run: Run) -> None:
    """Take down the device by which the processes reach each other, until they have ended by themselves."""
    _ip("-n", run.network, "link", "set", "lo", "down")
    try:
        # a process that computes is late to wait, by as much as its share of an evaluation
        run.start.wait_gone(CUT_LIMIT + 2 * GONE_WITHIN, or_finished=True)
    finally:
        _ip("-n", run.network, "link", "set", "lo", "up")


KINDS: dict[str, Callable[[Run], None]] = {
    "process killed": kill_process,
    "torchrun killed": kill_launcher,
    "torchrun told to stop": terminate_launcher,
    "byte of the newest checkpoint flipped": flip_byte,
    "newest checkpoint truncated": truncate,
    "disk full": fill_disk,
    "network cut": cut_network,
}
DAMAGES = (flip_byte, truncate)
# Steps taken twice, at most: those since the last checkpoint, or since the one before it where that is damaged.
MOST_LOST = dict.fromkeys(KINDS, SAVE_STEPS) | {kind: 2 * SAVE_STEPS for kind in KINDS if KINDS[kind] in DAMAGES}
MOST_LOST["disk full"] = STEPS


def drawn(seed: int) -> tuple[str, str]:
    """Kind and configuration of a seed: both in turn, and as their numbers have no common divisor, every pair once."""
    kinds, configurations = list(KINDS), list(CONFIGURATIONS)
    return kinds[seed % len(kinds)], configurations[seed % len(configurations)]


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "300m") -> Iterator[Path]:
    """A file system of its own, in memory.

    Raises:
        NotPossibleError: where none can be mounted.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise NotPossibleError(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def own_network() -> Iterator[str]:
    """A network of its own, with nothing but the device by which its processes reach each other; its name.

    Raises:
        NotPossibleError: where none can be made.
    """
    name = f"phi3v-{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as stack:
        try:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("netns", "exec", name, "true")
        except (OSError, subprocess.CalledProcessError) as error:
            told = str(getattr(error, "stderr", None) or error).strip()
            raise NotPossibleError(f"no network namespace can be made here: {told}") from error
        yield name


def try_fault(seed: int, references: References, work: Path) -> dict[str, Any]:
    """Do what the seed says to a run, and start it again until it ends.

    Args:
        work: a folder for it that is not there yet.

    Returns:
        What was done when, steps reached and lost, `recovered`, and where not the `problem`; `left_out` where this
        machine does not let it be done.
    """
    kind, configuration = drawn(seed)
    found: dict[str, Any] = {"seed": seed, "kind": kind, "configuration": configuration}
    reference = references[configuration]
    place = small_disk(work) if kind == "disk full" else contextlib.nullcontext(work)
    own = own_network() if kind == "network cut" else contextlib.nullcontext()
    try:
        with place, own as network:
            work.mkdir(exist_ok=True)
            for attempt in range(10):  # a run may have ended before its moment came
                generator = random.Random(f"{seed}-{attempt}")
                folder = work / f"out{attempt}"
                command = command_for(configuration, references.pages, folder, network)
                if _inject(kind, command, folder, reference, generator, found, network):
                    return {**found, "recovered": True}
                shutil.rmtree(folder, ignore_errors=True)
            raise NotHeldError("ten times the run had ended before the moment drawn")
    except NotPossibleError as error:
        return {**found, "left_out": str(error)}
    except NotHeldError as error:
        return {**found, "recovered": False, "problem": str(error)}


def _inject(
    kind: str,
    command: Sequence[Any],
    folder: Path,
    reference: Reference,
    generator: random.Random,
    found: dict[str, Any],
    network: str | None,
) -> bool:
    """Whether the run was still there for it.

    Raises:
        NotHeldError: for what is demanded and was not so.
    """
    act = KINDS[kind]
    first, end = (FIRST_DAMAGE, STRETCHES.index("saving")) if act in DAMAGES else (0, len(STRETCHES))
    if act is cut_network:
        first = 1  # before, torchrun itself may be what waits, with a limit of its own
    stretch = generator.randrange(first, end)
    pause = generator.uniform(0, reference.length(stretch))
    found |= {"moment": STRETCHES[stretch], "after_seconds": round(pause, 2)}
    held = generator.uniform(0.5, 1.5) * SAVE_STEPS * reference.length(STRETCHES.index("step 2"))
    log = folder.parent / f"{folder.name}.log"
    with starting(command, log) as start:
        run = Run(start, folder, generator, held, network)
        while start.running() and progress(folder) < stretch:
            time.sleep(0.03)
        time.sleep(pause)
        if not start.running():
            return False
        began = time.monotonic()
        act(run)
        with contextlib.ExitStack() as stack:
            again = None
            if act is kill_launcher:  # at once, beside workers that nobody has told
                again = stack.enter_context(starting(command, folder.parent / f"{folder.name}.again.log"))
            if act is fill_disk:
                start.wait()
            else:
                start.wait_gone(GONE_WITHIN)
                found["gone_after_seconds"] = round(time.monotonic() - began, 1)
            code, reached, finished = start.wait(), steps_taken(folder), start.finished()
            if finished and act is not fill_disk:
                return False
            if code == 0 and not finished:
                raise NotHeldError(f"exit code 0, and not finished: {start.text()[-1000:]}")
            found["steps_reached"] = reached
            found |= {"exit_code": code, "starts": 0, "steps_lost": 0}
            if not finished:
                _start_again(kind, command, folder, again, progress(folder), found)
    reference.result.check_same(folder)
    if found["steps_lost"] > MOST_LOST[kind]:
        raise NotHeldError(f"{found['steps_lost']} steps were lost, at most {MOST_LOST[kind]} may be")
    return True


def _start_again(
    kind: str, command: Sequence[Any], folder: Path, again: Start | None, stretch: int, found: dict[str, Any]
) -> None:
    """The same command until it ends with code 0; counts starts and steps lost."""
    trained_from = steps_taken(folder) if stretch == len(STRETCHES) - 1 else None  # of a run that is saved none is lost
    for number in range(1, MOST_STARTS + 1):
        log = folder.parent / f"{folder.name}.{number}.log"
        with contextlib.nullcontext(again) if again and number == 1 else starting(command, log) as start:
            code, text = start.wait(), start.text()
        found["starts"] = number
        going_on = re.search(r"going on from \S*checkpoint-(\d+)", text)
        if trained_from is None and ("before training" in text):
            trained_from = int(going_on[1]) if going_on else 0
            found["resumed_from"] = trained_from
        if number == 1 and KINDS[kind] in DAMAGES and "is damaged and passed over" not in text:
            raise NotHeldError(f"nothing is said of the damaged checkpoint: {text[-1000:]}")
        if code == 0:
            found["steps_lost"] = max(0, found["steps_reached"] - trained_from)
            return
    raise NotHeldError(f"exit code {code} after {MOST_STARTS} starts: {text[-2000:]}")


# --- the command line


def main(words: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    import torch

    from benchmarks.measuring import describe_machine
    from tests.faults.bad_inputs import KINDS as BAD_INPUTS
    from tests.faults.bad_inputs import try_bad_input

    parser = argparse.ArgumentParser(prog="python -m tests.faults.harness", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first of them (%(default)s)")
    parser.add_argument("--bad_inputs", type=int, default=1, metavar="N", help="of each kind (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="also write the figures there")
    parser.add_argument("--keep", action="store_true", help="keep the figures of others that stand there")
    options = parser.parse_args(words)
    if options.keep and not options.output:
        parser.error("--keep is of --output")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whoever ends this leaves no run behind
    faults: list[dict[str, Any]] = []
    inputs: list[dict[str, Any]] = []
    seeds = range(options.first, options.first + options.seeds)
    date = time.strftime("%Y-%m-%d")
    if options.keep:
        there = read(options.output)
        begun = there.get("date", date).partition(" to ")[0]
        date = date if begun == date else f"{begun} to {date}"
        faults += [one for one in there.get("faults", []) if one["seed"] not in seeds]
        inputs += [one for one in there.get("bad_inputs", []) if one["number"] >= options.bad_inputs]

    def write() -> None:
        if options.output:
            about = {"machine": describe_machine(torch.device("cpu")), "date": date}
            about |= {"steps": STEPS, "save_steps": SAVE_STEPS, "processes": PROCESSES}
            in_order = sorted(faults, key=lambda one: one["seed"])
            options.output.write_text(json.dumps({**about, "faults": in_order, "bad_inputs": inputs}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as work:
        for number in range(options.bad_inputs):
            for kind in BAD_INPUTS:
                inputs.append(try_bad_input(kind, number, Path(work, f"bad input {len(inputs)}")))
                if not inputs[-1]["clear"]:
                    print(json.dumps(inputs[-1]), flush=True)
        write()
        references = References(Path(work))
        for seed in seeds:
            faults.append(try_fault(seed, references, Path(work, str(seed))))
            print(json.dumps(faults[-1]), flush=True)
            shutil.rmtree(Path(work, str(seed)), ignore_errors=True)
            write()
    tried = [one for one in faults if "left_out" not in one]
    recovered, clear = sum(one["recovered"] for one in tried), sum(one["clear"] for one in inputs)
    for one in faults:
        if "left_out" in one:
            print(f"left out: {one['kind']}, {one['configuration']}: {one['left_out']}")
    print(f"faults {len(tried)} recovered {recovered} bad inputs {len(inputs)} clear {clear}")
    return 0 if (recovered, clear) == (len(tried), len(inputs)) else 1


if __name__ == "__main__":
    sys.exit(main())
