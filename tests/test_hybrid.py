"""A first-order optimizer on some parameters beside zeroth-order steps on the rest, in one step."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from zosgd_cases import BOTH, same_bits

import zokernels as zk
from zokernels.cli import main
from zokernels.contract import derive_seed_int
from zokernels.optim import EGGROLL, PGAP, ZOSGD, ConMeZO, ZOAdamW, groups_without
from zokernels.trajectory import read, replay_

EPS = 2.0**-6


def net(dtype=torch.float32):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)


X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
BODY, HEAD = ("0.weight", "0.bias"), ("3.weight", "3.bias")


def loss_of(model, x=X):
    return ((model(x.to(model[0].weight.dtype)) - 0.5) ** 2).sum()


def hybrid(model, kind=ZOSGD, lr=0.003, head=None, **options):
    head = torch.optim.SGD(model[3].parameters(), lr=0.01, momentum=0.9) if head is None else head
    return kind(groups_without(model.named_parameters(), head), lr, EPS, first_order=head, **options)


def take(model, opt, steps, closure=None):
    for i in range(steps):
        torch.manual_seed(100 + i)  # of the dropout
        opt.step(closure or (lambda: loss_of(model)))
    if opt.trajectory:
        opt.trajectory.close()
    return [p.detach() for p in model.parameters()]


@BOTH
def test_both_parts_are_measured_at_theta(restore, rng):
    """In float64: the gradient of the head and the difference of the body, both at the old weights."""
    seed, model = rng.getrandbits(62), net()
    opt = hybrid(model, restore=restore, seed=seed, weight_decay=0.1)
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    momentum = {n: torch.zeros_like(theta[n]) for n in HEAD}

    def loss(weights):
        h = torch.tanh(X.double() @ weights["0.weight"].t() + weights["0.bias"])
        h = torch.nn.functional.dropout(h.float(), 0.5).double() / h.float().double() * h  # the mask alone
        return ((h @ weights["3.weight"].t() + weights["3.bias"] - 0.5) ** 2).sum()

    for step in range(4):
        z = {
            n: zk.noise(theta[n].shape, seed=derive_seed_int(seed, step, 0), stream=zk.stream_of(n)).double()
            for n in BODY
        }
        at = []
        for c in (EPS, -EPS):
            torch.manual_seed(100 + step)
            at.append(loss({**theta, **{n: theta[n] + c * z[n] for n in BODY}}))
        g = (at[0] - at[1]) / (2 * EPS)
        leaves = {n: theta[n].clone().requires_grad_() for n in HEAD}
        torch.manual_seed(100 + step)
        grads = torch.autograd.grad(loss({**theta, **leaves}), list(leaves.values()))
        for n, grad in zip(HEAD, grads, strict=True):
            momentum[n] = 0.9 * momentum[n] + grad
            theta[n] = theta[n] - 0.01 * momentum[n]
        for n in BODY:
            theta[n] = (1 - 0.003 * 0.1) * theta[n] - 0.003 * g * z[n]
        torch.manual_seed(100 + step)
        opt.step(lambda: loss_of(model))
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for n, p in model.named_parameters():
        assert torch.allclose(p.detach().double(), theta[n], rtol=0, atol=2e-4), n


@pytest.mark.parametrize("kind", [ZOSGD, ZOAdamW, ConMeZO, PGAP])
def test_with_every_kind_of_step(kind):
    options = {"rank": 2, "probes": 2} if kind is PGAP else {}
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    take(model, hybrid(model, kind, **options), 2)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parameters_of_both_as_in_addax():
    """theta - lr g z - another lr times the gradient of another batch, both at theta."""
    model, other = net().eval(), torch.randn(3, 5)
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    first = torch.optim.SGD(model.parameters(), lr=0.02)
    opt = ZOSGD(
        model.named_parameters(), 0.003, EPS, seed=7, first_order=first,
        first_order_closure=lambda: loss_of(model, other),
    )  # fmt: skip
    twin = net().eval()
    loss_of(twin, other).backward()
    z = {
        n: zk.noise(t.shape, seed=derive_seed_int(7, 0, 0), stream=zk.stream_of(n)).double()
        for n, t in theta.items()
    }
    probe = net().eval().double()

    def at(c):
        probe.load_state_dict({n: t + c * z[n] for n, t in theta.items()})
        return loss_of(probe, X).item()

    g = (at(EPS) - at(-EPS)) / (2 * EPS)
    opt.step(lambda: loss_of(model))
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        want = theta[n] - 0.003 * g * z[n] - 0.02 * q.grad.double()
        assert torch.allclose(p.detach().double(), want, rtol=0, atol=1e-5), n
    with pytest.raises(ValueError, match="trajectory: expected None where both optimizers move a parameter"):
        ZOSGD(model.named_parameters(), 0.1, first_order=first, trajectory="run.zk")
    with pytest.raises(ValueError, match="optimizer: expected steps along directions"):
        zk.trajectory.record(opt, "run.zk")


@pytest.mark.parametrize("restore", ["exact", "inplace", "two-pass"])
def test_the_log_is_the_zeroth_order_part_and_says_so(restore, tmp_path, rng):
    path, seed, model, base = (
        tmp_path / "run.zk",
        rng.getrandbits(62),
        net(torch.bfloat16),
        net(torch.bfloat16),
    )
    opt = hybrid(model, seed=seed, trajectory=path, restore="exact" if restore == "exact" else "inplace")
    if restore == "two-pass":
        with opt.two_pass(model):
            take(model, opt, 5)
    else:
        take(model, opt, 5)
    log = read(path)
    assert log.header["part"] is True
    assert replay_({n: p for n, p in base.named_parameters() if n in BODY}, path) == 5
    own, again = dict(model.named_parameters()), dict(base.named_parameters())
    assert same_bits([own[n].detach() for n in BODY], [again[n].detach() for n in BODY])
    assert not torch.equal(own["3.weight"], again["3.weight"])
    plain = net()
    take(plain, ZOSGD(plain.named_parameters(), 0.01, trajectory=tmp_path / "plain.zk"), 1)
    assert "part" not in read(tmp_path / "plain.zk").header


def test_the_command_says_that_a_log_is_a_part(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    model, files = net(), [str(tmp_path / name) for name in ("base.safetensors", "run.zk", "out.safetensors")]
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    safetensors.save_file(base, files[0])
    take(model, hybrid(model, trajectory=files[1]), 2)
    with pytest.warns(UserWarning, match="is a part of its run: weights that gradients trained stay"):
        assert main(["replay", *files[:2], "-o", files[2]]) == 0
    out = safetensors.load_file(files[2])
    assert all(torch.equal(out[n], base[n]) for n in HEAD)
    assert all(torch.equal(out[n], dict(model.named_parameters())[n].detach()) for n in BODY)
    capsys.readouterr()
    assert main(["log", files[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["part"] is True


def test_a_checkpoint_goes_on_with_the_log(tmp_path, rng):
    seed, whole, half, rest = rng.getrandbits(62), net(), net(), net()
    take(whole, hybrid(whole, seed=seed), 5)
    opt = hybrid(half, seed=seed, trajectory=tmp_path / "run.zk")
    for i in range(3):
        torch.manual_seed(100 + i)
        opt.step(lambda: loss_of(half))
    saved = opt.state_dict()
    opt.trajectory.close()
    rest.load_state_dict(half.state_dict())
    again = hybrid(rest, seed=seed)
    again.load_state_dict(saved)
    zk.trajectory.record(again, tmp_path / "run.zk", rewind=True)
    for i in range(3, 5):
        torch.manual_seed(100 + i)
        again.step(lambda: loss_of(rest))
    again.trajectory.close()
    assert same_bits([p.detach() for p in rest.parameters()], [p.detach() for p in whole.parameters()])
    assert read(tmp_path / "run.zk").steps == 5
    with pytest.raises(ValueError, match="an entry 'first_order'"):
        hybrid(net()).load_state_dict({k: v for k, v in saved.items() if k != "first_order"})
    with pytest.raises(ValueError, match="resume: expected rewind=True, from a checkpoint"):
        hybrid(net(), seed=seed, trajectory=tmp_path / "run.zk", resume=True)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_loss_that_is_not_finite_moves_neither_part(bad):
    model = net()
    opt = hybrid(model)
    take(model, opt, 1)
    before, calls = [p.detach().clone() for p in model.parameters()], iter(range(3))
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: loss_of(model) * (float("nan") if next(calls) == bad else 1.0))
    assert same_bits(before, [p.detach() for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())


def test_an_error_in_the_closure_leaves_everything_as_it_was():
    model = net()
    opt, before = hybrid(model), [p.detach().clone() for p in model.parameters()]
    for fails_at in range(3):
        calls = iter(range(3))

        def closure(calls=calls, fails_at=fails_at):
            if next(calls) == fails_at:
                raise RuntimeError("no batch")
            return loss_of(model)

        with pytest.raises(RuntimeError, match="no batch"):
            opt.step(closure)
        assert same_bits(before, [p.detach() for p in model.parameters()])
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert opt.step_count == 0


def test_a_state_dict_that_one_part_refuses_changes_neither():
    model, opt = net(), None
    opt = hybrid(model)
    take(model, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    take(model, opt, 1)
    held = copy.deepcopy(opt.state_dict())
    none = {**copy.deepcopy(saved), "first_order": {"state": {}, "param_groups": []}}
    other = {**copy.deepcopy(saved), "zo": {**saved["zo"], "contract": "zk0"}}
    for bad, message in ((none, "number of parameter groups"), (other, "zk0")):
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(bad)
        found = opt.state_dict()
        assert found["zo"] == held["zo"]
        theirs, ours = (s["first_order"]["state"] for s in (held, found))
        assert theirs.keys() == ours.keys() != set()
        assert all(torch.equal(t, ours[i][key]) for i, of in theirs.items() for key, t in of.items())


BAD = {
    "an optimizer of ours": (lambda m: ZOSGD(m[3].parameters(), 0.1), "an optimizer of torch.optim"),
    "no optimizer": (lambda m: m, "an optimizer of torch.optim, or another one with gradients, got Seq"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    make, message = BAD[bad]
    model = net()
    with pytest.raises(TypeError, match=message):
        ZOSGD(model[0].named_parameters(), 0.1, first_order=make(model))


def test_what_cannot_be_hybrid():
    model = net()
    opt = hybrid(model)
    with pytest.raises(
        TypeError, match="a scalar loss that depends on parameters of the first-order optimizer"
    ):
        opt.step(lambda: 1.0)
    with pytest.raises(ValueError, match=r"first_order: expected .* the gradients that are there, got LBFGS"):
        ZOSGD(model[0].named_parameters(), 0.1, first_order=torch.optim.LBFGS(model[3].parameters()))
    with pytest.raises(ValueError, match="capturable: expected False with first_order"):
        hybrid(model, capturable=True)
    with pytest.raises(ValueError, match="batched: expected False with first_order"):
        hybrid(model, EGGROLL, restore="products").step(lambda cohort: loss_of(model), batched=True)
    with pytest.raises(ValueError, match="first_order_closure: expected None without first_order"):
        ZOSGD(model.named_parameters(), 0.1, first_order_closure=lambda: None)
    with pytest.raises(RuntimeError, match="first_order: expected no copy"):
        __import__("copy").deepcopy(opt)


def test_groups_without():
    model = net()
    head = torch.optim.SGD(model[3].parameters(), lr=0.1)
    (group,) = groups_without(model.named_parameters(), head)
    assert [n for n, _ in group["params"]] == list(BODY)
    groups = [
        {"params": list(model[3].named_parameters())},
        {"params": list(model[0].parameters()), "lr": 2.0},
    ]
    assert [(len(g["params"]), g["lr"]) for g in groups_without(groups, head)] == [(2, 2.0)]
