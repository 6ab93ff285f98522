"""The page of results: whole, self-contained, and with the figures of its JSON files."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from bench import charts, page
from zokernels.cli import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "bench/results").glob("*/*.json"))
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects text, tables and attributes.  Fails if a tag does not close what was opened last."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.tables, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, list[dict]]:
    """The page that the command writes of the committed results, and these results."""
    output = tmp_path_factory.mktemp("page") / "results.html"
    assert main(["bench", "report", *map(str, FILES), "-o", str(output)]) == 0
    return output.read_text(), [json.loads(path.read_text()) for path in FILES]


def test_page_is_whole_and_needs_nothing_else(made):
    text, _ = made
    parsed = Page(text)
    assert parsed.tags.count("html") == parsed.tags.count("body") == parsed.tags.count("h1") == 1
    assert not {"link", "img", "iframe", "object"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert name not in ("src", "onclick"), (name, value)
        assert name != "href" or value.startswith("https://"), value
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_tables_hold_every_row_of_the_results(made):
    text, results = made
    parsed = Page(text)
    for result in results:
        if page.kind_of(result) != "methods":
            continue
        table = next(t for t in parsed.tables if t[0][0] == "method")
        assert len(table) == 1 + len(result["rows"])
        for line, row in zip(table[1:], result["rows"], strict=True):
            assert line[0].startswith(row["method"])
            ms = [f"{row[key] * 1e3:.2f}" for key in ("seconds", "eager_seconds")]
            assert line[1:4] == [f"{row['loss_last']:.3f}", *ms]
    runs = [r for result in results if page.kind_of(result) == "run" for r in result["rows"]]
    assert runs
    lines = [line for t in parsed.tables if "p50 ms" in t[0] for line in t[1:]]
    assert len(lines) == len(runs)
    p50 = next(t[0].index("p50 ms") for t in parsed.tables if "p50 ms" in t[0])
    assert [float(line[p50]) for line in lines] == pytest.approx([r["p50"] * 1e3 for r in runs], rel=0.06)


def test_headlines_and_header_are_the_results(made):
    text, results = made
    words = " ".join(Page(text).words)
    for result in results:
        for key in ("cpu", "torch", "zokernels"):
            assert str(result["machine"][key]) in words
        assert result["command"] in words
    run = next(r for r in results if page.kind_of(r) == "run")
    row = next(
        r
        for r in run["rows"]
        if (r["op"], r["dtype"], r["dist"], r["k"]) == ("combine_", "bf16", "normal", 1)
    )
    assert (f"{row['ratio']['mezo']:.1f}x") in [figure for figure, _ in page.headlines(results)]
    for what in run["skipped"]:
        assert what in words


def test_each_card_of_a_tiny_run_says_so(made):
    """One of a measured run does not."""
    text, results = made
    assert page.TINY not in text
    tiny, card = (
        page.html([{**r, "command": f"{r['command']} --tiny"} for r in results]),
        '<div class="card">',
    )
    assert tiny.count(card) == tiny.count(f'{card}<p class="tiny">{page.TINY}') == text.count(card) > 2
    tiles = re.findall(r'<div class="tile">.*?</div>', tiny)
    assert len(tiles) > 2
    assert all(page.TINY in tile and "<b>TINY</b>" in tile for tile in tiles)
    assert "<b>TINY</b>" not in text


def shapes(picture: str, colour: str) -> list[list[float]]:
    """The numbers of each path that has this colour."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*fill: var\(--{colour}\)', picture)
    return [[float(number) for number in re.findall(r"-?[\d.]+", path)] for path in paths]


def test_lengths_follow_from_the_values():
    panel = charts.Bars("", [("a <b>", 1.0, "normal"), ("c", 4.0, "normal")], "{:.3f}", mark=2.0)
    picture = charts.svg(charts.bars([panel]), 'a "b"')
    one, four = ((max(path[::2]), min(path[::2])) for path in shapes(picture, "normal"))
    assert one[1] == four[1]
    assert four[0] - four[1] == pytest.approx(4 * (one[0] - one[1]), rel=1e-4)
    assert {"1.000", "4.000"} <= set(Page(picture).words)
    assert ">a &lt;b&gt;</text>" in picture  # the text is not drawn as shapes
    assert 'aria-label="a &quot;b&quot;"' in picture


def test_dots_lie_on_a_logarithmic_axis_in_the_colours_of_the_page():
    points = [(label, value) for label in ("x", "y") for value in (0.1, 1.0, 10.0)]
    series = [charts.Dots("ours", points, "normal", "o"), charts.Dots("theirs", [("y", 3.0)], "other", "s")]
    picture = charts.svg(charts.dots(series, ["x", "y"], "ns"), "dots")
    places = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*fill: var\(--normal\)', picture)
    row = sorted((float(x), float(y)) for x, y in places[:3])  # those of the row "y" and of the legend follow
    assert row[1][0] - row[0][0] == pytest.approx(row[2][0] - row[1][0], abs=1e-3)
    assert len({y for _, y in row}) == 1
    assert {"ours", "theirs", "ns"} <= set(Page(picture).words)
    assert not [colour for colour in charts.COLOURS.values() if colour in picture]


def test_without_matplotlib_one_message(tmp_path):
    """In a process of its own: other tests have imported it."""
    blocked = (
        "import sys; sys.modules['matplotlib'] = None; from bench.__main__ import main; main(sys.argv[1:])"
    )
    for command in (
        ["report", "-o", tmp_path / "x.html"],
        ["methods", "--tiny", "--write", tmp_path / "x.md"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", blocked, *command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert (
            done.stderr == "bench: expected matplotlib for the pictures, got none; pip install matplotlib\n"
        )
        assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"schema": 2}')
    with pytest.raises(SystemExit, match="expected a file that"):
        page.write([tmp_path / "x.json"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.slow
def test_a_browser_shows_it(made, tmp_path):
    """In a headless Chromium: no error, and more than a few colours on the screen."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "page.html").write_text(made[0])
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += [
        "--window-size=1200,1600",
        f"--screenshot={tmp_path}/page.png",
        (tmp_path / "page.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    with image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1200, 1600)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
