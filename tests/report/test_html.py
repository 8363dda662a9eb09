"""The page of a report, read with a parser: whole, safe, true to the numbers, always the same."""

import base64
import hashlib
import html.parser
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import webbrowser

import jax
import pytest
from typer.testing import CliRunner

import jaxcomp
from jaxcomp import artefact
from jaxcomp.__main__ import app
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.scheme import Override
from jaxcomp.methods import RTN
from jaxcomp.recipe import CalibSpec, Recipe, fingerprint, recipe_to_json
from jaxcomp.report import Report, Row, from_json, render_html, to_json, write_html
from jaxcomp.report.page.markup import Html, el
from jaxcomp.report.page.plot import Axes, line
from jaxcomp.report.page.scale import Scale, count_scale, linear_scale, log_between, log_scale
from jaxcomp.report.page.tables import exponent_text
from tests import heterogeneous, tiny
from tests.test_report import comparison, fit_rows, report

REAL = (
    pathlib.Path(__file__).parents[2]
    / "benchmarks/results/cpu-2core/smollm2_flatquant_w4a4kv4.report.json"
)
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
VOID = {"meta", "link", "input", "br"}


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children = []

    def all(self, tag=None, **wanted):
        """Elements below this one, in order."""
        for child in self.children:
            if isinstance(child, Element):
                fits = tag in (None, child.tag)
                if fits and all(
                    child.attributes.get(k.rstrip("_")) == v for k, v in wanted.items()
                ):
                    yield child
                yield from child.all(tag, **wanted)

    def one(self, tag=None, **wanted):
        (found,) = self.all(tag, **wanted)
        return found

    @property
    def text(self):
        return "".join(c if isinstance(c, str) else c.text for c in self.children)


class Parser(html.parser.HTMLParser):
    """A tree, with an error for everything that is not closed where it should be."""

    def __init__(self, page):
        super().__init__()
        self.root = self.at = Element("", {}, None)
        self.feed(page)
        self.close()
        assert self.at is self.root, f"<{self.at.tag}> is not closed"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"<{tag}> repeats an attribute"
        new = Element(tag, dict(attributes), self.at)
        self.at.children.append(new)
        if tag not in VOID:
            self.at = new

    def handle_startendtag(self, tag, attributes):
        self.at.children.append(Element(tag, dict(attributes), self.at))

    def handle_endtag(self, tag):
        assert tag == self.at.tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def parse(page):
    return Parser(page).root


def real():
    return from_json(json.loads(REAL.read_text()))


def override_report():
    """A report with grids that differ from block to block, and steps that leave weights alone."""
    rule = Override(blocks=(0,), weight_bits=8)
    recipe = Recipe(steps=(RTN(overrides=(rule,)), RTN(clip=True)), calib=CalibSpec())
    rows = (
        Row("RTN", 0, "attn.q", {"weight_error": 0.1, "bits": 8}),
        Row("RTN", 1, "attn.q", {"skipped": "an override leaves attn_in at 16 bits"}),
        Row("Whole", None, None, {"left": 3}, 2.0),
    )
    return report(rows=rows, recipe=recipe_to_json(recipe))


GIVEN = {
    "real": real,
    "much": lambda: report(rows=(*report().rows, *fit_rows()), comparison=comparison()),
    "no evals": lambda: report(evals_before={}, evals_after={}),
    "only after": lambda: report(evals_before={}, comparison=comparison(flatness=[])),
    "skipped": lambda: report(comparison=comparison(depth={"skipped": "8 and 7 blocks"})),
    "no rows": lambda: report(rows=(), sizes={}),
    "overrides": override_report,
    "whole blocks": lambda: report(rows=(Row("Fold", 0, None, {"peak": 3.5}),), sizes={}),
    "left alone": lambda: report(rows=(Row("RTN", 0, "attn.q", {"skipped": "no grid"}),)),
    "nothing": lambda: Report("x", {}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_page_is_well_formed_names_its_parts_and_loads_nothing(name):
    page = render_html(GIVEN[name]())
    root = parse(page)
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in root.all():
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            target = element.attributes.get(key, "#")
            assert target.startswith(("#", "data:")), (element.tag, target)
            assert not target.startswith("#") or not target[1:] or target[1:] in ids
        for key in ("for", "aria-labelledby"):
            assert element.attributes.get(key, ids[0]) in ids
    assert "url(" not in page and "@import" not in page and "fetch(" not in page
    for drawing in root.all("svg"):
        assert drawing.attributes["role"] == "img" and drawing.attributes["aria-label"]
    levels = [int(e.tag[1]) for e in root.all() if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(e.attributes.get("scope") for e in root.all("th"))


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("real", "evaluations size depth linears flatness fit sensitivity recipe run"),
        ("much", "evaluations size depth linears flatness fit sensitivity recipe run"),
        ("no evals", "size linears recipe run"),
        ("only after", "evaluations size depth linears sensitivity recipe run"),
        ("skipped", "evaluations size depth linears flatness recipe run"),
        ("no rows", "evaluations recipe run"),
        ("whole blocks", "evaluations linears recipe run"),
        ("nothing", "run"),
    ],
)
def test_a_page_has_the_sections_that_its_report_has_numbers_for(name, sections):
    root = parse(render_html(GIVEN[name]()))
    found = [e.attributes["id"] for e in root.one("main").all("section") if "id" in e.attributes]
    assert found == sections.split()
    links = [e.attributes["href"][1:] for e in root.one("nav").all("a")]
    assert links == found


def test_the_numbers_on_the_cards_are_those_of_the_report():
    data = json.loads(REAL.read_text())
    cards = parse(render_html(real())).one("dl", class_="cards")
    shown = {float(e.attributes["value"]) for e in cards.all("data")}
    (before,), (after,) = data["evals_before"].values(), data["evals_after"].values()
    size, output = data["sizes"], data["comparison"]["output"]
    wanted = {
        before["perplexity"],
        after["perplexity"],
        size["total_bytes"],
        size["dense16_bytes"] / size["total_bytes"],
        size["bits_per_weight"],
        size["total_bits_per_weight"],
        output["top1"],
        output["kl"],
        sum(data["seconds"].values()),
        data["peak_rss_bytes"],
        data["peak_rss_bytes"] - data["baseline_rss_bytes"],
    }
    assert sorted(shown) == pytest.approx(sorted(wanted), rel=1e-12)
    for text in ("168.8 MB", "1.60×", "20.12 → 26.10", "×1.297 (+29.7%)", "23.9 min", "2.19 GB"):
        assert text in cards.text
    assert data["started"][:10] in cards.text and data["environment"]["device"] in cards.text


def test_every_linear_is_a_row_and_the_worst_comes_first():
    rows = {(r.block, r.linear): r.metrics for r in real().rows if r.linear}
    table = parse(render_html(real())).one("table", id="linear-table")
    cells = [[c for c in row.all("td")] for row in table.one("tbody").all("tr")]
    assert len(cells) == len(rows) == 210
    after = []
    for block, linear, bits, old, new, ratio, method in cells:
        numbers = rows[int(block.text), linear.text]
        assert bits.text == "4" and method.text == "GPTQ"
        for cell, key in ((old, "error_before"), (new, "error_after")):
            assert float(cell.attributes["data-v"]) == pytest.approx(numbers[key], rel=1e-5)
            assert float(cell.text) == pytest.approx(numbers[key], rel=5e-3)
        change = numbers["error_after"] / numbers["error_before"]
        assert float(ratio.text) == pytest.approx(change, abs=5.1e-3)
        after.append(numbers["error_after"])
    assert after == sorted(after, reverse=True)
    sorts = [e.attributes["aria-sort"] for e in table.one("thead").all("th")]
    assert sorts == ["none"] * 4 + ["descending"] + ["none"] * 2


def test_what_was_left_alone_says_why_and_what_is_an_error_of_weights_says_so():
    text = parse(render_html(override_report())).one("table", id="linear-table").text
    assert "RTN: left alone, an override leaves attn_in at 16 bits" in text
    assert "RTN (weight)" in text


def test_no_text_of_a_report_becomes_markup():
    rows = [Row(EVIL, 0, EVIL, {"error_after": 0.1, "error_before": 0.2, EVIL: EVIL})]
    rows += [Row(EVIL, 0, None, {"loss_curve": [1.0, 0.5], EVIL: 1.5})]
    found = comparison()
    for entry in found["flatness"]:
        entry |= {"site": EVIL, "consumers": [EVIL]}
    given = report(
        source=EVIL,
        recipe={"steps": [{"class": EVIL, EVIL: EVIL, "w": {"class": EVIL, EVIL: [EVIL]}}]},
        rows=tuple(rows),
        evals_before={EVIL: {EVIL: 1.0}},
        evals_after={EVIL: {EVIL: 2.0, "n": EVIL}},
        comparison=found,
        calibration={EVIL: EVIL},
        environment={EVIL: EVIL, "device": EVIL},
        started=EVIL,
        seconds={EVIL: 1.0},
    )
    page = render_html(given)
    root = parse(page)
    assert len(list(root.all("script"))) == 1 and not list(root.all("img"))
    assert not [k for e in root.all() for k in e.attributes if k.startswith("on")]
    assert page.count("<script") == 1 and "<img" not in page
    assert root.one("h1").text == EVIL.rpartition("/")[2] in root.one("head").one("title").text
    for part in ("evaluations", "linears", "flatness", "recipe", "run"):
        assert EVIL in root.one("section", id=part).text
    assert json.loads(root.one("details", id="json").one("code").text) == given.recipe


def test_only_the_page_s_own_script_may_run():
    root = parse(render_html(report()))
    policy = root.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    script = root.one("script").text
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert "</" not in script and "<!--" not in script


def test_text_is_escaped_until_it_is_markup_and_again_once_it_is_joined():
    inner = el("b", "<i>", title='"<')
    assert inner == '<b title="&quot;&lt;">&lt;i&gt;</b>' and isinstance(inner, Html)
    assert el("p", inner, None, ["&", 1]) == f"<p>{inner}&amp;1</p>"
    assert "&lt;b" in el("p", "x" + inner)
    assert el("input", id="a", hidden=True, checked=False, aria_label="b") == (
        '<input id="a" hidden aria-label="b">'
    )


def test_the_same_report_gives_the_same_bytes_wherever_it_comes_from(tmp_path):
    given = GIVEN["much"]()
    page = render_html(given)
    assert (
        page == render_html(given) == render_html(from_json(json.loads(json.dumps(to_json(given)))))
    )
    (tmp_path / "report.json").write_text(json.dumps(to_json(given)))
    code = (
        "import json, sys; from jaxcomp.report import from_json, render_html\n"
        "sys.stdout.write(render_html(from_json(json.load(open(sys.argv[1])))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "report.json")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout.decode() == page


def test_numbers_that_are_not_finite_leave_gaps_and_break_nothing():
    broken = comparison(output={"kl": math.nan, "top1": 0.0})
    broken["depth"] |= {"median": [0.0, 0.1, math.nan, math.inf], "local": [0.0] * 4}
    rows = (
        Row("Fit", 0, None, {"loss_curve": [0.1, math.nan, math.inf], "clip_low:a": math.nan}),
        Row("Fit", 0, "attn.q", {"error_after": math.inf, "error_before": 0.0, "bits": 4}),
        Row("Fit", 1, "attn.q", {"error_after": 0.0, "error_before": 1.0, "bits": 4}),
    )
    evals = {"Perplexity": {"perplexity": math.inf}}
    page = render_html(report(comparison=broken, rows=rows, evals_after=evals))
    assert "20.00 → inf" in parse(page).one("dl", class_="cards").text
    assert not [d for d in re.findall(r' d="([^"]*)"', page) if re.search("nan|inf", d)]


def test_a_report_of_an_older_version_has_a_page():
    data = to_json(report())
    for key in ("comparison", "seconds", "peak_rss_bytes", "baseline_rss_bytes", "calibration"):
        del data[key]
    for key in ("block_bits", "quantized_bits"):
        del data["sizes"][key]
    assert "10.0%" in render_html(from_json(data))


def test_a_large_report_stays_below_a_megabyte_and_a_half():
    blocks, kinds = 100, [f"attn.part{i}" for i in range(7)]
    rows = []
    for step in ("First", "Second", "Third"):
        for block in range(blocks):
            numbers = {"error_before": 0.0123456789, "error_after": 0.00123456789, "bits": 4}
            rows += [Row(step, block, kind, numbers) for kind in kinds]
            curve = [1.0 / (1 + i) + 0.001 * block for i in range(400)]
            rows.append(Row(step, block, None, {"loss_curve": curve}, 1.25))
    deep = comparison()["depth"] | {k: [0.01] * 101 for k in ("median", "energy", "local")}
    page = render_html(report(rows=tuple(rows), comparison=comparison(depth=deep)))
    assert len(list(parse(page).one("table", id="linear-table").one("tbody").all("tr"))) == 2100
    assert len(page.encode()) < 1_500_000
    assert "one record in 4" in page


def test_blocks_of_different_widths_are_drawn_and_a_hint_names_the_override():
    sizes = report().sizes | {"block_bits": [8.0, 4.0, 4.0]}
    root = parse(render_html(report(sizes=sizes)))
    assert "Bits per quantized weight" in root.one("section", id="size").text
    data = override_report()
    page = parse(render_html(Report(**{**vars(data), "comparison": comparison()})))
    hint = page.one("section", id="sensitivity").text
    assert "overrides=(\n    Override(blocks=(0, 1, 2), weight_bits=8),\n)" in hint
    assert "No sensitivity was measured" in hint


def probed(step, chosen=False):
    """Rows of a step that tried every linear of three blocks at two widths."""
    rows = []
    for block in range(3):
        kl = {"attn.q": 0.01, "ffn.down": (0.02, 0.5, 0.03)[block]}
        numbers = {f"kl:{what}:{bits}": v / bits for what, v in kl.items() for bits in (3, 4)}
        numbers |= {f"bits:{what}": 3 + block for what in kl} if chosen else {}
        rows.append(Row(step, block, None, numbers, 1.0))
    return tuple(rows)


def test_a_measured_sensitivity_takes_the_place_of_the_indication():
    given = report(rows=(*probed("Sensitivity"), *report().rows), comparison=comparison())
    part = parse(render_html(given)).one("section", id="sensitivity")
    assert "No sensitivity was measured" not in part.text
    assert "at 4 bits: block 1 ffn.down (0.125), block 2 ffn.down (0.0075)" in part.text
    assert "Override(linears=('ffn.down',), blocks=(1,), weight_bits=8)," in part.text
    tips = [title.text for title in part.all("title")]
    assert "block 1\nSum over the parts of a block at 4 bits  0.128" in tips
    assert [b.text for b in part.all("b")][2:] == ["Each part at 3 bits", "Each part at 4 bits"]
    assert "kl:" not in render_html(given)


def test_chosen_widths_are_a_map_of_parts_and_blocks():
    part = parse(render_html(report(rows=probed("AutoBits", chosen=True))))
    table = part.one("section", id="sensitivity").one("table", class_="map")
    assert [[c.text for c in row.all("td")] for row in table.one("tbody").all("tr")] == [
        ["3", "4", "5"],
        ["3", "4", "5"],
    ]
    assert "Override(" not in part.one("section", id="sensitivity").text


def test_the_time_of_a_continued_run_counts_what_was_done_before():
    rows = tuple(Row("GPTQ", i, None, {}, 50.0) for i in range(3))
    cards = parse(
        render_html(report(rows=rows, seconds={"0: GPTQ": 60.0, "evaluation after": 30.0}))
    )
    shown = [float(e.attributes["value"]) for e in cards.one("dl", class_="cards").all("data")]
    assert 180.0 in shown


def test_the_recipe_is_readable_and_its_json_makes_the_same_run():
    root = parse(render_html(override_report())).one("section", id="recipe")
    assert "Override(blocks=(0), weight_bits=8)" in root.text
    assert "int4 per-channel sym" in root.text and "CalibSpec" in root.text
    assert json.loads(root.one("details", id="json").one("code").text) == override_report().recipe
    command = next(root.all("pre")).text
    assert command == "jaxcomp compress 'a [model]' recipe.json --out again"


def test_the_command_repeats_the_dtype_and_the_devices():
    given = report(environment={"data_parallel": 2, "compute_dtype": "bfloat16"})
    assert "--out again --dtype bfloat16 --data-parallel" in render_html(given)
    assert "--dtype" not in render_html(report(environment={"compute_dtype": "float32"}))


def test_the_structure_is_that_of_the_model():
    text = parse(render_html(report(), heterogeneous.model())).one("section", id="structure").text
    assert "16 × 16 4 bit, groups of 8, symmetric" in text and "blocks.2" in text


def test_ticks_are_round_and_inside():
    for scale in (
        log_scale([1e-6, 1e-2]),
        log_scale([0.0125, 0.0285]),
        log_scale([3e-5]),
        log_scale([]),
        log_between(1e-9, 1e9),
        linear_scale(-0.2, 0.93),
        linear_scale(4, 4),
        count_scale(range(100)),
        count_scale([]),
    ):
        assert 1 <= len(scale.ticks) <= 9, scale
        assert all(scale.low <= value <= scale.high for value, _ in scale.ticks)
        assert len({text for _, text in scale.ticks}) == len(scale.ticks)
    assert [text for _, text in log_scale([1e-6, 1e-2]).ticks][:2] == ["10⁻⁶", "10⁻⁵"]
    assert [text for _, text in count_scale(range(30)).ticks] == ["0", "5", "10", "15", "20", "25"]


def test_a_line_goes_through_its_points_and_stops_where_there_is_none():
    axes = Axes(Scale(0, 4), Scale(0.01, 100, log=True))
    drawn = line(axes, {0: 0.01, 1: 1.0, 2: 0.0, 3: 100.0, 4: math.nan}, "after")
    assert 'd="M0 1000 250 500M750 0"' in drawn


def test_an_exponent_is_short():
    assert [exponent_text(x) for x in (0.00896, 1.0, 0.0, 12345.0)] == [
        "8.96e-3",
        "1.00e0",
        "0.00e0",
        "1.23e4",
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An artefact that `compress` made of a tiny model."""
    place = tmp_path_factory.mktemp("page")
    tiny.checkpoint("llama", jax.random.key(0), place / "model")
    jaxcomp.compress(place / "model", Recipe(steps=(RTN(QuantSpec(4)),)), place / "out")
    return place


def run(*arguments):
    result = CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_compress_leaves_the_page_in_the_artefact(place):
    artefact.verify_files(place / "out")
    page = (place / "out" / "report.html").read_text()
    given = from_json(artefact.read_json(place / "out", "report.json"))
    assert page == render_html(given, artefact.load(place / "out", lazy=True))


def test_the_command_writes_a_page_with_what_only_a_complete_artefact_knows(place, tmp_path):
    assert run(place / "out", "--out", tmp_path / "a.html")[0] == 0
    text = parse((tmp_path / "a.html").read_text()).one("main").text
    assert fingerprint(artefact.leaf_hashes(place / "out")) in text and "Nodes of the model" in text
    artefact.verify_files(place / "out")
    assert run(place / "out" / "report.json", "--out", tmp_path / "a.html")[0] == 0
    text = parse((tmp_path / "a.html").read_text()).one("main").text
    assert "Nodes of the model" not in text and "RTN" in text


def test_the_page_opens_in_a_browser_if_there_is_one(place, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    assert run(place / "out", "--out", tmp_path / "a.html", "--open")[0] == 0
    assert opened == [(tmp_path / "a.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    code, output = run(place / "out", "--out", tmp_path / "a.html", "--open")
    assert code == 2 and "no browser could be started; open" in output


def test_mistakes_are_told_in_one_line(place, tmp_path):
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "list.json").write_text('{"source": "x", "recipe": {}, "rows": [{"a": 1}]}')
    artefact.save(heterogeneous.model(), tmp_path / "bare")
    wrong = [
        ([tmp_path], "there is no report at"),
        ([tmp_path / "absent"], "give an artefact or a report.json"),
        ([tmp_path / "mine.html"], "is no report"),
        ([tmp_path / "list.json"], "is no report"),
        ([tmp_path / "bare"], "has no 'report.json'"),
        ([place / "out", "--out", place / "out" / "again.html"], "is inside the artefact"),
        ([place / "out", "--out", tmp_path / "mine.html"], "is there and is no page of ours"),
        ([place / "out", "--out", tmp_path], "is a directory; name a file"),
        ([place / "out", "--out", tmp_path / "no" / "a.html"], "there is no directory"),
    ]
    for arguments, message in wrong:
        code, output = run(*arguments)
        assert code == 2 and message in output and "Traceback" not in output, (arguments, output)
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


def test_an_artefact_without_its_weights_has_a_page_without_structure(place, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "params" / "root")
    code, output = run(tmp_path / "out", "--out", tmp_path / "a.html")
    assert code == 0 and "note: without the structure of the model" in output
    assert "Nodes of the model" not in (tmp_path / "a.html").read_text()


def test_an_earlier_page_is_replaced(tmp_path):
    write_html(tmp_path / "a.html", render_html(report()))
    write_html(tmp_path / "a.html", render_html(report(source="another")))
    assert "another" in (tmp_path / "a.html").read_text()


def test_the_help_shows_how_the_command_is_used():
    assert "jaxcomp report out --open" in run("--help")[1]
