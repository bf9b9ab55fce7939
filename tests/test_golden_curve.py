"""Golden loss curves: a fixed run of the DocVQA script gives the losses it gave when this was written.

A tiny model with the golden rule's weights and a stand-in tokenizer; one process, six steps of four
examples, two epochs, so that shuffles, drawn answers and the short last batch are in it. Written on an
x86-64 CPU with the versions in constraints.txt. Tolerance 1e-5 relative: float32 sums in another order.
"""

import datasets
import pytest

from tests.launch import read_log, run_script
from tests.model_helpers import picture, tiny_model, write_stand_in_checkpoint

GOLDEN = {
    "full": [
        10.745169,
        11.220579,
        10.189934,
        10.239112,
        9.469412,
        9.698975,
    ],
    "lora": [
        10.745168,
        11.220579,
        10.82802,
        10.69766,
        10.400855,
        10.342554,
    ],
}
METHODS = {"full": (), "lora": ("--use_lora", "--lora_rank", 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_stand_in_checkpoint(tmp_path_factory.mktemp("golden_curve"))
    tiny_model().save_pretrained(folder)
    rows = [
        {
            "id": str(k),
            "image": picture(60 + 9 * k, 70, k),
            "query": {"en": f"What is number {k}?"},
            "answers": [f"{37 * k}", f"number {k}"],
        }
        for k in range(10)
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "query": {"en": datasets.Value("string")},
            "answers": datasets.List(datasets.Value("string")),
        }
    )
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table.select(range(1)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_golden_curve(folder, tmp_path, method):
    options = (
        "--model_name_or_path",
        folder,
        "--data_dir",
        folder / "data",
        "--output_dir",
        tmp_path,
        "--num_crops",
        1,
    )
    options += ("--batch_size", 4, "--num_train_epochs", 2, "--learning_rate", "1e-3", "--warmup_steps", 2, "--seed", 5)
    options += ("--logging_steps", 1, "--num_workers", 1, "--no-tqdm", *METHODS[method])
    ended = run_script("finetune_hf_trainer_docvqa.py", *options, processes=0)
    assert ended.returncode == 0, ended.stdout[-3000:]
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert losses == pytest.approx(GOLDEN[method], rel=1e-5)
