"""Pictures of every kind -> crops. The golden pixels are compared in `test_parity.py`.

Two pictures with the same RGB pixels go through the same float32 operations, so whatever is
compared here is compared bit for bit.
"""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.phi3v import Phi3VImageProcessor, image_processing
from common.phi3v.image_processing import CLIP_MEAN, CLIP_STD, plan_layout
from tests.model_helpers import picture

NAMES = ("pixel_values", "image_sizes", "num_img_tokens")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture without any symmetry: a flip, a shift or a turn changes nearly every pixel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")


def assert_same(found, wanted) -> None:
    for name in NAMES:
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name], wanted[name]), name


# Modes


def in_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        values = np.random.default_rng(1).integers(0, 65536, (40, 60), dtype=np.uint16)
        return Image.frombytes("I;16", (60, 40), values.astype("<u2").tobytes())
    source = noise(60, 40)
    if mode in ("RGBA", "LA"):
        source.putalpha(Image.fromarray(np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)))
    return source.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "I;16", "I", "F", "1"])
def test_mode(mode: str) -> None:
    """A picture of any mode counts as PIL's own conversion to RGB: transparency and depth included."""
    source = in_mode(mode)
    assert source.mode == mode
    before = source.tobytes()
    processor = Phi3VImageProcessor(num_crops=4)
    assert_same(processor(source), processor(source.convert("RGB")))
    assert (source.mode, source.tobytes()) == (mode, before), "the caller's picture was changed"


@pytest.mark.parametrize("size", [(500, 900), (900, 500)])
def test_grey_picture(size: tuple[int, int]) -> None:
    """Resized as one channel, it has the pixels of the three equal ones; tall and wide, made smaller."""
    grey = noise(*size).convert("L")
    processor = Phi3VImageProcessor(num_crops=2)
    assert_same(processor(grey), processor(grey.convert("RGB")))


def test_pictures_one_after_another_leave_each_other_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's memory is used again: what a large picture left there is not seen, and what was returned stays."""
    processor = Phi3VImageProcessor(num_crops=4)
    large, small = noise(900, 700), noise(700, 250)
    alone = processor(small)
    monkeypatch.setattr(image_processing, "_scratch", image_processing._Scratch())
    with torch.inference_mode():
        first = processor(large)  # makes the memory
    kept = {name: tensor.clone() for name, tensor in first.items()}
    assert_same(processor(small), alone)
    assert_same(first, kept)
    assert_same(processor(large), kept)


def test_threads_do_not_share_their_memory() -> None:
    with ThreadPoolExecutor(2) as threads:
        both_at_once = threading.Barrier(2)

        def address(_: int) -> int:
            memory = image_processing._scratch.floats(100)
            both_at_once.wait(timeout=60)
            return memory.data_ptr()

        first, second = threads.map(address, range(2))
    assert first != second


def test_transparent_palette() -> None:
    source = in_mode("P")
    source.info["transparency"] = 3
    processor = Phi3VImageProcessor(num_crops=1)
    assert_same(processor(source), processor(source.convert("RGB")))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_left_alone(orientation: int, tmp_path: Path) -> None:
    """A photograph's note to turn it is not heeded, as in the reference."""
    path = tmp_path / "photograph.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(90, 60).save(path, exif=exif)
    plain = Image.open(path).convert("RGB")
    assert plain.size == (90, 60)
    plain.info.clear()
    processor = Phi3VImageProcessor(num_crops=4)
    with Image.open(path) as photograph:
        assert photograph.getexif()[0x0112] == orientation
        assert_same(processor(photograph), processor(plain))


# Pictures that cannot be used


@pytest.mark.parametrize(("width", "height", "num_crops"), [(6000, 1, 16), (1, 6000, 16), (337, 1, 1), (1, 700, 1)])
def test_too_thin(width: int, height: int, num_crops: int) -> None:
    pictures = [noise(10, 10), Image.new("RGB", (width, height)), noise(10, 10)]
    with pytest.raises(ValueError, match=rf"image 2 of 3: a picture of {width}x{height} pixels is too thin"):
        Phi3VImageProcessor(num_crops=num_crops)(pictures)


def test_just_thick_enough() -> None:
    """The thinnest picture that leaves one row of pixels is still taken."""
    features = Phi3VImageProcessor(num_crops=1)(Image.new("RGB", (336, 1)))
    assert features["image_sizes"].tolist() == [[336, 336]]


def test_empty() -> None:
    with pytest.raises(ValueError, match="image 1 of 1: a picture of 0x5 pixels is empty"):
        Phi3VImageProcessor()(Image.new("RGB", (0, 5)))


def test_too_thin_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (3000, 1)).save(path)
    with Image.open(path) as source, pytest.raises(ValueError, match=r"line\.png: .*3000x1 pixels is too thin"):
        Phi3VImageProcessor(num_crops=4)(source)


FORMATS = [("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("tiff", "TIFF"), ("bmp", "BMP"), ("ppm", "PPM")]


@pytest.mark.parametrize(("ending", "name"), FORMATS)
def test_truncated_file_is_named(ending: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"torn.{ending}"
    stream = io.BytesIO()
    noise(80, 60).save(stream, name)
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) * 2 // 3])
    with Image.open(path) as source, pytest.raises(ValueError, match=rf"torn\.{ending}: "):
        Phi3VImageProcessor()([noise(5, 5), source])


@pytest.mark.parametrize(("ending", "name"), FORMATS)
def test_truncated_picture_without_a_name(ending: str, name: str) -> None:
    """From memory there is no file name: the picture's place in the list is named."""
    stream = io.BytesIO()
    noise(80, 60).save(stream, name)
    torn = Image.open(io.BytesIO(stream.getvalue()[: len(stream.getvalue()) * 2 // 3]))
    with pytest.raises(ValueError, match="image 2 of 3: "):
        Phi3VImageProcessor()([noise(5, 5), torn, noise(5, 5)])


DAMAGED_FORMATS = ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "AVIF"]


@given(name=st.sampled_from(DAMAGED_FORMATS), place=st.floats(0, 1, exclude_max=True), is_cut=st.booleans())
@example(name="AVIF", place=0.226, is_cut=False)
def test_damaged_files_raise_nothing_else(name: str, place: float, is_cut: bool) -> None:
    """Wherever a file is cut or a byte is wrong: pixels, or a ValueError with the picture's place."""
    stream = io.BytesIO()
    try:
        noise(40, 30).save(stream, name)
    except (KeyError, OSError):  # a PIL built without this format
        return
    data = bytearray(stream.getvalue())
    position = int(place * len(data))
    if is_cut:
        data = data[:position]
    else:
        data[position] ^= 0xFF
    try:
        damaged = Image.open(io.BytesIO(data))
        layout = plan_layout(*damaged.size, 1)
    except Exception:  # not ours: the picture could not even be opened, or its damaged size is absurd
        return
    if layout.padded_height * layout.padded_width > 336 * 336 or damaged.width * damaged.height > 10_000:
        return
    try:
        features = Phi3VImageProcessor(num_crops=1)(damaged)
    except ValueError as error:
        assert str(error).startswith("image 1 of 1: ")  # noqa: PT017
    else:
        assert features["pixel_values"].isfinite().all()


# The reference's way


def reference_pixels(source: Image.Image, num_crops: int) -> tuple[torch.Tensor, list[int]] | None:
    """One picture as the published code treats it, written with the same calls of PIL and torchvision.

    A tall picture is transposed, treated as a wide one, and transposed back. None where a side
    would become 0 pixels.
    """
    source = source.convert("RGB")
    is_tall = source.width < source.height
    if is_tall:
        source = source.transpose(Image.Transpose.TRANSPOSE)
    ratio = source.width / source.height
    scale = 1
    while scale * np.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    new_width = int(scale * 336)
    new_height = int(new_width / ratio)
    if new_height < 1:
        return None
    resized = vision.resize(source, [new_height, new_width])
    target = int(np.ceil(new_height / 336) * 336)
    top = int((target - new_height) / 2)
    padded = vision.pad(resized, [0, top, 0, target - new_height - top], fill=[255, 255, 255])
    if is_tall:
        padded = padded.transpose(Image.Transpose.TRANSPOSE)
    pixels = vision.normalize(vision.to_tensor(padded), CLIP_MEAN, CLIP_STD)
    height, width = pixels.shape[1:]
    global_view = torch.nn.functional.interpolate(pixels[None].float(), size=(336, 336), mode="bicubic")
    sub_images = (
        pixels.reshape(1, 3, height // 336, 336, width // 336, 336)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(-1, 3, 336, 336)
        .contiguous()
    )
    return torch.cat([global_view, sub_images]), [height, width]


@settings(max_examples=40)
@given(
    width=st.integers(1, 900), height=st.integers(1, 900), num_crops=st.integers(1, 16), seed=st.integers(0, 2**32 - 1)
)
@example(width=300, height=500, num_crops=4, seed=0)
@example(width=500, height=300, num_crops=4, seed=0)
@example(width=1, height=40, num_crops=16, seed=0)
@example(width=1, height=700, num_crops=2, seed=0)
@example(width=7, height=900, num_crops=3, seed=0)
@example(width=336, height=337, num_crops=16, seed=0)
def test_any_size_is_as_in_the_reference(width: int, height: int, num_crops: int, seed: int) -> None:
    """Tall, wide and square pictures, larger and smaller than their grid: bit for bit."""
    source = noise(width, height, seed)
    wanted = reference_pixels(source, num_crops)
    if wanted is None:
        with pytest.raises(ValueError, match="too thin"):
            Phi3VImageProcessor(num_crops=num_crops)(source)
        return
    wanted_pixels, wanted_size = wanted
    features = Phi3VImageProcessor(num_crops=num_crops)(source)
    assert features["image_sizes"].tolist() == [wanted_size]
    assert torch.equal(features["pixel_values"], wanted_pixels)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), num_crops=st.integers(1, 64))
def test_layout(width: int, height: int, num_crops: int) -> None:
    """Never more sub-images than allowed, never a picture larger than its canvas, the shape kept."""
    try:
        layout = plan_layout(width, height, num_crops)
    except ValueError:
        assert max(width, height) > num_crops * 336 * min(width, height)
        return
    assert layout.num_crops - 1 <= num_crops
    assert layout.padded_height % 336 == layout.padded_width % 336 == 0
    assert 0 <= layout.padded_height - layout.resized_height < 336
    assert 0 <= layout.padded_width - layout.resized_width < 336
    turned = plan_layout(height, width, num_crops)
    assert (turned.resized_height, turned.resized_width) == (layout.resized_width, layout.resized_height)
    assert turned.num_crops == layout.num_crops
    rows, columns = layout.padded_height // 336, layout.padded_width // 336
    assert layout.num_img_tokens == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12  # the published formula


def test_padding_is_white() -> None:
    """What is added around a picture is white after normalisation, above and below alike."""
    features = Phi3VImageProcessor(num_crops=4)(Image.new("RGB", (900, 200)))
    white = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    first = features["pixel_values"][1]
    assert torch.allclose(first[:, 0], white[:, None], atol=1e-6)  # one division's rounding
    assert torch.allclose(first[:, -1], white[:, None], atol=1e-6)
    assert not torch.allclose(first[:, 168], white[:, None], atol=1)


# Several pictures


SEVERAL = ((300, 500, 0), (640, 480, 1), (120, 90, 5), (336, 336, 3))


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_several_pictures_are_as_each_alone(num_crops: int) -> None:
    """Crops in the order of the pictures, and no padding crops between them."""
    processor = Phi3VImageProcessor(num_crops=num_crops)
    pictures = [picture(*description) for description in SEVERAL]
    together = processor(pictures)
    alone = [processor(one) for one in pictures]
    for name in NAMES:
        assert torch.equal(together[name], torch.cat([features[name] for features in alone]))
    grids = together["image_sizes"] // 336
    assert together["pixel_values"].shape[0] == int((grids[:, 0] * grids[:, 1] + 1).sum())
    assert together["pixel_values"].dtype == torch.float32
    assert together["image_sizes"].dtype == together["num_img_tokens"].dtype == torch.long


def test_no_pictures() -> None:
    features = Phi3VImageProcessor()([])
    assert features["pixel_values"].shape == (0, 3, 336, 336)
    assert features["image_sizes"].shape == (0, 2)
    assert features["num_img_tokens"].shape == (0,)


def test_num_crops_of_a_call() -> None:
    """`num_crops` given to a call holds for that call only."""
    processor = Phi3VImageProcessor(num_crops=4)
    source = picture(*SEVERAL[0])
    assert_same(processor(source, num_crops=1), Phi3VImageProcessor(num_crops=1)(source))
    assert processor.num_crops == 4


@pytest.mark.parametrize("num_crops", [0, -1])
def test_num_crops_must_be_positive(num_crops: int) -> None:
    with pytest.raises(ValueError, match=rf"num_crops is {num_crops}; it must be at least 1"):
        Phi3VImageProcessor(num_crops=num_crops)
    with pytest.raises(ValueError, match=rf"num_crops is {num_crops}; it must be at least 1"):
        Phi3VImageProcessor()(noise(5, 5), num_crops=num_crops)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match='return_tensors is "np"'):
        Phi3VImageProcessor()(noise(5, 5), return_tensors="np")


# On disk


def test_round_trip(tmp_path: Path) -> None:
    """Saved and loaded, with and without an override."""
    processor = Phi3VImageProcessor(num_crops=7, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    processor.save_pretrained(tmp_path)
    again = Phi3VImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    source = picture(*SEVERAL[1])
    assert_same(again(source), processor(source))
    overridden = Phi3VImageProcessor.from_pretrained(tmp_path, num_crops=2)
    assert overridden.num_crops == 2
    assert_same(overridden(source), processor(source, num_crops=2))
    overridden.save_pretrained(tmp_path / "overridden")
    assert Phi3VImageProcessor.from_pretrained(tmp_path / "overridden").num_crops == 2


@pytest.mark.parametrize("folder", ["stand_in", "published"])
def test_published_fields_are_kept(folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every field of the official file comes back; `auto_map` names the official repository."""
    if folder == "published":
        source = request.getfixturevalue("published_instruct")
    else:
        source = request.getfixturevalue("stand_in")
    before = json.loads((source / "preprocessor_config.json").read_text())
    Phi3VImageProcessor.from_pretrained(source).save_pretrained(tmp_path)
    after = json.loads((tmp_path / "preprocessor_config.json").read_text())
    before["auto_map"] = {
        name: f"microsoft/Phi-3.5-vision-instruct--{target}" for name, target in before["auto_map"].items()
    }
    assert after == before
