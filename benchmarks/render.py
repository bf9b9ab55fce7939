"""`benchmarks/RESULTS.md` and the tables of `docs/reliability.md`, made from `benchmarks/results/*.json` and the rows
of `tools/published.json` alone.

python -m benchmarks.render
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.agree import label, paths
from benchmarks.measuring import RESULTS, in_words, markdown
from common.errors import is_out_of_memory
from tools.recipes import with_tables

PAGE = Path(__file__).with_name("RESULTS.md")
RELIABILITY = Path(__file__).parent.parent / "docs" / "reliability.md"
PUBLISHED = Path(__file__).parent.parent / "tools" / "published.json"
NOT_MEASURED = "not measured"
# of one question at a time what takes the least memory of those that any GPU can run: Liger's kernels are not needed
LEANEST = "single:recompute=full"
METHOD_NAMES = {"full": "full fine-tuning", "frozen": "frozen image model", "lora": "LoRA", "qlora": "QLoRA"}
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn", "liger-kernel", "pillow", "av")


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A result, or None where nobody has measured it."""
    path = folder / name
    return json.loads(path.read_text()) if path.is_file() else None


def machine_line(result: dict[str, Any]) -> str:
    """When, where and with what."""
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    if "gpu" in machine:
        where = f"{machine['gpu']} ({machine['gpu_gb']:.0f} GB), CUDA {machine['cuda']}"
    versions = [f"{name} {machine[name]}" for name in LIBRARIES if name in machine]
    load = result.get("load_average_before")
    busy = f"; load before the run {load:.2f}" if isinstance(load, float) else ""
    if "taken_by_others" in result:
        busy += f", {result['taken_by_others']:.1%} of the processors' time taken by others"
    code = f"; code of commit {result['commit']}" if result.get("commit") else ""
    note = f" {result['note']}" if "note" in result else ""
    return f"{result['date']}; {where}; Python {machine['python']}, {', '.join(versions)}{busy}{code}.{note}\n"


def variants_table(result: dict[str, Any]) -> str:
    """A method's variants, one a row."""
    on_gpu = "gpu" in result["machine"]
    peak = "peak_gb" if on_gpu else "peak_above_gb"
    where = "peak memory" if on_gpu else "peak memory above weights, gradients and optimizer state"
    names = ["variant", "questions/s", f"times as fast as `{result['first']}`", "tokens/s", "tokens per question"]
    names += ["of the matrix ceiling", where, "waiting for data"]
    # results of before it was noted have none
    tells_start_up = on_gpu and any("start_up_seconds" in figures for figures in result["variants"].values())
    names += ["start-up, s"] if tells_start_up else []
    rows = []
    for name, figures in result["variants"].items():
        if "left_out" in figures:
            rows.append([f"`{name}`", "left out: " + figures["left_out"].split(". ")[0][:80], *[""] * (len(names) - 2)])
            continue
        ratio = result["times_as_fast_as_the_first"].get(name)
        memory = f"{figures[peak]:.2f} GB" if peak in figures else NOT_MEASURED
        rows.append(
            [
                f"`{name}`",
                f"{figures['questions_per_second']:.3g}",
                in_words(ratio) if ratio else "",
                f"{figures['tokens_per_second']:.0f}",
                f"{figures['tokens_per_question']:.0f}",
                f"{figures['model_flop_utilisation']:.0%}",
                memory,
                f"{figures['share_waiting_for_data']:.1%}",
            ]
        )
        if tells_start_up:
            rows[-1].append(f"{figures['start_up_seconds']:.0f}")
    about = f"{METHOD_NAMES[result['method']]}, `num_crops={result['num_crops']}`, {result['dtype']}, "
    about += f"{result['parameters']['trained'] / 1e6:.0f} M weights train; a matrix product reaches "
    about += f"{result['matrix_tflops']:.2f} TFLOP/s."
    differences = [one["gradient_difference"] for one in result["variants"].values() if "gradient_difference" in one]
    if differences:
        about += f" Gradients are those of `{result['first']}` to {max(differences):.0e}, in the same run."
    return f"{about}\n\n{markdown(names, rows)}"


# --- sections


def on_a_cpu(folder: Path) -> str:
    """The comparison behind `make bench`."""
    text = "## On a CPU: the same step, ours and the reference's way\n\n"
    result = read(folder, "cpu.json")
    if result is None:
        return text + f"`make bench`: {NOT_MEASURED}.\n"
    ratios = {name: value for name, value in result.items() if name.startswith(("ratio_", "memory_ratio"))}
    size = result["full"]["page_size"]
    text += f"`make bench`, {result['minutes']:.0f} minutes. {machine_line(result)}\n"
    sizes = result["full"]["parameters"]
    text += (
        f"A decoder of {sizes['decoder_layers'] / 1e6:.0f} M parameters in its layers, a tower of "
        f"{sizes['tower_layers']} layers of width {sizes['tower_width']}, pages of {size[0]}x{size[1]}. Ratios are the "
        "reference's time by ours over all turns (for memory ours by the reference's); in the tables the median of "
        "neighbouring turns, smallest and largest.\n\n"
    )
    rows = []
    for name, value in ratios.items():
        method, variant, _ = result["compared"].get(name, (name.removeprefix("ratio_"), "", ""))
        compared = f"{METHOD_NAMES[method]}, `{variant}`" if variant else f"{method}, below"
        rows.append([f"`{name}`", compared, f"{value:.2f}"])
    text += markdown(["ratio", "of", "measured"], rows)
    for method in ("full", "frozen"):
        text += f"\n{variants_table(result[method])}"
    one, other = result["preprocess"], result["evaluate"]
    rows = [[name, in_words(figures)] for name, figures in one["milliseconds"].items()]
    text += (
        f"\nThe image processor on one core, a page at `num_crops={one['num_crops']}`, the same pixels bit for bit: "
    )
    text += f"{in_words(one['times_as_fast'])} times as fast, {in_words(one['times_as_fast_grey'])} times on grey pages"
    text += f".\n\n{markdown(['way', 'ms per page'], rows)}"
    rows = [[name, in_words(figures)] for name, figures in other["questions_per_second"].items()]
    text += f"\nEvaluation, {other['questions_per_page']} questions a page, answers of {other['new_tokens']} tokens, "
    text += f"`num_crops={other['num_crops']}`: {in_words(other['times_as_fast'])} times as fast; "
    return text + f"{other['same_answers']} answers are the same.\n\n{markdown(['way', 'questions/s'], rows)}"


def on_a_gpu(folder: Path) -> str:
    """Every method beside the published rows."""
    speed = json.loads(PUBLISHED.read_text())["speed"]
    published = [row for row in speed["machines"][0]["rows"] if row["nodes"] == 1 and row["flash_attention"]]
    measured = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu_*.json"))]
    steps = [one for one in measured if "variants" in one and one["size"] == "published" and "gpu" in one["machine"]]
    text = "## On one GPU, beside the published rows\n\n"
    text += (
        f"Published: {speed['machines'][0]['title']}, flash attention, one question a page, DocVQA, mean sequence "
        f"{speed['mean_sequence_tokens']:.0f} tokens, `num_crops={speed['num_crops']}`, effective batch "
        f"{speed['batch_size']}. Measured here: `benchmarks/gpu.sh`, the full model size with random weights, one "
        "process; images/s are questions/s at one question a page, as in the published rows. (The published frozen row "
        "is no measure for ours: every decoder layer trained and recomputed at that length, 31.7 images/s would take "
        "more than the peak of eight A100s.)\n\n"
    )
    names = ["method", "published: images/s, 8 GPUs", "by GPU", "peak memory", "measured here on", "images/s"]
    names += ["times one A100", "peak memory", "images/s within the published memory"]
    names += ["questions/s, pages shared", "times the node"]
    rows = []
    for row in published:
        node = row["images_per_second"]
        about = [METHOD_NAMES[row["method"]], f"{node:.2f}", f"{node / row['gpus']:.2f}", f"~{row['peak_gpu_gb']} GB"]
        own = [one for one in steps if one["method"] == row["method"]]
        rows += [[*about, *fastest(one, row)] for one in own] or [[*about, NOT_MEASURED, *[""] * 6]]
    text += markdown(names, rows)
    text += (
        "\nWhen a turn's clock starts the loader's workers have begun with its batches: the time waiting for data is "
        "that of a loader that is ahead.\n"
    )
    for one in steps:
        text += f"\n{machine_line(one)}\n{variants_table(one)}"
    text += "".join(f"\n{kinds_of_adamw(one)}" for one in measured if "kinds" in one)
    compared = [one for one in measured if "rows" in one]
    return text + "".join(f"\n{agreement(one)}" for one in compared) + (not_compared(compared) if compared else "")


def not_compared(results: Sequence[dict[str, Any]]) -> str:
    """The paths whose gradients no result holds, nor a reason why not."""
    known = {label(row["method"], row["variant"], row["dtype"]) for result in results for row in result["rows"]}
    known |= {name for result in results for name in result["left_out"]}
    asked = [label(method, name, dtype) for method, dtype, variants in paths() for name in variants]
    missing = [f"`{name}`" for name in asked if name not in known]
    return f"\nGradients not compared on a GPU: {'; '.join(missing)}.\n" if missing else ""


def fastest(result: dict[str, Any], published: dict[str, Any]) -> list[str]:
    """The cells of the fastest variants: one question a page, likewise in the published memory, all of a page."""
    node = published["images_per_second"]
    ran = [(name, figures) for name, figures in result["variants"].items() if "left_out" not in figures]
    single, shared = ([figures for name, figures in ran if name.split(":")[0] == way] for way in ("single", "shared"))
    lean = [figures for figures in single if figures["peak_gb"] <= published["peak_gpu_gb"]]
    cells = [result["machine"]["gpu"]]
    if single:
        best = max(single, key=lambda figures: figures["questions_per_second"])
        speed = best["questions_per_second"]
        cells += [f"{speed:.2f}", f"{speed / (node / published['gpus']):.1f}", f"{best['peak_gb']:.1f} GB"]
        cells.append(f"{max(one['questions_per_second'] for one in lean):.2f}" if lean else none_in_memory(result))
    else:
        cells += [NOT_MEASURED, "", "", ""]
    if shared:
        speed = max(figures["questions_per_second"] for figures in shared)
        return [*cells, f"{speed:.2f}", f"{speed / node:.2f}"]
    return [*cells, NOT_MEASURED, ""]


def none_in_memory(result: dict[str, Any]) -> str:
    """The cell where no variant that ran fits into the published memory: the leanest did not, or has not been tried."""
    left_out = result["variants"].get(LEANEST, {"left_out": "not begun"}).get("left_out")
    return "none fits" if left_out is None or is_out_of_memory(RuntimeError(left_out)) else NOT_MEASURED


def kinds_of_adamw(result: dict[str, Any]) -> str:
    """What `benchmarks/optimizers.py` found."""
    rows = [
        [f"`{kind}`", in_words(one["step_milliseconds"]), f"{one['state_gb']:.2f} GB"]
        for kind, one in result["kinds"].items()
    ]
    rows += [[f"`{kind}`", f"left out: {reason}", ""] for kind, reason in result["left_out"].items()]
    text = f"AdamW's step by `--optim`, {METHOD_NAMES[result['method']]}, {result['weights'] / 1e6:.0f} M weights in "
    text += f"float32. {machine_line(result)}\n"
    return text + markdown(["`--optim`", "ms", "the optimizer's state"], rows)


def agreement(result: dict[str, Any]) -> str:
    """What `benchmarks/agree.py` found."""
    rows = [
        [
            METHOD_NAMES[row["method"]],
            f"`{row['variant']}`",
            row["dtype"],
            f"{row['difference']:.1e}",
            f"{row['tolerance']:.1e}",
            row["agrees"],
        ]
        for row in result["rows"]
    ]
    text = f"Gradients of a small model against `{result['reference']}` in float32. {machine_line(result)}\n"
    text += markdown(["method", "variant", "precision", "relative difference", "allowed", "agrees"], rows)
    return text + "".join(f"\nLeft out: `{name}`: {reason}.\n" for name, reason in result["left_out"].items())


def scaling(folder: Path) -> str:
    """One and two processes, and how equal their shares are."""
    text = "## Two processes on a CPU\n\n"
    result = read(folder, "scaling.json")
    if result is None:
        return text + f"`python -m benchmarks.scaling`: {NOT_MEASURED}.\n"
    text += (
        f"{machine_line(result)}\nFull fine-tuning of the {result['size']} size under DDP, pages shared, one thread a "
    )
    text += f"process: two are {in_words(result['times_as_fast'])} times as fast as one.\n\n"
    rows = [[world, in_words(figures)] for world, figures in result["questions_per_second"].items()]
    text += markdown(["processes", "questions/s"], rows)
    text += (
        "\nHow much longer a step of 64 questions is than with perfectly equal processes (computed, lengths drawn):\n\n"
    )
    spreads = result["token_spread"]
    worlds = list(next(iter(spreads.values())))
    rows = [[name, *(f"{by_world[world]:.1%}" for world in worlds)] for name, by_world in spreads.items()]
    return text + markdown(["divided", *(f"{world} processes" for world in worlds)], rows)


def converter(folder: Path) -> str:
    """Videos to images."""
    text = "## Converting videos\n\n"
    result = read(folder, "convert_cpu.json")
    if result is None:
        return text + f"`python -m benchmarks.convert`: {NOT_MEASURED}.\n"
    rows = []
    for kind in result["kinds"]:
        faster = kind[f"times_as_fast_{result['num_workers']}_workers"]
        longest = max(1, kind["videos"]["frames"] // kind["videos"]["count"])
        every = kind["keyframe_every"]
        keyframes = f"every {every} frames" if every < longest else "the first frame alone"
        for way, figures in kind["videos_per_second"].items():
            ratio = in_words(faster[way]) if way in faster else ""
            rows.append([keyframes, way, f"{figures['median']:.1f}", ratio])
    names = ["keyframes", "way", "videos/s", f"ours with {result['num_workers']} workers is faster by"]
    kinds = "Made-up videos; where UCF-101's own have their keyframes is not known here.\n"
    return f"{text}{machine_line(result)}\n{kinds}\n{markdown(names, rows)}"


def recomputation(folder: Path) -> str:
    """What computing layers again costs, and what it saves, on a CPU."""
    text = "## What is computed again, on a CPU\n\n"
    result = read(folder, "recompute_cpu.json")
    if result is None:
        return text + f"`benchmarks/throughput.py`: {NOT_MEASURED}.\n"
    command = f"python -m benchmarks.throughput --size {result['size']} --num_crops {result['num_crops']} "
    command += f"--rounds {result['rounds']} --pages_per_turn {result['pages_per_turn']} --questions_per_page 1 "
    command += f"--output benchmarks/results/recompute_cpu.json --compare {' '.join(result['variants'])}"
    return f"{text}`{command}`: {machine_line(result)}\n{variants_table(result)}"


def optimizers(folder: Path) -> str:
    """AdamW's kinds on a CPU."""
    result = read(folder, "optimizers.json")
    told = f"`python -m benchmarks.optimizers`: {NOT_MEASURED}.\n" if result is None else kinds_of_adamw(result)
    return f"## Kinds of AdamW on a CPU\n\n{told}"


# --- docs/reliability.md


def reliability_tables(folder: Path) -> dict[str, str]:
    """What `tests/faults/harness.py` has tried, by kind and by configuration, and the bad inputs."""
    result = read(folder, "faults.json")
    if result is None:
        return dict.fromkeys(("faults", "configurations", "bad-inputs"), f"{NOT_MEASURED}\n")
    tried = [one for one in result["faults"] if "left_out" not in one]
    left_out = dict.fromkeys(f"{one['kind']} ({one['left_out']})" for one in result["faults"] if "left_out" in one)
    rows = {}
    for kind in dict.fromkeys(one["kind"] for one in result["bad_inputs"]):
        own = [one for one in result["bad_inputs"] if one["kind"] == kind]
        rows[kind] = [kind, len(own), sum(one["clear"] for one in own)]
    measured_on = f"\n{machine_line(result)}" if "machine" in result else ""
    return {
        "faults": _fault_table(tried, "kind") + measured_on + "".join(f"\nLeft out: {one}.\n" for one in left_out),
        "configurations": _fault_table(tried, "configuration"),
        "bad-inputs": markdown(["bad input", "tried", "ended with code 2 and the place named"], list(rows.values())),
    }


def _fault_table(tried: Sequence[dict[str, Any]], column: str) -> str:
    groups = {name: [one for one in tried if one[column] == name] for name in dict.fromkeys(o[column] for o in tried)}
    rows = []
    for name, own in {**groups, "all": list(tried)}.items():
        lost = [one["steps_lost"] for one in own if one["recovered"]]
        gone = [one["gone_after_seconds"] for one in own if "gone_after_seconds" in one]
        mean = f"{sum(lost) / len(lost):.1f}" if lost else ""
        rows.append([name, len(own), len(lost), mean, max(lost, default=""), f"{max(gone):.0f}" if gone else ""])
    names = [column, "tried", "recovered", "steps lost, mean", "at most", "all processes gone after, at most, s"]
    return markdown(names, rows)


def render(folder: Path) -> str:
    """The whole page."""
    text = (
        "# Results\n\nMade by `python -m benchmarks.render` from `benchmarks/results/`; nothing here is written by "
        "hand. `benchmarks/throughput.py` says what the variants are.\n"
    )
    return "\n".join(
        [text, *(section(folder) for section in (on_a_cpu, recomputation, optimizers, on_a_gpu, scaling, converter))]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Render the results.", allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=PAGE, help="(%(default)s)")
    options = parser.parse_args(arguments)
    options.output.write_text(render(options.results), encoding="utf-8")
    print(f"written to {options.output}")
    if options.output == PAGE:
        text = with_tables(RELIABILITY.read_text(encoding="utf-8"), reliability_tables(options.results), RELIABILITY)
        RELIABILITY.write_text(text, encoding="utf-8")
        print(f"written to {RELIABILITY}")


if __name__ == "__main__":
    main()
