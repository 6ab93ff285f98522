"""host: what a call costs before any arithmetic: tensors so small that only the way to the kernel takes time.

A call that costs 20 us on the host is lost among the passes of a large model, but it is what a GPU waits for
between two short kernels.  The rows time

* ``combine_`` on one tensor of 8 elements: checks, dispatch and one launch;
* ``combine_`` on 400 such tensors: the same, and what each more tensor of a list costs;
* ``ZOSGD.step`` of a model of two layers of 8 weights a side, exact and in place, its two forwards included.

Each sample is a loop of several calls, because one call is too short for the clock; a row states seconds a
call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import nn

import zokernels
from zokernels.optim import ZOSGD

from .combine import EPS, SEED, forked_rng, usable_backends
from .registry import Row, Settings, register
from .timing import measure

#: Calls in one sample, by form: about a millisecond of work each.
CALLS = {"1 tensor": 32, "400 tensors": 2, "step exact": 2, "step inplace": 2}


def _combine(count: int, device: str) -> Callable[[], None]:
    tensors = [torch.ones(8, device=device) for _ in range(count)]
    seeds = torch.tensor([SEED], dtype=torch.int64, device=device)
    coeffs = torch.tensor([EPS], device=device)
    return lambda: zokernels.combine_(tensors, seeds, coeffs, streams=list(range(count)))


def _step(restore: str, device: str) -> Callable[[], None]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(device)
    optimizer = ZOSGD(model.named_parameters(), lr=1e-6, eps=EPS, seed=SEED, restore=restore)
    inputs = torch.ones(1, 8, device=device)
    closure = lambda: model(inputs).square().mean()
    return lambda: optimizer.step(closure)


def _repeated(call: Callable[[], None], times: int, backend: str) -> Callable[[], None]:
    def calls() -> None:
        with zokernels.backend(backend):
            for _ in range(times):
                call()

    return calls


@register("host", "what a call costs on the host: combine_ on tiny tensors, a step of a tiny model")
def run(settings: Settings) -> Iterator[Row]:
    backends = usable_backends(settings.device, settings.backends)
    threads_before = torch.get_num_threads()
    try:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            with forked_rng(settings.device), torch.no_grad():
                forms = {
                    "1 tensor": _combine(1, settings.device),
                    "400 tensors": _combine(400, settings.device),
                    "step exact": _step("exact", settings.device),
                    "step inplace": _step("inplace", settings.device),
                }
                candidates = {
                    (form, backend): _repeated(forms[form], CALLS[form], backend)
                    for form, backend in itertools.product(forms, backends)
                }
                times = measure(candidates, settings.device, settings.seconds, settings.min_rounds)
            for (form, backend), of_sample in times.items():
                figures = {name: value and value / CALLS[form] for name, value in asdict(of_sample).items()}
                where = {"device": settings.device, "dtype": "fp32", "dist": "normal", "threads": threads}
                yield {
                    "op": "host",
                    "form": form,
                    "backend": backend,
                    **where,
                    **figures,
                    "rounds": of_sample.rounds,
                }
    finally:
        torch.set_num_threads(threads_before)
