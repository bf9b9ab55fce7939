"""Every row of the published tables as a command, and what was measured of it beside what was published.

    python -m tools.recipes list
    python -m tools.recipes show DocVQA-lora-bf16
    python -m tools.recipes run DocVQA-lora-bf16 --nproc_per_node 8 -- --seed 1
    python -m tools.recipes table               # as Markdown; --update writes them into the README, --check compares

What follows `--` is passed on to the script. `tools/published.json` holds the published rows and the rows announced
with them as coming soon, which have no score and take the settings of another row (`settings_of`).

`run` appends to `results/<task>.json`, scores in percent, once for each evaluation, also that of a run which had ended
before and was not recorded. A run counts as a measurement of its row, and stands in the tables, only if it ran on a
CUDA GPU and nothing that follows `--` changes what is trained on what, or evaluated on what; any other is recorded with
`"reproduction": false` and what `differs`, and stands in no table. A local copy of data or model counts as different,
for nothing shows that it is the same: fill the hub's cache instead. Of several measurements the tables show the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = Path(__file__).with_name("published.json")
RESULTS = REPOSITORY / "results"

DEFAULT_MODEL = "microsoft/Phi-3.5-vision-instruct"  # the scripts' own
PUBLISHED_PROCESSES = 4  # of the commands published above the tables
SEED = 0  # the scripts' default
METHODS = {"full": "full-finetuning", "frozen": "frozen image model", "lora": "LoRA", "qlora": "QLoRA"}
METHOD_OPTIONS = {
    "full": (),
    "frozen": ("--freeze_vision_model",),
    "lora": ("--use_lora",),
    "qlora": ("--use_lora", "--use_qlora"),
}
PRECISION_OPTIONS = {"bf16": ("--bf16", "--use_flash_attention"), "fp16": ()}
NOT_RUN = "not run"


def user_error(message: str) -> ValueError:
    from common.errors import UserError  # only here, for it imports torch, which takes seconds

    return UserError(message)


# --- the published rows


@dataclass(frozen=True)
class Recipe:
    """One row of a table.

    Attributes:
        name: stable, as the command line takes it.
        method: one of `METHODS`.
        precision: "bf16" or "fp16".
        learning_rate: as published, so that the command shows the same figures.
        score: published, in percent; None where none is.
        settings_of: the row that the settings are taken from, where none are published for this one.
    """

    name: str
    method: str
    precision: str
    batch_size: int
    learning_rate: str
    epochs: int
    lora_rank: int | None = None
    lora_alpha: int | None = None
    score: float | None = None
    settings_of: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of one task and model.

    Attributes:
        task: the script is `finetune_hf_trainer_<task>.py`.
        metric: its name in the scripts' `eval_after.json`, where it is a fraction.
        decimals: that scores are published with.
        options: that every command of the table has.
    """

    name: str
    title: str
    task: str
    model: str
    metric: str
    metric_title: str
    decimals: int
    options: tuple[str, ...]
    recipes: tuple[Recipe, ...]


def load_tables() -> list[Table]:
    """The tables of `tools/published.json`."""
    stored = json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"]
    rows = {row["name"]: row for table in stored for row in table["rows"]}
    tables = []
    for table in stored:
        recipes = []
        for row in table.pop("rows"):
            settings = {**rows[row["settings_of"]], "score": None} if "settings_of" in row else {}
            recipes.append(Recipe(**{**settings, **row}))
        tables.append(Table(**{**table, "options": tuple(table["options"]), "recipes": tuple(recipes)}))
    return tables


def find(name: str) -> tuple[Table, Recipe]:
    """A row by its name.

    Raises:
        UserError: no such row, with the names that are most alike.
    """
    by_name = {recipe.name: (table, recipe) for table in load_tables() for recipe in table.recipes}
    if name not in by_name:
        import difflib

        alike = difflib.get_close_matches(name, by_name, n=3, cutoff=0.4) or sorted(by_name)[:3]
        raise user_error(f"there is no recipe {name}; did you mean {', '.join(alike)}? `list` shows all")
    return by_name[name]


# --- commands


def script_command(table: Table, recipe: Recipe, extra: Sequence[str] = ()) -> list[str]:
    """The script and its options, as the row means them, then `extra`, which replaces options of the row."""
    options = [(option,) for option in table.options]
    if table.model != DEFAULT_MODEL:
        options.append(("--model_name_or_path", table.model))
    options += [(option,) for option in (*PRECISION_OPTIONS[recipe.precision], *METHOD_OPTIONS[recipe.method])]
    if recipe.lora_rank is not None:
        options.append(("--lora_rank", str(recipe.lora_rank)))
        options.append(("--lora_alpha_ratio", f"{recipe.lora_alpha / recipe.lora_rank:g}"))
    options += [("--batch_size", str(recipe.batch_size)), ("--output_dir", f"output/{recipe.name}")]
    options += [("--learning_rate", recipe.learning_rate), ("--num_train_epochs", str(recipe.epochs))]
    replaced = given_options(extra)
    own = [word for option in options if option[0] not in replaced for word in option]
    return [f"finetune_hf_trainer_{table.task}.py", *own, *extra]


def launcher_options(options: argparse.Namespace) -> list[str]:
    """torchrun's own, only those that were given."""
    names = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
    return [f"--{name}={getattr(options, name)}" for name in names if getattr(options, name) is not None]


def in_lines(words: Sequence[str]) -> str:
    """A command over several lines, to be pasted into a shell: the launcher, the script, its options."""
    lines: list[list[str]] = [[words[0]]]
    for word in words[1:]:
        begins = word.startswith("--") or word.endswith(".py")
        if lines[-1][-1].endswith(".py") or word.endswith(".py") or (begins and len(shlex.join(lines[-1])) > 50):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines))


def given_options(words: Sequence[str]) -> dict[str, str]:
    """Options and their values as text; an option without a value has an empty one, the last of two counts."""
    given: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            given[name] = value
        elif name:
            given[name] = f"{given[name]} {word}".strip()
    return given


def differences(table: Table, recipe: Recipe, extra: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """What `extra` changes of what the row means: option -> the row's value and the run's, None for "not given"."""
    from common.facts import NEUTRAL_OPTIONS  # only here, for it imports torch; as the report has it

    own = given_options(script_command(table, recipe)[1:])
    changed = {}
    for name, value in given_options(extra).items():
        is_neutral = name.removeprefix("--").removeprefix("no-") in NEUTRAL_OPTIONS
        if is_neutral or (name in own and same_value(own[name], value)):
            continue
        if name == "--deepspeed" and Path(value).resolve().parent == REPOSITORY / "ds_configs":
            continue  # the repository's own configurations compute the same; a user's may do anything
        changed[name] = {"recipe": own.get(name), "run": value}
    return changed


def same_value(one: str, other: str) -> bool:
    """Equal as text, or as numbers: 1e-5 is 0.00001."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


# --- runs


def run_recipe(options: argparse.Namespace, extra: Sequence[str]) -> int:
    """Run a row's command and append its score to `results/<task>.json`.

    Returns:
        The script's exit code; nothing is recorded where it is not 0, and only the first of several nodes records.

    Raises:
        UserError: where the run has written no evaluation, or one that is recorded already.
    """
    table, recipe = find(options.name)
    words = script_command(table, recipe, extra)
    command = ["torchrun", *launcher_options(options), *words]
    given = given_options(words)
    evaluation = REPOSITORY / given["--output_dir"] / "eval_after.json"
    previous = evaluation.stat().st_mtime_ns if evaluation.exists() else None
    recorded = read_results(options.results, table.task)  # what would be wrong is told before hours of training
    print(in_lines(command), flush=True)
    began = time.time()
    code = launch(command)
    if code or (options.node_rank or 0) > 0:
        return code
    had_ended = evaluation.exists() and evaluation.stat().st_mtime_ns == previous
    if not evaluation.exists() or (had_ended and "--eval_only" in given):
        raise user_error(f"the run has written no {evaluation}, so there is no score to record")
    from common import facts  # which imports torch; `list` and `show` need none of it

    machine = describe_machine(options)
    changed = differences(table, recipe, extra)
    if machine["gpu"] is None:
        changed["device"] = {"recipe": "cuda", "run": "cpu"}
    scores = {name: json.loads((evaluation.parent / f"eval_{name}.json").read_text()) for name in ("before", "after")}
    for earlier in recorded if had_ended else ():
        if earlier["name"] == recipe.name and earlier.get("evaluated") == scores["after"]["time"]:
            raise user_error(f"the run had ended, and was recorded on {earlier['date']}: --overwrite runs it again")
    measured = round(100 * scores["after"][table.metric], 4)
    entry = {
        "name": recipe.name,
        "metric": table.metric,
        "published": recipe.score,
        "measured": measured,
        "difference": None if recipe.score is None else round(measured - recipe.score, 4),
        "reproduction": not changed,
        "differs": changed,
        "before_training": round(100 * scores["before"][table.metric], 4),
        "num_examples": scores["after"]["num_examples"],
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "evaluated": scores["after"]["time"],
        "seconds": None if had_ended else round(time.time() - began),
        "machine": machine,
        "versions": facts.versions(),
        "commit": facts.commit(),
        "command": shlex.join(command),
        "seed": int(given.get("--seed", SEED)),
    }
    path = append_result(options.results, table.task, entry)
    kind = "" if entry["reproduction"] else f"; not a measurement of the row, for {in_words(changed)}"
    published = "none published" if recipe.score is None else f"published {recipe.score:.{table.decimals}f}"
    print(f"{recipe.name}: {table.metric_title} {measured:.{table.decimals}f} ({published}), recorded in {path}{kind}")
    return 0


def launch(command: Sequence[str]) -> int:
    """Run a torchrun command from the repository's folder, by the torchrun of this Python; the exit code."""
    words = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    return subprocess.run(words, cwd=REPOSITORY, check=False).returncode


def in_words(changed: dict[str, dict[str, str | None]]) -> str:
    """Differences on one line."""
    return ", ".join(f"{name} is {both['run'] or 'given'}" for name, both in changed.items())


def describe_machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the run ran on; the GPU is named after the run, for asking occupies memory on it."""
    import torch

    from common.facts import cpu_name

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    nodes = options.nnodes or 1
    return {"gpu": gpu, "cpu": cpu_name(), "nodes": nodes, "processes": nodes * options.nproc_per_node}


def read_results(folder: Path, task: str) -> list[dict[str, Any]]:
    """All runs of a task recorded so far.

    Raises:
        UserError: for a file that holds no list of runs.
    """
    path = folder / f"{task}.json"
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not all({"name", "measured", "reproduction"} <= set(entry) for entry in entries):
            raise ValueError("a run without name, measured or reproduction")
    except (ValueError, TypeError) as error:
        raise user_error(f"{path} holds no list of runs ({error}): mend it, or move it away") from error
    return entries


def append_result(folder: Path, task: str, entry: dict[str, Any]) -> Path:
    """Add a run to the task's file, which is whole at any moment."""
    entries = [*read_results(folder, task), entry]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.json"
    path.with_suffix(".tmp").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)
    return path


def measurements(entries: Sequence[dict[str, Any]], recipe: Recipe) -> list[float]:
    """The scores of the runs that measure a row."""
    return [entry["measured"] for entry in entries if entry["name"] == recipe.name and entry["reproduction"]]


# --- tables


def score_cells(table: Table, recipe: Recipe, entries: Sequence[dict[str, Any]]) -> list[str]:
    """Published, measured here, difference."""
    published = "-" if recipe.score is None else f"{recipe.score:.{table.decimals}f}"
    measured = measurements(entries, recipe)
    if not measured:
        return [published, NOT_RUN, "-"]
    mean = statistics.fmean(measured)
    shown = f"{mean:.{table.decimals}f}" + (f" (mean of {len(measured)})" if len(measured) > 1 else "")
    return [published, shown, "-" if recipe.score is None else f"{mean - recipe.score:+.{table.decimals}f}"]


def setting_cells(recipe: Recipe) -> list[str]:
    """Data type, LoRA rank and alpha, batch size, learning rate, epochs."""
    rank, alpha = ("-" if value is None else str(value) for value in (recipe.lora_rank, recipe.lora_alpha))
    return [recipe.precision, rank, alpha, str(recipe.batch_size), recipe.learning_rate, str(recipe.epochs)]


SETTINGS = ("data type", "LoRA rank", "LoRA alpha", "batch size", "learning rate", "epochs")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render_tables(results: Path) -> Iterator[tuple[str, str]]:
    """Every table of the README: its name and its Markdown; the speed tables hold published figures alone."""
    for table in load_tables():
        entries = read_results(results, table.task)
        title = table.metric_title
        header = (
            "recipe",
            "Training method",
            *SETTINGS,
            f"{title}, published",
            f"{title}, measured here",
            "difference",
        )
        rows = [
            [f"`{one.name}`", METHODS[one.method], *setting_cells(one), *score_cells(table, one, entries)]
            for one in table.recipes
        ]
        yield table.name, markdown(header, rows)
    speed = json.loads(PUBLISHED.read_text(encoding="utf-8"))["speed"]
    header = ("Training method", "nodes", "GPUs", "flash attention", "effective batch size")
    header += ("images/s, published", "speedup, published", "peak GPU memory, published")
    for machine in speed["machines"]:
        rows = []
        for row in machine["rows"]:
            cells = [
                METHODS[row["method"]],
                str(row["nodes"]),
                str(row["gpus"]),
                "yes" if row["flash_attention"] else "",
            ]
            cells += [str(speed["batch_size"]), f"{row['images_per_second']:.3f}", f"{row['speedup']:.2f}x"]
            rows.append([*cells, f"~{row['peak_gpu_gb']} GB"])
        yield machine["name"], markdown(header, rows)


def with_tables(text: str, tables: Mapping[str, str], path: Path) -> str:
    """A document's text with every block between `<!-- table NAME -->` and `<!-- /table -->` made anew.

    Raises:
        UserError: for a table that has no block, or a block of no table.
    """
    named = re.findall(r"<!-- table (\S+) -->", text)
    if sorted(named) != sorted(tables):
        raise user_error(f"{path} has blocks for the tables {sorted(named)}; it needs one for each of {sorted(tables)}")
    return re.sub(
        r"(<!-- table (\S+) -->\n).*?(<!-- /table -->)",
        lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def print_list(results: Path) -> None:
    """Every row, in aligned columns."""
    lines = [("name", "task", "model", "method", *SETTINGS, "metric", "published", "measured", "difference")]
    for table in load_tables():
        entries = read_results(results, table.task)
        for recipe in table.recipes:
            about = (recipe.name, table.title, table.model.split("/")[1], METHODS[recipe.method])
            scores = score_cells(table, recipe, entries)
            lines.append((*about, *setting_cells(recipe), table.metric_title, *scores))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# --- command line


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.recipes", description="The published tables' rows as commands, and their scores."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded scores (results)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,show,run,table}")
    commands.add_parser("list", help="every row: settings, published score, score measured here")
    for name, told in (("show", "print a row's torchrun command"), ("run", "run it and record its score")):
        command = commands.add_parser(name, help=told, description=f"{told}; options of the script follow after --")
        command.add_argument("name", help="as `list` shows it")
        launcher = command.add_argument_group("passed on to torchrun")
        launcher.add_argument(
            "--nproc_per_node", type=int, default=PUBLISHED_PROCESSES, help="GPUs of a node (%(default)s)"
        )
        launcher.add_argument("--nnodes", type=int, help="nodes; run the same on each, with its own --node_rank")
        launcher.add_argument("--node_rank", type=int, help="0 is the one that records the score")
        launcher.add_argument("--master_addr", help="address of node 0")
        launcher.add_argument("--master_port", type=int, help="a free port of node 0")
    table = commands.add_parser("table", help="the README's tables as Markdown")
    table.add_argument("--readme", type=Path, default=REPOSITORY / "README.md", help="(README.md)")
    what = table.add_mutually_exclusive_group()
    what.add_argument("--update", action="store_true", help="write them into the README")
    what.add_argument("--check", action="store_true", help="compare with the README; exit code 1 where they differ")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if words is None else words)
    place = words.index("--") if "--" in words else len(words)
    options, extra = parse(words[:place]), words[place + 1 :]
    if extra and options.command not in ("show", "run"):
        raise user_error(f"{options.command} runs no script, so nothing may follow after --: {shlex.join(extra)}")
    if options.command == "list":
        print_list(options.results)
    elif options.command == "show":
        table, recipe = find(options.name)
        if recipe.settings_of:
            print(f"# nothing is published for this row; its settings are those of {recipe.settings_of}")
        print(in_lines(["torchrun", *launcher_options(options), *script_command(table, recipe, extra)]))
    elif options.command == "run":
        return run_recipe(options, extra)
    elif not (options.update or options.check):
        print("\n".join(f"{name}\n\n{table}" for name, table in render_tables(options.results)), end="")
    else:
        old = options.readme.read_text(encoding="utf-8")
        new = with_tables(old, dict(render_tables(options.results)), options.readme)
        if options.update:
            options.readme.write_text(new, encoding="utf-8")
        elif new != old:
            print(f"{options.readme} differs from what was measured: `python -m tools.recipes table --update` mends it")
            return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        from common.errors import UserError

        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
