"""The demo: its data, its batches, its checks, and a tiny run of the whole."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from itertools import islice

import pytest
import torch
from helpers import watched

import zokernels
from zokernels.cli import main
from zokernels.examples import hotpath, reviews
from zokernels.optim import ZOSGD
from zokernels.trajectory import read

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEYS = {
    *("loss_first", "loss_last", "acc_before", "acc_after", "steps", "restored_exactly", "replayed_exactly"),
    *("ms_per_step_hot_path", "ms_per_step_hot_path_eager", "hot_path_speedup"),
    *("loss_definition", "seed", "steps_per_second", "wall_seconds", "machine"),
}


@pytest.fixture(scope="module")
def sentences() -> list[reviews.Review]:
    try:
        reviews.fetch()
    except SystemExit as error:
        pytest.skip(str(error))
    return reviews.load(clear=0.0)


class Tokenizer:
    """Each character is a token, so batches can be tested without transformers."""

    pad_token_id = 0

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[1 + ord(c) % 50 for c in text][:max_length] for text in texts]}


def test_every_sentence_is_there(sentences):
    labels = [r.label for r in sentences]
    assert (labels.count(1), labels.count(0)) == (5241, 5325)
    assert len({r.text.lower() for r in sentences}) == len(sentences)


def test_clear_sentences_are_balanced(sentences):
    labels = [r.label for r in reviews.load()]
    assert (labels.count(1), labels.count(0)) == (2187, 2051)


def test_split_is_disjoint_and_fixed(sentences):
    training, validation = reviews.split(sentences, 1000)
    assert len(validation) == 1000
    assert not {r.text for r in training} & {r.text for r in validation}
    assert reviews.split(sentences, 1000) == (training, validation)
    assert 450 < sum(r.label for r in validation) < 550


def test_batches():
    data = [reviews.Review("x" * (1 + i % 37), i % 2) for i in range(200)]
    batcher = reviews.Batcher(data, Tokenizer(), 8, torch.device("cpu"))
    ordered = batcher.ordered()
    assert sum(len(b.labels) for b in ordered) == 200
    assert sum(int(b.mask.sum()) for b in ordered) == sum(len(r.text) for r in data)
    assert all(torch.equal(b.mask.bool(), b.ids != 0) for b in ordered)
    some = list(islice(batcher.forever(seed=1), 60))
    assert all(len(b.labels) == 8 for b in some)
    again = list(islice(batcher.forever(seed=1), 60))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(some, again, strict=True))
    padding = 1 - sum(int(b.mask.sum()) for b in some) / sum(b.mask.numel() for b in some)
    assert padding < 0.25


def test_hot_path_is_what_the_optimizer_calls():
    """The timed calls are those of a real ZOSGD step: the same sizes in the same order, in place and out
    of place.
    """
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False)
    )
    x, calls = torch.randn(3, 5), []

    def seen(name):
        return watched(name, lambda out, *rest: calls.append((name, [p.numel() for p in out])))

    with seen("combine"), seen("combine_"):
        hotpath.combines(hotpath.leaves(model))()
        timed = calls.copy()
        for closure in (lambda: model(x).sum(), hotpath.touch(hotpath.leaves(model))):
            calls.clear()
            ZOSGD(model.named_parameters(), lr=1e-3, scratch=0).step(closure)
            assert calls == timed
    assert timed == [("combine", n) for n in ([20, 4], [4, 4], [8])] * 2 + [("combine_", [20, 4, 4, 4, 8])]


def test_hot_path_perturbs_into_scratch():
    model = torch.nn.Linear(5, 4)
    before = [p.detach().clone() for p in model.parameters()]
    call = hotpath.combines(hotpath.leaves(model))
    call()
    for stream, (p, t) in enumerate(zip(model.parameters(), before, strict=True)):
        z = zokernels.noise(p.shape, seed=1, stream=stream)
        torch.testing.assert_close(p.detach(), t + 1e-6 * z, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_is_checked(dtype, monkeypatch):
    model = torch.nn.Linear(6, 3)
    x = torch.randn(4, 6)
    loss = lambda m: m(x.to(m.weight.dtype)).float().square().mean()
    assert hotpath.restored_exactly(model, loss, dtype)

    def careless(m):  # a forward that leaves a weight changed, behind the guards that would notice
        with torch._C.DisableTorchFunction():
            torch.Tensor.data.__get__(m.bias).add_(1)
        return loss(m)

    assert not hotpath.restored_exactly(model, careless, dtype)


def test_replaying_is_checked(tmp_path):
    pytest.importorskip("matplotlib")
    from zokernels.examples import demo

    model = torch.nn.Linear(6, 3)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, trajectory=tmp_path / "run.zk")
    for _ in range(3):
        optimizer.step(lambda: model(torch.ones(6)).square().sum())
    optimizer.trajectory.close()
    copy = lambda: {n: t.clone() for n, t in base.items()}
    assert demo.replayed(model, copy(), tmp_path / "run.zk")[0]
    with torch.no_grad():
        model.bias[1] = torch.nextafter(model.bias[1], torch.tensor(torch.inf))
    assert not demo.replayed(model, copy(), tmp_path / "run.zk")[0]


@pytest.mark.slow
def test_tiny_run_writes_a_report(sentences, tmp_path):
    for package in ("transformers", "safetensors", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    options = ["--tiny", "--steps", "2", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "examples/demo.py", *options], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    if "demo-data.txt" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= KEYS
    assert report["steps"] == 2
    assert report["restored_exactly"] is True
    assert report["hot_path_speedup"] == pytest.approx(
        report["ms_per_step_hot_path_eager"] / report["ms_per_step_hot_path"]
    )
    assert report["replayed_exactly"] is True
    log = read(tmp_path / "run.zk")
    assert (log.steps, log.header["optimizer"], report["log_bytes"]) == (2, "ZOSGD", log.end)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for n, t in weights.items() if n != "centre") == report["weights"] == 22_566_144

    # The command makes the saved weights of the base and the log.
    at = {
        name: str(tmp_path / name)
        for name in ("base.safetensors", "run.zk", "again.safetensors", "model.safetensors")
    }
    assert main(["replay", at["base.safetensors"], at["run.zk"], "-o", at["again.safetensors"]]) == 0
    again = load_file(at["again.safetensors"])
    assert again.keys() == weights.keys()
    assert all(
        torch.equal(again[name].view(torch.int32), weights[name].view(torch.int32)) for name in weights
    )
    assert any(not torch.equal(t, weights[name]) for name, t in load_file(at["base.safetensors"]).items())
    assert main(["verify", at["run.zk"], at["base.safetensors"], at["model.safetensors"]]) == 0
