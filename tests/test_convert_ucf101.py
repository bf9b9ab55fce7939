"""The UCF-101 converter: the published tree and lines, the naive way's frames, faults named, restarts, signals."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import av
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

import convert_ucf101
from common.errors import UserError

SCRIPT = Path(convert_ucf101.__file__)
WIDTH, HEIGHT = 64, 48


# --- videos ------------------------------------------------------------------------------------


def numbered(number):
    """A picture that shows its number: eight stripes, one per bit, white for 1; (HEIGHT, WIDTH, 3) of uint8."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    row = np.repeat(np.array(bits, dtype=np.uint8), WIDTH // 8)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)))


def number_of(image):
    stripes = np.asarray(image.convert("L"), dtype=float).reshape(HEIGHT, 8, WIDTH // 8).mean(axis=(0, 2))
    return sum(int(level > 127) << bit for bit, level in enumerate(stripes))


def make_video(
    frames, codec="mpeg4", b_frames=0, steps=(1,), container="avi", placeholders_at=(), padding=0, keys=None, noise=1
):
    """The bytes of a video of numbered frames.

    Args:
        steps: how many 25ths of a second each frame is shown, over and over again.
        placeholders_at: before which packets a packet stands that holds a frame's place, but none.
        padding: of such a packet, in bytes.
        keys: every how many frames a keyframe stands; None: where the encoder wants one.
        noise: how many values a pixel's may lie apart, anew in every frame; 1 for none.
    """
    random = np.random.default_rng(0)
    content = io.BytesIO()
    with av.open(content, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        stream.codec_context.max_b_frames = b_frames
        if noise > 1:
            stream.codec_context.bit_rate = 5_000_000  # what a packet of so little needs is more than a placeholder's
        if keys is not None:
            stream.codec_context.gop_size = keys
            stream.codec_context.options = {"sc_threshold": "1000000000"}  # none where the scene changes
        stream.codec_context.thread_count = 4  # a frame's slices, and so its bytes, on any number of cores
        packets, moment = [], 0
        for number in range(frames):
            pixels = numbered(number) // 2 + random.integers(0, noise, (HEIGHT, WIDTH, 1), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels if noise > 1 else numbered(number), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 25)
            moment += steps[number % len(steps)]
            packets += stream.encode(frame)
        for number, packet in enumerate(packets + list(stream.encode())):
            if number in placeholders_at:
                # an MPEG-4 picture header that says "not coded"
                packet_without = av.Packet(b"\x00\x00\x01\xb6\x50\x5f\xff" + padding * b"\xff")
                packet_without.stream, packet_without.time_base = stream, Fraction(1, 25)
                packet_without.pts = packet_without.dts = number + len([at for at in placeholders_at if at < number])
                output.mux(packet_without)
            if placeholders_at:
                packet.pts = packet.dts = number + len([at for at in placeholders_at if at <= number])
            output.mux(packet)
    return content.getvalue()


def with_header_count(content, count):
    """An AVI whose two headers say that it has `count` frames."""
    changed = bytearray(content)
    for at in (content.index(b"avih") + 24, content.index(b"strh") + 40):
        changed[at : at + 4] = count.to_bytes(4, "little")
    return bytes(changed)


def naive(path, num_frames=8):
    """The plain way: all frames into a list, then floor(i * frames / num_frames)."""
    with av.open(str(path)) as container:
        images = [frame.to_image() for frame in container.decode(video=0)]
    return [images[number * len(images) // num_frames] for number in range(num_frames)]


# --- folders -----------------------------------------------------------------------------------

SMALL = {  # in no order, as in an archive; names whose order differs with and without case, dot and dash
    "val/Archery/v_Archery_g02_c01.avi": make_video(12),
    "train/Archery/v_Archery_g01_c02.avi": make_video(9),
    "train/ApplyLipstick/v_b.avi": make_video(8),
    "test/ApplyLipstick/v_x.avi": make_video(3),
    "train/ApplyLipstick/v_B.avi": make_video(30),
    "train/ApplyLipstick/v_a-1.avi": make_video(10, codec="mjpeg"),
    "train/ApplyLipstick/v_a.avi": make_video(17, b_frames=2),
    "val/ApplyLipstick/v_y.avi": make_video(1),
}
ORDER = [
    "train/ApplyLipstick/v_B",
    "train/ApplyLipstick/v_a-1",
    "train/ApplyLipstick/v_a",
    "train/ApplyLipstick/v_b",
    "train/Archery/v_Archery_g01_c02",
    "val/ApplyLipstick/v_y",
    "val/Archery/v_Archery_g02_c01",
    "test/ApplyLipstick/v_x",
]


def write_videos(folder, videos):
    for name, content in videos.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_archive(path, videos, root="UCF101_subset/", mode="w", extra=()):
    with tarfile.open(path, mode) as tar:
        for name, content in videos.items():
            member = tarfile.TarInfo(root + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return path


def run_main(*arguments, workers=1):
    return convert_ucf101.main([str(argument) for argument in (*arguments, "--num_workers", workers)])


def tree(folder):
    """All files beneath a folder, hidden and unfinished ones too: path -> bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}


def annotations(folder, split):
    return [json.loads(line) for line in (folder / f"ucf101_{split}.jsonl").read_text().splitlines()]


@pytest.fixture
def small(tmp_path):
    return write_videos(tmp_path / "videos", SMALL)


# --- tree and lines ----------------------------------------------------------------------------


def test_archive_to_the_published_tree(tmp_path, capsys):
    extra = {
        "train/ApplyLipstick/UCF101": b"",
        "train/ApplyLipstick/._v_b.avi": b"x",
        "train/v.avi": b"x",
        "README.md": b"x",
    }
    archive = write_archive(tmp_path / "UCF101_subset.tar.gz", SMALL | extra)
    out = tmp_path / "out"
    assert run_main("--archive", archive, "--out_dir", out) == 0
    images = {f"images/{name}.{number}.jpg" for name in ORDER for number in range(8)}
    assert set(tree(out)) == images | {f"ucf101_{split}.jsonl" for split in ("train", "val", "test")}

    user = "Classify the video into one of the following classes: ApplyLipstick, Archery."
    lines = {"train": "", "val": "", "test": ""}
    for number, name in enumerate(ORDER):
        split, label, _ = name.split("/")
        paths = ", ".join(f'"{name}.{image}.jpg"' for image in range(8))
        lines[split] += (
            f'{{"id": "{split}-{number:010d}", "source": "ucf101", "conversations": '
            f'[{{"images": [{paths}], "user": "{user}", "assistant": "{label}"}}]}}\n'
        )
    assert {split: (out / f"ucf101_{split}.jsonl").read_text() for split in lines} == lines
    assert "8 videos (train 5, val 2, test 1): 8 converted, 0 were already, 0 cannot" in capsys.readouterr().out


def test_published_line(tmp_path):
    # 300 videos to train on, then the first to validate with: the id in the published example
    names = (
        "ApplyEyeMakeup, ApplyLipstick, Archery, BabyCrawling, BalanceBeam, BandMarching, BaseballPitch, Basketball, "
        "BasketballDunk, BenchPress"
    )
    classes = names.split(", ")
    videos = [convert_ucf101.Video(Path(f"v_{label}_{k}.avi"), "train", label) for label in classes for k in range(30)]
    videos.append(convert_ucf101.Video(Path("v_BabyCrawling_g21_c04.avi"), "val", "BabyCrawling"))
    options = convert_ucf101.parse(["--out_dir", str(tmp_path)])
    convert_ucf101.write_annotations(videos, set(), options)
    images = ", ".join(f'"val/BabyCrawling/v_BabyCrawling_g21_c04.{number}.jpg"' for number in range(8))
    assert (tmp_path / "ucf101_val.jsonl").read_text() == (
        f'{{"id": "val-0000000300", "source": "ucf101", "conversations": [{{"images": [{images}], "user": "Classify '
        f'the video into one of the following classes: {names}.", "assistant": "BabyCrawling"}}]}}\n'
    )


@pytest.mark.parametrize(("root", "mode"), [("", "w"), ("a/b/", "w:gz"), ("./", "w:xz")])
def test_any_leading_folder_and_compression(tmp_path, small, root, mode):
    run_main("--video_dir", small, "--out_dir", tmp_path / "expected")
    archive = write_archive(tmp_path / "any.tar", SMALL, root, mode)
    run_main("--archive", archive, "--out_dir", tmp_path / "out", "--tmp_dir", tmp_path / "tmp")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert list((tmp_path / "tmp").iterdir()) == []  # what was unpacked is removed


def test_workers_and_the_order_of_files_change_nothing(tmp_path, small):
    run_main("--video_dir", small, "--out_dir", tmp_path / "one")
    again = write_videos(tmp_path / "again", dict(reversed(SMALL.items())))
    run_main("--video_dir", again, "--out_dir", tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_split_without_videos_has_no_lines(tmp_path):
    folder = write_videos(tmp_path / "videos", {"val/A/v.avi": make_video(2)})
    assert run_main("--video_dir", folder, "--out_dir", tmp_path / "out") == 0
    assert annotations(tmp_path / "out", "train") == [] == annotations(tmp_path / "out", "test")
    assert [line["id"] for line in annotations(tmp_path / "out", "val")] == ["val-0000000000"]


# --- frames ------------------------------------------------------------------------------------

KINDS = {
    "mpeg4": {},
    "mjpeg": {"codec": "mjpeg"},
    "b_frames": {"b_frames": 2},
    "variable_rate": {"steps": (1, 3, 2)},
    "variable_rate_b_frames": {"steps": (2, 1), "b_frames": 2},
    "variable_rate_matroska": {"steps": (1, 5), "container": "matroska"},
    "placeholders": {"placeholders_at": (2, 3, 7, 28)},
    "large_placeholders": {"placeholders_at": (2, 3, 20), "padding": 100, "keys": 1000},
    "one_keyframe": {"keys": 1000},
    "many_keyframes": {"keys": 5},
    "h264": {"codec": "libx264"},
    "h264_one_keyframe": {"codec": "libx264", "keys": 1000},
    "h264_b_frames": {"codec": "libx264", "b_frames": 2},
    "h264_b_frames_matroska": {"codec": "libx264", "b_frames": 2, "container": "matroska"},
    "mpeg2": {"codec": "mpeg2video", "container": "matroska"},
    "placeholder_behind_the_last_frame_needed": {"placeholders_at": (28,)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 9, 29, 150])
def test_frames_are_the_naive_ones(tmp_path, kind, frames):
    path = tmp_path / "v.avi"
    path.write_bytes(make_video(frames, **KINDS[kind]))
    images = convert_ucf101.read_frames(path, 8)
    assert [number_of(image) for image in images] == [number * frames // 8 for number in range(8)]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in naive(path)]


def test_images_are_saved_as_published(tmp_path, small):
    run_main("--video_dir", small, "--out_dir", tmp_path / "out")
    for name in ORDER:
        for number, image in enumerate(naive(small / f"{name}.avi")):
            image.save(tmp_path / "published.jpg")
            written = tmp_path / f"out/images/{name}.{number}.jpg"
            assert written.read_bytes() == (tmp_path / "published.jpg").read_bytes()


@pytest.mark.parametrize("count", [0, 1, 29, 31, 10_000])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_wrong_count_in_the_header(tmp_path, count, b_frames):
    path = tmp_path / "v.avi"
    path.write_bytes(with_header_count(make_video(30, b_frames=b_frames), count))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == count
    assert [number_of(image) for image in convert_ucf101.read_frames(path, 8)] == [k * 30 // 8 for k in range(8)]


@pytest.mark.parametrize("num_frames", [1, 3, 16])
def test_num_frames(tmp_path, num_frames):
    folder = write_videos(tmp_path / "videos", {"train/A/v.avi": make_video(20)})
    run_main("--video_dir", folder, "--out_dir", tmp_path / "out", "--num_frames", num_frames)
    (line,) = annotations(tmp_path / "out", "train")
    images = [tmp_path / "out" / "images" / name for name in line["conversations"][0]["images"]]
    assert sorted(images) == sorted((tmp_path / "out").rglob("*.jpg"))
    numbers = [number_of(Image.open(image)) for image in images]
    assert numbers == [k * 20 // num_frames for k in range(num_frames)]


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("frames", [16, 150])
def test_decoding_stops_after_the_last_frame_needed(tmp_path, monkeypatch, frames, b_frames):
    path = tmp_path / "v.avi"
    path.write_bytes(make_video(frames, b_frames=b_frames, keys=1000))
    delay = int(b_frames > 0)
    assert decoded_packets(path, monkeypatch) == 7 * frames // 8 + 1 + delay


@pytest.mark.parametrize(("keys", "number"), [(1, 8), (5, 8), (8, 24), (1000, 141)])
def test_packets_before_a_keyframe_are_passed_over(tmp_path, monkeypatch, keys, number):
    path = tmp_path / "v.avi"
    path.write_bytes(make_video(160, keys=keys))  # the frames 0, 20, 40, ..., 140
    assert decoded_packets(path, monkeypatch) == number


@pytest.mark.parametrize("codec", ["mpeg4", "msmpeg4", "wmv2", "libx264"])
def test_keyframes_that_are_none(tmp_path, codec):
    """An index that calls every frame one, and a codec whose packets are not looked into: then all is decoded."""
    content = bytearray(make_video(160, codec=codec, keys=1000, noise=60))
    index = content.rindex(b"idx1")
    entries = range(index + 8, index + 8 + int.from_bytes(content[index + 4 : index + 8], "little"), 16)
    assert len(entries) == 160
    for entry in entries:
        content[entry + 4] |= 0x10
    path = tmp_path / "v.avi"
    path.write_bytes(content)
    if codec in ("msmpeg4", "wmv2"):
        with av.open(str(path)) as container:
            assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    images = convert_ucf101.read_frames(path, 8)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in naive(path)]


def decoded_packets(path, monkeypatch):
    shown = []
    monkeypatch.setattr(convert_ucf101.av, "open", lambda name: Watched(av_open(name), shown))
    images = convert_ucf101.read_frames(path, 8)
    monkeypatch.undo()
    assert [image.tobytes() for image in images] == [image.tobytes() for image in naive(path)]
    return len(shown)


av_open = av.open


class Watched:
    """A container that notes each packet which is decoded."""

    def __init__(self, container, shown):
        self.container, self.shown, self.streams = container, shown, container.streams

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def demux(self, stream):
        return [WatchedPacket(packet, self.shown) for packet in self.container.demux(stream)]


class WatchedPacket:
    def __init__(self, packet, shown):
        self.packet, self.shown = packet, shown
        self.size, self.is_corrupt, self.is_keyframe = packet.size, packet.is_corrupt, packet.is_keyframe

    def decode(self):
        self.shown.append(self.packet)
        return self.packet.decode()


# --- videos that cannot be decoded -------------------------------------------------------------

WHOLE = make_video(60)
DAMAGED = {
    "empty": b"",
    "no video": b"not a video" * 100,
    "header only": WHOLE[: WHOLE.index(b"movi") + 4],
    "cut in the header": WHOLE[:100],
    "cut in the first frame": WHOLE[: WHOLE.index(b"movi") + 40],
    "cut at half": WHOLE[: (WHOLE.index(b"movi") + WHOLE.index(b"idx1")) // 2],
    "cut before a frame": WHOLE[: WHOLE.index(b"00dc", len(WHOLE) // 2)],
    "cut in a frame's header": WHOLE[: WHOLE.index(b"00dc", len(WHOLE) // 2) + 6],
    "cut in the last frame": WHOLE[: WHOLE.index(b"idx1") - 9],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_video_that_cannot_be_decoded_is_named_and_left_out(tmp_path, capsys, damage):
    name = "train/ApplyLipstick/v_a-1.avi"
    videos = write_videos(tmp_path / "videos", SMALL | {name: DAMAGED[damage]})
    out = tmp_path / "out"
    assert run_main("--video_dir", videos, "--out_dir", out) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "left out" in line]
    assert line.startswith(f"{videos / name} cannot be decoded and is left out: ")
    assert "7 converted, 0 were already, 1 cannot be decoded" in captured.out
    ids = [line["id"] for split in ("train", "val", "test") for line in annotations(out, split)]
    # the second is left out; the others' numbers stay
    assert ids == [f"{path.split('/')[0]}-{number:010d}" for number, path in enumerate(ORDER) if number != 1]
    assert len(list(out.rglob("*.jpg"))) == 7 * 8

    # mended: it alone is converted, and all is as if it had never been damaged
    before = times(out)
    write_videos(videos, SMALL)
    assert run_main("--video_dir", videos, "--out_dir", out) == 0
    assert {name: when for name, when in times(out).items() if name in before} == before
    run_main("--video_dir", videos, "--out_dir", tmp_path / "expected")
    assert tree(out) == tree(tmp_path / "expected")


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, len(WHOLE)])
def test_size_in_the_header_that_is_not_known_or_a_little_off(tmp_path, size):
    path = tmp_path / "v.avi"
    path.write_bytes(WHOLE[:4] + size.to_bytes(4, "little") + WHOLE[8:])
    assert [number_of(image) for image in convert_ucf101.read_frames(path, 8)] == [k * 60 // 8 for k in range(8)]


def test_every_cut_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "v.avi"
    path.write_bytes(WHOLE)
    expected = [image.tobytes() for image in naive(path)]
    for size in range(0, len(WHOLE), 97):
        path.write_bytes(WHOLE[:size])
        try:
            images = convert_ucf101.read_frames(path, 8)
        except (av.FFmpegError, ValueError):
            continue
        assert size > WHOLE.index(b"idx1") - 0.01 * len(WHOLE)  # behind the frames
        assert [image.tobytes() for image in images] == expected


def test_sound_without_pictures(tmp_path):
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            output.mux(packet)
    with pytest.raises(ValueError, match="no video stream"):
        convert_ucf101.read_frames(path, 8)


# --- restarts ----------------------------------------------------------------------------------


def test_second_run_converts_nothing(tmp_path, small, capsys):
    out = tmp_path / "out"
    run_main("--video_dir", small, "--out_dir", out)
    before, content = times(out), tree(out)
    assert run_main("--video_dir", small, "--out_dir", out, workers=2) == 0
    assert times(out) == before
    assert tree(out) == content
    assert "0 converted, 8 were already, 0 cannot" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 4, 7])
def test_missing_image_is_made_again_for_its_video_only(tmp_path, small, number):
    out = tmp_path / "out"
    run_main("--video_dir", small, "--out_dir", out)
    before, content = times(out), tree(out)
    (out / f"images/{ORDER[2]}.{number}.jpg").unlink()
    run_main("--video_dir", small, "--out_dir", out)
    assert tree(out) == content
    assert {name for name, when in times(out).items() if when != before[name]} == {
        f"images/{ORDER[2]}.{image}.jpg" for image in range(8)
    }


@pytest.mark.parametrize("num_frames", [4, 16])
def test_images_of_another_num_frames(tmp_path, small, num_frames):
    out = tmp_path / "out"
    run_main("--video_dir", small, "--out_dir", out)
    content = tree(out)
    expected = rf"--num_frames {num_frames}, but --out_dir {out} has 8 images per video: give --num_frames 8"
    with pytest.raises(UserError, match=expected):
        run_main("--video_dir", small, "--out_dir", out, "--num_frames", num_frames)
    assert tree(out) == content


def test_an_interrupted_run_tells_its_num_frames(tmp_path, small, monkeypatch):
    # stopped within a video: what is there must not pass for a video of fewer images
    replaced = []

    def replace_two(source, target):
        if len(replaced) == 2:
            raise KeyboardInterrupt
        replaced.append(target)
        os.rename(source, target)

    out = tmp_path / "out"
    video = convert_ucf101.list_videos(small)[0]
    (out / "images" / video.split / video.label).mkdir(parents=True)
    monkeypatch.setattr(convert_ucf101.os, "replace", replace_two)
    with pytest.raises(KeyboardInterrupt):
        convert_ucf101.convert(video, out, 8)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"--num_frames 2, but .* has 8 images per video"):
        run_main("--video_dir", small, "--out_dir", out, "--num_frames", 2)
    run_main("--video_dir", small, "--out_dir", out)
    run_main("--video_dir", small, "--out_dir", tmp_path / "expected")
    assert tree(out) == tree(tmp_path / "expected")  # nothing unfinished is left either


def die(video, out_dir, num_frames):
    os._exit(3)


def test_worker_that_dies(tmp_path, small, monkeypatch):
    monkeypatch.setattr(convert_ucf101, "convert", die)
    with pytest.raises(UserError, match=r"a worker process died .* at one of: .*v_B\.avi; run again") as error:
        run_main("--video_dir", small, "--out_dir", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.jsonl"))


# --- signals -----------------------------------------------------------------------------------


def running(group):
    """How many processes of a process group are alive."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        count += int(its_group) == group and state not in "ZX"
    return count


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle(tmp_path, sent):
    content = make_video(150)
    videos = write_videos(tmp_path / "videos", {f"train/A/v_{number:03d}.avi": content for number in range(400)})
    out = tmp_path / "out"
    arguments = ["--video_dir", str(videos), "--out_dir", str(out)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--num_workers", "2"],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background may ignore it
    )
    try:
        give_up = time.monotonic() + 120  # a busy machine takes its time to import what there is
        while not list(out.rglob("v_003.0.jpg")) and time.monotonic() < give_up:
            time.sleep(0.002)
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does: parent and workers
        else:
            process.kill()  # the parent alone: the workers have to notice
        errors = process.communicate(timeout=120)[1]
        give_up = time.monotonic() + 60
        while running(process.pid) and time.monotonic() < give_up:
            time.sleep(0.01)
        assert running(process.pid) == 0
    finally:
        if running(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert not list(out.glob("*.jsonl"))
    written = list(out.rglob("*.jpg"))
    assert 0 < len(written) < 400 * 8
    for path in written:
        Image.open(path).load()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted: run again to go on" in errors
        assert "Traceback" not in errors
        assert not list(out.rglob("*.part"))
    before = times(out)
    assert run_main(*arguments) == 0
    finished = [name for name in before if all(f"{name.split('.')[0]}.{k}.jpg" in before for k in range(8))]
    assert [name for name in finished if times(out)[name] != before[name]] == []
    run_main("--video_dir", videos, "--out_dir", tmp_path / "expected", workers=2)
    assert tree(out) == tree(tmp_path / "expected")


# --- errors for the user -----------------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, target=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    if "\0" in name:  # which only such a header can hold
        made.pax_headers = {"path": name}
    return made


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil.avi"),
        member("UCF101_subset/train/../../../evil/A/evil.avi"),
        member("/tmp/train/A/evil.avi"),
        member("UCF101_subset/train/A/evil\0.avi"),
        member("../evil\x1b[2J.avi"),
        member("UCF101_subset/train/A/link.avi", tarfile.SYMTYPE, "/etc/passwd"),
        member("UCF101_subset/train/A", tarfile.SYMTYPE, "../../.."),
        member("UCF101_subset/train/A/hard.avi", tarfile.LNKTYPE, "UCF101_subset/val/A/v.avi"),
        member("UCF101_subset/train/A/pipe.avi", tarfile.FIFOTYPE),
        member("UCF101_subset/train/A/device.avi", tarfile.CHRTYPE),
    ],
    ids=lambda evil: f"{evil.name}-{evil.type.decode()}",
)
def test_members_that_leave_the_folder_are_refused(tmp_path, evil):
    archive = write_archive(tmp_path / "evil.tar", {"val/A/v.avi": b"x"}, extra=[evil])
    with pytest.raises(UserError) as error:
        run_main("--archive", archive, "--out_dir", tmp_path / "out", "--tmp_dir", tmp_path / "tmp")
    name = evil.name if evil.name.isprintable() else repr(evil.name)
    assert str(error.value).startswith(f"{archive}: its member {name} leaves the folder, or is a link or a device")
    assert str(error.value).isprintable()
    assert set(tree(tmp_path)) == {"evil.tar"}


def tar_of(mode):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name in ("a", "b"):
            made = tarfile.TarInfo(f"train/A/{name}.avi")
            made.size = 3000
            tar.addfile(made, io.BytesIO(os.urandom(3000)))
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>" * 100,
        tar_of("w")[:300],
        tar_of("w")[:2000],  # in the first file
        tar_of("w")[:3584],  # between the two
        tar_of("w")[:3700],  # in the second's header
        tar_of("w")[:3584] + b"\1" * 512 + tar_of("w")[4096:],
        tar_of("w:gz")[:-100],
        tar_of("w:xz")[:-100],
    ],
    ids=["empty", "text", "header", "file", "between", "second_header", "damaged_header", "gzip", "xz"],
)
def test_archive_that_is_none_or_not_whole(tmp_path, content):
    archive = tmp_path / "UCF101_subset.tar.gz"
    archive.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{archive} cannot be unpacked as a tar archive: .*; fetch it again$"):
        run_main("--archive", archive, "--out_dir", tmp_path / "out", "--tmp_dir", tmp_path / "tmp")
    assert set(tree(tmp_path)) == {archive.name}


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("No route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError) as error:
        run_main("--out_dir", tmp_path / "out")
    assert str(error.value) == (
        "UCF101_subset.tar.gz of sayakpaul/ucf101-subset could not be fetched from the hub (ConnectionError: No route "
        "to host); give a local copy with --archive FILE, or unpacked videos with --video_dir DIR"
    )


@pytest.mark.parametrize("kept", [True, False])
def test_fetched_archive(tmp_path, monkeypatch, kept):
    asked = []

    def download(repository, name, repo_type, local_dir):
        asked.append((repository, name, repo_type, Path(local_dir)))
        return str(write_archive(Path(local_dir) / name, SMALL))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    options = ["--tmp_dir", tmp_path / "kept"] if kept else []
    assert run_main("--out_dir", tmp_path / "out", *options) == 0
    ((*names, folder),) = asked
    assert names == ["sayakpaul/ucf101-subset", "UCF101_subset.tar.gz", "dataset"]
    assert folder == tmp_path / "kept" or not kept
    assert [path.name for path in folder.glob("*")] == (["UCF101_subset.tar.gz"] if kept else [])
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 8 * len(SMALL)


def test_no_videos_and_missing_places(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    archive = write_archive(tmp_path / "empty.tar", {"notes.txt": b"x"})
    for arguments, expected in (
        (("--video_dir", tmp_path / "absent"), "--video_dir .*absent: there is no such file or folder"),
        (("--archive", tmp_path / "absent"), "--archive .*absent: there is no such file or folder"),
        (("--video_dir", tmp_path / "empty"), "empty has no videos: {train,val,test}/<Class>/<video>.avi is needed"),
        (("--archive", archive), "empty.tar has no videos: {train,val,test}/<Class>/<video>.avi is needed"),
        (("--video_dir", tmp_path / "empty", "--out_dir", tmp_path / "file"), "--out_dir .*file .*File exists"),
        (("--video_dir", tmp_path / "empty", "--num_frames", 0), "--num_frames 0: give 1 or more"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            run_main("--out_dir", tmp_path / "out", *arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--num_workers 0: give 1 or more"):
        run_main(workers=0)


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_as_a_user_starts_it(tmp_path, small):
    shown = run_script("--help")
    assert shown.returncode == 0
    for option in ("--out_dir", "--tmp_dir", "--archive", "--video_dir", "--num_frames", "--num_workers", "./ucf101"):
        assert option in shown.stdout

    failed = run_script("--video_dir", tmp_path / "absent")
    assert failed.returncode == 2
    assert failed.stderr == f"error: --video_dir {tmp_path / 'absent'}: there is no such file or folder\n"

    (small / "train/ApplyLipstick/v_bad.avi").write_bytes(b"")
    converted = run_script("--video_dir", small, "--out_dir", tmp_path / "out")
    assert converted.returncode == 1
    assert "v_bad.avi cannot be decoded and is left out" in converted.stderr
    assert "9/9" in converted.stderr  # the progress bar
    assert converted.stdout.startswith("9 videos (train 6, val 2, test 1): 8 converted")
