"""Buckets are kept from step to step: whatever changes between two steps, the next one is that of a fresh
plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import zokernels.optim as zo
from zokernels.ops import plan as plans
from zokernels.step.groups import Planner

needs_reader = pytest.mark.skipif(plans._reader() is None, reason="the host module is not built")

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "exact": lambda groups: zo.ZOSGD(groups, lr=0.1, seed=3),
    "inplace": lambda groups: zo.ZOSGD(groups, lr=0.1, seed=3, restore="inplace", weight_decay=0.1),
    "momentum": lambda groups: zo.ZOSGD(groups, lr=0.1, seed=3, restore="inplace", momentum=0.9),
    "adamw": lambda groups: zo.ZOAdamW(groups, lr=0.1, seed=3, restore="inplace", directions=2),
    "hizoo": lambda groups: zo.HiZOO(groups, lr=0.1, seed=3, restore="inplace"),
    "masked": lambda groups: zo.SparseMeZO(groups, lr=0.1, seed=3, restore="inplace"),
    "low rank": lambda groups: zo.LOZO(groups, lr=0.1, seed=3, restore="inplace"),
    "sphere": lambda groups: zo.ZOSGD(groups, lr=0.1, seed=3, restore="inplace", direction=zo.Sphere()),
}


def params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(3 + i, 4, generator=generator)) for i in range(6)]


def groups(ps: list[nn.Parameter]) -> list[dict]:
    return [{"params": ps[:4]}, {"params": ps[4:], "eps": 1e-2, "dist": "rademacher"}]


def closure_of(opt: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
    return lambda: sum((p.float() - 0.5).square().mean() for g in opt.param_groups for p in g["params"])


def nothing(opt, ps) -> None:
    pass


def freeze(opt, ps) -> None:
    ps[1].requires_grad_(False)
    ps[5].requires_grad_(False)


def thaw(opt, ps) -> None:
    for p in ps:
        p.requires_grad_(True)


def other_memory(opt, ps) -> None:
    ps[2].data = ps[2].data.clone()


def other_dtype(opt, ps) -> None:
    for p in ps[:2]:
        p.data = p.data.bfloat16()


def other_hyperparameters(opt, ps) -> None:
    opt.param_groups[0]["eps"] = 3e-3
    opt.param_groups[1]["dist"] = "normal"


def other_streams(opt, ps) -> None:
    opt.param_groups[0]["streams"] = [100, 101, 102, 103]


def edited_streams(opt, ps) -> None:
    opt.param_groups[1]["streams"][0] = 77


def another_parameter(opt, ps) -> None:
    ps[3] = opt.param_groups[0]["params"][3] = nn.Parameter(torch.linspace(0, 1, 24).view(6, 4))


def one_less(opt, ps) -> None:
    del opt.param_groups[0]["params"][0], opt.param_groups[0]["streams"][0]
    del ps[0]


def a_group_more(opt, ps) -> None:
    ps.append(nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)))
    opt.add_param_group({"params": [ps[-1]], "streams": [999]})


def emptied(opt, ps) -> None:
    ps[2].data = torch.empty(0, 4)


def reloaded(opt, ps) -> None:
    opt.load_state_dict(opt.state_dict())


CHANGES = [
    *(nothing, freeze, thaw, other_memory, other_dtype, other_hyperparameters, other_streams, edited_streams),
    *(another_parameter, one_less, a_group_more, reloaded),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_change_between_steps(maker, change):
    if change is other_dtype and maker in ("momentum", "adamw", "hizoo", "masked", "low rank"):
        pytest.skip("what they keep of a parameter goes with its dtype or shape")
    ours, theirs = params(), params()
    kept, fresh = MAKERS[maker](groups(ours)), MAKERS[maker](groups(theirs))
    for deed in (nothing, nothing, change, nothing, thaw, nothing):
        deed(kept, ours)
        deed(fresh, theirs)
        fresh.planner = Planner()
        losses = kept.step(closure_of(kept)), fresh.step(closure_of(fresh))
        assert torch.equal(*losses)
        assert [p.dtype for p in ours] == [p.dtype for p in theirs]
        assert all(map(torch.equal, ours, theirs))


def test_two_pass():
    ours, theirs = params(), params()
    kept, fresh = (zo.ZOSGD(groups(ps), lr=0.1, restore="inplace") for ps in (ours, theirs))
    with kept.two_pass(nn.ParameterList(ours)), fresh.two_pass(nn.ParameterList(theirs)):
        for change in (
            nothing,
            nothing,
            other_memory,
            nothing,
            freeze,
            nothing,
            other_hyperparameters,
            nothing,
        ):
            kept.flush()
            fresh.flush()
            change(kept, ours)
            change(fresh, theirs)
            for _ in range(2):
                fresh.planner = Planner()
                kept.step(closure_of(kept))
                fresh.step(closure_of(fresh))
    assert all(map(torch.equal, ours, theirs))


def strided(opt, ps) -> None:
    ps[1].data = torch.randn(4, 4).t()


def overlapping(opt, ps) -> None:
    ps[1].data = ps[0].data


def integers(opt, ps) -> None:
    ps[1].requires_grad_(False)
    ps[1].data = torch.ones(4, 4, dtype=torch.long)
    opt.param_groups[0]["bits"] = 8


def negative_eps(opt, ps) -> None:
    opt.param_groups[1]["eps"] = -1.0


def a_stream_less(opt, ps) -> None:
    opt.param_groups[0]["streams"].pop()


def all_frozen(opt, ps) -> None:
    for p in ps:
        p.requires_grad_(False)


@pytest.mark.parametrize("fault", [strided, overlapping, integers, negative_eps, a_stream_less, all_frozen])
@pytest.mark.parametrize("restore", ["exact", "inplace"])
def test_a_fault_between_steps(restore, fault):
    """The same error as without kept buckets, before anything moves, and again at the next step."""
    messages = []
    for keeps in (True, False):
        ps = params()
        opt = zo.ZOSGD(groups(ps), lr=0.1, restore=restore)
        for _ in range(2):
            opt.step(closure_of(opt))
        fault(opt, ps)
        before = [p.detach().clone() for p in ps]
        for _ in range(2):
            if not keeps:
                opt.planner = Planner()
            with pytest.raises((TypeError, ValueError)) as error:
                opt.step(closure_of(opt))
            messages.append(str(error.value))
        assert all(map(torch.equal, ps, before))
        assert opt.step_count == 2
    assert len(set(messages)) == 1


@needs_reader
def test_a_step_in_place_takes_tables():
    """From the second step on: three passes are three calls into C++, whatever the number of tensors."""
    ps = [nn.Parameter(torch.randn(2, 3)) for _ in range(100)]
    opt = zo.ZOSGD(ps, lr=0.1, restore="inplace")
    called = []
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            opt.step(closure_of(opt))
        names = [event.name for event in profile.events()]
        called.append([n.removeprefix("zokernels_cpu::") for n in names if n.startswith("zokernels_cpu::")])
    # In the first step, only the first pass looks at tensors: the other two have the table that it leaves.
    assert called == [["combine", "combine_planned", "combine_planned"], *[["combine_planned"] * 3] * 2]


@needs_reader
def test_an_exact_step_takes_tables():
    """Each block's copies are made by a plan of the block's own."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    opt = zo.ZOSGD(model.named_parameters(), lr=0.1)
    x, called = torch.randn(2, 4), []
    for _ in range(4):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            opt.step(lambda: model(x).square().mean())
        called.append({e.name for e in profile.events() if e.name.startswith("zokernels_cpu::")})
    assert called[-1] == {"zokernels_cpu::combine_planned"}


@needs_reader
def test_buckets_are_kept_and_begin_anew():
    """The same objects while nothing changes; what a step notes in them (where the weights are) is gone."""
    opt = zo.ZOSGD(groups(params()), lr=0.1, restore="inplace")
    first = opt.plan()
    assert all(b.plan is not None for b in first)
    first[0].at, first[1].ahead = {0: 1.0}, (torch.zeros(1), torch.zeros(1))
    assert opt.plan() is first
    assert all(b.at == {} and b.ahead is None for b in first)
    opt.param_groups[1]["eps"] = 0.5
    second = opt.plan()
    assert [b.eps for b in second] == [1e-3, 0.5]
    assert not {id(b) for b in first} & {id(b) for b in second}


@pytest.mark.parametrize("value", [True, "1.0", float("nan")])
def test_a_value_that_replaces_an_equal_one_is_checked(value):
    """Of groups that were found right only the very same objects are not looked at again."""
    ps = params()
    opt = zo.ZOSGD(ps, lr=0.1, eps=1.0)
    for _ in range(2):
        opt.step(closure_of(opt))
    opt.param_groups[0]["eps"] = value
    with pytest.raises((TypeError, ValueError), match="eps: expected a finite number > 0"):
        opt.step(closure_of(opt))


def test_a_value_that_changes_by_itself_is_checked():
    """Such as a list, which is the same object afterwards."""
    opt = zo.ZOAdamW(params(), lr=0.1, betas=[0.9, 0.999])
    for _ in range(2):
        opt.step(closure_of(opt))
    opt.param_groups[0]["betas"][0] = 2.0
    with pytest.raises(ValueError, match=r"betas\[0\]"):
        opt.step(closure_of(opt))


@pytest.mark.parametrize("restore", ["exact", "inplace"])
@pytest.mark.parametrize("moved", ["all", "one"])
def test_parameters_that_get_other_memory_between_two_steps(restore, moved):
    """The forwards of the next step see what the parameters hold then, wherever it lies."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), torch.randn(4, 6)
    loss_of = lambda net: net(x).square().mean()
    make = lambda net: zo.ZOSGD(net.named_parameters(), lr=1e-2, seed=5, restore=restore)
    optimizer = make(model)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model))
    held = [p.data for p in model.parameters()]  # so that no other tensor gets their addresses
    for p in model.parameters() if moved == "all" else [model[1].weight]:
        p.data = 3 * p.data
    twin = copy.deepcopy(model)
    other = make(twin)
    other.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        assert torch.equal(optimizer.step(lambda: loss_of(model)), other.step(lambda: loss_of(twin)))
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert len(held) == 4
