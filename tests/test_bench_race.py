"""The loss against time: both trainers take real steps of one task by one clock, and the file is drawn."""

from __future__ import annotations

import json

import pytest
import torch

from bench import race
from bench.__main__ import main, parse
from zokernels.optim import ZOSGD


@pytest.fixture
def args():
    pytest.importorskip("transformers")
    found = parse(["race", "--tiny"])
    found.batch = 4
    return found


def test_a_tiny_race(args, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    clock = iter(range(10**6))  # one second a look, so a step takes one
    monkeypatch.setattr(race.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(race, "POINTS", 2)
    file, picture = tmp_path / "race.json", tmp_path / "race.png"
    assert main(["race", "--tiny", "--json", str(file), "--png", str(picture)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(file.read_text())
    assert result["tiny"]
    assert [row["trainer"] for row in result["rows"]] == list(race.TRAINERS)
    for row in result["rows"]:
        assert row["steps"] == 1  # 0.3 s are used up by the first
        assert row["step_seconds"] == [1.0, 1.0, 1.0]
        assert [at for at, _ in row["points"]] == [0.0, 1.0]
    first = picture.read_bytes()
    picture.unlink()
    assert main(["race", "--draw", str(file), "--png", str(picture)]) == 0
    assert picture.read_bytes() == first


def test_trainers_take_mezos_step(args, rng):
    """theta - lr g z: the move of each trainer has the length lr |g| sqrt(n) that normals have."""
    seed = rng.randrange(2**20)
    for name, make in race.TRAINERS.items():
        task = race.sentences(args, seed)
        batch, before = next(task.batches), [p.detach().clone() for p in task.model.parameters()]
        loss = task.evaluate()
        make(task.model, 0.5, 1e-3, seed)(lambda batch=batch, task=task: task.loss(batch))
        moved = torch.cat(
            [(p - q).detach().flatten() for p, q in zip(task.model.parameters(), before, strict=True)]
        )
        scale = moved.std()
        assert scale > 0, name
        assert abs(float((moved / scale).pow(4).mean()) - 3) < 0.5, name  # normals
        assert task.evaluate() != loss


def test_both_see_the_same_batches(args, rng):
    seed = rng.randrange(2**20)
    one, other = (race.sentences(args, seed) for _ in range(2))
    for _ in range(5):
        a, b = next(one.batches), next(other.batches)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.labels, b.labels)
    assert all(
        torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


def test_the_trainer_here_is_zosgd(args):
    step = race.ours(torch.nn.Linear(2, 1), 1e-3, 1e-3, 0)
    assert isinstance(step.__self__, ZOSGD)
