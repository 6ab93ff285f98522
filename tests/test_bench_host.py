"""``bench host``: what its ratios are of, and that it runs."""

from __future__ import annotations

import json

import pytest
import torch

from bench import timing, whole_steps
from bench.__main__ import main


def test_ratios_are_of_one_round(monkeypatch):
    """A round that was disturbed as a whole moves no ratio."""
    found = {
        "forwards": [1.0, 2.0, 40.0, 4.0, 5.0],
        "exact": [2.0, 4.0, 80.0, 8.0, 20.0],
        "inplace": [1.0] * 5,
    }
    asked = []

    def sample(candidates, device, seconds, least):
        asked.append((sorted(candidates), device, seconds, least))
        return dict(found)

    monkeypatch.setattr(whole_steps, "sample", sample)
    case = whole_steps.Case(whole_steps.mlp, ("exact", "inplace"), {"exact": 1.2}, forwards=16)
    exact, inplace = whole_steps.rows_of("mlp", case, 3.0, 7)
    assert asked == [(["exact", "forwards", "inplace"], "cpu", 3.0, 7)]
    assert (exact["ratio"], exact["low"], exact["high"], exact["goal"]) == (2.0, 2.0, 2.0, 1.2)
    assert (inplace["ratio"], inplace["low"], inplace["high"]) == (0.25, 0.2, 0.5)
    assert inplace["goal"] is None
    assert (exact["seconds"], exact["forwards_seconds"], exact["rounds"]) == (8.0, 4.0, 5)


def test_quantiles():
    assert timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == (1.0, 2.0, 4.0)
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_the_yardstick_is_the_closure():
    """So many forwards, without gradients."""
    seen = []

    def closure() -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.zeros(())

    whole_steps._forwards(closure, 16)()
    assert seen == [False] * 16


# which needs a list of blocks
@pytest.mark.parametrize("form", sorted(whole_steps.FORMS.keys() - {"device"}))
def test_each_form_is_a_step(form):
    """It runs as many forwards as the method takes, and leaves finite weights."""
    torch.manual_seed(0)
    model, closure = whole_steps.cnn()
    calls = []
    step = whole_steps.FORMS[form](model, lambda: calls.append(0) or closure())
    step()
    step()
    assert len(calls) == 2 * (16 if "q=8" in form else 2)
    assert all(p.isfinite().all() for p in model.parameters())


def test_forms_and_goals_belong_together():
    for name, case in whole_steps.CASES.items():
        assert set(case.forms) <= whole_steps.FORMS.keys(), name
        assert case.goals.keys() <= set(case.forms), name
    assert set(whole_steps.TINY) <= whole_steps.CASES.keys()


def test_the_models_are_those_of_the_names():
    model, closure = whole_steps.mlp()
    assert sum(p.numel() for p in model.parameters()) == 64 * 64 + 64 + 64 * 10 + 10
    assert closure().dim() == 0
    pytest.importorskip("transformers")
    model, _ = whole_steps.opt_host()
    assert len(list(model.parameters())) == 388
    model, _ = whole_steps.gpt2()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.11


def test_runs(tmp_path, capsys):
    threads = torch.get_num_threads()
    path = tmp_path / "host.json"
    assert main(["host", "--tiny", "--model", "calls", "mlp", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [(r["model"], r["form"]) for r in rows] == [
        ("calls", "plan"), ("calls", "list"), ("calls", "one tensor"),
        ("mlp", "exact"), ("mlp", "inplace"), ("mlp", "MeZO"),
    ]  # fmt: skip
    assert all(r["low"] > 0 for r in rows)
    assert out.count("x 2 forwards of") == 3
    assert all(len(line) <= 120 for line in out.splitlines())
    assert torch.get_num_threads() == threads
