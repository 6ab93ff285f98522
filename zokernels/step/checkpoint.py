"""What ``state_dict`` holds beyond torch's own entries, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..checks import fail, is_integer
from ..contract import CONTRACT
from .groups import check_groups
from .roles import OptimizerView

#: The entries of "zo", and what they may be.
_OWN: dict[str, Callable[[Any], bool]] = {
    "contract": lambda v: isinstance(v, str),
    "seed": lambda v: is_integer(v, -(2**63), 2**64 - 1),
    "step": lambda v: is_integer(v, 0, 2**63 - 1),
    "skipped_steps": lambda v: is_integer(v, 0, 2**63 - 1),
    "rule": lambda v: isinstance(v, Mapping) and isinstance(v.get("groups"), Mapping) and "name" in v,
}
_MAY_HAVE: dict[str, Callable[[Any], bool]] = {
    "log": lambda v: isinstance(v, Mapping) and {*map(type, map(v.get, ("step", "sha256")))} == {int, str},
}


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


def from_groups(op: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What :func:`with_own_state` made, or what a tool has left of it, as torch loads it.

    Raises ValueError where it has not that form at all.
    """
    groups, states = (
        (state_dict.get("param_groups"), state_dict.get("state"))
        if isinstance(state_dict, Mapping)
        else (None, None)
    )
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) for g in groups):
        fail(op, "state_dict", "'param_groups', a list of dicts", repr(groups)[:200])
    if not isinstance(states, Mapping) or not all(isinstance(s, Mapping) for s in states.values()):
        fail(op, "state_dict", "'state', a dict of a dict for each parameter", repr(states)[:200])
    groups = [{key: v for key, v in group.items() if key != "zo"} for group in state_dict["param_groups"]]
    found = [group["zo"] for group in state_dict["param_groups"] if "zo" in group][:1]
    zo = {"zo": found[0]} if found and "zo" not in state_dict else {}
    return {**state_dict, "param_groups": groups, **zo}


def check_state_dict(optimizer: OptimizerView, state_dict: dict[str, Any]) -> None:
    """Raises where ``state_dict`` is of another optimizer, contract or list of parameters."""
    op, zo, groups = optimizer.op, state_dict.get("zo"), state_dict["param_groups"]
    if zo is None:
        fail(
            op,
            "state_dict",
            "an entry 'zo' (as zokernels.optim writes)",
            f"entries {sorted(map(str, state_dict))}",
        )
    if not isinstance(zo, Mapping) or not zo.keys() >= _OWN.keys():
        fail(op, "state_dict: zo", f"the entries {sorted(_OWN)}", repr(zo)[:200])
    if zo["contract"] != CONTRACT:
        fail(op, "state_dict", f"noise contract {CONTRACT!r}", repr(zo["contract"]))
    for key, is_valid in (_OWN | _MAY_HAVE).items():
        if key in zo and not is_valid(zo[key]):
            fail(op, f"state_dict: zo.{key}", "a valid value", repr(zo[key])[:200])
    needed = {"params", "streams", *(optimizer.defaults.keys() - {"differentiable"})}  # which torch adds
    for group in groups:
        if missing := needed - group.keys():
            fail(op, "state_dict: param_groups", f"the entries {sorted(needed)}", f"no {min(missing)!r}")
    check_groups(op, optimizer.param_groups, groups)
    for group in groups:
        optimizer.rule.check(op, group)
    optimizer.rule.check_state_dict(optimizer, zo["rule"])
    for group, ours in zip(groups, optimizer.param_groups):  # noqa: B905  torch compares their numbers
        for index, p in zip(group["params"], ours["params"]):  # noqa: B905
            _check_state_of(optimizer, p, index, state_dict["state"].get(index, {}))


def _check_state_of(optimizer: OptimizerView, p: Tensor, index: Any, saved: Mapping[str, Any]) -> None:
    """Raises where ``saved`` cannot be the state of ``p``, number ``index`` of the ``state_dict``."""
    here = optimizer.state.get(p, {})
    for key, value in saved.items():
        like = here.get(key, p if key in optimizer.rule.states else value)
        if not isinstance(value, Tensor) or value.shape != like.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:200]
            expected = f"a tensor of shape {tuple(like.shape)}" if isinstance(like, Tensor) else "a tensor"
            fail(optimizer.op, f"state_dict: state[{index}][{key!r}]", expected, got)


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
