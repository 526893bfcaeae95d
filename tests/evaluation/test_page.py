"""The page of a report: what is in it, that it loads nothing, and what a browser makes of it."""

import html.parser
import json
import re

import numpy as np
import pytest
from browser import CHROMIUM, look
from made_up import HOSTILE, made_up
from seen import assert_drawn, assert_legible, contrast, farthest, region

from dro_jax.evaluation import charts
from dro_jax.evaluation.page import to_html

in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium to look at the page: apt-get install chromium"
)

NAMES = ("sft", "<b>dro</b> & co $x$", "kto")


@pytest.fixture(scope="module")
def report():
    return made_up(names=NAMES)


@pytest.fixture(scope="module")
def page(report):
    return to_html(report)


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_is_whole_and_loads_nothing(page):
    tags = Elements(page).tags
    names = [tag for tag, _ in tags]
    assert not {"link", "img", "iframe", "object", "base"} & set(names)
    assert names.count("script") == 2
    for tag, attributes in tags:
        assert "src" not in attributes
        assert attributes.get("xlink:href", "#").startswith("#")
        assert tag != "a" or attributes["href"].startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    addresses = set(re.findall(r"https?://[^\"'\s<]*", page)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not addresses
    assert "url(http" not in page
    assert "{{" not in page.replace(HOSTILE, "")
    (policy,) = (a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_ids_are_unique_and_references_are_kept(page):
    tags = Elements(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = {a["xlink:href"][1:] for _, a in tags if "xlink:href" in a}
    referred |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert referred
    assert referred <= set(ids)


def test_headings_are_in_order(page):
    levels = [int(tag[1]) for tag, _ in Elements(page).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert set(levels[1:]) == {2}


def test_no_text_of_others_becomes_markup(page):
    assert "<b>dro</b>" not in page
    assert "&lt;b&gt;dro&lt;/b&gt; &amp; co $x$" in page
    assert HOSTILE not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[
        1
    ]
    assert "<" not in data
    found = json.loads(data)
    assert found["prompts"][1] == HOSTILE
    assert found["policies"][1]["answers"][0].startswith(HOSTILE)
    assert found["pairs"][0]["reasons"][0] == f"because {HOSTILE}"


def test_the_matrix_shows_the_row_s_win_rate_over_the_column_s(report, page):
    labels = [a["aria-label"] for tag, a in Elements(page).tags if "data-pair" in a]
    pairs = [(row, column) for row in range(3) for column in range(3) if row != column]
    matrix = report.matrix()
    assert re.findall(r"<b>([\d.]+%)</b>", page) == [f"{matrix[pair]:.1%}" for pair in pairs]
    for label, (row, column) in zip(labels, pairs, strict=True):
        assert label.startswith(f"{NAMES[row]} over {NAMES[column]}: {matrix[row, column]:.1%}")
    tones = re.findall(r"--tone: var\(--(\w+)\)", page)
    assert tones == ["win" if matrix[pair] >= 0.5 else "lose" for pair in pairs]


def test_what_is_filled_in_is_not_filled_in_again():
    page = to_html(made_up(prompts=3, names=("{{data}}", "{{script}}")))
    assert "Side by side: {{data}} and {{script}}" in page


def test_charts_take_their_colours_from_the_page(report):
    drawn = [charts.intervals(report), charts.lengths(report), charts.plane(report)]
    drawn += [svg for _, svg in charts.training(report)]
    assert len(drawn) == 7
    for svg in drawn:
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert {"var(--muted)", "var(--rule)"} <= set(re.findall(r"var\(--\w+\)", svg))
        assert svg.startswith('<svg role="img" aria-label="')
        opening = svg[: svg.index(">")]
        assert " width=" not in opening
        assert "viewBox=" in opening
    assert "&lt;b&gt;dro&lt;/b&gt; &amp; co $x$" in drawn[1]


def test_every_fold_has_its_interval(report, monkeypatch):
    figures = []
    monkeypatch.setattr(charts, "to_svg", lambda figure, _: figures.append(figure) or "")
    charts.intervals(report)
    (axes,) = figures[0].axes
    drawn = [tuple(line.get_xdata()) for line in axes.lines]
    pairs = [pair.swapped() if pair.win_rate < 0.5 else pair for pair in report.pairs]
    for pair in pairs:
        assert len(pair.fold_intervals) == 5
        for low, high in (pair.interval, *pair.fold_intervals):
            assert (100 * low, 100 * high) in drawn
    # But for the dashed line at 50%; no two intervals lie on each other.
    heights = [line.get_ydata()[0] for line in axes.lines[1:] if len(line.get_xdata()) == 2]
    assert len(heights) == len(set(heights)) == 3 * 6
    bottom, top = axes.get_ylim()
    assert all(top < height < bottom for height in heights)


def test_every_policy_is_a_point_with_its_numbers(report):
    svg = charts.plane(report)
    for name in ("sft", "kto"):
        assert re.search(rf">{name}</text>", svg)
    without = made_up(prompts=5)
    for policy in without.policies:
        object.__setattr__(policy, "log_ratios", None)
    assert charts.plane(without) is None
    assert "distance from the reference" not in to_html(without)


def test_curves_are_drawn_for_what_was_logged(report):
    captions = [caption for caption, _ in charts.training(report)]
    assert captions == [
        f"{NAMES[1]}: loss/dro",
        "kto: loss/dro",
        "held out: mean of log π/π_ref on the data's answers, nats",
        "held out: win rate over the reference",
    ]


def test_a_page_of_many_policies_and_few_prompts():
    page = to_html(made_up(prompts=2, names=tuple(f"policy {k}" for k in range(10))))
    assert page.count('data-pair="') == 90
    assert "whole-row" in page
    assert "nan" not in re.sub(r'id="data">.*?</script>', "", page, flags=re.DOTALL)


# The frame's document is asked what a reader would try.
QUESTION = """
const $ = (selector) => page.querySelector(selector), all = (s) => [...page.querySelectorAll(s)];
const rectangle = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const change = async (selector, value, kind) => {
  $(selector).value = value;
  $(selector).dispatchEvent(new view.Event(kind ?? "change", { bubbles: true }));
  await wait(300);
};
const state = () => ({ count: $("#count").textContent, page: $("#page").textContent,
  articles: all("article").length, first: $("article")?.innerText });
const answer = { dark: view.matchMedia("(prefers-color-scheme: dark)").matches, title: page.title,
  width: page.documentElement.scrollWidth, images: all("img").length, start: state() };
answer.rectangles = { cells: all(".matrix button").map(rectangle), charts: all("figure svg").map(rectangle),
  articles: all("article").map(rectangle), headline: rectangle($(".headline")) };
answer.texts = all("figure svg text").length;
// Whatever shows is kept for the picture: actions come after the rectangles, and are taken back.
$("#next").click(); answer.second = state();
await change("#verdict", "t"); answer.ties = state();
await change("#verdict", "flipped"); answer.flipped = state();
await change("#verdict", "all");
await change("#query", "HACKED", "input"); answer.query = state();
await change("#query", "no such text", "input"); answer.nothing = state();
await change("#query", "", "input");
await change("#pair", "1"); answer.pair = state();
all(".matrix button")[5].focus(); page.activeElement.click(); answer.cell = [$("#pair").value, state()];
await change("#pair", "0"); answer.end = state();
const focusable = all("a[href], button:not(:disabled), select, input, [tabindex='0']");
answer.focusable = focusable.every((e) => { e.focus({ preventScroll: true }); return page.activeElement === e; });
page.activeElement.blur(); view.scrollTo(0, 0); await wait(100);
return answer;
"""


@pytest.fixture(
    scope="module",
    params=[(1200, False), (1200, True), (375, False), (375, True)],
    ids=["desktop-light", "desktop-dark", "phone-light", "phone-dark"],
)
def seen(page, request):
    width, dark = request.param
    return width, dark, look(page, QUESTION, width=width, height=4600, dark=dark)


@in_browser
def test_nothing_in_a_text_acts_and_nothing_is_asked_of_a_server(seen):
    _, _, found = seen
    assert found.requests == ["/frame.html", "/page.html"]
    assert "hacked" not in found.answer["title"]
    assert found.answer["images"] == 0
    assert HOSTILE in found.answer["start"]["first"]


@in_browser
def test_the_list_can_be_paged_filtered_and_searched(seen, report):
    _, _, found = seen
    answer, winners = found.answer, [v.winner for v in report.verdicts[0, 1]]
    assert answer["start"]["count"] == "231 prompts"
    assert answer["start"]["page"] == "page 1 of 12"
    assert answer["start"]["articles"] == 20
    assert answer["second"]["first"].startswith("Prompt 21")
    assert answer["ties"]["count"] == f"{winners.count('tie')} prompts"
    assert answer["ties"]["first"].startswith(f"Prompt {winners.index('tie') + 1} · tie")
    flips = [v.flipped for v in report.verdicts[0, 1]]
    assert answer["flipped"]["count"] == f"{flips.count(True)} prompts"
    assert answer["query"]["count"] == "2 prompts"
    assert answer["nothing"] == {"count": "0 prompts", "page": "page 1 of 1", "articles": 0}
    assert "kto" in answer["pair"]["first"]
    # The sixth cell is kto's row over the second policy.
    assert answer["cell"][0] == "2"
    assert answer["end"] == answer["start"]
    assert answer["focusable"]


@in_browser
def test_preferred_answers_are_marked(seen, report):
    _, _, found = seen
    first, winner = found.answer["start"]["first"], report.verdicts[0, 1][0].winner
    preferred = {"A": "sft", "B": NAMES[1]}.get(winner)
    assert (f"{preferred} · preferred" in first) == (preferred is not None)
    assert first.count("preferred") == (preferred is not None)


@in_browser
def test_the_page_is_as_wide_as_its_window(seen):
    width, _, found = seen
    assert found.answer["width"] <= width
    for left, _, right, _ in found.answer["rectangles"]["charts"]:
        assert 0 <= left < right <= width


@in_browser
def test_everything_is_drawn_and_legible(seen):
    _, dark, found = seen
    assert found.answer["dark"] == dark
    pixels = np.asarray(found.picture, np.float64)
    surface = pixels[2, 2]
    assert surface.mean() < 60 if dark else surface.mean() > 240
    rectangles = found.answer["rectangles"]
    assert (len(rectangles["cells"]), len(rectangles["charts"])) == (6, 7)
    assert found.answer["texts"] > 40
    for left, top, right, bottom in rectangles["cells"]:
        cell = region(pixels, left, top, right, bottom)
        ground = cell[4, cell.shape[1] // 2]
        # Coloured, with numbers that stand out from the colour.
        assert np.abs(ground - surface).max() > 6
        assert contrast(ground, farthest(cell, ground)) > 4.5
    for left, top, right, bottom in rectangles["charts"]:
        # A line or bar in colour.
        assert_drawn(region(pixels, left, top, right, bottom), surface, coloured=100)
    shown = [r for r in rectangles["articles"] if r[3] < pixels.shape[0]]
    assert len(shown) >= 2
    for left, top, right, bottom in [rectangles["headline"], *shown]:
        assert_legible(region(pixels, left, top, right, bottom), surface)


@in_browser
def test_five_thousand_prompts_stay_quick():
    question = """
    const started = view.performance.now();
    const box = page.querySelector("#query");
    box.value = "colour red"; box.dispatchEvent(new view.Event("input")); await wait(200);
    return { count: page.querySelector("#count").textContent, articles: page.querySelectorAll("article").length,
      nodes: page.querySelectorAll("*").length };
    """
    found = look(to_html(made_up(prompts=5000)), question, width=1200, height=600)
    assert 0 < int(found.answer["count"].split()[0]) < 5000
    assert found.answer["articles"] == 20
    assert found.answer["nodes"] < 5000
