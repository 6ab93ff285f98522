"""``python -m bench engines``: what it says of a worker that has the faults it looks for, and of ours."""

from __future__ import annotations

import json

import pytest

from bench.__main__ import main

#: A worker that reseeds for every parameter, and undoes a perturbation by adding its negative.
WORKER = """
import torch

class WorkerExtension:
    def move(self, seed, scale):
        for _, p in self.model_runner.model.named_parameters():
            z = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
            p.data.add_(scale * z)

    def perturb_self_weights(self, seed, sigma):
        self.move(seed, sigma)

    def restore_self_weights(self, seed, sigma):
        self.move(seed, -sigma)

    def update_weights_from_seeds(self, seeds, coeffs, alpha, population):
        for seed, c in zip(seeds, coeffs):
            self.move(seed, alpha / population * c)
"""


@pytest.mark.parametrize("with_peer", [False, True])
def test_facts_about_workers(with_peer, tmp_path, capsys):
    arguments = ["engines", "--tiny", "--json", str(tmp_path / "engines.json")]
    if with_peer:
        (tmp_path / "worker.py").write_text(WORKER)
        arguments += ["--peer", str(tmp_path / "worker.py")]
    assert not main(arguments)
    printed = capsys.readouterr().out
    found = {row["worker"]: row for row in json.loads((tmp_path / "engines.json").read_text())["rows"]}
    assert list(found) == ["peer"] * with_peer + ["normal", "rademacher"]
    for name in ("normal", "rademacher"):
        row = found[name]
        assert (row["changed"], row["rms"], row["pairs_alike"], row["ranks_agree"]) == (0, 0, 0, 1)
        assert ("speedup" in row) == with_peer
    if with_peer:
        peer = found["peer"]
        assert 0.1 < peer["changed"] < 0.9
        assert peer["pairs_alike"] == peer["pairs"] == 3
        assert peer["ranks_agree"] < 0.9
        assert peer["speedup"] == 1
    assert "| ours, Rademacher |" in printed
    assert ("| es-at-scale |" in printed) == with_peer
