"""Convert UCF-101's subset of ten classes into images and annotations for fine-tuning.

    # fetched from the hub (171 MB)
    python convert_ucf101.py --out_dir /path/to/converted_ucf101

    # the archive as fetched before, or any folder of {train,val,test}/<Class>/<video>.avi
    python convert_ucf101.py --out_dir /path/to/converted_ucf101 --archive UCF101_subset.tar.gz
    python convert_ucf101.py --out_dir /path/to/converted_ucf101 --video_dir /path/to/videos

Writes `images/{train,val,test}/<Class>/<video>.<0..7>.jpg`, then `ucf101_{train,val,test}.jsonl`. Run again after
an interruption: only what is missing is converted. Exit code 1 where a video cannot be decoded, 2 for other errors.
"""

import argparse
import json
import lzma
import multiprocessing
import os
import signal
import sys
import tarfile
import tempfile
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import av
import numpy as np
from av.video.frame import PictureType
from PIL import Image
from tqdm import tqdm

HUB_ID = "sayakpaul/ucf101-subset"
HUB_FILE = "UCF101_subset.tar.gz"  # a plain tar in spite of its name
SPLITS = ("train", "val", "test")
SMALLEST_FRAME = 20  # bytes; a packet below it may only hold a frame's place (7 to 19 bytes in MPEG-4)


class Video(NamedTuple):
    path: Path
    split: str
    label: str

    def images(self, num_frames: int) -> list[str]:
        """The paths of its images, relative to `images/`."""
        return [f"{self.split}/{self.label}/{self.path.stem}.{number}.jpg" for number in range(num_frames)]


def user_error(message: str) -> ValueError:
    from common.errors import UserError  # only here, for `common` imports torch, which takes seconds

    return UserError(message)


def readable(name: str | Path) -> str:
    """A name that can be shown, as by the one of `common/data.py`, whose import takes seconds."""
    return str(name) if str(name).isprintable() else repr(str(name))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# --- options -----------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description="Convert UCF-101's subset for fine-tuning.", allow_abbrev=False)
    parser.add_argument("--out_dir", type=Path, default=Path("./ucf101"), help="(./ucf101)")
    parser.add_argument("--tmp_dir", type=Path, help="keeps the fetched archive (else a temporary folder, removed)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--archive", type=Path, help=f"a local copy of {HUB_FILE}, instead of the hub")
    source.add_argument("--video_dir", type=Path, help="a folder of {train,val,test}/<Class>/<video>.avi")
    parser.add_argument("--num_frames", type=int, default=8, help="images per video (%(default)s)")
    parser.add_argument("--num_workers", type=int, default=cores, help="processes (all cores, %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("num_frames", "num_workers"):
        if getattr(options, name) < 1:
            raise user_error(f"--{name} {getattr(options, name)}: give 1 or more")
    return options


# --- videos ------------------------------------------------------------------------------------


def fetch(folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_ID, HUB_FILE, repo_type="dataset", local_dir=folder))
    except Exception as error:  # the hub's errors are of many kinds: connection, time-out, not found
        raise user_error(
            f"{HUB_FILE} of {HUB_ID} could not be fetched from the hub ({type(error).__name__}: {one_line(error)}); "
            "give a local copy with --archive FILE, or unpacked videos with --video_dir DIR"
        ) from error


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the videos, from below any leading folder, as `folder/{train,val,test}/<Class>/<video>.avi`."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                outside = path.is_absolute() or ".." in path.parts or "\0" in member.name
                if outside or not (member.isfile() or member.isdir()):
                    raise user_error(
                        f"{archive}: its member {readable(member.name)} leaves the folder, or is a link or a device; "
                        f"the archive is not what {HUB_ID} publishes: fetch {HUB_FILE} from there"
                    )
                if member.isfile() and path.suffix == ".avi" and path.parts[-3:-2] and path.parts[-3] in SPLITS:
                    tar.extract(member.replace(name="/".join(path.parts[-3:])), folder, filter="data")
            tar.fileobj.seek(tar.offset)  # tarfile takes a header that is cut short for the end; the end is zeros
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is damaged or ends early")
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise user_error(f"{archive} cannot be unpacked as a tar archive: {one_line(error)}; fetch it again") from error
    return folder


def list_videos(folder: Path) -> list[Video]:
    """Train, val, test; in each the classes, and their videos, by the bytes of their names: alike on every machine."""
    videos = []
    for split in SPLITS:
        paths = [path for path in folder.glob(f"{split}/*/*") if path.suffix == ".avi" and path.name[0] != "."]
        paths.sort(key=lambda path: (os.fsencode(path.parent.name), os.fsencode(path.name)))
        videos += [Video(path, split, path.parent.name) for path in paths]
    return videos


# --- frames ------------------------------------------------------------------------------------


def is_cut_short(path: Path, packets: list[av.Packet]) -> bool:
    """Whether a packet is incomplete, or an AVI is over 1 % smaller than it says (some writers are a little off)."""
    with open(path, "rb") as file:
        kind, size = file.read(4), int.from_bytes(file.read(4), "little")
    smaller = kind == b"RIFF" and size != 0xFFFFFFFF and size > 1.01 * path.stat().st_size  # all ones: not known
    return smaller or any(packet.is_corrupt for packet in packets)


def read_frames(path: Path, num_frames: int, count: int | None = None, one_by_one: bool = False) -> list[Image.Image]:
    """The frames floor(i * count / num_frames) of a video that has `count`, whatever its header says.

    The count is first taken to be the number of packets. Where each packet gives its frame at once and none is
    suspiciously small, decoding begins anew at the keyframe before each frame needed. Else it goes from the first
    packet on, and stops after the last frame needed where each packet so far has given its frame and none is small; or
    else all are decoded, and where their number turns out to be another, the video is read again with that. Damage in
    packets that are passed over goes unnoticed.

    Args:
        one_by_one: from the first packet on, wherever the keyframes are.

    Raises:
        ValueError, av.FFmpegError: no video stream, no frames, a packet that is damaged or cut short.
    """
    with av.open(str(path)) as container:
        if not container.streams.video or container.streams.video[0].codec_context is None:
            raise ValueError("it holds no video stream that can be decoded")
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # the processes share the cores
        packets = list(container.demux(stream))
        if is_cut_short(path, packets):
            raise ValueError("it is cut short")
        sizes = [packet.size for packet in packets if packet.size]
        trusted = count is not None or min(sizes, default=0) >= SMALLEST_FRAME
        count = len(sizes) if count is None else count
        indices = [number * count // num_frames for number in range(num_frames)]
        if trusted and not one_by_one and all(packet.size for packet in packets[:count]):
            images = read_from_keyframes(stream, packets, indices)
            return images or read_frames(path, num_frames, one_by_one=True)
        images, decoded = {}, 0
        for fed, packet in enumerate(packets, start=1):
            for frame in packet.decode():
                if decoded in indices:
                    images[decoded] = to_image(frame)
                decoded += 1
            delay = int(stream.codec_context.has_b_frames)  # the decoder holds one frame back
            if trusted and decoded > indices[-1] and fed - decoded == delay:
                return [images[index] for index in indices]
    if not decoded:
        raise ValueError("it has no frames")
    return [images[index] for index in indices] if decoded == count else read_frames(path, num_frames, decoded, True)


def read_from_keyframes(
    stream: av.VideoStream, packets: list[av.Packet], indices: list[int]
) -> list[Image.Image] | None:
    """The frames of the packets `indices`, each decoded from the keyframe before it on.

    Returns:
        None where a packet does not give its own frame and at once, as in a video with frames that look ahead, or
        where one that is called a keyframe needs others.
    """
    needed: set[int] = set()
    for index in indices:
        first = index
        while first > 0 and first not in needed and not packets[first].is_keyframe:
            first -= 1
        needed.update(range(first, index + 1))
    images = {}
    for number in sorted(needed):
        begins = number - 1 not in needed
        if begins and number:
            stream.codec_context.flush_buffers()
        if stream.codec_context.has_b_frames or len(frames := packets[number].decode()) != 1:
            return None
        if begins and frames[0].pict_type != PictureType.I:  # the container says which are keyframes, and may be wrong
            return None
        if number in indices:
            images[number] = to_image(frames[0])
    return [images[index] for index in indices]


def to_image(frame: av.VideoFrame) -> Image.Image:
    return Image.fromarray(frame.to_ndarray(format="rgb24"))  # faster than the frame's own `to_image`


def convert(video: Video, out_dir: Path, num_frames: int) -> str | None:
    """Write a video's images, as JPEG of PIL's default quality (75) as published, or return why it has none."""
    try:
        images = read_frames(video.path, num_frames)
    except (av.FFmpegError, ValueError) as error:
        return one_line(error)
    # The last one first: whatever an interruption leaves then tells what --num_frames was.
    for name, image in reversed(list(zip(video.images(num_frames), images, strict=True))):
        target = out_dir / "images" / name
        image.save(target.with_suffix(".part"), format="JPEG")
        os.replace(target.with_suffix(".part"), target)
    return None


def keep_freed_memory() -> None:
    """Keep glibc from giving every frame's memory back to the system and asking for it again, 400 pages a video.

    It does so with blocks larger than the largest that it has seen freed; of 32 MB and more it takes no notice. Nothing
    is written to this one, so that no page of it is asked for.
    """
    np.empty(31 << 20, np.uint8)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, so that videos under way are finished; end when the parent has been killed."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


# --- steps -------------------------------------------------------------------------------------


def unconverted(videos: list[Video], out_dir: Path, num_frames: int) -> list[Video]:
    """The videos of which an image is missing; an error where the images are of another `--num_frames`."""
    there = {path.relative_to(out_dir / "images").as_posix() for path in out_dir.glob("images/*/*/*.jpg")}
    ours = {video.images(1)[0].removesuffix(".0.jpg") for video in videos}
    names = [name.removesuffix(".jpg").rpartition(".") for name in there]
    found = max((int(number) + 1 for name, _, number in names if name in ours and number.isdecimal()), default=0)
    if found not in (0, num_frames):
        raise user_error(
            f"--num_frames {num_frames}, but --out_dir {out_dir} has {found} images per video: "
            f"give --num_frames {found}, name another folder, or remove this one"
        )
    return [video for video in videos if not there.issuperset(video.images(num_frames))]


def convert_all(videos: list[Video], options: argparse.Namespace) -> set[Video]:
    """Convert the videos in worker processes; name those that cannot be decoded on stderr, and return them."""
    for folder in {options.out_dir / "images" / video.split / video.label for video in videos}:
        folder.mkdir(parents=True, exist_ok=True)
    failed, waiting = set(), dict.fromkeys(videos)
    pool = ProcessPoolExecutor(options.num_workers, initializer=start_worker)
    try:
        futures = {pool.submit(convert, video, options.out_dir, options.num_frames): video for video in videos}
        for future in tqdm(as_completed(futures), total=len(videos), unit="video"):
            problem, video = future.result(), futures[future]
            del waiting[video]
            if problem:
                failed.add(video)
                tqdm.write(f"{readable(video.path)} cannot be decoded and is left out: {problem}", file=sys.stderr)
    except BrokenProcessPool as error:
        begun = ", ".join(readable(video.path) for video in list(waiting)[: options.num_workers])
        raise user_error(
            f"a worker process died of a crash or for want of memory, at one of: {begun}; run again to go on, "
            "with --num_workers 1 to learn which it is"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def write_annotations(videos: list[Video], failed: set[Video], options: argparse.Namespace) -> None:
    """Write `ucf101_{train,val,test}.jsonl`; a video's id is its place among all videos, left out or not."""
    classes = sorted({video.label for video in videos}, key=os.fsencode)
    user = f"Classify the video into one of the following classes: {', '.join(classes)}."
    lines = {split: [] for split in SPLITS}
    for number, video in enumerate(videos):
        if video not in failed:
            turn = {"images": video.images(options.num_frames), "user": user, "assistant": video.label}
            line = {"id": f"{video.split}-{number:010d}", "source": "ucf101", "conversations": [turn]}
            lines[video.split].append(json.dumps(line) + "\n")
    for split in SPLITS:
        target = options.out_dir / f"ucf101_{split}.jsonl"
        target.with_suffix(".part").write_text("".join(lines[split]), encoding="utf-8", newline="\n")
        os.replace(target.with_suffix(".part"), target)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for option in ("archive", "video_dir"):
        if (path := getattr(options, option)) and not path.exists():
            raise user_error(f"--{option} {path}: there is no such file or folder")
    try:
        for folder in filter(None, (options.out_dir, options.tmp_dir)):
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="ucf101_", dir=options.tmp_dir) as temporary:
            archive = options.archive or (None if options.video_dir else fetch(options.tmp_dir or Path(temporary)))
            folder = unpack(archive, Path(temporary) / "videos") if archive else options.video_dir
            videos = list_videos(folder)
            if not videos:
                raise user_error(f"{archive or folder} has no videos: {{train,val,test}}/<Class>/<video>.avi is needed")
            missing = unconverted(videos, options.out_dir, options.num_frames)
            failed = convert_all(missing, options)
        write_annotations(videos, failed, options)
    except OSError as error:  # one of our own files: what is wrong with a video is handled where it is read
        raise user_error(f"--out_dir {options.out_dir} or --tmp_dir {options.tmp_dir}: {one_line(error)}") from error
    counts = ", ".join(f"{split} {sum(video.split == split for video in videos)}" for split in SPLITS)
    print(f"{len(videos)} videos ({counts}): {len(missing) - len(failed)} converted, ", end="")
    print(f"{len(videos) - len(missing)} were already, {len(failed)} cannot be decoded; in {options.out_dir}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: run again to go on", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        from common.errors import UserError

        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
