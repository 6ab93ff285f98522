"""The page of results: whole, self-contained, and with the figures of its JSON files."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from bench import charts, page
from zokernels.cli import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "bench/results").glob("*/*.json"))
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Text, tables and attributes; fails where a tag does not close what was opened last."""

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
    """(HTML, results) of the committed results, as the command writes it."""
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
    assert "url(" not in text
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
            assert line[2:5] == [f"{row['loss_last']:.3f}", *ms]
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
    row = next(r for r in run["rows"] if (r["op"], r["dtype"], r["dist"], r["k"]) == ("combine_", "bf16", "normal", 1))
    assert (f"{row['ratio']['mezo']:.1f}x") in [figure for figure, _ in page.headlines(results)]
    for what in run["skipped"]:
        assert what in words


def test_lengths_follow_from_the_values():
    text = charts.bars([charts.Bar("a <b>", 1.0, "1", "normal"), charts.Bar("c", 4.0, "4", "other")], mark=2.0)
    assert re.findall(r"width:([\d.]+)%", text) == ["25.00", "100.00"]
    assert text.count("left:50.00%") == 2
    assert "a &lt;b&gt;" in text
    plot = charts.dots([("x", [charts.Dot(v, "normal", str(v)) for v in (0.1, 1.0, 10.0)])], "ns")
    at = [float(x) for x in re.findall(r'cx="([\d.]+)"', plot)]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=0.2)
    assert at[2] > at[0]


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
    command += ["--window-size=1200,1600", f"--screenshot={tmp_path}/page.png", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    with image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1200, 1600)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
