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
- heads, head: attention heads, and the size of one
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .stock import AttentionInterface, BlockMask, create_block_mask, varlen_attn

SHARED = -1
BY_DOCUMENT = "sdpa_by_document"  # transformers' name of `attend_by_document`


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
    """The same for kernels for sequences of different lengths (flash-attn's, PyTorch's), where no prefix is shared.

    Returns:
        Where each document begins and the last one ends in all rows together, (documents + 1,) int32,
        and the longest document's length.
    """
    begins = (position_ids == 0).flatten().nonzero()[:, 0]
    bounds = torch.cat([begins, begins.new_tensor([position_ids.numel()])])
    return bounds.to(torch.int32), int(bounds.diff().max())


class Document(NamedTuple):
    """A document of a packed row.

    Attributes:
        length: its positions.
        prefix: how many of them, at its beginning, its branches share; 0 where it is one example.
        mask: True where a position after the prefix sees one of the document, (length - prefix, length); None where it
            is one example, whose positions see all before them.
    """

    length: int
    prefix: int
    mask: torch.Tensor | None


class Documents:
    """A packed row's documents, in order; not a list, whose every length torch.compile would compile for.

    Attributes:
        each: the documents.
        bounds: where each begins and the last one ends, (documents + 1,) int32.
        longest: the longest one's length.
        shares: whether any has branches.
    """

    def __init__(self, position_ids: torch.Tensor, branch_ids: torch.Tensor) -> None:
        if len(position_ids) != 1:
            raise ValueError(f"a packed batch has one row, not {len(position_ids)}")
        sees = visibility(position_ids, branch_ids)
        places = torch.arange(position_ids.shape[1], device=position_ids.device)
        self.bounds, self.longest = document_bounds(position_ids)
        branches = branch_ids[0].cpu()
        self.each = []
        for begin, end in itertools.pairwise(self.bounds.tolist()):
            prefix = int((branches[begin:end] == SHARED).sum())
            if len(branches[begin + prefix : end].unique()) > 1:
                mask = sees(0, None, places[begin + prefix : end, None], places[begin:end])
                self.each.append(Document(end - begin, prefix, mask))
            else:
                self.each.append(Document(end - begin, 0, None))
        self.shares = any(document.mask is not None for document in self.each)


def takes_all_lengths_at_once(query: torch.Tensor) -> bool:
    """Whether PyTorch's kernel for sequences of different lengths serves (…, head): flash-attn's, of half precision."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8:
        return False
    return torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(query.device) >= (8, 0)


@torch.compiler.disable
def attend_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The same rule by PyTorch's attention, document after document.

    An example, and a prefix, is causal attention, for which PyTorch has its fastest kernels on any device; branches,
    which are short, attend to their whole document under a mask. On a GPU, in half precision, a row of examples alone
    is one call of the kernel for sequences of different lengths.

    Args:
        query, key, value: (1, heads, seq, head), as transformers hands them to an implementation of attention.

    Returns:
        (1, seq, heads, head), and no weights.

    Raises:
        ValueError: rows that are not packed.
    """
    if documents is None:
        raise ValueError(f'"{BY_DOCUMENT}" is for packed rows (branch_ids): use "sdpa"')
    has_groups = query.shape[1] != key.shape[1]
    # the kernel for all lengths knows no dropout, and in torch 2.11 no fewer key heads
    if not (documents.shares or has_groups or dropout) and takes_all_lengths_at_once(query):
        # (1, heads, seq, head) -> (seq, heads, head)
        states = (one[0].transpose(0, 1) for one in (query, key, value))
        bounds, longest = documents.bounds, documents.longest
        causal = {"scale": scaling, "window_size": (-1, 0)}
        return varlen_attn(*states, bounds, bounds, longest, longest, **causal)[None], None
    attend = functools.partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=has_groups)
    lengths = [document.length for document in documents.each]
    states = zip(*(one.split(lengths, dim=2) for one in (query, key, value)), strict=True)
    parts = []
    for document, (queries, keys, values) in zip(documents.each, states, strict=True):
        if document.mask is None:
            parts.append(attend(queries, keys, values, is_causal=True))
            continue
        prefix = document.prefix
        of_prefix, of_branches = queries.split([prefix, document.length - prefix], dim=2)
        parts.append(attend(of_prefix, keys[:, :, :prefix], values[:, :, :prefix], is_causal=True))
        parts.append(attend(of_branches, keys, values, attn_mask=document.mask))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


AttentionInterface.register(BY_DOCUMENT, attend_by_document)  # for which transformers makes no mask


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
            raise ValueError(f'examples that share a picture need "{BY_DOCUMENT}", not "{implementation}"')
        bounds, longest = document_bounds(position_ids)
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return {"attention_mask": None, **dict(zip(names, (bounds, bounds, longest, longest), strict=True))}
    if implementation == BY_DOCUMENT:
        return {"attention_mask": None, "documents": Documents(position_ids, branch_ids)}
    if implementation == "flex_attention":
        return {"attention_mask": block_mask(position_ids, branch_ids)}
    mask = dense_mask(position_ids, branch_ids)
    if implementation == "eager":  # adds its mask
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask}


def attention_for_packing(implementation: str, shares: bool) -> str:
    """The attention to train packed rows with, given the one asked for.

    flash-attn serves where no prefix is shared, PyTorch's kernels everywhere (`attend_by_document`).
    """
    return implementation if implementation.startswith("flash_attention") and not shares else BY_DOCUMENT
