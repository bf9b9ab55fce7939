"""The JSONL format: what is refused on load, and what training and evaluation make of a file.

`tests/test_check_data.py` goes through every kind of fault, `tests/test_collation.py` through ids and labels of turns,
`tests/test_training_batches.py` trains texts beside pictures in two processes.
"""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from common.cli import Precision
from common.collation import ANSWER_END, collate, encode_example
from common.conversations import check_lengths, load_conversations
from common.demo import CHECKPOINT
from common.errors import MOST_PROBLEMS, UserError
from common.evaluation import generate_answers
from common.phi3v import Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor
from common.phi3v.processing import IMAGE_TAG
from tests.model_helpers import golden, golden_inputs, published_folder
from tests.model_helpers import picture as golden_picture


def picture(seed):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (24, 32, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    return Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=1)


def write(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(folder):
    return load_conversations(folder / "data.jsonl", folder / "images")


def one(**turn):
    return {"conversations": [{"user": "Q?", "assistant": "A", **turn}]}


THREE_TURNS = {
    "id": "x",
    "source": "mine",
    "conversations": [
        {"images": ["0.png", "1.png"], "user": "Both?", "assistant": "yes"},
        {"user": "Only text, ü?", "assistant": "no, and a longer answer"},
        {"images": ["2.png"], "user": "This?", "assistant": "maybe"},
    ],
}
# Pictures in some turns, in all, in none, and in the last one only.
MIXED = (
    THREE_TURNS,
    one(),
    one(images=["3.png"], user="What is this?", assistant="a longer answer than most"),
    {"conversations": [{"images": [], "user": "First?", "assistant": "1"}, {"user": "Second?", "assistant": "2"}]},
    {"conversations": [{"user": "Words.", "assistant": "w"}, {"images": ["1.png"], "user": "See?", "assistant": "s"}]},
)


# --- reading


def test_images_are_numbered_through_the_conversation(folder):
    write(folder, THREE_TURNS, "", one())
    data = load(folder)
    assert len(data) == 2
    example = data.example(0)
    assert [turn.user for turn in example.turns] == [
        "<|image_1|><|image_2|>\nBoth?",
        "Only text, ü?",
        "<|image_3|>\nThis?",
    ]
    assert [turn.assistant for turn in example.turns] == ["yes", "no, and a longer answer", "maybe"]
    assert [len(turn.images) for turn in example.turns] == [2, 0, 1]
    for image, number in zip([image for turn in example.turns for image in turn.images], range(3), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(picture(number)))
    assert data.place(1) == f"{folder / 'data.jsonl'}, line 3"  # the empty line counts
    assert [turn.user for turn in data.example(1).turns] == ["Q?"]


def test_the_first_ones(folder):
    write(folder, *MIXED)
    data = load(folder).first(2)
    assert (len(data), len(load(folder).first(None))) == (2, 5)
    assert data.sizes == (((32, 24),) * 3, ())
    assert data.example(1).turns[0].user == "Q?"


def test_all_faults_at_once(folder):
    write(folder, one(), one(user=1), one(images=["absent.png"]), {})
    with pytest.raises(UserError) as error:
        load(folder)
    text = str(error.value)
    assert text.startswith("3 problems:")
    assert all(f"{folder / 'data.jsonl'}, line {number}: " in text for number in (2, 3, 4))
    write(folder, *[{}] * 100)
    with pytest.raises(UserError, match=r"^100 problems:") as error:
        load(folder)
    assert str(error.value).count("line ") == MOST_PROBLEMS
    assert str(error.value).endswith(f"and 80 more of {folder / 'data.jsonl'}: python -m tools.check_data lists all")


def test_bad_lines_to_be_left_out(folder, processor):
    """They keep their places as examples that cannot be made; what they hold counts, that a mended picture changes
    nothing of it."""
    write(folder, one(), "{no JSON", one(user=1), one(images=["absent.png"]), {}, one(assistant="B"))
    data = load_conversations(folder / "data.jsonl", folder / "images", "skip")
    assert (len(data), list(data.faults)) == (6, [2, 3, 4, 5])
    assert [data.example(index).turns[0].assistant for index in (0, 5)] == ["A", "B"]
    for index, fault in ((1, "no JSON in UTF-8"), (2, "turn 1: user must be a text"), (3, "there is no such file")):
        with pytest.raises(UserError, match=rf"data.jsonl, line {index + 1}: .*{fault}"):
            data.example(index)
    held = [one(), one(user=1), one(images=["absent.png"]), {}, one(assistant="B")]
    assert list(data.without_images()) == held
    assert list(data.first(3).without_images()) == held[:2]
    assert data.first(3).faults == data.faults
    check_lengths(data, processor, limit=1)  # training leaves out what is too long, too
    write(folder, one(), one())
    with pytest.raises(UserError, match="2 problems"):
        check_lengths(load(folder), processor, limit=1)


def test_wrong_encoding_empty_and_missing_file(folder):
    (folder / "data.jsonl").write_bytes(b'{"conversations": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: no JSON in UTF-8"):
        load(folder)
    (folder / "data.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        load(folder)
    (folder / "data.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load(folder)


def test_pictures_are_opened_on_load_and_decoded_when_asked_for(folder):
    """A file that is no picture is found on load; one that is cut off behind its header when the example is made."""
    (folder / "images" / "0.png").write_bytes(b"not a picture")
    write(folder, one(), one(images=["0.png"]))
    with pytest.raises(UserError, match=r"line 2: turn 1: .*0\.png: the image cannot be opened"):
        load(folder)
    whole = (folder / "images" / "1.png").read_bytes()
    (folder / "images" / "0.png").write_bytes(whole[: len(whole) // 2])
    data = load(folder)
    with pytest.raises(UserError, match=r"line 2, .*0\.png: the image.* cannot be decoded"):
        data.example(1)


def test_lengths(folder, processor):
    """The limit itself is allowed, one token less is not; every conversation that is too long is named."""
    write(folder, *MIXED)
    data = load(folder)
    lengths = [len(encode_example(processor, data.example(index))["input_ids"]) for index in range(len(data))]
    check_lengths(data, processor, max(lengths))
    longest = lengths.index(max(lengths)) + 1
    message = rf"^.*line {longest}: {max(lengths)} tokens, the model takes {max(lengths) - 1}: "
    with pytest.raises(UserError, match=message):
        check_lengths(data, processor, max(lengths) - 1)
    with pytest.raises(UserError, match=r"^5 problems:"):
        check_lengths(data, processor, 1)


# --- what training and evaluation make of it


@pytest.mark.skipif(
    published_folder("phi-3.5-vision-instruct") is None, reason="no published tokenizer on this machine"
)
@pytest.mark.parametrize("case", ["single", "multi", "text", "long"])
def test_one_turn_gives_the_reference_ids(tmp_path, case):
    """From the file to the reference's prompt followed by `answer<|end|>\\n<|endoftext|>`, token for token."""
    stored = golden("cases.json")[case]
    tokenizer = AutoTokenizer.from_pretrained(published_folder("phi-3.5-vision-instruct"), trust_remote_code=False)
    published = Phi3VProcessor(Phi3VImageProcessor(num_crops=stored["num_crops"]), tokenizer)
    names = [f"{number}.png" for number in range(len(stored["pictures"]))]
    for name, description in zip(names, stored["pictures"], strict=True):
        golden_picture(*description).save(tmp_path / name)
    user = IMAGE_TAG.sub("", stored["messages"][0]["content"]).removeprefix("\n")
    turn = {"images": names, "user": user, "assistant": stored["answer"]}
    (tmp_path / "data.jsonl").write_text(json.dumps({"conversations": [turn]}) + "\n")
    encoded = encode_example(published, load_conversations(tmp_path / "data.jsonl", tmp_path).example(0))
    inputs, labels = golden_inputs(case)
    assert encoded["input_ids"].tolist() == inputs["input_ids"][0].tolist()
    assert encoded["labels"].tolist() == labels[0].tolist()
    answer = tokenizer(stored["answer"] + "<|end|>\n<|endoftext|>", add_special_tokens=False).input_ids
    assert encoded["input_ids"].tolist()[-len(answer) :] == answer
    for name in ("pixel_values", "image_sizes"):
        assert (name in encoded) == (name in inputs)
        assert name not in inputs or torch.equal(encoded[name], inputs[name])


def test_every_turn_has_its_own_prompt_and_every_answer_is_learnt(folder, processor):
    write(folder, THREE_TURNS)
    encoded = encode_example(processor, load(folder).example(0))
    expected_ids, expected_labels = [], []
    for turn, first_tag in zip(load(folder).example(0).turns, (1, 3, 3), strict=True):
        text = processor.apply_chat_template([{"role": "user", "content": turn.user}], add_generation_prompt=True)
        prompt = processor.encode(text, turn.images, first_tag=first_tag)["input_ids"].tolist()
        answer = processor.tokenizer(turn.assistant + ANSWER_END, add_special_tokens=False).input_ids
        assert prompt[0] == processor.tokenizer.bos_token_id
        assert processor.tokenizer.bos_token_id not in answer
        expected_ids += prompt + answer
        expected_labels += [-100] * len(prompt) + answer
    assert encoded["input_ids"].tolist() == expected_ids
    assert encoded["labels"].tolist() == expected_labels


class Recorder(torch.nn.Module):
    """Instead of a model: keeps what evaluation feeds to it, and answers at once."""

    def __init__(self):
        super().__init__()
        self.fed = []

    def generate(self, input_ids, attention_mask, pixel_values=None, **others):
        assert others["max_new_tokens"] == 3
        ends = torch.full((len(input_ids), 1), others["eos_token_id"][0])
        pixels = 0 if pixel_values is None else len(pixel_values)
        self.fed.append(([row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)], pixels))
        return SimpleNamespace(sequences=torch.cat([input_ids, ends], dim=1))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_feeds_what_training_saw(monkeypatch, folder, processor, batch_size):
    """The last turn's prompt with all turns before it, token for token; only the last answer is left out."""
    write(folder, *MIXED)
    data, model = load(folder), Recorder()
    limits = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=131072))
    monkeypatch.setattr("common.evaluation.causal_lm_of", lambda model: limits)
    precision = Precision("fp32", torch.float32, None)
    options = argparse.Namespace(num_workers=0, precision=precision, device="cpu", tqdm=False, bad_examples="stop")
    options.report_images, options.max_new_tokens = False, 3
    options.eval_batch_size_per_gpu = batch_size
    generate_answers(model, processor, len(data), data.example, options)
    fed = [row for rows, _ in model.fed for row in rows]
    assert len(fed) == len(MIXED)
    for index in range(len(MIXED)):
        trained = encode_example(processor, data.example(index))
        # prompts are fed sorted by length
        (length,) = [len(prompt) for prompt in fed if trained["input_ids"][: len(prompt)].tolist() == prompt.tolist()]
        assert trained["labels"][length - 1] == -100
        assert (trained["labels"][length:] != -100).all()
        answer = MIXED[index]["conversations"][-1]["assistant"] + ANSWER_END
        assert trained["input_ids"][length:].tolist() == processor.tokenizer(answer, add_special_tokens=False).input_ids
    assert sum(pixels for _, pixels in model.fed) == 2 * 5  # two views of each of the five pictures named


def test_texts_and_pictures_mix_in_one_batch(folder, processor):
    """Loss and gradient of the batch are the means of those alone (float64: 1e-9 relative), wherever pictures stand."""
    write(folder, *MIXED)
    data = load(folder)
    encoded = [encode_example(processor, data.example(index)) for index in range(len(data))]
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT).double()
    projection = model.model.vision_embed_tokens.img_projection[0].weight
    alone, gradients = [], []
    for row in encoded:
        model.zero_grad()
        loss = model(**collate(processor, [row])).loss
        loss.backward()
        alone.append(loss.item())
        gradients.append(torch.zeros_like(projection) if projection.grad is None else projection.grad.clone())
    for order in ((0, 1, 2, 3, 4), (3, 2, 4, 1, 0)):
        model.zero_grad()
        loss = model(**collate(processor, [encoded[index] for index in order])).loss
        loss.backward()
        assert loss.item() == pytest.approx(sum(alone) / len(alone), rel=1e-9)
        expected = sum(gradients) / len(gradients)
        assert (projection.grad - expected).norm() / expected.norm() < 1e-9
    assert gradients[0].norm() > 0
    assert gradients[1].norm() == gradients[3].norm() == 0
