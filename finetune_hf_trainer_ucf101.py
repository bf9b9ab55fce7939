"""Fine-tune Phi-3.5-vision to classify videos: UCF-101, eight frames each.

    python convert_ucf101.py --out_dir /path/to/converted_ucf101
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir /path/to/converted_ucf101

Evaluates, trains, saves a complete checkpoint, loads what was saved and evaluates that. Besides the
accuracy it reports that of each class and the confusion matrix (`confusion_*.png`).
"""

import argparse
import functools
import random
from pathlib import Path
from typing import Any

from common.cli import make_parser, parse_options
from common.collation import Example
from common.conversations import Conversations, check_lengths, load_conversations
from common.data import ExampleDataset
from common.errors import run, say, try_all
from common.evaluation import generate_answers, write_confusion, write_evaluation
from common.loading import check_checkpoint, load_model, load_processor, longest_sequence, prepare_for_training
from common.metrics import exact_match, mean, strip_answer
from common.preflight import check_machine, preflight
from common.training import finish, is_saved, once, save, start, train

OTHER = "(other)"  # an answer that names no class


# --- options


def parse() -> argparse.Namespace:
    parser = make_parser("Fine-tune Phi-3.5-vision to classify videos.", num_crops=4)
    parser.add_argument("--eval_split", choices=("val", "test"), default="val", help="to evaluate on (%(default)s)")
    needed = {"data_dir": "the folder that convert_ucf101.py has written"}
    return parse_options(parser, flash_attention_implies_bf16=True, needed=needed)


# --- data


def load_data(options: argparse.Namespace) -> tuple[Conversations | None, Conversations, list[str]]:
    """What to train on, what to evaluate on, and the classes of both."""
    folder = Path(options.data_dir)
    how = {options.eval_split: "stop"}  # a bad line of what is evaluated is always an error
    how |= {} if options.eval_only else {"train": options.bad_examples}
    files = [(folder / f"ucf101_{one}.jsonl", folder / "images", bad) for one, bad in how.items()]
    loaded = try_all(*(functools.partial(load_conversations, *each) for each in files))
    classes = sorted({label for one in loaded for label in labels_of(one)})
    return None if options.eval_only else loaded[1], loaded[0].first(options.eval_limit), classes


def labels_of(data: Conversations) -> list[str]:
    return [record["conversations"][-1]["assistant"] for record in data.without_bad()]


def make_example(data: Conversations, index: int, generator: random.Random | None = None) -> Example:
    return data.example(index)


# --- metric


def evaluate(
    model: Any, processor: Any, data: Conversations, classes: list[str], options: argparse.Namespace, name: str
) -> dict[str, Any]:
    """Accuracy over the videos and of each class, the confusion matrix; written to `<name>.json` and a PNG."""
    asked = functools.partial(make_example, data)
    generated = generate_answers(model, processor, len(data), asked, options, title=name)
    truth = labels_of(data)
    correct = [exact_match(one.text, label) for one, label in zip(generated, truth, strict=True)]
    of_class = {one: [score for score, label in zip(correct, truth, strict=True) if label == one] for one in classes}
    totals = {
        "accuracy": mean(correct),
        "accuracy_per_class": {one: mean(scores) for one, scores in of_class.items() if scores},
    }
    named = {strip_answer(one).lower(): one for one in classes}
    predicted = [named.get(strip_answer(one.text).lower(), OTHER) for one in generated]
    labels = [*classes, OTHER]
    matrix = write_confusion(options.output_dir / f"confusion_{name}.png", truth, predicted, labels)
    confusion = {"labels": labels, "rows_true_columns_predicted": matrix}
    examples = []
    for index, (record, label, one, score) in enumerate(zip(data.records, truth, generated, correct, strict=True)):
        about = {"id": record.get("id", data.place(index)), "question": record["conversations"][-1]["user"]}
        about |= {"answers": [label], "images": one.images}
        examples.append({**about, "generated": one.text, "correct": score})
    write_evaluation(options.output_dir / f"{name}.json", {**totals, "confusion": confusion}, examples)
    return totals


# --- steps


def main() -> None:
    options = parse()
    check_checkpoint(options)
    train_data, eval_data, classes = load_data(options)
    arguments = start(options, train_data, eval_data)
    processor = load_processor(options)
    examples = functools.partial(make_example, train_data)
    dataset = None if options.eval_only else ExampleDataset(len(train_data), examples, processor, options.seed)
    check_lengths(eval_data, processor, longest_sequence(options))
    preflight(dataset, processor, options)
    model = load_model(options.model_name_or_path, options)

    before = once(evaluate, model, processor, eval_data, classes, options, "eval_before")
    if options.eval_only:
        say(f"accuracy {before['accuracy']:.4f}")
        return
    say(f"before training: accuracy {before['accuracy']:.4f}")

    if not is_saved(options):  # a run that goes on may have come that far
        model = prepare_for_training(model, processor, options)
        trainer = train(model, processor, dataset, arguments, options, evaluate, eval_data, classes)
        save(trainer, options)
    del model

    model = load_model(options.output_dir, options)
    after = once(evaluate, model, processor, eval_data, classes, options, "eval_after")
    say(f"after training:  accuracy {after['accuracy']:.4f}")
    finish(options, train_data, eval_data, before, after, "UCF-101", {"accuracy": "accuracy"})


if __name__ == "__main__":
    run(main, check_checkpoint, load_data, check_machine)
