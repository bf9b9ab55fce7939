"""Generation for evaluation: sharding, batching and order change nothing."""

import argparse
import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as multiprocessing
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import DynamicCache

from common.cli import Precision
from common.collation import Example, Turn, encode_example, prefix_length
from common.errors import NotWrittenError
from common.evaluation import generate_answers, write_evaluation
from common.files import INCOMPLETE
from common.layers import causal_lm_of
from common.phi3v import Phi3VProcessor
from common.stopping import ToldToStopError
from tests.launch import free_port
from tests.model_helpers import picture, tiny_model, write_stand_in_checkpoint

COUNT = 5


def make_example(index):
    """Questions of different lengths, some with pictures, so that batches need padding."""
    if index % 2:
        return Example(str(index), [Turn("why " * index + "?")])
    return Example(str(index), [Turn("<|image_1|>\n" + "what " * index + "?", images=[picture(30 + index, 30, index)])])


PAGES = [0, 1, 0, 2, 1, 0, 2, 3]  # for every question below its page's number


def ask_page(index):
    """A question about a page that several of them are about, with another text each."""
    page = PAGES[index]
    return Example(str(index), [Turn("<|image_1|>\n" + "why " * (3 * index + 1) + "?", images=[page_picture(page)])])


def page_picture(page):
    return picture(400 + 300 * page, 300, 70 + page)


def answers(folder, batch_size, workers=0):
    return [answer.text for answer in generate(folder, batch_size, workers)]


def generate(folder, batch_size, workers=0, candidates=()):
    model = tiny_model().eval()
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    options = argparse.Namespace(
        eval_batch_size_per_gpu=batch_size,
        num_workers=workers,
        precision=Precision("fp32", torch.float32, None),
        device="cpu",
        tqdm=False,
        report_images=False,
    )
    return generate_answers(model, processor, COUNT, make_example, options, candidates=candidates, max_new_tokens=6)


def one_of_three(rank, folder, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    about_pages, crops = ask_pages(folder, 2, PAGES)
    (folder / f"pages_{rank}.json").write_text(
        json.dumps({"answers": [one.text for one in about_pages], "crops": crops})
    )
    (folder / f"answers_{rank}.json").write_text(json.dumps(answers(folder, batch_size=2)))
    write_evaluation(folder / "eval.json", {"rank": rank}, [])
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stand_in_checkpoint(tmp_path_factory.mktemp("stand_in"))


@pytest.fixture(scope="module")
def one_by_one(folder):
    return answers(folder, batch_size=1)


def test_answers_differ(one_by_one):
    """Else the tests below would pass with the answers in any order."""
    assert len(one_by_one) == COUNT
    assert len(set(one_by_one)) == COUNT


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 0), (3, 1), (8, 0)])
def test_batching_changes_nothing(folder, one_by_one, batch_size, workers):
    assert answers(folder, batch_size, workers) == one_by_one


def test_sharding_changes_nothing(folder, one_by_one):
    """Five examples over three processes: two, two and one; every process returns all five, and those about pages."""
    multiprocessing.spawn(one_of_three, (folder, free_port()), nprocs=3)
    for rank in range(3):
        assert json.loads((folder / f"answers_{rank}.json").read_text()) == one_by_one
    # pages with several questions each come to one of the processes, once
    alone, _ = ask_pages(folder, 1)
    found = [json.loads((folder / f"pages_{rank}.json").read_text()) for rank in range(3)]
    assert all(each["answers"] == [one.text for one in alone] for each in found)
    assert sum(each["crops"] for each in found) == crops_of(folder, [0, 1, 2, 3])
    assert json.loads((folder / "eval.json").read_text())["rank"] == 0


def ask_pages(folder, batch_size, pictures=None, ask=ask_page, model=None, candidates=("Yes", "No"), workers=0):
    """Answers to questions about pages, and how many crops the tower has seen for them."""
    model = model or tiny_model().eval()
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=4)
    precision = Precision("fp32", torch.float32, None)
    options = argparse.Namespace(
        eval_batch_size_per_gpu=batch_size,
        num_workers=workers,
        precision=precision,
        device="cpu",
        tqdm=False,
        report_images=False,
    )
    crops = []
    tower = causal_lm_of(model).model.vision_embed_tokens.img_processor
    hook = tower.register_forward_pre_hook(lambda module, inputs: crops.append(len(inputs[0])))
    generated = generate_answers(
        model, processor, len(PAGES), ask, options, candidates=candidates, max_new_tokens=6, pictures=pictures
    )
    hook.remove()
    return generated, sum(crops)


def crops_of(folder, pages):
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=4)
    return sum(len(processor.image_processor([page_picture(page)])["pixel_values"]) for page in pages)


@pytest.mark.parametrize("batch_size", [8, 3, 2, 1])
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_page_is_computed_once_for_its_questions(folder, batch_size, with_lora):
    """Also where they fill more than a batch, or begin in the middle of one.

    The same tokens as one by one, and the first token's probabilities to 1e-4 relative (float32).
    """
    model = tiny_model()
    if with_lora:
        torch.manual_seed(0)
        adapters = LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"], init_lora_weights=False)
        model = get_peft_model(model, adapters).eval()
    alone, crops = ask_pages(folder, batch_size=1, model=model)
    assert crops == crops_of(folder, PAGES)
    assert len({one.text for one in alone}) > 2
    shared, crops = ask_pages(folder, batch_size, PAGES, model=model)
    assert crops == crops_of(folder, [0, 1, 2, 3])
    assert [one.text for one in shared] == [one.text for one in alone]
    for one, other in zip(shared, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)


def test_a_batchs_cache_is_gone_before_the_next_has_its_own(folder, monkeypatch):
    """When one is made none of an earlier batch is left."""
    alive = weakref.WeakSet()
    most = []

    class Watched(DynamicCache):
        def __init__(self, *arguments, **given):
            gc.collect()
            most.append(len(alive))
            super().__init__(*arguments, **given)
            alive.add(self)

    monkeypatch.setattr("common.prompt_batches.DynamicCache", Watched)
    ask_pages(folder, 1, PAGES)
    assert most == [0] * sum(PAGES.count(page) > 1 and PAGES.count(page) for page in set(PAGES))


def test_prompts_of_about_the_same_length_are_answered_together(folder, one_by_one):
    """Of five prompts in batches of two: the shortest first; the answers stand in the examples' order."""
    model = tiny_model()
    lengths = []
    generate = model.generate
    model.generate = lambda **inputs: (lengths.append(inputs["attention_mask"].sum(-1).tolist()), generate(**inputs))[1]
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    precision = Precision("fp32", torch.float32, None)
    options = argparse.Namespace(
        eval_batch_size_per_gpu=2, num_workers=0, precision=precision, device="cpu", tqdm=False, report_images=False
    )
    generated = generate_answers(model, processor, COUNT, make_example, options, max_new_tokens=6)
    assert [one.text for one in generated] == one_by_one
    fed = [length for batch in lengths for length in batch]
    own = [
        len(encode_example(processor, make_example(index), with_answer=False)["input_ids"]) for index in range(COUNT)
    ]
    assert own != sorted(own)
    assert fed == sorted(own)


def test_a_page_after_other_texts_is_not_shared(folder):
    def ask(index):
        example = ask_page(index)
        turn = example.turns[0]
        return Example(example.id, [Turn(f"{index}{turn.user}", images=turn.images)])

    alone, crops = ask_pages(folder, 1, ask=ask)
    shared, crops_shared = ask_pages(folder, 8, PAGES, ask=ask)
    assert [one.text for one in shared] == [one.text for one in alone]
    assert crops_shared == crops


@pytest.mark.parametrize("batch_size", [8, 2])
def test_pages_whose_rope_factors_change_are_not_shared(folder, batch_size):
    """A question that grows past the threshold, beside one about the same page that does not."""
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=4)
    lengths = [len(encode_example(processor, ask_page(index), with_answer=False)["input_ids"]) for index in (0, 5)]
    assert lengths[1] - lengths[0] > 8
    model = tiny_model(original_max_position_embeddings=lengths[1] + 2)
    alone, _ = ask_pages(folder, 1, model=model)
    shared, crops = ask_pages(folder, batch_size, PAGES, model=model)
    assert [one.text for one in shared] == [one.text for one in alone]
    # Pages 1 and 2 are shared. Questions about 0 and 3, one of which each grows past the threshold, are in batches of
    # their own, and a batch in which an answer does so is begun again: that of page 0's longest beside page 3's.
    once, twice = {8: ([], [0, 0, 0, 3]), 2: ([0, 0], [0, 3])}[batch_size]
    assert crops == crops_of(folder, [1, 2]) + crops_of(folder, once) + 2 * crops_of(folder, twice)


@pytest.mark.parametrize("pages_past_it", [[0, 1, 2, 3], [0, 3]])
def test_pages_past_the_threshold_are_shared(folder, pages_past_it):
    """All that is read of them is rotated by the same factors; pages of both sides are in one batch."""
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=4)
    prefixes, wholes = {}, {}
    for index, page in enumerate(PAGES):
        input_ids = encode_example(processor, ask_page(index), with_answer=False)["input_ids"]
        prefixes[page] = prefix_length(input_ids, processor.image_token_id)
        wholes[page] = max(wholes.get(page, 0), len(input_ids))
    threshold = min(prefixes[page] for page in pages_past_it) - 1
    assert all(wholes[page] + 6 <= threshold for page in set(PAGES) - set(pages_past_it))
    model = tiny_model(original_max_position_embeddings=threshold)
    alone, _ = ask_pages(folder, 1, model=model)
    shared, crops = ask_pages(folder, 8, PAGES, model=model)
    assert crops == crops_of(folder, [0, 1, 2, 3])
    assert [one.text for one in shared] == [one.text for one in alone]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_as_before(folder, workers):
    """The model is left in its mode, and nothing is drawn from what dropout draws from."""
    model = tiny_model().train()
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    precision = Precision("bf16", torch.bfloat16, torch.bfloat16)
    options = argparse.Namespace(
        eval_batch_size_per_gpu=1, num_workers=workers, precision=precision, device="cpu", tqdm=False
    )
    options.report_images = False
    before = torch.get_rng_state()
    assert len(generate_answers(model, processor, 1, make_example, options, max_new_tokens=2)) == 1
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("batch_size", "pictures", "ready"), [(1, None, 8), (2, None, 16), (2, PAGES, 8)])
def test_prompts_are_read_while_others_are_answered(folder, monkeypatch, batch_size, pictures, ready):
    """As many groups as the next eight batches have, of one question each or, of these pages, of two in the mean."""
    asked = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *arguments, **given):
            asked.append(given["prefetch_factor"] * given["num_workers"])
            super().__init__(*arguments, **given)

    monkeypatch.setattr("torch.utils.data.DataLoader", Loader)
    ask_pages(folder, batch_size, pictures, workers=1)
    assert asked == [ready]


def test_told_to_stop_it_begins_no_other_batch(folder, monkeypatch):
    model, stopping, begun = tiny_model().train(), SimpleNamespace(signal=None), []
    stopping.agreed = lambda device: stopping.signal is not None
    generate_batch = model.generate

    def told_to_stop(**inputs):
        begun.append(len(inputs["input_ids"]))
        stopping.signal = "SIGTERM"
        return generate_batch(**inputs)

    monkeypatch.setattr(model, "generate", told_to_stop)
    options = argparse.Namespace(
        eval_batch_size_per_gpu=2, num_workers=0, precision=Precision("fp32", torch.float32, None), device="cpu"
    )
    options.tqdm, options.report_images, options.stopping = False, False, stopping
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    with pytest.raises(ToldToStopError, match=r"^evaluate: given up$"):
        generate_answers(model, processor, COUNT, make_example, options, max_new_tokens=2)
    assert begun == [2]
    assert model.training


def test_pictures_for_the_report(folder, tmp_path):
    """Every answer has its example's pictures, kept once each, also by two workers; text alone has none."""
    model, processor = tiny_model(), Phi3VProcessor.from_pretrained(folder, num_crops=1)
    options = argparse.Namespace(
        eval_batch_size_per_gpu=2, num_workers=2, precision=Precision("fp32", torch.float32, None), device="cpu"
    )
    options.tqdm, options.report_images, options.output_dir = False, True, tmp_path
    found = generate_answers(model, processor, COUNT, make_example, options, max_new_tokens=2)
    assert [len(one.images) for one in found] == [1, 0, 1, 0, 1]
    saved = {file.name for file in (tmp_path / "report_images").iterdir()}
    assert saved == {name for one in found for name in one.images}
    assert len(saved) == 3
    for index in (0, 2, 4):
        with Image.open(tmp_path / "report_images" / found[index].images[0]) as image:
            assert image.size == make_example(index).turns[0].images[0].size
    pages = generate_answers(model, processor, len(PAGES), ask_page, options, max_new_tokens=2, pictures=PAGES)
    assert len({one.images for one in pages}) == len(set(PAGES))
    assert len({(one.images, page) for one, page in zip(pages, PAGES, strict=True)}) == len(set(PAGES))


def test_a_full_disk_costs_the_report_its_pictures_and_no_answer(folder, tmp_path, capsys):
    model, processor = tiny_model(), Phi3VProcessor.from_pretrained(folder, num_crops=1)
    options = argparse.Namespace(
        eval_batch_size_per_gpu=2, num_workers=0, precision=Precision("fp32", torch.float32, None), device="cpu"
    )
    options.tqdm, options.report_images, options.output_dir = False, True, tmp_path
    (tmp_path / "report_images").write_text("no folder can be made here")
    found = generate_answers(model, processor, COUNT, make_example, options, max_new_tokens=2)
    assert [one.images for one in found] == [()] * COUNT
    assert [one.text for one in found] == answers_of(model, processor)
    assert capsys.readouterr().err.count("the report will not show every picture") == 1


def answers_of(model, processor):
    options = argparse.Namespace(
        eval_batch_size_per_gpu=2, num_workers=0, precision=Precision("fp32", torch.float32, None), device="cpu"
    )
    options.tqdm = options.report_images = False
    return [one.text for one in generate_answers(model, processor, COUNT, make_example, options, max_new_tokens=2)]


def test_evaluation_file(tmp_path):
    write_evaluation(tmp_path / "deep" / "eval_x.json", {"anls": 0.5}, [{"id": "1", "generated": "ü"}])
    content = json.loads((tmp_path / "deep" / "eval_x.json").read_text(encoding="utf-8"))
    assert content["anls"] == 0.5
    assert content["examples"] == [{"id": "1", "generated": "ü"}]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["eval_x.json"]


def test_a_full_disk_is_told_to_every_process(tmp_path):
    (tmp_path / f"eval_x.json{INCOMPLETE}").symlink_to("/dev/full")
    with pytest.raises(NotWrittenError, match="No space left on device"):
        write_evaluation(tmp_path / "eval_x.json", {"anls": 0.5}, [])
    assert not (tmp_path / "eval_x.json").exists()


def test_probabilities_of_candidates(folder):
    """Those of the candidates' first tokens where the answer begins, batched or not (float32: 1e-4 relative)."""
    batched = generate(folder, batch_size=3, candidates=("Yes", "No"))
    alone = generate(folder, batch_size=1, candidates=("Yes", "No"))
    model = tiny_model().eval()
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    tokens = [processor.tokenizer(text, add_special_tokens=False).input_ids[0] for text in ("Yes", "No")]
    for index in range(COUNT):
        encoded = encode_example(processor, make_example(index), with_answer=False)
        inputs = {name: value for name, value in encoded.items() if name != "labels"}
        inputs["input_ids"] = inputs["input_ids"][None]
        with torch.no_grad():
            expected = model(**inputs).logits[0, -1].softmax(-1)[tokens].tolist()
        assert batched[index].probabilities == pytest.approx(expected, rel=1e-4)
        assert alone[index].probabilities == pytest.approx(expected, rel=1e-4)
        assert batched[index].text == alone[index].text
