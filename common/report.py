"""`report.html`: how a run went and what the model answers before and after it, in one file that needs no network.

Rendered from what a run leaves in its output folder (`eval_*.json`, `train_log.jsonl`, `run_facts.json`,
`report_images/`), as far as it is there; several runs are compared on one page. The template and what moves in it stand
in `report.html.jinja`. Whatever comes from data, model or command line is escaped: by Jinja2 in the page, and what the
page's script shows is JSON that it puts there as text.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from sklearn.metrics import confusion_matrix

from .errors import UserError, is_first_process, say
from .facts import RUN_FACTS
from .files import INCOMPLETE
from .metrics import strip_answer
from .progress import in_time

REPORT, COMPARISON = "report.html", "report_comparison.html"
PICTURES, PLOTS = "report_images", "plots"
EVALUATIONS = ("before", "after", "only")  # eval_<name>.json
MOST_SIDE = 1600  # pixels of a page in PICTURES; of a long one the model may see more
PICTURE_NAME = re.compile(r"[0-9a-f]{32}\.jpg")

# Thumbnails: side in pixels and quality, the first with which all of them stay within the budget.
THUMBNAILS = ((320, 75), (256, 70), (192, 60), (128, 55), (96, 50), (64, 40))
THUMBNAIL_BUDGET = 11_000_000  # bytes of all in the file, as base64

RESAMPLES, CONFIDENCE = 2000, 0.95
RIGHT = 0.5  # the least score of a right answer; ANLS too counts an answer from there on
MOST_LABELS = 150  # of a confusion matrix
OTHER = "(other)"  # an answer that is no label

METRICS = {"anls": "ANLS", "anls_recipe": "ANLS, the published tables' variant", "auroc": "AUROC"}
GROUPS = {"gained": "gained", "lost": "lost", "wrong": "still wrong", "right": "right both times"}
GROUPS_OF_ONE = {"wrong": "wrong", "right": "right"}
GROUPS_OF_MANY = {"differ": "the runs differ", "wrong": "wrong in all", "right": "right in all"}

INK = "#010203"  # in a plot for the page: the page's own colour of text
BEFORE_COLOR = "#8a94a3"
COLORS = ("#3d7edb", "#dd7f2b", "#2f9e6e", "#b0529c", "#8a8f2a", "#5f6fd0", "#c04f4f", "#3a9ab0")


class Quantity(NamedTuple):
    """Something that `train_log.jsonl` holds, and how it is drawn; `file` without its ending."""

    key: str
    file: str
    title: str
    smoothed: bool = False


QUANTITIES = (
    Quantity("loss", "loss", "Loss", smoothed=True),
    Quantity("learning_rate", "learning_rate", "Learning rate"),
    Quantity("grad_norm", "gradient_norm", "Gradient norm", smoothed=True),
    Quantity("examples_per_second", "questions_per_second", "Questions per second"),
    Quantity("tokens_per_second", "tokens_per_second", "Tokens per second"),
    Quantity("memory_peak_gb", "memory", "Peak of memory, GB"),
    Quantity("data_wait_share", "data_wait", "Share of time waiting for data"),
)


def write_report(options: argparse.Namespace) -> None:
    """Render the report of the run in `options.output_dir`, on the first process; a run does not fail for it."""
    if not is_first_process():
        return
    try:
        say(f"report: {render([options.output_dir], options.output_dir / REPORT)}")
    except (UserError, OSError) as error:
        say(f"no {REPORT} was written ({error}); python -m tools.report {options.output_dir} tries again")


# --- pictures, saved while evaluating


def save_pictures(folder: Path, images: Sequence[Image.Image]) -> list[str]:
    """Save an example's pictures into `folder/report_images`, each distinct one once, whoever saves it first.

    Args:
        folder: the output folder.
        images: in any mode; saved as the model sees them, in RGB, but no larger than `MOST_SIDE`.

    Returns:
        The files' names, made of the pictures' content.
    """
    names = []
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for image in images:
        page = image.convert("RGB")
        digest = hashlib.blake2b(page.tobytes(), digest_size=16, salt=b"%dx%d" % page.size).hexdigest()
        path = folder / PICTURES / f"{digest}.jpg"
        if not path.exists():
            page.thumbnail((MOST_SIDE, MOST_SIDE))
            beside = path.with_name(f"{path.name}.{os.getpid()}{INCOMPLETE}")  # other processes may save it too
            try:
                page.save(beside, "JPEG", quality=85)
            except OSError:
                beside.unlink(missing_ok=True)
                raise
            os.replace(beside, path)
        names.append(path.name)
    return names


def thumbnails(files: dict[str, Path], budget: int = THUMBNAIL_BUDGET) -> dict[str, str]:
    """Small versions as data URIs, by the pictures' names; some are left out where all would exceed the budget."""
    names = list(files)
    sample = names[:: max(1, len(names) // 24)]
    for side, quality in THUMBNAILS:
        expected = [len(_thumbnail(files[name], side, quality)) for name in sample]
        if sum(expected) * len(names) <= 0.9 * budget * len(sample):
            break
    made, used = {}, 0
    for name in names:
        made[name] = _thumbnail(files[name], side, quality)
        used += len(made[name])
        if used > budget:
            del made[name]
            break
    return made


def _thumbnail(file: Path, side: int, quality: int) -> str:
    try:
        with Image.open(file) as image:
            image.thumbnail((side, side))
            content = io.BytesIO()
            image.save(content, "WEBP", quality=quality)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a picture ({error}): delete it, or evaluate again") from error
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


# --- what a run has left


@dataclass(frozen=True)
class Evaluation:
    """One `eval_*.json`.

    Attributes:
        totals: the scores, without those that are not defined.
        examples: with `id`, `generated`, `answers`, and as the task has it `question`, `images` and scores.
        labels: of the classes, where the file has a confusion matrix.
    """

    path: Path
    totals: dict[str, float]
    examples: list[dict[str, Any]]
    labels: list[str] = field(default_factory=list)

    def keys(self) -> list[tuple[str, int]]:
        """What tells an example from the others and is the same in another evaluation: its id, question and accepted
        answers, for other data may be numbered alike, and which of them."""
        seen: Counter[str] = Counter()
        keys = []
        for example in self.examples:
            name = repr([example.get(key) for key in ("id", "question", "answers")])
            keys.append((name, seen[name]))
            seen[name] += 1
        return keys

    def places_in(self, other: Evaluation) -> list[int | None]:
        """For every example the place of the same one in another evaluation; None where it is not there.

        Where both have pictures they are the same too, for a question may be asked of many.
        """
        place = {key: number for number, key in enumerate(other.keys())}
        places = [place.get(key) for key in self.keys()]
        for number, there in enumerate(places):
            if there is not None:
                own, its = (one.get("images") for one in (self.examples[number], other.examples[there]))
                if own and its and own != its:
                    places[number] = None
        return places

    def score_key(self, metric: str) -> str | None:
        """The examples' number that a total is the mean of: of the same name, or of the same mean."""
        numbers = [
            key
            for key, value in (self.examples[0] if self.examples else {}).items()
            if _is_number(value) and all(_is_number(one.get(key)) for one in self.examples)
        ]
        if metric in numbers:
            return metric
        means = {key: sum(one[key] for one in self.examples) / len(self.examples) for key in numbers}
        return next((key for key in numbers if abs(means[key] - self.totals[metric]) < 1e-6), None)


@dataclass(frozen=True)
class Run:
    """An output folder.

    Attributes:
        evaluations: by their names in `EVALUATIONS`, in that order.
        steps: those during training, by the step.
        log: the lines of `train_log.jsonl`.
        facts: `run_facts.json`, or the options alone from the `run.json` of a run without it.
    """

    folder: Path
    name: str
    evaluations: dict[str, Evaluation]
    steps: dict[int, Evaluation]
    log: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def last(self) -> Evaluation | None:
        """What the run has come to."""
        return next((self.evaluations[name] for name in ("after", "only", "before") if name in self.evaluations), None)


def read_run(folder: Path) -> Run:
    """Read what is there.

    Raises:
        UserError: nothing is, or a file is damaged.
    """
    evaluations = {
        name: read_evaluation(folder / f"eval_{name}.json")
        for name in EVALUATIONS
        if (folder / f"eval_{name}.json").exists()
    }
    if "after" in evaluations or "before" in evaluations:
        evaluations.pop("only", None)  # of another time than the run's own
    found = ((re.fullmatch(r"eval_step_(\d+)\.json", path.name), path) for path in folder.glob("eval_step_*.json"))
    steps = {int(match[1]): read_evaluation(path) for match, path in found if match}
    log = read_log(folder / "train_log.jsonl")
    if not evaluations and not steps and not log:
        raise UserError(f"{folder} holds no run: there is no eval_*.json and no train_log.jsonl")
    name = folder.resolve().name or str(folder)
    return Run(folder, name, evaluations, dict(sorted(steps.items())), log, _read_facts(folder))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}): move it away, or run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not a JSON object: move it away, or run again")
    return content


def read_evaluation(path: Path) -> Evaluation:
    """One `eval_*.json`; raises as `read_object` does."""
    content = read_object(path)
    examples = content.get("examples")
    if not isinstance(examples, list) or not all(isinstance(one, dict) for one in examples):
        raise UserError(f"{path} has no list of examples: move it away, or evaluate again")
    totals = {key: float(value) for key, value in content.items() if _is_number(value) and key != "num_examples"}
    confusion = content.get("confusion")
    labels = confusion.get("labels") if isinstance(confusion, dict) else None
    return Evaluation(path, totals, examples, [str(one) for one in labels] if isinstance(labels, list) else [])


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's lines in order of their steps, the later of two for the same; none where there is no file.

    A last line that is being written is left out.

    Raises:
        UserError: with the number of a damaged line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    of_step: dict[tuple[int, int], dict[str, Any]] = {}
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            # a step's own line, an evaluation's after it, the run's end
            kind = 0 if "loss" in entry else 1 if any(name.startswith("eval_") for name in entry) else 2
            of_step[int(entry["step"]), kind] = entry
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is damaged ({error!r}): take the line out") from error
    return [of_step[key] for key in sorted(of_step)]


def _read_facts(folder: Path) -> dict[str, Any]:
    if (folder / RUN_FACTS).exists():
        facts = read_object(folder / RUN_FACTS)
        options = facts.get("options")
        if isinstance(options, list) and all(
            isinstance(one, dict) and {"name", "value"} <= set(one) for one in options
        ):
            return facts
        raise UserError(f"{folder / RUN_FACTS} has no list of options with names and values: move it away")
    if (folder / "run.json").exists():
        recorded = read_object(folder / "run.json")
        options = [{"name": name, "value": value} for name, value in recorded.items() if name != "script"]
        return {"script": recorded.get("script"), "options": options}
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)


# --- scores and their intervals


class Estimate(NamedTuple):
    """A value and the ends of its interval; no ends where the examples hold no scores of their own."""

    value: float
    low: float | None = None
    high: float | None = None


Statistic = Callable[[np.ndarray], np.ndarray]  # how often each example counts, (resamples, n) -> (resamples,)


def estimate(evaluation: Evaluation, metric: str) -> Estimate:
    """A total with its bootstrap interval."""
    statistic = _statistic(evaluation, metric, range(len(evaluation.examples)))
    return _with_interval(evaluation.totals[metric], len(evaluation.examples), statistic)


def estimate_gain(before: Evaluation, after: Evaluation, metric: str) -> Estimate:
    """The difference of two totals; its interval where both are of the same examples, which are resampled in pairs."""
    gain = after.totals[metric] - before.totals[metric]
    places = after.places_in(before)
    if None in places or len(places) != len(before.examples):
        return Estimate(gain)
    first = _statistic(before, metric, places)
    second = _statistic(after, metric, range(len(places)))
    paired = None if first is None or second is None else lambda counts: second(counts) - first(counts)
    return _with_interval(gain, len(places), paired)


def _with_interval(value: float, size: int, statistic: Statistic | None) -> Estimate:
    """Percentiles of the statistic over resampled examples; the same ones every time."""
    if statistic is None or size == 0:
        return Estimate(value)
    values = np.concatenate([statistic(counts) for counts in _resampled(size)])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def _resampled(size: int, at_once: int = 200) -> Iterator[np.ndarray]:
    """How often each of `size` examples is drawn: (resamples, size), a part of the resamples at a time."""
    generator = np.random.default_rng(0)
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)


def _statistic(evaluation: Evaluation, metric: str, order: Sequence[int]) -> Statistic | None:
    examples = [evaluation.examples[number] for number in order]
    if metric == "auroc" and all(_is_number(one.get("probability_yes")) and one.get("answers") for one in examples):
        truth = np.array([strip_answer(str(one["answers"][0])).lower() == "yes" for one in examples])
        probabilities = np.array([one["probability_yes"] for one in examples])
        return lambda counts: weighted_auroc(truth, probabilities, counts)
    key = evaluation.score_key(metric)
    if key is None:
        return None
    scores = np.array([one[key] for one in examples], dtype=float)
    return lambda counts: counts @ scores / counts.sum(axis=1)


def weighted_auroc(truth: np.ndarray, probabilities: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Areas under the ROC curve, ties counting half.

    Args:
        truth: whether each example is positive, (n,).
        probabilities: of being positive, (n,).
        counts: how often each example counts, (resamples, n).

    Returns:
        (resamples,), not a number where only one class is left.
    """
    order = np.argsort(probabilities)
    _, starts = np.unique(probabilities[order], return_index=True)
    positive = np.add.reduceat(counts[:, order] * truth[order], starts, axis=1)
    negative = np.add.reduceat(counts[:, order] * ~truth[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def title_of(metric: str) -> str:
    """A metric's name on the page."""
    return METRICS.get(metric, metric.replace("_", " ").capitalize())


class Scale(NamedTuple):
    """How a metric's numbers are shown: fractions in percent, others as they are."""

    percent: bool
    low: float
    high: float

    def text(self, value: float, signed: bool = False) -> str:
        sign = "+" if signed else ""
        return f"{100 * value:{sign}.2f}" if self.percent else f"{value:{sign}.4g}"

    def interval(self, estimate: Estimate, signed: bool = False) -> str:
        if estimate.low is None:
            return ""
        low, high = (
            f"{100 * end:{'+' if signed else ''}.1f}" if self.percent else self.text(end, signed)
            for end in estimate[1:]
        )
        return f"{low} to {high}"

    def place(self, value: float) -> float:
        """In percent of the scale's length."""
        return round(100 * (value - self.low) / ((self.high - self.low) or 1), 2)


def describe_metric(
    metric: str, rows: Sequence[tuple[str, Evaluation, str]], published: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One metric of several evaluations, the first of which the others are compared with, for the page.

    Args:
        rows: evaluations that have the metric, each with what it is called and its colour.
        published: `name`, `score` in percent.
    """
    estimates = [estimate(evaluation, metric) for _, evaluation, _ in rows]
    ends = [end for one in estimates for end in one if end is not None]
    percent = all(0 <= end <= 1 for end in ends)
    scale = Scale(percent, 0, 1) if percent else Scale(False, min(0, *ends), max(ends))
    lines = []
    for number, ((label, evaluation, color), one) in enumerate(zip(rows, estimates, strict=True)):
        line = {"label": label, "text": scale.text(one.value), "interval": scale.interval(one)}
        line |= {"color": color, "place": scale.place(one.value), "gain": None}
        if one.low is not None:
            line |= {"left": scale.place(one.low), "width": round(scale.place(one.high) - scale.place(one.low), 2)}
        if number:
            gain = estimate_gain(rows[0][1], evaluation, metric)
            line["gain"] = {
                "text": scale.text(gain.value, signed=True),
                "interval": scale.interval(gain, signed=True),
                "sign": 0 if gain.low is None or gain.low <= 0 <= gain.high else 1 if gain.value > 0 else -1,
            }
        lines.append(line)
    about = {"metric": metric, "title": title_of(metric), "unit": "%" if percent else "", "lines": lines}
    if published is not None and published.get("metric") == metric and percent and _is_number(published.get("score")):
        score = f"{published['score']:.{published.get('decimals', 2)}f}"
        about["published"] = {"text": score, "place": scale.place(published["score"] / 100), "name": published["name"]}
    return about


# --- plots


class Curve(NamedTuple):
    """Points of a plot; `label` is what the curve is of."""

    label: str
    steps: np.ndarray
    values: np.ndarray


def curve_of(run: Run, key: str) -> Curve | None:
    """A quantity of the log over the steps; None where there is none."""
    points = [(line["step"], line[key]) for line in run.log if isinstance(line.get(key), int | float)]
    if not points:
        return None
    steps, values = np.array(points, dtype=float).T
    return Curve(run.name, steps, values)


def smooth(values: np.ndarray) -> np.ndarray:
    """Each point's mean with its neighbours, by a Gaussian of a fortieth of the points; without what is not finite."""
    finite = np.isfinite(values)
    spread = max(1.0, len(values) / 40)
    total = gaussian_filter1d(np.where(finite, values, 0.0), spread, mode="constant")
    weight = gaussian_filter1d(finite.astype(float), spread, mode="constant")
    return np.where(weight > 0, total / np.maximum(weight, 1e-300), np.nan)


def draw(title: str, curves: Sequence[Curve], smoothed: bool = False, dots: bool = False, ink: str = INK) -> Figure:
    """Curves over the steps.

    Args:
        smoothed: draw a smoothed curve above each one's points.
        dots: mark the points.
        ink: of axes and texts.
    """
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        shown = np.unique(np.linspace(0, len(curve.steps) - 1, min(len(curve.steps), 600)).astype(int))
        values = np.where(np.isfinite(curve.values), curve.values, np.nan)
        few = dots or len(shown) < 3
        axes.plot(
            curve.steps[shown],
            values[shown],
            color=color,
            alpha=0.35 if smoothed else 1,
            linewidth=1 if smoothed else 1.6,
            marker="o" if few else None,
            markersize=4,
        )
        if smoothed:
            axes.plot(curve.steps[shown], smooth(curve.values)[shown], color=color, linewidth=1.8)
    axes.set_title(title, fontsize=10, color=ink, loc="left")
    axes.set_xlabel("step", fontsize=8, color=ink)
    axes.tick_params(labelsize=8, color=ink, labelcolor=ink)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.get_offset_text().set(fontsize=8, color=ink)
    axes.grid(color=ink, alpha=0.12, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    if not any((np.isfinite(curve.values) & (curve.values < 0)).any() for curve in curves):
        axes.set_ylim(bottom=0)
    return figure


def in_page(figure: Figure, title: str) -> Markup:
    """A figure as SVG whose ink is the page's, its texts text."""
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", content.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(re.sub(r'width="[^"]*pt" height="[^"]*pt"|height="[^"]*pt" width="[^"]*pt"', "", svg, count=1))


def draw_run(run: Run, folder: Path) -> list[dict[str, Any]]:
    """All plots of a run, also as PNG files in `folder/plots`."""
    plots = [
        (quantity.file, quantity.title, [curve], quantity.smoothed, False)
        for quantity in QUANTITIES
        if (curve := curve_of(run, quantity.key))
    ]
    scores = scores_over_steps(run)
    for metric, curve in scores.items():
        plots.append((f"score_{re.sub('[^a-zA-Z0-9]+', '_', metric)}", f"{title_of(metric)} while training", [curve]))
    drawn = []
    for file, title, curves, *how in plots:
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        smoothed, dots = how or (False, True)
        with matplotlib.rc_context({"text.parse_math": False}):
            draw(title, curves, smoothed, dots, ink="black").savefig(folder / PLOTS / f"{file}.png", dpi=150)
        figure = in_page(draw(title, curves, smoothed, dots), title)
        drawn.append({"svg": figure, "title": title, "href": f"{PLOTS}/{file}.png", "smoothed": smoothed})
    return drawn


def scores_over_steps(run: Run) -> dict[str, Curve]:
    """The totals over the steps at which they were measured, for runs that did while training."""
    if not run.steps:
        return {}
    measured = dict(run.steps)
    if "before" in run.evaluations:
        measured[0] = run.evaluations["before"]
    if "after" in run.evaluations:
        measured[max([*run.steps, *(int(line["step"]) for line in run.log)])] = run.evaluations["after"]
    curves = {}
    for metric in next(iter(run.steps.values())).totals:
        points = sorted((step, one.totals[metric]) for step, one in measured.items() if metric in one.totals)
        steps, values = np.array(points, dtype=float).T
        curves[metric] = Curve(run.name, steps, values)
    return curves


def draw_comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every quantity's curves of all runs over one another; a run keeps its colour where others have none."""
    nothing = np.full(1, np.nan)
    drawn = []
    for quantity in QUANTITIES:
        curves = [curve_of(run, quantity.key) for run in runs]
        if any(curves):
            filled = [curve or Curve("", nothing, nothing) for curve in curves]
            figure = draw(quantity.title, filled, quantity.smoothed)
            drawn.append(
                {"svg": in_page(figure, quantity.title), "title": quantity.title, "smoothed": quantity.smoothed}
            )
    return drawn


# --- examples


def compare_examples(
    columns: Sequence[tuple[str, Evaluation]], metric: str | None, groups: dict[str, str]
) -> list[dict[str, Any]]:
    """The last column's examples with what every column answers.

    Args:
        columns: evaluations with what they are called.
        metric: whose scores tell right from wrong; without one, all are in no group.
        groups: one of `GROUPS`, `GROUPS_OF_ONE`, `GROUPS_OF_MANY`.

    Returns:
        For every example `id`, `question`, `answers`, `images`, `given` (for every column the text and its score, or
        None where it has no such example) and `group`.
    """
    keys = [evaluation.score_key(metric) if metric else None for _, evaluation in columns]
    last = columns[-1][1]
    places = [last.places_in(evaluation) for _, evaluation in columns]
    compared = []
    for example, *there in zip(last.examples, *places, strict=True):
        found = [
            None if place is None else evaluation.examples[place]
            for (_, evaluation), place in zip(columns, there, strict=True)
        ]
        given = [
            None if one is None else [str(one.get("generated", "")), None if name is None else float(one[name])]
            for one, name in zip(found, keys, strict=True)
        ]
        answers, kept = example.get("answers"), [one.get("images") for one in found if one]
        compared.append(
            {
                "id": str(example.get("id")),
                "question": str(example.get("question") or ""),
                "answers": [str(one) for one in answers] if isinstance(answers, list) else [],
                "images": next((one for one in kept if isinstance(one, list) and one), []),
                "given": given,
                "group": group_of([one[1] for one in given if one is not None], groups),
            }
        )
    return compared


def describe_sizes(columns: Sequence[tuple[str, Evaluation]]) -> str:
    """How many examples each evaluation has and, where not all have the same, how many of them the first one has."""
    (name, first), *others = columns
    sizes = [len(evaluation.examples) for _, evaluation in columns]
    shared = [len(evaluation.examples) - evaluation.places_in(first).count(None) for _, evaluation in others]
    if {*sizes, *shared} == {sizes[0]}:
        return f"{sizes[0]} examples"
    told = [
        f"{other} over {size}, of which {name} has {count}"
        for (other, _), size, count in zip(others, sizes[1:], shared, strict=True)
    ]
    return "; ".join([f"{sizes[0]} examples in {name}", *told])


def scored_metrics(columns: Sequence[tuple[str, Evaluation]], metrics: Iterable[str]) -> list[str]:
    """Those of the metrics that all evaluations have, with a score of each example; by the first they are grouped."""
    return [metric for metric in metrics if all(metric in one.totals and one.score_key(metric) for _, one in columns)]


def group_of(scores: Sequence[float | None], groups: dict[str, str]) -> str | None:
    """Which of the groups an example with these scores is in; None where a score is missing."""
    if None in scores:
        return None
    right = [score >= RIGHT for score in scores]
    if all(right) or not any(right):
        return "right" if right[0] else "wrong"
    return "differ" if groups is GROUPS_OF_MANY else "gained" if right[-1] else "lost"


def confusions(columns: Sequence[tuple[str, Evaluation]], examples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Confusion matrices and the accuracy of each class, where each example has one answer of a few labels.

    Every example gets its `label` and for every column what was `said`, both numbers of `labels`.
    """
    last = columns[-1][1]
    if "accuracy" not in last.totals or not all(len(one["answers"]) == 1 for one in examples):
        return None
    truth = [_normal(one["answers"][0]) for one in examples]
    written = {_normal(label): label for label in last.labels if label != OTHER}
    for one, name in zip(examples, truth, strict=True):
        written.setdefault(name, one["answers"][0])
    few = len(written) <= MOST_LABELS and (last.labels or len(set(truth)) <= max(2, len(truth) // 4))
    if not few or not written:
        return None
    names = list(written) if last.labels else sorted(written)
    number = {name: place for place, name in enumerate(names)}
    labels = [*(written[name] for name in names), OTHER]
    for one, name in zip(examples, truth, strict=True):
        one["label"] = number[name]
        one["said"] = [None if given is None else number.get(_normal(given[0]), len(names)) for given in one["given"]]
    matrices = []
    for column, (title, _) in enumerate(columns):
        pairs = [(one["label"], one["said"][column]) for one in examples if one["said"][column] is not None]
        if not pairs:
            continue
        matrix = confusion_matrix(*zip(*pairs, strict=True), labels=range(len(labels)))
        counts = matrix.sum(axis=1)
        accuracies = [float(matrix[row, row] / count) if count else None for row, count in enumerate(counts)]
        matrices.append({"title": title, "rows": matrix.tolist(), "counts": counts.tolist(), "accuracies": accuracies})
        matrices[-1]["column"] = column
    return {"labels": labels, "matrices": matrices}


def _normal(text: str) -> str:
    """As `exact_match` compares it."""
    return strip_answer(text).lower()


def pack_examples(examples: Sequence[dict[str, Any]], folders: Sequence[Path], beside: Path) -> dict[str, Any]:
    """Examples and pictures as the page's script takes them: every question and every picture once.

    Args:
        folders: of the runs, where the pictures are looked for.
        beside: the folder of the page, which full pages are linked from.
    """
    questions = {one["question"]: None for one in examples}
    number = {question: place for place, question in enumerate(questions)}
    files: dict[str, Path] = {}
    for name in dict.fromkeys(name for one in examples for name in one["images"]):
        if isinstance(name, str) and PICTURE_NAME.fullmatch(name):
            found = next((folder / PICTURES / name for folder in folders if (folder / PICTURES / name).is_file()), None)
            files |= {name: found} if found else {}
    small = thumbnails(files)
    places = {name: place for place, name in enumerate(files)}
    return {
        "questions": list(questions),
        "pictures": [
            {"href": urllib.parse.quote(os.path.relpath(file, beside).replace(os.sep, "/")), "small": small.get(name)}
            for name, file in files.items()
        ],
        "examples": [
            {
                **{key: value for key, value in one.items() if key not in ("question", "images")},
                "question": number[one["question"]],
                "images": [places[name] for name in one["images"] if name in places],
            }
            for one in examples
        ],
    }


# --- pages


def render(folders: Sequence[Path], output: Path) -> Path:
    """Render one run's report, or several runs' comparison; whole or absent.

    Args:
        folders: output folders; the first is the one that others are compared with.
        output: the page; the plots of one run are written beside it, into `plots/`.

    Returns:
        `output`.

    Raises:
        UserError: a folder without a run, a damaged file.
    """
    runs = _with_distinct_names([read_run(Path(folder)) for folder in folders])
    page = page_of_run(runs[0], output.parent) if len(runs) == 1 else page_of_comparison(runs, output.parent)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    text = environment.get_template("report.html.jinja").render(**page, nonce=_nonce(page))
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(output.name + INCOMPLETE)
    beside.write_bytes(text.encode("utf-8", "replace"))  # half a character of a damaged answer is a question mark
    os.replace(beside, output)
    return output


def _nonce(page: dict[str, Any]) -> str:
    """What marks the page's own script: nothing that stands in the data can know it."""
    return hashlib.blake2b(repr(page["data"]).encode("utf-8", "replace"), digest_size=16).hexdigest()


def _with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Runs by the names of their folders, or by their whole paths where these are the same."""
    counts = Counter(run.name for run in runs)
    return [run if counts[run.name] == 1 else dataclasses.replace(run, name=str(run.folder)) for run in runs]


def page_of_run(run: Run, beside: Path) -> dict[str, Any]:
    """What the template takes for one run."""
    columns = [("evaluation" if name == "only" else name, one) for name, one in run.evaluations.items()]
    groups = GROUPS if len(columns) > 1 else GROUPS_OF_ONE
    published = run.facts.get("published")
    if not isinstance(published, dict) or not {"name", "metric", "score"} <= set(published):
        published = None
    data = [{"use": use, **one} for use, one in (run.facts.get("data") or {}).items() if isinstance(one, dict)]
    return {
        "title": run.name,
        "subtitle": _describe(run),
        "comparison": False,
        **_evaluated(columns, [BEFORE_COLOR, COLORS[0]][-len(columns) :], groups, [run.folder], beside, published),
        "plots": draw_run(run, beside),
        "legend": [],
        "summary": _summary(run),
        "options": run.facts.get("options", []),
        "facts": {name: run.facts[name] for name in ("versions", "machine") if isinstance(run.facts.get(name), dict)},
        "data_used": data,
        "about": {name: run.facts[name] for name in ("command", "started", "commit") if run.facts.get(name)},
        "differing": [],
        "runs": [],
    }


def page_of_comparison(runs: Sequence[Run], beside: Path) -> dict[str, Any]:
    """What the template takes for several runs, each by its last evaluation."""
    colored = [(run, COLORS[number % len(COLORS)]) for number, run in enumerate(runs)]
    columns = [(run.name, run.last) for run in runs if run.last is not None]
    colors = [color for run, color in colored if run.last is not None]
    names = list(dict.fromkeys(one["name"] for run in runs for one in run.facts.get("options", [])))
    values = [{one["name"]: one.get("value") for one in run.facts.get("options", [])} for run in runs]
    rows = [(name, [str(of_run.get(name, "-")) for of_run in values]) for name in names]
    return {
        "title": "Comparison of " + (" and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs"),
        "subtitle": [f"differences are from {runs[0].name}"],
        "comparison": True,
        **_evaluated(columns, colors, GROUPS_OF_MANY, [run.folder for run in runs], beside, None),
        "plots": draw_comparison(runs),
        "legend": [{"label": run.name, "color": color} for run, color in colored],
        "summary": [],
        "options": [],
        "facts": {},
        "data_used": [],
        "about": {},
        "differing": [{"name": name, "values": its} for name, its in rows if len(set(its)) > 1],
        "runs": [
            {"name": run.name, "folder": str(run.folder), "about": _describe(run), "summary": _summary(run)}
            for run in runs
        ],
    }


def _evaluated(
    columns: Sequence[tuple[str, Evaluation]],
    colors: Sequence[str],
    groups: dict[str, str],
    folders: Sequence[Path],
    beside: Path,
    published: dict[str, Any] | None,
) -> dict[str, Any]:
    """Scores, confusion and examples of several evaluations; the metric of a published score comes first."""
    if not columns:
        lists, others = ("metrics", "groups", "columns"), ("sizes", "confusion", "judged_by", "data")
        return {**{name: [] for name in lists}, **dict.fromkeys(others)}
    last = columns[-1][1]
    metrics = sorted(last.totals, key=lambda metric: published is None or metric != published["metric"])
    described = [
        describe_metric(
            metric,
            [(name, one, color) for (name, one), color in zip(columns, colors, strict=True) if metric in one.totals],
            published,
        )
        for metric in metrics
    ]
    scored = scored_metrics(columns, metrics)
    examples = compare_examples(columns, scored[0] if scored else None, groups)
    confusion = confusions(columns, examples)
    counts = Counter(one["group"] for one in examples)
    data = {
        "columns": [name for name, _ in columns],
        "labels": confusion["labels"] if confusion else [],
        **pack_examples(examples, folders, beside),
    }
    return {
        "metrics": described,
        "sizes": describe_sizes(columns),
        "confusion": confusion,
        "columns": [name for name, _ in columns],
        "groups": [{"key": key, "label": label, "count": counts[key]} for key, label in groups.items()]
        if scored
        else [],
        "judged_by": title_of(scored[0]) if scored else None,
        "data": data,
    }


def _describe(run: Run) -> list[str]:
    """A run in a few words."""
    options = {one.get("name"): one.get("value") for one in run.facts.get("options", [])}
    words = [run.facts.get("script"), options.get("model_name_or_path")]
    if not options.get("eval_only"):
        words += [options.get("method"), options.get("precision")]
    words.append((run.facts.get("machine") or {}).get("gpu"))
    return [str(word) for word in words if word]


def _summary(run: Run) -> list[dict[str, str]]:
    """Training in a few numbers."""
    logged = [line for line in run.log if "loss" in line]
    if not logged:
        return []
    last = run.log[-1]
    found = {"steps": f"{int(last['step']):,}", "last loss": _short(logged[-1].get("loss"))}
    if _is_number(last.get("train_loss")):
        found["mean loss"] = _short(last["train_loss"])
    if _is_number(last.get("train_runtime")):
        resumed = last.get("resumed_from_step")
        found[f"duration from step {resumed}" if resumed else "duration"] = in_time(last["train_runtime"])
    for key, label in (("examples_per_second", "questions/s, median"), ("tokens_per_second", "tokens/s, median")):
        values = [line[key] for line in logged if _is_number(line.get(key))]
        if values:
            found[label] = _short(float(np.median(values)))
    memory = [line["memory_peak_gb"] for line in logged if _is_number(line.get("memory_peak_gb"))]
    if memory:
        found["peak memory"] = f"{max(memory):.1f} GB"
    return [{"name": name, "value": value} for name, value in found.items()]


def _short(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and abs(value) >= 1000 else f"{value:.4g}"
