"""Models with integer weights, streamed: the integers move with their block, and are trained there, too."""

from __future__ import annotations

import copy

import pytest
import torch
from offload_cases import Tower, same_bits, tower, train
from safetensors.torch import load_file, save_file
from torch import nn

from zokernels import offload
from zokernels.optim import QZO, QuZO
from zokernels.quantize import QuantizedLinear, named_integers, named_scales, quantize_
from zokernels.trajectory import replay_

#: Of each method: what it trains, and arguments with which the trained weights move.
METHODS = {
    "QZO": (QZO, lambda m: list(named_scales(m)), {"lr": 1e-3, "eps": 1e-3, "minimum": 5e-3}),
    "QuZO": (QuZO, named_integers, {"lr": 300.0, "eps": 2.0}),
}


def quantized(rng, dtype=torch.bfloat16, bits=8, packed=False):
    """A tower with integers in its layers, and the embedding, norms and head as they were."""
    model = tower(dtype, seed=rng.getrandbits(30), tied=False, width=20 if packed else 19)
    odd = [n for n, m in model.layers.named_modules() if isinstance(m, nn.Linear) and m.in_features % 2]
    assert len(odd) == (5 if packed else 10)
    done = quantize_(model.layers, bits, packed=packed, skip=odd)
    done += quantize_(model.layers, bits, packed=False)  # packed integers are trained in pairs
    assert len(done) == 10
    return model


def run(method, model, steps, **options):
    kind, weights, fixed = METHODS[method]
    make = lambda _, **settings: kind(weights(model), **{**settings, **fixed})
    return train(model, steps, make, weight_decay=0.0, **options)


def integers_of(model):
    return [layer.weight for layer in model.modules() if isinstance(layer, QuantizedLinear)]


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_run_in_memory(method, storage, rng, tmp_path):
    bits = rng.choice((4, 8))
    packed = bits == 4
    ours = quantized(rng, rng.choice((torch.float32, torch.bfloat16)), bits, packed)
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    expected, _ = run(method, ours, 6)
    path = tmp_path / "run" if storage == "disk" else None
    options = {"slots": rng.choice((1, 2, 3)), "scratch": rng.choice((1, 2))}
    options["write_every"] = rng.choice((1, 3))
    with offload.stream(theirs, "layers", storage, path=path, **options) as engine:
        # Outside of a forward each is one number, in memory that nothing else of the model has.
        are_away = all(w.untyped_storage().nbytes() == 1 for w in integers_of(theirs))
        assert are_away == (storage != "device")
        losses, _ = run(method, theirs, 6)
        assert same_bits(losses, expected)
        state = theirs.state_dict()
        engine.save(tmp_path / "out.safetensors")
    saved = load_file(tmp_path / "out.safetensors")
    trained = {"QZO": "scale", "QuZO": "weight"}[method]
    for layer in ("up", "down"):
        name = f"layers.0.{layer}.{trained}"
        assert not torch.equal(ours.state_dict()[name], start.state_dict()[name])
    for name, value in ours.state_dict().items():
        assert torch.equal(state[name], value), name
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("method", METHODS)
def test_integers_cross_the_link_as_they_are(method, wire, rng, tmp_path):
    """A lossless wire has the bits of the run in memory; any has the same bits from host memory and disk."""
    ours = quantized(rng)
    runs = []
    for storage, slots in (("host", 1), ("disk", 3)):
        theirs = copy.deepcopy(ours)
        path = tmp_path / "run" if storage == "disk" else None
        with offload.stream(theirs, "layers", storage, path=path, wire=wire, slots=slots):
            losses, _ = run(method, theirs, 5)
            runs.append((losses, theirs.state_dict()))
    if wire == "bf16":
        losses, _ = run(method, ours, 5)
        runs.append((losses, ours.state_dict()))
    for losses, state in runs[1:]:
        assert same_bits(losses, runs[0][0])
        assert all(torch.equal(value, runs[0][1][name]) for name, value in state.items())


@pytest.mark.parametrize("method", METHODS)
def test_from_a_checkpoint_and_resumed(method, rng, tmp_path):
    start = quantized(rng)
    base = tmp_path / "base.safetensors"
    save_file(start.state_dict(), base)
    ours = copy.deepcopy(start)
    expected, _ = run(method, ours, 9)
    at = 0
    for until in (3, 4, 9):
        with offload.empty_weights():
            theirs = Tower(tied=False)
            quantize_(theirs.layers, packed=False)
        assert all(w.is_meta for w in integers_of(theirs))
        theirs = theirs.to(torch.bfloat16)
        options = {"weights": base, "path": tmp_path / "run", "resume": True, "slots": 2}
        engine = offload.stream(theirs, "layers", "disk", **options)
        losses, optimizer = run(method, theirs, until)
        assert same_bits(losses, expected[at:until])
        at = until
        if until == 4:  # as a process that dies: nothing is flushed
            optimizer.trajectory.close()  # which waits for writes that look at the log
        elif until == 9:
            state = theirs.state_dict()
        if until != 4:
            engine.close()
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
    replay_(start, tmp_path / "run" / "run.zk")
    assert all(torch.equal(start.state_dict()[name], v) for name, v in ours.state_dict().items())


def test_the_footprint_counts_them(rng):
    model = quantized(rng)
    integers = sum(w.nbytes for w in integers_of(model.layers[0]))
    expected = offload.footprint(model, "layers", slots=2)
    resident = (model.embed, model.norm, model.head)
    assert expected.resident == sum(p.nbytes for m in resident for p in m.parameters())
    assert expected.scratch >= 2 * integers
    with offload.stream(model, "layers", slots=2) as engine:
        assert expected.slots == sum(slot.data.nbytes for slot in engine.buffers)


def test_other_buffers_stay_on_the_device():
    """Counters, masks, positions, statistics, and what no state_dict has."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6)
            self.register_buffer("positions", torch.arange(6, dtype=torch.int32))
            self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool))
            self.register_buffer("kept", torch.ones(6, 6, dtype=torch.int8), persistent=False)

        def forward(self, x):
            y = self.norm(self.linear(x)) * self.mask[0] * self.kept[1] + self.positions
            self.kept += 1
            return y

    model = torch.nn.Sequential(Layer(), Layer())
    before = {name: b for name, b in model.named_buffers()}
    with offload.stream(model, list(model)):
        model(torch.randn(5, 6))
        assert all(b is before[name] for name, b in model.named_buffers())
        assert (model[0].norm.num_batches_tracked, model[1].kept[0, 0]) == (1, 2)


def test_an_integer_buffer_that_was_replaced_is_noticed(rng):
    model = quantized(rng)
    with offload.stream(model, "layers"):
        model.layers[1].up._buffers["weight"] = torch.ones_like(model.layers[1].up.weight)
        with pytest.raises(RuntimeError, match=r"stream: layers\.1\.up\.weight: expected .* replaced it"):
            model(torch.zeros(1, 2, dtype=torch.int64))


def test_states_of_scales(rng):
    """Adam over the scales of a quantised model: the integers have no states."""
    from zokernels.optim import ZOAdam

    ours = quantized(rng)
    theirs = copy.deepcopy(ours)
    make = lambda m: lambda _, **options: ZOAdam(named_scales(m), **{**options, "lr": 1e-4, "eps": 1e-3})
    expected, _ = train(ours, 4, make(ours), weight_decay=0.0)
    with offload.stream(theirs, "layers", slots=2) as engine:
        losses, _ = train(theirs, 4, make(theirs), weight_decay=0.0)
        assert same_bits(losses, expected)
        assert len(engine.blocks[0].states) == 2 * 2
        state = theirs.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
