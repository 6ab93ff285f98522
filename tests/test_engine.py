"""Noise by the names of a checkpoint inside an engine's joined, sharded and padded tensors."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
import warnings

import pytest
import torch
from engine_layers import Layer, Model, Sizes, checkpoint
from helpers import assert_same_bits, random_values
from torch import nn

import zokernels
from zokernels.files.safetensors import Checkpoint
from zokernels.integrations.engine import (
    Piece,
    Shape,
    Weights,
    create,
    shapes_of,
    trace,
    write_parts,
)

DENSE, EXPERTS, TIED = Sizes(), Sizes(experts=3, layers=2), Sizes(tied=True, heads=3, kv_heads=3, layers=2)
#: Every way to share a model out: (sizes, ranks, stages).
PLANS = [
    pytest.param(DENSE, 1, 1, id="dense"),
    pytest.param(DENSE, 2, 1, id="dense-2-ranks"),
    pytest.param(DENSE, 4, 1, id="dense-4-ranks"),  # more ranks than key heads
    pytest.param(DENSE, 1, 2, id="dense-2-stages"),
    pytest.param(DENSE, 2, 2, id="dense-2-ranks-2-stages"),
    pytest.param(EXPERTS, 1, 1, id="experts"),
    pytest.param(EXPERTS, 2, 1, id="experts-2-ranks"),
    pytest.param(EXPERTS, 4, 1, id="experts-4-ranks"),
    pytest.param(TIED, 1, 1, id="tied"),
    pytest.param(TIED, 1, 2, id="tied-2-stages"),
]


def random_base(sizes, rng):
    return {
        name: random_values(torch.Size(shape).numel(), torch.bfloat16, rng).view(shape)
        for name, shape in checkpoint(sizes).items()
    }


def random_weights(sizes, rng):
    """Weights of a model, whose sums are finite."""
    torch.manual_seed(rng.getrandbits(63))
    return {name: torch.randn(shape).mul(0.05).bfloat16() for name, shape in checkpoint(sizes).items()}


def pieces_of(sizes):
    with torch.device("meta"):
        model = Model(sizes)
    shapes = {name: Shape(shape, torch.bfloat16) for name, shape in checkpoint(sizes).items()}
    return trace(model, shapes, model.load_weights)


def engines(base, sizes, ranks, stages, **options):
    """The weights of each rank of each stage, which has loaded ``base``."""
    found = []
    for rank in range(ranks):
        for stage in range(stages):
            own = dataclasses.replace(sizes, rank=rank, ranks=ranks, stage=stage, stages=stages)
            model = Model(own)
            model.load_weights(base.items())
            weights = Weights(pieces_of(own), dict(model.named_parameters()), base=base, **options)
            weights.check_base()
            found.append(weights)
    return found


def assert_holds(found, expected, which="live"):
    """Every rank has its part of ``expected`` (by name), and together they have all of it."""
    seen = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in expected.items()}
    for weights in found:
        for piece in weights.pieces:
            source = piece.source(expected[piece.name])
            assert_same_bits(piece.of(weights.tensors[piece.parameter].detach()).view(source.shape), source)
            piece.source(seen[piece.name]).fill_(True)
    assert all(mark.all() for mark in seen.values())


def in_memory(base, *steps, dist="normal"):
    """A Hugging Face model in memory after ``steps``: each (seeds, coeffs, options) of combine_."""
    model = {name: t.clone() for name, t in base.items()}
    for seeds, coeffs, options in steps:
        for name, t in model.items():
            zokernels.combine_(t, seeds, coeffs, streams=zokernels.stream_of(name), dist=dist, **options)
    return model


def random_step(rng, count):
    return [rng.getrandbits(64) for _ in range(count)], [rng.gauss(0, 1e-2) for _ in range(count)]


@pytest.mark.parametrize(("sizes", "ranks", "stages"), PLANS)
def test_ranks_and_stages_have_the_bits_of_a_model_in_memory(sizes, ranks, stages, rng):
    base, dist = random_base(sizes, rng), rng.choice(["normal", "rademacher"])
    found = engines(base, sizes, ranks, stages, dist=dist)
    member, update, decay = random_step(rng, 1), random_step(rng, 5), 0.97
    padding = {id(w): w.tensors["lm_head.weight"].clone() for w in found if "lm_head.weight" in w.tensors}

    for weights in found:
        weights.perturb(*member)
    assert_holds(found, in_memory(base, (*member, {}), dist=dist))

    for weights in found:
        weights.update(*update, decay=decay)
    options = {"decay": decay, "rounding": "stochastic", "rounding_seed": update[0][0]}
    trained = in_memory(base, (*update, options), dist=dist)
    assert_holds(found, trained)

    for weights in found:  # the next member starts from the new theta, and restoring is exact
        weights.perturb(*member)
    assert_holds(found, in_memory(trained, (*member, {}), dist=dist))
    for weights in found:
        weights.restore()
    assert_holds(found, trained)
    for weights in found:
        if id(weights) in padding:
            used = sum(p.numel for p in weights.pieces if p.parameter == "lm_head.weight")
            after = weights.tensors["lm_head.weight"].detach().view(-1)[used:]
            assert_same_bits(after, padding[id(weights)].view(-1)[used:])


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_place_returns_exactly(ranks, rng):
    base = random_weights(EXPERTS, rng)
    found = engines(base, EXPERTS, ranks, 1, memory="inplace")
    before = [t.data_ptr() for w in found for t in w.tensors.values()]
    steps = []
    for _ in range(2):
        members, update = [random_step(rng, 1) for _ in range(3)], random_step(rng, 3)
        for weights in found:
            for member in members:
                weights.perturb(*member)
            assert weights.at == tuple(map(tuple, members[-1]))
            weights.update(*update)
        options = {"rounding": "stochastic", "rounding_seed": update[0][0]}
        steps.append((*update, options))
        assert_holds(found, in_memory(base, *steps))
    assert [t.data_ptr() for w in found for t in w.tensors.values()] == before
    for weights in found:  # 3 moves round 3 times, so theta is near, and not the same
        for member in members:
            weights.perturb(*member)
        drift = weights.drift()
        assert 0 < drift["changed"] < 1
        assert 0 < drift["rms"] < 0.1
        assert weights.drift() == {"changed": 0.0, "rms": 0.0}
    assert_holds(found, in_memory(base, *steps))


def test_a_move_in_place_is_one_pass(rng):
    base = random_base(TIED, rng)
    (weights,) = engines(base, TIED, 1, 1, memory="inplace")
    first, second = random_step(rng, 1), random_step(rng, 1)
    weights.perturb(*first)
    weights.perturb(*second)
    move = ([*first[0], *second[0]], [-first[1][0], second[1][0]], {})
    assert_holds([weights], in_memory(base, (*first, {}), move))
    weights.perturb(*second)  # it is there already
    assert_holds([weights], in_memory(base, (*first, {}), move))


@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 2)])
def test_ranks_write_one_checkpoint(ranks, stages, rng, tmp_path):
    from safetensors.torch import load_file, save_file

    base = random_base(DENSE, rng)
    save_file({**base, "rotary.inv_freq": torch.arange(3.0)}, tmp_path / "base.safetensors", {"format": "pt"})
    source, step = Checkpoint(tmp_path / "base.safetensors"), random_step(rng, 2)
    found = engines(base, DENSE, ranks, stages)
    create(tmp_path / "out.safetensors", source)
    for weights in found:
        weights.update(*step, rounding="nearest")
        weights.perturb(*random_step(rng, 1))  # what is written is theta, wherever the engine is
        write_parts(tmp_path / "out.safetensors", source, weights.parts())
    written = load_file(tmp_path / "out.safetensors")
    assert_same_bits(written.pop("rotary.inv_freq"), torch.arange(3.0))
    expected = in_memory(base, (*step, {}))
    assert written.keys() == expected.keys()
    for name, t in expected.items():
        assert_same_bits(written[name], t)
    found[0].load(Checkpoint(tmp_path / "out.safetensors"))
    found[0].check_base()
    assert shapes_of(source)["rotary.inv_freq"] == Shape((3,), torch.float32)
    assert shapes_of(source, torch.float16)["lm_head.weight"].dtype is torch.float16


# What is refused --------------------------------------------------------------------------------------------


class One(nn.Module):
    """A model of one layer whose loading is ``load(weight, loaded)``."""

    def __init__(self, load, *shape):
        super().__init__()
        self.layer, self.how = Layer(*shape), load

    def load_weights(self, weights):
        for _, loaded in weights:
            self.how(self.layer.weight.data, loaded)


def refused(load, shape=(4, 6), checkpoint_shape=(4, 6), names=("w",)):
    with torch.device("meta"):
        model = One(load, *shape)
    return trace(model, {n: Shape(checkpoint_shape, torch.bfloat16) for n in names}, model.load_weights)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda to, w: to.copy_(w.t()), r"layer\.weight: expected rows of w in one piece"),
        (lambda to, w: to.copy_(2 * w), r"layer\.weight: expected weights as they are in the checkpoint"),
        (lambda to, w: to.copy_(w).mul_(2), r"layer\.weight: expected weights as they are.*mul_"),
        (lambda to, w: None, r"layer\.weight: expected a part of the checkpoint, got none"),
        (lambda to, w: torch.empty_like(w).copy_(w), "w: expected a copy into a parameter of the engine"),
    ],
    ids=["transposed", "scaled", "scaled-later", "not-loaded", "elsewhere"],
)
def test_an_unknown_layout_is_refused_by_name(load, message):
    shape = (6, 4) if "rows of w" in message else (4, 6)
    with pytest.raises(ValueError, match=f"trace: {message}"):
        refused(load, shape)


def test_memory_of_two_parameters_is_refused():
    with pytest.raises(
        ValueError, match=r"layer\.weight: expected each element from one parameter, got 'a' and 'b'"
    ):
        refused(lambda to, w: to.copy_(w), names=("a", "b"))


def test_a_padded_row_is_refused():
    with pytest.raises(ValueError, match=r"layer\.weight: expected rows of w in one piece"):
        refused(lambda to, w: to[:, :6].copy_(w), shape=(4, 8))


@pytest.mark.parametrize("memory", ["master", "inplace"])
@pytest.mark.parametrize("call", ["perturb", "update"])
def test_an_exception_between_two_buckets(memory, call, rng, monkeypatch):
    """Tensors of two dtypes, of which one has its pass: theta is found again, or every use is an error."""
    from zokernels.integrations import engine

    tensors = {"a": torch.randn(33), "b": torch.randn(17).bfloat16()}
    base = {name: t.clone() for name, t in tensors.items()}
    weights = Weights(engine.whole(tensors), tensors, memory=memory, base=base)
    updates, member = [random_step(rng, 2) for _ in range(2)], random_step(rng, 1)
    weights.update(*updates[0])
    name = "combine" if (memory, call) == ("master", "perturb") else "combine_"
    kernel, calls = getattr(engine, name), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        kernel(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(weights, call)(*(member if call == "perturb" else updates[1]))
    if (memory, call) == ("master", "update"):
        for use in (weights.restore, weights.parts, lambda: weights.update(*updates[1])):
            with pytest.raises(RuntimeError, match=r"half updated \(load a checkpoint\)"):
                use()
        weights.load(base)
        weights.update(*updates[0])
    weights.perturb(*member)  # wherever the exception has left it
    weights.update(*updates[1])
    other = {name: t.clone() for name, t in base.items()}
    alone = Weights(engine.whole(other), other, base=base)
    for update in updates:
        alone.update(*update)
    for name, t in other.items():
        assert_same_bits(tensors[name], t)


def test_weights_refuse_what_they_cannot_change(rng):
    piece = Piece("w", (4, 6), "layer.weight", 0, 24, 0, None)
    with pytest.raises(
        TypeError, match=r"Weights: layer\.weight: expected weights of fp32, bf16 or fp16.*int8"
    ):
        Weights([piece], {"layer.weight": torch.zeros(4, 6, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"layer\.weight: expected a tensor of the engine, got none"):
        Weights([piece], {})
    with pytest.raises(ValueError, match=r"layer\.weight: expected a contiguous tensor of at least 24"):
        Weights([piece], {"layer.weight": torch.zeros(0)})  # weights that were packed away
    with pytest.raises(ValueError, match="base: expected the checkpoint"):
        Weights([piece], {"layer.weight": torch.zeros(4, 6)}, memory="inplace")
    tensor = random_values(24, torch.float32, rng).view(4, 6)
    weights = Weights([piece], {"layer.weight": tensor}, base={"w": tensor.clone()})
    weights.check_base()
    before = tensor.clone()
    with pytest.raises(ValueError, match="coeffs: expected 2 numbers"):
        weights.perturb([1, 2], [1.0])
    with pytest.raises(ValueError, match="coeffs: expected 1 numbers"):
        weights.update([1], [1.0, 2.0])
    assert_same_bits(tensor, before)
    weights.base = {"w": tensor + 1}
    with pytest.raises(
        ValueError, match=r"layer\.weight: expected the weights of w in the checkpoint, got others"
    ):
        weights.check_base()
    weights.base = {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"base: w: expected a tensor of shape \(4, 6\)"):
        weights.check_base()


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.32.0", False), ("0.32.7+cpu.x", False), ("0.33.0", True), ("0.31.2", True), ("1.32.0", True)],
)
def test_untested_versions_of_vllm_are_tried_with_a_warning(version, warned, monkeypatch):
    """With modules in vLLM's place that have as much of it as an import of ours takes."""
    platform = types.SimpleNamespace(is_cpu=lambda: False)
    for name, found in {
        "vllm": types.SimpleNamespace(__version__=version),
        "vllm.platforms": types.SimpleNamespace(current_platform=platform),
    }.items():
        monkeypatch.setitem(sys.modules, name, found)
    monkeypatch.delitem(sys.modules, "zokernels.integrations.vllm", raising=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        importlib.import_module("zokernels.integrations.vllm")
    sys.modules.pop("zokernels.integrations.vllm")  # which no other test is to find
    del zokernels.integrations.vllm
    expected = f"zokernels: vllm: version: expected 0.32, with which it is tested, got {version}; trying it"
    assert [str(w.message) for w in said] == [expected] * warned
