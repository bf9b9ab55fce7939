"""Sharded, batched greedy generation, gathered in order; what an evaluation writes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from .collation import Example, encode_questions
from .data import check_length, gather_in_order, loader_context, made, open_pixels, opening_images_by, prefetch_factor
from .errors import UserError, rank_and_world, say
from .files import write_json
from .layers import causal_lm_of
from .loading import end_token_ids
from .phi3v import Phi3VProcessor
from .progress import progress_bar
from .prompt_batches import LOOK_AHEAD, Group, Prefixes, batches_by_length, deal
from .report import MOST_LABELS, save_pictures
from .stopping import ToldToStopError, outlive_stop_signals
from .together import on_first


class Generated(NamedTuple):
    """One answer.

    Attributes:
        text: special tokens dropped.
        probabilities: of each candidate's first token at the answer's first position.
        images: the files in `report_images/` that show the example's pictures.
    """

    text: str
    probabilities: tuple[float, ...] = ()
    images: tuple[str, ...] = ()


class _Prompts(torch.utils.data.Dataset):
    """Groups of examples, encoded without their answers in the loader's workers; a picture is read once for a group.

    Args:
        pictures_in: the output folder, where the report is to show the pictures; None: they are not kept.
    """

    def __init__(
        self,
        make_example: Callable[[int], Example],
        groups: Sequence[Sequence[int]],
        processor: Phi3VProcessor,
        max_tokens: int,
        pictures_in: Path | None,
    ) -> None:
        self.make_example, self.groups, self.processor, self.max_tokens = make_example, groups, processor, max_tokens
        self.pictures_in = pictures_in

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, position: int) -> Group:
        return self._encode(self.groups[position])

    def _encode(self, numbers: Sequence[int]) -> Group:
        try:
            with opening_images_by(functools.cache(open_pixels)):
                examples = [made(functools.partial(self.make_example, number), number) for number in numbers]
            group = list(zip(numbers, encode_questions(self.processor, examples, with_answer=False), strict=True))
            for example, (_, encoded) in zip(examples, group, strict=True):
                check_length(example.id, len(encoded["input_ids"]), self.max_tokens)
                del encoded["labels"]  # a tensor that travels for nothing
                encoded["images"] = self._keep([image for turn in example.turns for image in turn.images])
        except UserError as error:
            if len(numbers) > 1:  # each by itself, for some may be good
                return [one for number in numbers for one in self._encode([number])]
            return [(numbers[0], {"problem": str(error)})]
        return group

    def _keep(self, images: Sequence[Image.Image]) -> tuple[str, ...]:
        """Pictures for the report; an evaluation does not fail for them."""
        if self.pictures_in is None:
            return ()
        try:
            return tuple(save_pictures(self.pictures_in, images))
        except OSError as error:
            print(f"the report will not show every picture: {error}", file=sys.stderr, flush=True)
            self.pictures_in = None
            return ()


@torch.no_grad()
def generate_answers(
    model: torch.nn.Module,
    processor: Phi3VProcessor,
    count: int,
    make_example: Callable[[int], Example],
    options: argparse.Namespace,
    title: str = "evaluate",
    candidates: Sequence[str] = (),
    max_new_tokens: int | None = None,
    pictures: Sequence[int] | None = None,
) -> list[Generated]:
    """Greedy answers to the last turn of every example.

    Every process generates its share, in batches padded on the left; the answers are gathered, so
    that every process returns all of them, in order, each example's exactly once. What a picture and
    the text before it are to the decoder is computed once for all its questions, also where they fill
    more than one batch, but for every eight batches (and of a picture's questions one of which grows past the
    length where the rope's factors change); that and the padding change no answer but by rounding.

    Args:
        count: how many examples there are.
        make_example: number -> example; called in worker processes.
        options: `eval_batch_size_per_gpu`, `num_workers`, `precision`, `device`, `tqdm` and `bad_examples` count;
            with `report_images` the pictures are kept in `output_dir`. With `--bad_examples skip` the answer
            to an example that cannot be made is empty, its candidates are equally probable, and what is wrong is said.
        title: of the progress bar.
        candidates: answers whose probabilities are asked for.
        max_new_tokens: the longest answer, where it is not `options.max_new_tokens`.
        pictures: for every example the number of its pictures, the same where they and the text before
            them are the same (`number_pictures`); without it no two examples are taken to share theirs.

    Returns:
        `count` answers.

    Raises:
        UserError: candidates whose first tokens are the same; an example that cannot be made, unless such are skipped.
        ToldToStopError: between steps, on every process, once one of them has received a signal.
    """
    stopping = getattr(options, "stopping", None)  # where nothing trains a signal ends the process at once
    max_new_tokens = options.max_new_tokens if max_new_tokens is None else max_new_tokens
    rank, world = rank_and_world()
    groups = deal(pictures or range(count), options.eval_batch_size_per_gpu, world)[rank]
    own = sum(map(len, groups))
    num_workers = min(options.num_workers, max(1, min(len(groups), own // options.eval_batch_size_per_gpu)))
    # as many as have the prompts that are sorted together: they are read while those before them are answered
    ahead = -(-LOOK_AHEAD * options.eval_batch_size_per_gpu * len(groups) // max(1, own))
    loader = torch.utils.data.DataLoader(
        _Prompts(
            make_example,
            groups,
            processor,
            causal_lm_of(model).config.max_position_embeddings,
            options.output_dir if options.report_images else None,
        ),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=loader_context(num_workers),
        worker_init_fn=outlive_stop_signals,
        prefetch_factor=prefetch_factor(ahead, num_workers),
        generator=torch.Generator(),  # else it draws from the one that dropout draws from
    )
    was_training = model.training
    model.eval()
    first_tokens = [processor.tokenizer(one, add_special_tokens=False).input_ids[0] for one in candidates]
    if len(set(first_tokens)) < len(first_tokens):
        raise UserError(f"the answers {candidates} begin with the same token: their probabilities cannot be told apart")
    answers: list[tuple[int, Generated, str | None]] = []

    def good_ones(groups: Iterable[Group]) -> Iterator[Group]:
        """Without those that cannot be made, which are answered at once."""
        for group in groups:
            bad = [(number, encoded["problem"]) for number, encoded in group if "problem" in encoded]
            if bad and options.bad_examples == "stop":
                raise UserError(bad[0][1])
            undecided = Generated("", tuple(1 / len(candidates) for _ in candidates))
            answers.extend((number, undecided, problem) for number, problem in bad)
            if len(bad) < len(group):
                yield [(number, encoded) for number, encoded in group if "problem" not in encoded]

    # eagerly where training compiles (--torch_compile): a cache has another length at every token
    eager = torch.compiler.set_stance("force_eager")
    with eager, _autocast(options), progress_bar(title, count, "example", options.tqdm) as progress:
        prefixes = Prefixes(model, processor, max_new_tokens, options.device)
        for batch in batches_by_length(good_ones(loader), options.eval_batch_size_per_gpu, prefixes.can_share):
            if stopping is not None and stopping.signal is not None:
                break
            inputs = prefixes.inputs(batch)
            columns = inputs["input_ids"].shape[1]
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=end_token_ids(processor),
                pad_token_id=processor.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=bool(candidates),
            )
            texts = processor.batch_decode(output.sequences[:, columns:], skip_special_tokens=True)
            probabilities = [()] * len(texts)
            if candidates:  # (batch, vocabulary) -> (batch, candidates)
                probabilities = output.logits[0].float().softmax(-1)[:, first_tokens].tolist()
            del inputs, output  # their cache, before the next batch has its own
            asked = [one for part in batch for one in part.asked]
            for (number, encoded), text, each in zip(asked, texts, probabilities, strict=True):
                answers.append((number, Generated(text, tuple(each), tuple(encoded["images"])), None))
            progress.update(min(world * len(texts), count - progress.n))
    model.train(was_training)
    if stopping is not None and stopping.agreed(options.device):
        raise ToldToStopError(f"{title}: given up")
    gathered = sorted(gather_in_order(answers, world))
    for _, _, problem in gathered:
        if problem is not None:
            say(f"{title}: counts as wrong: {problem}")
    return [answer for _, answer, _ in gathered]


def _autocast(options: argparse.Namespace) -> contextlib.AbstractContextManager:
    if options.precision.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(options.device).type, dtype=options.precision.autocast)


def write_evaluation(path: Path, totals: dict[str, Any], examples: Sequence[dict[str, Any]]) -> None:
    """Write one evaluation on the first process: the totals, `num_examples` and every example (together).

    The file is whole or absent.

    Raises:
        NotWrittenError: on every process, where the disk is full or fails.
    """
    content = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **totals, "num_examples": len(examples)}
    content["examples"] = list(examples)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    on_first(write)


def write_confusion(
    path: Path, truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> list[list[int]] | None:
    """The confusion matrix, drawn to a PNG on the first process (together).

    Returns:
        Counts, a row for each true label and a column for each predicted one, in the order of `labels`. None, and no
        picture, for more than `MOST_LABELS` labels, which is said: answers so many are texts and no classes.
    """
    if len(labels) > MOST_LABELS:
        say(f"no {path.name}: there are {len(labels)} labels, and a confusion matrix of at most {MOST_LABELS} is drawn")
        return None
    matrix = confusion_matrix(truth, predicted, labels=list(labels))

    def draw() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 3 + len(labels) / 2  # inches
        figure = Figure(figsize=(side, side))
        display = ConfusionMatrixDisplay(matrix, display_labels=labels)
        display.plot(ax=figure.subplots(), xticks_rotation="vertical", colorbar=False)
        figure.savefig(path, bbox_inches="tight")

    on_first(draw)
    return matrix.tolist()
