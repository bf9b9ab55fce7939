"""Fine-tune Phi-3.5-vision to classify hateful memes.

    # A100 or H100 nodes; without the last two options on V100 (float16)
    torchrun --nproc_per_node=8 --nnodes=<num_nodes> \
        --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT --node_rank=$NODE_RANK \
        finetune_hf_trainer_hateful_memes.py --output_dir <output_dir> --batch_size 64 --use_flash_attention --bf16

    # LoRA; QLoRA with --use_qlora besides
    torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --output_dir <output_dir> --batch_size 64 \
        --use_lora

Evaluates, trains, saves a complete checkpoint, loads what was saved and evaluates that.
"""

import argparse
import functools
import random
from pathlib import Path
from typing import Any

from common import data
from common.cli import make_parser, parse_options
from common.collation import Example, Turn
from common.data import ExampleDataset, Rows
from common.errors import UserError, run, say, try_all
from common.evaluation import generate_answers, write_evaluation
from common.loading import check_checkpoint, load_model, load_processor, prepare_for_training
from common.metrics import auroc, exact_match, mean, strip_answer
from common.preflight import check_machine, preflight
from common.training import finish, is_saved, once, save, start, train

HUB = "HuggingFaceM4/the_cauldron:hateful_memes"
LAYOUTS = (("images", "texts"),)
EVAL_ROWS = 500  # as published: the first 500 rows for evaluation, the rest for training
EVAL_FILE = "dev_seen.jsonl"  # of the original challenge's files
QUESTION = "Is this meme hateful? Answer yes or no."  # which those files leave out
LABELS = ("No", "Yes")


# --- options


def parse() -> argparse.Namespace:
    parser = make_parser("Fine-tune Phi-3.5-vision to classify hateful memes.")
    help_text = f"of the challenge's files in --data_dir, the one to evaluate on ({EVAL_FILE})"
    parser.add_argument("--eval_file", metavar="FILE", help=help_text)
    return parse_options(parser)


# --- data


def load_data(options: argparse.Namespace) -> tuple[Rows | None, Rows]:
    folder = Path(options.data_dir or "")
    if options.eval_file or (options.data_dir and any((folder / one).is_file() for one in ("train.jsonl", EVAL_FILE))):
        train_rows, eval_rows = try_all(
            lambda: None if options.eval_only else challenge_rows(folder, "train.jsonl", options.bad_examples),
            lambda: challenge_rows(folder, options.eval_file or EVAL_FILE),
        )
    else:
        rows = data.load_rows(options.data_dir or HUB, "train", LAYOUTS, "--data_dir", "train.jsonl")
        train_rows, eval_rows = data.split_off_first(rows, EVAL_ROWS, options)
    return data.with_answers(train_rows, eval_rows.first(options.eval_limit), options)


def challenge_rows(folder: Path, name: str, bad_examples: str = "stop") -> Rows:
    """The challenge's files (`img/`, JSON lines of id, img, label, text), in the_cauldron's layout.

    The meme's `text` stays out of the prompt, as in the published recipe: the model reads it in the picture.
    """

    def make_row(record: dict[str, Any], place: str) -> dict[str, Any]:
        if not isinstance(record.get("img"), str) or record.get("label") not in (0, 1):
            raise UserError(f"{place}: needs img, a path, and label, 0 or 1 (the test files without labels have none)")
        image = data.path_inside(folder, record["img"], place)
        texts = [{"user": QUESTION, "assistant": LABELS[int(record["label"])]}]
        return {"id": str(record.get("id", place)), "images": [image], "texts": texts}

    return data.rows_of_file(folder, name, make_row, bad_examples)


def make_example(rows: Rows, index: int, generator: random.Random | None = None) -> Example:
    row, place = rows[index], rows.place(index)
    text, image = row["texts"][0], data.decode_image(row["images"][0], place)
    return Example(place, [Turn(f"<|image_1|>\n{text['user']}", text["assistant"], [image])])


# --- metric


def evaluate(model: Any, processor: Any, rows: Rows, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Accuracy over the rows, and the AUROC of P(yes) / (P(yes) + P(no)), written to `<name>.json`."""
    labels = [row["texts"][0]["assistant"] for row in rows.without_images()]
    # the two answers as the data writes them ("Yes", "No."), whose first tokens are compared
    written = {strip_answer(label).lower(): label for label in labels}
    candidates = [written.get(label.lower(), label) for label in LABELS]
    asked = functools.partial(make_example, rows)
    generated = generate_answers(model, processor, len(rows), asked, options, title=name, candidates=candidates)
    examples = []
    for index, (row, (answer, (no, yes), images)) in enumerate(zip(rows.without_images(), generated, strict=True)):
        label = labels[index]
        about = {"id": row.get("id", rows.place(index)), "question": row["texts"][0]["user"], "answers": [label]}
        score = {"correct": exact_match(answer, label), "probability_yes": yes / max(yes + no, 1e-30)}
        examples.append({**about, "images": images, "generated": answer, **score})
    truth = [strip_answer(label).lower() == "yes" for label in labels]
    area = auroc(truth, [one["probability_yes"] for one in examples])
    totals = {"accuracy": mean([one["correct"] for one in examples]), "auroc": area}
    write_evaluation(options.output_dir / f"{name}.json", totals, examples)
    return totals


def in_words(totals: dict[str, Any]) -> str:
    area = "only one class" if totals["auroc"] is None else f"AUROC {totals['auroc']:.4f}"
    return f"accuracy {totals['accuracy']:.4f} ({area})"


# --- steps


def main() -> None:
    options = parse()
    check_checkpoint(options)
    train_rows, eval_rows = load_data(options)
    arguments = start(options, train_rows, eval_rows)
    processor = load_processor(options)
    examples = functools.partial(make_example, train_rows)
    dataset = None if options.eval_only else ExampleDataset(len(train_rows), examples, processor, options.seed)
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
    finish(options, train_rows, eval_rows, before, after, "Hateful Memes", {"accuracy": "accuracy", "auroc": "AUROC"})


if __name__ == "__main__":
    run(main, check_checkpoint, load_data, check_machine)
