"""published: the sizes for which others have published times, and their share of the bandwidth beside ours.

One tensor, one pass in place, noise included.  ``of peak`` is the share of what the card's memory can move by
its clock and bus width; the published share is of their card's data sheet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from . import machine
from .baselines import PERTURB, copy_in_place
from .combine import DTYPES, Buffers, Compared, Form, eager, forked_rng, kernel, row, usable_backends
from .registry import Row, Settings, register
from .timing import measure
from .workloads import PUBLISHED

FORMS = (Form(True, 1, "nearest"), Form(True, 1, "stochastic"))


@register(
    "published",
    "the sizes of FlashOpt's published times, in place, and its share of the bandwidth beside ours",
)
def run(settings: Settings) -> Iterator[Row]:
    backends = usable_backends(settings.device, settings.backends)
    peak = machine.peak_bandwidth() if settings.device == "cuda" else None
    threads_before = torch.get_num_threads()
    try:
        for threads, (name, theirs) in itertools.product(settings.threads, PUBLISHED.items()):
            torch.set_num_threads(threads)
            numel = settings.numel if settings.tiny else theirs.numel
            sized = replace(settings, numel=numel, baseline_numel=min(numel, settings.baseline_numel))
            buffers = Buffers(sized, DTYPES[theirs.dtype])
            kernels = {
                (f, b): kernel(f, b, theirs.dist, buffers, settings.device)
                for f, b in itertools.product(FORMS, backends)
            }
            small = sized.baseline_numel
            candidates: dict = {n: eager(fn, theirs.dist, buffers, small) for n, fn in PERTURB.items()}
            candidates["copy_inplace"] = lambda b=buffers: copy_in_place(b.next())
            with forked_rng(settings.device), torch.no_grad():
                times = measure(candidates | kernels, settings.device, settings.seconds, settings.min_rounds)
            compared = Compared({n: (small, times[n]) for n in PERTURB}, numel, times)
            for form, backend in kernels:
                what = {
                    "op": "published",
                    "workload": name,
                    "backend": backend,
                    "rounding": form.rounding,
                    "k": 1,
                }
                what |= {
                    "device": settings.device,
                    "dtype": theirs.dtype,
                    "dist": theirs.dist,
                    "threads": threads,
                }
                found = row(what, times[form, backend], numel, True, compared)
                found["of_peak"] = found["bytes"] / found["p50"] / peak if peak else None
                found["published"] = {"gpu": theirs.gpu, "p50": theirs.seconds, "of_peak": theirs.of_peak}
                yield found
    finally:
        torch.set_num_threads(threads_before)
