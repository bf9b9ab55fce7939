"""Errors: those that are the user's to mend, one line and no traceback, and how a process ends that has one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

# torchrun ends all processes when one has ended, and shows the error that was written down first.
SECONDS_TO_END = 15  # a process with an error is gone by then, whatever hangs on its way out
SECONDS_FOR_THE_FIRST = 20  # and by then torchrun has ended those that only lost their connection to it

# How a lost connection reads where it is no error of a kind of its own.
LOST = re.compile(r"gloo|Connection (closed|reset) by peer|Broken pipe|NCCL (error|communicator)", re.IGNORECASE)
NO_MEMORY = re.compile(
    # the last: of a loader's worker, by the system
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|killed by signal: Killed",
    re.IGNORECASE,
)
# of a loader's workers, whose batches travel through /dev/shm: how torch tells that it is full
NO_SHARED_MEMORY = re.compile(r"shared memory|</torch_\d+")
LOOKING = "looking"
SHARED_MEMORY = "/dev/shm"
SHARES_MORE = ("a larger one: of a container docker run --shm-size 16g, or --ipc host", "--num_workers 0, or fewer")
MOST_PROBLEMS = 20  # of examples, in one message
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

_options: argparse.Namespace | None = None
_longest: dict[str, int] = {}
_undo: Callable[[], None] | None = None
_fetches = True


class UserError(ValueError):
    """Something in the options, the data or the checkpoint; its message says what, where and what to do.

    A loader's worker process hands an error on as a text with its traceback; the last line of that
    text is the message as it was raised, and that is what is kept.

    Args:
        everywhere: raised on every process alike, so that the first one tells.
        problems: where the message lists several, each of them.
    """

    def __init__(self, message: str, everywhere: bool = False, problems: Sequence[str] = ()) -> None:
        prefix = f"{type(self).__module__}.{type(self).__name__}: "
        lines = message.strip().splitlines() or [""]
        super().__init__(lines[-1].removeprefix(prefix) if prefix in message else message)
        self.everywhere = everywhere
        self.problems = tuple(problems) or (str(self),)


class NotLookedAtError(UserError):
    """What needs a fetch, or an option that is wrong, while something is known to be wrong; no problem by itself."""

    def __init__(self) -> None:
        super().__init__("not looked at")
        self.problems = ()


class RightOptions(argparse.Namespace):
    """Of wrong options those that are right; a check that needs another one comes to nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotLookedAtError


class OptionsError(UserError):
    """What is wrong with the options; what checks of the checkpoint and the data may rely on is in `options`."""

    options: RightOptions


class _More(str):
    """How many more problems there are than are listed."""

    number: int


class NotWrittenError(OSError):
    """Something could not be written, as on a full disk, or read; raised on every process."""


def is_first_process() -> bool:
    """True on the one process that prints and writes, also before the processes are joined."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def say(text: str) -> None:
    """Print on the first process."""
    if is_first_process():
        print(text, flush=True)


def rank_and_world() -> tuple[int, int]:
    """This process and how many are joined."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def raise_all(problems: Sequence[str], everywhere: bool = False) -> None:
    """Raise one `UserError` that lists every problem; nothing where there is none.

    Args:
        everywhere: as of `UserError`.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(problems[0], everywhere)
    listed = "\n".join(f"  - {problem}" for problem in problems)
    number = sum(getattr(problem, "number", 1) for problem in problems)
    raise UserError(f"{number} problems:\n{listed}", everywhere, problems)


def try_all(*calls: Callable[[], Any]) -> tuple[Any, ...]:
    """What each call returns.

    Those that fetch something from a hub come last, and only if nothing is wrong with the others: such a call is begun
    twice.

    Raises:
        UserError: with the problems of all calls that raise one.
    """
    global _fetches
    returned: dict[int, Any] = {}
    raised: dict[int, UserError] = {}
    may_fetch, waiting = _fetches, list(range(len(calls)))
    try:
        for _fetches in (False, True) if may_fetch else (False,):
            for number in waiting:
                raised.pop(number, None)
                try:
                    returned[number] = calls[number]()
                except UserError as error:
                    raised[number] = error
                    _fetches &= isinstance(error, NotLookedAtError)
            waiting = sorted(raised)
            if any(error.problems for error in raised.values()):
                break
    finally:
        _fetches = may_fetch
    if raised:
        problems = dict.fromkeys(problem for number in waiting for problem in raised[number].problems)
        if not problems:
            raise raised[waiting[0]]
        raise_all(list(problems), everywhere=all(error.everywhere for error in raised.values() if error.problems))
    return tuple(returned[number] for number in range(len(calls)))


def first_of(problems: Sequence[str], of: str = "", advice: str = "", most: int = MOST_PROBLEMS) -> list[str]:
    """The first problems of many examples, and a line for how many more there are.

    Args:
        of: the examples' file or data set.
        advice: where all of them are shown.
    """
    if len(problems) <= most:
        return list(problems)
    number = len(problems) - most
    more = _More(f"and {number} more" + (f" of {of}" if of else " examples") + (f": {advice}" if advice else ""))
    more.number = number
    return [*problems[:most], more]


def note_options(options: argparse.Namespace) -> None:
    """Remember a run's options, for what is said when memory runs out."""
    global _options
    _options = options


def note_longest(tokens: int, answer_tokens: int, views: int) -> None:
    """Remember the sizes of the longest example looked at, if any was, for what is said when memory runs out."""
    if tokens:
        _longest.update(tokens=tokens, answer_tokens=max(1, answer_tokens), views=views)


def command_to_go_on() -> str:
    """By which command a run that ended goes on from what it has saved: the same, without what begins elsewhere."""
    if _options is not None and _options.overwrite:
        return "the same command without --overwrite"
    if _options is not None and _options.resume != "auto":
        return f"the same command without --resume {_options.resume}"
    return "the same command"


def undo_on_failure(undo: Callable[[], None]) -> None:
    """Remember what the first process is to do when a script ends with an error."""
    global _undo
    _undo = undo


def about_to_fetch() -> None:
    """Called before anything is fetched from a hub.

    Raises:
        NotLookedAtError: while something is known to be wrong, which is told before minutes go by.
    """
    if not _fetches:
        raise NotLookedAtError


def run(main: Callable[[], None], *checks: Callable[[argparse.Namespace], Any]) -> None:
    """Run a script's `main`; torchrun's summary shows the error that came first, of whichever process.

    A `UserError` ends the script with exit code 2 and its message alone; so does a `NotWrittenError` that nothing
    else was done about. Until the processes are joined all of a node's find the same fault and its first one tells;
    later the one that found it does.
    Where memory runs out, what to change is said below the traceback.

    Args:
        checks: functions of the options that raise a `UserError` for what they find. `main` calls the first ones, in
            this order, once they are parsed. Where the options are wrong, or one of these raises, the later ones are
            asked, too, so that all is told at once; of what they would fetch nothing is.
    """

    def main_or_undo() -> None:
        try:
            main()
        except Exception:
            if _undo is not None and is_first_process():
                with contextlib.suppress(OSError):
                    _undo()
            raise

    @record
    def guarded() -> None:
        try:
            main_or_undo()
        except (UserError, NotWrittenError) as error:
            if isinstance(error, NotWrittenError):
                remedy = f"see that there is room on that disk and that it works, then start {command_to_go_on()} again"
                error = UserError(f"{error}: {remedy}", everywhere=True)
            if not dist.is_initialized():
                _wait_for_the_one_that_tells()
            if _tells(error):
                error = _with_later_problems(error, checks)
                print(f"error: {error}", file=sys.stderr, flush=True)
            _end(str(error), 2)
        except Exception as error:
            if is_out_of_memory(error):
                traceback.print_exc()
                advice = f"process {rank_and_world()[0]}: {advise(error, _options)}"
                print(f"error: {advice}", file=sys.stderr, flush=True)
                _end(advice, 1)
            if comes_of_another(error):
                time.sleep(SECONDS_FOR_THE_FIRST)
            _end_in_time()
            raise

    with contextlib.redirect_stdout(_Shown(sys.stdout)), contextlib.redirect_stderr(_Shown(sys.stderr)):
        guarded()


class _Shown:
    """A stream of what is only shown: a run does not end because it cannot be, as in a file on a full disk."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _with_later_problems(error: UserError, checks: Sequence[Callable[[argparse.Namespace], Any]]) -> UserError:
    """The same error, with what those of the checks find that come after the one that raised it."""
    global _fetches
    raised_in = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    begun = [number for number, check in enumerate(checks, start=1) if check.__code__ in raised_in]
    options = error.options if isinstance(error, OptionsError) else _options
    if not begun and not isinstance(error, OptionsError):
        return error  # of another step
    problems = list(error.problems)
    _fetches = False
    for check in checks[max(begun, default=0) :]:
        try:
            check(options)
        except UserError as later:
            problems += later.problems
        except Exception:  # which comes of what is wrong already
            continue
    _fetches = True
    problems = list(dict.fromkeys(problems))
    if len(problems) == len(error.problems):
        return error
    try:
        raise_all(problems, error.everywhere)
    except UserError as whole:
        return whole


def _wait_for_the_one_that_tells() -> None:
    """Before the processes are joined a node's first one looks at the rest, and would be ended by another's end.

    It leaves a mark beside the file for torchrun's summary, which each has in a folder of its own; its end ends these.
    """
    if not (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        return
    rank, began = os.environ.get("LOCAL_RANK", "0"), time.monotonic()
    mark = Path(file).parent.with_name("0") / LOOKING
    if rank == "0":
        mark.touch()
    while rank != "0" and (mark.exists() or time.monotonic() - began < SECONDS_FOR_THE_FIRST):
        time.sleep(0.1)


def _tells(error: UserError) -> bool:
    if dist.is_initialized():
        return not error.everywhere or is_first_process()
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _end(message: str, code: int) -> None:
    """Leave a message for torchrun's summary, as `record` does with a traceback."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}))
    _end_in_time()
    sys.exit(code)


def _end_in_time() -> None:
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process without Python's help
        signal.alarm(SECONDS_TO_END)


def comes_of_another(error: Exception) -> bool:
    """Whether an error may be nothing but the end of another process."""
    return rank_and_world()[1] > 1 and (isinstance(error, dist.DistError) or bool(LOST.search(str(error))))


# --- out of memory


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, a GPU's or the machine's, or what its processes share."""
    told = str(error)
    by_name = NO_MEMORY.search(told) or NO_SHARED_MEMORY.search(told)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(by_name)


def shared_memory_in_words() -> str:
    """How large what a loader's workers hand their batches over in is, and how much of it is free."""
    disk = shutil.disk_usage(SHARED_MEMORY)
    return f"{SHARED_MEMORY} has {disk.total / 1e9:.2f} GB, of which {disk.free / 1e9:.2f} GB are free"


def advise(error: Exception, options: argparse.Namespace | None) -> str:
    """What was asked for, what was held, and what to change of the options, with their present values."""
    text = str(error)
    if NO_SHARED_MEMORY.search(text):
        return "\n".join(
            [f"out of shared memory: {shared_memory_in_words()}. What helps:", *(f"  - {one}" for one in SHARES_MORE)]
        )

    def gigabytes(pattern: str) -> float | None:
        found = re.search(pattern.replace("N", r"([\d.]+) (bytes|[KMGT]iB)"), text)
        return float(found[1]) * UNITS[found[2]] / 1e9 if found else None

    asked = gigabytes(r"(?:ried|nable) to allocate N")
    size, free = gigabytes("total capacity of N"), gigabytes("of which N is free")
    held, unused = gigabytes("this process has N"), gigabytes("N is reserved by PyTorch but unallocated")
    on_gpu = not isinstance(error, MemoryError) and not re.search("CPUAllocator|MemoryError|DataLoader worker", text)
    if size is None and on_gpu and torch.cuda.is_available():
        size, held = torch.cuda.get_device_properties().total_memory / 1e9, torch.cuda.memory_reserved() / 1e9
    if not on_gpu:
        page = os.sysconf("SC_PAGE_SIZE")
        size = os.sysconf("SC_PHYS_PAGES") * page / 1e9
        held = int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e9
    figures = {"{:.2f} GB were asked for": asked, "this process held {:.2f} GB": held}
    figures |= {"of which {:.2f} GB were reserved and unused": unused, "{:.2f} GB were free": free}
    figures |= {f"the {'GPU' if on_gpu else 'machine'} has {{:.1f}} GB": size}
    told = "out of memory: " + ", ".join(form.format(value) for form, value in figures.items() if value is not None)
    if options is None:
        return told
    evaluating = options.eval_only or any(
        frame.filename == str(Path(__file__).with_name("evaluation.py"))
        for frame in traceback.extract_tb(error.__traceback__)
    )
    names = ("batch_size_per_gpu", "max_tokens_per_gpu", "num_crops", "gradient_checkpointing")
    names = ("eval_batch_size_per_gpu", "num_crops") if evaluating else names
    given = " ".join(f"--{name} {getattr(options, name)}" for name in names if getattr(options, name) is not None)
    told += f". This was {'evaluation' if evaluating else options.method + ' fine-tuning'} with {given}"
    found = list(remedies(options, evaluating)) if on_gpu or str(options.device) == "cpu" else []
    if unused is not None and asked is not None and unused > asked:
        found.insert(0, "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment, against fragments")
    if on_gpu:
        found.append(f"what fits is shown by {_plan(options, size)}")
    else:
        if options.num_workers > 0:
            made = "no batches are made ahead, the step waits for each"
            found.append(f"--num_workers 0 instead of {options.num_workers} ({made})")
        if (here := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
            found.append(f"--nproc_per_node {here // 2} instead of {here}")
    return f"{told}. What needs less memory:\n" + "\n".join(f"  - {remedy}" for remedy in found)


def _plan(options: argparse.Namespace, size: float | None) -> str:
    """The command that estimates this run; what `tools.plan` is to search is left out."""
    from .memory import Setting, tokens_of_a_row  # which imports this module

    words = f"python -m tools.plan --gpu_memory {'N' if size is None else round(size)} --gpus {options.num_processes}"
    words += f" --method {options.method} --batch_size {options.batch_size} --num_crops {options.num_crops}"
    words += " --bf16" if options.bf16 else ""
    if os.path.isfile(os.path.join(options.model_name_or_path, "config.json")):
        words += f" --model_name_or_path {shlex.quote(options.model_name_or_path)}"
    if options.method in ("lora", "qlora"):
        words += f" --lora_rank {options.lora_rank}" + (" --freeze_vision_model" if options.freeze_vision_model else "")
    words += " --torch_compile" if options.torch_compile else ""
    if options.packs:
        words += f" --max_tokens_per_gpu {tokens_of_a_row(options, _longest.get('tokens', Setting.tokens))}"
    if _longest:
        images = max(1, -(-_longest["views"] // (options.num_crops + 1)))
        words += f" --tokens {_longest['tokens']} --answer_tokens {_longest['answer_tokens']} --images {images}"
    return words


def remedies(options: argparse.Namespace, evaluating: bool) -> Iterator[str]:
    """Options that need less memory, those first that change no result."""

    def smaller(name: str, value: int, because: str = "") -> str:
        return f"--{name} {value} instead of {getattr(options, name)}{because}"

    crops = "--max_crops_per_call 4 instead of all of a batch's"
    if evaluating:
        if options.eval_batch_size_per_gpu > 1:
            yield smaller("eval_batch_size_per_gpu", options.eval_batch_size_per_gpu // 2)
        if options.max_crops_per_call is None:
            yield crops
    else:
        if options.gradient_checkpointing != "full":
            yield f"--gradient_checkpointing full instead of {options.gradient_checkpointing}"
        at_once = options.batch_size_per_gpu
        if options.max_tokens_per_gpu is not None:
            yield smaller("max_tokens_per_gpu", options.max_tokens_per_gpu // 2, " (the step stays the same)")
        elif at_once > 1:  # of which the batch stays a multiple
            divisor = max(size for size in range(1, at_once) if at_once % size == 0)
            yield smaller("batch_size_per_gpu", divisor, " (the step stays the same)")
        # else all that the tower's layers keep lives at once, whatever goes through them at once
        bounds = options.gradient_checkpointing == "full" and not options.freeze_vision_model
        if options.max_crops_per_call is None and bounds:
            yield crops
        if options.method in ("full", "frozen"):
            if not options.deepspeed and str(options.device) != "cpu":
                yield "--deepspeed ds_configs/zero2_offload.json, which keeps the optimizer's state off the GPU"
            yield f"--use_lora instead of {options.method} fine-tuning"
    if options.method in ("lora", "qlora") and not options.bf16 and str(options.device) != "cpu":
        yield "--bf16 (Ampere or newer), with which the weights beside the adapters are not kept in float32"
    if options.method == "lora" and not evaluating:
        yield "--use_qlora instead of --use_lora"
    if options.num_crops > 1:
        yield smaller("num_crops", options.num_crops // 2, " (less detail of a picture)")
