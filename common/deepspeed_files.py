"""DeepSpeed's files in a checkpoint: read without unpickling anything foreign, and divided over other processes.

ZeRO cuts each parameter's master copy and its optimizer's state into pieces, one a process, and DeepSpeed loads them
into as many processes only. Its universal checkpoint would first write all of it to the disk twice more, and under
ZeRO-3 give every group of parameters the first one's weight decay. Here each process puts its own part together from
the files as they lie, and DeepSpeed loads that as if as many processes as there are now had written it.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    FROZEN_PARAM_FRAGMENTS,
    GROUP_PADDINGS,
    OPTIMIZER_STATE_DICT,
    PARAM_ALIGNMENT_PADDINGS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from .errors import UserError, rank_and_world

# All that DeepSpeed's files hold besides tensors and plain containers; `torch.load` makes nothing else of them.
DEEPSPEED_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

MASTER = "master copy"  # a flat tensor beside those of the optimizer's state
Flats = dict[str, torch.Tensor]  # of one group in one process: (elements,) each, all alike
# For each group: a parameter's name, where its piece begins in the flat tensors, where in the parameter, its elements.
Layout = list[list[tuple[str, int, int, int]]]


def read(path: str | Path, map_location: Any = None, mmap: bool = False) -> Any:
    """One of DeepSpeed's files.

    Args:
        mmap: leave the tensors in the file until they are used.

    Raises:
        pickle.UnpicklingError: the file holds something else than tensors and `DEEPSPEED_CLASSES`.
    """
    with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def divide_anew(engine: Any) -> None:
    """Let a DeepSpeed engine load a checkpoint that another number of processes has written.

    Raises:
        UserError: when it is loaded, where the optimizer's state can't be divided.
    """
    weights_in_pieces = engine.zero_optimization_stage() == 3
    find, load = engine._get_all_ckpt_names, engine.checkpoint_engine.load

    def find_first(folder: str, tag: str) -> list[str]:
        if not weights_in_pieces:  # whole, in one file
            return find(folder, tag)
        return [str(path) for path in _in_order(Path(folder, tag), "model_states")[:1]]

    def load_own(path: str, map_location: Any = None) -> Any:
        if path.endswith("optim_states.pt"):
            return _own_part(engine.optimizer, Path(path).parent, weights_in_pieces)
        state = load(path, map_location)
        if weights_in_pieces:  # those that are not trained are as the model was loaded
            state[FROZEN_PARAM_FRAGMENTS] = None
        return {**state, "dp_world_size": rank_and_world()[1]}

    engine._get_all_ckpt_names, engine.checkpoint_engine.load = find_first, load_own


def _in_order(folder: Path, kind: str) -> list[Path]:
    """The processes' files of a kind, in order of the processes."""
    number = re.compile(r"zero_pp_rank_(\d+)_")
    return sorted(folder.glob(f"*zero_pp_rank_*_{kind}.pt"), key=lambda path: int(number.search(path.name)[1]))


def _own_part(optimizer: Any, folder: Path, weights_in_pieces: bool) -> dict[str, Any]:
    """What this process's file would hold, had as many processes as now written the checkpoint.

    Args:
        optimizer: DeepSpeed's.
        folder: of the files.
        weights_in_pieces: of ZeRO-3.
    """
    files = [read(path, "cpu", mmap=True) for path in _in_order(folder, "optim_states")]
    states = [file[OPTIMIZER_STATE_DICT] for file in files]
    shapes = None
    if weights_in_pieces:
        shapes = read(_in_order(folder, "model_states")[0], "cpu", mmap=True)[PARAM_SHAPES]
    written: dict[str, list[tuple[Flats, int, int]]] = defaultdict(list)  # a parameter's pieces, from its beginning on
    if weights_in_pieces:
        layouts = [_layout_of_pieces(shapes, len(states))] * len(states)
    else:
        layouts = _written_layouts(states, optimizer.round_robin_gradients)
    for state, layout in zip(states, layouts, strict=True):
        for group, pieces in enumerate(layout):
            flats = _flats(state, group)
            for name, at, _, count in pieces:
                written[name].append((flats, at, count))
    masters, moments = [], {}
    for group, (size, pieces) in enumerate(_own_layout(optimizer, weights_in_pieces)):
        own = {key: torch.zeros(size, dtype=flat.dtype) for key, flat in _flats(states[0], 0).items()}
        for name, at, first, count in pieces:
            _copy(written[name], own, at, first, count)
        masters.append(own.pop(MASTER))
        # copies, for the optimizer counts in them
        numbers = {key: copy.deepcopy(each) for key, each in _moments(states[0])["state"][0].items() if key not in own}
        moments[group] = {**numbers, **own}
    groups = [dict(group) for group in _moments(states[0])["param_groups"]]
    own_state = {**states[0]}
    if weights_in_pieces:
        for number, group in enumerate(groups):
            group["params"] = [sub for sub, of in optimizer.sub_group_to_group_id.items() if of == number]
        own_state |= {FP32_FLAT_GROUPS: masters, OPTIMIZER_STATE_DICT: {"state": moments, "param_groups": groups}}
    else:
        own_state |= {
            SINGLE_PARTITION_OF_FP32_GROUPS: masters,
            PARAM_ALIGNMENT_PADDINGS: optimizer.round_robin_bit16_padding,
        }
        own_state[BASE_OPTIMIZER_STATE] = {"state": moments, "param_groups": groups}
    return {**files[0], OPTIMIZER_STATE_DICT: own_state}


def _moments(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's own state dict."""
    return state[BASE_OPTIMIZER_STATE if BASE_OPTIMIZER_STATE in state else OPTIMIZER_STATE_DICT]


def _flats(state: dict[str, Any], group: int) -> Flats:
    """A process's flat tensors of a group: the master copy and the optimizer's.

    Raises:
        UserError: the optimizer keeps tensors of another length, as 8-bit optimizers do with a scale for each block.
    """
    master = state[SINGLE_PARTITION_OF_FP32_GROUPS if SINGLE_PARTITION_OF_FP32_GROUPS in state else FP32_FLAT_GROUPS][
        group
    ]
    padded = master.numel() + (state[GROUP_PADDINGS][group] if GROUP_PADDINGS in state else 0)
    tensors = {key: value for key, value in _moments(state)["state"][group].items() if torch.is_tensor(value)}
    flats = {key: value for key, value in tensors.items() if value.dim()}
    if any(value.numel() != padded for value in flats.values()):
        raise UserError(
            "an 8-bit optimizer's state, which has a scale for each block of it, can't be divided over another number "
            "of processes: go on with as many as have written the checkpoint"
        )
    return {MASTER: master, **flats}


def _layout_of_pieces(shapes: list[dict[str, torch.Size]], processes: int) -> Layout:
    """Under ZeRO-3 every process has an equal piece of each parameter, the last ones with padding."""
    layout = []
    for group in shapes:
        pieces, at = [], 0
        for name, shape in group.items():
            count = -(-shape.numel() // processes)
            pieces.append((name, at, 0, count))
            at += count
        layout.append(pieces)
    return layout


def _written_layouts(states: list[dict[str, Any]], round_robin: bool) -> list[Layout]:
    """Under ZeRO-1 and 2, process by process: what of which parameter stands where in its flat tensors.

    With `round_robin_gradients` parameters are dealt to the processes in turn before they are flattened, and the
    mapping that DeepSpeed (seen in 0.19.8) writes down forgets it: its names and sizes are right, its order is not.
    """
    world, layouts = len(states), [[] for _ in states]
    for group, paddings in enumerate(states[0][PARAM_ALIGNMENT_PADDINGS]):
        mappings = [state[PARAM_SLICE_MAPPINGS][group] for state in states]
        if any(paddings):  # then it has looked where they are
            for layout, mapping in zip(layouts, mappings, strict=True):
                layout.append([(name, its.start, 0, its.numel) for name, its in mapping.items()])
            continue
        sizes: dict[str, int] = defaultdict(int)
        for mapping in mappings:
            for name, its in mapping.items():
                sizes[name] += its.numel
        names = list(sizes)
        if round_robin:
            names = [name for first in range(world) for name in names[first::world]]
        ends = list(itertools.accumulate(sizes[name] for name in names))
        whole = [(name, end - sizes[name], sizes[name]) for name, end in zip(names, ends, strict=True)]
        part = states[0][SINGLE_PARTITION_OF_FP32_GROUPS][group].numel() + states[0][GROUP_PADDINGS][group]
        for rank, layout in enumerate(layouts):
            layout.append(_pieces(whole, rank * part, part))
    return layouts


def _pieces(whole: list[tuple[str, int, int]], begin: int, size: int) -> list[tuple[str, int, int, int]]:
    """What lies between `begin` and `begin + size` of a group's flat tensor.

    Args:
        whole: each parameter's name, where it begins, its elements.

    Returns:
        Name, where the piece begins within that, where in the parameter, its elements.
    """
    pieces = []
    for name, at, count in whole:
        low, high = max(at, begin), min(at + count, begin + size)
        if low < high:
            pieces.append((name, low - begin, low - at, high - low))
    return pieces


def _own_layout(optimizer: Any, weights_in_pieces: bool) -> list[tuple[int, list[tuple[str, int, int, int]]]]:
    """For each group the length of this process's flat tensors, and its pieces of parameters: name, where the piece
    begins in the flat tensors, where in the parameter, its elements."""
    names, layout, rank = optimizer.param_names, [], rank_and_world()[0]
    if weights_in_pieces:
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            pieces, at = [], 0
            for parameter in group:
                size = parameter.partition_numel()
                pieces.append((names[parameter], at, rank * size, min(size, parameter.ds_numel - rank * size)))
                at += size
            layout.append((flat.numel(), pieces))
        return layout
    groups = (optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets)
    for flat, group, offsets in zip(optimizer.single_partition_of_fp32_groups, *groups, strict=True):
        whole = [(names[parameter], at, parameter.numel()) for parameter, at in zip(group, offsets, strict=True)]
        layout.append((flat.numel(), _pieces(whole, rank * flat.numel(), flat.numel())))
    return layout


def _copy(pieces: list[tuple[Flats, int, int]], own: Flats, at: int, first: int, count: int) -> None:
    """Elements `first` to `first + count` of a parameter, from its pieces into `own` from `at` on."""
    begin = 0
    for flats, start, length in pieces:
        low, high = max(first, begin), min(first + count, begin + length)
        for key, flat in flats.items() if low < high else ():
            own[key][at + low - first : at + high - first] = flat[start + low - begin : start + high - begin]
        begin += length
