"""The page of a report in a browser: quiet, offline, sortable, legible in any light and size."""

import json
import pathlib

import pytest

from jaxcomp.report import Report, from_json, render_html
from tests import heterogeneous
from tests.report.browser import executable, open_browser
from tests.report.test_html import probed
from tests.test_report import comparison, fit_rows, report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        executable() is None,
        reason="no chromium on the PATH; on Debian: apt-get install chromium",
    ),
]
REAL = (
    pathlib.Path(__file__).parents[2]
    / "benchmarks/results/cpu-2core/smollm2_flatquant_w4a4kv4.report.json"
)
LONG = "/a/very/long/path/" + "to_a_model_without_any_place_to_break_it" * 3
GIVEN = {
    "real": lambda: from_json(json.loads(REAL.read_text())),
    "long": lambda: report(
        source=LONG,
        rows=(*report().rows, *fit_rows()),
        comparison=comparison(),
        evals_before={LONG: {LONG: 1.0}},
        environment={LONG: LONG},
        recipe={"steps": [{"class": LONG, LONG: LONG}]},
    ),
    "chosen": lambda: report(rows=probed("AutoBits", chosen=True)),
    "little": lambda: Report("x", {}),
}
ROWS = "[...document.querySelectorAll('#linear-table tbody tr')].filter(r => !r.hidden)"
CELLS = "{rows}.map(r => r.cells[{column}].textContent)"
# Every element that has text of its own, with its colours, is readable: WCAG 2.2, 1.4.3.
CONTRAST = """(() => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const channels = (colour) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = channels(colour).map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (channels(colour)[3] === 255) return colour;
    }
    return 'white';
  };
  const poor = [];
  for (const e of document.body.querySelectorAll('*')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest('svg, script, [hidden]') || !e.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([e.tagName, e.className, e.textContent.slice(0, 40), ratio]);
  }
  return poor;
})()"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of `GIVEN` as files, the real one with the structure of a model."""
    place = tmp_path_factory.mktemp("pages")
    for name, make in GIVEN.items():
        model = heterogeneous.model() if name == "real" else None
        (place / f"{name}.html").write_text(render_html(make(), model), "utf-8")
    return place


@pytest.fixture
def page(browser, pages):
    """The real page on a desk, in light."""
    browser.size(1280)
    browser.prefer("light")
    browser.open(pages / "real.html")
    browser.js("localStorage.clear()")
    browser.open(pages / "real.html")
    return browser


def column(page, number):
    return page.js(CELLS.format(rows=ROWS, column=number))


def sorting(page):
    heads = "[...document.querySelectorAll('#linear-table th')].map(h => h.ariaSort)"
    return page.js(heads)


@pytest.mark.parametrize("name", GIVEN)
def test_a_page_renders_without_a_complaint_and_without_the_network(name, browser, pages):
    browser.size(1280)
    browser.open(pages / f"{name}.html")
    assert browser.js("document.querySelector('h1').getBoundingClientRect().height") > 20
    assert browser.messages == []
    outside = [r for r in browser.requests if not r.startswith(("file://", "data:"))]
    assert not outside and sum(r.startswith("file://") for r in browser.requests) == 1


def test_a_script_that_is_not_the_page_s_own_does_not_run(browser, pages):
    text = (pages / "little.html").read_text("utf-8")
    (pages / "evil.html").write_text(text.replace("</main>", "<script>evil = 1</script></main>"))
    browser.open(pages / "evil.html")
    assert browser.js("typeof evil") == "undefined"
    assert "Content Security Policy" in str(browser.messages)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_a_page_is_never_wider_than_its_window(name, width, browser, pages):
    browser.size(width)
    browser.open(pages / f"{name}.html")
    browser.js("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert browser.js("document.documentElement.scrollWidth") <= width


def test_a_click_on_a_heading_sorts_and_another_turns_the_order_around(page):
    head = "document.querySelectorAll('#linear-table th button')[{}].click()"
    numbers = lambda c: [float(v) for v in column(page, c)]  # noqa: E731
    assert numbers(4) == sorted(numbers(4), reverse=True)
    page.js(head.format(4))
    assert numbers(4) == sorted(numbers(4))
    assert sorting(page) == ["none"] * 4 + ["ascending"] + ["none"] * 2
    page.js(head.format(0))
    assert numbers(0) == sorted(numbers(0)) and sorting(page)[0] == "ascending"
    page.js(head.format(5))
    assert numbers(5) == sorted(numbers(5), reverse=True) and sorting(page)[5] == "descending"
    page.js(head.format(1))
    assert column(page, 1) == sorted(column(page, 1))
    assert len(column(page, 1)) == 210


def test_a_heading_sorts_by_keyboard_too(page):
    page.js("document.querySelectorAll('#linear-table th button')[0].focus()")
    page.key("Enter", 13)
    assert sorting(page)[0] == "ascending" and column(page, 0)[:7] == ["0"] * 7
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.js(outline) == "solid"


@pytest.mark.parametrize(
    ("words", "count"),
    [("down", 30), ("DOWN 11", 1), ("block 11", 7), ("1", 7), ("gptq attn.q", 30), ("no such", 0)],
)
def test_the_filter_shows_the_rows_with_all_its_words(words, count, page):
    page.js("document.getElementById('filter').focus()")
    page.call("Input.insertText", text=words)
    assert len(column(page, 0)) == count
    assert page.js("document.getElementById('count').textContent") == f"{count} of 210 linears"
    if count == 1:
        assert column(page, 1) == ["ffn.down"] and column(page, 0) == ["11"]


def test_dark_follows_the_system_and_the_switch_overrules_and_is_kept(page, pages):
    paper = "getComputedStyle(document.body).backgroundColor"
    bright = page.js(paper)
    assert bright == "rgb(255, 255, 255)"
    page.prefer("dark")
    dark = page.js(paper)
    assert dark != bright
    line = "getComputedStyle(document.querySelector('svg .line.after')).stroke"
    in_dark = page.js(line)
    page.js("document.getElementById('theme').click()")
    assert page.js(paper) == bright and page.js(line) != in_dark
    page.open(pages / "real.html")
    assert page.js(paper) == bright
    assert page.js("document.getElementById('theme').textContent") == "Dark"


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_lights(scheme, name, page, pages):
    page.prefer(scheme)
    page.open(pages / f"{name}.html")
    page.js("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.js(CONTRAST) == []


def test_a_plot_tells_its_numbers_to_the_pointer_and_to_the_arrow_keys(page):
    tip = "document.getElementById('tip')"
    page.js("document.querySelector('#depth svg').scrollIntoView({block: 'center'})")
    box = page.js("document.querySelector('#depth svg').getBoundingClientRect().toJSON()")
    place = dict(x=box["x"] + box["width"] - 3, y=box["y"] + 30)
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    depth = from_json(json.loads(REAL.read_text())).comparison["depth"]
    text = page.js(f"{tip}.textContent")
    assert text.startswith("depth 30\n") and f"all blocks so far  {depth['median'][30]:.3g}" in text
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    assert page.js(f"{tip}.hidden")
    page.js("document.querySelector('#depth svg').focus()")
    page.key("ArrowRight", 39)
    page.key("ArrowRight", 39)
    assert f"this block alone  {depth['local'][1]:.3g}" in page.js(f"{tip}.textContent")
    page.key("Escape", 27)
    assert page.js(f"{tip}.hidden")


def test_the_command_can_be_copied(page):
    page.call(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    page.js("document.querySelector('.copy').click()")
    page.js("new Promise((done) => setTimeout(done, 200))")
    assert page.js("document.querySelector('.copy').textContent") in ("Copied", "Selected")


def test_print_shows_the_whole_table_on_white_and_no_controls(page):
    page.prefer("dark", media="print")
    shown = lambda what: page.js(f"document.querySelector('{what}').checkVisibility()")  # noqa: E731
    assert not shown("nav") and not shown(".filter") and not shown(".copy")
    box = "document.querySelector('.scroll:has(#linear-table)')"
    assert page.js(f"{box}.scrollHeight <= {box}.clientHeight + 2")
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.prefer("light")


def test_without_scripts_the_page_is_still_whole(browser, pages):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(pages / "real.html")
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    count = "document.querySelectorAll('#linear-table tbody tr').length"
    assert browser.js(count) == 210
    assert browser.js("document.getElementById('theme').checkVisibility()") is False
    assert browser.js("document.querySelector('.tips title').textContent") == "depth 0"
