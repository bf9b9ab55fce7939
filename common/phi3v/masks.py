"""Who attends to whom where one row holds several examples: one description, and a form for every kernel.

A packed row holds documents one after another, without padding. A document is one example, or a
prefix with pictures followed by branches: examples that share the prefix. Two numbers a position
describe it:
- position id: counts from 0 in every document; every branch goes on from the end of the prefix
- branch id: the example that the position belongs to, counted through the row; SHARED in a prefix

A position attends to itself and, in its own document, to what stands before it in the prefix and in
its own branch.

Notation used for tensor shapes
- batch: rows; a packed batch has one
- seq: positions of a row
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .stock import BlockMask, create_block_mask

SHARED = -1


def document_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the documents of every row: a position 0 begins one. (batch, seq) -> (batch, seq)"""
    return (position_ids == 0).cumsum(-1)


def document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """How many positions an example sees at most, for every position its document's. (batch, seq) -> (batch, seq)

    With branches that is the longest branch, the prefix included.
    """
    documents = document_ids(position_ids)
    lengths = position_ids.new_zeros(position_ids.shape[0], position_ids.shape[1] + 1)
    return lengths.scatter_reduce(1, documents, position_ids + 1, "amax").gather(1, documents)


def visibility(position_ids: torch.Tensor, branch_ids: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The rule as a function of indices (row, head, query, key), which may be numbers or broadcast tensors."""
    documents = document_ids(position_ids)

    def sees(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        same_document = documents[row, query] == documents[row, key]
        in_prefix, same_branch = branch_ids[row, key] == SHARED, branch_ids[row, query] == branch_ids[row, key]
        return (query >= key) & same_document & (in_prefix | same_branch)

    return sees


def dense_mask(position_ids: torch.Tensor, branch_ids: torch.Tensor) -> torch.Tensor:
    """True where a query sees a key: (batch, 1, seq, seq), for `sdpa`."""
    rows, places = (torch.arange(size, device=position_ids.device) for size in position_ids.shape)
    sees = visibility(position_ids, branch_ids)
    return sees(rows[:, None, None, None], None, places[:, None], places)


def block_mask(position_ids: torch.Tensor, branch_ids: torch.Tensor) -> BlockMask:
    """The same for FlexAttention, which skips the blocks where nothing is seen."""
    rows, length = position_ids.shape
    create = compiled_create_block_mask() if position_ids.is_cuda else create_block_mask
    rule = visibility(position_ids, branch_ids)
    return create(rule, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=str(position_ids.device))


@functools.cache
def compiled_create_block_mask() -> Callable[..., BlockMask]:
    """Compiled, it needs no memory for every pair of positions, as it does otherwise."""
    return torch.compile(create_block_mask)


def document_bounds(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The same for flash-attn's kernel for sequences of different lengths, where no prefix is shared.

    Returns:
        Where each document begins and the last one ends in all rows together, (documents + 1,) int32,
        and the longest document's length.
    """
    begins = (position_ids == 0).flatten().nonzero()[:, 0]
    bounds = torch.cat([begins, begins.new_tensor([position_ids.numel()])])
    return bounds.to(torch.int32), int(bounds.diff().max())


def packed_attention(
    implementation: str, position_ids: torch.Tensor, branch_ids: torch.Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """What the stock decoder must be given so that its attention keeps to the rule.

    Args:
        implementation: transformers' name of the attention in use.
        dtype: of the hidden states.

    Raises:
        ValueError: a shared prefix and flash-attn, whose kernels know no branches.
    """
    if implementation.startswith("flash_attention"):
        if bool((branch_ids == SHARED).any()):
            raise ValueError(f'examples that share a picture need "flex_attention" or "sdpa", not "{implementation}"')
        bounds, longest = document_bounds(position_ids)
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return {"attention_mask": None, **dict(zip(names, (bounds, bounds, longest, longest), strict=True))}
    if implementation == "flex_attention":
        return {"attention_mask": block_mask(position_ids, branch_ids)}
    mask = dense_mask(position_ids, branch_ids)
    if implementation == "eager":  # adds its mask
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask}


def attention_for_packing(implementation: str, device_type: str, shares: bool) -> str:
    """The attention to train packed rows with, given the one asked for.

    flash-attn serves where no prefix is shared; FlexAttention serves everything, on CUDA only, for it
    has no backward pass on a CPU; there a dense mask through `sdpa` does.
    """
    if implementation.startswith("flash_attention") and not shares:
        return implementation
    return "flex_attention" if device_type == "cuda" else implementation
