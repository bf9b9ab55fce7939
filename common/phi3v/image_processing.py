"""Image processing of Phi-3.5-vision: one picture -> a global view and a grid of sub-images.

The pixels are the reference implementation's, bit for bit: PIL's bilinear resize, white padding,
and a bicubic global view made from the normalised, padded picture. Unlike the reference there are
no padding crops: a batch holds each image's own crops and nothing else.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .configuration import with_official_repository
from .stock import BaseImageProcessor, BatchFeature, ImagesKwargs

CROP = 336  # side of a view in pixels
TOKENS_PER_SIDE = 12  # a view is 24 x 24 patches, merged two by two
AUTO_MAP = {
    "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
    "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
}
BAND = 84  # rows of pixels that are normalised and cut at once, a part of CROP; the fastest of 7, 14, 21, 28, 42 and 84
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageLayout:
    """Where a picture of a given size ends up: its resized and its padded size in pixels."""

    resized_height: int
    resized_width: int
    padded_height: int
    padded_width: int

    @property
    def num_crops(self) -> int:
        """Views: the sub-images and the global one."""
        return self.padded_height // CROP * (self.padded_width // CROP) + 1

    @property
    def num_img_tokens(self) -> int:
        """Tokens: 12 x 12 a view, one at the end of every row of tokens, one between the two parts."""
        rows, columns = self.padded_height // CROP, self.padded_width // CROP
        row_ends = (rows + 1) * TOKENS_PER_SIDE
        return (rows * columns + 1) * TOKENS_PER_SIDE**2 + row_ends + 1


def plan_layout(width: int, height: int, num_crops: int) -> ImageLayout:
    """Choose the largest grid of at most `num_crops` views that keeps the picture's proportions.

    Args:
        width, height: the picture's size in pixels.
        num_crops: the most sub-images allowed.

    Raises:
        ValueError: when the picture is so thin that a side would become 0 pixels.
    """
    long_side, short_side = max(width, height), min(width, height)
    if short_side < 1:
        raise ValueError(f"a picture of {width}x{height} pixels is empty")
    ratio = long_side / short_side
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= num_crops:
        columns += 1
    resized_long = columns * CROP
    resized_short = int(resized_long / ratio)
    if resized_short < 1:
        raise ValueError(
            f"a picture of {width}x{height} pixels is too thin: at num_crops={num_crops} its short side would "
            "become 0 pixels; crop or pad it"
        )
    padded_short = math.ceil(resized_short / CROP) * CROP
    if width >= height:
        return ImageLayout(resized_short, resized_long, padded_short, resized_long)
    return ImageLayout(resized_long, resized_short, resized_long, padded_short)


class Phi3VImagesKwargs(ImagesKwargs, total=False):
    """What `from_pretrained(..., num_crops=16)` may override."""

    num_crops: int


class Phi3VImageProcessor(BaseImageProcessor):
    """Pictures -> `pixel_values`, `image_sizes`, `num_img_tokens`.

    Args:
        num_crops: the most sub-images per picture; published: 16 for one picture, 4 for several.
        image_mean, image_std: per channel, of CLIP.
    """

    valid_kwargs = Phi3VImagesKwargs
    model_input_names = ["pixel_values", "image_sizes", "num_img_tokens"]

    def __init__(
        self,
        num_crops: int = 1,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        do_convert_rgb: bool = True,
        num_img_tokens: int = TOKENS_PER_SIDE**2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_crops < 1:
            raise ValueError(f"num_crops is {num_crops}; it must be at least 1")
        self.num_crops = num_crops
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb
        self.num_img_tokens = num_img_tokens

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds: the published fields."""
        fields = super().to_dict()
        fields["auto_map"] = with_official_repository(fields.get("auto_map") or AUTO_MAP)
        fields["processor_class"] = "Phi3VProcessor"
        return fields

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        return_tensors: str = "pt",
        num_crops: int | None = None,
    ) -> BatchFeature:
        """Process one or several pictures.

        Args:
            images: PIL images of any mode and size.
            num_crops: instead of the processor's own.

        Returns:
            `pixel_values` float32 (crops of all pictures, 3, 336, 336), per picture the global view,
            then its sub-images row by row; `image_sizes` (images, 2), the padded `[height, width]`;
            `num_img_tokens` (images,).

        Raises:
            ValueError: for a picture that is too thin or cannot be decoded, with its place in the list.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors is "{return_tensors}"; only "pt" is offered')
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        limit = self.num_crops if num_crops is None else num_crops
        if limit < 1:
            raise ValueError(f"num_crops is {limit}; it must be at least 1")
        layouts, padded = [], []
        for position, picture in enumerate(pictures):
            try:
                layouts.append(plan_layout(*picture.size, limit))
                padded.append(self.resize_and_pad(picture, layouts[-1]))
            except (ValueError, OSError, SyntaxError, RuntimeError) as error:
                name = getattr(picture, "filename", "") or f"image {position + 1} of {len(pictures)}"
                raise ValueError(f"{name}: {error}") from error
        num_crops_of_pictures = [layout.num_crops for layout in layouts]
        pixel_values = torch.empty(sum(num_crops_of_pictures), 3, CROP, CROP, dtype=torch.float32)
        for one, crops in zip(padded, pixel_values.split(num_crops_of_pictures), strict=True):
            self.cut(one, crops)
        sizes = [[layout.padded_height, layout.padded_width] for layout in layouts]
        return BatchFeature(
            {
                "pixel_values": pixel_values,
                "image_sizes": torch.tensor(sizes, dtype=torch.long).reshape(-1, 2),
                "num_img_tokens": torch.tensor([layout.num_img_tokens for layout in layouts], dtype=torch.long),
            }
        )

    def resize_and_pad(self, picture: Image.Image, layout: ImageLayout) -> np.ndarray:
        """A picture of any mode -> uint8 (3, padded height, padded width), white around it."""
        if picture.mode == "1":
            picture = picture.convert("L")
        elif picture.mode not in ("RGB", "L"):
            picture = picture.convert("RGB")
        size = (layout.resized_width, layout.resized_height)
        if picture.height > picture.width:
            # The reference turns a tall picture on its side to resize it. PIL resizes along x first,
            # so that is the picture's own y first; two passes give the same bytes without turning.
            picture = picture.resize((picture.width, size[1]), Image.Resampling.BILINEAR)
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        padded = np.full((3, layout.padded_height, layout.padded_width), 255, dtype=np.uint8)
        top = (layout.padded_height - layout.resized_height) // 2
        left = (layout.padded_width - layout.resized_width) // 2
        inside = padded[:, top : top + layout.resized_height, left : left + layout.resized_width]
        # A channel's bytes lie together: they are converted faster. A grey picture is resized once for all three.
        channels = [np.asarray(channel) for channel in picture.split()]
        for number in range(3):
            inside[number] = channels[number % len(channels)]
        return padded

    def cut(self, padded: np.ndarray, crops: torch.Tensor) -> None:
        """Normalise a padded picture, as torchvision's ToTensor and Normalize do, and cut it.

        Band by band, each written to its place while it is in the cache: the pixels are 4 bytes each, and
        whatever is done to all of them at once goes through the memory.

        Args:
            padded: uint8 (3, rows * 336, columns * 336).
            crops: float32 (1 + rows * columns, 3, 336, 336), where the global view and the sub-images, row
                by row, are written.
        """
        _, height, width = padded.shape
        columns = width // CROP
        mean = torch.tensor(self.image_mean, dtype=torch.float32)[:, None, None]
        std = torch.tensor(self.image_std, dtype=torch.float32)[:, None, None]
        source = torch.from_numpy(padded)
        pixels = _scratch.floats(3 * height * width).view(3, height, width)
        grid = crops[1:].view(-1, columns, 3, CROP, CROP)
        for top in range(0, height, BAND):
            band = pixels[:, top : top + BAND]
            band.copy_(source[:, top : top + BAND]).div_(255).sub_(mean).div_(std)
            row, inner_top = divmod(top, CROP)
            # (3, BAND, width) -> (columns, 3, BAND, 336)
            pieces = band.view(3, BAND, columns, CROP).permute(2, 0, 1, 3)
            grid[row, :, :, inner_top : inner_top + BAND] = pieces
        crops[:1] = torch.nn.functional.interpolate(pixels[None], size=(CROP, CROP), mode="bicubic")


class _Scratch(threading.local):
    """A thread's memory for the pixels of one picture after another.

    Asked for anew for every picture, it would come from the system each time and cost a page fault every 4 KB:
    together about as much as the arithmetic on it.
    """

    memory = np.empty(0, dtype=np.float32)  # NumPy's: a tensor made in inference mode could not be used outside of it

    def floats(self, count: int) -> torch.Tensor:
        """(count,) of any values, overwritten at the next call."""
        if len(self.memory) < count:
            self.memory = np.empty(count, dtype=np.float32)
        return torch.from_numpy(self.memory[:count])


_scratch = _Scratch()
