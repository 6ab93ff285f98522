"""Streamed runs against the same runs in memory, bit for bit, losses and weights."""

from __future__ import annotations

import copy
import functools
import re
import threading
import warnings

import pytest
import torch
from offload_cases import VOCAB, Layer, batch_of, loss_of, same_bits, same_state, tower, train
from torch import nn

import zokernels.optim as optim
from zokernels import offload
from zokernels.quantize import named_integers, quantize_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def streamed_like(model, tmp_path, storage, **options):
    """A copy of ``model``, streamed."""
    copied = copy.deepcopy(model)
    path = tmp_path / "run" if storage == "disk" else None
    return copied, offload.stream(copied, storage=storage, path=path, **options)


def check(model, tmp_path, storage="host", steps=5, stream=None, **options):
    """Compares a run in memory with a streamed one: losses, weights and the state of the generator."""
    theirs, engine = streamed_like(model, tmp_path, storage, **(stream or {}))
    with engine:
        ours = copy.deepcopy(model)
        expected, _ = train(ours, steps, **options)
        drawn = torch.rand(3)
        losses, optimizer = train(theirs, steps, **options)
        assert same_bits(losses, expected)
        assert same_bits(torch.rand(3), drawn)  # the generator is left as after forwards one by one
        assert not same_state(theirs.state_dict(), ours.state_dict())
        assert any(not same_bits(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))
    return optimizer


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_equals_the_run_in_memory(storage, slots, rng, tmp_path):
    dtype, tied = rng.choice(DTYPES), rng.random() < 0.5
    model = tower(dtype, seed=rng.getrandbits(30), tied=tied)
    check(model, tmp_path, storage, steps=20, stream={"slots": slots, "scratch": rng.choice((1, 2))})


@pytest.mark.parametrize("source", ["model", "file", "function"])
@pytest.mark.parametrize("make", [optim.ZOAdamW, functools.partial(optim.ZOSGD, restore="inplace")])
def test_on_the_device_a_step_is_that_of_a_model_in_memory(source, make, rng, tmp_path):
    """One forward after the other in this thread, with any optimizer; the parameters are ordinary ones."""
    model = tower(seed=rng.getrandbits(30), layers=2)
    values = copy.deepcopy(model.state_dict())
    ours, weights = copy.deepcopy(model), None
    if source == "file":
        from safetensors.torch import save_file

        weights = tmp_path / "weights.safetensors"
        save_file({k: v for k, v in values.items() if k != "head.weight"}, weights)
    elif source == "function":
        weights = lambda name, tensor: tensor.copy_(values[name])
    if weights is not None:
        with offload.empty_weights():
            ours = type(model)(layers=2)
    threads, inside = set(), []

    def losses(m, ids):
        threads.add(threading.get_ident())
        inside.append("in")
        loss = loss_of(m, ids)
        inside.append("out")
        return loss

    expected, _ = train(model, 3, make)
    with offload.stream(ours, "layers", "device", weights=weights) as engine:
        assert [b.name for b in engine.blocks] == ["layers.0", "layers.1"]
        assert not same_state(ours.state_dict(), values)
        got, _ = train(ours, 3, make, losses=losses)
        assert same_bits(got, expected)
        assert threads == {threading.get_ident()}
        assert inside == ["in", "out"] * 6
        engine.save(tmp_path / "saved.safetensors")
        assert all(map(torch.equal, engine.values(engine.blocks[1]), model.layers[1].parameters()))
    loss_of(ours, batch_of(0)).backward()  # after the end, too
    assert all(p.grad is not None for p in ours.parameters())
    again = tower(seed=1, layers=2)
    with offload.stream(again, "layers", "device", weights=tmp_path / "saved.safetensors"):
        assert not same_state(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scratch", [1, 2])
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_every_dtype(dtype, scratch, dist, rng, tmp_path):
    model = tower(dtype, seed=rng.getrandbits(30))
    check(model, tmp_path, stream={"slots": 2, "scratch": scratch}, dist=dist)


METHODS = {
    "three directions": functools.partial(optim.ZOSGD, directions=3),
    "one-sided": functools.partial(optim.ZOSGD, estimator="one-sided"),
    "FZOO": functools.partial(optim.FZOO, directions=4),
    "ranking": functools.partial(optim.ZORankSGD, candidates=3),
    "conservative": optim.ZOConservative,
    "ES": functools.partial(optim.ES, population=4, maximize=False),
    "MeZO-GV": functools.partial(optim.MeZOGV, candidates=3, top=1),
    "BSZO": functools.partial(
        optim.ZerothOrder, estimator=optim.Bayesian(2, prior=40.0, noise=30.0), rule=optim.SGD()
    ),
    "consensus": functools.partial(optim.ConsensusHopping, candidates=3),
    "line search": functools.partial(optim.ZORankSearch, candidates=3, trials=2, rounds=2),
    "layers at random": functools.partial(optim.LeZO, skipped=0.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("write_every", [1, 3])
def test_methods(method, write_every, rng, tmp_path):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    check(model, tmp_path, stream={"slots": 2, "write_every": write_every}, make=METHODS[method])


#: What has a state, factors or a direction that follows the run: it streams with the bits of the model in
#: memory, or it is refused.
NEWER = {
    "ConMeZO": lambda model: optim.ConMeZO,
    "P-GAP": lambda model: functools.partial(optim.PGAP, rank=2, probes=2, interval=2),
    "LOREN": lambda model: functools.partial(optim.LOREN, directions=3),
    "CurvZO": lambda model: functools.partial(optim.CurvZO, interval=2),
    "AGZO": lambda model: functools.partial(optim.AGZO, model=model, rank=2),
    "EGGROLL": lambda model: functools.partial(optim.EGGROLL, directions=2),
    "EGGROLL's signs": lambda model: functools.partial(optim.EGGROLL, directions=2, signs=True, refresh=2),
    "ZO-Muon": lambda model: functools.partial(
        optim.ZerothOrder, estimator=optim.OneSided(2), rule=optim.Orthogonal(),
        direction=optim.KeptLeft(2, 2),
    ),
    "FZOO-R": lambda model: functools.partial(optim.FZOO, directions=3, reuse=True),
    "TeZO-Adam": lambda model: functools.partial(
        optim.ZerothOrder, estimator=optim.TwoSided(1), rule=optim.FactorAdam(),
        direction=optim.TemporalFactor(2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", NEWER)
def test_newer_methods_stream_or_are_refused_in_one_sentence(method, rng, tmp_path):
    model = tower(torch.float32, seed=rng.getrandbits(30), layers=2, dropout=0.0)
    ours, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    with offload.stream(model, "layers", "host", slots=2):
        options = {"lr": 1e-4, "weight_decay": 0.0}
        try:
            losses, _ = train(model, 3, NEWER[method](model), **options)
        except ValueError as error:
            message = str(error)
            assert re.fullmatch(r"\w+: [^\n]+: expected [^\n]+, got [^\n]+", message)
            assert "streamed" in message
            assert not same_state(model.state_dict(), before)
            return
        expected, _ = train(ours, 3, NEWER[method](ours), **options)
        assert same_bits(losses, expected)
        assert not same_state(model.state_dict(), ours.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(optim.QES, population=2),
        functools.partial(optim.QES, population=2, window=2),
        functools.partial(optim.QuZO, quantized_noise=True),
    ],
)
def test_rounded_noise_of_integers_is_refused_in_a_stream(make, rng):
    model = tower(torch.float32, seed=rng.getrandbits(30), layers=2)
    quantize_(model.layers)
    message = r"params: expected .*stream.*, got \w+ on RoundedSteps"
    with offload.stream(model, "layers", "host"), pytest.raises(ValueError, match=message):
        make(named_integers(model), lr=1.0)


def test_groups_with_settings_of_their_own_and_frozen_parameters(rng, tmp_path):
    def make(named, **options):
        named = list(named)
        for name, p in named:
            p.requires_grad_("up.bias" not in name)
        plain = [(n, p) for n, p in named if "norm" in n]
        rest = [(n, p) for n, p in named if "norm" not in n]
        groups = [
            {"params": rest},
            {"params": plain, "weight_decay": 0.0, "lr": 3e-3, "eps": 3e-2, "dist": "rademacher"},
        ]
        return optim.ZOSGD(groups, **options)

    check(tower(torch.bfloat16, seed=rng.getrandbits(30)), tmp_path, make=make, clip=2.0)


def test_mixed_dtypes_in_a_block(rng, tmp_path):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    for layer in model.layers:
        layer.norm.float()
        layer.norm.forward = functools.partial(_in_float, layer.norm)
    loss = lambda m, ids: loss_of(m, ids)
    theirs = tower(torch.bfloat16, seed=0)
    theirs.load_state_dict(model.state_dict(), assign=False)
    for ours, layer in zip(theirs.layers, model.layers, strict=True):
        ours.norm.float().load_state_dict(layer.norm.state_dict())
        ours.norm.forward = functools.partial(_in_float, ours.norm)
    expected, _ = train(model, 5, losses=loss)
    with offload.stream(theirs, "layers", slots=2):
        losses, _ = train(theirs, 5, losses=loss)
        assert same_bits(losses, expected)
        assert not same_state(theirs.state_dict(), model.state_dict())


def _in_float(norm, x):
    return nn.functional.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias).to(x.dtype)


def test_gradient_accumulation_and_blocks_that_are_called_twice(rng, tmp_path):
    def losses(model, ids):
        return loss_of(model, ids) + loss_of(model, ids.flip(1))

    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    order = [0, 1, 1, 3, 2, 4, 0]
    forward = lambda self, ids: self.head(
        self.norm(functools.reduce(lambda x, i: self.layers[i](x), order, self.embed(ids)))
    )
    model.forward = forward.__get__(model)
    other = copy.deepcopy(model)
    other.forward = forward.__get__(other)
    expected, _ = train(model, 5, losses=losses)
    with offload.stream(other, "layers", slots=2):
        got, _ = train(other, 5, losses=losses)
        assert same_bits(got, expected)
        assert not same_state(other.state_dict(), model.state_dict())


class Skipping(nn.Module):
    """Takes other blocks at perturbed weights than at others: sides that do not meet.

    The hyperbolic tangents keep the loss in [0, 1].  A loss that jumps between the sides has a large
    projected gradient: unbounded, it made some of the models diverge."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.taken = []  # the blocks of each forward

    def forward(self, x):
        x, taken = torch.tanh(self.first(x)), []
        for i, layer in enumerate(self.layers):
            if int(x.sum().item() * 1e4) % 3 != i % 3:
                x = torch.tanh(layer(x))
                taken.append(i)
        self.taken.append(taken)
        return x


def test_sides_that_take_different_blocks(rng, tmp_path):
    torch.manual_seed(rng.getrandbits(30))
    model = Skipping()
    other = copy.deepcopy(model)
    options = {
        "batch": lambda step: torch.randn(3, 4, generator=torch.Generator().manual_seed(step)),
        "losses": lambda m, x: m(x).square().mean(),
        "make": functools.partial(optim.ZOSGD, directions=3),
        "lr": 1e-3,  # at most 17 z a direction: weights stay where the tangents are steep
    }
    expected, _ = train(model, 20, **options)
    assert any(plus != minus for plus, minus in zip(model.taken[::2], model.taken[1::2], strict=True))
    with offload.stream(other, "layers", slots=1):
        got, _ = train(other, 20, **options)
        assert same_bits(got, expected)
        assert not same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("outside", [True, False])
def test_under_autocast(outside, rng, tmp_path):
    def losses(model, ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
            return loss_of(model, ids)

    model = tower(seed=rng.getrandbits(30))
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        check(model, tmp_path, losses=losses, stream={"slots": 2})


def test_a_loss_that_is_not_finite_skips_the_step(rng, tmp_path):
    bad = {1, 3}

    def losses(model, ids):
        return loss_of(model, ids) * (float("inf") if int(ids.sum()) in sums else 1.0)

    sums = {int(batch_of(step).sum()) for step in bad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped")
        optimizer = check(tower(torch.bfloat16, seed=rng.getrandbits(30)), tmp_path, losses=losses, steps=6)
        assert int(optimizer.skipped_steps) == 2


@pytest.mark.parametrize("where", ["between", "inside"])
def test_an_exception_leaves_everything_as_it_was(where, rng, tmp_path):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    ours, engine = streamed_like(model, tmp_path, "disk", slots=2)
    calls, last = [], rng.choice((1, 2))  # which side meets it

    def broken(*_):
        calls.append(1)
        if len(calls) == last:
            raise KeyError("mine")

    def failing(ids):
        loss = loss_of(ours, ids)
        if where == "between":
            broken()
        return loss

    with engine:
        expected, _ = train(model, 4)
        optimizer = optim.ZOSGD(ours.named_parameters(), lr=1e-2, eps=1e-2, weight_decay=0.1, seed=5)
        before = threading.active_count()
        for step in range(4):
            if step in (0, 2):
                calls.clear()
                hook = ours.layers[2].up.register_forward_pre_hook(broken) if where == "inside" else None
                with pytest.raises(KeyError, match="mine"):
                    optimizer.step(lambda: failing(batch_of(step)))  # noqa: B023
                assert len(calls) == last
                if hook:
                    hook.remove()
            torch.manual_seed(step)
            loss = optimizer.step(lambda: loss_of(ours, batch_of(step)))  # noqa: B023
            assert same_bits(loss.double(), expected[step])
        assert threading.active_count() <= before + 4
        assert not same_state(ours.state_dict(), model.state_dict())


def test_evaluation_and_saving_between_steps(rng, tmp_path):
    from safetensors.torch import load_file

    model = tower(torch.bfloat16, seed=rng.getrandbits(30), dropout=0.0)
    ours, engine = streamed_like(model, tmp_path, "disk", slots=2, write_every=2)
    with engine:
        a = optim.ZOSGD(model.named_parameters(), lr=1e-2, eps=1e-2, seed=5)
        b = optim.ZOSGD(ours.named_parameters(), lr=1e-2, eps=1e-2, seed=5)
        for step in range(5):
            ids = batch_of(step)
            a.step(lambda: loss_of(model, ids)), b.step(lambda: loss_of(ours, ids))  # noqa: B023
            out = ours(ids)  # with gradients enabled, too
            assert same_bits(out.detach(), model(ids).detach())
            engine.save(tmp_path / "saved.safetensors")
            saved = load_file(tmp_path / "saved.safetensors")
            state = {k: v for k, v in model.state_dict().items() if k != "head.weight"}
            assert not same_state(saved, state)
        assert not same_state(ours.state_dict(), model.state_dict())


def test_parameters_of_blocks_that_are_away_are_nan(tmp_path):
    model = tower()
    with offload.stream(model, "layers"):
        weight = model.layers[1].up.weight
        assert weight.shape == (39, 19)
        assert weight.isnan().all()
        assert weight.untyped_storage().nbytes() == 4
        with pytest.raises(RuntimeError):
            weight.data.add_(1)
        with pytest.raises(RuntimeError, match=r"layers\.0.*load_state_dict"):
            model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="closed"):
        model(batch_of(0))


def test_blocks_are_found(tmp_path):
    model = tower()
    with offload.stream(model) as engine:
        assert [b.module for b in engine.blocks] == list(model.layers)
    model = tower()
    with offload.stream(model, [model.layers[3], model.layers[0]]) as engine:
        assert [b.name for b in engine.blocks] == ["layers.3", "layers.0"]
        losses, _ = train(model, 4)
    other = tower()
    assert same_bits(losses, train(other, 4)[0])


def test_weights_that_two_blocks_share_stay_on_the_device(rng, tmp_path):
    model = tower(seed=rng.getrandbits(30))
    model.layers[3].up.weight = model.layers[1].up.weight
    ours = copy.deepcopy(model)
    assert ours.layers[3].up.weight is ours.layers[1].up.weight
    expected, _ = train(model, 5)
    with offload.stream(ours, "layers", slots=2) as engine:
        assert all(e.param is not ours.layers[1].up.weight for b in engine.blocks for e in b.entries)
        losses, _ = train(ours, 5)
        assert same_bits(losses, expected)


BAD = {
    "storage": ({"storage": "tape"}, ValueError, "storage.*'disk'"),
    "slots": ({"slots": 0}, ValueError, "slots.*integer >= 1"),
    "scratch": ({"scratch": 3}, ValueError, "scratch.*1 or 2"),
    "write_every": ({"write_every": 0}, ValueError, "write_every"),
    "never written": ({"write_every": None}, ValueError, "write_every.*unless storage is 'disk'"),
    "threads": ({"threads": True}, ValueError, "threads"),
    "blocks": ({"blocks": "layer"}, ValueError, "blocks.*'layers'"),
    "block of another model": ({"blocks": [Layer(3, 0.0)]}, ValueError, "blocks.*not in it"),
    "no blocks": ({"blocks": []}, TypeError, "blocks"),
    "path": ({"path": "somewhere"}, ValueError, "path.*unless storage is 'disk'"),
    "neither weights nor path": ({"storage": "disk"}, ValueError, "weights, path"),
    "resume": ({"resume": True}, ValueError, "resume.*path"),
    "device": ({"device": "meta"}, ValueError, "device.*'cpu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    options, error, match = BAD[case]
    model = tower()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        offload.stream(model, **options)
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())


def test_bad_models(tmp_path):
    model = tower()
    with pytest.raises(ValueError, match=r"inside another"):
        offload.stream(model, [model.layers, model.layers[0]])
    sequential = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"modules, or none: the model itself .* got 'layers'$"):
        offload.stream(sequential, "layers")
    with offload.stream(sequential) as one:
        assert [b.name for b in one.blocks] == ["0", "1"]
    with pytest.raises(ValueError, match="container of equal ones"):
        offload.stream(nn.Linear(3, 3))
    with offload.empty_weights():
        empty = tower_on_meta()
    with pytest.raises(ValueError, match=r"weights.*'meta'"):
        offload.stream(empty, "layers")
    with offload.stream(model, "layers"), pytest.raises(RuntimeError, match="not streamed"):
        offload.stream(model, "layers")


def tower_on_meta():
    from offload_cases import Tower

    model = Tower()
    assert all(p.is_meta for p in model.parameters())
    return model


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (optim.ConMeZO, {}, "can be streamed, got"),
        (optim.ZOCGE, {}, "losses at perturbed weights|can be streamed, got"),
        (optim.ZOSGD, {"restore": "inplace"}, "restore"),
        (optim.ZOSGD, {"capturable": True}, "capturable"),
    ],
)
def test_optimizers_that_cannot_be_streamed(make, options, match):
    model = tower()
    with offload.stream(model, "layers"), pytest.raises(ValueError, match=match):
        make(model.named_parameters(), lr=1e-3, **options)


def test_parameters_of_two_streamed_models():
    a, b = tower(), tower()
    with offload.stream(a, "layers"), offload.stream(b, "layers"):
        named = [(f"{k}.{n}", p) for k, m in enumerate((a, b)) for n, p in m.named_parameters()]
        with pytest.raises(ValueError, match="one streamed model"):
            optim.ZOSGD(named, lr=1e-3)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("restore", ["exact", "inplace"])
def test_an_optimizer_that_was_made_before_the_stream(restore, steps):
    model = tower(layers=2)
    _, optimizer = train(model, steps, restore=restore)
    before = copy.deepcopy(model.state_dict())
    with offload.stream(model, "layers") as engine:
        assert repr(engine) == "<Engine of Tower: 2 blocks for cpu, open>"
        with pytest.raises(
            RuntimeError, match=r"^ZOSGD: params: .* make the optimizer after stream\(model\)"
        ):
            optimizer.step(lambda: loss_of(model, batch_of(0)))
        assert optimizer.step_count == steps
        assert not same_state(model.state_dict(), before)
        train(model, 1)
        assert same_state(model.state_dict(), before)


def test_the_log_of_a_streamed_run_replays_in_memory(rng, tmp_path):
    from zokernels.trajectory import replay_

    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    base = copy.deepcopy(model)
    with offload.stream(model, "layers", slots=2):
        _, optimizer = train(model, 6, trajectory=tmp_path / "log.zk")
        optimizer.trajectory.close()
        replay_(base, tmp_path / "log.zk")
        assert not same_state(model.state_dict(), base.state_dict())
        assert base.embed.num_embeddings == VOCAB
