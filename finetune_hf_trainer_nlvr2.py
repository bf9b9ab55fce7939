"""Fine-tune Phi-3.5-vision on NLVR2: is a statement about two pictures true?

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py

    torchrun --nproc_per_node=4 finetune_hf_trainer_nlvr2.py --bf16 --use_flash_attention --batch_size 64 \
        --output_dir <output_dir> --learning_rate <lr> --num_train_epochs <epochs>

Evaluates, trains, saves a complete checkpoint, loads what was saved and evaluates that.
"""

import argparse
import functools
import random
from pathlib import Path
from typing import Any

from common.cli import make_parser, parse_options
from common.collation import Example, Turn, encode_example
from common.data import (
    ExampleDataset,
    Rows,
    decode_image,
    load_rows,
    path_inside,
    read_json_lines,
    rows_of_records,
    split_off_first,
)
from common.errors import UserError, run
from common.evaluation import generate_answers, write_evaluation
from common.loading import check_checkpoint, load_model, load_processor, prepare_for_training
from common.metrics import exact_match, mean
from common.training import free_memory, save, say, start, train

HUB = "HuggingFaceM4/the_cauldron:nlvr2"
LAYOUTS = (("images", "texts"),)
EVAL_ROWS = 500  # as published: the first 500 rows for evaluation, the rest for training
QUESTION = "{sentence} Is this statement true? Answer yes or no."  # of the original files' bare sentences
LABELS = {"true": "Yes", "false": "No"}


# --- options


def parse() -> argparse.Namespace:
    parser = make_parser("Fine-tune Phi-3.5-vision on NLVR2.")
    parser.add_argument(
        "--separate_questions", action="store_true", help="a row's questions as examples of their own, not as turns"
    )
    parser.add_argument("--skip_missing", action="store_true", help="leave out examples whose images are missing")
    return parse_options(parser, flash_attention_implies_bf16=True)


# --- data


def load_data(options: argparse.Namespace) -> tuple[Rows, Rows]:
    if options.data_dir and (Path(options.data_dir) / "train.json").is_file():
        train_rows, eval_rows = (original_rows(Path(options.data_dir), split, options) for split in ("train", "dev"))
    else:
        rows = load_rows(options.data_dir or HUB, "train", LAYOUTS, "--data_dir")
        train_rows, eval_rows = split_off_first(rows, EVAL_ROWS)
    return train_rows, eval_rows.first(options.eval_limit)


def original_rows(folder: Path, split: str, options: argparse.Namespace) -> Rows:
    """The original NLVR2 files, in the_cauldron's layout: a row per pair of pictures, with all its sentences."""
    pairs: dict[str, dict[str, Any]] = {}
    num_missing = 0
    for number, record in read_json_lines(folder / f"{split}.json"):
        place = f"{folder / split}.json, line {number}"
        label = LABELS.get(str(record.get("label")).lower())
        if (
            label is None
            or not isinstance(record.get("sentence"), str)
            or not isinstance(record.get("identifier"), str)
        ):
            raise UserError(f"{place}: needs identifier, sentence and label (True or False)")
        pair = record["identifier"].rpartition("-")[0]  # dev-850-0-2: the third sentence of pair dev-850-0
        images = [find_image(folder, split, f"{pair}-img{side}", record, place) for side in (0, 1)]
        if None in images:
            if not options.skip_missing:
                raise UserError(f"{place}: an image of {record['identifier']} is missing; add --skip_missing to go on")
            num_missing += 1
            continue
        row = pairs.setdefault(pair, {"images": [{"bytes": None, "path": path} for path in images], "texts": []})
        row["texts"].append({"user": QUESTION.format(sentence=record["sentence"]), "assistant": label})
    if num_missing:
        say(f"{folder / split}.json: left out {num_missing} examples whose images are missing")
    return rows_of_records(str(folder), split, list(pairs.values()))


def find_image(folder: Path, split: str, name: str, record: dict[str, Any], place: str) -> str | None:
    """`images/<split>/[<directory>/]<name>.*`, or without `images/`; the ending tells nothing about the format."""
    inner = [str(record["directory"])] if "directory" in record else []
    for parent in (folder / "images", folder):
        where = path_inside(folder, str(Path(parent.relative_to(folder), split, *inner, name)), place)
        found = sorted(where.parent.glob(where.name + ".*"))
        if found:
            return str(found[0])
    return None


def make_example(rows: Rows, numbers: list, index: int, generator: random.Random | None = None) -> Example:
    """The pictures in the first turn, the row's further questions as further turns; or one question alone."""
    row_index, number = numbers[index]
    row, place = rows[row_index], rows.place(row_index)
    texts = row["texts"] if number is None else [row["texts"][number]]
    images = [decode_image(cell, place) for cell in row["images"]]
    tags = "".join(f"<|image_{position}|>" for position in range(1, len(images) + 1))
    first = Turn(f"{tags}\n{texts[0]['user']}", texts[0]["assistant"], images)
    return Example(place, [first, *(Turn(text["user"], text["assistant"]) for text in texts[1:])])


def number_examples(rows: Rows, options: argparse.Namespace) -> list[tuple[int, int | None]]:
    """What an epoch holds: every row, or every question of every row."""
    if not options.separate_questions:
        return [(row, None) for row in range(len(rows))]
    texts = rows.table.select_columns(["texts"])
    return [(row, number) for row in range(len(rows)) for number in range(len(texts[row]["texts"]))]


# --- metric


def evaluate(model: Any, processor: Any, rows: Rows, options: argparse.Namespace, name: str) -> dict[str, float]:
    """Accuracy on the rows' first questions, written to `<name>.json`."""
    first_questions = [(row, 0) for row in range(len(rows))]
    asked = functools.partial(make_example, rows, first_questions)
    generated = generate_answers(model, processor, len(rows), asked, options, title=name)
    examples = []
    for index, (answer, _) in enumerate(generated):
        text = rows.table.select_columns(["texts"])[index]["texts"][0]
        about = {"id": rows.place(index), "question": text["user"], "answers": [text["assistant"]]}
        examples.append({**about, "generated": answer, "correct": exact_match(answer, text["assistant"])})
    totals = {"accuracy": mean([one["correct"] for one in examples])}
    write_evaluation(options.output_dir / f"{name}.json", {**totals, "num_examples": len(examples)}, examples)
    return totals


# --- steps


def main() -> None:
    options = parse()
    check_checkpoint(options)
    train_rows, eval_rows = load_data(options)
    arguments = start(options)
    processor = load_processor(options)
    model = load_model(options.model_name_or_path, options)

    before = evaluate(model, processor, eval_rows, options, "eval_only" if options.eval_only else "eval_before")
    if options.eval_only:
        say(f"accuracy {before['accuracy']:.4f}")
        return
    say(f"before training: accuracy {before['accuracy']:.4f}")

    model = prepare_for_training(model, processor, options)
    numbers = number_examples(train_rows, options)
    examples = functools.partial(make_example, train_rows, numbers)
    dataset = ExampleDataset(len(numbers), examples, functools.partial(encode_example, processor), options.seed)
    evaluate_now = functools.partial(evaluate, model, processor, eval_rows, options)
    trainer = train(model, processor, dataset, arguments, options, evaluate_now)
    save(trainer, processor, options.output_dir)
    del model, evaluate_now
    free_memory(trainer)

    model = load_model(options.output_dir, options)
    after = evaluate(model, processor, eval_rows, options, "eval_after")
    say(f"after training:  accuracy {after['accuracy']:.4f}")
    say(f"gain:            accuracy {after['accuracy'] - before['accuracy']:+.4f}")


if __name__ == "__main__":
    run(main)
