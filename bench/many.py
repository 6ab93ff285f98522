"""many: K = 64 directions in one pass.

Here the arithmetic is the limit, not the memory: noise elements a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from .baselines import PERTURB, copy_in_place
from .combine import DTYPES, Buffers, Compared, Form, eager, forked_rng, kernel, row, usable_backends
from .registry import Row, Settings, register
from .timing import measure

K = 64

#: How many elements: fewer than for one direction, since each takes the work of 64 passes.  Four buffers of
#: bf16 are still five times as large as the L2 cache of a GPU.
NUMEL = {"cpu": 1 << 20, "cuda": 1 << 26}


@register("many", f"theta + the sum of {K} directions in one pass: noise elements a second")
def run(settings: Settings) -> Iterator[Row]:
    backends = usable_backends(settings.device, settings.backends)
    numel = min(settings.numel, NUMEL[settings.device])
    settings = replace(settings, numel=numel, baseline_numel=min(numel, settings.baseline_numel))
    threads_before = torch.get_num_threads()
    form = Form(True, K, "nearest")
    try:
        for threads, dtype in itertools.product(settings.threads, settings.dtypes or ("bf16", "fp32")):
            torch.set_num_threads(threads)
            buffers = Buffers(settings, DTYPES[dtype])
            for dist in settings.dists or ("normal", "rademacher"):
                kernels = {b: kernel(form, b, dist, buffers, settings.device) for b in backends}
                small = settings.baseline_numel
                candidates: dict = {f"loop {n}": eager(fn, dist, buffers, small) for n, fn in PERTURB.items()}
                candidates["copy_inplace"] = lambda b=buffers: copy_in_place(b.next())
                with forked_rng(settings.device), torch.no_grad():
                    times = measure(
                        candidates | kernels, settings.device, settings.seconds, settings.min_rounds
                    )
                compared = Compared({n: (small, times[f"loop {n}"]) for n in PERTURB}, numel, times)
                where = {"device": settings.device, "dtype": dtype, "dist": dist, "threads": threads}
                for backend in kernels:
                    what = {"op": "many", "backend": backend, "rounding": "nearest", "k": K} | where
                    found = row(what, times[backend], numel, True, compared)
                    yield {**found, "noise_per_s": K * numel / times[backend].p50}
    finally:
        torch.set_num_threads(threads_before)
