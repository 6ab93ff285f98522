# ruff: noqa: B023  closures of a loop run inside it
"""ZOSGD: checkpoints, learning rates, clipping, losses that are not finite, validation."""

import copy
import io
import json
import warnings

import pytest
import torch
from torch import nn
from zosgd_cases import BOTH, batch, loss_of, mlp, same_bits, weights

from zokernels.optim import ZOSGD, ZOAdamW

CPU = torch.device("cpu")

# --- state ---


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(dtype, restore):
    """Six steps with a schedule and dropout equal three, a checkpoint read with weights_only, and three
    more.
    """

    def build(seed):
        model = mlp(dtype, dropout=0.2)
        opt = ZOSGD(model.named_parameters(), lr=0.1, weight_decay=0.01, seed=seed, restore=restore)
        return model, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)

    def run(model, opt, schedule, steps):
        for _ in range(steps):
            opt.step(lambda: loss_of(model, *data))
            schedule.step()

    data = batch()
    torch.manual_seed(5)
    model, opt, schedule = build(11)
    run(model, opt, schedule, 3)
    file = io.BytesIO()
    parts = {"model": model, "opt": opt, "schedule": schedule}
    torch.save({k: v.state_dict() for k, v in parts.items()} | {"rng": torch.get_rng_state()}, file)
    run(model, opt, schedule, 3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model2, opt2, schedule2 = build(0)
    for part, name in ((model2, "model"), (schedule2, "schedule"), (opt2, "opt")):
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"])
    run(model2, opt2, schedule2, 3)
    assert same_bits(weights(model), weights(model2))
    assert (opt2.seed, opt2.step_count) == (11, 6)
    assert opt.param_groups[0]["lr"] == opt2.param_groups[0]["lr"] != 0.1
    assert opt.state_dict() == opt2.state_dict()


def test_lr_is_read_at_each_step_also_as_a_tensor():
    data, moved = batch(), []
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)):
        model = mlp()
        opt = ZOSGD(model.named_parameters(), lr=lr, weight_decay=0.5)
        opt.step(lambda: loss_of(model, *data))
        moved.append(weights(model))
        if isinstance(lr, torch.Tensor):
            lr.zero_()
        else:
            opt.param_groups[0]["lr"] = 0
        opt.step(lambda: loss_of(model, *data))
        assert same_bits(weights(model), moved[-1])
    assert same_bits(moved[0], moved[1])
    assert same_bits(moved[0], moved[2])


def test_copies_go_on_alike():
    model = mlp()
    opt = ZOSGD(model.named_parameters(), lr=0.1, seed=4)
    opt.step(lambda: loss_of(model, *batch()))
    model2, opt2 = copy.deepcopy((model, opt))
    opt.step(lambda: loss_of(model, *batch()))
    opt2.step(lambda: loss_of(model2, *batch()))
    assert same_bits(weights(model), weights(model2))
    assert opt2.step_count == 2


def test_load_refuses_what_does_not_fit():
    model = mlp()
    opt = ZOSGD(model.named_parameters(), lr=0.1)
    good = opt.state_dict()
    with pytest.raises(ValueError, match="state_dict: expected an entry 'zo'"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    with pytest.raises(ValueError, match="noise contract 'zk1', got 'zk9'"):
        opt.load_state_dict({**good, "zo": {**good["zo"], "contract": "zk9"}})
    other = ZOSGD(list(model.named_parameters())[::-1], lr=0.2, seed=8)
    with pytest.raises(ValueError, match=r"'3.bias' here"):
        other.load_state_dict(good)
    assert other.seed == 8
    assert other.param_groups[0]["lr"] == 0.2


# --- losses that are not finite ---


@BOTH
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "losses", [(float("nan"), 1.0), (1.0, float("inf")), (float("inf"),) * 2, (1e30, -1e38)]
)
def test_non_finite_loss_skips_the_update(losses, capturable, restore):
    """A capturable step takes the path of a GPU: the choice by torch.where, the warning on reading."""
    weight = torch.tensor([0.5, -1.25, 3.0, 2.0**-10], dtype=torch.bfloat16)
    p = nn.Parameter(weight.clone())
    opt = ZOSGD([p], lr=0.1, weight_decay=0.5, restore=restore, eps=2.0**-12, capturable=capturable)
    answers = iter(losses)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(lambda: p.sum().float() * 0 + next(answers))
    assert bool(caught) == (not capturable)
    if restore == "exact":
        assert same_bits([p.detach()], [weight])
    else:  # back by a rounded move: the perturbation (2^-12 |z|) is all that may remain of it
        assert (p.detach().float() - weight.float()).abs().max() <= 2.0**-7
    if not capturable:
        assert "1 step(s) skipped" in str(caught[0].message)
        assert int(opt.skipped_steps) == 1
    else:
        with pytest.warns(UserWarning, match="1 step"):
            assert int(opt.skipped_steps) == 1
    counters = {"contract": "zk1", "seed": 0, "step": 1, "skipped_steps": 1}
    assert opt.state_dict()["zo"] == {**counters, "rule": {"name": "SGD", "groups": {}}}
    opt.step(lambda: p.float().sum())  # the next step draws another z and goes on
    assert p.isfinite().all()
    assert opt.step_count == 2


def test_negative_zero_keeps_its_sign_when_nothing_is_to_do():
    p = nn.Parameter(torch.full((64,), -0.0))
    opt = ZOSGD([p], lr=0.0)
    opt.step(lambda: p.sum())
    assert same_bits([p.detach()], [torch.full((64,), -0.0)])


# --- validation ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr: expected a finite number >= 0, got -0.1"),
        ({"lr": float("nan")}, "lr: expected a finite number >= 0, got nan"),
        ({"lr": torch.ones(2)}, "lr: expected a number or a floating-point tensor of one element"),
        ({"lr": "fast"}, "lr: expected a finite number >= 0, got 'fast'"),
        ({"eps": 0.0}, "eps: expected a finite number > 0, got 0.0"),
        ({"weight_decay": -1}, "weight_decay: expected a finite number >= 0, got -1"),
        ({"dist": "cauchy"}, "dist: expected 'normal' or 'rademacher', got 'cauchy'"),
        ({"rounding": "up"}, "rounding: expected 'stochastic' or 'nearest', got 'up'"),
        ({"restore": "maybe"}, "restore: expected 'exact' or 'inplace' or 'products', got 'maybe'"),
        ({"seed": 0.5}, "seed: expected an integer, got 0.5"),
        ({"seed": True}, "seed: expected an integer, got True"),
        ({"seed": 2**64}, "seed: expected an integer in"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        ZOSGD([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, **options})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (
            nn.Parameter(torch.zeros(4, 3).t()),
            "'w': expected a contiguous tensor, got shape (3, 4), strides (1, 3)",
        ),
        (
            nn.Parameter(torch.zeros(2, dtype=torch.float64)),
            "'w': expected dtype float32, bfloat16 or float16",
        ),
        (nn.LazyLinear(3).weight, "'w': expected an initialized parameter"),
    ],
)
def test_bad_parameters(param, message):
    with pytest.raises((ValueError, TypeError)) as error:
        ZOSGD([("w", param)], lr=0.1)
    assert message in str(error.value)


@BOTH
@pytest.mark.parametrize("result", [None, torch.ones(2), "0.5", True, torch.ones((), dtype=torch.complex64)])
def test_bad_closures(result, restore):
    p = nn.Parameter(torch.ones(5))
    opt = ZOSGD([p], lr=0.1, restore=restore)
    with pytest.raises(TypeError, match="ZOSGD: closure: expected a function"):
        opt.step()
    with pytest.raises((TypeError, ValueError), match=r"ZOSGD: closure: expected a .*scalar loss"):
        opt.step(lambda: (p.sum(), result)[1])
    assert torch.allclose(p, torch.ones(5), atol=1e-6)
    assert opt.step_count == 0
    if restore == "exact":
        assert torch.equal(p, torch.ones(5))


def test_bad_hyperparameter_set_later_stops_before_the_forward():
    p = nn.Parameter(torch.ones(5))
    opt = ZOSGD([p], lr=0.1)
    opt.param_groups[0]["eps"] = 0.0
    with pytest.raises(ValueError, match="eps"):
        opt.step(lambda: pytest.fail("the closure must not run"))


HISTORIES = {
    "momentum": (ZOSGD, {"momentum": 0.9}),
    "window": (ZOSGD, {"momentum": 0.9, "window": 3}),
    "Adam": (ZOAdamW, {}),
    "plain": (ZOSGD, {}),
}


def two_groups(kind, **options):
    make, own = HISTORIES[kind]
    params = {name: torch.nn.Parameter(torch.linspace(-1, 1, 5) + i) for i, name in enumerate("abc")}
    groups = [{"params": [(n, p)], "lr": 0.05 * (1 + i)} for i, (n, p) in enumerate(params.items())]
    return params, make(groups, lr=0.1, seed=5, **own, **options)


def steps_of(params, optimizer, count):
    for _ in range(count):
        optimizer.step(lambda: sum((p * (1 + optimizer.step_count)).sin().sum() for p in params.values()))


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_state_dict_goes_through_json(kind):
    """All but the tensors of parameters, which JSON has not: the next steps have the same bits."""
    params, optimizer = two_groups(kind)
    steps_of(params, optimizer, 4)
    saved = optimizer.state_dict()
    through = {**saved, **json.loads(json.dumps({key: saved[key] for key in ("zo", "param_groups")}))}
    ours, again = two_groups(kind)
    for name, p in ours.items():
        p.data.copy_(params[name].data)
    again.load_state_dict(through)
    for of in (params, optimizer), (ours, again):
        steps_of(*of, 3)
    assert all(torch.equal(ours[name], params[name]) for name in params)
    plain = lambda of: json.dumps({key: value for key, value in of.state_dict().items() if key != "state"})
    assert plain(again) == plain(optimizer)


@pytest.mark.parametrize("place", ["3", "x", -1, 7])
def test_a_group_that_is_not_there_is_refused(place):
    params, optimizer = two_groups("Adam")
    steps_of(params, optimizer, 2)
    saved = optimizer.state_dict()
    before = str(saved)
    kept = saved["zo"]["rule"]["groups"]
    wrong = {
        **saved,
        "zo": {**saved["zo"], "rule": {**saved["zo"]["rule"], "groups": {**kept, place: kept[0]}}},
    }
    with pytest.raises(ValueError, match="state_dict: expected groups by numbers below 3"):
        optimizer.load_state_dict(wrong)
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize("kind", ["window", "Adam"])
@pytest.mark.parametrize("edit", ["pop", "delete", "reverse", "insert"])
def test_what_is_kept_belongs_to_the_group_and_not_to_its_place(kind, edit):
    """Groups removed, reordered and put in by hand: each goes on with its own history, as an optimizer of
    it alone.
    """
    params, optimizer = two_groups(kind)
    steps_of(params, optimizer, 3)
    kept = {
        id(g): {k: t.clone() for k, t in optimizer.rule.kept(optimizer, g, CPU).items()}
        for g in optimizer.param_groups
    }
    groups = optimizer.param_groups
    if edit == "pop":
        groups.pop(0)
    elif edit == "delete":
        del groups[1]
    elif edit == "reverse":
        groups.reverse()
    else:
        new = torch.nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [("new", new)]})
        groups.insert(0, groups.pop())
        params["new"] = new
        fresh = optimizer.rule.initial(optimizer)
        kept[id(groups[0])] = {name: t.clone() for name, t in fresh.items()}
    for group in groups:
        now = optimizer.rule.kept(optimizer, group, CPU)
        assert all(torch.equal(now[name], t) for name, t in kept[id(group)].items())
    saved = optimizer.rule.state_dict()["groups"]
    assert sorted(saved) == list(range(len(groups)))
    for place, group in enumerate(groups):
        assert saved[place] == {name: t.tolist() for name, t in kept[id(group)].items()}
    steps_of(params, optimizer, 1)
    copied = copy.deepcopy(optimizer)
    assert copied.rule.state_dict() == optimizer.rule.state_dict()
