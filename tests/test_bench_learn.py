"""The benchmark of learning: its search, its file, what it says, and that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from bench.__main__ import main
from bench.learn import run, tasks
from bench.methods.catalog import METHODS

MEZO = METHODS[0]


class Fake:
    """Results whose loss is a function of the step size, and which note what they were asked for."""

    def __init__(self, loss, other):
        self.loss, self.other, self.asked = loss, other or loss, []

    def get(self, task, method, lr, seed, search, budget):
        assert seed in run.SEARCH_SEEDS
        assert search
        self.asked.append(lr)
        return {"loss": self.loss(lr) if seed == run.SEARCH_SEEDS[0] else self.other(lr)}


def searched(loss, other=None):
    fake = Fake(loss, other)
    return run.search(fake, tasks.TASKS["digits"], dataclasses.replace(MEZO, lr=0.01), 10), fake.asked


@pytest.mark.parametrize("best", [0.001, 0.01, 0.316])
def test_search_ends_between_two_that_are_worse(best):
    found, asked = searched(lambda lr: abs(math.log10(lr / best)))
    assert found == pytest.approx(best, rel=0.02)
    for neighbour in (found * 10**0.5, found / 10**0.5):
        assert any(lr == pytest.approx(neighbour, rel=0.02) for lr in asked)


def test_search_does_not_go_on_for_ever_and_takes_no_divergence():
    assert searched(lambda lr: -lr)[0] == pytest.approx(0.01 * 10 ** (run.FURTHEST / 2), rel=0.02)
    assert searched(lambda lr: None if lr > 0.005 else 1.0)[0] < 0.01
    assert (
        searched(lambda lr: -lr, lambda lr: None if lr > 0.02 else -lr)[0] == 0.01
    )  # the worse of two seeds


def row(method, losses, task="digits", **more):
    own = {"task": task, "method": method, "use": method, "lr": 0.1, "budget": 8, "phase": "seed", **more}
    of = lambda x: {"loss": x, "accuracy": 0.5, "curve": [[0, 2.0], [8, x]]}
    return [{**own, "seed": i, **of(x)} for i, x in enumerate(losses)]


def test_mean_and_interval_of_seeds():
    found = run.summary(row("a", [1.0, 2.0, 3.0]))
    assert found["loss"] == 2.0
    assert found["half"] == pytest.approx(4.303 / 3**0.5)
    assert math.isinf(run.summary(row("a", [1.0, None]))["loss"])


def test_advice_follows_the_results():
    names = [m.name for m in METHODS[:3]]
    better, worse, other = row(names[0], [1, 1.01]), row(names[1], [2, 2.01]), row(names[2], [0.98, 1.1])
    results = run.Results(None, "", {})
    results.runs = [*worse, *better, *other]
    text = run.advice(run.rows_of(results.runs))
    assert f"the lowest loss has **{names[0]}**" in text
    assert f"not to be told from it: {names[2]}." in text
    assert names[1] not in text
    assert text.count("not run.") == len(tasks.TASKS) - 1
    results.runs = [*row(names[0], [0.1, 0.1], lr=9.0), *row(names[0], [3.0, 3.1]), *worse]
    assert f"the lowest loss has **{names[1]}**" in run.advice(run.rows_of(results.runs))


def test_a_run_is_gone_on_with_and_written(tmp_path, capsys, monkeypatch):
    document, path = tmp_path / "methods.md", tmp_path / "learn.json"
    document.write_text(f"before\n{run.BEGIN}\nstale text\n{run.END}\nafter\n")
    command = ["learn", "--tiny", "--only", MEZO.name, "ConMeZO", "--json", str(path)]
    assert main(command) == 0
    done = json.loads(path.read_text())["runs"]
    assert [(r["method"], r["seed"], r["phase"]) for r in done] == [
        (name, seed, "seed") for name in (MEZO.name, "ConMeZO") for seed in range(2)
    ]
    assert all(r["forwards"] == 40 and r["curve"][0][0] == 0 and len(r["curve"]) > 5 for r in done)
    assert done[0]["loss"] != done[1]["loss"]

    def none(*args):
        raise AssertionError("a training that the file has")

    monkeypatch.setattr(run, "train", none)
    assert main([*command, "--write", str(document)]) == 0
    assert json.loads(path.read_text())["runs"] == done
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale text" not in text
    assert "| digits | ConMeZO |" in text
    assert (tmp_path / "learn.png").stat().st_size > 10_000
    capsys.readouterr()


def test_data_of_the_search_and_of_the_end_are_apart():
    (training, _), (searched, _), (end, _) = tasks._digits()
    assert len(training) + len(searched) + len(end) == 1797
    rows = [tuple(x.tolist()) for part in (training, searched, end) for x in part]
    assert len(set(rows)) > 1780  # a few images are there twice
