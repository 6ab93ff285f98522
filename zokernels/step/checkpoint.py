"""What ``state_dict`` holds beyond torch's own entries, and how it comes back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import fail
from ..contract import CONTRACT
from .groups import check_groups
from .roles import OptimizerView


def own_state(optimizer: OptimizerView) -> dict[str, Any]:
    """The entry "zo": plain numbers and lists."""
    state = optimizer.run_state
    counters = {"seed": state.seed, "step": state.step, "skipped_steps": int(state.skipped)}
    own = {"contract": CONTRACT, **counters, "rule": optimizer.rule.state_dict()}
    mark = optimizer.log.mark()
    return own if mark is None else {**own, "log": mark}


def with_own_state(state_dict: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` with the entry "zo", and the same in each group.

    ``torch.distributed.checkpoint`` passes on torch's own two entries alone, and the groups' entries with
    them."""
    groups = [{**group, "zo": own} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups, "zo": own}


def from_groups(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What :func:`with_own_state` made, or what a tool has left of it, as torch loads it."""
    groups = [{key: v for key, v in group.items() if key != "zo"} for group in state_dict["param_groups"]]
    found = [group["zo"] for group in state_dict["param_groups"] if "zo" in group][:1]
    zo = {"zo": found[0]} if found and "zo" not in state_dict else {}
    return {**state_dict, "param_groups": groups, **zo}


def check_state_dict(optimizer: OptimizerView, state_dict: dict[str, Any]) -> None:
    """Raises where ``state_dict`` is of another optimizer, contract or list of parameters."""
    zo, groups = state_dict.get("zo"), state_dict["param_groups"]
    if zo is None:
        fail(
            optimizer.op,
            "state_dict",
            "an entry 'zo' (as zokernels.optim writes)",
            f"entries {sorted(state_dict)}",
        )
    if zo["contract"] != CONTRACT:
        fail(optimizer.op, "state_dict", f"noise contract {CONTRACT!r}", repr(zo["contract"]))
    check_groups(optimizer.op, optimizer.param_groups, groups)
    for group in groups:
        optimizer.rule.check(optimizer.op, group)
    optimizer.rule.check_state_dict(optimizer, zo["rule"])


class Held:
    """The tensors of an optimizer whose addresses a CUDA graph may hold.  Loading writes to them in place.

    It is made before torch loads a ``state_dict``, because torch puts other tensors in their places.
    """

    def __init__(self, optimizer: OptimizerView) -> None:
        self.optimizer, self.capturable = optimizer, optimizer.run_state.capturable
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.states = (
            {p: dict(of_param) for p, of_param in optimizer.state.items()} if self.capturable else {}
        )

    def load(self, state_dict: dict[str, Any]) -> None:
        """Loads what torch has not loaded, or not as it was saved."""
        zo = state_dict["zo"]
        self._load_states(state_dict)
        self.optimizer.rule.load_state_dict(self.optimizer, zo["rule"])
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            if self.capturable and isinstance(lr, Tensor):
                group["lr"] = lr.fill_(group["lr"])
        self.optimizer.run_state.load(zo["seed"], zo["step"], zo["skipped_steps"])
        self.optimizer.log.expected = zo.get("log")

    def _load_states(self, state_dict: dict[str, Any]) -> None:
        """Loads the states with their own bits and dtypes; torch has cast them to their parameters' dtype."""
        states, initial = self.optimizer.state, self.optimizer.rule.states
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        indices = [i for g in state_dict["param_groups"] for i in g["params"]]
        for p, index in zip(params, indices, strict=True):
            loaded = state_dict["state"].get(index, {})
            for key, value in loaded.items():
                if isinstance(value, Tensor):
                    states[p][key] = value.detach().to(p.device, copy=True)
            for key, tensor in self.states.get(p, {}).items():
                if key in loaded and (tensor.shape, tensor.dtype) == (loaded[key].shape, loaded[key].dtype):
                    states[p][key] = tensor.copy_(loaded[key])
                elif key not in loaded and key in initial:
                    states[p][key] = tensor.fill_(initial[key])
