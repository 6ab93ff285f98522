"""Streamed runs whose blocks cross the link in a wire format.

Lossless ones against the run in memory, lossy ones against a loop that is written out here.
"""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from helpers import DTYPES, watched
from offload_cases import batch_of, loss_of, same_bits, same_state, tower, train
from safetensors.torch import load_file
from test_offload import METHODS
from test_offload_disk import checkpoint, empty

import zokernels
import zokernels.optim as optim
from zokernels import offload
from zokernels.wire import FORMATS

LOSSLESS = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOSSY = [(w, d) for w in FORMATS for d in DTYPES if not zokernels.is_lossless(w, d)]


def through(x, wire):
    """decode(encode(x)) by the reference, rounded to the dtype of x."""
    with zokernels.backend("reference"):
        data = torch.zeros(zokernels.wire_bytes(x.numel(), wire), dtype=torch.uint8)
        zokernels.encode(data, x, wire)
        out = torch.empty_like(x)
        zokernels.decode(out, data, wire)
    return out


def seen(model, weights, wire, sign=0, eps=0.0, step=0, seed=5):
    """``model`` with what a forward computes with, of the exact ``weights``; in blocks through the wire."""
    for name, p in model.named_parameters():
        theta = weights[name]
        if ".layers." in f".{name}":
            theta = through(theta, wire)
        with torch.no_grad():
            p.copy_(theta)
            if sign:
                direction = zokernels.derive_seed(seed, step)
                zokernels.combine(p, theta, direction, sign * eps, streams=zokernels.stream_of(name))
    return model


def written_out(model, steps, wire, eps=1e-2, lr=1e-2, weight_decay=0.1):
    """Losses; the weights in ``model`` are trained."""
    weights = {name: p.data for name, p in model.named_parameters()}
    shadow, losses = copy.deepcopy(model), []
    optimizer = optim.ZOSGD(model.named_parameters(), lr=lr, eps=eps, weight_decay=weight_decay, seed=5)
    for step in range(steps):
        torch.manual_seed(step)
        sides = iter((1, -1))

        def loss():
            for p in model.parameters():  # ZOSGD perturbs them for whoever takes them: here, nobody
                p.sum()
            here = seen(shadow, weights, wire, next(sides), eps, step)  # noqa: B023
            return loss_of(here, batch_of(step))  # noqa: B023

        losses.append(optimizer.step(loss).double())
    return torch.stack(losses)


@pytest.mark.parametrize("storage", ["host", "disk"])
@pytest.mark.parametrize("wire", LOSSLESS)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_lossless_has_the_bits_of_no_wire(slots, wire, storage, rng, tmp_path):
    model = tower(LOSSLESS[wire], seed=rng.getrandbits(30))
    ours = copy.deepcopy(model)
    expected, _ = train(model, 12)
    path = tmp_path / "run" if storage == "disk" else None
    options = {"slots": slots, "scratch": rng.choice((1, 2)), "write_every": rng.choice((1, 3))}
    with offload.stream(ours, "layers", storage, path=path, wire=wire, **options) as engine:
        assert engine.is_lossless
        losses, _ = train(ours, 12)
        assert same_bits(losses, expected)
        assert not same_state(ours.state_dict(), model.state_dict())


@pytest.mark.parametrize(("wire", "dtype"), LOSSY, ids=str)
def test_lossy_has_the_bits_of_the_loop(wire, dtype, rng, tmp_path):
    model = tower(dtype, seed=rng.getrandbits(30), dropout=rng.choice((0.0, 0.1)))
    ours, start = copy.deepcopy(model), copy.deepcopy(model)
    exact, _ = train(start, 8)
    expected = written_out(model, 8, wire)
    storage = rng.choice(("host", "disk"))
    path = tmp_path / "run" if storage == "disk" else None
    slots, write_every = rng.choice((1, 2, 3, 8)), rng.choice((1, 3))
    with offload.stream(
        ours, "layers", storage, path=path, wire=wire, slots=slots, write_every=write_every
    ) as engine:
        assert not engine.is_lossless
        losses, _ = train(ours, 8)
        assert same_bits(losses, expected)
        if (wire, dtype) != ("fp16", torch.bfloat16):  # that loses numbers near 0 alone
            assert not same_bits(losses, exact)
        assert not same_state(ours.state_dict(), model.state_dict())  # the exact masters
        engine.save(tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    assert all(same_bits(v, model.state_dict()[k]) for k, v in saved.items())


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(method, wire, rng, tmp_path):
    """The result is the same for any slots and storage, and with a lossless wire it is that of a run in
    memory.
    """
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    runs = []
    for options in (
        {"slots": 1, "scratch": 1},
        {"slots": 2},
        {"slots": 8, "storage": "disk", "path": tmp_path / "run"},
    ):
        ours = copy.deepcopy(model)
        with offload.stream(ours, "layers", wire=wire, **options):
            losses, _ = train(ours, 5, make=METHODS[method])
            runs.append((losses, ours.state_dict()))
    if wire == "bf16":
        losses, _ = train(model, 5, make=METHODS[method])
        runs.append((losses, model.state_dict()))
    for losses, state in runs[1:]:
        assert same_bits(losses, runs[0][0])
        assert not same_state(state, runs[0][1])


def test_evaluation_sees_what_training_sees_and_changes_nothing(rng, tmp_path):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30), dropout=0.0)
    ours, shadow = copy.deepcopy(model), copy.deepcopy(model)
    expected = written_out(model, 4, "fp8")
    with offload.stream(ours, "layers", slots=rng.choice((1, 2, 8)), wire="fp8") as engine:
        optimizer = optim.ZOSGD(ours.named_parameters(), lr=1e-2, eps=1e-2, weight_decay=0.1, seed=5)
        for step in range(4):
            ids = batch_of(step)
            for _ in range(rng.choice((1, 2))):
                weights = ours.state_dict()
                assert same_bits(ours(ids).detach(), seen(shadow, weights, "fp8")(ids).detach())
                if rng.random() < 0.5:
                    engine.flush()
            loss = optimizer.step(lambda: loss_of(ours, ids))  # noqa: B023
            assert same_bits(loss.double(), expected[step])
        assert not same_state(ours.state_dict(), model.state_dict())


def test_blocks_that_are_called_twice_and_accumulated_losses(rng):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    order = [0, 1, 1, 3, 2, 4, 0]
    losses = lambda m, ids: loss_of(m, ids) + loss_of(m, ids.flip(1))
    runs = []
    for slots in (1, 2, 8):
        ours = copy.deepcopy(model)
        forward = lambda self, ids: self.head(
            self.norm(functools.reduce(lambda x, i: self.layers[i](x), order, self.embed(ids)))
        )
        ours.forward = forward.__get__(ours)
        with offload.stream(ours, "layers", slots=slots, wire="int8"):
            runs.append((train(ours, 5, losses=losses)[0], ours.state_dict()))
    for values, state in runs[1:]:
        assert same_bits(values, runs[0][0])
        assert not same_state(state, runs[0][1])


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_read_only_storage(wire, rng, tmp_path):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    base = checkpoint(model, tmp_path / "base.safetensors")
    before, ours = base.read_bytes(), empty()
    expected = written_out(model, 6, wire)
    with offload.stream(ours, "layers", "disk", weights=base, slots=rng.choice((1, 2, 8)), wire=wire):
        losses, _ = train(ours, 6)
        assert same_bits(losses, expected)
        assert not same_state(ours.state_dict(), model.state_dict())
    assert base.read_bytes() == before


@pytest.mark.parametrize("wire", ["bf16", "fp8", "int8"])
def test_resuming(wire, rng, tmp_path):
    """After a clean end and after one where nothing is flushed; with other slots and write_every each
    time.
    """
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    base = checkpoint(model, tmp_path / "base.safetensors")
    expected, at = written_out(model, 10, wire), 0
    for until in (3, 4, 7, 10):
        ours = empty()
        options = {"slots": rng.choice((1, 2, 8)), "write_every": rng.choice((1, 2))}
        engine = offload.stream(
            ours, "layers", "disk", weights=base, path=tmp_path / "run", resume=True, wire=wire, **options
        )
        losses, optimizer = train(ours, until)
        assert same_bits(losses, expected[at:until])
        at = until
        if until in (4, 7):  # as a process that dies
            optimizer.trajectory.close()  # which waits for writes that look at the log
        else:
            engine.close()
    saved = empty()
    with offload.stream(saved, "layers", "disk", weights=base, path=tmp_path / "run", resume=True) as engine:
        train(saved, 10)
        # read without a wire: the masters are exact
        assert not same_state(saved.state_dict(), model.state_dict())


def test_mixed_dtypes_and_integers_in_a_block(rng):
    class Mixed(torch.nn.Linear):
        def __init__(self):
            super().__init__(33, 33)
            self.bias.data = self.bias.data.bfloat16()
            self.shift = torch.nn.Parameter(torch.randint(-3, 4, (33,)).to(torch.int8), requires_grad=False)

        def forward(self, x):
            return torch.tanh(
                torch.nn.functional.linear(x, self.weight, self.bias.float()) + self.shift.float()
            )

    torch.manual_seed(rng.getrandbits(30))
    model = torch.nn.Sequential(*(Mixed() for _ in range(3)))
    shadow, x = copy.deepcopy(model), torch.randn(4, 33)
    for p in shadow.parameters():
        if p.is_floating_point():
            p.data = through(p.data, "fp8")
    with offload.stream(model, list(model), wire="fp8", slots=2) as engine:
        assert not engine.is_lossless
        assert same_bits(model(x).detach(), shadow(x).detach())
        for layer, theirs in zip(model, shadow, strict=True):
            assert torch.equal(engine.value(layer.shift), theirs.shift)
            assert not torch.equal(engine.value(layer.weight), theirs.weight)


def test_the_slots_are_narrow_and_hold_wire_bytes():
    model = tower(torch.float32)
    sizes = {}
    for wire in (None, "bf16", "fp8"):
        with offload.stream(copy.deepcopy(model), "layers", slots=2, wire=wire) as engine:
            form = engine.wire.layout.nbytes if engine.wire else [b.nbytes for b in engine.blocks]
            sizes[wire] = max(form)
            assert all(s.data.numel() >= max(form) for s in engine.buffers)
            assert all(s.data.numel() < max(form) + 4096 for s in engine.buffers)
    assert sizes["fp8"] < sizes["bf16"] < sizes[None]


def test_a_failure_in_a_thread_is_raised(monkeypatch, tmp_path):
    model = tower(torch.bfloat16)
    engine = offload.stream(model, "layers", "disk", path=tmp_path / "run", wire="fp8", slots=2)
    broken = lambda *args: (_ for _ in ()).throw(OSError("mine"))
    with watched("encode", broken), pytest.raises(OSError, match="mine"):
        model(batch_of(0))
    monkeypatch.setattr(engine.mover.source, "write", broken)
    flushed = lambda: (train(model, 6), engine.flush())
    with pytest.raises(OSError, match="mine"):
        flushed()
    engine.mover.close()


def test_a_master_with_half_an_update_is_never_used():
    model = tower(torch.bfloat16)
    engine = offload.stream(model, "layers", wire="fp8", slots=2)
    train(model, 1)
    calls = []

    def failing(*args):
        if threading.current_thread() is not threading.main_thread():  # but in the one that updates masters
            calls.append(args)
            if len(calls) == 3:
                raise MemoryError("mine")

    with watched("combine_", failing), pytest.raises(MemoryError, match="mine"):
        train(model, 4)
    for _ in range(3):  # the error stays
        with pytest.raises(MemoryError, match="mine"):
            model(batch_of(0))
    engine.mover.close()


def test_bad_arguments():
    model = tower()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="stream: wire: expected 'bf16' or"):
        offload.stream(model, wire="fp4")
    with pytest.raises(ValueError, match="stream: wire: expected None where storage is 'device'"):
        offload.stream(model, storage="device", wire="fp8")
    assert not same_state(model.state_dict(), before)
