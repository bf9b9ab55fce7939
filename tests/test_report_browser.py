"""The report in a browser: what a person sees, presses and types; long, for a browser has to start.

Debian's and Ubuntu's package `chromium` is enough: Playwright drives the installed browser and fetches none.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.report import render, save_pictures
from tests import report_runs
from tests.launch import WAIT
from tests.report_runs import HOSTILE, page, write_classes, write_documents, write_log, write_run

pytestmark = pytest.mark.long

COUNT = 5000


@pytest.fixture
def visit(chromium):
    """Open a page from disk, without a network; at the end of the test nothing may have gone wrong in it."""
    opened, complaints = [], []

    def open_page(path: Path, **kwargs):
        context = chromium.new_context(offline=True, viewport={"width": 1280, "height": 900}, **kwargs)
        context.set_default_timeout(WAIT)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
        opened.append(context)
        tab.goto(path.as_uri())
        return tab

    open_page.complaints = complaints
    yield open_page
    assert complaints == []
    for context in opened:
        context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("report") / "run", count=80, steps=(50, 100))
    return render([folder], folder / "report.html")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """5,000 questions, each about a page of its own."""
    folder = tmp_path_factory.mktemp("large")
    first = np.asarray(page(0))
    examples = report_runs.document_examples(folder, COUNT, pictures=False)
    for number, one in enumerate(examples):
        picture = first.copy()
        picture[60 + number % 300, :, 0] = number // 300  # no two are the same
        one["images"] = save_pictures(folder, [Image.fromarray(picture)])
    answers = [one["answers"][0] for one in examples]
    write_documents(folder, "before", examples, ["I cannot read that on this page."] * COUNT)
    write_documents(folder, "after", examples, [*answers[:4000], *["no idea"] * 1000])
    write_log(folder)
    return render([folder], folder / "report.html")


def shown(tab):
    """The ids in the list, as far as it is filled."""
    return tab.locator("#list .id").all_text_contents()


def test_filters(visit, report):
    tab = visit(report)
    assert tab.locator("#count").text_content() == "80 examples"
    tab.click("[data-group=gained]")
    assert shown(tab) == [f"test_{number}" for number in range(0, 80, 4)]
    assert set(tab.locator("#list .group").all_text_contents()) == {"gained"}
    tab.click("[data-group=lost]")
    assert tab.locator("#count").text_content() == "40 of 80 examples"
    tab.click("[data-group=gained]")
    assert set(tab.locator("#list .group").all_text_contents()) == {"lost"}
    tab.click("[data-group=lost]")  # none is left, so all are back
    assert tab.locator("#count").text_content() == "80 examples"


def test_search_and_order(visit, report):
    tab = visit(report)
    tab.fill("#search", "TOTAL 17")
    assert shown(tab) == ["test_17"]
    tab.fill("#search", "1023.00")  # an accepted answer
    assert shown(tab) == ["test_23"]
    tab.fill("#search", "no idea test_21")  # an answer and an id
    assert shown(tab) == ["test_21"]
    tab.fill("#search", "nobody says this")
    assert shown(tab) == []
    tab.fill("#search", "")
    tab.select_option("#order", "loss")
    assert shown(tab)[:3] == ["test_1", "test_5", "test_9"]
    tab.select_option("#order", "gain")
    assert shown(tab)[:3] == ["test_0", "test_4", "test_8"]


def test_every_picture_shows(visit, report):
    tab = visit(report)
    while tab.locator("#list article").count() < 80:
        tab.mouse.wheel(0, 3000)
        tab.wait_for_timeout(50)
    script = (
        "() => [...document.querySelectorAll('#list img')].map(image => image.decode().then(() => image.naturalWidth))"
    )
    widths = tab.evaluate(f"() => Promise.all(({script})())")
    assert len(widths) == 80
    assert min(widths) > 0
    boxes = tab.evaluate("() => [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)")
    assert len(boxes) == 9
    assert min(boxes) > 100


def test_zoom(visit, report):
    """The full page, enlarged at the pointer by the wheel, moved by the pointer, closed by Esc."""
    tab = visit(report)
    tab.click("#list article:nth-child(3) .pictures button")
    image = tab.locator("#zoom .stage img")
    tab.wait_for_function("() => document.querySelector('#zoom .stage img').naturalWidth === 340")
    assert "report_images/" in image.get_attribute("src")
    assert "What is total 2?" in tab.locator("#zoom footer").text_content()
    tab.wait_for_function("() => document.querySelector('#zoom .stage img').style.transform")
    before = image.bounding_box()
    point = (before["x"] + before["width"] / 4, before["y"] + before["height"] / 4)
    tab.mouse.move(*point)
    tab.mouse.wheel(0, -400)
    tab.wait_for_function(
        "width => document.querySelector('#zoom img').getBoundingClientRect().width > 1.5 * width", arg=before["width"]
    )
    after = image.bounding_box()
    assert (point[0] - after["x"]) / after["width"] == pytest.approx(0.25, abs=0.01), "what is under the pointer stays"
    tab.mouse.down()
    tab.mouse.move(point[0] + 60, point[1] + 40)
    tab.mouse.up()
    moved = image.bounding_box()
    assert (moved["x"] - after["x"], moved["y"] - after["y"]) == pytest.approx((60, 40), abs=1)
    tab.keyboard.press("0")
    assert image.bounding_box()["width"] == pytest.approx(before["width"], abs=1)
    tab.keyboard.press("Escape")
    assert not tab.locator("#zoom").is_visible()


def test_page_without_its_folder(chromium, report, tmp_path):
    """Sent on alone it still shows the thumbnails, also enlarged, and says so."""
    shutil.copy(report, tmp_path / "report.html")
    context = chromium.new_context(offline=True)
    context.set_default_timeout(WAIT)
    tab = context.new_page()
    tab.goto((tmp_path / "report.html").as_uri())
    tab.click("#list article:nth-child(1) .pictures button")
    tab.wait_for_function("() => document.querySelector('#zoom .stage img').naturalWidth > 0")
    assert "only its thumbnail" in tab.locator("#zoom-title").text_content()
    context.close()


def test_hostile_text(visit, tmp_path):
    write_run(tmp_path, pictures=False)
    examples = [
        {"id": HOSTILE, "question": HOSTILE, "answers": [HOSTILE, "b"], "images": save_pictures(tmp_path, [page(0)])}
    ]
    for name in ("before", "after"):
        write_documents(tmp_path, name, examples, [HOSTILE])
    stored = json.loads((tmp_path / "run_facts.json").read_text())
    stored["options"].append({"name": HOSTILE, "value": HOSTILE, "default": HOSTILE, "origin": "given"})
    (tmp_path / "run_facts.json").write_text(json.dumps(stored))
    tab = visit(render([tmp_path], tmp_path / "report.html"))
    tab.click("#list .pictures button")
    assert tab.locator("#list .id").text_content() == HOSTILE
    assert tab.locator("#zoom .question").text_content() == HOSTILE
    assert tab.evaluate("() => window.hacked") is None
    assert tab.locator("script").count() == 2
    assert HOSTILE in tab.locator(".facts").first.text_content()
    # even where markup got in, the policy would let no script of it run
    tab.evaluate("() => { document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.hacked=1\">x</b>'); }")
    assert tab.evaluate("() => document.body.lastElementChild.onclick") is None
    (refused,) = visit.complaints
    assert "violates the following Content Security Policy directive" in refused
    visit.complaints.clear()


def test_classes(visit, tmp_path):
    """A cell of the confusion matrix shows its examples."""
    labels = ["Archery", "Bowling", "Diving"]
    truth = labels * 10
    write_classes(tmp_path, "before", labels, truth, ["Bowling"] * 30)
    write_classes(tmp_path, "after", labels, truth, ["Archery", "Bowling", "Bowling"] * 10)
    tab = visit(render([tmp_path], tmp_path / "report.html"))
    assert tab.locator("#count").text_content() == "30 examples"
    tab.click(".matrix >> nth=1 >> button[data-label='2'][data-said='1']")
    assert tab.locator("#count").text_content() == "10 of 30 examples"
    assert tab.locator("#cell").text_content().startswith("Diving answered as Bowling, after")
    tab.click("#cell")
    assert tab.locator("#count").text_content() == "30 examples"


def test_comparison(visit, tmp_path):
    folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("lora <64>", "full"))]
    examples = report_runs.document_examples(folders[1], 12)
    write_documents(folders[1], "after", examples, [one["answers"][0] for one in examples])
    tab = visit(render(folders, folders[0] / "report_comparison.html"))
    tab.click("[data-group=differ]")
    assert tab.locator("#list article").count() == 6
    assert tab.locator("#list article").first.locator("dt").all_text_contents() == ["accepted", "lora <64>", "full"]
    assert tab.locator(".legend span").all_text_contents() == ["lora <64>", "full"]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_both_schemes_and_narrow_windows(visit, report, scheme, width):
    """Nothing is wider than the window, and text stands out from its background."""
    tab = visit(report, color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 900})
    assert tab.evaluate("() => document.documentElement.scrollWidth") <= width
    light = """selector => { const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
      const style = getComputedStyle(document.querySelector(selector));
      return [style.color, style.backgroundColor].map(color => {
        canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; }); }"""
    for selector in ("body", ".card", ".pill.good", ".pill.bad"):
        low, high = sorted(tab.evaluate(light, selector))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{selector}: WCAG's contrast for text"
    assert (tab.evaluate(light, "body")[1] < 0.1) == (scheme == "dark")


def test_5000_examples(visit, large, record_property):
    """Under 20 MB; filter, search and order each take the page's script under a second; scrolling adds the rest."""
    size = large.stat().st_size
    assert size < 20e6
    tab = visit(large)
    pictures = tab.evaluate("() => data.pictures.map(picture => picture.small !== null)")
    assert len(pictures) == COUNT
    assert all(pictures)
    tab.click("[data-group=wrong]")
    assert tab.locator("#count").text_content() == "1000 of 5000 examples"
    tab.fill("#search", "total 4321")
    assert shown(tab) == ["test_4321"]
    tab.fill("#search", "")
    tab.click("[data-group=wrong]")
    tab.select_option("#order", "low")
    assert shown(tab)[0] == "test_4000"
    took = tab.evaluate("() => performance.getEntriesByName('show').map(entry => entry.duration)")
    assert len(took) == 6  # on load, and for each of the five above
    record_property("show_ms", took)
    print(f"{size / 1e6:.1f} MB; the page's script took {', '.join(f'{one:.0f}' for one in took)} ms")
    assert max(took) < 1000
    put = tab.locator("#list article").count()
    for _ in range(8):
        tab.mouse.wheel(0, 20_000)
        tab.wait_for_timeout(50)
    assert tab.locator("#list article").count() > put
