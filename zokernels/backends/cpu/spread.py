"""spread on the host: the combine kernel with an output for each direction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms
from .isa import current_isa


def spread(out: Tensor, x: Tensor, terms: Terms) -> None:
    torch.ops.zokernels_cpu.spread(out, x, *terms.packed, current_isa())
