"""What is checked before weights are loaded: each check on good data and on what it is there for."""

import contextlib
import functools
import importlib.metadata
import io
import itertools
import json
import re
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from PIL import Image
from transformers import set_seed

from common import data, errors, memory, preflight, training
from common.checkpoints import STAGES, check_same_run
from common.cli import BAD_EXAMPLES, LOCK, RUN_RECORD, make_parser, parse_options
from common.collation import Example, Turn
from common.data import ExampleDataset, decode_image
from common.demo import CHECKPOINT, write_docvqa
from common.errors import MOST_PROBLEMS, OptionsError, UserError
from common.facts import RUN_FACTS
from common.loading import load_model, load_processor, prepare_for_training
from common.phi3v import Phi3VConfig
from common.report import PICTURES
from common.training import write_model
from tests.launch import REPOSITORY, free_port, run_script
from tests.model_helpers import write_stand_in_checkpoint

METHODS = {
    "full": (),
    "frozen": ("--freeze_vision_model",),
    "lora": ("--use_lora", "--lora_rank", "4"),
    "qlora": ("--use_qlora", "--lora_rank", "4", "--bf16"),
}
DISK = namedtuple("usage", "total used free")
ROOM = 10**12
UNSEEN = 1  # of 200 examples one that is not in the sample


def options_of(folder, *words):
    """The options of a script, as `start` leaves them."""
    before = sys.argv
    sys.argv = ["script", "--model_name_or_path", str(CHECKPOINT), "--output_dir", str(folder), *map(str, words)]
    try:
        options = parse_options(make_parser("a script", num_crops=1))
    finally:
        sys.argv = before
    options.device, options.resume_from = torch.device(options.device), None
    return options


@functools.cache
def processor_of_demo():
    return load_processor(SimpleNamespace(model_name_or_path=str(CHECKPOINT), revision=None, num_crops=1))


@functools.cache
def encoded_picture(broken=False):
    content = io.BytesIO()
    Image.effect_noise((64, 48), 50).save(content, "PNG")
    return content.getvalue()[: 1000 if broken else None]  # a header that can be read, and not all of the pixels


def make_example(index, generator, broken=(), long=(), no_header=()):
    place = f"pages, row {index}"
    if index in no_header:
        decode_image({"bytes": b"no picture", "path": None}, place)
    image = decode_image({"bytes": encoded_picture(index in broken), "path": None}, place)
    question = "which? " * (100_000 if index in long else 1)
    return Example(place, [Turn(f"<|image_1|>\n{question}", "this", [image])])


def dataset_of(size=10, kind=ExampleDataset, **faults):
    return kind(size, functools.partial(make_example, **faults), processor_of_demo())


def problem_of(dataset, options):
    with pytest.raises(UserError) as raised:
        preflight.preflight(dataset, processor_of_demo(), options)
    return str(raised.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_will_do_is_let_through(method, tmp_path, capsys):
    """In one line; nothing is left in the folder, and what is drawn afterwards is what the seed alone says."""
    options = options_of(tmp_path, *METHODS[method], "--seed", 5)
    preflight.preflight(dataset_of(), processor_of_demo(), options)
    drawn = torch.rand(1)
    set_seed(5)
    assert drawn == torch.rand(1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("checked: libraries; 10 of 10 examples (10 decoded), of up to ")
    assert " to be written (" in lines[0]
    model = prepare_for_training(load_model(options.model_name_or_path, options), processor_of_demo(), options)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert f"; {trained / 1e6:.3g} M parameters train beside " in lines[0]
    assert lines[0].endswith("a trial save and reload")
    assert list(tmp_path.iterdir()) == []


def test_all_problems_come_in_one_list(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK(ROOM, ROOM, 1000))
    monkeypatch.setattr(preflight, "write_model", write_nothing)
    versions = {"torch": "2.10.1", "deepspeed": "0.19.7"}
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or installed(name))
    told = problem_of(dataset_of(broken=[3]), options_of(tmp_path)).splitlines()
    assert told[0] == "6 problems:"
    for beginning in (
        "torch 2.10.1 is installed, torch>=2.11 is needed",
        "deepspeed 0.19.7 is installed, deepspeed>=0.19.8 is needed",
        "pages, row 3: the image (1000 bytes) cannot be decoded",
        "4 loader workers hand over at least 0.01 GB at once",
        f"--output_dir {tmp_path}: the run writes",
        f"a trial save and reload of a shrunk model in {tmp_path} failed: OSError: no room",
    ):
        assert sum(line.startswith(f"  - {beginning}") for line in told) == 1, told


@pytest.mark.parametrize("others", [(), ("checkpoint-1",)])
def test_a_run_that_has_not_begun_leaves_no_record(others, tmp_path):
    """Else other options, which the problem may ask for, would be refused as those of another run."""
    options = options_of(tmp_path)
    for name in ("run.json", "run_facts.json", "notes.txt", *others):
        (tmp_path / name).touch()
    problem_of(dataset_of(broken=[3]), options)
    assert (tmp_path / "run.json").exists() == (tmp_path / "run_facts.json").exists() == bool(others)
    assert (tmp_path / "notes.txt").exists()


def test_what_a_run_without_a_result_is_forgotten_by(tmp_path):
    """Its records, and pictures kept for a report; nothing where there is a result, or where one only evaluates."""
    options = options_of(tmp_path)
    (tmp_path / "report_images").mkdir()

    def left(*names):
        for name in ("run.json", "run_facts.json", "report_images/1.jpg", *names):
            (tmp_path / name).touch()
        training.forget_unbegun(options)
        return (tmp_path / "run.json").exists(), (tmp_path / "report_images").exists()

    assert left() == (False, False)
    (tmp_path / "report_images").mkdir()
    options.eval_only = True
    assert left() == (True, True)
    options.eval_only = False
    assert left("eval_before.json") == (True, True)


def test_a_dry_run_that_failed_leaves_nothing(tmp_path):
    """Else the next one, with the options that its error asks for, would be refused; also where it was killed."""
    for in_use in (False, True):
        folder = tmp_path / str(in_use)
        options = options_of(folder, "--dry_run")
        options.output_dir = folder / "dry_run.incomplete"
        options.output_dir.mkdir(parents=True)
        if in_use:
            (folder / "notes.txt").touch()
        (options.output_dir / "run.json").touch()
        (options.output_dir / "eval_before.json").touch()
        training.forget_unbegun(options)
        assert not options.output_dir.exists()
        assert folder.exists() == in_use
    options.output_dir.mkdir()
    for name in ("run.json", "eval_before.json", "checkpoint-1"):
        (options.output_dir / name).touch()
    training._prepare_output_folder(options)
    assert [path.name for path in options.output_dir.iterdir()] == [LOCK]


def test_packs_are_measured_before_weights_are_loaded(tmp_path, monkeypatch, capsys):
    """All examples, for `make_batches`; what would not fit, or cannot be made, is told before the first evaluation."""
    options = options_of(tmp_path, "--max_tokens_per_gpu", 4000, "--batch_size", 4)
    dataset = dataset_of()
    preflight.preflight(dataset, processor_of_demo(), options)
    assert "count tokens: 10 of 10 examples" in capsys.readouterr().err
    questions = dataset.measured
    assert len(questions) == len(dataset)
    monkeypatch.setattr(training, "measure_questions", None)  # not measured again
    config = Phi3VConfig.from_pretrained(CHECKPOINT)
    arguments = SimpleNamespace(process_index=0, world_size=1, deepspeed_plugin=None)
    batches = training.make_batches(dataset, processor_of_demo(), arguments, options, config)
    assert batches.questions is questions
    assert dataset.measured is None
    monkeypatch.undo()
    for words, faults, message in (
        ((300,), {}, r"--max_tokens_per_gpu 300: example 0 alone has about \d+ tokens"),
        ((4000,), {"no_header": [UNSEEN]}, f"pages, row {UNSEEN}: "),
    ):
        options = options_of(tmp_path, "--max_tokens_per_gpu", *words)
        with pytest.raises(UserError, match=message):
            preflight.preflight(dataset_of(200, **faults), processor_of_demo(), options)
    options = options_of(tmp_path, "--max_tokens_per_gpu", 4000, "--bad_examples", "skip")
    dataset = dataset_of(200, no_header=[UNSEEN])
    preflight.preflight(dataset, processor_of_demo(), options)
    assert [problem.index for problem in dataset.measured.problems] == [UNSEEN]


def test_too_many_bad_examples_of_packed_runs_are_noted(tmp_path):
    """All of them, in the file that a run leaves; mended, or with a higher fraction, the same command goes on."""
    words, broken = ("--max_tokens_per_gpu", 4000, "--bad_examples", "skip"), range(100, 130)
    options, with_more = (options_of(tmp_path, *words, "--max_bad_fraction", most) for most in (0.01, 0.15))
    with pytest.raises(UserError, match=r"^30 of 200 examples are bad, more than --max_bad_fraction 0.01 allows"):
        preflight.preflight(dataset_of(200, no_header=broken), processor_of_demo(), options)
    lines = [json.loads(line) for line in (tmp_path / BAD_EXAMPLES).read_text().splitlines()]
    (tmp_path / RUN_RECORD).touch()
    training.forget_unbegun(options)  # other options may be tried, and the list read
    assert [path.name for path in tmp_path.iterdir()] == [BAD_EXAMPLES]
    assert options_of(tmp_path, *words, "--num_crops", 2, "--resume", "never").num_crops == 2
    assert [line["index"] for line in lines] == list(broken)
    preflight.preflight(dataset_of(200, no_header=broken), processor_of_demo(), with_more)
    preflight.preflight(dataset_of(200, no_header=broken[:2]), processor_of_demo(), options)
    assert len((tmp_path / BAD_EXAMPLES).read_text().splitlines()) == 2


def test_a_new_run_does_not_count_the_bad_examples_of_a_refused_one(tmp_path):
    for name, goes_on in (("refused", False), ("interrupted", True)):
        folder = tmp_path / name
        options = options_of(folder, "--bad_examples", "skip")
        folder.mkdir()
        (folder / BAD_EXAMPLES).touch()
        if goes_on:
            (folder / RUN_RECORD).touch()
            (folder / "eval_before.json").touch()
        training._prepare_output_folder(options)
        assert (folder / BAD_EXAMPLES).exists() == (folder / RUN_RECORD).exists() == goes_on, name


@pytest.mark.parametrize(("most", "is_told"), [(1, True), (2, False)])
def test_answers_that_evaluation_would_cut_are_told(tmp_path, capsys, most, is_told):
    """Of a conversation the last answer's text counts, of two tokens here; not what ends it, nor earlier ones."""
    tokenizer = processor_of_demo().tokenizer
    assert len(tokenizer("red red", add_special_tokens=False).input_ids) == 2

    def make_example(index, generator):
        return Example(f"row {index}", [Turn("What?", "red red red red"), Turn("And then?", "red red")])

    options = options_of(tmp_path, "--max_new_tokens", most)
    preflight.preflight(ExampleDataset(4, make_example, processor_of_demo()), processor_of_demo(), options)
    told = f"answers are of up to 2 tokens, and evaluation cuts its own at --max_new_tokens {most}\n"
    assert (told in capsys.readouterr().out) == is_told


def test_a_run_of_before_there_was_an_option_goes_on(tmp_path):
    check_same_run(tmp_path, {"seed": 0})
    check_same_run(tmp_path, {"seed": 0, "max_new_tokens": 64})
    with pytest.raises(UserError, match="max_new_tokens 64 there, 65 here"):
        check_same_run(tmp_path, {"seed": 0, "max_new_tokens": 65})


def test_of_a_run_that_was_killed_before_it_had_begun_nothing_counts(tmp_path):
    """As by torchrun, when another process failed: what its error advises would be refused as another run's options."""
    options = options_of(tmp_path)
    (tmp_path / PICTURES).mkdir()
    for name in (RUN_RECORD, RUN_FACTS, f"{PICTURES}/0.jpg"):
        (tmp_path / name).touch()
    training._prepare_output_folder(options)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    check_same_run(tmp_path, {"num_crops": 8})
    assert json.loads((tmp_path / RUN_RECORD).read_text()) == {"num_crops": 8}


def test_examples_that_do_not_fit_are_told_before_any_is_noted_as_bad(tmp_path):
    options = options_of(tmp_path, "--max_tokens_per_gpu", 300, "--bad_examples", "skip")
    with pytest.raises(UserError, match=r"^--max_tokens_per_gpu 300: example 0 alone has about [0-9]+ tokens"):
        preflight.preflight(dataset_of(200, no_header=[UNSEEN]), processor_of_demo(), options)
    assert list(tmp_path.iterdir()) == []


def sampled_of(size):
    """Of so many examples those that are in the sample."""
    return {round(number * (size - 1) / (preflight.SAMPLE - 1)) for number in range(preflight.SAMPLE)}


@pytest.mark.parametrize("packing", [(), ("--max_tokens_per_gpu", 4000)], ids=["unpacked", "packed"])
def test_every_picture_is_decoded_before_weights_are_loaded(packing, tmp_path, capsys):
    """Damage beyond the sample, which headers do not show, is told at once; unless it is to be left out, or resumed."""
    damaged = {"broken": [UNSEEN, 150]}
    interrupted_run = tmp_path / "earlier" / "checkpoint-5"
    interrupted_run.mkdir(parents=True)
    (interrupted_run / "manifest.json").write_text(json.dumps({"step": 5}))

    def look(*words, resume_from=None, **faults):
        options = options_of(tmp_path, *packing, "--num_workers", 2, *words)
        options.resume_from = resume_from
        capsys.readouterr()
        preflight.preflight(dataset_of(200, **faults), processor_of_demo(), options)
        return capsys.readouterr()

    with pytest.raises(UserError) as raised:
        look(**damaged)
    lines = str(raised.value).splitlines()
    assert lines[0] == "2 problems:"
    assert [line.split(":")[0] for line in lines[1:]] == [f"  - pages, row {row}" for row in damaged["broken"]]
    assert raised.value.everywhere
    unseen = sorted(set(range(200)) - sampled_of(200))
    with pytest.raises(UserError, match=f"and {len(unseen) - MOST_PROBLEMS} more examples"):
        look(broken=unseen)
    with pytest.raises(UserError, match=rf"^pages, row {UNSEEN}: [0-9]+ tokens, the model takes 131072: "):
        look(long=[UNSEEN])
    told = look()
    assert told.out.splitlines()[1:] == ["checked: the pictures and the lengths of 200 examples"]
    assert "check pictures: 200 of 200 examples" in told.err
    for words, interrupted, measures in (
        (("--no-check_images",), None, True),
        (("--bad_examples", "skip"), None, packing),
        ((), interrupted_run, packing),
    ):
        told = look(*words, resume_from=interrupted, **damaged).out
        assert told.splitlines()[1:] == (["checked: the lengths of 200 examples"] if measures else []), words
    with pytest.raises(UserError, match=rf"^pages, row {UNSEEN}: [0-9]+ tokens, the model takes 131072: "):
        look("--no-check_images", long=[UNSEEN])
    options = options_of(tmp_path, *packing)
    (tmp_path / STAGES).write_text(json.dumps({training.SAVED: {}}))  # a run that has only to be evaluated
    preflight.preflight(dataset_of(200, **damaged), processor_of_demo(), options)


def test_pictures_of_the_sample_are_not_decoded_again(tmp_path, capsys):
    preflight.preflight(dataset_of(preflight.SAMPLE), processor_of_demo(), options_of(tmp_path))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_picture_of_several_questions_is_decoded_once(monkeypatch):
    """As long as it was seen lately."""
    decoded = []
    open_pixels = data.open_pixels
    monkeypatch.setattr(
        data, "open_pixels", lambda content, path: decoded.append(content) or open_pixels(content, path)
    )
    pictures = [encoded_picture(), encoded_picture() + b"of another one", encoded_picture(), encoded_picture()]
    opener = data.WholeOnce()
    assert [opener(picture, None).size for picture in pictures] == [(64, 48)] * 4
    assert decoded == pictures[:2]
    for _ in range(2):  # damage is seen every time
        with pytest.raises(OSError, match="truncated"):
            opener(encoded_picture(broken=True), None)
    monkeypatch.setattr(data, "SEEN_LATELY", 1)
    decoded.clear()
    opener = data.WholeOnce()
    for picture in pictures:
        opener(picture, None)
    assert decoded == pictures[:3]


@pytest.mark.parametrize("packing", [(), ("--max_tokens_per_gpu", 4000)], ids=["unpacked", "packed"])
def test_of_a_short_run_the_pictures_drawn_are_decoded(packing, tmp_path):
    """Of a dry run all; where rows are packed all are looked at anyway, to be measured."""
    size, words = 200, ("--batch_size", 16, "--max_steps", 3, "--seed", 3)
    options = options_of(tmp_path, *words)
    batches = training.GlobalBatchSampler(size, 16, 4, 0, 1, 3)
    drawn = sorted(key.index for keys in itertools.islice(batches, 3 * 16 // 4) for key in keys)
    assert list(training.examples_drawn(size, options)) == drawn
    seen, missed = (min(set(those) - sampled_of(size)) for those in (drawn, set(range(size)) - set(drawn)))
    for wrong, extra, found in ((seen, (), True), (missed, (), bool(packing)), (missed, ("--dry_run",), True)):
        options = options_of(tmp_path, *words, *packing, *extra)
        with pytest.raises(UserError, match=f"^pages, row {wrong}: ") if found else contextlib.nullcontext():
            preflight.preflight(dataset_of(size, broken=[wrong]), processor_of_demo(), options)


def test_what_a_short_run_draws_in_several_epochs(tmp_path):
    """Each example in the epochs in which it is drawn, and in no other."""
    for steps in (1, 2, 3, 4, 9):
        options = options_of(tmp_path, "--batch_size", 4, "--max_steps", steps, "--seed", 1)
        batches, drawn, step = training.GlobalBatchSampler(10, 4, 2, 0, 1, 1), set(), 0
        for epoch in range(4):
            batches.set_epoch(epoch)
            keys = list(batches)
            for start in range(0, len(keys), 2):
                of_step = keys[start] + keys[start + 1] if step < steps else []
                drawn |= {(key.index, key.epoch) for key in of_step}
                step += 1
        found = training.examples_drawn(10, options)
        assert [(index, epoch) for index, epochs in found.items() for epoch in epochs] == sorted(drawn), steps
    options = options_of(tmp_path, "--num_train_epochs", 3)
    assert training.examples_drawn(10, options) == dict.fromkeys(range(10), range(3))


@pytest.mark.parametrize("packing", [(), ("--max_tokens_per_gpu", 4000)], ids=["unpacked", "packed"])
def test_what_is_drawn_in_later_epochs_is_looked_at(packing, tmp_path):
    """Also of a data set that is in the sample as a whole; and not what other epochs would draw."""

    def make_by_chance(index, generator):
        words = 200_000 if index == 3 and generator.random() < 0.5 else 1
        return Example(f"row {index}", [Turn("word " * words, "yes")])

    dataset = ExampleDataset(8, make_by_chance, processor_of_demo())
    long_in = [epoch for epoch in range(9) if len(dataset.example(3, epoch).turns[0].user) > 9]
    assert long_in
    assert long_in[0] > 0
    for epochs, found in ((long_in[0], False), (long_in[0] + 1, True)):
        options = options_of(tmp_path, *packing, "--num_train_epochs", epochs)
        with pytest.raises(UserError, match=r"^row 3: [0-9]+ tokens") if found else contextlib.nullcontext():
            preflight.preflight(dataset, processor_of_demo(), options)


def write_nothing(*arguments):
    raise OSError("no room")


# --- libraries


def test_libraries_that_are_not_used_are_not_asked_for(tmp_path, monkeypatch):
    def version(name):
        if name in ("peft", "bitsandbytes", "flash-attn", "liger-kernel"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "99"

    monkeypatch.setattr(importlib.metadata, "version", version)
    options = options_of(tmp_path)
    assert preflight.version_problems(options) == []
    options = options_of(tmp_path, "--use_qlora", "--bf16")
    options.attention, options.use_liger = "flash_attention_2", True
    assert sorted(preflight.version_problems(options)) == [
        "bitsandbytes is not installed: pip install -r requirements.txt",
        "flash-attn is not installed: pip install -r requirements-flash-attn.txt",
        "liger-kernel is not installed: pip install -r requirements-liger.txt",
        "peft is not installed: pip install -r requirements.txt",
    ]


def test_a_library_is_as_new_as_the_requirements_say(tmp_path, monkeypatch):
    """Also a build of a version ("+cpu") and what comes before one ("rc1") count as PEP 440 orders them."""
    bounds = dict(line.split(">=") for line in (REPOSITORY / "requirements.txt").read_text().split() if ">=" in line)
    options = options_of(tmp_path, "--optim", "paged_adamw_8bit")
    for suffix, fine in (("", True), ("+cpu", True), ("rc1", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, suffix=suffix: bounds[name] + suffix)
        problems = preflight.version_problems(options)
        assert len(problems) == (0 if fine else 6), problems  # torch, transformers, accelerate, datasets, and two more


# --- examples


def test_the_sample_is_spread_over_the_data_set():
    seen = []

    def make_and_note(index, generator):
        seen.append(index)
        return make_example(index, generator)

    dataset = ExampleDataset(1000, make_and_note, processor_of_demo())
    look = preflight.look_at_examples(dataset, processor_of_demo(), 131072)
    places = sorted(set(seen))
    assert len(places) == look.examples == preflight.SAMPLE
    assert (places[0], places[-1]) == (0, 999)
    assert max(after - before for before, after in itertools.pairwise(places)) <= 16


def test_counted_tokens_are_those_of_the_encoded_example():
    """The example of the most tokens, and its labels, though it is not the one that is encoded as for training."""

    def growing(index, generator):
        return Example(
            str(index), [Turn("<|image_1|>" + "word " * index, "yes " * index + "yes", [Image.new("L", (9, 9))])]
        )

    dataset = ExampleDataset(6, growing, processor_of_demo())
    look = preflight.look_at_examples(dataset, processor_of_demo(), 131072)
    longest = dataset[5]
    assert look.tokens == len(longest["input_ids"])
    assert look.labelled == int((longest["labels"] != -100).sum())
    assert look.views == len(longest["pixel_values"])


def test_an_example_longer_than_the_model_takes_is_named(tmp_path):
    told = problem_of(dataset_of(5, long=[4]), options_of(tmp_path))
    assert told.startswith("pages, row 4: ")
    assert " tokens, the model takes 131072: lower --num_crops" in told


class Unlabelled(ExampleDataset):
    """As an edited copy may be."""

    def __getitem__(self, key):
        encoded = super().__getitem__(key)  # of one key, by way of a list of it
        if not isinstance(key, list):
            return encoded
        return [{**one, "labels": torch.full_like(one["labels"], -100)} for one in encoded]


def test_an_example_without_labels_is_named(tmp_path):
    told = problem_of(dataset_of(kind=Unlabelled), options_of(tmp_path))
    assert told.startswith("pages, row 0: no token of ")
    assert "is labelled" in told


def test_what_the_script_cannot_make_is_told_with_its_number(tmp_path):
    dataset = ExampleDataset(3, lambda index, generator: {}["image"], processor_of_demo())
    assert "  - example 2 cannot be made of its row: KeyError: 'image'" in problem_of(dataset, options_of(tmp_path))
    dataset = ExampleDataset(3, lambda index, generator: Example("a page", []), processor_of_demo())
    assert "  - example 2 cannot be encoded: " in problem_of(dataset, options_of(tmp_path))


def test_bad_examples_that_are_skipped_are_counted(tmp_path, capsys):
    options = options_of(tmp_path)
    assert problem_of(dataset_of(broken=[3, 7]), options).startswith("2 problems:\n  - pages, row 3: the image")
    options = options_of(tmp_path, "--bad_examples", "skip")
    preflight.preflight(dataset_of(broken=[3, 7]), processor_of_demo(), options)
    assert "; 2 of them bad; " in capsys.readouterr().out


def test_of_many_bad_examples_some_are_told(tmp_path):
    told = problem_of(dataset_of(60, broken=range(60)), options_of(tmp_path))
    assert told.count("cannot be decoded") == MOST_PROBLEMS
    assert told.endswith("  - and 40 more examples")


def test_when_time_is_up_headers_are_read(tmp_path, monkeypatch, capsys):
    """But the first example is encoded in any case, as it is for training."""
    monkeypatch.setattr(preflight, "SECONDS", -1)
    preflight.preflight(dataset_of(broken=[3]), processor_of_demo(), options_of(tmp_path, "--no-check_images"))
    assert "10 of 10 examples (0 decoded)" in capsys.readouterr().out
    assert problem_of(dataset_of(broken=[0]), options_of(tmp_path)).startswith("pages, row 0: the image")
    # those that there was no time for are decoded when all are
    assert problem_of(dataset_of(broken=[3]), options_of(tmp_path)).startswith("pages, row 3: the image")


# --- memory

OFFICIAL = Phi3VConfig()
SHALLOW = Phi3VConfig(num_hidden_layers=2)  # quicker where adapters are counted
PAGE = preflight.Look([], 1, 1, 2443, 10, 17)


def gpu_problems(monkeypatch, options, free, config=SHALLOW, look=PAGE):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    facts = []
    return preflight.memory_problems(options, config, look, facts), facts


@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_without_room_is_told_with_both_numbers(method, tmp_path, monkeypatch, capsys):
    options = options_of(tmp_path, *METHODS[method], "--bf16", "--num_crops", 16)
    sizes = {"tokens": PAGE.tokens, "answer_tokens": PAGE.labelled, "num_crops": 16}
    peak = 1e9 * memory.estimated_peak(options, SHALLOW, 1, **sizes)
    problems, facts = gpu_problems(monkeypatch, options, 2 * peak)
    assert problems == []
    assert capsys.readouterr().out == ""
    assert facts == [f"about {peak / 1e9:,.2f} GB of GPU memory ({2 * peak / 1e9:,.2f} GB free)"]
    problems, _ = gpu_problems(monkeypatch, options, peak)  # that nothing be lost to fragmentation is too much to hope
    assert problems == []
    assert f"a training step may take {1.05 * peak / 1e9:,.2f} GB of GPU memory" in capsys.readouterr().out
    problems, _ = gpu_problems(monkeypatch, options, peak / 2)
    assert len(problems) == 1
    assert "a training step takes at least " in problems[0]
    assert f"and {peak / 2e9:,.2f} of 80.00 GB are free: end what else runs" in problems[0]
    assert ("--use_lora instead of" in problems[0]) == (options.method in ("full", "frozen"))
    assert "--num_crops 8 instead of 16" in problems[0]
    assert problems[0].endswith("(python -m tools.plan proposes what fits)")
    lora = options_of(tmp_path, "--use_lora")
    lora.device = torch.device("cuda")
    problems, _ = gpu_problems(monkeypatch, lora, 1e6)
    assert "--bf16 (Ampere or newer), with which the weights beside the adapters are not kept in float32" in problems[0]
    for said in ("--use_lora instead", "--batch_size_per_gpu", "--gradient_checkpointing"):  # as they are already
        assert said not in problems[0]


def test_memory_is_of_the_longest_example_seen_and_of_a_full_pack(tmp_path, monkeypatch):
    def peak(look, *words):
        options = options_of(tmp_path, "--use_lora", "--bf16", *words)
        return float(gpu_problems(monkeypatch, options, ROOM, SHALLOW, look)[1][0].split()[1])

    one, two, packed = peak(PAGE), peak(PAGE, "--batch_size_per_gpu", 2), peak(PAGE, "--max_tokens_per_gpu", 4886)
    assert one < two
    assert packed == two  # of as many tokens
    of_a_step = ("--batch_size", 1, "--max_tokens_per_gpu")  # of which two processes may get up to two examples
    assert peak(PAGE, *of_a_step, 100_000) == peak(PAGE, *of_a_step, 2 * PAGE.tokens)
    assert peak(preflight.Look([], 1, 1, 300, 10, 0)) < one
    kept = ("--gradient_checkpointing", "none")
    assert peak(PAGE, *kept, "--torch_compile") < 0.9 * peak(PAGE, *kept)


def test_a_packed_row_is_of_what_goes_through_at_once(tmp_path):
    """Pictures that are shared without a number of tokens: as many as examples would be."""
    sizes = {"tokens": 3000, "answer_tokens": 10}
    options = options_of(tmp_path, "--batch_size_per_gpu", 2)
    assert not memory.setting_of(options, 1, **sizes).packs
    options.packs = True
    setting = memory.setting_of(options, 1, **sizes)
    assert (setting.packs, setting.in_a_pass(3000), setting.in_a_pass(10)) == (True, 6000, 20)
    options = options_of(tmp_path, "--max_tokens_per_gpu", 9000)
    assert memory.setting_of(options, 1, **sizes).in_a_pass(10) == 30


def test_gradients_of_one_pack_are_not_accumulated(tmp_path):
    """Full fine-tuning of one process: two examples of 3,000 tokens go through at once, or one after the other."""
    sizes = {"tokens": 3000, "answer_tokens": 10}

    def parts(row):
        options = options_of(tmp_path, "--batch_size", 2, "--max_tokens_per_gpu", row)
        return {part.name for part in memory.estimate(SHALLOW, memory.setting_of(options, 1, **sizes))}

    assert parts(3000) - parts(6000) == {"gradients, accumulated"}


def test_shared_memory_without_room_is_told_with_both_numbers(tmp_path, monkeypatch):
    """A page of 17 views for each of eight loader workers: 184 MB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK(64_000_000, 0, free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    options, free = options_of(tmp_path, "--num_workers", 4), 184_000_000
    (problem,) = preflight.shared_memory_problems(options, PAGE)
    assert problem.startswith(
        "8 loader workers hand over at least 0.18 GB at once, and /dev/shm has 0.06 GB, of which 0.18 GB are free: "
    )
    free += 1_000_000
    assert preflight.shared_memory_problems(options, PAGE) == []
    free = 0
    assert preflight.shared_memory_problems(options_of(tmp_path, "--num_workers", 0), PAGE) == []
    assert preflight.shared_memory_problems(options, preflight.Look([], 1, 1, 300, 10, 0)) == []  # no picture


def test_the_longest_example_is_what_is_told_where_memory_runs_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "_longest", {})
    preflight.preflight(dataset_of(), processor_of_demo(), options_of(tmp_path))
    assert f"of up to {errors._longest['tokens']} tokens" in capsys.readouterr().out
    assert errors._longest["views"] == 2  # of one sub-image and the whole
    assert 0 < errors._longest["answer_tokens"] < errors._longest["tokens"]


def test_evaluation_alone_needs_the_weights(tmp_path, monkeypatch):
    options = options_of(tmp_path, "--eval_only", "--bf16")
    assert gpu_problems(monkeypatch, options, 8.5e9, OFFICIAL, preflight.Look([]))[0] == []
    problems, _ = gpu_problems(monkeypatch, options, 8e9, OFFICIAL, preflight.Look([]))
    assert problems[0].startswith("evaluation, for the weights alone, takes at least 8.29 GB of GPU memory, and 8.00")


def test_a_full_gpu_stops_the_run(tmp_path, monkeypatch):
    options = options_of(tmp_path, "--eval_only")
    preflight.preflight(None, processor_of_demo(), options)
    options.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, int(80e9)))
    assert "evaluation, for the weights alone, takes at least 0.00 GB of GPU memory" in problem_of(None, options)


def test_of_zero_3_memory_is_not_estimated(tmp_path, monkeypatch):
    options = options_of(tmp_path, "--deepspeed", "ds_configs/zero3.json")
    assert gpu_problems(monkeypatch, options, 0) == ([], [])


# --- disk


def disk_of(monkeypatch, free, options, config=OFFICIAL):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK(ROOM, ROOM, int(free)))
    return preflight.disk_problems(options, config, 1600, [])


def test_a_disk_without_room_is_told_with_both_numbers(tmp_path, monkeypatch):
    """Weights of 2 bytes in the model and twice in a checkpoint, beside masters and AdamW's state of 12."""
    options = options_of(tmp_path, "--bf16", "--save_steps", 10, "--save_total_limit", 2)  # of 100 steps
    weights, checkpoint = 8.293, 8.293 + 8.293 + 6 * 8.293 * 0.997
    needed = 8.293 + 3 * checkpoint
    assert disk_of(monkeypatch, 1.005e9 * needed, options) == []
    problem = disk_of(monkeypatch, 0.99e9 * needed, options)[0]
    words = problem.split()
    assert float(words[words.index("writes") + 1]) == pytest.approx(needed, rel=0.005)
    assert f"(the model {weights:.2f} GB, 3 checkpoints at a time of " in problem
    assert "lower --save_total_limit" in problem


def test_checkpoints_that_will_not_be_written_need_no_room(tmp_path, monkeypatch):
    for words, number in (
        (("--save_steps", 101), 0),
        (("--save_steps", 60), 1),
        (("--save_steps", 60, "--num_train_epochs", 2), 3),
        (("--save_steps", 60, "--max_steps", 59), 0),
        (("--save_steps", 60, "--dry_run"), 1),  # as the run that is tried out would
        (("--save_steps", 10, "--save_total_limit", 1), 2),
    ):
        (told,) = disk_of(monkeypatch, 0, options_of(tmp_path, *words))
        assert re.findall(r", (\d+) checkpoints at a time", told) == ([str(number)] if number else []), words
        assert ("lower --save_total_limit" in told) == (number > 0)  # which would not help where there are none


def test_what_an_interrupted_run_has_left_counts_as_room(tmp_path, monkeypatch):
    options = options_of(tmp_path, "--use_lora", "--lora_rank", 1)
    model, checkpoint = memory.sizes_on_disk(options, SHALLOW)
    needed = model + checkpoint  # of 100 steps
    assert disk_of(monkeypatch, needed - 1, options, SHALLOW)
    options.resume_from = tmp_path / "checkpoint-100"
    options.resume_from.mkdir()
    manifest = json.dumps({"step": 100})
    (options.resume_from / "manifest.json").write_text(manifest)
    (options.resume_from / "optimizer.pt").write_bytes(bytes(1000 - len(manifest)))
    assert disk_of(monkeypatch, needed - 1001, options, SHALLOW)
    assert disk_of(monkeypatch, needed - 1000, options, SHALLOW) == []
    options.num_train_epochs = 2  # and so there is one more to come
    assert disk_of(monkeypatch, needed + checkpoint - 1001, options, SHALLOW)
    assert disk_of(monkeypatch, needed + checkpoint - 1000, options, SHALLOW) == []


@pytest.mark.parametrize("method", ["full", "frozen", "lora"])
def test_the_saved_model_is_as_large_as_estimated(method, tmp_path):
    """Within 5 %: the headers of safetensors, of hundreds of small adapters."""
    options = options_of(tmp_path, *METHODS[method])
    model = prepare_for_training(load_model(CHECKPOINT, options), processor_of_demo(), options)
    write_model(model, processor_of_demo(), tmp_path)
    estimated, _ = memory.sizes_on_disk(options, Phi3VConfig.from_pretrained(CHECKPOINT))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) == pytest.approx(estimated, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("words", [(), ("--use_lora",), ("--use_lora", "--optim", "adamw_8bit")])
def test_a_checkpoint_is_as_large_as_estimated(words, tmp_path):
    """Within 10 %, for a model of a thousandth of the published size: what else lies there weighs more."""
    pages = write_docvqa(tmp_path / "pages", train_pages=8, test_pages=1, seed=0)
    small = ("--num_crops", 1, "--batch_size", 4, "--max_steps", 1, "--save_steps", 1, "--eval_limit", 1, "--no-tqdm")
    ended = run_script(
        *("finetune_hf_trainer_docvqa.py", "--model_name_or_path", CHECKPOINT, "--data_dir", pages),
        *("--output_dir", tmp_path / "out", *small, *words),
        processes=1,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    files = [file for file in (tmp_path / "out" / "checkpoint-1").rglob("*") if file.is_file()]
    real = sum(file.stat().st_size for file in files if file.suffix != ".json")
    _, estimated = memory.sizes_on_disk(options_of(tmp_path / "other", *words), Phi3VConfig.from_pretrained(CHECKPOINT))
    assert estimated == pytest.approx(real, rel=0.1)


# --- the trial


def trial(options):
    return preflight.trial_problems(options, Phi3VConfig.from_pretrained(CHECKPOINT), processor_of_demo())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_save_that_loses_something_is_told(method, tmp_path, monkeypatch):
    """One weight of one trained tensor is saved as another number."""
    options = options_of(tmp_path, *METHODS[method])

    def write_another(model, processor, folder):
        if folder.name == "saved":
            weight = [weight for weight in model.parameters() if weight.requires_grad][5]
            before = weight.detach().clone()
            with torch.no_grad():
                weight.view(-1)[3] += 1e-3
            write_model(model, processor, folder)
            weight.data.copy_(before)
        else:
            write_model(model, processor, folder)

    assert trial(options) == []
    monkeypatch.setattr(preflight, "write_model", write_another)
    problems = trial(options)
    assert len(problems) == 1
    assert problems[0].startswith(f"a trial save and reload of a shrunk model in {tmp_path}: ")
    assert problems[0].endswith("came back different (1 in all)")
    assert list(tmp_path.iterdir()) == []


def test_a_save_without_a_file_is_told(tmp_path, monkeypatch):
    def write_incompletely(model, processor, folder):
        write_model(model, processor, folder)
        (folder / "tokenizer.json").unlink()

    monkeypatch.setattr(preflight, "write_model", write_incompletely)
    (problem,) = trial(options_of(tmp_path))
    assert f"in {tmp_path} failed: " in problem
    assert list(tmp_path.iterdir()) == []


def test_the_shrunk_model_is_of_the_same_kind():
    small = preflight.shrunk(OFFICIAL)
    assert type(small) is Phi3VConfig
    assert small.vocab_size == OFFICIAL.vocab_size
    assert small.rope_parameters == OFFICIAL.rope_parameters
    weights = memory.count_weights(small.to_json_string(use_diff=False), "full", 1, 2)
    assert sum(weights.trained) + weights.frozen < 15e6


# --- several steps


def test_one_list_of_options_checkpoint_data_and_machine(tmp_path, monkeypatch):
    """Two processes: one list, told once, before either is joined to the other; and nothing is left."""
    old = tmp_path / "old" / "datasets-1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(old.parent))
    checkpoint = write_stand_in_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    rows = datasets.Dataset.from_dict(
        {"image": [None] * 3, "query": [{"en": "Q?"}] * 3, "answers": [["yes"], [], [""]]}
    )
    rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "train.parquet")
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    arguments = ("--model_name_or_path", checkpoint, "--train_data", tmp_path / "train.parquet")
    arguments += ("--eval_data", tmp_path / "test.parquet", "--output_dir", tmp_path / "out")
    ended = run_script(
        "finetune_hf_trainer_docvqa.py",
        *arguments,
        "--batch_size",
        3,
        "--optim",
        "sgd",
        "--num_crops",
        0,
        fresh=True,
    )
    assert ended.returncode != 0
    told = ended.stdout[ended.stdout.index("error: ") :].splitlines()
    assert told[0] == "error: 8 problems:"
    expected = [
        "--optim sgd: it is one of",
        "--num_crops 0: it must be 1 to 16",
        "--batch_size 3 cannot be divided over 2 processes",
        f"--model_name_or_path {checkpoint} is not a complete checkpoint: it has no tokenizer.json",
        f"{tmp_path / 'train.parquet'}, split train, row 1 has no answer",
        f"{tmp_path / 'train.parquet'}, split train, row 2 has no answer",
        f"--eval_data {tmp_path / 'test.parquet'} cannot be read as parquet",
        "datasets 1.0 is installed, datasets>=",
    ]
    for line, start in zip(told[1:9], expected, strict=True):
        assert line.startswith(f"  - {start}")
    assert ended.stdout.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_room_is_asked_for_though_an_option_is_wrong(tmp_path, monkeypatch):
    """For the model alone, in a folder that is not there yet; not where the wrong option is the folder."""

    def with_a_wrong_option(*words):
        with pytest.raises(OptionsError) as raised:
            options_of(tmp_path / "runs" / "out", *words)
        return raised.value.options

    options, asked = options_of(tmp_path / "runs" / "out"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or DISK(ROOM, ROOM, room))
    model, _ = memory.sizes_on_disk(options, Phi3VConfig.from_pretrained(CHECKPOINT))
    right = with_a_wrong_option("--num_crops", 0)
    without = with_a_wrong_option("--output_dir", "")
    room = model
    preflight.check_machine(right)
    room = model - 1
    with pytest.raises(UserError, match=rf"--output_dir {tmp_path}/runs/out: the run writes at least [\d.]+ GB"):
        preflight.check_machine(right)
    preflight.check_machine(without)
    assert asked == [tmp_path, tmp_path]


def test_libraries_are_told_though_the_checkpoint_is_no_use(tmp_path, monkeypatch):
    """Of an adapter whose base is a hub's, which is not fetched for it, and of a configuration that is none."""
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "datasets" else installed(name))
    monkeypatch.setattr(errors, "_fetches", False)
    options = options_of(tmp_path / "out")
    options.model_name_or_path, fetched = str(tmp_path / "checkpoint"), []
    (tmp_path / "checkpoint").mkdir()
    adapter, config = ((tmp_path / "checkpoint" / name) for name in ("adapter_config.json", "config.json"))
    fields = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8, "lora_alpha": 8}
    adapter.write_text(json.dumps({**fields, "target_modules": ["o_proj"]}))
    monkeypatch.setattr(Phi3VConfig, "from_pretrained", lambda *given, **named: fetched.append(given))
    with pytest.raises(UserError, match=r"^datasets 1.0 is installed, datasets>=[^\n]*$"):
        preflight.check_machine(options)
    assert fetched == []
    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "datasets" else installed(name))
    adapter.unlink()
    config.write_text(json.dumps({"model_type": "phi3_v", "hidden_size": "wide"}))
    with pytest.raises(UserError, match=r"^datasets 1.0 is installed, datasets>=[^\n]*$"):
        preflight.check_machine(options)


def test_option_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    """The default checkpoint and data are the hub's, which is not asked."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    ended = run_script("finetune_hf_trainer_docvqa.py", "--num_crops", 0, "--output_dir", tmp_path / "out", processes=0)
    assert ended.returncode == 2
    assert ended.stdout.splitlines()[-1] == "error: --num_crops 0: it must be 1 to 16"
    assert "hub" not in ended.stdout


# --- several processes


def one_of_two(rank, folder, port):
    """A bad picture in the second process's share, an old library on the second process's machine.

    Then one beyond the sample in either process's share of the whole.
    """
    torch.set_num_threads(1)  # as in a loader's forked workers
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    options = options_of(folder)
    installed = importlib.metadata.version
    if rank == 1:
        importlib.metadata.version = lambda name: "1.0" if name == "accelerate" else installed(name)
    with pytest.raises(UserError) as raised:
        preflight.preflight(dataset_of(broken=[3]), processor_of_demo(), options)
    assert raised.value.everywhere
    (folder / f"told_{rank}").write_text(str(raised.value))
    importlib.metadata.version = installed
    with pytest.raises(UserError) as raised:
        preflight.preflight(dataset_of(200, broken=[UNSEEN, 150]), processor_of_demo(), options)
    assert raised.value.everywhere
    (folder / f"beyond_{rank}").write_text(str(raised.value))
    dist.destroy_process_group()


def test_every_process_raises_the_problems_of_all(tmp_path):
    multiprocessing.start_processes(one_of_two, (tmp_path, free_port()), nprocs=2, start_method="fork")
    first, second = ((tmp_path / f"told_{rank}").read_text() for rank in (0, 1))
    assert first == second
    lines = first.splitlines()
    assert lines[0] == "2 problems:"
    assert lines[1].startswith("  - pages, row 3: the image")
    assert lines[2].startswith("  - process 1: accelerate 1.0 is installed, accelerate>=1.15 is needed")
    first, second = ((tmp_path / f"beyond_{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert [line.split(":")[0] for line in first.splitlines()[1:]] == ["  - pages, row 1", "  - pages, row 150"]
