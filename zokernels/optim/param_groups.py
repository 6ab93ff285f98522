"""Parameter groups as the authors of methods make them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Biases and the weights of normalisation layers, as their names say: nanoGPT, LLaMA, OPT, GPT-2, BERT.
NO_DECAY = r"(?i)(?:^|[._])bias$|norm|(?:^|\.)ln_"


def groups_without(params: Iterable[Any], others: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """``params``, without those that the optimizer ``others`` has: what is left for zeroth-order steps.

    Args:
        params: ``model.named_parameters()``, parameters, or group dicts of either.

    Returns: group dicts, of which an empty one is left out.

    Example::

        head = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
        opt = ZOSGD(groups_without(model.named_parameters(), head), lr=1e-6, first_order=head)
    """
    theirs = {id(p) for group in others.param_groups for p in group["params"]}
    listed = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    of = lambda entry: entry[1] if isinstance(entry, tuple) else entry
    left = [{**g, "params": [e for e in g["params"] if id(of(e)) not in theirs]} for g in groups]
    return [group for group in left if group["params"]]


def decay_groups(
    named: Iterable[tuple[str, Tensor]], weight_decay: float, exempt: str = NO_DECAY
) -> list[dict[str, Any]]:
    """Two parameter groups: one with ``weight_decay``, and one without for biases and norms.

    Noise depends on the names alone, so a run with these groups has the z of a run without them.

    Args:
        named: ``model.named_parameters()``.
        exempt: regular expression, searched in the names, of the parameters that do not decay.

    Returns: the groups in this order, of which an empty one is left out.

    Example::

        opt = ZOSGD(decay_groups(model.named_parameters(), weight_decay=0.1), lr=1e-6)

    The trainers of MeZO, LOZO and FedKSeed exempt the same.
    """
    pattern = re.compile(exempt)
    decays: list[tuple[str, Tensor]] = []
    stays: list[tuple[str, Tensor]] = []
    for name, p in named:
        (stays if pattern.search(name) else decays).append((name, p))
    groups = ({"params": decays, "weight_decay": weight_decay}, {"params": stays, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
