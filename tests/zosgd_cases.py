"""Models, data and plain arithmetic for the tests of ZOSGD."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zokernels.backends.reference.combine import fma
from zokernels.backends.reference.noise import uniform16
from zokernels.backends.reference.rounding import round_stochastic
from zokernels.contract import DOMAIN_ROUNDING

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("restore", ["exact", "inplace"])


def mlp(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 3)).to(dtype)


def batch(n=16):
    torch.manual_seed(2)
    return torch.randn(n, 6), torch.randint(3, (n,))


def loss_of(model, x, y):
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a, b):
    as_ints = {2: torch.int16, 4: torch.int32}
    return len(a) == len(b) and all(
        torch.equal(p.view(as_ints[p.itemsize]), q.view(as_ints[q.itemsize]))
        for p, q in zip(a, b, strict=True)
    )


def combined(theta, z, c, *, decay=None, stochastic_seed=None, stream=0):
    """The contract's combine, with z given: one and its coefficient, or a tuple of each."""
    acc = theta.float() if decay is None else torch.tensor(decay, dtype=torch.float32) * theta.float()
    for noise, coeff in zip(z, c, strict=True) if isinstance(c, tuple) else ((z, c),):
        acc = fma(torch.tensor(coeff, dtype=torch.float32).expand(acc.shape), noise, acc)
    if stochastic_seed is None:
        return acc.to(theta.dtype)
    u16 = uniform16(torch.tensor(stochastic_seed), stream, DOMAIN_ROUNDING, 0, acc.numel()).view_as(acc)
    return round_stochastic(acc, u16, theta.dtype)
