"""The page in a real Chromium: wide and narrow, light and dark. Looked at, pointed at, toggled, zoomed, renewed."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from bigmodel.inspect.page.page import write_page
from bigmodel.inspect.page.serve import make_server
from tests.inspect.page.test_page import HOSTILE, killed_and_resumed, line, write
from tests.support.browser import Browser, program

pytestmark = pytest.mark.skipif(not program(), reason="no Chromium here: apt-get install chromium")

SECTIONS = (
    "Overview Loss Validation Speed Ranks Goodput Memory Learning Experts Data Worst steps Samples Configuration Events"
)
MIDDLE = """(() => { const box = document.querySelector('#h-loss').closest('figure').querySelector('.u-over');
  box.scrollIntoView({block: 'center'}); const at = box.getBoundingClientRect();
  return [at.left, at.top + at.height / 2, at.width]; })()"""
LOSS = "document.querySelector('#h-loss').closest('figure')"
READ_OUT = f"[...{LOSS}.querySelectorAll('.value')].map((one) => one.textContent)"
INK = f"""(() => {{ const canvas = {LOSS}.querySelector('canvas');
  const copy = new OffscreenCanvas(canvas.width, canvas.height);
  const context = copy.getContext('2d', {{willReadFrequently: true}});
  context.drawImage(canvas, 0, 0);
  const shades = context.getImageData(0, 0, copy.width, copy.height).data;
  let blue = 0;
  for (let n = 0; n < shades.length; n += 4)
    blue += shades[n + 3] > 200 && Math.abs(shades[n]) < 8 && Math.abs(shades[n + 1] - 0x72) < 8;
  return blue; }})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write(tmp_path_factory.mktemp("page") / "<b>run", killed_and_resumed(200))
    (made / "sample.txt").write_text(HOSTILE)
    event = {"event": "step_skipped", "step": 5, "reason": "spike", "documents": [["code", 3, 17, 0, 250]]}
    (made / "events.jsonl").write_text(json.dumps(event) + "\n")
    long = {"name": HOSTILE, "path": "/a/long/path" * 20}
    (made / "settings.json").write_text(json.dumps({"run": long}))
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> str:
    write_page([folder, write(folder.parent / "other", killed_and_resumed(20))], folder.parent / "both.html")
    return write_page([folder], folder.parent / "page.html").as_uri()


def wait_for(browser: Browser, expression: str) -> None:
    deadline = time.monotonic() + 20
    while not browser.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.1)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_every_section_is_there_and_nothing_is_wider_than_the_screen(
    browser: Browser, url: str, width: int, height: int, dark: bool
) -> None:
    for address in (url, url.replace("page.html", "both.html"))[: 1 if dark else 2]:
        browser.open(address, width, height, dark)
        assert (
            browser.evaluate("[...document.querySelectorAll('h2')].map((one) => one.textContent).join(' ')") == SECTIONS
        )
        assert browser.evaluate("document.querySelectorAll('.uplot canvas').length") >= 18
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        right = "Math.max(...[...document.querySelectorAll('.card')].map((one) => one.getBoundingClientRect().right))"
        assert browser.evaluate(right) <= width
        goodput = browser.evaluate("document.querySelector('#goodput .card').offsetWidth")
        assert goodput > 0.9 * width or address.endswith("both.html"), "no empty place beside a plot above a table"
        lines = "document.querySelector('#worst-steps tbody tr').offsetHeight / 20"
        assert browser.evaluate(lines) < 3.5, "a row of a table is scrolled, not squeezed"
        names = browser.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
        assert len(names) == len(set(names))
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 28)" if dark else "rgb(245, 246, 248)")
        assert browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert browser.complaints == []
    assert browser.evaluate("document.title") == ("bigmodel: <b>run" if dark else "bigmodel: <b>run, other")


def test_a_plot_is_pointed_at_and_a_line_toggled_by_keyboard(browser: Browser, url: str) -> None:
    browser.open(url)
    left, middle, width = browser.evaluate(MIDDLE)
    before = browser.evaluate("document.documentElement.scrollHeight")
    browser.move(left + 1, middle)
    assert browser.evaluate(f"{LOSS}.querySelector('.place').textContent") == "step 1"
    assert browser.evaluate(READ_OUT)[:2] == ["8", "8"]
    browser.move(left + width / 2, middle)
    assert 90 < int(browser.evaluate(f"{LOSS}.querySelector('.place').textContent").split()[1]) < 110
    assert browser.evaluate("document.documentElement.scrollHeight") == before, "the read-out moves nothing"
    ink = browser.evaluate(INK)
    assert ink > 100
    smoothed = f"[...{LOSS}.querySelectorAll('.key')][1]"
    browser.evaluate(f"{smoothed}.focus()")
    browser.press("Enter")
    assert browser.evaluate(f"{smoothed}.getAttribute('aria-pressed')") == "false"
    wait_for(browser, f"{INK} < {ink} / 10")
    assert browser.complaints == []


def test_one_zoom_for_all_plots_over_steps_by_mouse_and_by_keys(browser: Browser, url: str) -> None:
    browser.open(url)
    left, middle, width = browser.evaluate(MIDDLE)
    browser.drag((left + 0.25 * width, middle), (left + 0.5 * width, middle))
    assert browser.evaluate("document.querySelector('#reset').disabled") is False
    heat = "document.querySelector('#h-lag').closest('figure')"
    browser.evaluate(f"{heat}.scrollIntoView({{block: 'center'}})")
    box = f"{heat}.querySelector('.u-over').getBoundingClientRect()"
    place = f"(({{left, top, width, height}}) => [left, top + height / 4, width])({box})"
    heat_left, heat_middle, heat_width = browser.evaluate(place)
    browser.move(heat_left + heat_width - 3, heat_middle)
    shown = browser.evaluate(f"{heat}.querySelector('.place').textContent")
    assert shown.startswith("rank 0, steps ")
    assert 95 < int(shown.split()[3]) < 105, "the heat map ends where the plot of the loss was zoomed to"
    browser.evaluate(f"{LOSS}.querySelector('.canvas').focus()")
    browser.press("0")
    assert browser.evaluate("document.querySelector('#reset').disabled") is True
    browser.press("+")
    assert browser.evaluate("document.querySelector('#reset').disabled") is False
    assert browser.complaints == []


def test_the_theme_is_switched_by_hand(browser: Browser, url: str) -> None:
    browser.open(url)
    ground = "getComputedStyle(document.body).backgroundColor"
    for expected in ("rgb(245, 246, 248)", "rgb(20, 23, 28)", "rgb(245, 246, 248)"):  # light, dark, automatic
        browser.evaluate("document.querySelector('#theme').click()")
        assert browser.evaluate(ground) == expected


def test_a_served_page_takes_new_steps_and_keeps_zoom_and_hidden_lines(browser: Browser, folder: Path) -> None:
    server = make_server([folder], "127.0.0.1", 0)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.evaluate("window.still = 'the same document'")
        left, middle, width = browser.evaluate(MIDDLE)
        browser.drag((left + 0.25 * width, middle), (left + 0.5 * width, middle))
        asked = "performance.getEntriesByType('resource').some((one) => one.name.includes('data.json?from='))"
        wait_for(browser, asked)  # the points between those drawn: test_page.py
        wait_for(browser, "document.querySelector('#news').textContent.startsWith('new data')")
        browser.evaluate(f"[...{LOSS}.querySelectorAll('.key')][1].click()")
        place = browser.evaluate("scrollY")
        moment = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["time"]
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**line(201), "time": moment + 20.1}) + "\n")
        wait_for(browser, "document.querySelector('#overview td').textContent === '201'")
        assert browser.evaluate("[window.still, scrollY]") == ["the same document", place]
        assert browser.evaluate("document.querySelector('#reset').disabled") is False
        assert browser.evaluate(f"[...{LOSS}.querySelectorAll('.key')][1].getAttribute('aria-pressed')") == "false"
        browser.move(left + width - 2, middle)
        assert 95 < int(browser.evaluate(f"{LOSS}.querySelector('.place').textContent").split()[1]) < 105
        assert browser.complaints == []
    finally:
        server.shutdown()
        server.server_close()
