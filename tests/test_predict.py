"""`tools.predict`: one question, and files of them, by checkpoints and adapters."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from common.collation import Turn
from common.demo import CHECKPOINT
from common.errors import UserError
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from tests.launch import run_script
from tests.model_helpers import write_pictures
from tools import predict

FEW = ("--num_crops", 1, "--max_new_tokens", 6)  # the built-in checkpoint is made for one view
ENDS = ("<|end|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("images")
    write_pictures(folder)
    return folder


def save_adapter(folder: Path, num_crops: int = 1) -> Path:
    """An adapter that changes answers, with the processor that it was trained with."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["qkv_proj", "o_proj", "lm_head"])
    model = get_peft_model(Phi3VForCausalLM.from_pretrained(CHECKPOINT), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=num_crops).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


def reference(model, turns, max_new_tokens=6):
    """An answer by processor and `generate` alone, as the README has it; earlier turns as they were trained."""
    processor, ids, pixels = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=1), [], []
    for turn in turns:
        first = sum(len(one.images) for one in turns[: turns.index(turn)]) + 1
        tags = "".join(f"<|image_{number}|>" for number in range(first, first + len(turn.images)))
        user = {"role": "user", "content": f"{tags}\n{turn.user}" if tags else turn.user}
        text = processor.apply_chat_template([user], add_generation_prompt=True)
        encoded = processor.encode(text, turn.images, first_tag=first)
        ids.append(encoded["input_ids"])
        pixels += [encoded] if turn.images else []
        if turn is not turns[-1]:
            answer = processor.tokenizer(f"{turn.assistant}<|end|>\n<|endoftext|>", add_special_tokens=False)
            ids.append(torch.tensor(answer.input_ids))
    inputs = {"input_ids": torch.cat(ids)[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("pixel_values", "image_sizes") if pixels else ():
        inputs[name] = torch.cat([one[name] for one in pixels])
    ends = processor.tokenizer.convert_tokens_to_ids(list(ENDS))
    found = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends)
    return processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def full_model():
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def run_predict(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tools.predict", *map(str, arguments)])
    predict.main()


def write_lines(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def turn(user, images=(), **answer):
    return {"images": list(images), "user": user, **answer}


def ask_file(monkeypatch, data, folder, output, *more, checkpoint=CHECKPOINT):
    images = ("--image_dir", folder)
    run_predict(monkeypatch, "--checkpoint", checkpoint, "--data", data, *images, "--output", output, *FEW, *more)


# --- one question


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_one_question(folder, pictures, monkeypatch, capsys):
    files = [folder / f"{number}.png" for number in range(1, pictures + 1)]
    words = [word for file in files for word in ("--image", file)]
    run_predict(monkeypatch, "--checkpoint", CHECKPOINT, *words, "--question", "What is it?", *FEW)
    wanted = reference(full_model(), [Turn("What is it?", images=[Image.open(file) for file in files])])
    assert capsys.readouterr().out == f"{wanted}\n"
    assert wanted


def test_an_adapter_answers(folder, adapter, monkeypatch, capsys):
    """Its own answer, in the precision that adapters are evaluated in, and not its base's."""
    question = [Turn("What is it?", images=[Image.open(folder / "1.png")])]
    wanted = reference(PeftModel.from_pretrained(full_model(), adapter).eval(), question)
    asked = ("--image", folder / "1.png", "--question", "What is it?")
    run_predict(monkeypatch, "--checkpoint", adapter, *asked, *FEW)
    assert capsys.readouterr().out == f"{wanted}\n"
    assert wanted != reference(full_model(), question)


def test_num_crops_is_the_trained_one(tmp_path):
    assert predict.how_to_load(CHECKPOINT).num_crops == 4
    assert predict.how_to_load(CHECKPOINT, num_crops=2).num_crops == 2
    assert predict.how_to_load(save_adapter(tmp_path, num_crops=7)).num_crops == 7
    (tmp_path / "preprocessor_config.json").unlink()
    assert predict.how_to_load(tmp_path).num_crops == 4  # its base's


def test_precisions(adapter):
    assert predict.how_to_load(CHECKPOINT).precision.name == ("fp16" if torch.cuda.is_available() else "fp32")
    of_adapter = predict.how_to_load(adapter, bf16=True).precision
    assert (of_adapter.weights, of_adapter.autocast) == (torch.bfloat16, torch.bfloat16)  # as it was trained


@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_in_four_bits(what, adapter, folder, monkeypatch, capsys):
    loaded, load = [], predict.load_model
    monkeypatch.setattr(predict, "load_model", lambda *arguments: loaded.append(load(*arguments)) or loaded[0])
    name = adapter if what == "adapter" else CHECKPOINT
    asked = ("--image", folder / "1.png", "--question", "What is it?")
    run_predict(monkeypatch, "--checkpoint", name, *asked, *FEW, "--load_in_4bit")
    assert any(type(module).__name__.endswith("Linear4bit") for module in loaded[0].modules())
    assert capsys.readouterr().out.strip()


def test_as_a_command(folder):
    words = ("--checkpoint", CHECKPOINT, "--image", folder / "1.png", "--question", "What is it?", *FEW)
    process = run_script("-m", "tools.predict", *words, processes=0)
    wanted = reference(full_model(), [Turn("What is it?", images=[Image.open(folder / "1.png")])])
    assert (process.returncode, process.stdout) == (0, f"{wanted}\n")


# --- a file


@pytest.fixture(scope="module")
def records():
    """Last answers that are there, missing and empty; a picture twice; turns before; text alone."""
    return [
        {"id": "a", "conversations": [turn("What is it?", ["1.png"], assistant="never shown")]},
        {"conversations": [turn("Which number is it?", ["1.png"])]},
        {"id": 7, "conversations": [turn("What is it?", ["1.png"], assistant="")]},
        {"conversations": [turn("Is it?", ["2.png"], assistant="Yes."), turn("And this?", ["3.png", "1.png"])]},
        {"conversations": [turn("Is it?", ["2.png"], assistant="No."), turn("And now?")]},
        {"conversations": [turn("Hello there.")]},
        {"id": "ü", "conversations": [turn("What is it?", ["2.png", "3.png"])]},
    ]


@pytest.fixture(scope="module")
def wanted(records, folder):
    model = full_model()
    conversations = [
        [
            Turn(one["user"], one.get("assistant", ""), [Image.open(folder / name) for name in one["images"]])
            for one in record["conversations"]
        ]
        for record in records
    ]
    return [reference(model, turns) for turns in conversations]


def test_a_file(records, wanted, folder, tmp_path, monkeypatch, capsys):
    """Every line's answer is what the model says when asked it alone, in the file's order."""
    data, output = write_lines(tmp_path / "data.jsonl", *records), tmp_path / "answers.jsonl"
    ask_file(monkeypatch, data, folder, output, "--batch_size", 3)
    found = read_lines(output)
    assert [one["answer"] for one in found] == wanted
    assert len(set(wanted)) > 1
    assert [one["line"] for one in found] == list(range(1, 8))
    assert [one.get("id") for one in found] == [record.get("id") for record in records]
    assert [one["question"] for one in found] == [record["conversations"][-1]["user"] for record in records]
    made_by = {"checkpoint": str(CHECKPOINT), "num_crops": 1, "max_new_tokens": 6, "precision": "fp32"}
    assert all(made_by.items() <= one.items() for one in found)
    assert "asked 7, left out 0" in capsys.readouterr().out


@pytest.mark.parametrize("half", ["", '{"line": 3, "id": 7, "quest', '{"line": 3, "half": "a whole dictionary"}'])
def test_what_is_answered_is_not_asked_again(half, records, folder, tmp_path, monkeypatch):
    """After a stop, however far the line was written that it fell into, the output is that of a run in one piece."""
    data, output = write_lines(tmp_path / "data.jsonl", *records), tmp_path / "answers.jsonl"
    ask_file(monkeypatch, data, folder, output)
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:2]) + half)
    asked, generate = [], predict.generate_answers

    def count(model, processor, number, make_example, *arguments, **keywords):
        asked.extend(make_example(index).turns[-1].user for index in range(number))
        return generate(model, processor, number, make_example, *arguments, **keywords)

    monkeypatch.setattr(predict, "generate_answers", count)
    ask_file(monkeypatch, data, folder, output)
    assert output.read_text() == whole
    assert [text.rsplit("\n")[-1] for text in asked] == [one["conversations"][-1]["user"] for one in records[2:]]


def test_a_finished_output_needs_no_model(records, folder, tmp_path, monkeypatch):
    data, output = write_lines(tmp_path / "data.jsonl", *records[:2]), tmp_path / "answers.jsonl"
    ask_file(monkeypatch, data, folder, output)
    whole = output.read_text()
    monkeypatch.setattr(predict, "load_model", None)
    ask_file(monkeypatch, data, folder, output)
    assert output.read_text() == whole


def test_answers_are_written_as_they_come(records, folder, tmp_path, monkeypatch):
    data, output = write_lines(tmp_path / "data.jsonl", *records), tmp_path / "answers.jsonl"
    monkeypatch.setattr(predict, "LOOK_AHEAD", 1)
    held, generate = [], predict.generate_answers

    def look(*arguments, **keywords):
        held.append(len(output.read_text().splitlines()))
        return generate(*arguments, **keywords)

    monkeypatch.setattr(predict, "generate_answers", look)
    ask_file(monkeypatch, data, folder, output, "--batch_size", 3)
    assert held == [0, 3, 6]


def test_the_output_of_another_run(records, adapter, folder, tmp_path, monkeypatch):
    data, output = write_lines(tmp_path / "data.jsonl", *records[:2]), tmp_path / "answers.jsonl"
    ask_file(monkeypatch, data, folder, output)
    whole = output.read_text()
    other = write_lines(tmp_path / "other.jsonl", records[0], records[5])
    shorter = write_lines(tmp_path / "shorter.jsonl", records[0])
    replaced = shutil.copytree(folder, tmp_path / "replaced")  # a picture by another of the same name
    first = replaced / records[0]["conversations"][-1]["images"][0]
    Image.open(first).resize((90, 60)).save(first)
    for arguments, message in (
        ((data, folder, output, "--max_new_tokens", 5), r"line 1 is of another run \(another max_new_tokens\)"),
        ((other, folder, output), r"line 2 is of another run \(another question, images, conversation\)"),
        ((data, replaced, output), r"line 1 is of another run \(another conversation\)"),
        ((shorter, folder, output), "line 2 is of another run"),
    ):
        with pytest.raises(UserError, match=message):
            ask_file(monkeypatch, *arguments)
    with pytest.raises(UserError, match=r"line 1 is of another run \(another checkpoint, base_weights, weights\)"):
        ask_file(monkeypatch, data, folder, output, checkpoint=adapter)
    assert output.read_text() == whole


def test_the_output_of_a_checkpoint_trained_once_more(records, adapter, folder, tmp_path, monkeypatch):
    """In its place: the weights are others."""
    shutil.copytree(adapter, tmp_path / "adapter")
    data, output = write_lines(tmp_path / "data.jsonl", *records[:2]), tmp_path / "answers.jsonl"
    ask_file(monkeypatch, data, folder, output, checkpoint=tmp_path / "adapter")
    with pytest.raises(UserError, match=r"another load_in_4bit\)"):
        ask_file(monkeypatch, data, folder, output, "--load_in_4bit", checkpoint=tmp_path / "adapter")
    four_bits = tmp_path / "four_bits.jsonl"
    ask_file(monkeypatch, data, folder, four_bits, "--load_in_4bit", checkpoint=tmp_path / "adapter")
    with pytest.raises(UserError, match=r"another load_in_4bit\)"):
        ask_file(monkeypatch, data, folder, four_bits, checkpoint=tmp_path / "adapter")
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"line 1 is of another run \(another weights\)"):
        ask_file(monkeypatch, data, folder, output, checkpoint=tmp_path / "adapter")


def test_the_output_of_another_revision(records, folder, tmp_path, monkeypatch):
    """A hub's branch may have moved since the file was begun."""
    data, output = write_lines(tmp_path / "data.jsonl", *records[:2]), tmp_path / "answers.jsonl"
    commit, how_to_load = "a" * 40, predict.how_to_load

    def as_from_the_hub(*arguments):
        loading = how_to_load(*arguments)
        loading.revision = commit
        return loading

    monkeypatch.setattr(predict, "how_to_load", as_from_the_hub)
    ask_file(monkeypatch, data, folder, output)
    whole = output.read_text()
    ask_file(monkeypatch, data, folder, output)  # the same one goes on
    commit = "b" * 40
    with pytest.raises(UserError, match=r"line 1 is of another run \(another revision\)"):
        ask_file(monkeypatch, data, folder, output)
    assert output.read_text() == whole


@pytest.fixture
def bad(records, folder, tmp_path):
    """Between good lines: no JSON, no picture there, two faults at once, one that cannot be decoded."""
    lines = [json.dumps(record) for record in records[:2]]
    lines.insert(1, '{"id": "half')
    lines += [json.dumps({"id": "gone", "conversations": [turn("What?", ["9.png"])]})]
    lines += [json.dumps({"conversations": [turn("<|image_1|>What?", ["../x.png"])]})]
    lines += [json.dumps({"conversations": [turn("What?", ["broken.png"])]}), json.dumps(records[5])]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "bad.jsonl"


def test_bad_lines_stop(bad, folder, tmp_path, monkeypatch):
    """All of them are named before the model is loaded."""
    monkeypatch.setattr(predict, "load_model", None)
    with pytest.raises(UserError, match="3 of 7 lines cannot be asked") as error:
        ask_file(monkeypatch, bad, folder, tmp_path / "answers.jsonl")
    message = str(error.value)
    for part in ("line 2: no JSON", "line 4: turn 1:", "9.png: there is no such file", "leaves the folder"):
        assert part in message
    assert "user holds <|image_1|>" in message
    assert not (tmp_path / "answers.jsonl").exists()


def test_bad_lines_are_left_out(bad, wanted, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "answers.jsonl"
    ask_file(monkeypatch, bad, folder, output, "--bad_examples", "skip")
    found = read_lines(output)
    assert [one["line"] for one in found] == list(range(1, 8))
    assert {one["line"]: one["answer"] for one in found if "answer" in one} == {
        1: wanted[0],
        3: wanted[1],
        7: wanted[5],
    }
    errors = {one["line"]: one["error"] for one in found if "error" in one}
    assert set(errors) == {2, 4, 5, 6}
    assert "no JSON" in errors[2]
    assert "cannot be decoded" in errors[6]
    assert found[3]["id"] == "gone"
    printed = capsys.readouterr()
    assert "asked 3, left out 4" in printed.out
    assert all(f"left out: {bad}, line {number}: " in printed.err for number in errors)
    whole = output.read_text()
    ask_file(monkeypatch, bad, folder, output, "--bad_examples", "skip")
    assert output.read_text() == whole


def test_a_picture_that_cannot_be_decoded_loses_no_answers(records, wanted, folder, tmp_path, monkeypatch):
    broken = {"conversations": [turn("What?", ["broken.png"])]}
    data, output = write_lines(tmp_path / "data.jsonl", *records[:2], broken, records[5]), tmp_path / "answers.jsonl"
    monkeypatch.setattr(predict, "LOOK_AHEAD", 1)
    with pytest.raises(UserError, match=r"1 of 4 lines .*\n.*line 3: .*broken.png: the image cannot be decoded"):
        ask_file(monkeypatch, data, folder, output, "--batch_size", 2)
    assert [one["answer"] for one in read_lines(output)] == wanted[:2]
    write_lines(data, *records[:3], records[5])  # mended
    ask_file(monkeypatch, data, folder, output, "--batch_size", 2)
    assert [one["answer"] for one in read_lines(output)] == [*wanted[:3], wanted[5]]


def test_too_long_lines(records, folder, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", *records)
    options = Namespace(data=data, image_dir=folder)
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=1)
    questions, _ = predict.read_questions(options, processor, limit=400)  # a picture is 313
    assert [bool(one.error) for one in questions] == [False, False, False, True, False, False, True]
    assert "the model takes 400" in questions[3].error


def test_empty_file(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is empty"):
        ask_file(monkeypatch, write_lines(tmp_path / "data.jsonl"), folder, tmp_path / "answers.jsonl")


# --- options


def test_all_wrong_options_at_once(folder):
    words = "--checkpoint x --data gone.jsonl --image no.png --num_crops 17 --max_new_tokens 0 --batch_size 0"
    with pytest.raises(UserError) as error:
        predict.parse(words.split())
    for part in (
        *("7 problems", "--data gone.jsonl", "--image no.png", "names its pictures itself", "needs --output"),
        *("--num_crops 17", "--max_new_tokens 0", "--batch_size 0"),
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize("words", ["", "--question a --data b.jsonl --output c.jsonl"])
def test_either_a_question_or_a_file(words):
    with pytest.raises(UserError, match="give either --question"):
        predict.parse(["--checkpoint", "x", *words.split()])


def test_what_a_single_question_would_not_read(folder):
    words = ["--checkpoint", "x", "--question", "a", "--output", "answers.jsonl", "--image_dir", str(folder)]
    with pytest.raises(UserError, match=r"(?s)2 problems.*--output goes with --data.*--image_dir goes with --data"):
        predict.parse(words)


def test_tags_are_not_the_users(folder):
    with pytest.raises(UserError, match=r"--question holds <\|image_1\|>"):
        predict.parse(["--checkpoint", "x", "--question", "<|image_1|>\nWhat?"])


def test_a_picture_that_is_none(folder, monkeypatch):
    with pytest.raises(UserError, match=r"--image .*broken.png: the image cannot be decoded"):
        run_predict(monkeypatch, "--checkpoint", "x", "--image", folder / "broken.png", "--question", "What?")


def test_checkpoints_that_are_none(tmp_path, adapter, monkeypatch):
    with pytest.raises(UserError, match=f"^--checkpoint {tmp_path} is not a checkpoint folder"):
        run_predict(monkeypatch, "--checkpoint", tmp_path, "--question", "What?")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/base"}))
    # what is here comes first: nothing is fetched for an adapter that cannot be used
    with pytest.raises(UserError, match=r" is an adapter without adapter_model.safetensors$"):
        run_predict(monkeypatch, "--checkpoint", tmp_path, "--question", "What?")
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"^--checkpoint gone/base could not be fetched"):
        run_predict(monkeypatch, "--checkpoint", tmp_path, "--question", "What?")
