"""What the figures stand on: the reference way is as described, ours is the same work, the page holds the JSON.

Nothing is timed here. Models are tiny, pages small.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import finetune_hf_trainer_docvqa as docvqa
from benchmarks import (
    agree,
    baseline,
    cpu,
    demos,
    evaluate,
    measuring,
    optimizers,
    render,
    scaling,
    sharing_score,
    throughput,
)
from benchmarks.models import adapter_flops, make_model, make_processor, quantize, training_flops
from benchmarks.throughput import Runner, Variant, plan_passes
from common.data import load_rows, number_pictures
from common.demo import CHECKPOINT
from common.phi3v import Phi3VImageProcessor
from common.phi3v.modeling import Phi3VModel
from tests.launch import REPOSITORY

CPU = torch.device("cpu")
# A grid of 2 x 1 where 3 are allowed, and of 3 x 1 where 6 are: the reference pads by one crop and by two. A full grid
# of 2 x 2 of 4.
STRIP, LETTER = (500, 180), (340, 440)


TINY = "--size tiny --device cpu --dtype float32 --num_crops 1 --page_width 340"


def tiny_runner(method: str = "full", num_crops: int = 3, dtype: torch.dtype = torch.float64) -> Runner:
    runner = Runner("tiny", method, num_crops, CPU, dtype)
    agree.draw_weights(runner.model)
    return runner


# --- the reference's way


@pytest.mark.parametrize(("size", "num_crops"), [(STRIP, 6), (LETTER, 4), ((180, 600), 6)])
def test_reference_crops(size: tuple[int, int], num_crops: int) -> None:
    """Ours, bit for bit, and zeros up to `num_crops + 1`."""
    picture = measuring.decode(measuring.make_page(0, size).image)
    found, ours = baseline.process_picture(picture, num_crops), Phi3VImageProcessor(num_crops=num_crops)(picture)
    crops = ours["pixel_values"]
    assert found["pixel_values"].shape == (1, num_crops + 1, 3, 336, 336)
    assert torch.equal(found["pixel_values"][0, : len(crops)], crops)
    assert not found["pixel_values"][0, len(crops) :].any()
    for name in ("image_sizes", "num_img_tokens"):
        assert torch.equal(found[name], ours[name])


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("full", ("single", "single:tokens=1000", "shared:tokens=4000,recompute=full,crops=2")),
        ("frozen", ("shared",)),
        ("lora", ("shared:recompute=selective",)),
    ],
)
def test_reference_gradients_are_ours(method: str, names: tuple[str, ...]) -> None:
    """Every parameter's, in float64 to 1e-9 (found: 2e-14), with padding crops, packed and shared."""
    runner = tiny_runner(method)
    pages = [
        dataclasses.replace(measuring.make_page(number, STRIP), questions=measuring.QUESTIONS[number : number + 2])
        for number in range(2)
    ]
    wanted = agree.gradients(runner, "reference", pages)  # eager attention would round to float32
    assert all(gradient.any() for gradient in wanted.values())
    for name in names:
        difference, parameter = measuring.worst_difference(agree.gradients(runner, name, pages), wanted)
        assert difference < 1e-9, (name, parameter)


def test_reference_does_what_it_is_said_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding crops and the unused layer run, every layer twice, logits of every position; ours does none of it."""
    runner = tiny_runner(dtype=torch.float32)
    tower = runner.model.model.vision_embed_tokens.img_processor.vision_model
    seen: dict[str, list[int]] = {"crops": [], "last layer": [], "first layer": [], "head": []}

    def note(name: str, module: torch.nn.Module, batch_dimension: int) -> None:
        forward = module.forward

        def noting(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[name].append(states.shape[batch_dimension])
            return forward(states, *args, **kwargs)

        monkeypatch.setattr(module, "forward", noting)

    note("crops", tower.embeddings, 0)
    note("first layer", tower.encoder.layers[0].layer_norm1, 0)
    note("last layer", tower.encoder.layers[-1].layer_norm1, 0)
    runner.model.lm_head.register_forward_pre_hook(lambda _, inputs: seen["head"].append(inputs[0].shape[-2]))
    page = [measuring.make_page(0, STRIP)]
    done = runner.turn(Variant.parse("reference"), page, questions_per_page=1)
    assert (seen["crops"], seen["head"]) == ([4], [done.tokens])
    assert seen["first layer"] == [4, 4]
    assert len(seen["last layer"]) == 1  # nothing reads it, so nothing runs it again
    for calls in seen.values():
        calls.clear()
    runner.turn(Variant.parse("shared"), page)
    assert (seen["crops"], seen["first layer"], seen["last layer"]) == ([3], [3], [])
    assert seen["head"][0] < 100


def test_answers_are_the_reference_s() -> None:
    arguments = f"{TINY} --rounds 2 --new_tokens 6"
    result = evaluate.measure(evaluate.make_parser().parse_args(arguments.split()))
    assert result["same_answers"] == "8 of 8"
    assert result["times_as_fast"]["smallest"] > 0


# --- what is measured


def test_passes_hold_every_question_once() -> None:
    processor = make_processor(4)
    pages = [measuring.make_page(number, LETTER) for number in range(8, 11)]
    assert [len(page.questions) for page in pages] == [4, 3, 4]

    def units(name: str, questions_per_page: int | None = None) -> list[list[tuple[int, int]]]:
        work = plan_passes(Variant.parse(name), processor, pages, questions_per_page)
        return [[(pages.index(page), asked) for page, asked in one] for one in work]

    assert units("single") == [[(page, k)] for page, count in enumerate((4, 3, 4)) for k in range(count)]
    assert units("reference", 2) == [[(page, k)] for page in range(3) for k in range(2)]
    assert units("shared") == [[(0, 4)], [(1, 3)], [(2, 4)]]
    assert [len(one) for one in units("shared:tokens=2100")] == [2, 1]
    assert [len(one) for one in units("single:tokens=3300")] == [4, 4, 3]
    runner = tiny_runner(dtype=torch.float32)
    for name in ("single", "shared:tokens=2100"):
        done = runner.turn(Variant.parse(name), pages)
        assert (done.questions, done.pages) == (11, 3)


def test_pages_ask_what_docvqa_asks() -> None:
    pages = [measuring.make_page(number, (170, 220)) for number in range(20)]
    assert sum(len(page.questions) for page in pages) / len(pages) == 3.9
    taken = pages[: cpu.make_parser().get_default("rounds")]
    assert sum(len(page.questions) for page in taken) / len(taken) == 3.9
    assert measuring.make_page.__wrapped__(3, (170, 220)) == pages[3]
    assert len({page.image for page in pages}) == 20


@pytest.mark.parametrize(
    "name",
    ["ours", "single:tokens=x", "single:speed=2", "shared:recompute=some", "reference:tokens=9", "single:attention"],
)
def test_unknown_variants_are_refused(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(name)):
        Variant.parse(name)


def test_model_operations_are_those_counted_by_torch() -> None:
    """Torch also counts pairs that do not see each other, and no gradient of the pixels: put right here; to 1 %."""
    runner = tiny_runner(dtype=torch.float32)
    variant = Variant.parse("single:recompute=none,attention=eager")
    runner.configure(variant)
    page = measuring.make_page(0, LETTER)
    batch = throughput.Passes(variant, runner.processor, [[(page, 0)]])[0]
    tower = runner.model.model.vision_embed_tokens.img_processor
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        runner.backward(variant, batch)
    config, tokens = runner.model.config, batch["input_ids"].numel()
    unseen = tokens * tokens - tokens * (tokens + 1) // 2
    wanted = training_flops(runner.model, "full", batch)
    wanted += 3 * 4 * config.hidden_size * config.num_hidden_layers * unseen
    wanted -= 2 * len(batch["pixel_values"]) * tower.vision_model.embeddings.patch_embedding.weight.numel() * 576
    assert abs(counter.get_total_flops() / wanted - 1) < 0.01


def test_frozen_and_adapter_steps_count_less() -> None:
    """No backward pass of a frozen tower; no weight gradients but the adapters'."""
    batch = throughput.Passes(Variant.parse("single"), make_processor(4), [[(measuring.make_page(0, LETTER), 0)]])[0]
    model = make_model("published", make_processor(4), torch.device("meta"), torch.bfloat16)
    full, frozen, lora = (training_flops(model, method, batch) for method in ("full", "frozen", "lora"))
    assert lora == full * 2 / 3  # without adapters
    assert full / 3 < frozen < full


def test_adapters_operations_are_those_of_the_positions_that_they_see() -> None:
    """Exactly, by what each adapter's matrices are given: few positions in the head and in the last layer's network."""
    runner = tiny_runner("lora", dtype=torch.float32)
    batch = throughput.Passes(Variant.parse("single"), runner.processor, [[(measuring.make_page(0, LETTER), 0)]])[0]
    counted = []

    def count(module: torch.nn.Linear, states: tuple[torch.Tensor]) -> None:
        counted.append(2 * module.weight.numel() * states[0].shape[:-1].numel())

    for name, module in runner.model.named_modules():
        if "lora_" in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(count)
    runner.configure(Variant.parse("single:recompute=none"))
    runner.backward(Variant.parse("single:recompute=none"), batch)
    is_image = batch["input_ids"] == runner.model.config.image_token_id
    sizes = (batch["input_ids"].numel(), int((batch["labels"] != -100).sum()))
    sizes += (len(batch["pixel_values"]) * 577, int(is_image.sum()))
    assert adapter_flops(runner.model, *sizes) == sum(counted)


def test_frozen_reference_keeps_no_graph_of_the_tower() -> None:
    """Neither way may pay for a backward pass that the published releases did not run."""
    runner = tiny_runner("frozen", dtype=torch.float32)
    tower = runner.model.model.vision_embed_tokens.img_processor.vision_model
    seen = []
    tower.encoder.layers[0].register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    for way in ("reference", "single"):
        runner.turn(Variant.parse(way), [measuring.make_page(0, LETTER)], questions_per_page=1)
    assert seen == [False, False]


def test_memory_peak() -> None:
    """200 MB held for a moment are seen, what was held before is not."""
    held = torch.ones(25_000_000)
    peak = measuring.MemoryPeak(CPU)
    peak.start()
    del held
    torch.ones(50_000_000).sum()
    assert 80e6 < peak.above() < 300e6


def test_quantised_layers_are_those_of_a_loaded_checkpoint() -> None:
    """What transformers quantises while it loads, and nothing else; the adapters then get gradients."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from common.phi3v import Phi3VForCausalLM

    def layers(model: torch.nn.Module) -> set[str]:
        named = model.named_modules()
        return {re.sub(r"\d+", "N", name) for name, one in named if isinstance(one, bitsandbytes.nn.Linear4bit)}

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = Phi3VForCausalLM.from_pretrained(CHECKPOINT, quantization_config=nf4, device_map={"": "cpu"})
    processor = make_processor(4)
    made = make_model("tiny", processor, CPU, torch.float32)
    quantize(made)
    assert layers(made) == layers(loaded) != set()
    runner = Runner("tiny", "qlora", 4, CPU, torch.float32)
    found = agree.gradients(runner, "shared", [measuring.make_page(0, LETTER)])
    assert all("lora_" in name for name in found)
    assert any(gradient.any() for name, gradient in found.items() if "lora_B" in name and "img_processor" in name)


def test_optimizer_of_half_precision_weights() -> None:
    """Float32 masters: ten steps too small for bfloat16 move the weights all the same."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = throughput.make_optimizer([weight])
    for group in optimizer.optimizers[0].param_groups:
        group["lr"] = 1e-3
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.masters[0].dtype == torch.float32
    assert torch.allclose(weight, torch.full_like(weight, 0.99), atol=4e-3)


def test_comparison(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Turns in the order A B A B, each after its gradients were compared; what cannot run here is said."""
    order = []
    turn = Runner.turn

    def noting(self: Runner, variant: Variant, *args: Any, **kwargs: Any) -> throughput.Turn:
        order.append(variant.name)
        return turn(self, variant, *args, **kwargs)

    monkeypatch.setattr(Runner, "turn", noting)
    arguments = (
        f"{TINY} --rounds 2 --pages_per_turn 1 --method frozen --questions_per_page 1 --num_workers 0 --no-peaks"
    )
    given = [*arguments.split(), "--compare", "reference", "shared", "shared:attention=flex_attention"]
    result = throughput.measure(throughput.parse_options(given))
    throughput.print_result(result)
    assert "left out: shared:attention=flex_attention" in capsys.readouterr().out
    reference, shared, flexible = result["variants"].values()
    assert flexible == {"left_out": "FlexAttention has no backward pass on a CPU"}
    assert (reference["questions_per_page"], shared["questions_per_page"]) == (1, 4)
    assert reference["tokens_per_question"] > 2 * shared["tokens_per_question"]
    assert 0 < shared["model_flop_utilisation"] < 1
    assert result["times_as_fast_as_the_first"].keys() == {"shared"}
    # a first turn compares gradients, or compiles; that of the first round follows it
    assert order == ["reference", "reference", "shared", "shared", "reference", "shared"]
    assert "gradient_difference" not in reference
    assert 0 < shared["gradient_difference"] < throughput.TOLERANCE


def test_comparison_that_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured before lies there: a variant's turn of the first round follows its first turn."""
    order, output = [], tmp_path / "step.json"
    turn = Runner.turn

    def stopped(self: Runner, variant: Variant, *args: Any, **kwargs: Any) -> throughput.Turn:
        order.append(variant.name)
        if len(order) == 4:
            raise KeyboardInterrupt
        return turn(self, variant, *args, **kwargs)

    monkeypatch.setattr(Runner, "turn", stopped)
    arguments = f"{TINY} --rounds 2 --pages_per_turn 1 --questions_per_page 1 --num_workers 0 --no-peaks"
    options = throughput.parse_options([*arguments.split(), "--compare", "reference", "shared"])
    with pytest.raises(KeyboardInterrupt):
        throughput.measure(options, output)
    assert order == ["reference", "reference", "shared", "shared"]
    stored = json.loads(output.read_text())
    assert stored["rounds"] == 1
    assert stored["variants"]["reference"]["questions_per_second"] > 0
    assert stored["variants"]["shared"] == {"left_out": "not begun"}


def test_memory_that_runs_out_in_a_later_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages are longer: that variant is left out, the others go on."""
    order, turn = [], Runner.turn

    def runs_out(self: Runner, variant: Variant, *args: Any, **kwargs: Any) -> throughput.Turn:
        order.append(variant.name)
        done = turn(self, variant, *args, **kwargs)
        if len(order) == 5:  # after two turns each
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return done

    monkeypatch.setattr(Runner, "turn", runs_out)
    arguments = f"{TINY} --rounds 3 --pages_per_turn 1 --questions_per_page 1 --num_workers 0 --no-peaks"
    options = throughput.parse_options([*arguments.split(), "--compare", "reference", "shared"])
    result = throughput.measure(options)
    assert order == ["reference", "reference", "shared", "shared", "reference", "shared", "shared"]
    assert result["variants"]["reference"] == {"left_out": "CUDA out of memory. Tried to allocate 2.00 GiB"}
    assert result["variants"]["shared"]["questions_per_second"] > 0
    assert (result["first"], result["rounds"]) == ("shared", 3)


@pytest.fixture
def branches_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is wrong."""
    forward = Phi3VModel.forward

    def one_branch(self: Phi3VModel, *args: Any, branch_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        branch_ids = None if branch_ids is None else torch.zeros_like(branch_ids)
        return forward(self, *args, branch_ids=branch_ids, **kwargs)

    monkeypatch.setattr(Phi3VModel, "forward", one_branch)


@pytest.mark.usefixtures("branches_that_see_each_other")
def test_other_work_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "matrix_flops", lambda *ignored: 1e12)
    options = throughput.parse_options([*TINY.split(), "--rounds", "1", "--compare", "reference", "shared"])
    with pytest.raises(ArithmeticError, match=r"shared: the gradient of \S+ is another by [0-9.]+"):
        throughput.measure(options)


def test_a_measurement_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time at all the first variant has one turn, and the rest is said to be left out."""
    monkeypatch.setattr(throughput, "matrix_flops", lambda *ignored: 1e12)
    arguments = [*TINY.split(), "--rounds", "3", "--seconds", "0", "--no-peaks", "--compare", "single", "shared"]
    result = throughput.measure(throughput.parse_options(arguments))
    assert result["variants"]["shared"] == {"left_out": "no time left"}
    assert (result["rounds"], len(result["variants"]["single"]["turn_seconds"])) == (1, 1)


def test_time_for_first_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end keeps other variants out, and no round."""
    monkeypatch.setattr(throughput, "matrix_flops", lambda *ignored: 1e12)
    arguments = f"{TINY} --rounds 2 --pages_per_turn 1 --questions_per_page 1 --no-peaks --seconds_of_first_turns 0"
    options = throughput.parse_options([*arguments.split(), "--compare", "single", "shared"])
    result = throughput.measure(options)
    assert result["variants"]["shared"] == {"left_out": "no time left"}
    assert (result["rounds"], len(result["variants"]["single"]["turn_seconds"])) == (2, 2)


@pytest.mark.parametrize(("seconds", "told"), [((31.25, 4.0), 27.25), ((4.0, 4.5), 0.0)])
def test_start_up_is_what_the_first_turn_took_longer(seconds: tuple[float, float], told: float) -> None:
    assert throughput.start_up(*seconds) == told


def test_results_name_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """git's commit in short, or what `COMMIT` says where there is no git."""
    whole = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("COMMIT", "89abcde")
    for found, told in ((whole, "0123456"), (f"{whole} with changes", "0123456 with changes"), (None, "89abcde")):
        monkeypatch.setattr(measuring, "whole_commit", lambda found=found: found)
        header = measuring.header(CPU)
        assert header["commit"] == told
        assert f"; code of commit {told}." in render.machine_line(header)
    monkeypatch.delenv("COMMIT")
    header = measuring.header(CPU)
    assert header["commit"] is None
    assert "commit" not in render.machine_line(header)


def test_kernels_are_taken_in_turn() -> None:
    """Compiled layers, Liger's where it is installed, and then again those that are neither."""
    runner = tiny_runner(dtype=torch.float32)
    layer = runner.model.model.layers[0]
    runner.configure(Variant.parse("shared:kernels=compiled"))
    assert layer._compiled_call_impl is not None
    runner.configure(Variant.parse("shared:kernels=compiled,recompute=full"))  # part by part
    assert layer._compiled_call_impl is None
    assert layer.mlp._compiled_call_impl is not None
    runner.configure(Variant.parse("single:kernels=compiled,recompute=full"))  # a whole again
    assert layer._compiled_call_impl is not None
    with contextlib.suppress(ImportError):
        runner.configure(Variant.parse("shared:kernels=liger"))
    runner.configure(Variant.parse("shared"))
    assert layer._compiled_call_impl is layer.mlp._compiled_call_impl is None
    assert "forward" not in layer.mlp.__dict__


def test_peak_above() -> None:
    """What a page's passes hold: the reference at least its logits, ours far less."""
    options = throughput.parse_options(TINY.split())
    runner = Runner("tiny", "full", options.num_crops, CPU, torch.float32)
    reference, shared = (
        throughput.measure_peak(runner, Variant.parse(name), options) for name in ("reference", "shared:recompute=full")
    )
    assert reference > 2 * 4 * 32064 * 300  # logits and their gradient, float32, over 300 positions
    assert shared < reference


def test_paths_are_shown_to_agree() -> None:
    result = agree.measure(CPU, "tiny", 340, num_crops=1, questions=2, skip=["compiled"])
    assert not any("compiled" in row["variant"] for row in result["rows"])
    assert all(row["agrees"] for row in result["rows"])
    assert {(row["method"], row["dtype"]) for row in result["rows"]} == {
        (method, dtype) for method in ("full", "lora") for dtype in ("float32", "bfloat16")
    }
    assert any("flex_attention" in name for name in result["left_out"])


@pytest.mark.usefixtures("branches_that_see_each_other")
def test_paths_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agree, "BFLOAT16", ())
    monkeypatch.setattr(agree, "LORA_BFLOAT16", ())
    result = agree.measure(CPU, "tiny", 340, num_crops=1, questions=2, only=["reference", "single", "shared"])
    wrong = {(row["method"], row["variant"]) for row in result["rows"] if not row["agrees"]}
    assert wrong >= {("full", "shared"), ("full", "shared:tokens=4096"), ("lora", "shared:tokens=4096")}
    right = {(row["method"], row["variant"]) for row in result["rows"] if row["agrees"]}
    assert right >= {(method, way) for method in ("full", "lora") for way in ("reference", "single")}


def test_what_sharing_does_to_the_score_is_told_as_measured() -> None:
    measured = json.loads((REPOSITORY / "benchmarks/results/sharing_score.json").read_text())
    assert measured
    for task in measured:
        assert sharing_score.table(task, measured) in (REPOSITORY / "docs/speed.md").read_text()


@pytest.mark.parametrize(
    ("task", "metric", "apart"), [("docvqa", "anls", set()), ("nlvr2", "accuracy", {"--separate_questions"})]
)
def test_sharing_is_compared_by_the_same_training(
    task: str, metric: str, apart: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every option reaches the script; the two ways differ in theirs and in what goes through a process at once."""
    commands = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        output = Path(command[command.index("--output_dir") + 1])
        output.mkdir(exist_ok=True)
        (output / "eval_after.json").write_text(json.dumps({metric: 0.5, "num_examples": 4}))
        (output / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')

    monkeypatch.setattr(subprocess, "run", run)
    for module in (measuring, sharing_score):
        monkeypatch.setattr(module, "commit", lambda: None)  # asks git
    figures = tmp_path / "figures.json"
    figures.write_text('{"another": "task"}')
    sizes = ["--seeds", "2", "--train_pages", "8", "--eval_limit", "4"]
    given = ["--task", task, *sizes, "--output", str(figures)]
    sharing_score.main([*given, "--ways", "apart", "together"])
    assert [command[command.index("--seed") + 1] for command in commands] == ["0", "0", "1", "1"]
    assert all(command[command.index("--eval_limit") + 1] == "4" for command in commands)
    assert all(f"finetune_hf_trainer_{task}.py" in command for command in commands)
    one, other = ({*command} for command in commands[:2])
    assert one ^ other == {*apart, "--share_images", "8"}  # 8 or 1 at once; a 1 is in both
    measured = json.loads(figures.read_text())
    assert measured["another"] == "task"
    part = f"{task}_8"  # fewer pictures than usual
    assert (measured[part]["train_pages"], measured[part]["date"]) == (8, datetime.date.today().isoformat())
    assert "| 0.500 | 0.500, 0.500 |" in sharing_score.table(part, measured)
    wider = sharing_score.TASKS[task].options.get(sharing_score.WIDER)
    if wider is None:
        with pytest.raises(SystemExit):
            sharing_score.main([*given, "--ways", "wider"])
        return
    # by itself, for as many steps as the others had; their figures stay
    commands.clear()
    with pytest.raises(SystemExit):
        sharing_score.main([*given, "--seeds", "3", "--ways", "wider"])
    before = json.loads(figures.read_text())[part]
    figures.write_text(json.dumps({part: {**before, "date": "2026-01-02"}}))
    sharing_score.main([*given, "--ways", "wider"])
    assert len(commands) == 2
    for command in commands:
        assert command[command.index("--max_steps") + 1] == "1"
        assert command[len(command) - command[::-1].index("--batch_size")] == "24"
    found = json.loads(figures.read_text())[part]
    assert {way: len(runs) for way, runs in found["ways"].items()} == dict.fromkeys(before["ways"], 2)
    assert (found["date"], found["ways"][sharing_score.APART]) == ("2026-01-02", before["ways"][sharing_score.APART])
    assert {run["date"] for run in found["ways"][sharing_score.WIDER]} == {datetime.date.today().isoformat()}
    # all of them at once
    commands.clear()
    sharing_score.main(given)
    assert len(commands) == 6
    ways = json.loads(figures.read_text())[part]["ways"]
    assert {way: len(runs) for way, runs in ways.items()} == dict.fromkeys(sharing_score.TASKS[task].options, 2)


def test_forms_whose_questions_are_compared(tmp_path: Path) -> None:
    """Without sharing every row is an example; with it those of a form, which have the same picture, find together."""
    rows = load_rows(str(sharing_score.write_forms(tmp_path, 5)), "train", docvqa.LAYOUTS, "--data_dir")
    numbers = number_pictures(rows)
    assert numbers == sorted(numbers)
    assert all(3 <= count <= 6 for count in collections.Counter(numbers).values())
    assert len(set(numbers)) == 5
    asked = [docvqa.questions(row)[0] for row in rows.without_images()]
    assert len({(number, *question) for number, (question, _) in zip(numbers, asked, strict=True)}) == len(rows)
    assert all(answers[0].isdecimal() for _, answers in asked)


def test_spreads() -> None:
    """Dividing by tokens is far more equal than by count; with a question a process there is no choice."""
    found = scaling.spreads(num_pages=200)
    for world in ("2", "8"):
        assert 0 <= 2 * found["one by one, by tokens"][world] < found["one by one, by count"][world]
    # about sixteen pages a step: most of 64 processes have none, and one page is more than an equal share
    assert found["shared, by tokens"]["64"] > 2


# --- the page


def test_results_page_holds_what_was_measured() -> None:
    assert render.PAGE.read_text(encoding="utf-8") == render.render(measuring.RESULTS)


BARS = {"ratio_full": 1.3, "ratio_full_shared": 4.0, "ratio_frozen_shared": 4.5, "ratio_preprocess": 1.5}
BARS |= {"ratio_evaluate": 3.5}


def test_committed_ratios_are_what_is_promised() -> None:
    """Of two CPU cores, as `make bench` measured them."""
    measured = json.loads((measuring.RESULTS / "cpu.json").read_text())
    assert {name: bar for name, bar in BARS.items() if measured[name] < bar} == {}
    assert measured["memory_ratio"] <= 0.6


def gpu_result(method: str) -> dict[str, Any]:
    figures = {
        "tokens_per_second": 1.0,
        "tokens_per_question": 2500.0,
        "model_flop_utilisation": 0.5,
        "share_waiting_for_data": 0.01,
        "peak_gb": 15.5,
    }
    return {
        "date": "2026-01-01",
        "machine": {
            "gpu": "GPU X",
            "gpu_gb": 80.0,
            "cuda": "13",
            "cpu": "C",
            "cores": 16,
            "python": "3.12",
            "torch": "2",
        },
        "method": method,
        "size": "published",
        "dtype": "bfloat16",
        "num_crops": 16,
        "parameters": {"trained": 1e8},
        "matrix_tflops": 700.0,
        "first": "reference",
        "times_as_fast_as_the_first": {},
        "variants": {
            "reference": {"questions_per_second": 1.0, **figures},
            "single:tokens=8192": {"questions_per_second": 7.58, **figures},
            "single": {"left_out": "out of memory"},
            "shared": {"questions_per_second": 24.254, **figures},
        },
    }


def test_what_nobody_has_measured_says_so(tmp_path: Path) -> None:
    """Beside the published rows; once measured, figures and ratios stand there."""
    text = render.render(tmp_path)
    for method in render.METHOD_NAMES.values():
        assert re.search(rf"^\| {method} \|.*\| not measured \|", text, re.MULTILINE), method
    assert text.count("not measured") == 4 + 5  # and the CPU's sections
    (tmp_path / "gpu_x_lora.json").write_text(json.dumps(gpu_result("lora")))
    text = render.render(tmp_path)
    assert "| LoRA | 12.13 | 1.52 | ~16 GB | GPU X | 7.58 | 5.0 | 15.5 GB | 7.58 | 24.25 | 2.00 |" in text
    assert "left out: out of memory" in text
    assert text.count("not measured") == 3 + 5
    (tmp_path / "gpu_x_qlora.json").write_text(json.dumps(gpu_result("qlora")))
    assert "| ~10 GB | GPU X | 7.58 | 5.8 | 15.5 GB | not measured |" in render.render(tmp_path)
    for leanest, told in (
        ({"left_out": "no time left"}, "not measured"),
        ({"left_out": "CUDA out of memory. Tried to allocate 2.00 GiB."}, "none fits"),
        ({**gpu_result("qlora")["variants"]["single:tokens=8192"], "questions_per_second": 2.0}, "none fits"),
    ):
        result = gpu_result("qlora")
        result["variants"][render.LEANEST] = leanest
        (tmp_path / "gpu_x_qlora.json").write_text(json.dumps(result))
        assert f"| ~10 GB | GPU X | 7.58 | 5.8 | 15.5 GB | {told} |" in render.render(tmp_path)
    # where it was noted, a start-up
    result["variants"]["reference"] |= {"start_up_seconds": 27.3}
    for figures in result["variants"].values():
        figures |= {} if "left_out" in figures else {"start_up_seconds": 0.2, **figures}
    (tmp_path / "gpu_x_qlora.json").write_text(json.dumps(result))
    text = render.render(tmp_path)
    assert re.search(r"^\| `reference` .*\| 1.0% \| 27 \|$", text, re.MULTILINE)
    assert re.search(r"^\| `shared` .*\| 1.0% \| 0 \|$", text, re.MULTILINE)
    (tmp_path / "gpu_x_qlora.json").unlink()
    # a trial at another size is no measurement of a published row
    (tmp_path / "gpu_x_lora.json").write_text(json.dumps({**gpu_result("lora"), "size": "tiny"}))
    assert render.render(tmp_path).count("not measured") == 4 + 5


def test_gradients_that_nobody_compared_are_told() -> None:
    rows = [
        {"method": method, "variant": name, "dtype": str(dtype).removeprefix("torch.")}
        for method, dtype, variants in agree.paths()
        for name in variants
    ]
    slow = [row for row in rows if row["method"] == "full" and "kernels" in row["variant"]]
    results = [{"rows": [row for row in rows if row not in slow], "left_out": {}}]
    results += [{"rows": [], "left_out": {"single:kernels=liger, bfloat16": "not installed"}}]
    told = render.not_compared(results)
    assert "`single:kernels=compiled, bfloat16`; `shared:tokens=4096,kernels=compiled, bfloat16`" in told
    assert "single:kernels=liger" not in told
    results[0]["rows"] = [row for row in rows if row["method"] == "full"]
    assert "`lora, single:tokens=4096,kernels=compiled, bfloat16`" in render.not_compared(results)
    results[1]["rows"] = [row for row in rows if row["method"] == "lora"]
    assert render.not_compared(results) == ""


# --- commands


def test_kinds_of_adamw(tmp_path: Path) -> None:
    """Each takes steps; the state is AdamW's two numbers a weight, in 8 bits about a quarter of them."""
    optimizers.main(["--size", "tiny", "--rounds", "2", "--output", str(tmp_path / "optimizers.json")])
    result = json.loads((tmp_path / "optimizers.json").read_text())
    kinds = result["kinds"]
    assert set(result["left_out"]) == {"paged_adamw_32bit", "paged_adamw_8bit"}  # a CPU pages nothing
    assert set(kinds) == {"adamw_torch", "adamw_torch_fused", "adamw_8bit"}
    assert all(one["step_milliseconds"]["smallest"] > 0 for one in kinds.values())
    assert kinds["adamw_torch"]["state_gb"] == pytest.approx(8 * result["weights"] / 1e9, rel=0.02)
    assert kinds["adamw_8bit"]["state_gb"] == pytest.approx(2 * result["weights"] / 1e9, rel=0.1)
    text = render.render(tmp_path)
    assert "| `adamw_8bit` |" in text
    assert "| `paged_adamw_8bit` | left out: pages on a GPU alone |" in text
    # a GPU's are beside its variants, and no row of the published table
    (tmp_path / "gpu_x_optimizers.json").write_text(json.dumps({**gpu_result("full"), **result, "size": "published"}))
    given = json.loads((tmp_path / "gpu_x_optimizers.json").read_text())
    del given["variants"]
    given["machine"] |= gpu_result("full")["machine"]
    (tmp_path / "gpu_x_optimizers.json").write_text(json.dumps(given))
    text = render.render(tmp_path)
    assert text.count("| `adamw_8bit` |") == 2
    assert "| full fine-tuning | 8.66 | 1.08 | ~36 GB | not measured |" in text


def test_tensors_that_an_optimizer_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every adapter's matrices; one of all weights, in parts where bitsandbytes could not count them."""
    adapters, (whole,) = (optimizers.sizes_of_tensors("tiny", method) for method in ("lora", "full"))
    assert len(adapters) > 20
    monkeypatch.setattr(optimizers, "BITSANDBYTES_MOST", whole - 1)
    parts = optimizers.sizes_of_tensors("tiny", "full")
    assert (len(parts), sum(parts)) == (2, whole)
    words = "--size tiny --method lora --rounds 1 --kinds adamw_8bit --output"
    optimizers.main([*words.split(), str(tmp_path / "figures.json")])
    result = json.loads((tmp_path / "figures.json").read_text())
    assert (result["weights"], list(result["kinds"]), result["left_out"]) == (sum(adapters), ["adamw_8bit"], {})


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit"])
def test_adamw_is_the_scripts(kind: str) -> None:
    """Betas, epsilon and class are those that the Trainer gives a run."""
    optimizer = optimizers.make_optimizer(kind, [torch.nn.Parameter(torch.zeros(3))])
    group = optimizer.param_groups[0]
    assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-7, 0.01)
    assert type(optimizer).__module__.startswith("bitsandbytes" if "8bit" in kind else "torch")


@pytest.mark.long  # two processes
def test_scaling(tmp_path: Path) -> None:
    arguments = "--size tiny --page_width 340 --pages 4 --rounds 1 --batch_size 8"
    result = scaling.measure(scaling.make_parser().parse_args(arguments.split()))
    (tmp_path / "scaling.json").write_text(json.dumps(result))
    assert result["questions_per_second"].keys() == {"1", "2"}
    assert "| 2 |" in render.render(tmp_path)


def test_methods_and_kernels_of_the_gpu_script(tmp_path: Path) -> None:
    """What it runs, told by a stand-in for Python; what compiles comes after every step."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\n[ "$1" = - ] && printf "\\n\\nnone\\n" || echo "RUN $*"\n')
    stand_in.chmod(0o755)

    def told(**given: str) -> list[str]:
        environment = {**os.environ, "PYTHON": str(stand_in), **given}
        command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "results")]
        ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
        return [line for line in ended.stdout.splitlines() if line.startswith("RUN")]

    every = told()
    methods = [line.split("--method ")[1].split()[0] for line in every if "throughput" in line]
    assert methods == ["full", "qlora", "lora", "frozen"]
    assert "--skip compiled flex" in every[0]
    assert "--only compiled flex" in every[5]
    some = told(METHODS="qlora lora", KERNELS="none")
    assert [line.split("--method ")[1].split()[0] for line in some if "throughput" in line] == ["qlora", "lora"]
    assert ",kernels=compiled" in every[2]
    assert not any(",kernels=compiled" in line for line in some)


@pytest.mark.long  # a dozen processes
def test_gpu_script_without_a_gpu(tmp_path: Path) -> None:
    """Every measurement runs, small and on the CPU; what needs a GPU is left out by name, and nothing else is."""
    small = "--size tiny --device cpu --dtype float32 --num_workers 0 --page_width 340 --rounds 1 --pages_per_turn 1"
    ended = subprocess.run(
        ["bash", "benchmarks/gpu.sh", str(tmp_path)],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "OPTIONS": f"{small} --num_crops 1 --no-peaks",
            "OPTIMIZERS": "--size tiny --device cpu",
            "CORRECTNESS": "--size tiny --page_width 340 --num_crops 1 --questions 2",
            "KERNELS": "none",
            "PYTHON": sys.executable,
            "SECONDS_IN_ALL": "3000",
            "PATIENCE": "5",
        },
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"gpu_none_{name}.json"
        for name in ("agree", "agree_compiled", "full", "frozen", "lora", "qlora", "preprocess", "optimizers")
    }
    told = ended.stdout.split("left out:")[-1]
    assert "ended with" not in told
    assert "stopped" not in told


NOT_NEEDED = ("deepspeed", "matplotlib", "sklearn", "liger_kernel", "flash_attn", "av", "tensorboard", "bitsandbytes")
NOT_NEEDED += ("datasets", "pyarrow", "pandas", "rapidfuzz", "scipy")


def test_gpu_measurements_need_few_packages() -> None:
    """torch, torchvision, transformers, accelerate and peft, and what they need themselves."""
    blocked = "; ".join(f"sys.modules['{name}'] = None" for name in NOT_NEEDED)
    code = f"import sys; {blocked}; import torch, benchmarks.agree, benchmarks.throughput, benchmarks.preprocess; "
    code += "import benchmarks.optimizers; "
    code += "benchmarks.throughput.Runner('tiny', 'lora', 1, torch.device('cpu'), torch.float32)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_demos_are_gathered(tmp_path: Path) -> None:
    """The scores, the time and the largest peak, of the tasks that are there."""
    written = {
        "output/eval_before.json": {"anls": 0.1, "num_examples": 7, "time": "2026-01-02T03:04:05+0000"},
        "output/eval_after.json": {"anls": 0.9, "num_examples": 7, "time": "2026-01-02T03:04:05+0000"},
        "output_shuffled/eval_only.json": {"anls": 0.05, "num_examples": 7, "time": "2026-01-02T03:04:05+0000"},
    }
    for name, content in written.items():
        file = tmp_path / "runs" / "docvqa" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    log = [{"step": 1, "memory_peak_gb": 1.5}, {"step": 2, "memory_peak_gb": 1.4}, {"step": 2, "train_runtime": 90.0}]
    file = tmp_path / "runs" / "docvqa" / "output" / "train_log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in log))
    demos.main([str(tmp_path / "runs"), "--output", str(tmp_path / "demos.json")])
    found = json.loads((tmp_path / "demos.json").read_text())["demos"]
    assert list(found) == ["docvqa"]
    row = demos.table(found).splitlines()[-1]
    assert row == "| DocVQA | ANLS | 0.100 | 0.900 | 0.050 | 1.5 minutes | 1.5 GB |"
