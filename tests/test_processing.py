"""Prompts and pictures -> model inputs, with a made-up tokenizer and with the published one.

Ids, masks and files are compared exactly. The golden prompts are compared in `test_parity.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from common.demo import CHECKPOINT
from common.phi3v import Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor
from tests.model_helpers import (
    CHAT_TEMPLATE,
    END_OF_TEXT_ID,
    IMAGE_TOKEN_ID,
    PUBLISHED_NAMES,
    picture,
    published_folder,
    tiny_model,
)

TOKENIZER_FILES = ("tokenizer.json", "special_tokens_map.json")


@pytest.fixture(params=["stand_in", "published_instruct"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A folder with a processor's files: made up, and published."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def processor(folder: Path) -> Phi3VProcessor:
    """A processor that makes two views of each picture, so that the tests are quick."""
    return Phi3VProcessor.from_pretrained(folder, num_crops=1)


@pytest.fixture(scope="module")
def model() -> Phi3VForCausalLM:
    return tiny_model()


def pictures(number: int) -> list[Image.Image]:
    return [picture(40 + 30 * position, 90, position) for position in range(number)]


def prompt(*tags: int) -> str:
    return "<|user|>\n" + " and ".join(f"<|image_{tag}|>" for tag in tags) + "\nWhat?<|end|>\n<|assistant|>\n"


# Tags and pictures


@pytest.mark.parametrize(
    ("tags", "num_images", "numbers"),
    [
        pytest.param((), 1, (0, 1), id="missing"),
        pytest.param((1,), 2, (1, 2), id="one_missing"),
        pytest.param((1,), 0, (1, 0), id="no_images"),
        pytest.param((1, 1), 1, (2, 1), id="doubled"),
        pytest.param((1, 2, 2), 2, (3, 2), id="doubled_second"),
        pytest.param((1, 1), 2, (2, 2), id="doubled_in_place_of_another"),
        pytest.param((1, 3), 2, (2, 2), id="beyond"),
        pytest.param((2,), 1, (1, 1), id="not_from_1"),
        pytest.param((0,), 1, (1, 1), id="zero"),
        pytest.param((0, 1), 2, (2, 2), id="from_zero"),
    ],
)
def test_tags_and_pictures_must_match(
    processor: Phi3VProcessor, tags: tuple[int, ...], num_images: int, numbers: tuple[int, int]
) -> None:
    num_tags, _ = numbers
    with pytest.raises(ValueError, match=rf"{num_tags} image tags \(.*\) and {num_images} images") as raised:
        processor(prompt(*tags), pictures(num_images))
    for tag in tags:
        assert f"<|image_{tag}|>" in str(raised.value)


def test_each_prompt_of_a_batch_is_checked(processor: Phi3VProcessor) -> None:
    """The batch as a whole has as many tags as pictures; its rows do not."""
    with pytest.raises(ValueError, match="2 image tags"):
        processor([prompt(1, 2), prompt()], [pictures(1), pictures(1)])


def test_batch_of_one_picture_each_needs_no_lists(processor: Phi3VProcessor) -> None:
    one, two = pictures(2)
    found = processor([prompt(1), prompt(1)], [one, two])
    wanted = processor([prompt(1), prompt(1)], [[one], [two]])
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])


def test_prompts_and_lists_of_pictures_must_be_equally_many(processor: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match="2 prompts, but images for 3"):
        processor([prompt(), prompt()], [[], [], []])


def test_tags_out_of_order_get_their_own_pictures(processor: Phi3VProcessor, model: Phi3VForCausalLM) -> None:
    """`pixel_values` follow the text; nothing differs from the same text with renumbered pictures."""
    first, second, third = pictures(3)
    swapped = processor(prompt(3, 1, 2), [first, second, third])
    in_order = processor(prompt(1, 2, 3), [third, first, second])
    assert swapped.keys() == in_order.keys()
    for name in swapped:
        assert torch.equal(swapped[name], in_order[name]), name
    wanted = torch.cat([Phi3VImageProcessor(num_crops=1)(one)["pixel_values"] for one in (third, first, second)])
    assert torch.equal(swapped["pixel_values"], wanted)
    with torch.no_grad():
        found = model(**swapped).logits
        assert torch.equal(found, model(**in_order).logits)
        # and the test can tell: the pictures in the order of their numbers give something else
        other = model(**processor(prompt(1, 2, 3), [first, second, third])).logits
    assert (found - other).abs().max() > 0.1


def test_pictures_of_different_sizes_out_of_order(processor: Phi3VProcessor) -> None:
    """Each tag gets as many tokens as its own picture needs."""
    wide, square = picture(900, 200, 4), picture(90, 90, 2)
    inputs = processor(prompt(2, 1), [wide, square], num_crops=4)
    assert inputs["image_sizes"].tolist() == [[672, 672], [336, 1344]]
    runs = re.findall(r"1+", "".join(str(int(token == IMAGE_TOKEN_ID)) for token in inputs["input_ids"][0].tolist()))
    assert [len(run) for run in runs] == [(4 + 1) * 144 + 1 + 3 * 12, (4 + 1) * 144 + 1 + 2 * 12]


def test_text_between_tags_is_tokenised_on_its_own(processor: Phi3VProcessor) -> None:
    """Every chunk with its own BOS, an empty one too, as in the reference."""
    tokenizer = processor.tokenizer
    ids = processor("ab<|image_1|><|image_2|>cd", pictures(2))["input_ids"][0].tolist()
    image = [IMAGE_TOKEN_ID] * 313
    assert ids == [*tokenizer("ab").input_ids, *image, tokenizer.bos_token_id, *image, *tokenizer("cd").input_ids]
    assert tokenizer("ab").input_ids[0] == tokenizer.bos_token_id == 1


def test_any_character_may_stand_in_the_text(processor: Phi3VProcessor) -> None:
    """Also those that a careless way to cut the text at its tags would trip over."""
    tokenizer = processor.tokenizer
    before, after = "a\0b", "\0<|image_x|> \\1 "
    ids = processor(f"{before}<|image_1|>{after}", pictures(1))["input_ids"][0].tolist()
    assert ids == [*tokenizer(before).input_ids, *[IMAGE_TOKEN_ID] * 313, *tokenizer(after).input_ids]


def test_one_picture_needs_no_list(processor: Phi3VProcessor) -> None:
    alone, listed = processor(prompt(1), pictures(1)[0]), processor(prompt(1), pictures(1))
    assert all(torch.equal(alone[name], listed[name]) for name in listed)


def test_num_crops_of_a_call(processor: Phi3VProcessor) -> None:
    inputs = processor(prompt(1), picture(300, 500, 0), num_crops=4)
    assert inputs["pixel_values"].shape[0] == 5
    assert int((inputs["input_ids"] == IMAGE_TOKEN_ID).sum()) == 757


# Batches


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch(processor: Phi3VProcessor, padding_side: str) -> None:
    """Rows with no picture, one and two: each row as alone, padding outside, pictures in the rows' order."""
    first, second, third = pictures(3)
    prompts = [prompt(1), "No picture at all.", prompt(2, 1), ""]
    images = [[first], [], [second, third], None]
    batch = processor(prompts, images, padding_side=padding_side)
    alone = [processor(text, row) for text, row in zip(prompts, images, strict=True)]
    lengths = [one["input_ids"].shape[1] for one in alone]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, max(lengths))
    for row, (one, length) in enumerate(zip(alone, lengths, strict=True)):
        real = slice(-length, None) if padding_side == "left" else slice(0, length)
        assert torch.equal(batch["input_ids"][row, real], one["input_ids"][0])
        mask = torch.zeros(max(lengths), dtype=torch.long)
        mask[real] = 1
        assert torch.equal(batch["attention_mask"][row], mask)
        assert bool((batch["input_ids"][row][mask == 0] == END_OF_TEXT_ID).all())
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in alone if name in one]))
    assert "pixel_values" not in alone[1]


def test_batch_without_pictures(processor: Phi3VProcessor) -> None:
    batch = processor(["One.", "One, two."])
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][1].all()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_mask_comes_from_lengths(processor: Phi3VProcessor, padding_side: str) -> None:
    """`<|endoftext|>` pads and also ends an answer: in the text it is real wherever it stands."""
    short, long = "<|endoftext|>b<|endoftext|>", "a much longer text<|end|>\n<|endoftext|>"
    batch = processor([short, long], padding_side=padding_side)
    assert processor.tokenizer.pad_token_id == END_OF_TEXT_ID
    length = processor(short)["input_ids"].shape[1]
    assert int((batch["input_ids"][0] == END_OF_TEXT_ID).sum()) > 2
    assert batch["attention_mask"].sum(-1).tolist() == [length, batch["input_ids"].shape[1]]
    real = batch["input_ids"][0][batch["attention_mask"][0] == 1]
    assert torch.equal(real, processor(short)["input_ids"][0])


def test_other_padding_side_is_refused(processor: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match='padding_side is "middle"'):
        processor(["a"], padding_side="middle")


# On disk


def test_saved_files(processor: Phi3VProcessor, folder: Path, tmp_path: Path) -> None:
    """The tokenizer's files byte for byte but for `auto_map`; the processor's with every field."""
    processor.save_pretrained(tmp_path)
    for name in TOKENIZER_FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if not (folder / name).exists():
            continue
        before, after = (json.loads((place / name).read_text()) for place in (folder, tmp_path))
        before["auto_map"] = {
            key: f"microsoft/Phi-3.5-vision-instruct--{value}" for key, value in before["auto_map"].items()
        }
        if name == "preprocessor_config.json":
            before["num_crops"] = 1  # as overridden when the processor was loaded
        assert after == before, name
        assert "auto_map" in after
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *TOKENIZER_FILES,
        *("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    }


@pytest.mark.parametrize("loader", [Phi3VProcessor, AutoProcessor])
def test_loads_back(processor: Phi3VProcessor, loader, tmp_path: Path, folder: Path) -> None:
    """The same inputs from the same prompts, after one and after two rounds to disk."""
    shutil.copy(folder / "config.json", tmp_path)  # AutoProcessor looks there for the model's kind
    conversation = [{"role": "user", "content": "<|image_1|>\nHow much is it, $1,234.56?"}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    wanted = processor(text, pictures(1))
    current = processor
    for _ in range(2):
        current.save_pretrained(tmp_path)
        current = loader.from_pretrained(tmp_path)
        assert isinstance(current, Phi3VProcessor)
        assert current.apply_chat_template(conversation, add_generation_prompt=True) == text
        found = current(text, pictures(1))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert current.image_processor.num_crops == 1


def test_ids_do_not_depend_on_the_configuration(tmp_path: Path) -> None:
    """A folder with the tokenizer's and the processor's files alone gives the same ids as the whole checkpoint.

    The published tokenizer_config.json names LlamaTokenizer, which would drop the space after `<|user|>` and `<|end|>`.
    """
    published = published_folder(PUBLISHED_NAMES[0])
    for folder in (CHECKPOINT, *([published] if published else [])):
        alone = tmp_path / folder.name
        whole = Phi3VProcessor.from_pretrained(folder, num_crops=1)
        whole.save_pretrained(alone)
        assert not (alone / "config.json").exists()
        ids = [one(prompt(1), pictures(1))["input_ids"] for one in (whole, Phi3VProcessor.from_pretrained(alone))]
        assert torch.equal(*ids)
        space = whole.tokenizer("<|user|>\n").input_ids[2]  # not dropped in either
        assert whole.tokenizer.convert_ids_to_tokens(space) == "▁"


def test_chat_template_in_a_file_of_its_own_is_kept(stand_in: Path, tmp_path: Path) -> None:
    """transformers 5 writes the template of a tokenizer to `chat_template.jinja`."""
    Phi3VImageProcessor().save_pretrained(tmp_path / "first")
    AutoTokenizer.from_pretrained(stand_in, trust_remote_code=False).save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "chat_template.jinja").is_file()
    Phi3VProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    conversation = [{"role": "user", "content": "Hello."}]
    text = Phi3VProcessor.from_pretrained(tmp_path / "second").apply_chat_template(conversation)
    assert text == "<|user|>\nHello.<|end|>\n"


def test_made_of_parts(folder: Path, tmp_path: Path) -> None:
    """A processor that was not loaded as one can be saved all the same."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=1), tokenizer)
    processor.save_pretrained(tmp_path)
    again = Phi3VProcessor.from_pretrained(tmp_path)
    wanted = processor(prompt(1), pictures(1))
    found = again(prompt(1), pictures(1))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_override_of_num_crops(folder: Path) -> None:
    assert Phi3VProcessor.from_pretrained(folder).image_processor.num_crops == 4
    assert Phi3VProcessor.from_pretrained(folder, num_crops=16).image_processor.num_crops == 16


def test_tokenizer_without_the_image_token() -> None:
    class Tokenizer:
        unk_token_id = 0

        def convert_tokens_to_ids(self, token: str) -> int:
            return 0

    with pytest.raises(ValueError, match=r"no <\|image\|> token"):
        Phi3VProcessor(Phi3VImageProcessor(), Tokenizer())


def test_decoding(processor: Phi3VProcessor) -> None:
    ids = processor.tokenizer("What is it?", add_special_tokens=False).input_ids
    for decoded in (processor.decode(ids), *processor.batch_decode([ids])):
        assert decoded.replace(" ", "") == "Whatisit?"


def test_stand_in_has_the_published_template(published_instruct: Path) -> None:
    """What the made-up tokenizer copies from the published one."""
    published = AutoTokenizer.from_pretrained(published_instruct, trust_remote_code=False)
    assert published.chat_template == CHAT_TEMPLATE
    assert published.pad_token_id == END_OF_TEXT_ID
    assert published.convert_tokens_to_ids("<|image|>") == IMAGE_TOKEN_ID
