"""Ask a checkpoint, or an adapter on the base that it names.

    python -m tools.predict --checkpoint output --image page.png --question "What is the date?"
    python -m tools.predict --checkpoint output --data questions.jsonl --image_dir images --output answers.jsonl

A question's pictures stand before its text, numbered, as in training; the text is best in the form that was trained
(DocVQA's ends in a line "Answer briefly."). A file is in the JSONL format of `common/conversations.py`: of every line
the last turn is asked, whose `assistant` may be missing, and the turns before it are given with their answers.

`--output` gets a line for every line of the file, in its order: `line`, `id` where there is one, `question`, `images`,
`answer`, and by what it is known again: `conversation`, a digest of all that was asked, and what answered. Lines that
it holds already are not asked again, so that a run that was stopped goes on; one that was half written then is dropped.
Bad lines are named, all of them before the model is loaded but for pictures that cannot be decoded; they end the run
(`--bad_examples stop`), or get an `error` in place of the answer (`--bad_examples skip`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from common.cli import MAX_NEW_TOKENS, MAX_NUM_CROPS, choose_precision, revision_problems
from common.collation import Example
from common.conversations import (
    CONTROL,
    Conversations,
    Line,
    find_problems,
    gather,
    make_turns,
    measure_image,
    measure_lengths,
    picture_files,
    read_lines,
)
from common.data import decode_image
from common.errors import UserError, first_of, raise_all, run
from common.evaluation import generate_answers
from common.files import read_json
from common.loading import (
    check_checkpoint,
    checkpoint_of,
    find_adapter,
    load_model,
    load_processor,
    longest_sequence,
)
from common.phi3v import Phi3VProcessor
from common.phi3v.stock import find_file
from common.prompt_batches import LOOK_AHEAD

RESULTS = ("answer", "error")  # of a line of the output
UNASKED = "-"  # in place of a last turn's answer, which is never shown to the model


@dataclass(frozen=True)
class Question:
    """One line of the file.

    Attributes:
        about: what its line in the output begins with.
        pictures: the files.
        index: among the conversations that can be asked; None where it cannot.
        error: why not.
    """

    about: dict[str, Any]
    pictures: tuple[Path, ...]
    index: int | None
    error: str


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; all wrong ones reported at once."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict", description="Ask a checkpoint or an adapter.", allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, metavar="NAME", help="folder or hub id, also of an adapter")
    parser.add_argument("--revision", metavar="COMMIT", help="of a hub id: commit, branch or tag (its main branch)")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be given several times")
    parser.add_argument("--question", metavar="TEXT", help="what stands after the pictures")
    parser.add_argument("--data", type=Path, metavar="FILE", help="JSONL file; of every line the last turn is asked")
    parser.add_argument("--image_dir", type=Path, metavar="DIR", help="what its paths are relative to (its own folder)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSONL file for the answers; it is gone on with")
    parser.add_argument("--bad_examples", choices=("stop", "skip"), default="stop", help="what a bad line does")
    parser.add_argument("--num_crops", type=int, metavar="N", help="most sub-images per picture (as trained)")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="(%(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="questions at once (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 (else float16 on CUDA, float32 on a CPU)")
    parser.add_argument("--load_in_4bit", action="store_true", help="weights in NF4, as QLoRA has its base")
    options = parser.parse_args(arguments)
    problems = revision_problems(options.revision, options.checkpoint)
    if (options.question is None) == (options.data is None):
        problems.append("give either --question, with an --image for each of its pictures, or --data and --output")
    problems += [f"--image {path}: there is no such file" for path in options.image if not path.is_file()]
    if found := CONTROL.search(options.question or ""):
        problems.append(f"--question holds {found[0]}, which is put there by itself: take it out")
    if options.data is None:
        alone = [name for name in ("output", "image_dir") if getattr(options, name) is not None]
        problems += [f"--{name} goes with --data, and with --question changes nothing: leave it out" for name in alone]
    else:
        options.image_dir = options.image_dir or options.data.parent
        problems += [f"--data {options.data}: there is no such file"] * (not options.data.is_file())
        problems += [f"--image_dir {options.image_dir}: there is no such folder"] * (not options.image_dir.is_dir())
        problems += ["--data names its pictures itself: leave --image out"] * bool(options.image)
        if options.output is None or options.output.resolve() == options.data.resolve():
            problems.append("--data needs --output, another file, for the answers")
        elif not options.output.parent.is_dir():
            problems.append(f"--output {options.output}: there is no folder {options.output.parent}")
    if options.num_crops is not None and not 1 <= options.num_crops <= MAX_NUM_CROPS:
        problems.append(f"--num_crops {options.num_crops}: it must be 1 to {MAX_NUM_CROPS}")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            problems.append(f"--{name} {getattr(options, name)}: it must be at least 1")
    raise_all(problems)
    return options


def how_to_load(
    checkpoint: str,
    num_crops: int | None = None,
    bf16: bool = False,
    use_qlora: bool = False,
    batch_size: int = 1,
    revision: str | None = None,
) -> argparse.Namespace:
    """The options by which `common.loading` and `generate_answers` take a checkpoint for its answers alone, on the GPU
    where there is one, in the precision of the scripts' `--eval_only`.

    Raises:
        UserError: nothing there that can be loaded.
    """
    values = {"model_name_or_path": str(checkpoint), "num_crops": num_crops, "bf16": bf16, "use_qlora": use_qlora}
    values |= {"use_lora": False, "eval_only": True, "attention": "sdpa", "max_crops_per_call": None}
    values |= {"use_liger": False, "torch_compile": False, "num_workers": 0, "tqdm": False, "bad_examples": "stop"}
    values |= {"report_images": False, "revision": revision}
    values |= {"eval_batch_size_per_gpu": batch_size, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    options = argparse.Namespace(**values)
    check_checkpoint(options)
    options.precision = choose_precision(options)
    options.device = torch.device(options.device)
    base, its_revision = checkpoint_of(checkpoint, options.revision)
    find_adapter(base, its_revision)  # the base of an adapter must be there, too
    if num_crops is None:
        options.num_crops = stored_num_crops(checkpoint, options.revision) or stored_num_crops(base, its_revision)
    return options


def stored_num_crops(name: str, revision: str | None) -> int | None:
    """What a checkpoint's, or an adapter's, own processor says: the number that it was trained with."""
    hub = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    file = find_file(str(name), "preprocessor_config.json", **hub)
    return (read_json(Path(file)) or {}).get("num_crops") if file else None


def read_questions(
    options: argparse.Namespace, processor: Phi3VProcessor, limit: int
) -> tuple[list[Question], Conversations]:
    """Every line of the file, and the conversations of those that can be asked; no picture is decoded.

    Args:
        limit: the longest conversation, in tokens.
    """
    lines = [_without_answer(line) for line in read_lines(options.data, options.image_dir)]
    sizes = {file: measure_image(file) for file in picture_files(lines)}
    faults = {line.number: "; ".join(find_problems(line, sizes)) for line in lines}
    data = gather(options.data, options.image_dir, [line for line in lines if not faults[line.number]], sizes)
    index_of = {number: index for index, number in enumerate(data.lines)}
    for number, (_, fault) in zip(data.lines, measure_lengths(data, processor, limit), strict=True):
        faults[number] = (fault or "").removeprefix(f"{options.data}, line {number}: ")
    questions = []
    for line in lines:
        about = {"line": line.number} | {name: line.record[name] for name in ("id",) if name in line.record}
        turns = line.record.get("conversations")
        last = turns[-1] if isinstance(turns, list) and turns else None
        about["question"] = last.get("user") if isinstance(last, dict) else None
        about["images"] = [os.path.relpath(picture.file, options.image_dir) for picture in line.pictures]
        about["conversation"] = digest_of(line)
        pictures, error = tuple(picture.file for picture in line.pictures), faults[line.number]
        questions.append(Question(about, pictures, None if error else index_of[line.number], error))
    return questions, data


def digest_of(line: Line) -> str:
    """Of all turns of a line but the last answer, and of its pictures' sizes in bytes, for to read them takes long."""
    sizes = [picture.file.stat().st_size if picture.file.is_file() else None for picture in line.pictures]
    return hashlib.sha256(json.dumps([line.record.get("conversations"), sizes]).encode()).hexdigest()[:16]


def _without_answer(line: Line) -> Line:
    """The line with its last answer, and what is wrong with that alone, left out."""
    turns = line.record.get("conversations")
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return line
    record = {**line.record, "conversations": [*turns[:-1], {**turns[-1], "assistant": UNASKED}]}
    of_answer = f"turn {len(turns)}: assistant "
    return replace(line, record=record, problems=tuple(one for one in line.problems if not one.startswith(of_answer)))


def count_answered(file: BinaryIO, path: Path, questions: Sequence[Question], made_by: dict[str, Any]) -> int:
    """How many of the questions the output holds already; what is half written is cut off.

    Raises:
        UserError: with the first line that is not the answer to the question in its place, by this checkpoint.
    """
    content = file.read()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            found, wanted = json.loads(text), {**questions[number - 1].about, **made_by}
            names = dict.fromkeys([*wanted, *found])  # what one of them has alone counts, too
            different = [name for name in names if name not in RESULTS and found.get(name) != wanted.get(name)]
        except (ValueError, IndexError, AttributeError, TypeError):
            different = ["place"]
        if different:
            raise UserError(
                f"--output {path}, line {number} is of another run (another {', '.join(different)}): "
                "choose another file, or delete this one"
            )
    file.truncate(whole)
    file.seek(whole)
    return len(lines)


def answer_file(options: argparse.Namespace, loading: argparse.Namespace, processor: Phi3VProcessor) -> None:
    """Ask every line of `--data` that `--output` does not hold."""
    limit = longest_sequence(loading) - options.max_new_tokens
    questions, data = read_questions(options, processor, limit)
    if not questions:
        raise UserError(f"--data {options.data} is empty")
    check_faults(options, [one for one in questions if one.error], len(questions))
    made_by = {"checkpoint": str(options.checkpoint), "num_crops": loading.num_crops}
    made_by |= {"max_new_tokens": options.max_new_tokens, "precision": loading.precision.name}
    made_by |= {"revision": loading.revision} if loading.revision else {}
    made_by |= {"load_in_4bit": True} if options.load_in_4bit else {}
    base, _ = checkpoint_of(options.checkpoint, loading.revision)
    for name, folder in {base: "base_weights", str(options.checkpoint): "weights"}.items():
        made_by |= {folder: hash_of_weights(Path(name))} if os.path.isdir(name) else {}
    with open(options.output, "r+b" if options.output.exists() else "w+b") as file:
        done = count_answered(file, options.output, questions, made_by)
        print(f"{done} of {len(questions)} lines are in {options.output} already", flush=True)
        model = load_model(options.checkpoint, loading) if done < len(questions) else None
        at_once, failed = LOOK_AHEAD * options.batch_size, 0
        for start in tqdm(range(done, len(questions), at_once), unit="batch", disable=not sys.stderr.isatty()):
            asked = [with_decoding_error(one) for one in questions[start : start + at_once]]
            check_faults(options, [one for one in asked if one.error and one.index is not None], len(questions))
            answers = answer(model, processor, data, [one for one in asked if not one.error], options, loading)
            failed += sum(bool(one.error) for one in asked)
            for one in asked:
                result = {"error": one.error} if one.error else {"answer": next(answers)}
                file.write(json.dumps({**one.about, **result, **made_by}, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    print(f"asked {len(questions) - done - failed}, left out {failed}; the answers are in {options.output}")


def hash_of_weights(folder: Path) -> str:
    """By which a checkpoint or adapter that was trained once more is told from what it was."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()[:16]


def check_faults(options: argparse.Namespace, bad: Sequence[Question], count: int) -> None:
    """Name the lines that cannot be asked; with `--bad_examples stop` they end the run."""
    named = [f"{options.data}, line {one.about['line']}: {one.error}" for one in bad]
    if named and options.bad_examples == "stop":
        raise UserError(
            f"{len(named)} of {count} lines cannot be asked; mend them, or leave them out with --bad_examples skip:\n"
            + "\n".join(f"  - {one}" for one in first_of(named, str(options.data)))
        )
    for one in named:
        print(f"left out: {one}", file=sys.stderr)


def with_decoding_error(question: Question) -> Question:
    """The question, with what is wrong with its pictures' pixels."""
    found = [] if question.error else [measure_image(file, decode=True) for file in question.pictures]
    wrong = [problem for problem in found if isinstance(problem, str)]
    return replace(question, error="; ".join(wrong)) if wrong else question


def answer(
    model: torch.nn.Module,
    processor: Phi3VProcessor,
    data: Conversations,
    asked: Sequence[Question],
    options: argparse.Namespace,
    loading: argparse.Namespace,
) -> Iterator[str]:
    """The answers to questions without faults, in order; a picture is encoded once for all that ask about it alone."""
    keys = [one.pictures if len(data.records[one.index]["conversations"]) == 1 else one.index for one in asked]
    generated = generate_answers(
        model,
        processor,
        len(asked),
        lambda number: data.example(asked[number].index),
        loading,
        max_new_tokens=options.max_new_tokens,
        pictures=[keys.index(key) for key in keys],
    )
    return (one.text for one in generated)


def ask(images: Sequence[Path], question: str) -> Example:
    """One question about pictures."""
    turn = {"images": [str(path) for path in images], "user": question, "assistant": UNASKED}
    pictures = [decode_image({"path": str(path)}, f"--image {path}") for path in images]
    return Example("--question", make_turns({"conversations": [turn]}, pictures))


def main() -> None:
    options = parse()
    disable_progress_bar()  # transformers' own, over weights
    example = ask(options.image, options.question) if options.data is None else None
    try:
        loading = how_to_load(
            options.checkpoint,
            options.num_crops,
            options.bf16,
            options.load_in_4bit,
            options.batch_size,
            options.revision,
        )
        processor = load_processor(loading)
        if example is None:
            answer_file(options, loading, processor)
            return
        model = load_model(options.checkpoint, loading)
    except UserError as error:  # the scripts' option
        raise UserError(str(error).replace("--model_name_or_path", "--checkpoint")) from error
    generated = generate_answers(model, processor, 1, lambda _: example, loading, max_new_tokens=options.max_new_tokens)
    print(generated[0].text)


if __name__ == "__main__":
    run(main)
