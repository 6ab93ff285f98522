"""Turns an optimizer into the header of its log, and compares the two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..contract import CONTRACT, canonical_name
from ..step.groups import takes_part
from ..step.roles import OptimizerView
from ..version import __version__
from .digests import digest
from .format import canonical
from .parts import PARTS, completed, describe, dtype_name, plain, spoken


def _parameter(group: dict[str, Any], index: int) -> dict[str, Any]:
    p, names = group["params"][index], group.get("param_names")
    return {
        "name": canonical_name(names[index]) if names else None,
        "stream": group["streams"][index],
        "shape": list(p.shape),
        "dtype": dtype_name(p.dtype),
    }


def option_keys(optimizer: OptimizerView, group: dict[str, Any]) -> list[str]:
    """The keys of a group's own settings, without those that torch or a scheduler adds."""
    return [
        key for key in (*optimizer.defaults, "bits") if key in group and key not in ("lr", "differentiable")
    ]


def settings(optimizer: OptimizerView) -> tuple[Any, ...]:
    """What must stay as it is while a log is written.  It is quick to make and to compare."""
    return tuple(
        (
            tuple(group[key] for key in option_keys(optimizer, group)),
            isinstance(group["lr"], Tensor),
            tuple(group["streams"]),
            tuple(takes_part(group, p) for p in group["params"]),
        )
        for group in optimizer.param_groups
    )


def header_of(optimizer: OptimizerView, base: bool = True) -> dict[str, Any]:
    """The header of a log that begins now.  ``base``: include the digests of the weights."""
    groups = []
    for group in optimizer.param_groups:
        params = [_parameter(group, i) for i in range(len(group["params"]))]
        for entry, p in zip(params, group["params"], strict=True):
            entry["sha256"] = digest(p) if base and takes_part(group, p) else None
        options = {key: plain(group[key]) for key in option_keys(optimizer, group)}
        groups.append({"options": options, "lr_is_tensor": isinstance(group["lr"], Tensor), "params": params})
    rule, estimator = optimizer.rule, optimizer.estimator
    devices = {p.device.type for g in optimizer.param_groups for p in g["params"] if takes_part(g, p)}
    return {
        "contract": CONTRACT,
        "created_by": f"zokernels {__version__}",
        "optimizer": optimizer.op,
        "seed": optimizer.seed,
        "start": optimizer.step_count,
        "restore": optimizer.restore,
        **({"cohort": optimizer.members_at_once} if optimizer.restore == "products" else {}),
        "gated": devices != {"cpu"},
        "losses": len(estimator.points()) if rule.reads_losses else 0,
        **{argument: describe(getattr(optimizer, argument)) for argument in PARTS},
        **({"part": True} if optimizer.part else {}),
        "groups": groups,
    }


def whole_header(optimizer: OptimizerView, base: bool = True) -> dict[str, Any]:
    """:func:`header_of` all stages of a pipeline together.

    Each group has the parameters of the first stage, and then those that the next stages add.  All ranks call
    this together.
    """
    header, team = header_of(optimizer, base), optimizer.team
    if team.stages == 1:
        return header
    stages = dict(sorted(zip(team.stage_of, team.all_gather_object(header), strict=True), key=lambda s: s[0]))
    for i, group in enumerate(header["groups"]):
        params = {p["name"]: p for stage in reversed(stages.values()) for p in stage["groups"][i]["params"]}
        order = dict.fromkeys(p["name"] for stage in stages.values() for p in stage["groups"][i]["params"])
        group["params"] = [params[name] for name in order]
    return header


def own_part(optimizer: OptimizerView, header: dict[str, Any]) -> dict[str, Any]:
    """``header`` with the parameters that are here: in a pipeline's log, those of this stage."""
    if optimizer.team.stages == 1:
        return header
    groups = []
    for group, ours in zip(header["groups"], optimizer.param_groups, strict=True):
        params = {p["name"]: p for p in group["params"]}
        groups.append(
            {**group, "params": [params[canonical_name(name)] for name in ours.get("param_names", ())]}
        )
    return {**header, "groups": groups}


def check_same_run(optimizer: OptimizerView, header: dict[str, Any]) -> None:
    """Raises where ``optimizer`` differs from the log's in more than step, learning rates and weights."""
    ours = json.loads(canonical(whole_header(optimizer, base=False)))
    parts = {argument: completed(argument, header[argument]) for argument in PARTS}
    theirs = {
        **header,
        **parts,
        "groups": [dict(g, params=[dict(p) for p in g["params"]]) for g in header["groups"]],
    }
    for group in theirs["groups"]:
        for p in group["params"]:
            p["sha256"] = None
    has_names = lambda each: any(p["name"] is not None for g in each["groups"] for p in g["params"])
    if has_names(theirs) and not has_names(ours):
        expected = "model.named_parameters(), because the log has names"
        fail("trajectory", "resume: params", expected, "parameters without names")
    streams = [[[p["stream"] for p in g["params"]] for g in each["groups"]] for each in (ours, theirs)]
    if streams[0] != streams[1] and list(map(len, streams[0])) == list(map(len, streams[1])):
        where = "'stream' of each parameter in read(path).header['groups'], as 'streams' of each group"
        fail("trajectory", "resume: streams", f"those of the log ({where})", "others, which draw other noise")
    for key in sorted(
        theirs, key=lambda key: key == "groups"
    ):  # first what groups depend on, such as the rule
        if key not in ("created_by", "start", "gated", "cohort") and ours.get(key) != theirs[key]:
            where, their, our = key, theirs[key], ours.get(key)
            if key == "groups":
                where, their, our = _first_difference(key, their, our)
            expected = f"that of the log, {spoken(their)[:200]}"
            fail("trajectory", f"resume: {where}", expected, spoken(our)[:200])
    for recorded, group in zip(own_part(optimizer, header)["groups"], optimizer.param_groups, strict=True):
        for i, (p, param) in enumerate(zip(recorded["params"], group["params"], strict=True)):
            if (trained := p["sha256"] is not None) != takes_part(group, param):
                which = f"resume: params: {p['name'] or i}"
                if trained:
                    expected = (
                        "requires_grad=True, as in the log (peft: from_pretrained(..., is_trainable=True))"
                    )
                    fail("trajectory", which, expected, "a frozen parameter")
                fail("trajectory", which, "a frozen parameter, as in the log", "one that is trained")


def _first_difference(where: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The first place at which two values of JSON differ, and what they have there."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            if a.get(key) != b.get(key):
                return _first_difference(f"{where}: {key}", a.get(key), b.get(key))
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            if one != other:
                return _first_difference(f"{where}[{i}]", one, other)
    return where, a, b


def check_base(header: dict[str, Any], tensors: Sequence[Sequence[Tensor | None]]) -> None:
    """Raises where ``tensors`` (of each group) do not hold the weights that the run began with."""
    for group, ours in zip(header["groups"], tensors, strict=True):
        for i, (p, tensor) in enumerate(zip(group["params"], ours, strict=True)):
            if p["sha256"] is None:
                continue
            assert tensor is not None  # match() found it
            if digest(tensor, getattr(torch, p["dtype"])) != p["sha256"]:
                label = p["name"] or f"parameter {i}"
                fail("trajectory", label, "the base weights of the run (SHA-256)", "other values")
