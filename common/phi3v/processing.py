"""Processor of Phi-3.5-vision: prompts with `<|image_1|>` tags and pictures -> model inputs.

The token ids are the reference implementation's: the text between two tags is tokenised on its own,
with its own BOS. Where the reference repeats `-i` for image i, `<|image|>` (id 32044) is repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .configuration import with_official_repository
from .image_processing import Phi3VImageProcessor
from .stock import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin, find_file

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
IMAGE_TOKEN = "<|image|>"
# What makes a tokenizer; saved as it was loaded, for fine-tuning never changes it and what newer
# libraries write for the same tokenizer does not load in the versions the reference runs on.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)
# Arguments that say where a file comes from; the same for both parts.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


class Phi3VProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Args:
        image_processor: a `Phi3VImageProcessor`.
        tokenizer: the checkpoint's tokenizer.
    """

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor: Phi3VImageProcessor, tokenizer: Any, **kwargs: Any) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = getattr(tokenizer, "chat_template", None)
        self.tokenizer_files: dict[str, bytes] = {}
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no {IMAGE_TOKEN} token")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Phi3VProcessor:
        """Load both parts from a checkpoint folder or hub id, without remote code.

        Keyword arguments for the image processor (`num_crops=16`) override what is stored.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        for name in ("trust_remote_code", "_from_auto", "code_revision"):
            kwargs.pop(name, None)
        path = str(pretrained_model_name_or_path)
        image_processor = Phi3VImageProcessor.from_pretrained(path, **hub, **kwargs)
        # As tokenizer.json describes it. AutoTokenizer does so only beside a config.json of this model type; elsewhere
        # it makes a LlamaTokenizer, as tokenizer_config.json says, which drops the space after a special token.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **hub)
        processor = cls(image_processor, tokenizer)
        for name in TOKENIZER_FILES:
            file = find_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
            if file is not None:
                processor.tokenizer_files[name] = Path(file).read_bytes()
        return processor

    def __call__(
        self,
        text: str | Sequence[str],
        images: Image.Image | Sequence[Image.Image] | None = None,
        return_tensors: str = "pt",
        padding_side: str = "left",
        num_crops: int | None = None,
    ) -> BatchFeature:
        """One prompt, or a batch of prompts padded to one length.

        Args:
            text: a prompt, or several, with tags `<|image_1|>` to `<|image_n|>`, each exactly once.
            images: the pictures of the prompts, in the order of their tags' numbers; for several
                prompts, one list of pictures for each.
            padding_side: "left" (for generation) or "right".
            num_crops: instead of the image processor's own.

        Returns:
            `input_ids`, `attention_mask` (batch, seq); `pixel_values` and `image_sizes` where there
            are pictures, in the order in which their tags stand in the text.

        Raises:
            ValueError: when tags and pictures do not match.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors is "{return_tensors}"; only "pt" is offered')
        single = isinstance(text, str)
        prompts = [text] if single else list(text)
        if single:
            images = [images] if isinstance(images, Image.Image) else images
            pictures_of_prompts = [list(images or ())]
        else:
            per_prompt = images or [()] * len(prompts)
            pictures_of_prompts = [[one] if isinstance(one, Image.Image) else list(one or ()) for one in per_prompt]
        if len(pictures_of_prompts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but images for {len(pictures_of_prompts)}")
        encoded = [self.encode(*pair, num_crops=num_crops) for pair in zip(prompts, pictures_of_prompts, strict=True)]
        return self.pad(encoded, padding_side=padding_side)

    def encode(
        self, text: str, images: Sequence[Image.Image], num_crops: int | None = None, first_tag: int = 1
    ) -> BatchFeature:
        """One prompt, not padded.

        Args:
            first_tag: the number of the first picture's tag, for a later turn of a conversation.

        Returns:
            `input_ids` (seq,), and with pictures `pixel_values` (crops, 3, 336, 336), `image_sizes` (images, 2).
        """
        numbers = [int(number) for number in IMAGE_TAG.findall(text)]
        if sorted(numbers) != list(range(first_tag, first_tag + len(images))):
            tags = ", ".join(f"<|image_{number}|>" for number in numbers) or "none"
            raise ValueError(
                f"the prompt has {len(numbers)} image tags ({tags}) and {len(images)} images; "
                f"tags must be numbered from {first_tag} and stand exactly once each"
            )
        # in the order of the tags, so that every tag meets its own picture's features
        features = self.image_processor([images[number - first_tag] for number in numbers], num_crops=num_crops)
        chunks = IMAGE_TAG.split(text)[::2]  # every second one is a tag's number
        input_ids: list[int] = []
        for position, chunk in enumerate(chunks):
            input_ids += self.tokenizer(chunk).input_ids
            if position < len(numbers):
                input_ids += [self.image_token_id] * int(features["num_img_tokens"][position])
        data = {"input_ids": torch.tensor(input_ids, dtype=torch.long)}
        if numbers:
            data |= {"pixel_values": features["pixel_values"], "image_sizes": features["image_sizes"]}
        return BatchFeature(data)

    def pad(self, encoded: Sequence[BatchFeature], padding_side: str = "left") -> BatchFeature:
        """Encoded prompts -> one batch; the mask comes from the lengths, for pad is also a text token."""
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side is "{padding_side}"; it must be "left" or "right"')
        longest = max(len(one["input_ids"]) for one in encoded)
        input_ids = torch.full((len(encoded), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, one in enumerate(encoded):
            length = len(one["input_ids"])
            place = slice(longest - length, longest) if padding_side == "left" else slice(0, length)
            input_ids[row, place] = one["input_ids"]
            attention_mask[row, place] = 1
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        with_images = [one for one in encoded if "pixel_values" in one]
        if with_images:
            for name in ("pixel_values", "image_sizes"):
                data[name] = torch.cat([one[name] for one in with_images])
        return BatchFeature(data)

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any:
        """The tokenizer's chat template; text by default."""
        kwargs.setdefault("tokenize", False)
        return self.tokenizer.apply_chat_template(conversation, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write the processor's and the tokenizer's files, readable by the official processor too."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.image_processor.save_pretrained(folder)
        if self.tokenizer_files:
            for name, content in self.tokenizer_files.items():
                if name == "tokenizer_config.json":
                    fields = json.loads(content)
                    if "auto_map" in fields:
                        fields["auto_map"] = with_official_repository(fields["auto_map"])
                    content = json.dumps(fields, indent=2).encode() + b"\n"
                (folder / name).write_bytes(content)
        else:
            self.tokenizer.save_pretrained(folder)
        auto_map = with_official_repository({"AutoProcessor": "processing_phi3_v.Phi3VProcessor"})
        processor_fields = {"auto_map": auto_map, "processor_class": "Phi3VProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(processor_fields, indent=2) + "\n")
        return [str(path) for path in sorted(folder.iterdir())]
