"""combine and combine_: a pass theta + sum_k c_k z_k, beside a copy of the same bytes and beside eager loops.

The bytes of a row are those of one read and one write of theta.  A row of K = 2 does the work of two eager
passes, and is compared with two.  The baselines have rows of their own, of op "perturb_", which show their
bandwidth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import zokernels
from zokernels.backends import BackendUnavailable, get
from zokernels.backends.registry import NAMES

from .baselines import copy_in_place, usable
from .registry import Row, Settings, register, skip
from .timing import Times, measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS, SEED = 1e-3, 20240229


@dataclass(frozen=True)
class Form:
    """One way to call the op: in place or out of place, with how many directions, and with which rounding."""

    inplace: bool
    k: int
    rounding: str

    @property
    def name(self) -> str:
        return "combine_" if self.inplace else "combine"


def forms(dtype: str) -> list[Form]:
    found = [Form(True, 1, "nearest"), Form(False, 1, "nearest"), Form(True, 2, "nearest")]
    # fp32 has nothing to round: a stochastic row would repeat the nearest one
    return found if dtype == "fp32" else [*found, Form(True, 1, "stochastic"), Form(True, 2, "stochastic")]


def usable_backends(device: str, wanted: tuple[str, ...]) -> list[str]:
    """The backends to measure: those asked for, else all that load except the reference and Triton's
    interpreter.
    """
    if wanted:
        for name in wanted:
            if device not in get(name).devices:
                raise BackendUnavailable(f"backend {name!r} does not run on {device}")
        return list(wanted)
    found = []
    for name in NAMES:
        if name == "reference" or (name == "cpu") != (device == "cpu"):
            continue  # these are slow, or are for another device
        try:
            if device in get(name).devices:
                _try(name, device)
                found.append(name)
        except BackendUnavailable as error:
            skip(f"backend {name}", str(error))
        # it loads but does not launch (Triton without a C compiler): measure the others
        except Exception as error:
            skip(f"backend {name}", f"{type(error).__name__}: {str(error)[:300]}")
    return found or ["reference"]


def _try(name: str, device: str) -> None:
    theta = torch.zeros(4096, device=device)
    with zokernels.backend(name):
        zokernels.combine_(theta, SEED, EPS, streams=7)
    if device == "cuda":
        torch.cuda.synchronize()


class Buffers:
    """Tensors used in turn, so that no call finds its input in a cache."""

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        generator = torch.Generator(settings.device).manual_seed(0)
        theta = torch.randn(settings.numel, generator=generator, device=settings.device).to(dtype)
        self.thetas = [theta, *(theta.clone() for _ in range(settings.buffers - 1))]
        self.out = torch.empty_like(theta)
        self._turn = itertools.cycle(range(settings.buffers))

    def next(self) -> Tensor:
        return self.thetas[next(self._turn)]


def kernel(form: Form, backend: str, dist: str, buffers: Buffers, device: str) -> Callable[[], None]:
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


def forked_rng(device: str):
    """Gives the caller the state of torch's global generator back, which the eager loops seed."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else [])


def eager(perturb: Callable[..., None], dist: str, buffers: Buffers, numel: int) -> Callable[[], None]:
    return lambda: perturb([buffers.next()[:numel]], 1, EPS, SEED, dist)


@register("combine", "theta + sum_k c_k z_k in one pass: combine_ (in place) and combine (out of place)")
def run(settings: Settings) -> Iterator[Row]:
    """Rows for every thread count, dtype, dist, form and backend, each timed in turns with what it is
    compared with.
    """
    backends = usable_backends(settings.device, settings.backends)
    small = min(settings.numel, settings.baseline_numel)
    threads_before = torch.get_num_threads()
    try:
        for threads, dtype in itertools.product(settings.threads, settings.dtypes or tuple(DTYPES)):
            torch.set_num_threads(threads)
            buffers = Buffers(settings, DTYPES[dtype])
            for dist in settings.dists or ("normal", "rademacher"):
                kernels = {
                    (f, b): kernel(f, b, dist, buffers, settings.device)
                    for f in forms(dtype)
                    for b in backends
                }
                loops = usable(settings.device, DTYPES[dtype], dist, settings.tiny)
                candidates: dict = {name: eager(fn, dist, buffers, small) for name, fn in loops.items()}
                candidates["copy_inplace"] = lambda b=buffers: copy_in_place(b.next())
                candidates["copy"] = lambda b=buffers: b.out.copy_(b.next())
                with forked_rng(settings.device), torch.no_grad():
                    times = measure(
                        candidates | kernels, settings.device, settings.seconds, settings.min_rounds
                    )
                where = {"device": settings.device, "dtype": dtype, "dist": dist, "threads": threads}
                compared = Compared({n: (small, times[n]) for n in loops}, settings.numel, times)
                for form, backend in kernels:
                    what = {"op": form.name, "backend": backend, "rounding": form.rounding, "k": form.k}
                    yield row(what | where, times[form, backend], settings.numel, form.inplace, compared)
                for name in loops:
                    what = {"op": "perturb_", "backend": name, "rounding": "nearest", "k": 1}
                    yield row(what | where, times[name], small, True, compared)
    finally:
        torch.set_num_threads(threads_before)


@dataclass(frozen=True)
class Compared:
    """What a row is compared with: the eager loops by name, as (elements, times) of a pass, and the two
    copies.
    """

    loops: dict[str, tuple[int, Times]]
    copy_numel: int
    times: dict


def row(
    what: Row,
    mine: Times,
    numel: int,
    inplace: bool,
    compared: Compared,
    accesses: int = 2,
    passes: int | None = None,
) -> Row:
    """A row of results.

    ``accesses`` are those of memory for each element.  A copy has two, so the row is compared with accesses /
    2 times its time.  ``passes`` is how many passes of an eager loop do the same work (default: K)."""
    passes = what["k"] if passes is None else passes
    moved = accesses * numel * DTYPES[what["dtype"]].itemsize
    per_element = mine.p50 / numel
    copy_name = "copy_inplace" if inplace else "copy"
    copy = compared.times[copy_name]
    loops = compared.loops.items()
    return {
        **what,
        "numel": numel,
        **asdict(mine),
        "bytes": moved,
        "gb_per_s": moved / mine.p50 / 1e9,
        "ns_per_element": per_element * 1e9,
        "copy": {"name": copy_name, "numel": compared.copy_numel, **asdict(copy)},
        "copy_fraction": accesses / 2 * copy.p50 / compared.copy_numel / per_element,
        "baselines": {name: {"numel": n, "passes": passes, **asdict(times)} for name, (n, times) in loops},
        "ratio": {name: passes * times.p50 / n / per_element for name, (n, times) in loops},
    }
