"""Makes the built-in checkpoint (`common/demo_checkpoint`): a small tokenizer, a small model, and its pre-training.

    python -m common.demo_pretrain --out DIR

The model learns what stands where on pictures of handwritten digits and printed labels, and to say so: it gives the
values of a form in figures and then in words, names digits by their places and places by their digits, says what one
of several pictures is like, and compares where the digits of several pictures stand. None of the recipes' tasks is
among it: a value is never given in figures alone, and it never compares what digits are worth, puts digit and word
together or names a motion. While it learns, linear maps that are thrown away in the end read off the decoder's hidden
states which square must be looked at; without them the look-up is learned several times more slowly. Three stages:

1. `see`: the tower and the projection learn to name what stands in each 28 x 28 square of a page.
2. `skim`: the decoder learns to answer, from one line on a form to six. Most empty squares are left out of its
   input, with everything else at the positions where it would be, so that a step is several times cheaper and
   attention finds the marks.
3. `read`: the whole model on whole pages, as it is used afterwards.

Every stage begins with the weights that the one before it wrote, and can be done alone (`--only`).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from .demo import (
    DIGITS_PER_VALUE,
    FIRST_BOX,
    LABELS,
    SQUARES,
    TITLES,
    Page,
    Pen,
    digit_scans,
    draw_form,
    draw_scattered,
)
from .phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor
from .phi3v.configuration import OFFICIAL_REPOSITORY
from .phi3v.image_processing import CLIP_MEAN, CLIP_STD
from .phi3v.modeling import IGNORED_LABEL, merge_patches

# ---------------------------------------------------------------------------------------------- tokenizer

WORDS = re.findall(
    r"\S+",
    """
a about above after again all also an and any are as at back baby be before below beside between big black blue both
bottom brief briefly but by can class classify clip code columns compare contains count crawling cut date day describe
did difference different digit digits direction do does document down each empty equal even every extract false field
fields find first follow following for four frame frames from give given greater green grey has have he her here high
his how I image images in into is it its just kind label large larger last least left less letter line lines list long
look low make many match may mean middle model more most motion move moves moving my name names new next no none not
note nothing now number numbers object odd of off old on one only option or order other our out over page pages pair
paper part people photo picture pictures place please point position print question questions read red report right
round row same say second see sentence sequence seven shape short show shown shows side six size small smaller some
square stand stands statement still sum ten test text than that the their them then there these they thing this three
time to top transcribe true turn two under up user value video view was we were what when where which white who whole
why will with word words write writing written year yes you your zero
five eight nine ten eleven twelve spell hateful meme answer short left-hand right-hand
upwards downwards leftwards rightwards up-left down-right lower higher further
ClimbingUp FallingDown RunningLeft RunningRight Answer Are Baby Classify Compare Crawling Describe Do Does
How In Is Look No None Picture Please Read Spell The
These This Transcribe True False Was What When Where Which Who Why Write Yes
You assistant helpful are
""",
)

# as published; where two lines say "<|end|>", one token is meant
ENDOFTEXT, END, IMAGE = "<|endoftext|>", "<|end|>", "<|image|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\n' -}}{% endif %}"
)


def added_tokens() -> list[AddedToken]:
    """The published added tokens, in the published order, with the published flags."""
    placeholders = iter(f"<|placeholder{number}|>" for number in range(1, 40))
    names = ["<unk>", "<s>", "</s>", ENDOFTEXT, "<|assistant|>", *(next(placeholders) for _ in range(4))]
    names += ["<|system|>", END, next(placeholders), next(placeholders), "<|user|>", *placeholders, IMAGE]
    takes_spaces = {"</s>", "<|assistant|>", IMAGE, *(name for name in names if name.startswith("<|placeholder"))}
    return [AddedToken(name, normalized=False, rstrip=name in takes_spaces, special=name != "</s>") for name in names]


def build_tokenizer() -> Tokenizer:
    """A tokenizer of the published kind (Llama's BPE with byte fallback) on the words above."""
    words = {*WORDS, *LABELS, *(label.lower() for label in LABELS)}
    # a word that may begin a line also stands there without a space before it
    corpus = [*(f"▁{word}" for word in words), *(word for word in words if word[0].isupper())]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, show_progress=False)
    trained.train_from_iterator(sorted(corpus), trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    # laid out as Llama's: special tokens, bytes, merged pieces in the order of their merges, characters
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["".join(merge) for merge in merges]
    pieces += ["▁", *(chr(code) for code in range(33, 127))]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token in added_tokens():
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def write_processor(folder: Path) -> Phi3VProcessor:
    """Write the tokenizer's and the processor's files and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    additional = ["<|system|>", END, "<|user|>", END]
    auto_map = {"AutoProcessor": f"{OFFICIAL_REPOSITORY}--processing_phi3_v.Phi3VProcessor"}
    special_tokens = {
        "additional_special_tokens": additional,
        "bos_token": {"content": "<s>", **plain},
        "eos_token": {"content": ENDOFTEXT, **plain},
        "pad_token": {"content": ENDOFTEXT, **plain},
        "unk_token": {"content": "<unk>", **plain},
    }
    added = {
        str(tokenizer.token_to_id(token.content)): {
            "content": token.content,
            **plain,
            "rstrip": token.rstrip,
            "special": token.special,
        }
        for token in added_tokens()
    }
    fields = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": additional,
        "auto_map": auto_map,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": ENDOFTEXT,
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": ENDOFTEXT,
        "padding_side": "right",
        "processor_class": "Phi3VProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    for name, content in (("special_tokens_map.json", special_tokens), ("tokenizer_config.json", fields)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    image_auto_map = {"AutoImageProcessor": f"{OFFICIAL_REPOSITORY}--processing_phi3_v.Phi3VImageProcessor", **auto_map}
    Phi3VImageProcessor(num_crops=4, auto_map=image_auto_map).save_pretrained(folder)
    (folder / "processor_config.json").write_text(
        json.dumps({"auto_map": auto_map, "processor_class": "Phi3VProcessor"}, indent=2) + "\n"
    )
    return Phi3VProcessor.from_pretrained(folder)


# -------------------------------------------------------------------------------------------------- model

# The published factors, every third of the 48: a head here has 16 rotating pairs.
SHORT_FACTOR = [1.08, 1.28, 1.45, 2.43, 3.73, 4.44, 5.16, 5.89, 6.09, 6.89, 7.18, 7.56, 7.88, 7.94, 8.2, 8.59]
LONG_FACTOR = [1.08, 1.34, 1.62, 3.23, 7.7, 17.67, 30.42, 32.93, 50.34, 57.93, 62.61, 63.14, 63.93, 64.03, 64.12, 64.51]


def build_config(processor_ids: dict[str, int], vocabulary_size: int) -> Phi3VConfig:
    """The published configuration, with a small decoder and a small tower."""
    return Phi3VConfig(
        name_or_path="",
        architectures=["Phi3VForCausalLM"],
        auto_map={
            "AutoConfig": f"{OFFICIAL_REPOSITORY}--configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": f"{OFFICIAL_REPOSITORY}--modeling_phi3_v.Phi3VForCausalLM",
        },
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_theta=10_000.0,
        rope_scaling={"type": "su", "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR},
        rms_norm_eps=1e-5,
        initializer_range=0.08,  # published: 0.02, too little for layers so narrow
        sliding_window=262144,
        tie_word_embeddings=False,
        bos_token_id=processor_ids["<s>"],
        eos_token_id=processor_ids["</s>"],
        pad_token_id=processor_ids[ENDOFTEXT],
        image_token_id=processor_ids[IMAGE],
        img_processor={"image_dim_out": TOWER["hidden_size"]},
        vision_config=TOWER,
    )


NOTHING = 0  # the token that names an empty square: <unk>, which no page holds
FEATURES = 313  # of a page at num_crops 1

# The last layer is not used, as in the published tower: features come from the second to last hidden state.
TOWER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}


def build_model(config: Phi3VConfig) -> Phi3VForCausalLM:
    """A model with random weights, but for what takes long to become useful from random weights.

    The tower's position embeddings are sines of row and column, and its filters the slow waves of a
    cosine transform of the picture's brightness. The head begins as the token embeddings, so that
    what attention brings from the input is what the head writes.
    """
    model = Phi3VForCausalLM(config).float()
    embeddings = model.model.vision_embed_tokens.img_processor.vision_model.embeddings
    width = config.img_processor["image_dim_out"]
    frequencies = 2 * math.pi / torch.logspace(math.log10(4), math.log10(48), width // 4)
    places = torch.arange(24)[:, None] * frequencies  # (24, width / 4)
    waves = torch.cat([places.sin(), places.cos()], dim=-1) * 0.7
    with torch.no_grad():
        grid = torch.cat([waves[:, None].expand(24, 24, -1), waves[None].expand(24, 24, -1)], dim=-1)
        embeddings.position_embedding.weight[1:] = grid.flatten(0, 1)
        pixel_places = (torch.arange(14) + 0.5) * math.pi / 14
        slowest_first = sorted(((u, v) for u in range(14) for v in range(14)), key=lambda pair: (max(pair), pair))
        for filter_weight, (u, v) in zip(embeddings.patch_embedding.weight, slowest_first, strict=False):
            filter_weight[:] = torch.outer((u * pixel_places).cos(), (v * pixel_places).cos()) / (14 * 3)
        embeddings.patch_embedding.weight[0] *= 0.3  # mean brightness, which is large everywhere
        model.model.embed_tokens.weight.normal_(std=0.1)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        for name, weight in model.model.vision_embed_tokens.named_parameters():
            if name.endswith("_GN"):
                weight.normal_(std=0.5)
    return model


def write_checkpoint(model: Phi3VForCausalLM, folder: Path) -> None:
    """Write the complete checkpoint folder; the weights in bfloat16."""
    tokens = Tokenizer.from_str(build_tokenizer().to_str())
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=[tokens.token_to_id(END), tokens.token_to_id(ENDOFTEXT)],
        pad_token_id=model.config.pad_token_id,
    )
    half = Phi3VForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
    write_processor(folder)  # after config.json, by which transformers chooses the kind of tokenizer


# --------------------------------------------------------------------------------------- pictures and turns

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SPELL = (
    "Spell the {label} number.",
    "Spell what is written beside {label}.",
    "{Label} in words.",
    "Look at {label}. Please spell the number beside it.",
    "Spell the {label} number.\nAnswer in words.",
)


Square = tuple[int, int, int]  # which of the pictures, row, column


@dataclass
class Turn:
    """A question and its answer.

    `squares` says where the answer's numbers or its yes or no are read off, one by one, if from one place;
    `named` which words of the question, in their order, speak of which square.
    """

    question: str
    answer: str
    squares: Sequence[Square] = ()
    named: Sequence[tuple[str, Square]] = ()


@dataclass
class Lesson:
    """Pictures and what is asked about them, one turn after another."""

    pages: list[Page]
    turns: list[Turn]


def spell(value: str) -> str:
    """ "27" -> "two seven" """
    return " ".join(NUMBERS[int(digit)] for digit in value)


def say_place(square: tuple[int, int], in_figures: bool = False) -> str:
    """A square, counted from one."""
    row, column = (str(number + 1) if in_figures else NUMBERS[number + 1] for number in square)
    return f"row {row} column {column}"


def form_lesson(random: np.random.Generator, fewest: int = 3, most: int = 6) -> Lesson:
    """Give the values of a form in figures and then in words, in any order."""
    page = draw_form(random, digit_scans("train"), fewest, most, title=str(random.choice(TITLES)))
    places = {name: (0, *square) for square, name in page.squares.items() if not name.isdigit()}
    turns = []
    for label, value in random.permutation(page.lines).tolist():
        asked = str(random.choice(SPELL)).format(label=label.lower(), Label=label)
        row = places[label][1]
        boxes = [(0, row, FIRST_BOX + number) for number in range(len(value))]
        turns.append(Turn(asked, f"{value} {spell(value)}", boxes * 2, [(label, places[label])]))
    return Lesson([page], turns)


def place_lesson(random: np.random.Generator) -> Lesson:
    """Which digit is where."""
    digits = random.permutation(10)[: random.integers(1, 11)]
    page = draw_scattered(random, digit_scans("train"), digits, caption(random))
    written = [(square, digit) for square, digit in page.squares.items() if digit.isdigit()]
    turns = []
    for number in random.permutation(len(written))[:6]:
        square, digit = written[number]
        place = (0, *square)
        if random.random() < 0.5:
            # figures are read and written too, but never for what is handwritten
            in_figures = random.random() < 0.5
            asked = digit if in_figures else spell(digit)
            said = say_place(square, in_figures)
            numbers = sum(one.isdigit() for one in said) if in_figures else 2
            turns.append(Turn(f"Where is the {asked}?", said, [place] * numbers, [(asked, place)]))
        else:
            turns.append(Turn(f"Which digit is in {say_place(square)}?", spell(digit), (place,)))
    return Lesson([page], turns)


# What a picture's digit may be asked for: whether it stands in a square and is a digit of which this is true.
PROPERTIES = {
    "even": lambda row, column, digit: digit % 2 == 0,
    "large": lambda row, column, digit: digit >= 5,
    "in the upper half": lambda row, column, digit: row < SQUARES / 2,
    "in the left half": lambda row, column, digit: column < SQUARES / 2,
}


def property_lesson(random: np.random.Generator) -> Lesson:
    """Yes or no: a property of the digit in one of one to four pictures, or whether a word is there."""
    digits = random.integers(10, size=random.choice([1, 2, 4], p=[0.6, 0.25, 0.15])).tolist()
    pages = [draw_scattered(random, digit_scans("train"), [digit], caption(random, 0.5)) for digit in digits]
    turns = []
    for _ in range(6):
        number = int(random.integers(len(pages)))
        square = min(pages[number].squares)
        place: Sequence[Square] = ((number, *square),)
        of_picture, word = say_picture(random, number, len(pages))
        named = [(word, place[0])] if word else []
        if random.random() < 0.2:
            asked, is_true, place = f"Is there a word{of_picture}?", len(pages[number].squares) == 2, ()
        else:
            name = str(random.choice(list(PROPERTIES)))
            asked, is_true = f"Is the digit{of_picture} {name}?", PROPERTIES[name](*square, digits[number])
        turns.append(Turn(asked, "Yes." if is_true else "No.", place, named))
    return Lesson(pages, turns)


def say_picture(random: np.random.Generator, number: int, pictures: int) -> tuple[str, str]:
    """One of several pictures, and the word of it that comes last."""
    if pictures == 1:
        return "", ""
    if pictures == 2 and random.random() < 0.5:
        return f" of the {('left', 'right')[number]} image", "image"
    return f" of picture {NUMBERS[number + 1]}", NUMBERS[number + 1]


# How the place of one picture's digit may compare with that of another's.
COMPARISONS = {
    "lower": lambda one, other: one[0] > other[0],
    "higher": lambda one, other: one[0] < other[0],
    "further left": lambda one, other: one[1] < other[1],
    "further right": lambda one, other: one[1] > other[1],
}


# The edge of a picture that a digit may be nearest to, and how near it is.
EDGES = {
    "top": lambda row, column: -row,
    "bottom": lambda row, column: row,
    "left": lambda row, column: -column,
    "right": lambda row, column: column,
}


def comparison_lesson(random: np.random.Generator) -> Lesson:
    """Where the digits of two to four pictures stand, one compared with another, or all of them."""
    digits = random.integers(10, size=random.choice([2, 3, 4], p=[0.5, 0.2, 0.3])).tolist()
    pages = [draw_scattered(random, digit_scans("train"), [digit]) for digit in digits]
    squares = [min(page.squares) for page in pages]
    turns = []
    for _ in range(6):
        if random.random() < 0.4:
            edge = str(random.choice(list(EDGES)))
            nearness = [EDGES[edge](*square) for square in squares]
            nearest = int(np.argmax(nearness))
            if nearness.count(max(nearness)) == 1:
                asked = f"In which picture is the digit most to the {edge}?"
                turns.append(Turn(asked, NUMBERS[nearest + 1], [(nearest, *squares[nearest])]))
                continue
        one, other = random.permutation(len(pages))[:2].tolist()
        name = str(random.choice(list(COMPARISONS)))
        (of_one, word), (of_other, other_word) = (say_picture(random, number, len(pages)) for number in (one, other))
        named = [(word, (one, *squares[one])), (other_word, (other, *squares[other]))]
        is_true = COMPARISONS[name](squares[one], squares[other])
        turns.append(Turn(f"Is the digit{of_one} {name} than that{of_other}?", "Yes." if is_true else "No.", (), named))
    return Lesson(pages, turns)


def echo(random: np.random.Generator) -> Turn:
    """Any word, so that all of them have been written."""
    word = str(random.choice(WORDS))
    return Turn(f"Write the word {word}", word)


def caption(random: np.random.Generator, share: float = 0.3) -> str:
    """What is printed below a picture's digits: nothing, or a label."""
    return str(random.choice(LABELS)) if random.random() < share else ""


def look(name: str) -> str:
    return spell(name) if name.isdigit() else name.lower()


def practice_sheet(random: np.random.Generator) -> Page:
    """A page as full as can be, for the first stage: much to see at once."""
    pen, squares = Pen(random, digit_scans("train")), {}
    for row in range(SQUARES):
        column = 0
        while column < SQUARES:
            chance = random.random()
            if chance < 0.1 and column <= SQUARES - 4:
                squares[row, column] = str(random.choice(LABELS))
                pen.print(squares[row, column], row, column)
                column += 4
                continue
            if chance < 0.85:
                if random.random() < 0.5:
                    pen.box(row, column)
                squares[row, column] = str(random.integers(10))
                pen.write(int(squares[row, column]), row, column)
            column += 1
    return Page(pen.picture, squares=squares)


def to_pixels(pages: list[Page]) -> torch.Tensor:
    """(pages, 3, 336, 336), as the image processor makes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = torch.stack([torch.from_numpy(np.array(page.picture)).permute(2, 0, 1) for page in pages])
    return pixels.float().div_(255).sub_(mean).div_(std)


# ---------------------------------------------------------------------------------------------------- losses


def encode_views(model: Phi3VForCausalLM, pages: list[Page]) -> torch.Tensor:
    """Pages -> features (pages, 313, hidden).

    At num_crops 1 the sub-image and the global view are the same, so each page is encoded once.
    """
    vision = model.model.vision_embed_tokens
    merged = merge_patches(vision.img_processor(to_pixels(pages)))  # (pages, 12, 12, 4 * width)
    row_ends = vision.sub_GN.expand(*merged.shape[:2], 1, -1)
    view = vision.img_projection(torch.cat([merged, row_ends], dim=2)).flatten(1, 2)  # (pages, 156, hidden)
    separator = vision.img_projection(vision.glb_GN).expand(view.shape[0], 1, -1)
    return torch.cat([view, separator, view], dim=1)


class Naming(torch.nn.Module):
    """How well a page's features tell what stands in each square, and which square it is.

    What stands there is named by the token embeddings, so that a feature and the word for what it
    shows lie near each other; row and column by two linear maps, which are thrown away in the end.
    """

    def __init__(self, model: Phi3VForCausalLM, token_ids: dict[str, int]) -> None:
        super().__init__()
        self.token_ids = token_ids
        self.row, self.column = (torch.nn.Linear(model.config.hidden_size, SQUARES) for _ in range(2))

    def forward(self, model: Phi3VForCausalLM, features: torch.Tensor, pages: list[Page]) -> tuple[torch.Tensor, float]:
        """The loss, and the share of marks that are named rightly."""
        # (pages, 313, hidden) -> (pages, 12, 12, hidden): the first view, without the ends of rows
        squares = features[:, :156].unflatten(1, (SQUARES, SQUARES + 1))[:, :, :SQUARES]
        names = torch.full(squares.shape[:3], NOTHING)
        for number, page in enumerate(pages):
            for square, name in page.squares.items():
                names[(number, *square)] = self.token_ids[f"▁{look(name)}"]
        logits = LOGIT_SCALE * squares @ model.model.embed_tokens.weight.T
        losses = F.cross_entropy(logits.flatten(0, 2), names.flatten(), reduction="none").view_as(names)
        is_mark = names != NOTHING
        count = torch.arange(SQUARES)
        rows, columns = count[None, :, None].expand_as(names), count[None, None].expand_as(names)
        of_place = F.cross_entropy(self.row(squares).flatten(0, 2), rows.flatten())
        of_place = of_place + F.cross_entropy(self.column(squares).flatten(0, 2), columns.flatten())
        accuracy = (logits.argmax(-1) == names)[is_mark].float().mean().item()
        return losses[is_mark].mean() + losses[~is_mark].mean() + 0.5 * of_place, accuracy


@dataclass
class Written:
    """A lesson in tokens: tensors of shape (seq,).

    `places` holds, for the tokens that say where in the pictures one must look, the number of that square among
    all pictures' squares, else -1; `is_first` marks the labels that are the first figure of a value.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    is_first: torch.Tensor


class Writer:
    """Turns lessons into token ids."""

    def __init__(self, tokenizer: Any, image_token_id: int, random: np.random.Generator) -> None:
        self.tokenizer, self.image_token_id, self.random = tokenizer, image_token_id, random
        words = [*(f"▁{word}" for word in (*NUMBERS, "Yes", "No")), *"0123456789"]
        self.pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.content_ids = set(tokenizer.convert_tokens_to_ids(words))

    def write(self, lesson: Lesson) -> Written:
        """313 image tokens for every page, every turn's prompt on its own."""
        ids: list[int] = []
        labels: list[int] = []
        places: list[int] = []
        is_first: list[bool] = []
        for number, turn in enumerate(lesson.turns):
            tags = "" if number else "\0" * len(lesson.pages) + "\n"
            for position, chunk in enumerate(f"<|user|>\n{tags}{turn.question}{END}\n<|assistant|>\n".split("\0")):
                chunk_ids = self.tokenizer(chunk).input_ids
                ids += [self.image_token_id] * (FEATURES if position else 0) + chunk_ids
            places += [-1] * (len(ids) - len(places))
            begin = len(ids) - len(chunk_ids)
            for word, square in turn.named:
                piece = next(
                    at for at in range(begin, len(ids)) if self.pieces[ids[at]].strip("▁").lower() == word.lower()
                )
                places[piece], begin = number_of(square), piece + 1
            labels += [IGNORED_LABEL] * (len(ids) - len(labels))
            is_first += [False] * (len(ids) - len(is_first))
            answer_ids = self.tokenizer(f"{turn.answer}{END}\n{ENDOFTEXT}", add_special_tokens=False).input_ids
            squares = iter(turn.squares)
            looked = [
                number_of(next(squares)) if token in self.content_ids and turn.squares else -1 for token in answer_ids
            ]
            # what is looked at for a token is known where the token is predicted: one before
            places[-1] = looked[0]
            places += [*looked[1:], -1]
            is_first += [len(turn.squares) == 2 * DIGITS_PER_VALUE and place == 1 for place in range(len(answer_ids))]
            ids, labels = ids + answer_ids, labels + answer_ids
        return Written(torch.tensor(ids), torch.tensor(labels), torch.tensor(places), torch.tensor(is_first))

    def kept(self, page: Page, share: float) -> torch.Tensor:
        """Which of a page's features to keep: those of marks and a share of the others, of one view or both."""
        view = torch.zeros(SQUARES, SQUARES + 1, dtype=torch.bool)
        for square in page.squares:
            view[square] = True
        kept = torch.cat([view.flatten(), torch.zeros(1, dtype=torch.bool), view.flatten()])
        kept |= torch.from_numpy(self.random.random(FEATURES) < share)
        left_out = self.random.integers(3)  # 2: neither view
        if left_out < 2:
            kept[slice(0, 156) if left_out == 0 else slice(157, FEATURES)] = False
        return kept


def number_of(square: Square) -> int:
    """A square's number among those of all pictures."""
    picture, row, column = square
    return (picture * SQUARES + row) * SQUARES + column


class Pointing(torch.nn.Module):
    """Whether the decoder's hidden states tell which square must be looked at: thrown away in the end.

    Two layers before the last at the word that the question names, one before it where the answer is predicted.
    Without it the looking up of a value's row is learned late or not at all.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.picture = torch.nn.Linear(hidden_size, 4)
        self.row, self.column = (torch.nn.Linear(hidden_size, SQUARES) for _ in range(2))

    def forward(self, states: Sequence[torch.Tensor], places: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            states: of every layer, (batch, seq, hidden) each, the embeddings first.
            places: (batch, seq), the squares' numbers, or -1.
            is_answer: (batch, seq), where a token of an answer is predicted.
        """
        states = torch.where(is_answer[..., None], states[-2], states[-3])[places >= 0]
        states = F.rms_norm(states, states.shape[-1:])
        places = places[places >= 0]
        rows = places // SQUARES
        losses = (
            F.cross_entropy(self.picture(states), rows // SQUARES),
            F.cross_entropy(self.row(states), rows % SQUARES),
            F.cross_entropy(self.column(states), places % SQUARES),
        )
        return torch.stack(losses).sum()


def answer_loss(
    model: Phi3VForCausalLM,
    features: torch.Tensor,
    lessons: list[Lesson],
    writer: Writer,
    pointing: Pointing,
    kept_share: float = 1.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of lessons of one kind: of what tells (numbers, yes, no), of the answers' other tokens, of pointing.

    Args:
        features: (pages of all lessons, 313, hidden).
        kept_share: how many of the features that show nothing the decoder sees; the others are left
            out of its input, with everything else at the positions where it would be.

    Returns:
        The loss; the accuracy on what tells, and on the first figures of values alone, from which the others follow.
    """
    columns, first = [], 0
    for lesson in lessons:
        written = writer.write(lesson)
        is_image = written.ids == writer.image_token_id
        sources = torch.full_like(written.ids, -1)
        sources[is_image] = first * FEATURES + torch.arange(int(is_image.sum()))
        first += len(lesson.pages)
        kept = torch.ones_like(is_image)
        if kept_share < 1:
            kept[is_image] = torch.cat([writer.kept(page, kept_share) for page in lesson.pages])
        tensors = (written.ids, written.labels, written.places, written.is_first, sources, torch.arange(len(kept)))
        columns.append([one[kept] for one in tensors])
    padding = (0, IGNORED_LABEL, -1, False, -1, 0)
    ids, labels, places, is_first, sources, positions = (
        pad_sequence(rows, batch_first=True, padding_value=value)
        for rows, value in zip(zip(*columns, strict=True), padding, strict=True)
    )
    is_feature = (sources >= 0)[..., None]
    embeds = torch.where(is_feature, features.flatten(0, 1)[sources.clamp(min=0)], model.model.embed_tokens(ids))
    # a mask of its own: from positions with gaps transformers would guess packed sequences
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    output = model.model(
        inputs_embeds=embeds,
        attention_mask=mask.expand(len(ids), -1, -1, -1),
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
    )
    is_target = labels[:, 1:] != IGNORED_LABEL
    logits, targets = model.lm_head(output.last_hidden_state[:, :-1][is_target]), labels[:, 1:][is_target]
    is_content = torch.isin(targets, torch.tensor(sorted(writer.content_ids)))
    is_right = (logits.argmax(-1) == targets).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    loss = losses[is_content].mean() + losses[~is_content].mean()
    if (places >= 0).any():
        is_answer = F.pad(is_target, (0, 1))
        loss = loss + POINTING_SHARE * pointing(output.hidden_states, places, is_answer)
    measured = {"accuracy": is_right[is_content].mean().item()}
    if is_first.any():
        measured["first"] = is_right[is_first[:, 1:][is_target]].mean().item()
    return loss, measured


# ---------------------------------------------------------------------------------------------------- stages

# The features are to be about as long as token embeddings; for sharp predictions this makes up for it.
LOGIT_SCALE = 8.0
NAMING_SHARE = 0.3  # of the first stage's loss in the last one
POINTING_SHARE = 0.3
POOL = 192  # lessons whose features are made at once in the second stage
REUSE = 6  # times each is seen
MOST_LINES = 6
GOOD = 0.9  # accuracy on the first figures at which forms get a line more
# kinds of lessons, and their shares while forms still get longer and after
KINDS = {"form": (0.6, 0.15), "place": (0.1, 0.15), "property": (0.15, 0.3), "comparison": (0.15, 0.4)}


@dataclass(frozen=True)
class Stage:
    """Steps of one kind, each of so many lessons; in the last stage of as many as have so many pages."""

    name: str
    steps: int
    lessons: int
    learning_rate: float


STAGES = (
    Stage("see", steps=600, lessons=8, learning_rate=2e-3),
    Stage("skim", steps=2200, lessons=32, learning_rate=2e-3),
    Stage("read", steps=240, lessons=16, learning_rate=5e-4),
)


class Pretraining:
    """The state of one stage; it begins with the weights that the stage before wrote to the folder."""

    def __init__(self, folder: Path, stage: Stage, seed: int) -> None:
        torch.manual_seed(seed)
        number = STAGES.index(stage)
        tokenizer = build_tokenizer()
        self.folder, self.stage, self.token_ids = folder, stage, tokenizer.get_vocab()
        self.random = np.random.default_rng([seed, 1 + number])
        self.model = build_model(build_config(self.token_ids, tokenizer.get_vocab_size()))
        self.naming, self.pointing = Naming(self.model, self.token_ids), Pointing(self.model.config.hidden_size)
        if number:
            self.model.load_state_dict(Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
        else:
            # transformers chooses the kind of tokenizer by config.json, so that is written first
            write_checkpoint(self.model, folder)
        processor = Phi3VProcessor.from_pretrained(folder)
        self.writer = Writer(processor.tokenizer, processor.image_token_id, self.random)
        self.most_lines = MOST_LINES if stage.name == "read" else 1
        self.pools: dict[str, tuple[list[Lesson], list[torch.Tensor], int]] = {}

    def run(self, scale: float) -> list[dict[str, Any]]:
        """Do the stage's steps, or a share of them, and write the checkpoint.

        Returns:
            The log.
        """
        stage, log = self.stage, []
        steps, start, averages = max(1, round(stage.steps * scale)), time.time(), {}
        weights = [pair for part in (self.model, self.naming, self.pointing) for pair in part.named_parameters()]
        weights = [weight for name, weight in weights if stage.name != "skim" or "vision_embed_tokens" not in name]
        optimizer = torch.optim.AdamW(weights, lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        for step in range(1, steps + 1):
            rate = min(1, step / 100) * max(0.03, min(1, 2 * (1 - step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * rate
            loss, measured = getattr(self, stage.name)(stage.lessons)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            for name, value in measured.items():
                averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
            if averages.get("first", 0) > GOOD and self.most_lines < MOST_LINES:
                self.most_lines += 1
                averages["first"] = 0.5
                self.pools.pop("form", None)
            if step % 50 == 0 or step == steps:
                entry = {"stage": stage.name, "step": step, "seconds": round(time.time() - start, 1)}
                entry |= {name: round(value, 4) for name, value in averages.items()}
                log.append(entry | {"lines": self.most_lines})
                print(log[-1], flush=True)
        write_checkpoint(self.model, self.folder)
        return log

    def lesson(self, kind: str) -> Lesson:
        """A new one."""
        if kind == "form":
            return form_lesson(self.random, min(3, self.most_lines), self.most_lines)
        makers = {"place": place_lesson, "property": property_lesson, "comparison": comparison_lesson}
        lesson = makers[kind](self.random)
        lesson.turns.append(echo(self.random))
        return lesson

    def kind(self) -> str:
        """Of a step's lessons: only forms of few lines in the beginning."""
        if self.most_lines < 3:
            return "form"
        shares = [share[self.most_lines == MOST_LINES] for share in KINDS.values()]
        return str(self.random.choice(list(KINDS), p=shares))

    def see(self, count: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The tower and the projection learn to name what stands where."""
        pages = [
            practice_sheet(self.random) if self.random.random() < 0.8 else form_lesson(self.random).pages[0]
            for _ in range(count)
        ]
        loss, accuracy = self.naming(self.model, encode_views(self.model, pages), pages)
        return loss, {"named": accuracy}

    def skim(self, count: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The decoder learns to answer, from features that are made once for several steps."""
        kind = self.kind()
        lessons, features, uses = self.pools.get(kind, ([], [], 0))
        if uses == 0:
            lessons = [self.lesson(kind) for _ in range(POOL)]
            with torch.no_grad():
                features = [encode_views(self.model, lesson.pages) for lesson in lessons]
            uses = REUSE * POOL // count
        self.pools[kind] = lessons, features, uses - 1
        chosen = self.random.integers(len(lessons), size=count)
        picked = [lessons[number] for number in chosen]
        for lesson in picked:
            self.random.shuffle(lesson.turns)
        chosen_features = torch.cat([features[number] for number in chosen])
        loss, measured = answer_loss(self.model, chosen_features, picked, self.writer, self.pointing, kept_share=0.03)
        return loss, {kind: measured.pop("accuracy"), **measured}

    def read(self, count: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The whole model on whole pages, as it is used afterwards."""
        kind = self.kind()
        lessons, pages = [], []
        while len(pages) < count:  # a step takes as long whatever its kind
            lessons.append(self.lesson(kind))
            pages += lessons[-1].pages
        features = encode_views(self.model, pages)
        naming_loss, named = self.naming(self.model, features, pages)
        loss, measured = answer_loss(self.model, features, lessons, self.writer, self.pointing)
        return loss + NAMING_SHARE * naming_loss, {kind: measured.pop("accuracy"), "named": named, **measured}


def pretrain(
    folder: Path, seed: int = 0, scale: float = 1.0, threads: int = 2, only: Sequence[str] | None = None
) -> Path:
    """Make the checkpoint.

    Args:
        folder: to write to.
        seed: of the weights and the pages.
        scale: share of the steps to do.
        threads: of the processor, to compute with; the exact weights depend on it.
        only: names of the stages to do, on what the one before the first of them left in the folder; else all.

    Returns:
        The folder, with the log in `pretraining.json`.
    """
    torch.set_num_threads(threads)
    folder = Path(folder)
    file, names = folder / "pretraining.json", [stage.name for stage in STAGES]
    log = json.loads(file.read_text())["log"] if only and file.exists() else []
    for stage in STAGES:
        if only and stage.name not in only:
            continue
        log = [entry for entry in log if names.index(entry["stage"]) < names.index(stage.name)]
        log += Pretraining(folder, stage, seed).run(scale)
        record = {
            "command": f"python -m common.demo_pretrain --seed {seed} --scale {scale} --threads {threads}",
            "seed": seed,
            "torch": torch.__version__,
            "stages": [asdict(stage) for stage in STAGES],
            "log": log,
        }
        file.write_text(json.dumps(record, indent=1) + "\n")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m common.demo_pretrain",
        description="Make the built-in checkpoint anew.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the pages")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps to do, to try it out")
    parser.add_argument("--threads", type=int, default=2, help="processor threads to compute with")
    parser.add_argument(
        "--only", nargs="+", choices=[stage.name for stage in STAGES], help="stages to do, on what is in the folder"
    )
    options = parser.parse_args(arguments)
    pretrain(options.out, options.seed, options.scale, options.threads, options.only)


if __name__ == "__main__":
    main()
