"""combine and combine_: one pass theta + sum_k c_k z_k, against a copy of the same bytes and against eager loops.

Modelled bytes: one read and one write of theta.  A K = 2 row does the work of two eager passes and is compared with
two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import zokernels
from zokernels.backends import BackendUnavailable, get
from zokernels.backends.registry import NAMES

from .baselines import PERTURB, copy_in_place
from .registry import Row, Settings, register
from .timing import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS, SEED = 1e-3, 20240229


@dataclass(frozen=True)
class Form:
    """A way to call the op: in place or not, how many directions, which rounding."""

    inplace: bool
    k: int
    rounding: str

    @property
    def name(self) -> str:
        return "combine_" if self.inplace else "combine"


def forms(dtype: str) -> list[Form]:
    found = [Form(True, 1, "nearest"), Form(False, 1, "nearest"), Form(True, 2, "nearest")]
    # fp32 has nothing to round: a stochastic row would repeat the nearest one
    return found if dtype == "fp32" else [*found, Form(True, 1, "stochastic")]


def usable_backends(device: str, wanted: tuple[str, ...]) -> list[str]:
    """The backends to measure.  Unasked: all that load, except the slow reference and the interpreter."""
    if wanted:
        for name in wanted:
            if device not in get(name).devices:
                raise BackendUnavailable(f"backend {name!r} does not run on {device}")
        return list(wanted)
    found = []
    for name in NAMES:
        if name == "reference" or (name == "triton" and device == "cpu"):
            continue
        try:
            if device in get(name).devices:
                found.append(name)
        except BackendUnavailable:
            continue
    return found or ["reference"]


class Buffers:
    """Tensors used in turn, so that no call finds its input in a cache."""

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        theta = torch.randn(settings.numel, generator=generator).to(settings.device, dtype)
        self.thetas = [theta, *(theta.clone() for _ in range(settings.buffers - 1))]
        self.out = torch.empty_like(theta)
        self._turn = itertools.cycle(range(settings.buffers))

    def next(self) -> Tensor:
        return self.thetas[next(self._turn)]


def _kernel(form: Form, backend: str, dist: str, buffers: Buffers, device: str) -> Callable[[], None]:
    seeds = torch.arange(SEED, SEED + form.k, dtype=torch.int64, device=device)
    coeffs = torch.full((form.k,), EPS, dtype=torch.float32, device=device)
    options = dict(streams=[7], dist=dist, rounding=form.rounding)
    if form.rounding == "stochastic":
        options["rounding_seed"] = seeds[:1]

    def call() -> None:
        with zokernels.backend(backend):
            if form.inplace:
                zokernels.combine_(buffers.next(), seeds, coeffs, **options)
            else:
                zokernels.combine(buffers.out, buffers.next(), seeds, coeffs, **options)

    return call


def _eager(perturb: Callable[..., None], dist: str, buffers: Buffers, numel: int) -> Callable[[], None]:
    return lambda: perturb([buffers.next()[:numel]], 1, EPS, SEED, dist)


@register("combine", "theta + sum_k c_k z_k in one pass: combine_ (in place) and combine (out of place)")
def run(settings: Settings) -> Iterator[Row]:
    """Rows for every thread count, dtype, dist, form and backend; each ran in turns with what it is compared with."""
    backends = usable_backends(settings.device, settings.backends)
    small = min(settings.numel, settings.baseline_numel)
    threads_before = torch.get_num_threads()
    try:
        for threads, dtype in itertools.product(settings.threads, settings.dtypes):
            torch.set_num_threads(threads)
            buffers = Buffers(settings, DTYPES[dtype])
            for dist in settings.dists:
                kernels = {
                    (f, b): _kernel(f, b, dist, buffers, settings.device) for f in forms(dtype) for b in backends
                }
                candidates: dict = {name: _eager(fn, dist, buffers, small) for name, fn in PERTURB.items()}
                candidates["copy_inplace"] = lambda b=buffers: copy_in_place(b.next())
                candidates["copy"] = lambda b=buffers: b.out.copy_(b.next())
                with torch.random.fork_rng(devices=[0] if settings.device == "cuda" else []), torch.no_grad():
                    times = measure(candidates | kernels, settings.device, settings.seconds, settings.min_rounds)
                for form, backend in kernels:
                    yield _row(settings, form, backend, dtype, dist, threads, small, times)
    finally:
        torch.set_num_threads(threads_before)


def _row(
    settings: Settings, form: Form, backend: str, dtype: str, dist: str, threads: int, small: int, times: dict
) -> Row:
    mine, copy_name = times[form, backend], "copy_inplace" if form.inplace else "copy"
    moved = 2 * settings.numel * DTYPES[dtype].itemsize
    per_element = mine.p50 / settings.numel
    return {
        "op": form.name,
        "backend": backend,
        "device": settings.device,
        "dtype": dtype,
        "dist": dist,
        "rounding": form.rounding,
        "k": form.k,
        "threads": threads,
        "numel": settings.numel,
        **asdict(mine),
        "bytes": moved,
        "gb_per_s": moved / mine.p50 / 1e9,
        "ns_per_element": per_element * 1e9,
        "copy": {"name": copy_name, "numel": settings.numel, **asdict(times[copy_name])},
        "copy_fraction": times[copy_name].p50 / mine.p50,
        "baselines": {name: {"numel": small, "passes": form.k, **asdict(times[name])} for name in PERTURB},
        "ratio": {name: form.k * times[name].p50 / small / per_element for name in PERTURB},
    }
