"""Fine-tune Phi-3.5-vision to classify videos: UCF-101, eight frames each.

    python convert_ucf101.py --out_dir /path/to/converted_ucf101
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir /path/to/converted_ucf101

Evaluates, trains, saves a complete checkpoint, loads what was saved and evaluates that. Besides the
accuracy it reports that of each class and the confusion matrix (`confusion_*.png`).
"""

import argparse
import functools
import random
from collections import Counter
from pathlib import Path
from typing import Any

from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from common.cli import make_parser, parse_options
from common.collation import Example, encode_example
from common.conversations import Conversations, load_conversations
from common.data import ExampleDataset
from common.errors import UserError, is_first_process, run
from common.evaluation import generate_answers, write_evaluation
from common.loading import check_checkpoint, load_model, load_processor, prepare_for_training
from common.metrics import exact_match, mean, strip_answer
from common.training import free_memory, save, say, start, train

OTHER = "(other)"  # an answer that names no class


# --- options


def parse() -> argparse.Namespace:
    parser = make_parser("Fine-tune Phi-3.5-vision to classify videos.", num_crops=4)
    parser.add_argument(
        "--eval_split", choices=("val", "test"), default="test", help="what to evaluate on (%(default)s)"
    )
    return parse_options(parser, flash_attention_implies_bf16=True)


# --- data


def load_data(options: argparse.Namespace) -> tuple[Conversations, Conversations]:
    if options.data_dir is None:
        raise UserError("--data_dir is needed: the folder that convert_ucf101.py has written")
    folder = Path(options.data_dir)
    train_data, eval_data = (
        load_conversations(folder / f"ucf101_{split}.jsonl", folder / "images")
        for split in ("train", options.eval_split)
    )
    return train_data, eval_data.first(options.eval_limit)


def make_example(data: Conversations, index: int, generator: random.Random | None = None) -> Example:
    return data.example(index)


# --- metric


def evaluate(model: Any, processor: Any, data: Conversations, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Accuracy over the videos and of each class, the confusion matrix; written to `<name>.json` and a PNG."""
    generated = generate_answers(
        model, processor, len(data), functools.partial(make_example, data), options, title=name
    )
    truth = [record["conversations"][-1]["assistant"] for record in data.records]
    classes = sorted(set(truth))
    named = {strip_answer(one).lower(): one for one in classes}
    predicted = [named.get(strip_answer(answer).lower(), OTHER) for answer, _ in generated]
    correct = [exact_match(answer, label) for (answer, _), label in zip(generated, truth, strict=True)]
    counts, right = Counter(truth), Counter(label for label, score in zip(truth, correct, strict=True) if score)
    labels = [*classes, OTHER]
    matrix = confusion_matrix(truth, predicted, labels=labels)
    totals = {"accuracy": mean(correct), "accuracy_per_class": {one: right[one] / counts[one] for one in classes}}
    if is_first_process():
        options.output_dir.mkdir(parents=True, exist_ok=True)
        display = ConfusionMatrixDisplay(matrix, display_labels=labels).plot(xticks_rotation="vertical", colorbar=False)
        display.figure_.set_size_inches(3 + len(labels) / 2, 3 + len(labels) / 2)
        display.figure_.savefig(options.output_dir / f"confusion_{name}.png", bbox_inches="tight")
    examples = [
        {"id": record.get("id", str(index)), "answers": [truth[index]], "generated": answer, "correct": correct[index]}
        for index, (record, (answer, _)) in enumerate(zip(data.records, generated, strict=True))
    ]
    confusion = {"labels": labels, "rows_true_columns_predicted": matrix.tolist()}
    content = {**totals, "confusion": confusion, "num_examples": len(examples)}
    write_evaluation(options.output_dir / f"{name}.json", content, examples)
    return totals


# --- steps


def main() -> None:
    options = parse()
    check_checkpoint(options)
    train_data, eval_data = load_data(options)
    arguments = start(options)
    processor = load_processor(options)
    model = load_model(options.model_name_or_path, options)

    before = evaluate(model, processor, eval_data, options, "eval_only" if options.eval_only else "eval_before")
    if options.eval_only:
        say(f"accuracy {before['accuracy']:.4f}")
        return
    say(f"before training: accuracy {before['accuracy']:.4f}")

    model = prepare_for_training(model, processor, options)
    encode = functools.partial(encode_example, processor)
    dataset = ExampleDataset(len(train_data), functools.partial(make_example, train_data), encode, options.seed)
    evaluate_now = functools.partial(evaluate, model, processor, eval_data, options)
    trainer = train(model, processor, dataset, arguments, options, evaluate_now)
    save(trainer, processor, options.output_dir)
    del model, evaluate_now
    free_memory(trainer)

    model = load_model(options.output_dir, options)
    after = evaluate(model, processor, eval_data, options, "eval_after")
    say(f"after training:  accuracy {after['accuracy']:.4f}")
    say(f"gain:            accuracy {after['accuracy'] - before['accuracy']:+.4f}")


if __name__ == "__main__":
    run(main)
