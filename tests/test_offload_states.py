"""What optimizers keep of streamed weights (momenta, moments, curvature, masks) travels with their block, and
every method that may be streamed has the bits of the run in memory.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import shutil
import types
import warnings

import pytest
import torch
from offload_cases import batch_of, loss_of, same_bits, same_state, tower, train
from torch import nn

from zokernels import offload, optim
from zokernels.offload.disk import Reader
from zokernels.optim import (
    ZOSGD,
    ForwardGradient,
    FreshFactors,
    GivenMask,
    HiZOO,
    KeptLeft,
    KeptRight,
    MagnitudeMask,
    RandomMask,
    SparseMeZO,
    Sphere,
    Subspace,
    TemporalFactor,
    ZOAdam,
    ZOAdamW,
    ZOSignSGD,
)

LR = {"lr": 1e-3}
ADAM = {**LR, "weight_decay": 0.0}
HALF = {"state_dtype": torch.bfloat16}
#: Of each method: the class, and its arguments; a mask of one's own is made of the model.
METHODS = {
    "momentum": (ZOSGD, {"momentum": 0.9, "dampening": 0.2}),
    "Adam": (ZOAdam, ADAM),
    "AdamW in bf16": (ZOAdamW, {**LR, **HALF, "directions": 2}),
    "sign": (ZOSignSGD, {**LR, "l2": 0.1}),
    "HiZOO": (HiZOO, {"alpha": 0.1}),
    "Sparse-MeZO": (SparseMeZO, {"density": 0.5, "refresh": 4}),
    "mask, refreshed": (ZOSGD, {"direction": MagnitudeMask(0.5, refresh=2)}),
    "mask, Adam": (ZOAdam, {**ADAM, "direction": MagnitudeMask(0.5)}),
    "mask, random": (ZOSGD, {"direction": RandomMask(0.5, refresh=2)}),
    "mask, given": (ZOSGD, {}),
    "LOZO": (ZOSGD, {"direction": KeptRight(2, refresh=2)}),
    "LOZO, Adam": (ZOAdam, {**ADAM, "direction": KeptRight(2, refresh=2)}),
    "kept left": (ZOSGD, {"direction": KeptLeft(2, refresh=2)}),
    "SubZero": (ZOSGD, {"direction": Subspace(1, refresh=2)}),
    "TeZO": (ZOSGD, {"direction": TemporalFactor(2)}),
    "EGGROLL": (ZOSGD, {"direction": FreshFactors(2), "directions": 2}),
    "window": (ZOSGD, {"momentum": 0.9, "window": 3}),
    "Adam's window": (ZOAdamW, {**LR, "window": 3}),
    "forward gradient": (ForwardGradient, {"directions": 2}),
    "sphere": (ZOSGD, {"direction": Sphere()}),
}


def given_masks(model):
    """A third of the weights of matrices, as bool or as indices; vectors move as a whole."""
    masks = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        if p.dim() == 2:
            keep = torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) < 1 / 3
            masks[name] = keep if i % 2 else keep.flatten().nonzero().flatten()
    return GivenMask(masks)


def run(method, model, steps, **options):
    kind, own = METHODS[method]
    if method == "mask, given":
        own = {"direction": given_masks(model)}

    def make(params, **settings):
        if kind is ForwardGradient:
            del settings["eps"]
        return kind(params, **{**settings, **own})

    return train(model, steps, make, **options)


def small(rng, dtype=None):
    return tower(dtype or rng.choice((torch.float32, torch.bfloat16)), seed=rng.getrandbits(30), layers=3)


def differing(ours, theirs):
    """Of two optimizers, the (parameter, name) of what they keep that differs."""
    ours, theirs = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(ours[i].keys() == theirs[i].keys() for i in ours)
    return [(i, key) for i in ours for key in ours[i] if not torch.equal(ours[i][key], theirs[i][key])]


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_run_in_memory(method, rng):
    model = small(rng)
    ours, start = copy.deepcopy(model), copy.deepcopy(model)
    expected, optimizer = run(method, model, 5)
    options = {"slots": rng.choice((1, 2)), "scratch": rng.choice((1, 2)), "write_every": rng.choice((1, 3))}
    with offload.stream(ours, "layers", **options):
        losses, streamed = run(method, ours, 5)
        assert same_bits(losses, expected)
        assert not same_state(ours.state_dict(), model.state_dict())
        assert not differing(optimizer, streamed)
        assert all(torch.isfinite(t.float()).all() for t in ours.state_dict().values())
    assert len(same_state(model.state_dict(), start.state_dict())) > 12  # of 19


@pytest.mark.parametrize("method", METHODS)
def test_resumed_from_disk(method, rng, tmp_path):
    """The second run ends without a flush, so its blocks have different numbers of updates."""
    model = small(rng)
    start = copy.deepcopy(model)
    expected, whole = run(method, model, 6)
    at, write_every = 0, rng.choice((1, 2))
    for until in (2, 4, 6):
        ours = copy.deepcopy(start)
        options = {"path": tmp_path / "run", "resume": True, "slots": 2, "write_every": write_every}
        engine = offload.stream(ours, "layers", "disk", **options)
        losses, optimizer = run(method, ours, until)
        assert same_bits(losses, expected[at:until])
        at = until
        if until == 4:  # as a process that dies
            optimizer.trajectory.close()  # which waits for writes that look at the log
            continue
        if until == 6:
            assert not same_state(ours.state_dict(), model.state_dict())
            assert not differing(whole, optimizer)
        engine.close()


def test_storage_that_is_only_read(rng, tmp_path):
    """Every visit begins with the checkpoint's weights and the states' first values."""
    from safetensors.torch import save_model

    model = small(rng)
    save_model(model, tmp_path / "base.safetensors")
    ours = copy.deepcopy(model)
    expected, optimizer = run("Adam", model, 4)
    with offload.stream(ours, "layers", "disk", weights=tmp_path / "base.safetensors", slots=2):
        losses, streamed = run("Adam", ours, 4)
        assert same_bits(losses, expected)
        assert not same_state(ours.state_dict(), model.state_dict())
        assert not differing(optimizer, streamed)


@pytest.mark.parametrize("wire", ["bf16", "int8"])
@pytest.mark.parametrize("method", ["momentum", "Adam", "Adam's window"])
def test_states_stay_on_the_host_behind_a_wire(method, wire, rng, tmp_path):
    """A lossless wire has the bits of the run in memory; any has the same bits from host memory and disk."""
    model = small(rng, torch.bfloat16)
    runs = []
    for storage, slots in (("host", 1), ("disk", 2)):
        ours = copy.deepcopy(model)
        path = tmp_path / "run" if storage == "disk" else None
        with offload.stream(ours, "layers", storage, path=path, wire=wire, slots=slots) as engine:
            losses, optimizer = run(method, ours, 4)
            states = torch.cat([t.flatten().float() for kept in optimizer.state_dict()["state"].values()
                                for t in kept.values()] or [torch.zeros(1)])  # fmt: skip
            runs.append((losses, ours.state_dict(), states))
            assert (
                all(slot.data.nbytes < engine.blocks[0].nbytes for slot in engine.buffers) or not states.any()
            )
    assert torch.equal(runs[0][2], runs[1][2])
    if wire == "bf16":
        losses, _ = run(method, model, 4)
        runs.append((losses, model.state_dict(), None))
    for losses, state, _ in runs[1:]:
        assert same_bits(losses, runs[0][0])
        assert not same_state(state, runs[0][1])


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_two_groups_and_frozen_parameters(storage, rng, tmp_path):
    model = small(rng)
    model.layers[1].up.weight.requires_grad_(False)
    ours = copy.deepcopy(model)

    def make(params, **options):
        params = list(params)
        groups = [{"params": params[::2], "lr": 3e-3}, {"params": params[1::2], "betas": (0.5, 0.9)}]
        return ZOAdam(groups, **{**options, **ADAM})

    expected, optimizer = train(model, 4, make)
    path = tmp_path / "run" if storage == "disk" else None
    with offload.stream(ours, "layers", storage, path=path, slots=2):
        losses, streamed = train(ours, 4, make)
        assert same_bits(losses, expected)
        assert not differing(optimizer, streamed)
        assert not same_state(ours.state_dict(), model.state_dict())
        ours.layers[1].up.weight.requires_grad_(True)
        match = "ZOAdam: params: .* that lacks 'exp_avg'|trajectory: param_groups: .* frozen parameters"
        with pytest.raises((RuntimeError, ValueError), match=match):
            streamed.step(lambda: loss_of(ours, batch_of(0)))


@pytest.mark.parametrize("method", ["Adam", "Sparse-MeZO"])
def test_steps_that_fail_or_are_skipped(method, rng):
    model = small(rng)
    ours = copy.deepcopy(model)
    kind, own = METHODS[method]
    make = functools.partial(kind, **{"lr": 1e-2, "eps": 1e-2, "seed": 5, **own})
    with offload.stream(ours, "layers", slots=2), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped")
        a, b = (make(m.named_parameters()) for m in (model, ours))
        for step in range(4):
            calls = []

            def closure(m, step=step, calls=calls):
                loss = loss_of(m, batch_of(step))
                calls.append(1)
                if step in (0, 2) and len(calls) == 2:
                    raise KeyError("mine")
                return loss * (math.inf if step == 1 else 1.0)

            for optimizer, m in ((a, model), (b, ours)):
                torch.manual_seed(step)
                calls.clear()
                if step in (0, 2):
                    with pytest.raises(KeyError, match="mine"):
                        optimizer.step(lambda: closure(m))  # noqa: B023
                torch.manual_seed(step)
                calls += [1, 1]
                optimizer.step(lambda: closure(m))  # noqa: B023
        assert int(b.skipped_steps) == 1
        assert not same_state(ours.state_dict(), model.state_dict())
        assert not differing(a, b)


def test_the_footprint_counts_them(rng):
    model = small(rng, torch.bfloat16)
    without = offload.footprint(model, "layers", slots=2)
    expected = offload.footprint(model, "layers", slots=2, states=(torch.float32, torch.bfloat16))
    weights = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
    assert expected.slots - without.slots >= 2 * 6 * weights
    assert expected._replace(slots=0) == without._replace(slots=0)
    expected = offload.footprint(model, "layers", slots=2, states=(torch.float32,) * 2)
    with offload.stream(model, "layers", slots=2) as engine:
        run("Adam", model, 0)
        assert expected.slots == sum(slot.data.nbytes for slot in engine.buffers)


def test_fewer_slots_where_states_need_the_room(rng):
    model = small(rng, torch.bfloat16)
    room = offload.footprint(model, "layers", slots=2, scratch=2, states=(torch.float32,) * 2).total
    with offload.stream(model, "layers", memory=room) as engine:
        assert len(engine.buffers) == 3
        with pytest.warns(UserWarning, match="stream: slots=2 and scratch=2, which take"):
            run("Adam", model, 2)
        assert len(engine.buffers) == 2
    model = small(rng, torch.bfloat16)
    with (
        offload.stream(model, "layers", memory=room, slots=3),
        pytest.raises(ValueError, match=r"stream: memory: .* where slots=3 and scratch=2 take"),
    ):
        run("Adam", model, 2)


def test_what_cannot_be_streamed_is_refused(rng):
    refused = [
        (optim.ZOAdam, {"amsgrad": True}, "a rule and a direction that can be streamed, got AMSGrad"),
        (optim.ZOSGD, {"direction": optim.TensorScale()}, "can be streamed, got SGD on TensorScale"),
        (optim.LOZO, {"momentum": 0.9}, "can be streamed, got FactorMomentum on KeptRight"),
    ]
    for kind, options, match in refused:
        model = small(rng)
        with offload.stream(model, "layers"), pytest.raises(ValueError, match=match):
            kind(model.named_parameters(), lr=1e-3, **options)
    model = small(rng)
    with (
        offload.stream(model, "layers", wire="bf16"),
        pytest.raises(ValueError, match="streamed with wire=, got SGD on MagnitudeMask"),
    ):
        SparseMeZO(model.named_parameters(), lr=1e-3)
    model = small(rng)
    with offload.stream(model, "layers"):
        ZOAdam(model.named_parameters(), lr=1e-3)
        with pytest.raises(ValueError, match="a stream that no other optimizer's states travel with"):
            ZOAdam(model.named_parameters(), lr=1e-3)


def restored(state_dict):
    """A state_dict in the place of an optimizer, for :func:`differing`."""
    return types.SimpleNamespace(state_dict=lambda: state_dict)


@pytest.mark.parametrize(("method", "wire"), [("Adam", None), ("momentum", "fp16"), ("Sparse-MeZO", None)])
def test_a_state_dict_is_loaded(method, wire, rng, tmp_path):
    """Into fresh streams, from runs in memory and in streams, and into one whose states have moved."""
    model = small(rng, torch.float16 if wire else None)
    middle = copy.deepcopy(model)
    _, optimizer = run(method, middle, 3)
    saved, ours = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(middle)
    expected, whole = run(method, model, 6)
    kind, own = METHODS[method]
    options = {"slots": rng.choice((1, 2)), "write_every": rng.choice((1, 3)), "wire": wire}
    with offload.stream(ours, "layers", **options):
        optimizer = kind(ours.named_parameters(), **{"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, **own})
        for _ in range(2):  # what is loaded has the states as they were, and nothing of this one's
            optimizer.load_state_dict(copy.deepcopy(saved))
            assert not differing(restored(saved), optimizer)
        values = []
        while (step := optimizer.step_count) < 6:
            torch.manual_seed(step)
            values.append(optimizer.step(lambda: loss_of(ours, batch_of(step))).double())
        assert same_bits(torch.stack(values), expected[3:])
        assert not same_state(ours.state_dict(), model.state_dict())
        assert not differing(whole, optimizer)
        bad = copy.deepcopy(saved)
        index, key = next((i, k) for i, of in bad["state"].items() for k, v in of.items() if v.numel() > 1)
        bad["state"][index][key] = bad["state"][index][key].flatten()[1:]
        before = optimizer.state_dict()
        with pytest.raises(ValueError, match="state_dict: state"):
            optimizer.load_state_dict(bad)
        assert not differing(restored(before), optimizer)
        optimizer.load_state_dict({**copy.deepcopy(saved), "state": {}})  # all begin anew
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert not differing(restored(saved), optimizer)
    ours = copy.deepcopy(middle)
    with offload.stream(ours, "layers", "disk", path=tmp_path / "run"):
        optimizer = kind(ours.named_parameters(), lr=1e-2, **{k: v for k, v in own.items() if k != "lr"})
        with pytest.raises(RuntimeError, match="state_dict: expected that of step 0 of the run"):
            optimizer.load_state_dict(saved)


def test_a_run_that_goes_on_with_other_states_is_refused(rng, tmp_path):
    model = small(rng)
    with offload.stream(copy.deepcopy(model), "layers", "disk", path=tmp_path / "run") as engine:
        run("momentum", engine.model, 2)
    ours = copy.deepcopy(model)
    options = {"path": tmp_path / "run", "resume": True}
    with (
        offload.stream(ours, "layers", "disk", **options),
        pytest.raises(ValueError, match=r"ZOAdam: layers\.0: expected a file with the states"),
    ):
        run("Adam", ours, 3)
    ours = copy.deepcopy(model)
    with offload.stream(ours, "layers", "disk", **options):
        before = ours(batch_of(0))  # evaluation needs no optimizer, and reads files that have states
        assert torch.isfinite(before).all()


def test_adam_learns():
    """A linear map is learnt."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    x = torch.randn(32, 6)
    loss = lambda: (model(x) - x).square().mean()
    with offload.stream(model, list(model), slots=2, write_every=8):
        optimizer = ZOAdam(model.named_parameters(), lr=3e-2, directions=8)
        losses = [float(optimizer.step(loss)) for _ in range(24)]
    print(losses)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("method", "wire", "states"), [("Adam", None, 2), ("momentum", "bf16", 1)])
def test_a_cache_in_front_of_the_disk(method, wire, states, rng, tmp_path, monkeypatch):
    """The blocks that fit are read from files once; a run goes on from its files, and not from the cache."""
    model = small(rng, torch.bfloat16)
    start = copy.deepcopy(model)
    expected, _ = run(method, model, 6)
    size = offload.footprint(model, "layers", slots=1, states=(torch.float32,) * states).slots
    reads, own = [], Reader.read
    patched = lambda self, block, *rest: reads.append(block.index) or own(self, block, *rest)
    monkeypatch.setattr(Reader, "read", patched)
    at = 0
    for until in (3, 6):
        ours = copy.deepcopy(start)
        options = {"path": tmp_path / "run", "resume": True, "slots": 1, "wire": wire, "cache": 2 * size}
        with offload.stream(ours, "layers", "disk", **options):
            reads.clear()
            losses, _ = run(method, ours, until)
            assert same_bits(losses, expected[at:until])
            assert reads.count(0) <= 2  # before the optimizer, and once with it
            assert reads.count(2) >= 3
        at = until
    ours = copy.deepcopy(start)
    with offload.stream(ours, "layers", "disk", path=tmp_path / "run", resume=True):
        run(method, ours, 6)
        assert not same_state(ours.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="stream: cache: expected 0 unless storage is 'disk', got 5"):
        offload.stream(start, "layers", cache=5)


@pytest.mark.parametrize("method", ["Adam", "HiZOO", "Sparse-MeZO", "sphere"])
def test_a_folder_goes_back_to_a_checkpoint(method, rng, tmp_path, monkeypatch):
    """Wherever that is cut off, the folder is one of its last step; afterwards of the checkpoint."""
    model = small(rng)
    start, path, options = copy.deepcopy(model), tmp_path / "run", {"slots": 2, "write_every": 2}
    expected, whole = run(method, model, 8)
    ours = copy.deepcopy(start)
    with offload.stream(ours, "layers", "disk", path=path, **options) as engine:
        _, optimizer = run(method, ours, 3)
        engine.save(tmp_path / "at 3.safetensors")
        saved = copy.deepcopy(optimizer.state_dict())
        while optimizer.step_count < 6:
            torch.manual_seed(optimizer.step_count)
            optimizer.step(lambda: loss_of(ours, batch_of(optimizer.step_count)))
        if optimizer.rule.states:
            with pytest.raises(RuntimeError, match="state_dict: expected that of step 6"):
                optimizer.load_state_dict(saved)

    places, real = 0, os.replace
    while True:
        left = [places]

        def replace(*args):
            left[0] -= 1  # noqa: B023
            if left[0] < 0:  # noqa: B023
                raise OSError("cut off")
            real(*args)

        shutil.copytree(path, folder := tmp_path / str(places))
        monkeypatch.setattr(os, "replace", replace)
        try:
            offload.rewind(folder, tmp_path / "at 3.safetensors", saved)
            done = True
        except OSError:
            done = False
        monkeypatch.undo()
        again = copy.deepcopy(start)
        with offload.stream(again, "layers", "disk", path=folder, resume=True, **options):
            losses, optimizer = run(method, again, 8)
            assert same_bits(losses, expected[3 if done else 6 :])
            assert not same_state(again.state_dict(), model.state_dict())
            assert not differing(whole, optimizer)
        if done:
            break
        places += 1
    assert places == 3  # blocks
    with pytest.raises(ValueError, match=r"expected the log with which the checkpoint was written"):
        offload.rewind(folder, tmp_path / "at 3.safetensors", {**saved, "zo": {**saved["zo"],
            "log": {"step": 3, "sha256": "0" * 64}}})  # fmt: skip


@pytest.mark.parametrize("wire", [None, "int8"])
def test_storage_that_is_only_read_begins_with_loaded_states(wire, rng, tmp_path):
    from safetensors.torch import save_model

    model = small(rng)
    save_model(model, tmp_path / "base.safetensors")
    options = {"slots": 2, "wire": wire}
    first = copy.deepcopy(model)
    with offload.stream(first, "layers", "disk", weights=tmp_path / "base.safetensors", **options) as engine:
        _, optimizer = run("Adam", first, 3)
        engine.save(tmp_path / "at 3.safetensors")
        saved = copy.deepcopy(optimizer.state_dict())
        torch.manual_seed(3)
        expected = optimizer.step(lambda: loss_of(first, batch_of(3)))
        with pytest.raises(RuntimeError, match="expected a stream without updates"):
            optimizer.load_state_dict(saved)
        weights, states = first.state_dict(), optimizer.state_dict()["state"]
    again = copy.deepcopy(model)
    with offload.stream(again, "layers", "disk", weights=tmp_path / "at 3.safetensors", **options):
        loss_of(again, batch_of(0))  # slots have blocks by then
        made = ZOAdam(again.named_parameters(), lr=1e-3, eps=1e-2, weight_decay=0.0, seed=5)
        made.load_state_dict(saved)
        torch.manual_seed(3)
        assert torch.equal(made.step(lambda: loss_of(again, batch_of(3))), expected)
        assert not same_state(again.state_dict(), weights)
        found = made.state_dict()["state"]
        assert all(torch.equal(found[i][key], t) for i, kept in states.items() for key, t in kept.items())


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_a_mask_is_measured_once_a_step(slots, rng, monkeypatch):
    """It comes back with its block, so the update does not measure it again."""
    from zokernels.step.directions.masks import MagnitudeMask

    model, real, counted = small(rng), MagnitudeMask.keep, []
    monkeypatch.setattr(MagnitudeMask, "keep", lambda *args: (counted.append(1), real(*args))[1])
    run("Sparse-MeZO", copy.deepcopy(model), 5)
    whole = len(counted)
    with offload.stream(model, "layers", slots=slots):
        run("Sparse-MeZO", model, 5)
        inside = len(counted) - whole
    # The first step's measurements are not stored, because no update comes with them.
    assert inside <= whole + (len(list(model.layers.parameters())) if slots < 3 else 0)
