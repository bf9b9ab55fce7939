"""Generation for evaluation: sharding, batching and order change nothing."""

import argparse
import json

import pytest
import torch
import torch.multiprocessing as multiprocessing

from common.cli import Precision
from common.collation import Example, Turn, encode_example
from common.evaluation import generate_answers, write_evaluation
from common.phi3v import Phi3VProcessor
from tests.launch import free_port
from tests.model_helpers import picture, tiny_model, write_stand_in_checkpoint

COUNT = 5


def make_example(index):
    """Questions of different lengths, some with pictures, so that batches need padding."""
    if index % 2:
        return Example(str(index), [Turn("why " * index + "?")])
    return Example(str(index), [Turn("<|image_1|>\n" + "what " * index + "?", images=[picture(30 + index, 30, index)])])


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
    )
    return generate_answers(model, processor, COUNT, make_example, options, candidates=candidates, max_new_tokens=6)


def one_of_three(rank, folder, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
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
    """Five examples over three processes: two, two and one; every process returns all five."""
    multiprocessing.spawn(one_of_three, (folder, free_port()), nprocs=3)
    for rank in range(3):
        assert json.loads((folder / f"answers_{rank}.json").read_text()) == one_by_one
    assert json.loads((folder / "eval.json").read_text())["rank"] == 0


def test_model_is_left_in_its_mode(folder):
    model = tiny_model().train()
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    precision = Precision("bf16", torch.bfloat16, torch.bfloat16)
    options = argparse.Namespace(
        eval_batch_size_per_gpu=1, num_workers=0, precision=precision, device="cpu", tqdm=False
    )
    assert len(generate_answers(model, processor, 1, make_example, options, max_new_tokens=2)) == 1
    assert model.training


def test_evaluation_file(tmp_path):
    write_evaluation(tmp_path / "deep" / "eval_x.json", {"anls": 0.5}, [{"id": "1", "generated": "ü"}])
    content = json.loads((tmp_path / "deep" / "eval_x.json").read_text(encoding="utf-8"))
    assert content["anls"] == 0.5
    assert content["examples"] == [{"id": "1", "generated": "ü"}]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["eval_x.json"]


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
