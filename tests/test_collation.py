"""Conversations -> ids and labels: what training sees is what evaluation feeds, turn by turn."""

import pytest
import torch
from transformers import AutoTokenizer

from common.collation import ANSWER_END, Example, Turn, collate, encode_example
from common.errors import UserError
from common.phi3v import Phi3VImageProcessor, Phi3VProcessor
from tests.model_helpers import golden, golden_inputs, picture, published_folder, write_stand_in_checkpoint


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Phi3VProcessor.from_pretrained(write_stand_in_checkpoint(tmp_path_factory.mktemp("stand_in")), num_crops=1)


def ids_of(processor, text):
    return processor.tokenizer(text, add_special_tokens=False).input_ids


def one_turn(user="What?", assistant="42", pictures=()):
    return Example("row 3", [Turn(user, assistant, pictures)])


@pytest.mark.skipif(
    published_folder("phi-3.5-vision-instruct") is None, reason="no published tokenizer on this machine"
)
@pytest.mark.parametrize("case", ["single", "multi", "text", "long"])
def test_single_turn_gives_the_reference_ids(case):
    """Prompt and answer of every golden case, token for token, and the labels on the answer only."""
    stored = golden("cases.json")[case]
    tokenizer = AutoTokenizer.from_pretrained(published_folder("phi-3.5-vision-instruct"), trust_remote_code=False)
    published = Phi3VProcessor(Phi3VImageProcessor(num_crops=stored["num_crops"]), tokenizer)
    pictures = [picture(*description) for description in stored["pictures"]]
    encoded = encode_example(published, one_turn(stored["messages"][0]["content"], stored["answer"], pictures))
    inputs, labels = golden_inputs(case)
    assert encoded["input_ids"].tolist() == inputs["input_ids"][0].tolist()
    assert encoded["labels"].tolist() == labels[0].tolist()
    for name in ("pixel_values", "image_sizes"):
        assert (name in encoded) == (name in inputs)
        assert name not in inputs or torch.equal(encoded[name], inputs[name])


def test_answer_is_labelled_with_its_end(processor):
    encoded = encode_example(processor, one_turn())
    answer = ids_of(processor, "42" + ANSWER_END)
    assert encoded["input_ids"][-len(answer) :].tolist() == answer
    assert encoded["labels"][-len(answer) :].tolist() == answer
    assert (encoded["labels"][: -len(answer)] == -100).all()
    # the last label is the end of text, which is also the padding: it must be learnt all the same
    assert encoded["labels"][-1] == processor.tokenizer.pad_token_id


def test_prompt_for_generation_is_what_training_saw_before_the_answer(processor):
    turns = [
        Turn("<|image_1|><|image_2|>\nFirst?", "one", [picture(40, 30, 1), picture(50, 20, 2)]),
        Turn("And then?", "two"),
        Turn("<|image_3|>\nLast?", "three", [picture(30, 30, 3)]),
    ]
    trained = encode_example(processor, Example("x", turns))
    asked = encode_example(processor, Example("x", turns), with_answer=False)
    length = len(asked["input_ids"])
    assert trained["input_ids"][:length].tolist() == asked["input_ids"].tolist()
    assert (trained["labels"][length:] != -100).all()
    assert torch.equal(trained["pixel_values"], asked["pixel_values"])


def test_turns_follow_one_another_each_with_its_own_bos(processor):
    turns = [Turn("<|image_1|>\nA?", "a", [picture(40, 30, 1)]), Turn("B?", "b")]
    both = encode_example(processor, Example("x", turns))
    alone = [encode_example(processor, Example("x", [turn])) for turn in turns]
    for name in ("input_ids", "labels"):
        assert torch.equal(both[name], torch.cat([one[name] for one in alone]))


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (Turn("<|image_1|>\nA?", "a"), r"row 3: the prompt has 1 image tags \(<\|image_1\|>\) and 0 images"),
        (Turn("A?", "a", [picture(9, 9, 0)]), "row 3: the prompt has 0 image tags"),
        (Turn("A?", " "), "row 3: the answer is empty"),
        (Turn("<|image_1|>", "a", [picture(2000, 1, 0)]), "row 3: .*too thin"),
    ],
)
def test_faults_name_the_example(processor, turn, message):
    with pytest.raises(UserError, match=message):
        encode_example(processor, Example("row 3", [turn]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(processor, side):
    encoded = [
        encode_example(processor, one_turn("A long question?", "yes")),
        {**encode_example(processor, one_turn("<|image_1|>\nB?", "no", [picture(40, 30, 1)])), "loss_weight": 0.5},
        encode_example(processor, one_turn("C?", "n")),
    ]
    batch = collate(processor, encoded, padding_side=side)
    longest = max(len(one["input_ids"]) for one in encoded)
    for row, one in enumerate(encoded):
        length = len(one["input_ids"])
        own = slice(0, length) if side == "right" else slice(longest - length, longest)
        assert batch["input_ids"][row, own].tolist() == one["input_ids"].tolist()
        assert batch["labels"][row, own].tolist() == one["labels"].tolist()
        assert batch["attention_mask"][row, own].all()
        assert batch["attention_mask"][row].sum() == length  # ends in the pad token's id, and is real
        assert (batch["labels"][row] != -100).sum() == (one["labels"] != -100).sum()
    assert batch["loss_weights"].tolist() == [1.0, 0.5, 1.0]
    assert torch.equal(batch["pixel_values"], encoded[1]["pixel_values"])
    assert batch["image_sizes"].tolist() == [[336, 336]]


def test_batch_of_texts_has_no_pixels(processor):
    batch = collate(processor, [encode_example(processor, one_turn()) for _ in range(2)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "loss_weights"}
