"""The page in a browser: what a person drops, writes, presses and reads, two at once too.

Debian's and Ubuntu's package `chromium` is enough: Playwright drives the installed browser and fetches none.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from common.collation import Turn
from common.demo import CHECKPOINT
from tests.launch import WAIT, free_port, start_logged
from tests.model_helpers import write_pictures
from tests.report_runs import HOSTILE, document_examples, write_documents
from tests.test_predict import full_model, reference, save_adapter
from tools import predict

pytestmark = pytest.mark.long

TOKENS = 1000  # of which most answers take ten
ADAPTED, BASE = 0, 1  # the answers' places
NAMED = "<img src=x onerror=hacked=1>.png"
TEXT = HOSTILE + " ${7*7} {{7*7}}"  # what Gradio's own templates would fill in
# the command, which also tells whom the server reaches for
WATCHED = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore it
def watch(event, arguments):
    host = arguments[0] if event == "socket.getaddrinfo" else arguments[1][0] if event == "socket.connect" else None
    if host not in (None, "127.0.0.1", "localhost"):
        print("reached for", host, flush=True)
sys.addaudithook(watch)
runpy.run_module("tools.app", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, one of them under a hostile name too, and files that are none."""
    folder = tmp_path_factory.mktemp("images")
    write_pictures(folder)
    shutil.copy(folder / "1.png", folder / NAMED)
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "letter.txt").write_text("Dear Sir or Madam")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter, with two evaluations of eleven questions beside it, one of which is of hostile texts."""
    folder = save_adapter(tmp_path_factory.mktemp("adapter"))
    examples = document_examples(folder, 11)
    examples[10] |= {"id": TEXT, "question": TEXT, "answers": [TEXT]}
    right = [one["answers"][0] for one in examples]
    write_documents(folder, "before", examples, ["nothing here"] * 11)
    write_documents(folder, "after", examples, [*right[:6], *["no idea"] * 4, TEXT])
    return folder


@pytest.fixture(scope="module")
def address(adapter, tmp_path_factory):
    """Of the page as its command serves it, adapter and base side by side."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-c", WATCHED, "--checkpoint", adapter, "--compare", CHECKPOINT, "--port", port]
    started = start_logged([*command, "--num_crops", 1, "--max_new_tokens", TOKENS], log, {**os.environ})
    until = time.monotonic() + 240
    while "the page is at" not in log.read_text() and started.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    found = re.search(r"the page is at (http://127\.0\.0\.1:\d+)", log.read_text())
    assert found, log.read_text()
    yield found[1]
    assert started.poll() is None, log.read_text()
    os.killpg(started.pid, signal.SIGINT)
    started.wait(60)
    assert "Traceback" not in log.read_text()
    assert "reached for" not in log.read_text()


@pytest.fixture
def visit(chromium, address):
    """Open the page; at the end nothing may have gone wrong in it, and nothing been asked of another host."""
    opened, complaints = [], []

    def open_page(**settings):
        context = chromium.new_context(viewport={"width": 1400, "height": 1000}, **settings)
        context.set_default_timeout(WAIT)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: elsewhere(request.url) and complaints.append(f"asked for {request.url}"))
        opened.append(context)
        tab.goto(address)
        tab.get_by_role("button", name="Ask").wait_for()
        return tab

    def elsewhere(url):
        return not url.startswith((address, "data:", "blob:"))

    yield open_page
    for context in opened:
        context.close()
    assert [one for one in complaints if not one.startswith("warning: Method not implemented.")] == []  # Gradio's own


@pytest.fixture(scope="module")
def wanted(adapter):
    """Both answers about some pictures, made without the page."""
    models = [predict.load_model(adapter, predict.how_to_load(adapter)).eval(), full_model()]

    def answers(question, *files):
        turn = [Turn(question, images=[Image.open(file) for file in files])]
        return [reference(model, turn, TOKENS) for model in models]

    return answers


def drop(tab, *files: Path):
    tab.locator("input[type=file]").first.set_input_files([str(file) for file in files])


def ask(tab, question):
    tab.get_by_label("Question", exact=True).fill(question)
    tab.get_by_role("button", name="Ask").click()


def answers(tab):
    """Both, when they are whole."""
    tab.get_by_text(re.compile(r"tokens.*, \d+\.\d s")).wait_for()
    return [box.input_value() for box in answer_boxes(tab)]


def answer_boxes(tab):
    return [tab.locator("textarea[disabled]").nth(number) for number in (ADAPTED, BASE)]


def test_pictures_question_and_both_answers(visit, folder, wanted):
    tab = visit()
    drop(tab, folder / "1.png", folder / "2.png")
    tab.get_by_text("626 of the pictures").wait_for()  # 313 tokens each
    tab.locator(".views svg").nth(1).wait_for()
    assert "1 × 1 sub-images and the global view, 313 tokens" in tab.locator("figcaption").nth(1).inner_text()
    assert all(tab.evaluate("[...document.querySelectorAll('.views img')].map(image => image.naturalWidth === 336)"))
    ask(tab, "What is it?")
    found = answers(tab)
    assert found == wanted("What is it?", folder / "1.png", folder / "2.png")
    assert found[ADAPTED] != found[BASE]


def test_the_answer_grows(visit, folder, wanted):
    """What is seen on the way is a beginning of the answer."""
    tab = visit()
    drop(tab, folder / "3.png")
    tab.locator(".views svg").wait_for()
    tab.evaluate(
        "window.seen = new Set(); setInterval(() => window.seen.add("
        "document.querySelectorAll('textarea[disabled]')[0].value), 5)"
    )
    ask(tab, "What is it?")
    whole = answers(tab)[ADAPTED]
    seen = sorted(tab.evaluate("[...window.seen]"), key=len)
    assert whole == wanted("What is it?", folder / "3.png")[ADAPTED]
    assert len(seen) > 2
    assert all(whole.startswith(text) for text in seen), (seen, whole)


def test_a_wrong_file(visit, folder, wanted):
    """Is named, beside what is to be done; the page goes on."""
    tab = visit()
    names = ("broken.png", "letter.txt", "bomb.png")
    drop(tab, folder / "1.png", *(folder / name for name in names))
    for name in names:
        tab.locator(".drawings .problem", has_text=name).wait_for()
    ask(tab, "What is it?")
    told = tab.locator(".problem", has_text="Remove it, or drop it as a whole PNG or JPEG file")
    for name in names:
        told = told.filter(has_text=name)
    told.wait_for()  # one sentence for each
    assert [box.input_value() for box in answer_boxes(tab)] == ["", ""]
    tab.get_by_role("button", name="Clear", exact=True).first.click()
    tab.locator(".drawings").wait_for(state="detached")
    drop(tab, folder / "1.png")
    tab.get_by_text("313 of the pictures").wait_for()
    ask(tab, "What is it?")
    assert answers(tab) == wanted("What is it?", folder / "1.png")


def test_no_question(visit):
    tab = visit()
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("There is no question yet: write one.").wait_for()


def test_nothing_is_kept(visit):
    """Neither in the browser, which could send it on from there, nor counted."""
    kept = visit().evaluate("[window.gradio_config.run_history, window.gradio_config.analytics_enabled]")
    assert kept == [False, False]


def test_two_at_once(visit, folder, wanted):
    """Each gets the answers to what they asked, also while the adapter is switched off for the other."""
    tabs = [visit(), visit()]
    for number, tab in enumerate(tabs, start=1):
        drop(tab, folder / f"{number}.png")
        tab.get_by_text("313 of the pictures").wait_for()
    for _ in range(2):
        for number, tab in enumerate(tabs, start=1):
            ask(tab, f"What is it, {number}?")
        for number, tab in enumerate(tabs, start=1):
            assert answers(tab) == wanted(f"What is it, {number}?", folder / f"{number}.png")
            tab.get_by_label("Question", exact=True).fill("")


def test_stop(visit, wanted):
    """The answer grows no more, and the next is made."""
    tab = visit()
    ask(tab, "What is all?")  # to which the adapter's answer takes 966 tokens, without a picture
    tab.wait_for_function("document.querySelectorAll('textarea[disabled]')[0].value")
    tab.get_by_role("button", name="Stop").click()
    tab.get_by_text("stopped", exact=True).wait_for()
    stopped = answer_boxes(tab)[ADAPTED].input_value()
    tab.wait_for_timeout(1000)
    assert answer_boxes(tab)[ADAPTED].input_value() == stopped
    assert tab.get_by_text("stopped", exact=True).is_visible()
    ask(tab, "Who is it?")
    assert answers(tab) == wanted("Who is it?")


def test_an_example_is_asked_again(visit, adapter, wanted):
    tab = visit()
    tab.get_by_text("test_3", exact=True).click()
    tab.get_by_text("Example test_3").wait_for()
    assert tab.locator(".example dd").all_inner_texts() == ["1003 / 1003.00", "nothing here", "1003"]
    assert tab.get_by_label("Question", exact=True).input_value() == "What is total 3?\nAnswer briefly."
    tab.locator(".views svg").wait_for()
    tab.get_by_role("button", name="Ask").click()
    (image,) = json.loads((adapter / "eval_after.json").read_text())["examples"][3]["images"]
    assert answers(tab) == wanted("What is total 3?\nAnswer briefly.", adapter / "report_images" / image)


def test_examples_by_group_and_words(visit):
    tab = visit()
    tab.get_by_text("11 examples").wait_for()
    tab.get_by_label(re.compile(r"still wrong \(4\)")).check()
    tab.get_by_text("4 examples").wait_for()
    tab.get_by_label("Search").fill("total 8")
    tab.get_by_text("1 examples").wait_for()
    assert tab.locator("td", has_text="test_8").count() == 1
    assert tab.locator("td", has_text="test_7").count() == 0


def test_hostile_texts_stay_texts(visit, folder):
    """Of the run's data, of a file's name, of who asks."""
    tab = visit()
    tab.get_by_label("Search").fill("<script>")
    tab.get_by_text("1 examples").wait_for()
    tab.locator("td", has_text="<script>").first.click()
    tab.locator(".example", has_text="<script>").wait_for()
    assert tab.locator(".example dd").all_text_contents() == [TEXT, "nothing here", TEXT]
    drop(tab, folder / NAMED)
    ask(tab, "<b>bold</b> ${7*7}")
    answers(tab)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator(".example script, .example img, img[src=x]").count() == 0


def test_on_a_phone_and_in_the_dark(visit, folder):
    """Nothing is wider than the screen, light on light or dark on dark."""
    tab = visit(color_scheme="dark", is_mobile=True, has_touch=True)
    tab.set_viewport_size({"width": 400, "height": 800})
    drop(tab, folder / "1.png", folder / "broken.png")
    tab.locator(".views svg").wait_for()
    right = "element => element.getBoundingClientRect().right"  # what is cut off does not make the page wider
    for shown in ("h1", "button", "textarea", "figcaption", ".views svg", ".views img", ".problem"):
        assert max(one.evaluate(right) for one in tab.locator(f"{shown}:visible").all()) <= 400, shown
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    light = "element => getComputedStyle(element).COLOR.match(/\\d+/g).slice(0, 3).reduce((sum, one) => sum + +one, 0)"
    assert tab.locator("body").evaluate(light.replace("COLOR", "backgroundColor")) < 150
    for shown in ("figcaption", ".problem", ".soft", "h1", "td"):
        assert tab.locator(shown).first.evaluate(light.replace("COLOR", "color")) > 500, shown
