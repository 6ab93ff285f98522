"""torch.distributed.checkpoint's functions for the state of an optimizer, in one process."""

from __future__ import annotations

import pytest
import torch

from zokernels.optim import ZOSGD, ZOAdamW

dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

KINDS = {
    "plain": (ZOSGD, {}),
    "momentum": (ZOSGD, {"momentum": 0.9}),
    "window": (ZOSGD, {"momentum": 0.9, "window": 3}),
    "Adam": (ZOAdamW, {}),
}


def make(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer, options = KINDS[kind]
    return model, optimizer(model.named_parameters(), lr=0.01, seed=5, **options)


def take(model, optimizer, steps):
    for _ in range(steps):
        optimizer.step(lambda: model(torch.ones(1, 3)).square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_through_its_functions(kind, tmp_path):
    """get, save, load, set: a fresh optimizer then takes the steps of the first one, with the same bits."""
    model, optimizer = make(kind)
    take(model, optimizer, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    take(model, optimizer, 2)
    ours, again = make(kind)
    take(ours, again, 1)
    ours.load_state_dict(weights)
    loaded = {"optimizer": get_optimizer_state_dict(ours, again)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(ours, again, loaded["optimizer"])
    assert (again.step_count, again.seed) == (3, 5)
    assert all("zo" not in group for group in again.param_groups)
    take(ours, again, 2)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_optimizer_is_not_changed_by_being_read(kind):
    model, optimizer = make(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.step_count == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


def test_parameters_on_meta_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, device="meta"), torch.nn.Linear(4, 2, device="meta"))
    with pytest.raises(ValueError, match=r"'0\.weight': expected a parameter with memory, got one on meta"):
        ZOSGD(model.named_parameters(), lr=0.1).step(lambda: model(torch.ones(1, 3)).sum())
