"""A page in the browser to try a checkpoint, or an adapter on the base that it names.

    python -m tools.app --checkpoint output
    python -m tools.app --checkpoint output --compare microsoft/Phi-3.5-vision-instruct
    python -m tools.app --checkpoint output --eval output_eval_only/eval_only.json --port 8000

One drops pictures, asks and reads the answer as it is made, the same that `tools.predict` gives; the page shows how
each picture is cut into views and how many tokens it costs. With `--compare` another checkpoint answers beside it; the
base that an adapter stands on is not loaded twice, the adapter is switched off. The examples of the run's evaluations
(`eval_after.json`, and `eval_before.json` beside it, in the checkpoint's folder or where `--eval` says) can be gone
through: a click fills in the question and the pictures, which are the report's copies: JPEG, of at most 1,600 pixels.

Needs `pip install -r requirements-app.txt`. The page is served to this machine alone unless `--host` says otherwise;
it has no password, opens no tunnel, and once the checkpoints are there it reaches for no other host.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from peft import PeftModel
from PIL import Image
from transformers import StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from common.cli import MAX_NEW_TOKENS, MAX_NUM_CROPS, revision_problems
from common.collation import Example, collate, encode_example
from common.conversations import CONTROL, counting_processor, make_turns, measure_image
from common.data import decode_image
from common.errors import UserError, is_out_of_memory, raise_all, run
from common.layers import causal_lm_of
from common.loading import checkpoint_of, end_token_ids, load_model, load_processor
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import CROP, plan_layout
from common.report import (
    GROUPS,
    GROUPS_OF_ONE,
    PICTURE_NAME,
    PICTURES,
    compare_examples,
    read_evaluation,
    scored_metrics,
)
from tools.predict import UNASKED, how_to_load

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which Gradio reads when it is imported
try:
    import gradio
except ImportError:
    gradio = None

MOST_LISTED = 1000  # examples that the page holds at once; the search finds the others
MOST_BYTES = "64mb"  # of a file that is dropped
ALL = "all"
CLOSED = threading.Event()  # the page has been closed, and what is still answered ends
MISSING = "the page needs Gradio: pip install -r requirements-app.txt -c constraints.txt"
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)
PARTS = TEMPLATES.get_template("app.html.jinja").module


# --- options


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; all wrong ones reported at once."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.app", description="A page to try a checkpoint or an adapter.", allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, metavar="NAME", help="folder or hub id, also of an adapter")
    parser.add_argument("--revision", metavar="COMMIT", help="of a hub id: commit, branch or tag (its main branch)")
    parser.add_argument("--compare", metavar="NAME", help="another, likewise, that answers beside it: the base")
    parser.add_argument("--eval", type=Path, metavar="PATH", help="eval_*.json, or its folder (that of --checkpoint)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="(%(default)s)")
    parser.add_argument("--num_crops", type=int, metavar="N", help="most sub-images per picture (as trained)")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="(%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 (else float16 on CUDA, float32 on a CPU)")
    parser.add_argument("--load_in_4bit", action="store_true", help="weights in NF4, as QLoRA has its base")
    options = parser.parse_args(arguments)
    problems = [] if gradio else [MISSING]
    problems += revision_problems(options.revision, options.checkpoint)
    if options.eval is not None and evaluation_at(options.eval) is None:
        problems.append(f"--eval {options.eval}: there is no such file, or no eval_*.json in the folder")
    if options.compare == options.checkpoint:
        problems.append(f"--compare {options.compare} is the same as --checkpoint: name another, or leave it out")
    if not 1 <= options.port <= 65535:
        problems.append(f"--port {options.port}: it must be 1 to 65535")
    if options.num_crops is not None and not 1 <= options.num_crops <= MAX_NUM_CROPS:
        problems.append(f"--num_crops {options.num_crops}: it must be 1 to {MAX_NUM_CROPS}")
    if options.max_new_tokens < 1:
        problems.append(f"--max_new_tokens {options.max_new_tokens}: it must be at least 1")
    raise_all(problems)
    return options


# --- what answers


@dataclass(frozen=True)
class Side:
    """A checkpoint that answers.

    Attributes:
        name: as the page calls it.
        loading: `precision`, `num_crops` and `device` count.
        adapter_off: it is the base under the adapter that the model has.
    """

    name: str
    model: torch.nn.Module
    processor: Phi3VProcessor
    loading: argparse.Namespace
    adapter_off: bool = False

    def count_tokens(self, sizes: Sequence[tuple[int, int]], question: str) -> tuple[int, int]:
        """What a prompt costs about pictures of these widths and heights: the tokens of the pictures, and of all."""
        example = make_example(sizes, question)
        ids = encode_example(counting_processor(self.processor), example, with_answer=False)["input_ids"]
        return int((ids == self.processor.image_token_id).sum()), len(ids)

    def limit(self, max_new_tokens: int) -> int:
        """The longest prompt, in tokens."""
        return causal_lm_of(self.model).config.max_position_embeddings - max_new_tokens


def load_sides(options: argparse.Namespace) -> list[Side]:
    """`--checkpoint`, and after it `--compare` where that is given.

    Both cut pictures into as many sub-images: what is compared is the weights, as in a run's two evaluations.
    """

    def load(option: str, name: str, num_crops: int | None, revision: str | None) -> Side:
        try:
            loading = how_to_load(name, num_crops, options.bf16, options.load_in_4bit, revision=revision)
            return Side(name, load_model(name, loading).eval(), load_processor(loading), loading)
        except UserError as error:  # the scripts' option
            raise UserError(str(error).replace("--model_name_or_path", option)) from error

    first = load("--checkpoint", options.checkpoint, options.num_crops, options.revision)
    if options.compare is None:
        return [first]
    if isinstance(first.model, PeftModel) and is_same(
        checkpoint_of(options.checkpoint, first.loading.revision)[0], options.compare
    ):
        return [first, replace(first, name=options.compare, adapter_off=True)]
    return [first, load("--compare", options.compare, first.loading.num_crops, None)]


def is_same(name: str, other: str) -> bool:
    """Whether two names are of one checkpoint: the same hub id, or the same folder."""
    return name == other or (Path(name).exists() and Path(name).resolve() == Path(other).resolve())


# --- what is asked


def make_example(pictures: Sequence[Any], question: str) -> Example:
    """One question about pictures, or about their sizes: the form of `tools.predict`.

    Raises:
        UserError: a question with what the tokenizer would not take as text.
    """
    if found := CONTROL.search(question):
        raise UserError(f"The question holds {found[0]}, which is put there by itself: take it out.")
    turn = {"images": list(pictures), "user": question, "assistant": UNASKED}
    return Example("the prompt", make_turns({"conversations": [turn]}, pictures))


def read_pictures(files: Sequence[str]) -> list[Image.Image]:
    """The pictures that were dropped.

    Raises:
        UserError: all that are none, with their names and what to do.
    """
    pictures, problems = [], []
    for file in map(Path, files):
        try:
            pictures.append(decode_image({"bytes": file.read_bytes()}, file.name))
        except OSError as error:
            problems.append(f"{file.name} is not there any more ({error.strerror}): drop it again.")
        except UserError as error:
            problems.append(f"{error}. Remove it, or drop it as a whole PNG or JPEG file.")
    if problems:
        raise UserError("\n".join(problems))
    return pictures


def encode(side: Side, pictures: Sequence[Image.Image], question: str, max_new_tokens: int) -> dict[str, torch.Tensor]:
    """What `generate` takes.

    Raises:
        UserError: no question, one that is too long with its pictures, a picture that cannot be cut.
    """
    if not question.strip():
        raise UserError("There is no question yet: write one.")
    limit = side.limit(max_new_tokens)
    _, tokens = side.count_tokens([picture.size for picture in pictures], question)
    if tokens > limit:
        raise UserError(
            f"The prompt is {tokens:,} tokens long, and the model takes {limit:,} and an answer of {max_new_tokens}: "
            "shorten the question, or give fewer pictures."
        )
    encoded = encode_example(side.processor, make_example(pictures, question), with_answer=False)
    batch = collate(side.processor, [encoded])
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    return {name: batch[name].to(side.loading.device) for name in names if name in batch}


# --- the answer, as it is made


@dataclass(frozen=True)
class Answer:
    """An answer as far as it is made; when it is whole, what it took."""

    text: str = ""
    tokens: int | None = None
    seconds: float = 0.0


def stream(
    side: Side, inputs: dict[str, torch.Tensor], max_new_tokens: int, worker: ThreadPoolExecutor
) -> Iterator[Answer]:
    """The greedy answer, longer each time; the last is whole. Who stops listening stops its making.

    Args:
        worker: of one thread, in which all answers are made one after another: a model with its adapter switched off
            must not answer for another user.
    """
    texts, left, begin = SimpleQueue(), threading.Event(), inputs["input_ids"].shape[1]

    def text_of(ids: torch.Tensor) -> str:  # as a whole: a piece by itself loses the space that it begins with
        return side.processor.decode(ids[0, begin:], skip_special_tokens=True)

    def is_over(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """After each token."""
        texts.put(text_of(ids).rstrip("\ufffd"))  # a letter whose bytes are not all there yet
        return torch.full((1,), left.is_set() or CLOSED.is_set(), device=ids.device)

    def generate() -> Answer:
        # of this thread, as torch keeps them
        precision, device = side.loading.precision, side.loading.device.type
        autocast = torch.autocast(device, dtype=precision.autocast, enabled=precision.autocast is not None)
        begun = time.perf_counter()
        try:
            with side.model.disable_adapter() if side.adapter_off else contextlib.nullcontext(), autocast:
                ids = side.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=end_token_ids(side.processor),
                    pad_token_id=side.processor.tokenizer.pad_token_id,
                    stopping_criteria=StoppingCriteriaList([is_over]),
                )
        finally:
            texts.put(None)  # also after an error, which else nobody would learn of
        return Answer(text_of(ids), ids.shape[1] - begin, time.perf_counter() - begun)

    answer = worker.submit(generate)
    try:
        yield from map(Answer, iter(texts.get, None))
        yield answer.result()
    finally:
        left.set()
        answer.cancel()


# --- drawings


def draw_picture(processor: Phi3VProcessor, picture: Image.Image, title: str, side: int = 900) -> Markup:
    """How a picture is cut: the resized one with the grid over it, the global view as the model sees it, its tokens.

    Args:
        side: the drawing's longest, in pixels.

    Raises:
        UserError: a picture that is too thin.
    """
    image_processor = processor.image_processor
    try:
        layout = plan_layout(*picture.size, image_processor.num_crops)
    except ValueError as error:
        raise UserError(f"{title}: {error}.") from error
    padded = image_processor.resize_and_pad(picture, layout)
    crops = torch.empty(layout.num_crops, 3, CROP, CROP)
    image_processor.cut(padded, crops)
    mean, std = image_processor.image_mean, image_processor.image_std
    # (3, 336, 336) normalised -> (336, 336, 3) bytes
    view = (crops[0].permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
    view = (view * 255).round().byte().numpy()
    cut, seen = (as_data(Image.fromarray(pixels), side) for pixels in (padded.transpose(1, 2, 0), view))
    return PARTS.drawing(title, picture.size, layout, CROP, cut, seen)


def as_data(picture: Image.Image, side: int) -> str:
    """A picture inside the page."""
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


# --- examples of an evaluation


@dataclass(frozen=True)
class Evaluated:
    """The examples of one evaluation, or of two, before and after.

    Attributes:
        columns: what the evaluations are called.
        examples: as `compare_examples` makes them.
        groups: those that there are, with their titles.
        folder: of the pictures.
    """

    columns: tuple[str, ...] = ()
    examples: list[dict[str, Any]] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()

    def find(self, group: str, words: str) -> list[int]:
        """The numbers of the examples in a group, or in all, that hold all the words."""

        def is_meant(example: dict[str, Any]) -> bool:
            text = " ".join(self.row(example)).lower()
            return group in (ALL, example["group"]) and all(word in text for word in words.lower().split())

        return [number for number, example in enumerate(self.examples) if is_meant(example)]

    def row(self, example: dict[str, Any]) -> list[str]:
        """An example in the list."""
        given = ["" if one is None else one[0] for one in example["given"]]
        group = [self.groups[example["group"]]] if example["group"] else []
        return [example["id"], example["question"], " / ".join(example["answers"]), *given, *group]

    def pictures(self, example: dict[str, Any]) -> list[str]:
        """The files that are there."""
        names = [name for name in example["images"] if isinstance(name, str) and PICTURE_NAME.fullmatch(name)]
        return [str(self.folder / name) for name in names if (self.folder / name).is_file()]


def evaluation_at(path: Path) -> Path | None:
    """The file itself, or a folder's last evaluation; None where there is none."""
    if path.is_file():
        return path
    files = [path / f"eval_{name}.json" for name in ("after", "only", "before")]
    return next((file for file in files if file.is_file()), None)


def read_evaluated(path: Path | None) -> Evaluated:
    """The evaluation there, with the one before training beside it.

    Raises:
        UserError: a damaged file.
    """
    last = path and evaluation_at(path)
    if last is None:
        return Evaluated()
    before = last.with_name("eval_before.json")
    files = [before, last] if before.is_file() and last.name not in ("eval_before.json", "eval_only.json") else [last]
    columns = [("before" if file == before else "after", read_evaluation(file)) for file in files]
    groups = GROUPS if len(files) > 1 else GROUPS_OF_ONE
    scored = scored_metrics(columns, columns[-1][1].totals)
    examples = compare_examples(columns, scored[0] if scored else None, groups)
    # half a character of a damaged answer is a question mark: Gradio's pages can hold no halves
    examples = json.loads(json.dumps(examples, ensure_ascii=False).encode(errors="replace"))
    return Evaluated(tuple(name for name, _ in columns), examples, groups if scored else {}, last.parent / PICTURES)


# --- the page


class Page:
    """What happens on the page.

    Args:
        sides: what answers, one or two.
        evaluated: the examples to go through.
        max_new_tokens: the longest answer.
    """

    def __init__(self, sides: Sequence[Side], evaluated: Evaluated, max_new_tokens: int) -> None:
        self.sides, self.evaluated, self.max_new_tokens = sides, evaluated, max_new_tokens
        self.worker = ThreadPoolExecutor(1)

    def count(self, files: list[str] | None, question: str) -> str:
        """The prompt's tokens, in words."""
        try:
            sizes = [size for size in map(measure_image, map(Path, files or ())) if not isinstance(size, str)]
            of_pictures, tokens = self.sides[0].count_tokens(sizes, question)
        except UserError as error:
            return PARTS.words(str(error), "problem")
        limit = self.sides[0].limit(self.max_new_tokens)
        told = f"{tokens:,} of at most {limit:,} tokens: "
        told += f"{of_pictures:,} of the pictures, {tokens - of_pictures:,} of the text"
        return PARTS.words(told, "problem" if tokens > limit else "soft")

    def draw(self, files: list[str] | None) -> str:
        """Every picture, cut, or what is wrong with it."""
        shown = []
        for number, file in enumerate(files or (), start=1):
            title, side = f"{number}. {Path(file).name}", 900 if len(files) == 1 else 450
            try:
                shown.append(draw_picture(self.sides[0].processor, *read_pictures([file]), title, side))
            except UserError as error:
                shown.append(PARTS.words(str(error), "problem"))
        return Markup('<div class="drawings">{}</div>').format(Markup().join(shown)) if shown else ""

    def ask(self, files: list[str] | None, question: str) -> Iterator[tuple[str, ...]]:
        """A line about the answers, and the answers, again and again as they get longer."""
        answers = [Answer()] * len(self.sides)
        told = PARTS.words("reading the pictures …")
        yield told, *(one.text for one in answers)  # the old ones go
        try:
            pictures = read_pictures(files or ())
            for number, side in enumerate(self.sides):
                inputs = encode(side, pictures, question, self.max_new_tokens)
                for answers[number] in stream(side, inputs, self.max_new_tokens, self.worker):
                    yield PARTS.words("answering …"), *(one.text for one in answers)
            told = PARTS.words("\n".join(map(self._took, self.sides, answers)))
        except UserError as error:
            told = PARTS.words(str(error), "problem")
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            told = PARTS.words("Memory ran out: give fewer pictures, or start with a lower --num_crops.", "problem")
        yield told, *(one.text for one in answers)

    def _took(self, side: Side, answer: Answer) -> str:
        most = ", the most that it may have (--max_new_tokens)" if answer.tokens == self.max_new_tokens else ""
        empty = "" if answer.text.strip() else "an empty answer, "
        return f"{side.name}: {empty}{answer.tokens} tokens{most}, {answer.seconds:.1f} s"

    def choose(self, position: int, listed: list[int]) -> tuple[Any, ...]:
        """An example's pictures, its question, and what is known about it."""
        one = self.evaluated.examples[listed[position]]
        pictures = self.evaluated.pictures(one)
        given = zip(self.evaluated.columns, one["given"], strict=True)
        facts = [("accepted", " / ".join(one["answers"])), *((name, text[0]) for name, text in given if text)]
        kept = len(pictures) >= max(1, len(one["images"]))
        problem = "" if kept else f"No pictures of it were kept in {self.evaluated.folder}: drop them, if it has any."
        return pictures or None, one["question"], PARTS.example(one["id"], facts, problem)

    def list_examples(self, group: str = ALL, words: str = "") -> tuple[list[int], dict[str, Any]]:
        """The numbers of the examples that are listed, and what the list shows."""
        found = self.evaluated.find(group, words)
        listed = found[:MOST_LISTED]
        label = f"{len(found):,} examples" + (f", the first {MOST_LISTED:,} of them" if found != listed else "")
        rows = [[text[:200] for text in self.evaluated.row(self.evaluated.examples[number])] for number in listed]
        return listed, {"samples": rows, "label": label}

    def search(self, group: str, words: str | None) -> tuple[list[int], Any]:
        """The same, for the page."""
        listed, shown = self.list_examples(group, words or "")
        return listed, gradio.Dataset(**shown)

    def build(self) -> Any:
        """The page as Gradio has it."""
        first = self.sides[0]
        facts = (f"num_crops {first.loading.num_crops}", first.loading.precision.name, str(first.loading.device))
        with gradio.Blocks(title=f"Try {first.name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            gradio.HTML(PARTS.heading(first.name, facts))
            with gradio.Row():
                with gradio.Column(scale=2, min_width=320):
                    files = gradio.File(label="Pictures", file_count="multiple", allow_reordering=True, height=200)
                    question = gradio.Textbox(label="Question", lines=3, placeholder="What is the date?")
                    tokens = gradio.HTML(self.count(None, ""))
                    with gradio.Row():
                        ask = gradio.Button("Ask", variant="primary", min_width=80)
                        stop = gradio.Button("Stop", min_width=80)
                        clear = gradio.ClearButton([files, question], min_width=80)
                with gradio.Column(scale=3, min_width=320):
                    with gradio.Row(equal_height=True):
                        answers = [self._answer_box(side) for side in self.sides]
                    status, chosen = gradio.HTML(), gradio.HTML()
            drawing = gradio.HTML()
            asking = gradio.on([ask.click, question.submit], self.ask, [files, question], [status, *answers])
            stopping = stop.click(None, cancels=[asking])
            stopping.then(lambda: PARTS.words("stopped"), None, status)  # then, lest "answering" comes after it
            clear.add([status, chosen, *answers])
            gradio.on([files.change, question.change], self.count, [files, question], tokens)
            files.change(self.draw, files, drawing)
            if self.evaluated.examples:
                self._build_examples([files, question, chosen])
        return page

    def _answer_box(self, side: Side) -> Any:
        name = f"{side.name}, adapter off" if side.adapter_off else side.name
        shape = {"lines": 4, "min_width": 240, "elem_classes": "answer"}
        return gradio.Textbox(label=name, interactive=False, buttons=["copy"], **shape)

    def _build_examples(self, outputs: list[Any]) -> None:
        """The list of examples, which fills in `outputs`."""
        counts = Counter(one["group"] for one in self.evaluated.examples)
        groups = [(f"{title} ({counts[key]:,})", key) for key, title in self.evaluated.groups.items()]
        groups = [(f"all ({len(self.evaluated.examples):,})", ALL), *groups]
        headers = ["id", "question", "accepted", *self.evaluated.columns, *["group"] * bool(self.evaluated.groups)]
        numbers, shown = self.list_examples()
        with gradio.Row():
            group = gradio.Radio(groups, value=ALL, label="Show", scale=3, min_width=320)
            words = gradio.Textbox(label="Search", placeholder="words, all of which are there", scale=2, min_width=320)
        listed = gradio.State(numbers)
        shown |= {"components": [gradio.Textbox(render=False) for _ in headers], "headers": headers}
        table = gradio.Dataset(type="index", samples_per_page=10, elem_classes="examples", **shown)
        gradio.on([group.change, words.change], self.search, [group, words], [listed, table])
        table.click(self.choose, [table, listed], outputs)


def main() -> None:
    options = parse()
    disable_progress_bar()  # transformers' own, over weights
    evaluated = read_evaluated(options.eval or Path(options.checkpoint))
    page = Page(load_sides(options), evaluated, options.max_new_tokens).build()
    page.queue(default_concurrency_limit=16)  # several users; the models answer one after another
    try:
        _, address, _ = page.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MOST_BYTES,
            allowed_paths=[str(evaluated.folder.resolve())] if evaluated.examples else None,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            theme=gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css=str(PARTS.style()),
            run_history=False,  # which keeps pictures and answers in the browser, and offers to upload them
        )
    except OSError as error:
        raise UserError(f"{error}: give another --port or --host") from error
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()  # until Ctrl-C
    CLOSED.set()


if __name__ == "__main__":
    run(main)
