"""The training step of every method, ours and the reference's, on made-up pages of DocVQA's kind.

    python -m benchmarks.throughput --size cpu --method full --num_crops 4 --compare reference single shared
    python -m benchmarks.throughput --size published --method qlora --variant single:recompute=full,tokens=8192

A variant is a way of taking the step, with its settings after a colon:

    reference     `benchmarks/baseline.py`: one question at a time, padded crops, logits of the whole sequence,
                  every layer recomputed
    single        ours, every question with its own picture
    shared        ours, all questions of a page in one sequence behind one picture

    recompute=    none (ours, the default), full (the reference's), selective (every second layer), decoder, tower:
                  which layers are run again in the backward pass instead of kept
    attention=    of one sequence a pass: sdpa (default), eager, flash_attention_2; where several are packed or share a
                  picture sdpa_by_document (default), sdpa (a dense mask), flex_attention, flash_attention_2
    kernels=      ours: none (default), liger, compiled: by Liger's kernels, by torch.compile
    tokens=N      ours: as many sequences as N tokens hold packed into one pass; 0 (default): one sequence a pass
    crops=N       ours: at most N crops through the tower at once; 0 (default): all

On a CPU the gradients that a variant has of all questions of one page are compared with the first one's before it is
timed, and must be equal in float32; on a GPU `benchmarks/agree.py` does that with a small model. The variants take
turns, A B A B, on the same pages; ratios are of the turns of one round. A turn is forward and backward passes
over `--pages_per_turn` pages, decoding and processing of the pictures included; the optimizer's step (gradient norm
included) is measured by itself and counted once for `--batch_size` questions. `--questions_per_page N` has one-question
ways ask only the first N of each page: their time per question does not depend on it. With `--num_workers` the workers
have begun with a turn's batches when its clock starts, as within an epoch. Batches are taken one by one, where the
Trainer takes a step's at once: a wait for a loader that has not all of them ready is not seen here, but in the log of
training (`data_wait_share`).

On a CPU a variant's peak of memory is measured in a process of its own (`--peak`), whose allocator gives back at once
what is freed: the peak is what was held, as a GPU's figures are, not what the allocator kept besides.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import is_flash_attn_2_available

from benchmarks import baseline
from benchmarks.measuring import (
    RESULTS,
    Gradients,
    MemoryPeak,
    Page,
    header,
    in_prompt,
    in_words,
    make_page,
    matrix_flops,
    print_table,
    spread,
    stopwatch,
    worst_difference,
    write_json,
)
from benchmarks.models import (
    METHODS,
    SIZES,
    count_parameters,
    make_model,
    make_processor,
    prepare,
    recomputed_layers,
    set_kernels,
    training_flops,
)
from common.collation import ANSWER_END, collate, encode_questions, pack, share_pictures
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import plan_layout
from common.phi3v.masks import BY_DOCUMENT
from common.phi3v.modeling import IGNORED_LABEL

WAYS = ("reference", "single", "shared")
RECOMPUTE = ("none", "full", "selective", "decoder", "tower")
KERNELS = ("none", "liger", "compiled")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention", BY_DOCUMENT)
STEP_ROUNDS = 3  # how often the optimizer's step is timed
# Relative, of one parameter's gradient: float32 sums in another order; found on a CPU are 3e-6.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Variant:
    """A way of taking the step, as its name says it; see the top of the file."""

    name: str
    way: str
    recompute: str
    attention: str
    kernels: str
    tokens: int
    crops: int

    @property
    def packs(self) -> bool:
        """Whether a pass is a packed row, not one sequence."""
        return self.way == "shared" or self.tokens > 0

    @classmethod
    def parse(cls, name: str) -> Variant:
        """`WAY:setting=value,setting=value` -> a variant.

        Raises:
            argparse.ArgumentTypeError: for a way, a setting or a value that there is not.
        """
        way, _, rest = name.partition(":")
        given = dict(setting.partition("=")[::2] for setting in rest.split(",") if setting)
        settings = {"recompute": "full" if way == "reference" else "none", "attention": "sdpa", "kernels": "none"}
        settings |= {"tokens": 0, "crops": 0}
        unknown = sorted(given.keys() - settings.keys())
        try:
            settings |= {key: type(settings[key])(value) for key, value in given.items() if key in settings}
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from error
        known = way in WAYS and settings["recompute"] in RECOMPUTE and settings["attention"] in ATTENTION
        known = known and settings["kernels"] in KERNELS
        if unknown or not known or (way == "reference" and given.keys() - {"recompute", "attention"}):
            raise argparse.ArgumentTypeError(f"there is no variant {name}: see --help")
        variant = cls(name=name, way=way, **settings)
        return replace(variant, attention=BY_DOCUMENT) if variant.packs and "attention" not in given else variant


@dataclass
class Turn:
    """What a variant did in one turn, and in how many seconds; `waiting` of them for data."""

    questions: int = 0
    pages: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waiting: float = 0.0


# --- passes


Work = list[tuple[Page, int]]  # pages of one pass, each with how many of its questions are shared, or which is asked


class Passes(torch.utils.data.Dataset):
    """The batches of a turn, each made when it is asked for: in the loader's workers, or between the passes."""

    def __init__(self, variant: Variant, processor: Phi3VProcessor, work: Sequence[Work]) -> None:
        self.variant, self.processor, self.work = variant, processor, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        documents = [one for page, asked in self.work[number] for one in self._documents(page, asked)]
        if self.variant.way == "reference":
            return documents[0]
        return pack(documents) if self.variant.packs else collate(self.processor, documents)

    def _documents(self, page: Page, asked: int) -> list[dict[str, Any]]:
        if self.variant.way == "shared":
            encoded = encode_questions(self.processor, page.examples(asked))
            return share_pictures(encoded, self.processor.image_token_id, rope_threshold=4096)
        example = page.examples(asked + 1)[asked]
        if self.variant.way == "reference":
            return [baseline.encode(self.processor, example)]
        return encode_questions(self.processor, [example])


def plan_passes(
    variant: Variant, processor: Phi3VProcessor, pages: Sequence[Page], questions_per_page: int | None
) -> list[Work]:
    """Which pages and questions go through the model together."""
    if variant.way == "shared":
        units = [(page, len(page.questions)) for page in pages]
    else:
        units = [(page, number) for page in pages for number in range(len(page.questions))[:questions_per_page]]
    if not variant.tokens:
        return [[unit] for unit in units]
    passes: list[Work] = []
    room = 0
    for page, asked in units:
        length = estimate_tokens(
            processor, page, page.questions[:asked] if variant.way == "shared" else page.questions[asked:][:1]
        )
        if length > room:
            passes.append([])
            room = variant.tokens
        passes[-1].append((page, asked))
        room -= length
    return passes


def estimate_tokens(processor: Phi3VProcessor, page: Page, asked: Sequence[tuple[str, str]]) -> int:
    """About the tokens of a page's picture and of some of its questions, without decoding the picture."""
    size = Image.open(io.BytesIO(page.image)).size
    picture = plan_layout(*size, processor.image_processor.num_crops).num_img_tokens
    texts = [f"{in_prompt(question)}<|end|>\n<|assistant|>\n{answer}{ANSWER_END}" for question, answer in asked]
    return picture + sum(len(processor.tokenizer(text).input_ids) for text in texts)


class Runner:
    """One model, prepared for one method, that takes the step in every variant's way."""

    def __init__(
        self, size: str, method: str, num_crops: int, device: torch.device, dtype: torch.dtype, num_workers: int = 0
    ) -> None:
        self.device, self.dtype, self.method, self.num_workers = device, dtype, method, num_workers
        self.processor = make_processor(num_crops)
        self.model = prepare(make_model(size, self.processor, device, dtype), self.processor, method)
        self.computed_by: tuple[Any, ...] = ("none",)  # kernels, and what decides on the layers that are compiled
        set_kernels(baseline.inner(self.model), *self.computed_by)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = make_optimizer(self.trained)
        self.step()  # makes the optimizer's state

    def configure(self, variant: Variant) -> None:
        """Set the model to a variant's settings."""
        model = baseline.inner(self.model)
        model.config._attn_implementation = variant.attention  # the decoder's; the tower has its own
        for name, layer in recomputed_layers(model):
            part, number = "tower" if "img_processor" in name else "decoder", int(name.rpartition(".")[2])
            every_second = variant.recompute == "selective" and number % 2 == 0  # as common/layers.py
            layer.gradient_checkpointing = every_second or variant.recompute in ("full", part)
        how_compiled = (variant.packs, variant.recompute) if variant.kernels == "compiled" else ()
        computed_by = (variant.kernels, *how_compiled)
        if computed_by != self.computed_by:
            self.computed_by = ("none",)  # also where the others cannot be had
            set_kernels(model, variant.kernels, variant.packs)
            self.computed_by = computed_by
        model.model.vision_embed_tokens.img_processor.max_crops_per_call = variant.crops or None

    def step(self) -> None:
        """Clip the gradient, let the optimizer take its step, and set the gradient to 0."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """To 0."""
        for parameter in self.trained:
            parameter.grad.zero_()

    def gradients(self) -> Gradients:
        """Every trained parameter's, by its name."""
        return {name: one.grad for name, one in self.model.named_parameters() if one.requires_grad}

    def step_seconds(self) -> float:
        """The optimizer's step, the best of three."""
        times = []
        for _ in range(STEP_ROUNDS):
            with stopwatch(self.device) as seconds:
                self.step()
            times += seconds
        return min(times)

    def backward(self, variant: Variant, batch: dict[str, torch.Tensor]) -> None:
        """A batch's forward and backward pass; the gradients add up to those of the sum of all questions' losses."""
        questions = count_questions(batch)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        with self.autocast():
            loss = baseline.loss(self.model, batch) if variant.way == "reference" else self.model(**batch).loss
        (loss * questions).backward()

    def autocast(self) -> contextlib.AbstractContextManager:
        """As the scripts: adapters in float32 over weights in bfloat16 compute in bfloat16."""
        if self.method in ("lora", "qlora") and self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def turn(self, variant: Variant, pages: Sequence[Page], questions_per_page: int | None = None) -> Turn:
        """Forward and backward over some pages."""
        self.configure(variant)
        work = plan_passes(variant, self.processor, pages, questions_per_page)
        done = Turn(pages=len(pages))
        loader = torch.utils.data.DataLoader(
            Passes(variant, self.processor, work),
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context="fork" if self.num_workers else None,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        if self.num_workers:  # the workers' start is an epoch's, not a step's
            first = next(batches)
            batches = chain_first(first, batches)
        taken = []
        with stopwatch(self.device) as seconds:
            for _ in work:  # and no further: the workers' end is an epoch's, too
                began = time.perf_counter()
                batch = next(batches)
                done.waiting += time.perf_counter() - began
                self.backward(variant, batch)
                taken.append({name: tensor for name, tensor in batch.items() if name != "pixel_values"})
        for batch in taken:
            done.questions += count_questions(batch)
            done.tokens += batch["input_ids"].numel()
            done.flops += training_flops(self.model, self.method, batch)
        done.seconds = seconds[0]
        return done


def chain_first(first: Any, rest: Any) -> Any:
    """An iterator with its first element put back."""
    yield first
    yield from rest


def count_questions(batch: dict[str, torch.Tensor]) -> int:
    """Answers in a batch: stretches of labelled positions."""
    labelled = batch["labels"][0] != IGNORED_LABEL
    return int((labelled[1:] & ~labelled[:-1]).sum())


def make_optimizer(parameters: list[torch.nn.Parameter]) -> Any:
    """AdamW as the scripts set it; half-precision weights have float32 masters, as under ZeRO."""
    arguments = {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.01}
    if parameters[0].dtype == torch.float32:
        return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda, **arguments)
    return MasterAdamW(parameters, arguments)


class MasterAdamW:
    """AdamW on float32 copies of half-precision weights, one by one: never a float32 copy of all gradients."""

    def __init__(self, parameters: list[torch.nn.Parameter], arguments: dict[str, Any]) -> None:
        self.parameters = parameters
        self.masters = [parameter.detach().float() for parameter in parameters]
        self.optimizers = [torch.optim.AdamW([master], fused=master.is_cuda, **arguments) for master in self.masters]

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        for parameter, master, optimizer in zip(self.parameters, self.masters, self.optimizers, strict=True):
            master.grad = parameter.grad.float()
            optimizer.step()
            master.grad = None
            parameter.copy_(master)


# --- measurement


def compare(
    runner: Runner,
    variants: Sequence[Variant],
    options: argparse.Namespace,
    about: dict[str, Any],
    output: Path | None = None,
) -> dict[str, Any]:
    """Turns in the order A B A B; a variant that runs out of memory or is not to be had is left out, and why is told.

    Every variant's first turn, which compiles what there is to compile, is followed by its turn of the first round (on
    a GPU on the same pages: what the first one took longer is its start-up). With `--seconds` no other round is begun
    that would not end in time, and no variant's first turn after `--seconds_of_first_turns`.

    Args:
        about: what the result says besides.
        output: where it is written whenever there is more of it: a run that is stopped leaves what it had.

    Returns:
        Per variant its figures, or `left_out`; ratios to the first variant's questions per second; and `about`.
    """
    began = time.perf_counter()
    step_seconds = runner.step_seconds()
    ceiling = matrix_flops(runner.device, runner.dtype)
    running: dict[Variant, list[Turn]] = {}
    figures: dict[str, dict[str, Any]] = {variant.name: {"left_out": "not begun"} for variant in variants}
    memory, on_gpu = MemoryPeak(runner.device), runner.device.type == "cuda"
    wanted: Gradients = {}
    pages = [make_page(number, options.page_size) for number in range(options.rounds * options.pages_per_turn)]
    rounds = [pages[start :: options.rounds] for start in range(options.rounds)]

    def take_turn(variant: Variant, number: int) -> None:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(runner.device)
        running[variant].append(runner.turn(variant, rounds[number], options.questions_per_page))
        figures[variant.name] |= describe(running[variant], step_seconds, options.batch_size, ceiling)
        if on_gpu:  # later rounds have other pages
            figures[variant.name]["peak_gb"] = max(figures[variant.name]["peak_gb"], gigabytes(memory.total()))

    def leave_out(variant: Variant, error: Exception) -> None:
        running.pop(variant, None)
        figures[variant.name] = {"left_out": " ".join(str(error).split())[:200]}
        print(f"left out: {variant.name}: {figures[variant.name]['left_out']}", flush=True)

    def report() -> dict[str, Any]:
        result = {
            **about,
            "variants": figures,
            "first": next(iter(running)).name if running else None,
            "times_as_fast_as_the_first": compare_turns(running, step_seconds, options),
            "rounds": max(map(len, running.values()), default=0),
            "optimizer_step_seconds": round(step_seconds, 4),
            "matrix_tflops": round(ceiling / 1e12, 3),
        }
        if output is not None:
            write_json(output, result)
        return result

    for variant in variants:
        # a first turn by itself compiles what there is to compile; a GPU shows the peak, a CPU compares gradients
        runner.clear_gradients()
        try:
            if variant.attention == "flash_attention_2" and not is_flash_attn_2_available():
                raise RuntimeError("flash-attn is not installed")
            if variant.attention == "flex_attention" and runner.device.type == "cpu":
                raise RuntimeError("FlexAttention has no backward pass on a CPU")
            if running and time.perf_counter() - began > options.seconds_of_first_turns:
                raise RuntimeError("no time left")
            memory.start()
            with stopwatch(runner.device) as first:
                if on_gpu:
                    runner.turn(variant, rounds[0], options.questions_per_page)
                else:
                    runner.turn(variant, pages[:1])
            figures[variant.name] = {"peak_gb": gigabytes(memory.total())} if on_gpu else {}
            if not on_gpu:
                figures[variant.name] |= compare_gradients(runner, variant, wanted)
            running[variant] = []
            with stopwatch(runner.device) as second:
                take_turn(variant, 0)
            if on_gpu:  # on a CPU the first turn was another
                figures[variant.name]["start_up_seconds"] = start_up(*first, *second)
        except (RuntimeError, ImportError) as error:  # torch.OutOfMemoryError is a RuntimeError
            leave_out(variant, error)
        result = report()
    for number in range(1, options.rounds):
        runner.step()
        length = sum(turns[-1].seconds for turns in running.values())
        if time.perf_counter() - began + length > options.seconds:
            break
        for variant in list(running):
            try:
                take_turn(variant, number)
            except RuntimeError as error:
                runner.clear_gradients()
                leave_out(variant, error)
        print(f"{runner.method}: round {number + 1} of {options.rounds}", flush=True)
        result = report()
    return result


def start_up(first_seconds: float, second_seconds: float) -> float:
    """What a turn took longer the first time than the second, in seconds; 0 where it did not."""
    return figure(max(0.0, first_seconds - second_seconds))


def compare_turns(
    running: dict[Variant, list[Turn]], step_seconds: float, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Every variant's questions per second by the first one's, turn by turn."""
    rates = {variant: [rate(turn, step_seconds, options) for turn in turns] for variant, turns in running.items()}
    first, *others = rates or [None]
    return {
        other.name: spread([one / two for one, two in zip(rates[other], rates[first], strict=True)]) for other in others
    }


def compare_gradients(runner: Runner, variant: Variant, wanted: Gradients) -> dict[str, Any]:
    """What the first variant's gradient is, or how far this one's is from it.

    Args:
        wanted: the first variant's, which puts it there.

    Raises:
        ArithmeticError: in float32, gradients that are not the same: what follows would not be the same work.
    """
    found = runner.gradients()
    if not wanted:
        wanted |= {name: gradient.clone() for name, gradient in found.items()}
        return {}
    difference, parameter = worst_difference(found, wanted)
    if runner.dtype == torch.float32 and not difference <= TOLERANCE:
        raise ArithmeticError(f"{variant.name}: the gradient of {parameter} is another by {difference:.2g}, relatively")
    return {"gradient_difference": figure(difference)}


def rate(turn: Turn, step_seconds: float, options: argparse.Namespace) -> float:
    """Questions per second, the optimizer's step included."""
    return turn.questions / (turn.seconds + step_seconds * turn.questions / options.batch_size)


def describe(turns: Sequence[Turn], step_seconds: float, batch_size: int, ceiling: float) -> dict[str, Any]:
    """A variant's figures over all turns."""
    total = Turn(*(sum(getattr(turn, name) for turn in turns) for name in Turn.__dataclass_fields__))
    seconds = total.seconds + step_seconds * total.questions / batch_size
    return {
        "questions_per_second": figure(total.questions / seconds),
        "tokens_per_second": figure(total.tokens / seconds),
        "tokens_per_question": figure(total.tokens / total.questions),
        "questions_per_page": figure(total.questions / total.pages),
        "model_tflops": figure(total.flops / seconds / 1e12),
        "model_flop_utilisation": figure(total.flops / seconds / ceiling),
        "share_waiting_for_data": figure(total.waiting / seconds),
        "turn_seconds": [figure(turn.seconds) for turn in turns],
    }


def figure(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def gigabytes(count: int) -> float:
    return round(count / 1e9, 3)


def measure_peak(runner: Runner, variant: Variant, options: argparse.Namespace) -> float:
    """Bytes above weights, gradients and optimizer state in one page's passes, the second time they are run."""
    page, memory = [make_page(0, options.page_size)], MemoryPeak(runner.device)
    for _ in range(2):
        memory.start()
        runner.turn(variant, page, questions_per_page=1)
    return memory.above()


def peak_in_own_process(variant: Variant, options: argparse.Namespace) -> float:
    """`measure_peak` in a process that has run nothing else, in GB."""
    settings = ("size", "method", "num_crops", "dtype", "device", "page_width")
    arguments = [f"--{name}={getattr(options, name)}" for name in settings]
    command = [sys.executable, "-m", "benchmarks.throughput", *arguments, "--variant", variant.name, "--peak"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # glibc's
    folder = Path(__file__).parent.parent
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    if ended.returncode:
        raise RuntimeError(f"the peak of {variant.name} could not be measured:\n{ended.stderr[-2000:]}")
    return gigabytes(json.loads(ended.stdout.splitlines()[-1])["peak_above_bytes"])


def measure(options: argparse.Namespace, output: Path | None = None) -> dict[str, Any]:
    """Everything that the options ask for, as the JSON holds it; `output` as in `compare`."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    about = header(device)
    runner = Runner(options.size, options.method, options.num_crops, device, dtype, options.num_workers)
    about |= {
        "method": options.method,
        "size": options.size,
        "dtype": options.dtype,
        "parameters": count_parameters(runner.model),
        "num_crops": options.num_crops,
        "page_size": options.page_size,
        "batch_size": options.batch_size,
        "pages_per_turn": options.pages_per_turn,
    }
    result = compare(runner, options.compare, options, about, output)
    del runner
    if device.type == "cpu" and options.peaks:
        for variant in options.compare:
            if "left_out" not in result["variants"][variant.name]:
                result["variants"][variant.name]["peak_above_gb"] = peak_in_own_process(variant, options)
    return result


def print_result(result: dict[str, Any]) -> None:
    """The table."""
    rows = []
    for name, figures in result["variants"].items():
        if "left_out" in figures:
            rows.append([name, "left out", *[""] * 6])
            continue
        ratio = result["times_as_fast_as_the_first"].get(name)
        peak = figures.get("peak_gb", figures.get("peak_above_gb", ""))
        rows.append(
            [
                name,
                figures["questions_per_second"],
                figures["tokens_per_second"],
                figures["tokens_per_question"],
                f"{figures['model_flop_utilisation']:.0%}",
                peak,
                f"{figures['share_waiting_for_data']:.1%}",
                in_words(ratio) if ratio else "",
            ]
        )
    where = "peak GB" if "gpu" in result["machine"] else "peak GB above weights, gradients, optimizer"
    names = ("questions/s", "tokens/s", "tokens/question", "of the matrix ceiling", where, "waiting for data")
    print(f"\n{result['method']} fine-tuning, {result['size']} size, num_crops={result['num_crops']}")
    print_table(["variant", *names, f"times as fast as {result['first']}"], rows)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="published" if on_gpu else "cpu")
    parser.add_argument("--method", choices=METHODS, default="full")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--compare", nargs="+", type=Variant.parse, metavar="VARIANT", help="the first is compared with")
    which.add_argument("--variant", type=Variant.parse, default=Variant.parse("shared"), help="one alone (shared)")
    parser.add_argument("--num_crops", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant (%(default)s)")
    parser.add_argument("--pages_per_turn", type=int, default=8 if on_gpu else 2, help="(%(default)s)")
    parser.add_argument("--questions_per_page", type=int, metavar="N", help="asked by one-question ways (all)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="about the most it may take (no limit)")
    parser.add_argument("--seconds_of_first_turns", type=float, metavar="N", help="of these (half)")
    parser.add_argument("--batch_size", type=int, default=64, help="questions per optimizer step (%(default)s)")
    parser.add_argument("--page_width", type=int, default=1700, help="pixels; 1.29 times as high (%(default)s)")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--num_workers", type=int, default=8 if on_gpu else 0, help="of the loader (%(default)s)")
    parser.add_argument("--no-peaks", dest="peaks", action="store_false", help="no peaks of memory on a CPU")
    parser.add_argument("--peak", action="store_true", help="only the peak of --variant, in bytes")
    parser.add_argument("--output", type=Path, help="JSON (results/throughput_METHOD.json)")
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed, with `compare` a list and `page_size` in pixels."""
    options = make_parser().parse_args(arguments)
    options.compare = options.compare or [options.variant]
    options.page_size = (options.page_width, round(options.page_width * 2200 / 1700))
    if options.seconds_of_first_turns is None:
        options.seconds_of_first_turns = options.seconds / 2
    options.output = options.output or RESULTS / f"throughput_{options.method}.json"
    return options


def main() -> None:
    options = parse_options()
    if options.peak:
        device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        runner = Runner(options.size, options.method, options.num_crops, device, dtype)
        print(json.dumps({"peak_above_bytes": measure_peak(runner, options.variant, options)}))
        return
    result = measure(options, options.output)
    print_result(result)
    write_json(options.output, result)


if __name__ == "__main__":
    main()
