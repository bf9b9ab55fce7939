"""What all processes do at once, so that what one of them cannot write or read is told to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from .errors import NotWrittenError, is_first_process

T = TypeVar("T")


def is_write_failure(error: Exception) -> bool:
    """A full or failing disk, as Python, safetensors and torch's own writer tell of it."""
    torch_s_own = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_c" in str(error))
    return isinstance(error, (OSError, SafetensorError)) or torch_s_own


def together(act: Callable[[], T]) -> list[T]:
    """Every process acts (together); all get all results, in order of the processes.

    Raises:
        NotWrittenError: on every process, when reading or writing failed on one.
    """
    result = failure = None
    try:
        result = act()
    except Exception as error:
        if not is_write_failure(error):
            raise
        failure = " ".join(str(error).split())[:300]
    outcomes: list[Any] = [(result, failure)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, failure))
    for rank, (_, failed) in enumerate(outcomes):
        if failed is not None:
            raise NotWrittenError(f"{failed} (process {rank})" if len(outcomes) > 1 else failed)
    return [each for each, _ in outcomes]


def on_first(act: Callable[[], T]) -> T:
    """The first process acts, all wait for it and get its result (together)."""
    return together(lambda: act() if is_first_process() else None)[0]
