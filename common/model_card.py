"""The model card in the output folder, and the upload to the hub (`--push_to_hub`).

A card states what the options and the evaluations say, and nothing else. Uploaded are the card and what loads as a
checkpoint; evaluations, reports, logs and intermediate checkpoints stay, for they hold the data's texts and pictures.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .data import one_line
from .errors import is_first_process, say
from .files import read_json
from .phi3v.configuration import OFFICIAL_REPOSITORY
from .phi3v.processing import TOKENIZER_FILES
from .together import on_first

# What is uploaded of an output folder, and nothing of the folders in it: a star also stands for what has a slash.
UPLOADED = ("README.md", "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json")
UPLOADED += ("adapter_config.json", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES)
LEFT_OUT = ("*/*",)

ENGLISH = {"nielsr/docvqa_1200_examples", "lmms-lab/DocVQA", "HuggingFaceM4/DocumentVQA", "HuggingFaceM4/the_cauldron"}
METHODS = {
    "full": "full fine-tuning",
    "frozen": "fine-tuning with the image model frozen",
    "lora": "LoRA",
    "qlora": "QLoRA (base in NF4)",
}


def write_model_card(
    options: argparse.Namespace,
    train_data: Any,
    eval_data: Any,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    task: str,
    metrics: Mapping[str, str],
) -> None:
    """Write `README.md` into the output folder, on the first process (together); in place of PEFT's own.

    Args:
        train_data, eval_data: `Rows` or `Conversations`; of what is not from the hub the name alone is told.
        before, after: the totals of both evaluations.
        task: its name, for people.
        metrics: which of the totals are scores -> their names, for people.

    Raises:
        NotWrittenError: on every process, where the disk is full or fails.
    """
    adapter = read_json(options.output_dir / "adapter_config.json")
    base = adapter["base_model_name_or_path"] if adapter else options.model_name_or_path
    scores = {name: title for name, title in metrics.items() if isinstance(after.get(name), int | float)}
    name = (options.push_to_hub or options.output_dir.resolve().name).split("/")[-1]
    trained_on, evaluated_on = source_of(train_data), source_of(eval_data)
    trained_id, evaluated_id = hub_id(trained_on), hub_id(evaluated_on)
    data = ModelCardData(
        base_model=hub_id(base),
        base_model_relation="adapter" if adapter else "finetune",
        datasets=[trained_id] if trained_id else None,
        language="en" if trained_id in ENGLISH else None,
        library_name="peft" if adapter else "transformers",
        license="mit",
        metrics=list(scores),
        model_name=name,
        pipeline_tag="image-text-to-text",
        tags=["phi3_v", *([options.method] if adapter else [])],
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                task_name=task if evaluated_id else None,  # what is local may be anybody's
                dataset_type=evaluated_id or "local",
                dataset_name=evaluated_id or Path(evaluated_on).name,
                metric_type=metric,
                metric_name=title,
                metric_value=round(float(after[metric]), 4),
            )
            for metric, title in scores.items()
        ],
    )
    where = options.push_to_hub or name
    revision = f" at revision `{options.revision}`" if options.revision else ""
    sections = [
        f"# {name}",
        f"{in_words(base, '')}{revision}, fine-tuned by the recipe for {task} of `phi3v-recipes`.",
        f"## Scores\n\nOn {in_words(evaluated_on)}, answers generated greedily, before and after training:\n",
        table(
            ("metric", "before", "after"),
            [(scores[one], in_digits(before.get(one)), in_digits(after[one])) for one in scores],
        ),
        f"## Training\n\nOn {in_words(trained_on)}.\n",
        table(("option", "value"), how_trained(options, adapter)),
        f"## Use\n\n{how_to_use(where, base, bool(adapter), options)}",
        f"## Licence\n\n{in_words(OFFICIAL_REPOSITORY, '')} is published under the MIT licence. "
        "The data have licences of their own.",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    on_first(lambda: card.save(options.output_dir / "README.md"))


def source_of(data: Any) -> str:
    """The hub's id, file or folder that `Rows` or `Conversations` are from."""
    return str(data.source if hasattr(data, "source") else data.path)


def hub_id(source: str) -> str | None:
    """The hub's id in `ID[:CONFIG][@REVISION]`; None for a file or folder."""
    name = str(source).partition("@")[0].partition(":")[0]
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name.count("/") == 1 and not Path(source).exists() else None


def in_words(source: str, kind: str = "datasets/") -> str:
    """A link to what is on the hub; of what is not, only the name."""
    name = hub_id(source)
    named, _, revision = str(source).partition("@")
    config = named.partition(":")[2]
    if name is None:
        return f"`{Path(source).name}` (local)"
    told = f"[{name}](https://huggingface.co/{kind}{name})" + (f", configuration `{config}`" if config else "")
    return told + (f", revision `{revision}`" if revision else "")


def in_digits(score: Any) -> str:
    """A score as a table has it."""
    return f"{score:.4f}" if isinstance(score, int | float) else "-"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def how_trained(options: argparse.Namespace, adapter: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What was trained how, row by row."""
    lora = (
        f", rank {adapter['r']}, alpha {adapter['lora_alpha']}, dropout {adapter['lora_dropout']:g}" if adapter else ""
    )
    frozen = ", without the image model" if options.use_lora and options.freeze_vision_model else ""
    rates = {"of the tower": options.vision_learning_rate}
    rates["of projection and separators"] = options.projector_learning_rate
    length = f"{options.max_steps} steps" if options.max_steps else f"{options.num_train_epochs} epochs"
    return [
        ("method", METHODS[options.method] + lora + frozen),
        ("data type", options.precision.name),
        ("length", length),
        ("examples per step", str(options.batch_size)),
        ("learning rate", f"{options.learning_rate:g}, {options.warmup_steps} warm-up steps, then linear decay"),
        *((f"learning rate {of}", f"{rate:g}, likewise") for of, rate in rates.items() if rate is not None),
        ("weight decay", f"{options.wd:g}"),
        ("most sub-images per picture (`num_crops`)", str(options.num_crops)),
        ("seed", str(options.seed)),
    ]


def precision_options(options: argparse.Namespace) -> str:
    """What `tools.predict` is told, so that a model is held and asked in the precision it was trained in."""
    bf16 = " --bf16" if options.precision.name == "bf16" else ""
    return bf16 + (" --load_in_4bit" if options.method == "qlora" else "")


def how_to_use(where: str, base: str, is_adapter: bool, options: argparse.Namespace) -> str:
    """How it is asked and loaded."""
    command = f"python -m tools.predict{precision_options(options)} --checkpoint {shlex.quote(where)}"
    command += ' --image picture.png --question "…"'
    loaded = hub_id(base) or Path(base).name if is_adapter else where
    at = f', revision="{options.revision}"' if is_adapter and options.revision else ""
    model = f'model = AutoModelForCausalLM.from_pretrained("{loaded}"{at})'
    if is_adapter:
        model += f'\nmodel = PeftModel.from_pretrained(model, "{where}")'
    return (
        "In a checkout of the recipes, with an `--image` for each picture, and the question in the form of training:"
        f"\n\n```bash\n{command}\n```\n\nor in Python, there:\n\n```python\n"
        "import common.phi3v  # makes the Auto classes know the model; no remote code\n"
        + ("from peft import PeftModel\n" if is_adapter else "")
        + "from transformers import AutoModelForCausalLM, AutoProcessor\n\n"
        f'processor = AutoProcessor.from_pretrained("{where}")\n{model}\n```'
    )


def push_problems(repository: str | None) -> list[str]:
    """What is wrong with `--push_to_hub`, found out before anything is trained."""
    if repository is None:
        return []
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        return [f"--push_to_hub {repository}: {one_line(error)}"]
    if get_token() is None:
        return [f"--push_to_hub {repository}: this machine is not logged in to the hub: run `hf auth login` first"]
    return []


def push_to_hub(options: argparse.Namespace) -> None:
    """Upload card and checkpoint to `--push_to_hub`, on the first process; one that is not there is made, private.

    A failure is told in one line, with the command that does it by hand: what was trained is saved, and stays.
    """
    if not options.push_to_hub or not is_first_process():
        return
    folder, repository = options.output_dir, options.push_to_hub
    adapter = read_json(folder / "adapter_config.json")
    if adapter and hub_id(adapter["base_model_name_or_path"]) is None:
        say(f"{repository}: the adapter's base is a local folder, which nobody else has: see `python -m tools.merge`")
    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="What was trained, and its card",
            allow_patterns=list(UPLOADED),
            ignore_patterns=list(LEFT_OUT),
        )
    except Exception as error:  # whatever it is, the run itself has ended well
        words = ["hf", "upload", repository, str(folder), ".", "--private"]
        patterns = [("--include", one) for one in UPLOADED] + [("--exclude", one) for one in LEFT_OUT]
        command = shlex.join([*words, *(word for pair in patterns for word in pair)])
        say(f"not uploaded to {repository} ({one_line(error)}); what was trained is in {folder}; by hand: {command}")
        return
    say(f"uploaded to {url}")
