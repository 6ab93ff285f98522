"""fan_out_: a pending update and both perturbed sides in one read of theta, beside combine_ and two calls of
combine.

The bytes of a row are those of one read and three writes of theta.  The three separate calls read theta three
times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

import zokernels

from .baselines import PERTURB
from .combine import DTYPES, EPS, SEED, Buffers, Compared, eager, forked_rng, row, usable_backends
from .registry import Row, Settings, register
from .timing import measure

ACCESSES = {"fused": 4, "composed": 6}


def _calls(backend: str, dist: str, buffers: Buffers, minus: Tensor) -> dict[str, Callable[[], None]]:
    device, plus, same = minus.device, buffers.out, {"streams": [7], "dist": dist}
    pending, probe = (torch.tensor([SEED + i], dtype=torch.int64, device=device) for i in range(2))
    update, up, down = (torch.tensor([c], device=device) for c in (-1e-6, EPS, -EPS))

    def fused() -> None:
        with zokernels.backend(backend):
            zokernels.fan_out_(buffers.next(), plus, minus, probe, up, seeds=pending, coeffs=update, **same)

    def composed() -> None:
        with zokernels.backend(backend):
            theta = buffers.next()
            zokernels.combine_(theta, pending, update, **same)
            zokernels.combine(plus, theta, probe, up, **same)
            zokernels.combine(minus, theta, probe, down, **same)

    return {"fused": fused, "composed": composed}


@register(
    "fan_out", "theta + pending update, and both perturbed sides, in one read: fused against three passes"
)
def run(settings: Settings) -> Iterator[Row]:
    backends = usable_backends(settings.device, settings.backends)
    small = min(settings.numel, settings.baseline_numel)
    threads_before = torch.get_num_threads()
    try:
        for threads, dtype in itertools.product(settings.threads, settings.dtypes or ("bf16", "fp32")):
            torch.set_num_threads(threads)
            buffers = Buffers(settings, DTYPES[dtype])
            minus = torch.empty_like(buffers.out)
            for dist in settings.dists or ("normal", "rademacher"):
                kernels = {(f, b): c for b in backends for f, c in _calls(b, dist, buffers, minus).items()}
                candidates: dict = {name: eager(fn, dist, buffers, small) for name, fn in PERTURB.items()}
                candidates["copy"] = lambda b=buffers: b.out.copy_(b.next())
                with forked_rng(settings.device), torch.no_grad():
                    times = measure(
                        candidates | kernels, settings.device, settings.seconds, settings.min_rounds
                    )
                compared = Compared({n: (small, times[n]) for n in PERTURB}, settings.numel, times)
                where = {"device": settings.device, "dtype": dtype, "dist": dist, "rounding": "nearest"}
                for form, backend in kernels:
                    what = {
                        "op": "fan_out_",
                        "form": form,
                        "backend": backend,
                        "k": 2,
                        "threads": threads,
                    } | where
                    mine, other = times[form, backend], times["composed", backend]
                    found = row(what, mine, settings.numel, False, compared, ACCESSES[form], passes=3)
                    found["baselines"]["composed"] = {"numel": settings.numel, "passes": 1, **asdict(other)}
                    found["ratio"]["composed"] = other.p50 / mine.p50
                    yield found
    finally:
        torch.set_num_threads(threads_before)
