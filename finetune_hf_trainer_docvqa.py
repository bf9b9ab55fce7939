"""Fine-tune Phi-3.5-vision on DocVQA.

    # minimal: 1,000 questions, 200 test questions
    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py
    # full training set (10.2 k pages, 39.5 k questions)
    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --full_train --bf16 --use_flash_attention \
        --batch_size 64 --output_dir <output_dir> --learning_rate <lr> --num_train_epochs <epochs>

Evaluates, trains, saves a complete checkpoint, loads what was saved and evaluates that.
"""

import argparse
import functools
import random
from typing import Any

from common.cli import make_parser, parse_options
from common.collation import Example, Turn
from common.data import ExampleDataset, Rows, check_answers, decode_image, load_rows, number_pictures, number_questions
from common.errors import run, say, try_all
from common.evaluation import generate_answers, write_evaluation
from common.loading import check_checkpoint, load_model, load_processor, prepare_for_training
from common.metrics import anls, anls_recipe, mean
from common.preflight import check_machine, preflight
from common.training import finish, is_saved, once, save, start, train

MINI = "nielsr/docvqa_1200_examples"
FULL = "HuggingFaceM4/the_cauldron:docvqa"
VALIDATION = "lmms-lab/DocVQA:DocVQA"
LAYOUTS = (("image", "query", "answers"), ("images", "texts"), ("image", "question", "answers"))


# --- options


def parse() -> argparse.Namespace:
    parser = make_parser("Fine-tune Phi-3.5-vision on DocVQA.")
    parser.add_argument("--full_train", action="store_true", help=f"train on {FULL} instead of {MINI}")
    parser.add_argument("--all_questions", action="store_true", help="an epoch is every question, not one per page")
    parser.add_argument("--share_images", action="store_true", help="every question, those of a page at once")
    parser.add_argument("--train_data", metavar="DATA", help="train on it: hub id (ID or ID:CONFIG), folder or file")
    parser.add_argument("--eval_data", metavar="DATA", help="evaluate on it, likewise")
    parser.add_argument("--eval_split", choices=("test", "validation"), default="test", help="validation: official set")
    return parse_options(parser)


# --- data


def load_data(options: argparse.Namespace) -> tuple[Rows | None, Rows]:
    evaluated_on = VALIDATION if options.eval_split == "validation" else MINI
    advice = "evaluate on rows with answers, as those of --eval_split validation"
    train = (options.train_data, FULL if options.full_train else MINI, "--train_data", "train", options.bad_examples)
    evaluation = (options.eval_data, evaluated_on, "--eval_data", options.eval_split, "stop", advice)
    return try_all(
        lambda: None if options.eval_only else load(options, *train),
        lambda: load(options, *evaluation).first(options.eval_limit),
    )


def load(options: argparse.Namespace, given: str | None, default: str, option: str, split: str, *how: str) -> Rows:
    if options.data_dir and not given:
        given, option = options.data_dir, "--data_dir"
    return check_answers(load_rows(given or default, split, LAYOUTS, option), questions, *how)


def questions(row: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """A row of any known layout -> its questions, each with the accepted answers."""
    if "texts" in row:
        return [(text["user"], [text["assistant"]]) for text in row["texts"]]
    question = row["query"]["en"] if "query" in row else row["question"]
    return [(f"{question}\nAnswer briefly.", row["answers"])]


def ask(rows: Rows, index: int, question: str | None = None, answer: str = "") -> Example:
    row, place = rows[index], rows.place(index)
    question = question or questions(row)[0][0]
    image = decode_image(row["images"][0] if "images" in row else row["image"], place)
    return Example(place, [Turn(f"<|image_1|>\n{question}", answer, [image])])


def training_set(rows: Rows, processor: Any, options: argparse.Namespace) -> ExampleDataset:
    """One question drawn per page and epoch, or every question; one accepted answer drawn each time."""
    numbers = number_questions(rows, each=options.all_questions or options.share_images)
    pictures = number_pictures(rows, numbers) if options.share_images else None

    def make_example(index: int, generator: random.Random) -> Example:
        row, number = numbers[index]
        asked = questions(rows[row])
        question, accepted = generator.choice(asked) if number is None else asked[number]
        return ask(rows, row, question, generator.choice(accepted or [""]))

    return ExampleDataset(len(numbers), make_example, processor, options.seed, pictures)


# --- metric


def evaluate(model: Any, processor: Any, rows: Rows, options: argparse.Namespace, name: str) -> dict[str, float]:
    """ANLS over the rows, written to `<name>.json`."""
    asked, pictures = functools.partial(ask, rows), number_pictures(rows)
    generated = generate_answers(model, processor, len(rows), asked, options, name, pictures=pictures)
    examples = []
    for index, (row, (answer, _, images)) in enumerate(zip(rows.without_images(), generated, strict=True)):
        question, accepted = questions(row)[0]
        about = {"id": str(row.get("id", row.get("questionId", index))), "question": question, "answers": accepted}
        scores = {"anls": anls(answer, accepted), "anls_recipe": anls_recipe(answer, accepted)}
        examples.append({**about, "images": images, "generated": answer, **scores})
    totals = {metric: mean([one[metric] for one in examples]) for metric in ("anls", "anls_recipe")}
    write_evaluation(options.output_dir / f"{name}.json", totals, examples)
    return totals


def in_words(totals: dict[str, float]) -> str:
    return f"ANLS {totals['anls']:.4f} (the published tables' variant {totals['anls_recipe']:.4f})"


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
        say(in_words(before))
        return
    say(f"before training: {in_words(before)}")

    if not is_saved(options):  # a run that goes on may have come that far
        model = prepare_for_training(model, processor, options)
        trainer = train(model, processor, dataset, arguments, options, evaluate, eval_rows)
        save(trainer, options)
    del model

    model = load_model(options.output_dir, options)
    after = once(evaluate, model, processor, eval_rows, options, "eval_after")
    say(f"after training:  {in_words(after)}")
    finish(options, train_rows, eval_rows, before, after, "DocVQA", {"anls": "ANLS"})


if __name__ == "__main__":
    run(main, check_checkpoint, load_data, check_machine)
