"""Makes the built-in checkpoint (`common/demo_checkpoint`): a small tokenizer, a small model, and its pre-training.

The model learns one thing, to transcribe the fields of a page; it never meets a question. Three stages:

1. `see`: the tower and the projection learn to name what has its centre in each 28 x 28 square of a page.
2. `skim`: the decoder learns to write the transcription. Most empty squares are left out of its input,
   with everything else at the positions where it would be, so that a step is several times cheaper.
3. `read`: the whole model on whole pages, as it is used afterwards.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig

from .demo import (
    LABELS,
    PAGE_SIDE,
    Mark,
    Page,
    Style,
    digit_scans,
    draw_digit,
    draw_page,
    draw_word,
    random_document,
    random_value,
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
why will with word words write writing written year yes you your zero hateful meme answer short left-hand right-hand
upwards downwards leftwards rightwards up-left down-right Answer Are Baby Classify Compare Crawling Describe Do Does
How In Is Look No None Please Read The These This Transcribe True False Was What When Where Which Who Why Write Yes
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
        sliding_window=262144,
        tie_word_embeddings=False,
        bos_token_id=processor_ids["<s>"],
        eos_token_id=processor_ids["</s>"],
        pad_token_id=processor_ids[ENDOFTEXT],
        image_token_id=processor_ids[IMAGE],
        img_processor={"image_dim_out": TOWER["hidden_size"]},
        vision_config=TOWER,
    )


NOTHING = 0  # the token that names a square without a mark: <unk>, which no page holds
FEATURES = 313  # of a page at num_crops 1

# The last layer is not used, as in the published tower: features come from the second to last hidden state.
TOWER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}


def build_model(config: Phi3VConfig) -> Phi3VForCausalLM:
    """A model with random weights, but for two places where random weights take long to become useful.

    The tower's position embeddings are sines of row and column, and its filters the slow waves of a
    cosine transform of the picture's brightness.
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


# -------------------------------------------------------------------------------------------------- pages


def varied_page(random: np.random.Generator, scans: dict[int, np.ndarray]) -> Page:
    """A page unlike the documents: other sizes, contrasts, lengths, also without labels."""
    while True:
        height = int(np.exp(random.uniform(np.log(24), np.log(100))))
        dark = random.random() < 0.3
        paper, ink = random.integers(200, 256, size=3), random.integers(0, 110, size=3)
        if dark:
            paper, ink = 255 - paper, 255 - ink
        shades = [tuple(int(shade) for shade in colour) for colour in (paper, ink)]
        style = Style(
            digit_height=height,
            digit_pitch=max(1.0, height / 32) * random.uniform(34, 46),
            label_size=int(random.integers(20, 34)),
            paper=shades[0],
            ink=shades[1],
            print_ink=shades[1],
        )
        labels = random.permutation(LABELS)[: random.integers(1, 7)]
        has_labels, length = random.random() < 0.7, random.integers(1, 7)
        lines = [(str(label) if has_labels else "", random_value(random, length)) for label in labels]
        try:
            return draw_page(random, scans, lines, style)
        except ValueError:  # does not fit: another one
            continue


def practice_sheet(random: np.random.Generator, scans: dict[int, np.ndarray]) -> Page:
    """A page as full as can be, for the first stage: much to see at once."""
    style = Style(ink=tuple(int(shade) for shade in random.integers((0, 0, 20), (60, 60, 120))))
    picture = Image.new("RGB", (PAGE_SIDE, PAGE_SIDE), (255, 255, 255))
    marks, top = [], random.uniform(2, 30)
    while top + 40 < PAGE_SIDE:
        left = random.uniform(2, 40)
        while left + 120 < PAGE_SIDE:
            name = str(random.choice(LABELS)) if random.random() < 0.15 else str(random.integers(10))
            place = (round(left), round(top + random.uniform(0, 4)))
            if name.isdigit():
                mask = draw_digit(random, scans, int(name), style.digit_height)
                picture.paste(style.ink, place, mask)
            else:
                mask = draw_word(name, style.label_size)
                picture.paste(style.print_ink, place, mask)
            marks.append(Mark(name, (*place, place[0] + mask.width, place[1] + mask.height)))
            left += mask.width + random.uniform(6, 24)
        top += random.uniform(38, 52)
    return Page(picture, (), (tuple(marks),))


@dataclass
class Example:
    """A page, ready to learn from.

    pixels: uint8 (3, 336, 336); cells: the token whose mark has its centre in each of the 144
    squares (0: none); is_covered: the squares that a mark touches; lines: see `Page`.
    """

    pixels: torch.Tensor
    cells: torch.Tensor
    is_covered: torch.Tensor
    lines: tuple[tuple[str, str], ...]


class Examples(IterableDataset):
    """Endless pages, different ones for every seed."""

    def __init__(self, seed: int | list[int], token_ids: dict[str, int], varied: float, sheets: float = 0.0) -> None:
        self.seed, self.token_ids, self.varied, self.sheets = seed, token_ids, varied, sheets

    def __iter__(self) -> Iterator[Example]:
        random = np.random.default_rng(self.seed)
        scans = digit_scans("train")
        while True:
            chance = random.random()
            make = practice_sheet if chance < self.sheets else random_document
            if chance > 1 - self.varied:
                make = varied_page
            yield self.prepare(make(random, scans))

    def prepare(self, page: Page) -> Example:
        picture = page.picture.resize((336, 336), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        cells, is_covered = np.zeros((12, 12), dtype=np.int64), np.zeros((12, 12), dtype=bool)
        for marks in page.line_marks:
            for mark in marks:
                left, top, right, bottom = (edge * 12 / PAGE_SIDE for edge in mark.box)
                name = mark.text if mark.text.isdigit() else f"▁{mark.text}"
                cells[min(int((top + bottom) / 2), 11), min(int((left + right) / 2), 11)] = self.token_ids[name]
                is_covered[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = True
        return Example(pixels, torch.from_numpy(cells).flatten(), torch.from_numpy(is_covered).flatten(), page.lines)


def normalise(batch: list[Example]) -> torch.Tensor:
    """(pages, 3, 336, 336), as the image processor makes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = torch.stack([example.pixels for example in batch]).to(torch.float32)
    return pixels.div_(255).sub_(mean).div_(std)


# ------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """Steps of one kind. `pages` are those of a step; `shares` of practice sheets and of varied pages."""

    name: str
    steps: int
    pages: int
    learning_rate: float
    sheets: float = 0.0
    varied: float = 0.2
    kept_share: float = 1.0


STAGES = (
    Stage("see", steps=3000, pages=8, learning_rate=2e-3, sheets=0.7, varied=0.15),
    Stage("copy", steps=1500, pages=32, learning_rate=1e-3, kept_share=0.0),
    Stage("skim", steps=1500, pages=16, learning_rate=1e-3, kept_share=0.08),
    Stage("read", steps=300, pages=16, learning_rate=4e-4),
)
# The features are to be about as long as token embeddings; for sharp predictions this makes up for it.
LOGIT_SCALE = 8.0
CELL_LOSS_SHARE = 0.3  # of the first stage's loss in the later ones
MOST_LINES = 6


def encode_views(model: Phi3VForCausalLM, pixels: torch.Tensor) -> torch.Tensor:
    """(pages, 3, 336, 336) -> (pages, 313, hidden).

    At num_crops 1 the sub-image and the global view are the same, so each page is encoded once.
    """
    vision = model.model.vision_embed_tokens
    merged = merge_patches(vision.img_processor(pixels))  # (pages, 12, 12, 4 * width)
    row_ends = vision.sub_GN.expand(*merged.shape[:2], 1, -1)
    view = vision.img_projection(torch.cat([merged, row_ends], dim=2)).flatten(1, 2)  # (pages, 156, hidden)
    separator = vision.img_projection(vision.glb_GN).expand(view.shape[0], 1, -1)
    return torch.cat([view, separator, view], dim=1)


def square_features(features: torch.Tensor) -> torch.Tensor:
    """(pages, 313, hidden) -> (pages, 144, hidden): the first view's squares, without the ends of rows."""
    return features[:, :156].unflatten(1, (12, 13))[:, :, :12].flatten(1, 2)


def cell_loss(model: Phi3VForCausalLM, features: torch.Tensor, batch: list[Example]) -> tuple[torch.Tensor, float]:
    """How well the features name the marks, by the token embeddings; and the accuracy on marks."""
    cells = torch.stack([example.cells for example in batch])  # (pages, 144)
    is_covered = torch.stack([example.is_covered for example in batch])
    logits = LOGIT_SCALE * square_features(features) @ model.model.embed_tokens.weight.T
    losses = F.cross_entropy(logits.flatten(0, 1), cells.flatten(), reduction="none").view_as(cells)
    is_mark = cells != NOTHING
    groups = (losses[is_mark], losses[is_covered & ~is_mark], losses[~is_covered])
    loss = torch.stack([group.mean() for group in groups if len(group)]).sum()
    return loss, (logits.argmax(-1) == cells)[is_mark].float().mean().item()


class Imagined:
    """Stands in for the tower in the second stage: features of pages that were never drawn.

    A square's feature is the mean of the tower's features for what is in it, and noise as strong as
    the tower's features vary.
    """

    @torch.no_grad()
    def __init__(self, model: Phi3VForCausalLM, examples: list[Example], token_ids: dict[str, int]) -> None:
        self.token_ids = token_ids
        features = square_features(encode_views(model, normalise(examples)))
        cells = torch.stack([example.cells for example in examples])
        self.means = torch.zeros(model.config.vocab_size, features.shape[-1])
        for token in cells.unique().tolist():
            self.means[token] = features[cells == token].mean(0)
        self.spread = (features - self.means[cells])[cells != NOTHING].std()

    def example(self, random: np.random.Generator, most_lines: int) -> Example:
        """One to `most_lines` lines of a label and four digits, in the squares of a page."""
        cells = torch.zeros(12, 12, dtype=torch.long)
        num_lines = random.integers(1, most_lines + 1)
        left, rows = random.integers(4), np.sort(random.permutation(12)[:num_lines])
        first_digit = left + random.integers(2, 6 if left < 3 else 5)
        lines = [(str(label), random_value(random)) for label in random.permutation(LABELS)[:num_lines]]
        for row, (label, value) in zip(rows, lines, strict=True):
            cells[row, left] = self.token_ids[f"▁{label}"]
            cells[row, first_digit : first_digit + 4] = torch.tensor([self.token_ids[digit] for digit in value])
        return Example(torch.empty(0), cells.flatten(), cells.flatten() != NOTHING, tuple(lines))

    def features(self, batch: list[Example]) -> torch.Tensor:
        """As `encode_views`."""
        view = F.pad(torch.stack([example.cells for example in batch]).unflatten(1, (12, 12)), (0, 1)).flatten(1)
        features = self.means[torch.cat([view, view.new_full((len(batch), 1), NOTHING), view], dim=1)]
        return features + self.spread * torch.randn_like(features)


@dataclass(frozen=True)
class Form:
    """A way to transcribe: what asks for it, and how a line is written."""

    prompt: str
    template: str

    def line(self, label: str, value: str) -> str:
        """A label and its value in this form; a value without a label stands alone."""
        if not label:
            return value
        return self.template.format(Label=label, label=label.lower(), value=value)


# All write the label and then its value, at various distances.
FORMS = (
    Form("Transcribe the fields", "{Label} {value}"),
    Form("Transcribe the fields with points", "{Label}: {value}"),
    Form("Write the fields as statements", "The {label} number is {value}"),
    Form("Describe the lines of the page", "In the {label} line of the page the digits are {value}"),
    Form("Describe the page", "The page has {label} and beside it in the same line there is a number, {value}"),
    Form("Read the page", "Look at {label}. Please read the digits beside it.\n{value}"),
)
FORM_SHARES = (0.3, 0.14, 0.14, 0.14, 0.14, 0.14)


class Writer:
    """Turns pages into the token ids of a prompt and its transcription."""

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self.tokenizer, self.image_token_id = tokenizer, image_token_id
        self.digit_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))

    def write(self, random: np.random.Generator, pages: list[Example]) -> tuple[list[int], list[int]]:
        """Prompt ids (313 image tokens for every page) and answer ids.

        Half of the transcriptions go from top to bottom and half in any order: then only the label
        just written says which value is next.
        """
        in_any_order = random.random() < 0.5
        form = FORMS[random.choice(len(FORMS), p=FORM_SHARES)]
        tags = "\0" * len(pages)
        what = f"{form.prompt}{' in any order' if in_any_order else ''}."
        prompt = f"<|user|>\n{tags}\n{what}{END}\n<|assistant|>\n"
        ids: list[int] = []
        for number, chunk in enumerate(prompt.split("\0")):
            ids += [self.image_token_id] * (FEATURES if number else 0) + self.tokenizer(chunk).input_ids
        lines = []
        for page in pages:
            order = random.permutation(len(page.lines)) if in_any_order else range(len(page.lines))
            lines += [form.line(*page.lines[place]) for place in order]
        answer = "\n".join(lines) + f"{END}\n{ENDOFTEXT}"
        return ids, self.tokenizer(answer, add_special_tokens=False).input_ids


def kept_features(random: np.random.Generator, page: Example, share: float) -> torch.Tensor:
    """Which of a page's features to keep: those on a mark, and a share of the others; of one view or of both."""
    view = F.pad(page.is_covered.view(12, 12), (0, 1)).flatten()
    kept = torch.cat([view, view.new_zeros(1), view])
    kept |= torch.from_numpy(random.random(FEATURES) < share)
    view_left_out = random.integers(3)  # 2: neither
    if view_left_out < 2:
        kept[slice(0, 156) if view_left_out == 0 else slice(157, FEATURES)] = False
    return kept


def transcription_loss(
    model: Phi3VForCausalLM,
    features: torch.Tensor,
    batch: list[Example],
    writer: Writer,
    random: np.random.Generator,
    pages_per_row: int = 1,
    kept_share: float = 1.0,
) -> tuple[torch.Tensor, float]:
    """The mean losses over the transcriptions' digits and over their other tokens; and the accuracy on digits.

    Args:
        features: of `encode_views`.
        pages_per_row: pages in one prompt.
        kept_share: how many of the features that show nothing the decoder sees; see `kept_features`.
    """
    decoder, columns = model.model, []
    for start in range(0, len(batch), pages_per_row):
        pages = batch[start : start + pages_per_row]
        prompt, answer = writer.write(random, pages)
        ids = torch.tensor(prompt + answer)
        labels = torch.tensor([IGNORED_LABEL] * len(prompt) + answer)
        is_image = ids == writer.image_token_id
        sources = torch.full_like(ids, -1)
        sources[is_image] = start * FEATURES + torch.arange(len(pages) * FEATURES)
        kept = torch.ones_like(is_image)
        if kept_share < 1:
            kept[is_image] = torch.cat([kept_features(random, page, kept_share) for page in pages])
        columns.append([one[kept] for one in (ids, labels, sources, torch.arange(len(ids)))])
    ids, labels, sources, places = (
        pad_sequence(rows, batch_first=True, padding_value=padding)
        for rows, padding in zip(zip(*columns, strict=True), (0, IGNORED_LABEL, -1, -1), strict=True)
    )
    embeds = torch.where(
        (sources >= 0)[..., None], features.flatten(0, 1)[sources.clamp(min=0)], decoder.embed_tokens(ids)
    )
    hidden = decoder(
        inputs_embeds=embeds,
        attention_mask=(places >= 0).long(),
        position_ids=places.clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    targets = labels[:, 1:]
    is_target = targets != IGNORED_LABEL
    logits, targets = model.lm_head(hidden[:, :-1][is_target]), targets[is_target]
    is_digit = torch.isin(targets, writer.digit_ids)
    accuracy = (logits.argmax(-1) == targets)[is_digit].float().mean().item()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses[is_digit].mean() + losses[~is_digit].mean(), accuracy


class Pretraining:
    """The state of a run: the model, and the log that lies beside it in the end."""

    def __init__(self, folder: Path, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        self.folder, self.seed, self.scale, self.token_ids = folder, seed, scale, tokenizer.get_vocab()
        self.model = build_model(build_config(self.token_ids, tokenizer.get_vocab_size()))
        # transformers chooses the kind of tokenizer by config.json, so that is written first
        write_checkpoint(self.model, folder)
        processor = Phi3VProcessor.from_pretrained(folder)
        self.writer = Writer(processor.tokenizer, processor.image_token_id)
        self.random = np.random.default_rng([seed, 1])
        self.log: list[dict[str, Any]] = []

    def run(self, stage: Stage) -> None:
        """Do the steps of a stage."""
        model, steps = self.model, max(1, round(stage.steps * self.scale))
        weights = [
            weight
            for name, weight in model.named_parameters()
            if not (stage.name == "copy" and "vision_embed_tokens" in name)
        ]
        optimizer = torch.optim.AdamW(weights, lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        batches = self.batches(stage)
        imagined = None
        if stage.name == "copy":
            sheets = Examples(self.seed, self.token_ids, varied=0, sheets=0.7)
            imagined = Imagined(model, list(itertools.islice(sheets, 64)), self.token_ids)
        most_lines, start, averages = 1, time.time(), {}
        for step in range(1, steps + 1):
            rate = min(1, step / 100) * max(0.03, min(1, 2 * (1 - step / steps)) if imagined else 1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * rate
            if imagined:
                batch = [imagined.example(self.random, most_lines) for _ in range(stage.pages)]
            else:
                batch = next(batches)
            loss, measured = self.loss(stage, batch, imagined)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            for name, value in measured.items():
                averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
            if imagined and averages["digit_accuracy"] > 0.9 and most_lines < MOST_LINES:
                most_lines += 1
                averages["digit_accuracy"] = 0.5
            if step % 50 == 0 or step == steps:
                entry = {"stage": stage.name, "step": step, "seconds": round(time.time() - start, 1)}
                entry |= {name: round(value, 4) for name, value in averages.items()}
                self.log.append(entry)
                print(entry, flush=True)
        write_checkpoint(model, self.folder)

    def batches(self, stage: Stage) -> Iterator[list[Example]]:
        """Pages of the stage's kinds, drawn by another process."""
        examples = Examples([self.seed, *stage.name.encode()], self.token_ids, stage.varied, stage.sheets)
        return iter(DataLoader(examples, batch_size=stage.pages, num_workers=1, collate_fn=list, prefetch_factor=4))

    def loss(
        self, stage: Stage, batch: list[Example], imagined: Imagined | None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a step, and what to report of it."""
        if imagined:
            features, seen = imagined.features(batch), None
        else:
            features = encode_views(self.model, normalise(batch))
            seen, cell_accuracy = cell_loss(self.model, features, batch)
            if stage.name == "see":
                return seen, {"cell_accuracy": cell_accuracy}
        # now and then two or four pages in one prompt
        pages_per_row = int(self.random.choice([1, 2, 4], p=[0.85, 0.1, 0.05])) if seen is not None else 1
        written, digit_accuracy = transcription_loss(
            self.model, features, batch, self.writer, self.random, pages_per_row, stage.kept_share
        )
        measured = {"loss": written.item(), "digit_accuracy": digit_accuracy}
        return (written if seen is None else written + CELL_LOSS_SHARE * seen), measured


def pretrain(folder: Path, seed: int = 0, scale: float = 1.0, threads: int = 2) -> Path:
    """Make the checkpoint.

    Args:
        folder: to write to.
        seed: of the weights and the pages.
        scale: share of the steps to do.
        threads: of the processor, to compute with; the exact weights depend on it.

    Returns:
        The folder, with the log in `pretraining.json`.
    """
    torch.set_num_threads(threads)
    start, run = time.time(), Pretraining(Path(folder), seed, scale)
    for stage in STAGES:
        run.run(stage)
    record = {
        "command": f"python -m common.demo pretrain --seed {seed} --scale {scale} --threads {threads}",
        "seed": seed,
        "seconds": round(time.time() - start),
        "torch": torch.__version__,
        "stages": [asdict(stage) for stage in STAGES],
        "log": run.log,
    }
    (run.folder / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    return run.folder
