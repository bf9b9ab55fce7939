"""Fine-tune Phi-3.5-vision on NLVR2: is a statement about two pictures true?

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py
    torchrun --nproc_per_node=4 finetune_hf_trainer_nlvr2.py --bf16 --use_flash_attention --batch_size 64 \
        --output_dir <output_dir> --learning_rate <lr> --num_train_epochs <epochs>

Evaluates, trains, saves a complete checkpoint, loads what was saved and evaluates that.
"""

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

from common import data
from common.cli import make_parser, parse_options
from common.collation import Example, Turn
from common.errors import UserError, run, say, try_all
from common.evaluation import generate_answers, write_evaluation
from common.loading import check_checkpoint, load_model, load_processor, prepare_for_training
from common.metrics import exact_match, mean
from common.preflight import check_machine, preflight
from common.training import finish, is_saved, once, save, start, train

HUB = "HuggingFaceM4/the_cauldron:nlvr2"
EVAL_ROWS = 500  # as published: the first 500 rows for evaluation, the rest for training
EVAL_FILE = "dev.json"  # of the original files
QUESTION = "{sentence} Is this statement true? Answer yes or no."  # they hold bare sentences
LABELS = {"true": "Yes", "false": "No"}


# --- options


def parse() -> argparse.Namespace:
    parser = make_parser("Fine-tune Phi-3.5-vision on NLVR2.")
    parser.add_argument("--separate_questions", action="store_true", help="a row's questions as examples, not as turns")
    parser.add_argument(
        "--share_images", action="store_true", help="a pair's questions in one sequence, once its images"
    )
    parser.add_argument("--eval_file", metavar="FILE", help=f"the original file to evaluate on ({EVAL_FILE})")
    parser.add_argument("--skip_missing", action="store_true", help="leave out what of original files lacks images")
    return parse_options(parser, flash_attention_implies_bf16=True)


# --- data


def load_data(options: argparse.Namespace) -> tuple[data.Rows | None, data.Rows]:
    folder = Path(options.data_dir or "")
    if options.eval_file or (options.data_dir and any((folder / one).is_file() for one in ("train.json", EVAL_FILE))):
        train_rows, eval_rows = try_all(
            lambda: None if options.eval_only else original_rows(folder, "train.json", options, by_pair=True),
            lambda: original_rows(folder, options.eval_file or EVAL_FILE, options, by_pair=False),
        )
    else:
        rows = data.load_rows(options.data_dir or HUB, "train", (("images", "texts"),), "--data_dir", "train.json")
        train_rows, eval_rows = data.split_off_first(rows, EVAL_ROWS, options)
    return data.with_answers(train_rows, eval_rows.first(options.eval_limit), options)


def original_rows(folder: Path, name: str, options: argparse.Namespace, by_pair: bool) -> data.Rows:
    """An original file in the_cauldron's layout: a row per pair of pictures with all its sentences, or per sentence."""
    images = data.ImageFinder(folder, inside=("images", "."))

    def make_row(record: dict[str, Any], place: str) -> dict[str, Any]:
        identifier, sentence = record.get("identifier"), record.get("sentence")
        label = LABELS.get(str(record.get("label")).lower())
        if label is None or not isinstance(sentence, str) or not isinstance(identifier, str):
            raise UserError(f"{place}: needs identifier, sentence and label (True or False)")
        # dev-850-0-2: of the set 850, the pair 0, its sentence 2; pictures [images/]dev/dev-850-0-img0.png and -img1
        pair, split = identifier.rpartition("-")[0], identifier.partition("-")[0]
        inner = "/".join([split, *([str(record["directory"])] if "directory" in record else []), pair])
        found = [images.find(f"{inner}-img{side}", place) for side in (0, 1)]
        texts = [{"user": QUESTION.format(sentence=sentence), "assistant": label}]
        return {"id": identifier, "images": found, "texts": texts, **({"pair": pair} if by_pair else {})}

    bad_examples = options.bad_examples if by_pair else "stop"  # what is evaluated is to be whole
    merge_by = "pair" if by_pair else None
    return data.rows_of_file(folder, name, make_row, bad_examples, options.skip_missing, merge_by)


def make_example(rows: data.Rows, numbers: list, index: int, generator: random.Random | None = None) -> Example:
    """The pictures in the first turn, the row's further questions as further turns; or one question alone."""
    row_index, number = numbers[index]
    row, place = rows[row_index], rows.place(row_index)
    texts = row["texts"] if number is None else [row["texts"][number]]
    images = [data.decode_image(cell, place) for cell in row["images"]]
    tags = "".join(f"<|image_{position}|>" for position in range(1, len(images) + 1))
    first = Turn(f"{tags}\n{texts[0]['user']}", texts[0]["assistant"], images)
    return Example(place, [first, *(Turn(text["user"], text["assistant"]) for text in texts[1:])])


def training_set(rows: data.Rows, processor: Any, options: argparse.Namespace) -> data.ExampleDataset:
    numbers = data.number_questions(rows, each=options.separate_questions or options.share_images)
    pictures = data.number_pictures(rows, numbers) if options.share_images else None
    return data.ExampleDataset(len(numbers), partial(make_example, rows, numbers), processor, options.seed, pictures)


# --- metric


def evaluate(model: Any, processor: Any, rows: data.Rows, options: argparse.Namespace, name: str) -> dict[str, float]:
    """Accuracy on the rows' first questions, written to `<name>.json`."""
    asked = partial(make_example, rows, [(row, 0) for row in range(len(rows))])
    generated = generate_answers(model, processor, len(rows), asked, options, name, pictures=data.number_pictures(rows))
    examples = []
    for index, (row, (answer, _, images)) in enumerate(zip(rows.without_images(), generated, strict=True)):
        question, correct = row["texts"][0]["user"], row["texts"][0]["assistant"]
        about = {"id": row.get("id", rows.place(index)), "question": question, "answers": [correct]}
        examples.append({**about, "images": images, "generated": answer, "correct": exact_match(answer, correct)})
    totals = {"accuracy": mean([one["correct"] for one in examples])}
    write_evaluation(options.output_dir / f"{name}.json", totals, examples)
    return totals


# --- steps


def main() -> None:
    options = parse()
    check_checkpoint(options)
    train_rows, eval_rows = load_data(options)
    arguments = start(options, train_rows, eval_rows)
    processor = load_processor(options)
    dataset = None if options.eval_only else training_set(train_rows, processor, options)
    preflight(dataset, processor, options)
    model = load_model(options.model_name_or_path, options)

    before = once(evaluate, model, processor, eval_rows, options, "eval_before")
    if options.eval_only:
        say(f"accuracy {before['accuracy']:.4f}")
        return
    say(f"before training: accuracy {before['accuracy']:.4f}")

    if not is_saved(options):  # a run that goes on may have come that far
        model = prepare_for_training(model, processor, options)
        trainer = train(model, processor, dataset, arguments, options, evaluate, eval_rows)
        save(trainer, options)
    del model

    model = load_model(options.output_dir, options)
    after = once(evaluate, model, processor, eval_rows, options, "eval_after")
    say(f"after training:  accuracy {after['accuracy']:.4f}")
    finish(options, train_rows, eval_rows, before, after, "NLVR2", {"accuracy": "accuracy"})


if __name__ == "__main__":
    run(main, check_checkpoint, load_data, check_machine)
