"""Questions about one picture as branches of one sequence: the same gradients as apart, the picture encoded once.

Tolerances: in float64 1e-9, relative, for every parameter; found are 4e-15. In float32 1e-5: found are 2e-6,
for sums are added up in another order. A branch that sees its neighbour, or one position too few, gives 1e-2.
"""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import os
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from common.collation import Example, Turn, encode_example, encode_questions, pack, share_pictures
from common.layers import causal_lm_of
from common.phi3v import Phi3VProcessor
from common.phi3v.masks import (
    BY_DOCUMENT,
    SHARED,
    Documents,
    attend_by_document,
    attention_for_packing,
    block_mask,
    compiled_create_block_mask,
    dense_mask,
    document_bounds,
    document_ids,
    document_lengths,
    takes_all_lengths_at_once,
    visibility,
)
from common.phi3v.stock import OLDEST_LIGER, enable_activation_checkpointing, find_fused_cross_entropy
from tests.launch import REPOSITORY
from tests.model_helpers import picture
from tests.packed_helpers import (
    IMAGE_ID,
    THRESHOLD,
    alone,
    packed_gradients,
    questions,
    separate_gradients,
    shared,
    training_model,
    worst_difference,
)

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}

GROUPS = [
    questions(1, [(1, 1)], [(9, 3), (20, 1), (4, 7), (11, 2)], weights=[1.0, 0.5, 0.0, 2.0]),
    questions(2, [(1, 1), (1, 1)], [(6, 2), (30, 5)]),  # two pictures; past the rope threshold
    questions(3, [(1, 2)], [(5, 4)]),  # alone
    questions(4, [], [(25, 6)]),  # no picture
    questions(5, [(1, 1)], [(40, 3), (90, 2), (7, 1)]),  # one of them past the rope threshold
]
ENCODED = [one for group in GROUPS for one in group]


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        (BY_DOCUMENT, torch.float64),
        (BY_DOCUMENT, torch.float32),
        ("sdpa", torch.float64),
        ("sdpa", torch.float32),
        ("eager", torch.float32),
    ],
)
def test_gradients_are_those_of_separate_sequences(attention: str, dtype: torch.dtype) -> None:
    """Every parameter; several pictures, rows of two, weights; fewer than 6 in 10 of the tokens."""
    model = training_model("eager" if attention == "eager" else "sdpa", dtype)
    batch = pack(shared(GROUPS))
    assert batch["input_ids"].numel() < 0.6 * sum(len(one["input_ids"]) for one in ENCODED)
    found, wanted = packed_gradients(model, batch, attention), separate_gradients(model, ENCODED)
    difference, name = worst_difference(model, found, wanted)
    assert difference <= TOLERANCES[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradients_of_adapters(dtype: torch.dtype) -> None:
    """LoRA on decoder, head, tower and projection; neither factor 0, so that both have gradients."""
    peft = pytest.importorskip("peft")
    model = training_model("sdpa", dtype)
    targets = (
        r".*(qkv_proj|o_proj|down_proj|gate_up_proj|lm_head|layers\.[01]\..*(q_proj|out_proj|fc1)|projection\.[02])"
    )
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).to(dtype)
    found, wanted = packed_gradients(model, pack(shared(GROUPS))), separate_gradients(model, ENCODED)
    assert any("lm_head.lora_A" in name for name in wanted)
    assert any("img_processor" in name for name in wanted)
    difference, name = worst_difference(model, found, wanted)
    assert difference <= TOLERANCES[dtype], name


def test_gradients_with_activation_checkpointing() -> None:
    model = training_model()
    batch = pack(shared(GROUPS[:2]))
    wanted = packed_gradients(model, batch)
    enable_activation_checkpointing(model)
    difference, name = worst_difference(model, packed_gradients(model, batch), wanted)
    assert difference <= 1e-12, name


def test_picture_is_encoded_once() -> None:
    model = training_model("sdpa", torch.float32)
    crops = []
    tower = model.model.vision_embed_tokens.img_processor
    tower.register_forward_pre_hook(lambda _, inputs: crops.append(len(inputs[0])))
    packed_gradients(model, pack(shared(GROUPS[:3])))
    assert crops == [2 + 4 + 3]  # each picture's global view and sub-images


@pytest.mark.parametrize("attention", ["sdpa", BY_DOCUMENT])
def test_branches_do_not_see_each_other(attention: str) -> None:
    """Other words in one branch: nothing else moves, not even by a rounding error."""
    model = training_model("sdpa", torch.float32).eval()
    model.config._attn_implementation = attention
    batch = pack(shared(GROUPS[:2]))
    del batch["labels"], batch["loss_weights"]
    changed = copy.deepcopy(batch)
    own = batch["branch_ids"][0] == 1
    changed["input_ids"][0, own] = changed["input_ids"][0, own].flip(0)
    with torch.no_grad():
        difference = (model(**batch).logits - model(**changed).logits)[0].abs().amax(-1)
    assert difference[~own].max() == 0
    assert difference[own].min() > 1e-2


def test_logits_are_those_of_the_question_alone() -> None:
    """Position by position, on both sides of the rope threshold."""
    model = training_model("sdpa", torch.float32).eval()
    batch = pack(shared(GROUPS))
    batch.pop("labels"), batch.pop("loss_weights")
    branch_of = [
        number for document in shared(GROUPS) for number in document.get("branch_ids", torch.zeros(1)).unique()
    ]
    assert len([number for number in branch_of if number != SHARED]) == len(ENCODED)
    # `share_pictures` puts group 5's longer question after its others
    order = [*ENCODED[:8], ENCODED[8], ENCODED[10], ENCODED[9]]
    with torch.no_grad():
        logits = model(**batch).logits[0]
        for number, one in enumerate(order):
            own = (batch["branch_ids"][0] == number).nonzero()[:, 0]
            inputs = alone(one)
            del inputs["labels"]
            wanted = model(**inputs).logits[0, -len(own) :]
            assert (logits[own] - wanted).abs().max() < 1e-5, number


# The description and its forms


def small_pack() -> tuple[torch.Tensor, torch.Tensor]:
    """A prefix of two with branches of two and one; a document of two; a prefix of one with two branches of one."""
    positions = [0, 1, 2, 3, 2, 0, 1, 0, 1, 1]
    branches = [SHARED, SHARED, 0, 0, 1, 2, 2, SHARED, 3, 4]
    return torch.tensor([positions]), torch.tensor([branches])


def test_dense_mask() -> None:
    wanted = """
        1.........
        11........
        111.......
        1111......
        11..1.....
        .....1....
        .....11...
        .......1..
        .......11.
        .......1.1
    """
    mask = dense_mask(*small_pack())
    assert mask.shape == (1, 1, 10, 10)
    assert ["".join(".1"[seen] for seen in row) for row in mask[0, 0].int().tolist()] == wanted.split()


def test_documents() -> None:
    positions, _ = small_pack()
    assert document_ids(positions).tolist() == [[1] * 5 + [2] * 2 + [3] * 3]
    assert document_lengths(positions).tolist() == [[4] * 5 + [2] * 5]
    bounds, longest = document_bounds(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert (bounds.tolist(), longest, bounds.dtype) == ([0, 3, 4, 6], 3, torch.int32)


def test_block_mask_is_the_dense_mask() -> None:
    """Block by block: FlexAttention visits every block in which something is seen, and asks where it is not all."""
    batch = pack(shared(GROUPS))
    positions, branches = batch["position_ids"], batch["branch_ids"]
    blocks = block_mask(positions, branches)
    dense = dense_mask(positions, branches)[0, 0]
    side = blocks.BLOCK_SIZE[0]
    padding = -len(dense) % side
    tiles = F.pad(dense, (0, padding, 0, padding)).unfold(0, side, side).unfold(1, side, side)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), tiles.any(-1).any(-1))
    assert blocks.sparsity() > 80  # percent left out, of a mask whose upper half alone is 50
    places = torch.arange(len(dense))
    assert torch.equal(blocks.mask_mod(0, 0, places[:, None], places), dense)


@pytest.mark.long  # compiling takes a quarter of a minute
def test_compiled_block_mask_is_the_uncompiled_one() -> None:
    """As on CUDA, for packs of different lengths and descriptions in turn."""
    for groups in (GROUPS[:1], GROUPS[:2], GROUPS[2:], GROUPS):
        batch = pack(shared(groups))
        positions, branches = batch["position_ids"], batch["branch_ids"]
        sizes = {"B": 1, "H": None, "Q_LEN": positions.shape[1], "KV_LEN": positions.shape[1], "device": "cpu"}
        compiled = compiled_create_block_mask()(visibility(positions, branches), **sizes)
        assert torch.equal(compiled.to_dense(), block_mask(positions, branches).to_dense())


@pytest.mark.long  # compiling its kernels takes most of a minute
def test_flex_attention() -> None:
    """Forward only: on a CPU FlexAttention has no backward pass."""
    model = training_model("sdpa", torch.float32).eval()
    batch = pack(shared(GROUPS[:2]))
    with torch.no_grad():
        wanted = model(**batch).loss
        model.config._attn_implementation = "flex_attention"
        assert model.model.layers[0].self_attn.config._attn_implementation == "flex_attention"
        assert (model(**batch).loss - wanted).abs() < 1e-5


def test_flash_attention_has_no_branches() -> None:
    model = training_model("sdpa", torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=f'"{BY_DOCUMENT}", not "flash_attention_2"'):
        model(**pack(shared(GROUPS[:1])))


def test_documents_of_a_pack() -> None:
    """What attends by itself, and the mask of what does not: the dense mask's rows after each prefix."""
    positions, branches = small_pack()
    documents = Documents(positions, branches).each
    assert [(one.length, one.prefix) for one in documents] == [(5, 2), (2, 0), (3, 1)]
    dense = dense_mask(positions, branches)[0, 0]
    assert torch.equal(documents[0].mask, dense[2:5, :5])
    assert documents[1].mask is None
    assert torch.equal(documents[2].mask, dense[8:, 7:])


def test_by_document_is_for_one_packed_row() -> None:
    model = training_model("sdpa", torch.float32)
    model.config._attn_implementation = BY_DOCUMENT
    with pytest.raises(ValueError, match="is for packed rows"):
        model(**alone(ENCODED[0]))
    positions, branches = small_pack()
    with pytest.raises(ValueError, match="a packed batch has one row, not 2"):
        Documents(positions.repeat(2, 1), branches.repeat(2, 1))


def test_by_document_with_fewer_key_heads() -> None:
    """As `repeat_kv` would have it: a key head for every two heads."""
    positions, branches = small_pack()
    query = torch.randn(1, 4, 10, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 10, 8, dtype=torch.float64)
    found, _ = attend_by_document(None, query, key, value, None, Documents(positions, branches), scaling=0.3)
    repeated = (one.repeat_interleave(2, dim=1) for one in (key, value))
    mask = dense_mask(positions, branches)
    wanted = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    assert (found - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("shares", [False, True])
def test_by_document_at_once(monkeypatch: pytest.MonkeyPatch, shares: bool) -> None:
    """A GPU's kernel for sequences of different lengths gets a row of examples, never one whose branches share."""
    positions, branches = small_pack()
    if not shares:  # two examples, of 6 and 4 positions
        positions = torch.tensor([[*range(6), *range(4)]])
        branches = torch.tensor([[0] * 6 + [1] * 4])
    calls = []

    def varlen_attn(query, key, value, bounds, key_bounds, longest, longest_key, *, scale, window_size):
        """As documented: (seq, heads, head), sequences between the bounds, a window of all before and none after."""
        assert bounds is key_bounds
        assert bounds.dtype == torch.int32
        assert (longest, longest_key, window_size) == (6, 6, (-1, 0))
        calls.append(bounds.tolist())
        parts = []
        for begin, end in itertools.pairwise(bounds.tolist()):
            states = (one[begin:end].transpose(0, 1) for one in (query, key, value))
            parts.append(F.scaled_dot_product_attention(*states, is_causal=True, scale=scale).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr("common.phi3v.masks.varlen_attn", varlen_attn)
    query, key, value = torch.randn(3, 1, 4, 10, 8, dtype=torch.float64)
    documents = Documents(positions, branches)
    wanted, _ = attend_by_document(None, query, key, value, None, documents, scaling=0.3)
    assert calls == []  # on a CPU
    monkeypatch.setattr("common.phi3v.masks.takes_all_lengths_at_once", lambda query: True)
    found, _ = attend_by_document(None, query, key, value, None, documents, scaling=0.3)
    assert calls == ([] if shares else [[0, 6, 10]])
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-12
    calls.clear()
    attend_by_document(None, query, key, value, None, documents, scaling=0.3, dropout=0.1)
    attend_by_document(None, query, key[:, :2], value[:, :2], None, documents, scaling=0.3)
    assert calls == []


@pytest.mark.parametrize(
    ("dtype", "head", "capability", "takes"),
    [
        (torch.bfloat16, 96, (8, 0), True),
        (torch.float16, 64, (9, 0), True),
        (torch.float32, 96, (9, 0), False),
        (torch.bfloat16, 12, (9, 0), False),
        (torch.float16, 96, (7, 5), False),
    ],
)
def test_which_rows_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head: int, capability: tuple[int, int], takes: bool
) -> None:
    """Those that flash-attn's kernels serve."""
    query = SimpleNamespace(is_cuda=True, dtype=dtype, shape=torch.Size([1, 4, 10, head]), device="cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert takes_all_lengths_at_once(query) == takes
    query.is_cuda = False
    assert not takes_all_lengths_at_once(query)


@pytest.mark.parametrize(
    ("asked", "shares", "used"),
    [
        ("flash_attention_2", False, "flash_attention_2"),
        ("flash_attention_2", True, BY_DOCUMENT),
        ("sdpa", False, BY_DOCUMENT),
        ("sdpa", True, BY_DOCUMENT),
    ],
)
def test_choice_of_attention(asked: str, shares: bool, used: str) -> None:
    assert attention_for_packing(asked, shares) == used


@pytest.mark.parametrize("extra", ["attention_mask", "use_cache", "no position_ids"])
def test_packed_rows_take_neither_mask_nor_cache(extra: str) -> None:
    batch: dict[str, Any] = pack(shared(GROUPS[3:4]))
    if extra == "no position_ids":
        del batch["position_ids"]
    else:
        batch[extra] = torch.ones_like(batch["input_ids"]) if extra == "attention_mask" else True
    with pytest.raises(ValueError, match="packed rows"):
        training_model("sdpa", torch.float32)(**batch)


def test_packed_rows_keep_no_cache() -> None:
    """Also where the configuration asks for one: restarting positions and a cache would leak."""
    model = training_model("sdpa", torch.float32).eval()
    batch = pack(shared(GROUPS[3:4]))
    assert model.config.use_cache
    with torch.no_grad():
        assert model(**{name: batch[name] for name in batch if name != "labels"}).past_key_values is None


# From conversations to documents


@pytest.fixture(scope="module")
def processor(stand_in) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(stand_in, num_crops=1)


def examples(*pictures: Any) -> list[Example]:
    """Questions about the same pictures, one of them with a second turn."""
    tags = "".join(f"<|image_{number}|>" for number in range(1, len(pictures) + 1))
    return [
        Example("a", [Turn(f"{tags}\nWhat is the date?", "1 May", pictures)]),
        Example("b", [Turn(f"{tags}\nWho?", "Ann", pictures), Turn("And why?", "Because")]),
        Example("c", [Turn(f"{tags}\nHow much is it?\nAnswer briefly.", "12", pictures)]),
    ]


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_every_branch_reads_what_it_would_read_alone(processor: Phi3VProcessor, num_pictures: int) -> None:
    """Prefix and branch put together are the separate example, token for token, label for label, place for place."""
    asked = examples(*(picture(40 + number, 30, number) for number in range(num_pictures)))
    encoded = [{**one, "loss_weight": 2.0} for one in encode_questions(processor, asked)]
    separate = [encode_example(processor, one) for one in asked]
    for found, wanted in zip(encoded, separate, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (document,) = share_pictures(encoded, processor.image_token_id, 4096)
    assert torch.equal(document["pixel_values"], separate[0]["pixel_values"])
    assert document["loss_weights"] == [2.0, 2.0, 2.0]
    in_prefix = document["branch_ids"] == SHARED
    assert document["input_ids"][in_prefix][-1] == processor.image_token_id
    for number, wanted in enumerate(separate):
        own = in_prefix | (document["branch_ids"] == number)
        assert torch.equal(document["input_ids"][own], wanted["input_ids"])
        assert torch.equal(document["labels"][own], wanted["labels"])
        assert document["position_ids"][own].tolist() == list(range(len(wanted["input_ids"])))
        assert processor.image_token_id not in document["input_ids"][document["branch_ids"] == number]


def test_pictures_are_processed_once(processor: Phi3VProcessor) -> None:
    counting = copy.copy(processor)
    calls = []

    def process(images: Any, num_crops: int | None = None) -> Any:
        calls.append(len(images))
        return processor.image_processor(images, num_crops=num_crops)

    counting.image_processor = process
    one, other = examples(picture(40, 30, 1)), examples(picture(50, 30, 2), picture(60, 30, 3))
    encoded = encode_questions(counting, [*one, *other])
    assert [number for number in calls if number] == [1, 2]  # the second turns have none
    assert encoded[0]["pixel_values"] is encoded[2]["pixel_values"]
    assert counting.image_processor is process


def test_questions_on_both_sides_of_the_rope_threshold_are_two_documents() -> None:
    """The longer one rotates its prefix by the long factors, too: the prefix cannot be the same."""
    documents = shared(GROUPS[4:])
    assert [len(one.get("loss_weights", [1.0])) for one in documents] == [2, 1]
    assert max(documents[0]["position_ids"]) < THRESHOLD < len(documents[1]["input_ids"])


def test_what_cannot_be_shared_is_refused() -> None:
    group = questions(6, [(1, 1)], [(9, 3), (20, 1)])
    other_picture = questions(7, [(1, 1)], [(9, 3)])[0]
    other_text = {**group[1], "input_ids": group[1]["input_ids"].clone()}
    other_text["input_ids"][0] += 1
    labelled = {**group[1], "labels": group[1]["labels"].clone()}
    labelled["labels"][319] = 5  # the first token after the picture, which the prefix's last predicts
    for one, message in ((other_picture, "same pictures"), (other_text, "same text"), (labelled, "not be labelled")):
        with pytest.raises(ValueError, match=message):
            share_pictures([group[0], one], IMAGE_ID, THRESHOLD)
    with pytest.raises(ValueError, match="same pictures"):
        share_pictures(questions(8, [], [(9, 3), (20, 1)]), IMAGE_ID, THRESHOLD)


def test_equal_pictures_need_not_be_the_same_object() -> None:
    group = questions(9, [(1, 1)], [(9, 3), (20, 1)])
    again = {**group[1], "pixel_values": group[1]["pixel_values"].clone()}
    assert len(share_pictures([group[0], again], IMAGE_ID, THRESHOLD)) == 1


# The fused loss


def test_ligers_fused_loss() -> None:
    """Losses and gradients where every position counts differently; 1e-5: float32."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Liger's kernels need CUDA, or TRITON_INTERPRET=1")
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False, device=device)
    hidden_states = torch.randn(12, 16, device=device, requires_grad=True)
    targets, weights = torch.randint(0, 50, (12,), device=device), torch.rand(12, device=device)
    token_losses = find_fused_cross_entropy("cuda")
    assert token_losses is not None, f"older than {OLDEST_LIGER}"

    def losses_and_gradients(losses: torch.Tensor) -> torch.Tensor:
        gradients = torch.autograd.grad((losses * weights).sum(), (hidden_states, head.weight))
        return torch.cat([losses.detach(), *(gradient.flatten() for gradient in gradients)])

    found = losses_and_gradients(token_losses(hidden_states, head, targets))
    wanted = losses_and_gradients(F.cross_entropy(head(hidden_states), targets, reduction="none"))
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(("version", "is_new_enough"), [("0.8.1", False), ("0.8.5", True), ("0.10.0", True)])
def test_old_liger_is_not_taken(version: str, is_new_enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss would be right and its gradients wrong."""
    functional = SimpleNamespace(liger_fused_linear_cross_entropy=None)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(importlib.metadata, "version", {"liger_kernel": version}.__getitem__)
    assert (find_fused_cross_entropy.__wrapped__("cuda") is not None) == is_new_enough


@pytest.mark.parametrize("name", ["requirements-liger.txt", "docs/speed.md"])
def test_the_oldest_liger_is_told(name: str) -> None:
    """By what is installed, and where the option is explained."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert re.findall(r"liger-kernel(?:>=| )([\d.]+)", text) == [OLDEST_LIGER]


@pytest.mark.parametrize("situation", ["many labels", "few labels", "adapted head", "not installed"])
def test_fused_loss_is_used_where_it_can_be(situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients; a head that LoRA adapts must be called, its weight alone is not the head."""
    model = training_model()
    if situation == "adapted head":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).double()
    batch = pack(shared(GROUPS[3:4]))
    wanted = packed_gradients(model, batch)
    calls = []

    def fused(hidden_states: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        return F.cross_entropy(hidden_states @ head.weight.T, targets, reduction="none")

    def find(device_type: str) -> Any:
        return None if situation == "not installed" else fused

    monkeypatch.setattr("common.phi3v.modeling.find_fused_cross_entropy", find)
    causal_lm_of(model).fuses_loss_from = 7 if situation == "few labels" else 6
    found = packed_gradients(model, batch)
    assert calls == ([6] if situation == "many labels" else [])
    assert all((found[name] - gradient).abs().max() < 1e-12 for name, gradient in wanted.items())
