"""Sharded, batched greedy generation, gathered in order; what an evaluation writes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from tqdm import tqdm

from .collation import Example, collate, encode_example
from .data import gather_in_order, loader_context
from .errors import UserError, is_first_process
from .loading import end_token_ids
from .phi3v import Phi3VProcessor

MAX_NEW_TOKENS = 64  # as published


class Generated(NamedTuple):
    """One answer.

    Attributes:
        text: special tokens dropped.
        probabilities: of each candidate's first token at the answer's first position.
    """

    text: str
    probabilities: tuple[float, ...] = ()


class _Prompts(torch.utils.data.Dataset):
    """This process's share of the examples, encoded without their answers in the loader's workers."""

    def __init__(
        self, make_example: Callable[[int], Example], indices: Sequence[int], processor: Phi3VProcessor
    ) -> None:
        self.make_example, self.indices, self.processor = make_example, indices, processor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return encode_example(self.processor, self.make_example(self.indices[position]), with_answer=False)


@torch.no_grad()
def generate_answers(
    model: torch.nn.Module,
    processor: Phi3VProcessor,
    count: int,
    make_example: Callable[[int], Example],
    options: argparse.Namespace,
    title: str = "evaluate",
    candidates: Sequence[str] = (),
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Generated]:
    """Greedy answers to the last turn of every example.

    Every process generates its share, in batches padded on the left; the answers are gathered, so
    that every process returns all of them, in order, each example's exactly once.

    Args:
        count: how many examples there are.
        make_example: number -> example; called in worker processes.
        options: `eval_batch_size_per_gpu`, `num_workers`, `precision`, `device` and `tqdm` count.
        title: of the progress bar.
        candidates: answers whose probabilities are asked for.
        max_new_tokens: the longest answer.

    Returns:
        `count` answers.

    Raises:
        UserError: candidates whose first tokens are the same.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = range(rank, count, world)
    num_workers = min(options.num_workers, max(1, len(indices) // options.eval_batch_size_per_gpu))
    loader = torch.utils.data.DataLoader(
        _Prompts(make_example, indices, processor),
        batch_size=options.eval_batch_size_per_gpu,
        num_workers=num_workers,
        multiprocessing_context=loader_context(num_workers),
        collate_fn=lambda encoded: collate(processor, encoded, padding_side="left"),
    )
    was_training = model.training
    model.eval()
    first_tokens = [processor.tokenizer(one, add_special_tokens=False).input_ids[0] for one in candidates]
    if len(set(first_tokens)) < len(first_tokens):
        raise UserError(f"the answers {candidates} begin with the same token: their probabilities cannot be told apart")
    answers: list[Generated] = []
    # eagerly where training compiles (--torch_compile): a cache has another length at every token
    eager = torch.compiler.set_stance("force_eager")
    with eager, _autocast(options), tqdm(total=count, desc=title, disable=not (options.tqdm and rank == 0)) as progress:
        for batch in loader:
            inputs = {
                name: batch[name].to(options.device)
                for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")
                if name in batch
            }
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
            texts = processor.batch_decode(
                output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            probabilities = [()] * len(texts)
            if candidates:  # (batch, vocabulary) -> (batch, candidates)
                probabilities = output.logits[0].float().softmax(-1)[:, first_tokens].tolist()
            answers += [Generated(text, tuple(each)) for text, each in zip(texts, probabilities, strict=True)]
            progress.update(min(world * len(texts), count - progress.n))
    model.train(was_training)
    return gather_in_order(answers, world)


def _autocast(options: argparse.Namespace) -> contextlib.AbstractContextManager:
    if options.precision.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(options.device).type, dtype=options.precision.autocast)


def write_evaluation(path: Path, totals: dict[str, Any], examples: Sequence[dict[str, Any]]) -> None:
    """Write one evaluation on the first process: the totals, `num_examples` and every example.

    The file is written beside and renamed, so that it is whole or absent.
    """
    if not is_first_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    content = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **totals, "num_examples": len(examples)}
    content["examples"] = list(examples)
    written.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(written, path)


def write_confusion(path: Path, truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> list[Any]:
    """The confusion matrix, drawn to a PNG on the first process.

    Returns:
        Counts, a row for each true label and a column for each predicted one, in the order of `labels`.
    """
    matrix = confusion_matrix(truth, predicted, labels=list(labels))
    if is_first_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 3 + len(labels) / 2  # inches
        figure = Figure(figsize=(side, side))
        display = ConfusionMatrixDisplay(matrix, display_labels=labels)
        display.plot(ax=figure.subplots(), xticks_rotation="vertical", colorbar=False)
        figure.savefig(path, bbox_inches="tight")
    return matrix.tolist()
