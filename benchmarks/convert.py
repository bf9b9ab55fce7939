"""How fast videos are converted: `convert_ucf101.py` against the published way, on made-up videos of UCF-101's size.

    python -m benchmarks.convert --rounds 5

The ways take turns, so that a busy machine slows all of them alike; each is timed from the videos to the last image, in
a new process, as its user has it: what another way has left in a process's memory makes the next one faster.
Prints a table and writes `benchmarks/results/convert_cpu.json`.

    published     one process, video after video: the frame count from the header, decoding up to the frame behind the
                  last one needed, each looked up in an array of the eight indices, those frames kept and made RGB at
                  the end, into one array and from there into images (what the published script does)
    ours          `convert_ucf101.py`, annotations included

Ours begins to decode at the keyframe before each chosen frame, so that it depends on where the keyframes are: measured
are videos with one every 12 frames, which is libavcodec's habit, and videos with none but the first.
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from PIL import Image

import convert_ucf101

WIDTH, HEIGHT, RATE = 320, 240, 25
BIT_RATE = 480_000  # bits a second: about 420 kB for 7 s, as UCF-101's videos have on average
RESULTS = Path(__file__).parent / "results" / "convert_cpu.json"
NUM_FRAMES = 8
KEYFRAME_EVERY = (12, 1000)  # frames; a video has 150 to 200
NO_SCENES = "1000000000"  # no keyframe because the picture changes


# --- videos ------------------------------------------------------------------------------------


def make_video(path: Path, seed: int, keyframe_every: int) -> int:
    """Write 6 to 8 s of a texture that moves, behind a bar that moves otherwise, with noise; return the frames."""
    generator = np.random.default_rng(seed)
    frames = int(generator.integers(6 * RATE, 8 * RATE + 1))
    coarse = generator.integers(40, 216, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = generator.normal(0, 6, (HEIGHT, WIDTH, 3)).astype(np.int16)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", BIT_RATE
        stream.codec_context.codec_tag, stream.codec_context.gop_size = "XVID", keyframe_every
        stream.codec_context.options = {"sc_threshold": NO_SCENES}
        for number in range(frames):
            picture = np.roll(texture, (number, 2 * number), axis=(0, 1))
            left = 3 * number % (WIDTH - 40)
            picture[60:180, left : left + 40] = (200, 60, 30)
            picture = picture + np.roll(noise, tuple(generator.integers(0, HEIGHT, 2)), axis=(0, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return frames


# --- ways --------------------------------------------------------------------------------------


def published(path: Path, one_thread: bool) -> list[Image.Image]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if one_thread:
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        indices = np.arange(NUM_FRAMES) * stream.frames // NUM_FRAMES
        chosen = []
        for number, frame in enumerate(container.decode(stream)):
            if number > indices[-1]:
                break
            if number in indices:
                chosen.append(frame)
        # (frames, height, width, 3)
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in chosen])
        return [Image.fromarray(one).convert("RGB") for one in pixels]


def one_after_another(one_thread: bool, video_dir: Path, out_dir: Path) -> None:
    for path in sorted(video_dir.glob("*/*/*.avi")):
        folder = out_dir / "images" / path.parent.relative_to(video_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(published(path, one_thread)):
            image.save(folder / f"{path.stem}.{number}.jpg")


def ours(workers: int, video_dir: Path, out_dir: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options = ["--video_dir", str(video_dir), "--out_dir", str(out_dir), "--num_workers", str(workers)]
        assert convert_ucf101.main(options) == 0


# --- measurement -------------------------------------------------------------------------------


def timed(convert: Callable[[Path, Path], None], video_dir: Path, images: dict[str, str]) -> dict[str, float]:
    """One conversion by a new process; its images are compared with `images`, or kept there if it is empty.

    Returns:
        `seconds` on the clock and `cpu_seconds` of that process and its workers.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        taken, made = pool.submit(in_this_process, convert, video_dir).result()
    images.update({} if images else made)
    assert made == images, "the ways have written different images"
    return taken


def in_this_process(convert: Callable[[Path, Path], None], video_dir: Path) -> tuple[dict[str, float], dict[str, str]]:
    """What one conversion into an empty folder took, and its images' names and hashes."""
    multiprocessing.set_start_method(None, force=True)  # the system's own, not this process's "spawn"
    with tempfile.TemporaryDirectory() as out_dir:
        before, start = os.times(), time.perf_counter()
        convert(video_dir, Path(out_dir))
        seconds, after = time.perf_counter() - start, os.times()
        paths = sorted(Path(out_dir).rglob("*.jpg"))
        made = {str(path.relative_to(out_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return {"seconds": seconds, "cpu_seconds": sum(after[:4]) - sum(before[:4])}, made


def describe_machine() -> dict[str, object]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "av": av.__version__,
        "libavcodec": ".".join(str(number) for number in av.library_versions["libavcodec"]),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "smallest": round(min(values), 3),
        "largest": round(max(values), 3),
    }


def compare(options: argparse.Namespace, keyframe_every: int) -> dict[str, object]:
    """All ways, in turn, with videos of one kind."""
    ours_name = f"ours, {options.num_workers} workers"
    ways = {
        "published, one decoder thread": functools.partial(one_after_another, True),
        "published, default threads": functools.partial(one_after_another, False),
        "ours, 1 worker": functools.partial(ours, 1),
    }
    our_way = functools.partial(ours, options.num_workers)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in [*ways, ours_name]}
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    loads = []
    with tempfile.TemporaryDirectory() as temporary:
        video_dir = Path(temporary)
        (video_dir / "train" / "Pattern").mkdir(parents=True)
        paths = [video_dir / "train" / "Pattern" / f"v_{number:03d}.avi" for number in range(options.videos)]
        frames = [make_video(path, seed, keyframe_every) for seed, path in enumerate(paths)]
        size = sum(path.stat().st_size for path in paths)
        images: dict[str, str] = {}
        timed(our_way, video_dir, images)  # the videos are read from the disk once
        for number in range(options.rounds):
            loads.append(round(os.getloadavg()[0], 2))
            for way, convert in ways.items():  # A B A B ...: each ratio is of two neighbours
                runs[way].append(timed(convert, video_dir, images))
                runs[ours_name].append(timed(our_way, video_dir, images))
                ratios[way].append(runs[way][-1]["seconds"] / runs[ours_name][-1]["seconds"])
            print(f"round {number + 1} of {options.rounds}, load {loads[-1]}", flush=True)
    return {
        "keyframe_every": keyframe_every,
        "load_average_before_each_round": loads,
        "videos": {"count": len(frames), "frames": sum(frames), "bytes": size, "size": [WIDTH, HEIGHT], "rate": RATE},
        "videos_per_second": {
            way: spread([len(frames) / run["seconds"] for run in timings]) for way, timings in runs.items()
        },
        "cpu_milliseconds_per_video": {
            way: spread([1000 * run["cpu_seconds"] / len(frames) for run in timings]) for way, timings in runs.items()
        },
        f"times_as_fast_{options.num_workers}_workers": {way: spread(values) for way, values in ratios.items()},
        "seconds": {way: [round(run["seconds"], 3) for run in timings] for way, timings in runs.items()},
    }


def show(result: dict[str, object], num_workers: int) -> None:
    faster = result[f"times_as_fast_{num_workers}_workers"]
    print(f"\na keyframe every {result['keyframe_every']} frames")
    print(f"{'way':<32} {'videos/s':>9} {'CPU ms/video':>13}   ours is faster by (median, smallest to largest)")
    for way, figures in result["videos_per_second"].items():
        speed, cpu = figures["median"], result["cpu_milliseconds_per_video"][way]["median"]
        print(f"{way:<32} {speed:>9.1f} {cpu:>13.1f}", end="")
        ratio = faster.get(way)
        print(f"   {ratio['median']:.2f} ({ratio['smallest']:.2f} to {ratio['largest']:.2f})" if ratio else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the conversion of videos.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed (%(default)s)")
    parser.add_argument("--videos", type=int, default=48, help="(%(default)s)")
    parser.add_argument("--num_workers", type=int, default=2, help="of convert_ucf101.py (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="(%(default)s)")
    options = parser.parse_args()
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "num_workers": options.num_workers,
        "rounds": options.rounds,
        "kinds": [compare(options, keyframe_every) for keyframe_every in KEYFRAME_EVERY],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    for kind in result["kinds"]:
        show(kind, options.num_workers)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
