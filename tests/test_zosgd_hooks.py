"""torch's wrapper of ``step``, with hooks and a label for profilers: it is left out where nobody sees it."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from zokernels.optim import LOZO, ZOSGD


def _optimizer(make=ZOSGD):
    p = torch.nn.Parameter(torch.arange(1.0, 13.0).reshape(3, 4))
    return make([p], lr=0.1, seed=3), lambda: p.square().sum()


@pytest.mark.parametrize("make", [ZOSGD, LOZO])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_are_called_around_a_step_while_they_are_registered(make, everywhere):
    optimizer, closure = _optimizer(make)
    optimizer.step(closure)
    told = []
    before = lambda one, args, kwargs: told.append(("before", one, optimizer.step_count))
    after = lambda one, args, kwargs: told.append(("after", one, optimizer.step_count))
    if everywhere:
        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    else:
        handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        optimizer.step(closure)
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step(closure)
    assert [(name, count) for name, _, count in told] == [("before", 1), ("after", 2)]
    assert all(one is optimizer for _, one, _ in told)


def test_a_pre_hook_may_give_another_closure():
    optimizer, closure = _optimizer()
    optimizer.register_step_pre_hook(lambda one, args, kwargs: ((one, lambda: 7 + 0 * closure()), kwargs))
    assert optimizer.step(closure) == 7


def test_a_profiler_sees_the_step_by_its_name():
    optimizer, closure = _optimizer()
    optimizer.step(closure)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(closure)
    assert [e.count for e in profile.key_averages() if e.key == "Optimizer.step#ZOSGD.step"] == [1]


def test_a_class_with_a_step_of_its_own_has_hooks_as_any_of_torch():
    class Counting(ZOSGD):
        def step(self, closure):
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    optimizer, closure = _optimizer(Counting)
    told = []
    handle = optimizer.register_step_post_hook(lambda *args: told.append(optimizer.calls))
    optimizer.step(closure)
    handle.remove()
    optimizer.step(closure)
    assert set(told) == {1}
    assert (optimizer.calls, optimizer.step_count) == (2, 2)
