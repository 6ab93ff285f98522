"""Turns the header of a log into an optimizer, over weights that are matched with it by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import fail
from ..contract import canonical_name
from ..step.step import StepOptimizer
from .parts import PARTS, check_rank, dtype_name, rebuild
from .settings import option_keys


def _labels(header: dict[str, Any]) -> list[list[str | int]]:
    """The names of the parameters of each group, or their numbers where the run had no names."""
    count, labels = 0, []
    for group in header["groups"]:
        labels.append(
            [p["name"] if p["name"] is not None else count + i for i, p in enumerate(group["params"])]
        )
        count += len(group["params"])
    return labels


def match(
    header: dict[str, Any], weights: object, dtype: torch.dtype | None = None
) -> list[list[Tensor | None]]:
    """The tensors of ``weights`` that belong to each group of a log; None for an untrained parameter.

    ``weights`` are a module, a mapping or pairs by name, or tensors in the optimizer's order.  They must have
    the log's names and shapes, and its dtypes, or ``dtype``.
    """
    by_name = any(p["name"] is not None for g in header["groups"] for p in g["params"])
    items: Any
    if isinstance(weights, nn.Module):
        named = (*weights.named_parameters(), *weights.named_buffers())
        items = named if by_name else enumerate(weights.parameters())
    elif isinstance(weights, Mapping):
        items = weights.items()
    else:
        listed = list(weights)  # type: ignore[call-overload]
        items = enumerate(listed) if all(isinstance(w, Tensor) for w in listed) else listed
    found = {canonical_name(key) if isinstance(key, str) else key: tensor for key, tensor in items}
    groups, missing = [], []
    for group, labels in zip(header["groups"], _labels(header), strict=True):
        tensors: list[Tensor | None] = []
        for p, label in zip(group["params"], labels, strict=True):
            tensor = found.get(label) if p["sha256"] is not None else None
            if p["sha256"] is not None and tensor is None:
                missing.append(repr(label))
            elif tensor is not None:
                _check_tensor(label, tensor, p["shape"], p["dtype"] if dtype is None else dtype_name(dtype))
            tensors.append(tensor)
        groups.append(tensors)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        got = "none"
        if found and not by_name and not any(isinstance(key, int) for key in found):
            got = "names, which the log has not: give the tensors in the optimizer's order"
        elif len(missing) == sum(p["sha256"] is not None for g in header["groups"] for p in g["params"]):
            got = "not one of them: they are probably another model's"
        expected = f"every trained parameter of the log, {', '.join(missing[:5])}{more}"
        fail("replay_", "weights", expected, got)
    return groups


def _check_tensor(label: str | int, tensor: Tensor, shape: list[int], dtype: str) -> None:
    if list(tensor.shape) != shape:
        fail("replay_", str(label), f"shape {tuple(shape)}", tuple(tensor.shape))
    if dtype_name(tensor.dtype) != dtype:
        fail("replay_", str(label), f"dtype {dtype}", dtype_name(tensor.dtype))


def optimizer_of(
    header: dict[str, Any], tensors: Sequence[Sequence[Tensor | None]], restore: str, **given: object
) -> StepOptimizer:
    """The optimizer of the run, over ``tensors``.  Parameters that were not trained are empty ones.

    ``given``: parts (direction, subset) that a log cannot hold.
    """
    parts = {argument: rebuild(argument, header[argument], given.get(argument)) for argument in PARTS}
    groups = []
    for group, ours, labels in zip(header["groups"], tensors, _labels(header), strict=True):
        alias = lambda t: t.detach().requires_grad_(t.is_floating_point())
        params = [torch.empty(0, dtype=torch.uint8) if t is None else alias(t) for t in ours]
        lr = torch.zeros((), dtype=torch.float64) if group["lr_is_tensor"] else 0.0
        streams = [p["stream"] for p in group["params"]]
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in group["options"].items()}
        named = all(isinstance(label, str) for label in labels)
        groups.append({**options, "params": list(zip(labels, params, strict=True)) if named else params,
                       "lr": lr, "streams": streams})  # fmt: skip
    try:
        # A replay runs no forwards, and of "products" nothing but those is different.
        restore = "exact" if restore == "products" else restore
        optimizer = StepOptimizer(groups, {"lr": 0.0}, seed=header["seed"], restore=restore, **parts)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        fail("replay_", "log", "valid settings", str(error)[:200])
    for i, (group, made) in enumerate(zip(header["groups"], optimizer.param_groups, strict=True)):
        if (keys := sorted(option_keys(optimizer, made))) != sorted(group["options"]):
            expected = f"the settings {keys}"
            fail("replay_", f"log: groups[{i}]", expected, str(sorted(group["options"]))[:200])
    if given.get("direction") is None:
        check_rank(optimizer.direction, [t for ours in tensors for t in ours if t is not None])
    optimizer.run_state.load(header["seed"], header["start"], 0)
    return optimizer


def is_sgd(header: dict[str, Any]) -> bool:
    """Whether the run is a sum of dense noise: theta <- decay theta + sum_k c_k z_k."""
    return header["rule"]["class"] in ("SGD", "Conservative") and header["direction"]["class"] == "Direction"
