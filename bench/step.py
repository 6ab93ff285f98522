"""step: the hot path of one two-sided step over a whole model, everything that is not the two forwards.

Our forms, by accesses of memory for each parameter (bf16: two bytes each):

* exact, 6: each module's perturbed copy into scratch, twice, and one update in place.  The weights never
move.
* inplace, 6: +eps, -2 eps, and restore and update in one pass.
* two-pass, 4: restore, update and the next step's +eps in one pass of two directions; -2 eps.
* fan-out, 4: layer by layer, one read; the updated weights and both perturbed copies are written.

They are compared with MeZO's loop (four passes, 37 accesses), the other eager loops as four passes, and a
plain pass over the same bytes.  ``rounding`` is that of the update; perturbed copies are rounded to nearest.
On a GPU each form is also captured in a CUDA graph and replayed (``launch``): the host then starts one graph
instead of hundreds of kernels. All parameters lie in one allocation, each on 256 bytes, so that the plain
pass is one launch: the real limit, not that of 400 launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import zokernels

from . import machine, workloads
from .baselines import copy_in_place, mezo_step, usable
from .combine import DTYPES, EPS, SEED, Compared, forked_rng, row, usable_backends
from .registry import Row, Settings, register, skip
from .timing import measure

LR, GRADIENT = 1e-6, 0.5
ALIGN = 256

Call = Callable[[], None]


def arena_bytes(shapes: workloads.Shapes, itemsize: int) -> int:
    return sum(-(-workloads.total({n: s}) * itemsize // ALIGN) * ALIGN for n, s in shapes.items())


def arena(shapes: workloads.Shapes, dtype: torch.dtype, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """One flat tensor with values of the size of weights, and its views by name."""
    unit = ALIGN // dtype.itemsize
    flat = torch.empty(arena_bytes(shapes, dtype.itemsize) // dtype.itemsize, dtype=dtype, device=device)
    flat.normal_(0, 0.02)
    views, at = {}, 0
    for name, shape in shapes.items():
        numel = workloads.total({name: shape})
        views[name] = flat[at : at + numel].view(shape)
        at += -(-numel // unit) * unit
    return flat, views


class Parts:
    """The parameters by module or by layer, and scratch memory of the size of the largest, which all use in
    turn.
    """

    def __init__(self, views: dict[str, Tensor], part_of: Callable[[str], str], copies: int) -> None:
        groups: dict[str, list[str]] = {}
        for name in views:
            groups.setdefault(part_of(name), []).append(name)
        some = next(iter(views.values()))
        shapes = [{n: tuple(views[n].shape) for n in names} for names in groups.values()]
        largest = max(shapes, key=lambda s: arena_bytes(s, some.element_size()))
        flats = [arena(largest, some.dtype, some.device.type)[0] for _ in range(copies)]
        #: Of each part: its parameters, their streams, and the scratch of each perturbed copy.
        self.parts = []
        for names in groups.values():
            params, unit, at = [views[n] for n in names], ALIGN // some.element_size(), 0
            scratch: list[list[Tensor]] = [[] for _ in flats]
            for p in params:
                for flat, mine in zip(flats, scratch, strict=True):
                    mine.append(flat[at : at + p.numel()].view(p.shape))
                at += -(-p.numel() // unit) * unit
            self.parts.append((params, [zokernels.stream_of(n) for n in names], scratch))


def forms(views: dict[str, Tensor], dist: str, rounding: str = "nearest") -> dict[str, tuple[int, Call]]:
    """The forms of a pass: for each, how often it accesses a parameter's memory, and its call.

    The call uses the backend selected then.
    """
    params, streams = list(views.values()), [zokernels.stream_of(n) for n in views]
    device = params[0].device
    seeds = torch.arange(SEED, SEED + 2, dtype=torch.int64, device=device)
    this, following = seeds[:1], seeds[1:]
    number = lambda *values: torch.tensor(values, dtype=torch.float32, device=device)
    up, down, update = number(EPS), number(-EPS), number(-LR * GRADIENT)
    twice, back, both = number(-2 * EPS), number(EPS - LR * GRADIENT), number(EPS - LR * GRADIENT, EPS)
    modules = Parts(views, workloads.module_of, copies=1)
    layers = Parts(views, workloads.layer_of, copies=2)
    rounded: dict = {"rounding": rounding, **({"rounding_seed": this} if rounding == "stochastic" else {})}

    def exact() -> None:
        for coeff in (up, down):
            for tensors, ids, (scratch,) in modules.parts:
                zokernels.combine(scratch, tensors, this, coeff, streams=ids, dist=dist)
        zokernels.combine_(params, this, update, streams=streams, dist=dist, **rounded)

    def inplace() -> None:
        for coeff in (up, twice):
            zokernels.combine_(params, this, coeff, streams=streams, dist=dist)
        zokernels.combine_(params, this, back, streams=streams, dist=dist, **rounded)

    def two_pass() -> None:
        zokernels.combine_(params, seeds, both, streams=streams, dist=dist, **rounded)
        zokernels.combine_(params, following, twice, streams=streams, dist=dist)

    def fan_out() -> None:
        pending = {"seeds": this, "coeffs": update, "dist": dist, **rounded}
        for tensors, ids, (plus, minus) in layers.parts:
            zokernels.fan_out_(tensors, plus, minus, following, up, streams=ids, **pending)

    return {"exact": (6, exact), "inplace": (6, inplace), "two-pass": (4, two_pass), "fan-out": (4, fan_out)}


def _four_passes(perturb: Callable[..., None], tensors: list[Tensor], dist: str) -> Call:
    def call() -> None:
        for scaling in (1, -2, 1, -LR * GRADIENT / EPS):
            perturb(tensors, scaling, EPS, SEED, dist)

    return call


def _loops(
    views: dict[str, Tensor], settings: Settings, dtype: torch.dtype, dist: str, what: str
) -> dict[str, Call]:
    """The eager steps that fit the memory.  MeZO's loop moves each parameter to memory of its own: a second
    model.
    """
    tensors = list(views.values())
    model, largest = sum(t.nbytes for t in tensors), max(t.nbytes for t in tensors)
    found: dict[str, Call] = {}
    # the largest tensor also needs z and two temporaries
    free = machine.free_memory(settings.device) - 3 * largest
    for name, perturb in usable(settings.device, dtype, dist, settings.tiny).items():
        need = model if name in ("mezo", "foreach") else 0
        if need > 0.95 * free:
            skip(f"{what}: {name}", f"needs {need / 1e9:.0f} GB more, {max(free, 0) / 1e9:.0f} GB are free")
        elif name == "mezo":
            params = [nn.Parameter(t, requires_grad=False) for t in tensors]
            found[name] = lambda params=params: mezo_step(params, EPS, LR, GRADIENT, SEED, dist)
            free -= need
        else:
            found[name] = _four_passes(perturb, tensors, dist)
    if settings.device == "cuda":  # the estimate does not know how memory is fragmented
        for name in list(found):
            try:
                found[name]()
                torch.cuda.synchronize()
            except torch.cuda.OutOfMemoryError:
                del found[name]
                torch.cuda.empty_cache()
                skip(f"{what}: {name}", "out of memory")
    return found


@register("step", "one step's whole hot path over a model's parameter list, against the eager loops")
def run(settings: Settings) -> Iterator[Row]:
    backends = usable_backends(settings.device, settings.backends)
    threads_before = torch.get_num_threads()
    cases = itertools.product(settings.workloads, settings.dtypes or ("bf16",), settings.dists or ("normal",))
    try:
        for (workload, dtype, dist), threads in itertools.product(cases, settings.threads):
            torch.set_num_threads(threads)
            shapes = workloads.shapes(workload, settings.scale)
            what = f"step {workload} {dtype} {dist}"
            need = int(1.1 * arena_bytes(shapes, DTYPES[dtype].itemsize))
            if need > (free := machine.free_memory(settings.device)):
                skip(what, f"needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
                continue
            with forked_rng(settings.device), torch.no_grad():
                yield from _rows(settings, what, workload, shapes, dtype, dist, threads, backends)
            if settings.device == "cuda":
                torch.cuda.empty_cache()  # the next model may need all memory, in blocks of other sizes
    finally:
        torch.set_num_threads(threads_before)


def captured(call: Call) -> Call:
    """``call`` as a CUDA graph, whose replay is one launch.  It runs once before, on the stream of the
    capture, so that what it allocates and uploads is there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _rows(
    settings: Settings,
    what: str,
    workload: str,
    shapes: workloads.Shapes,
    dtype: str,
    dist: str,
    threads: int,
    backends: list[str],
) -> Iterator[Row]:
    flat, views = arena(shapes, DTYPES[dtype], settings.device)
    numel = workloads.total(shapes)
    # fp32 has nothing to round: its stochastic rows would repeat the nearest ones
    roundings = ("nearest",) if dtype == "fp32" else ("nearest", "stochastic")
    ours = {(form, r): found for r in roundings for form, found in forms(views, dist, r).items()}

    def on(backend: str, call: Call) -> Call:
        def selected() -> None:
            with zokernels.backend(backend):
                call()

        return selected

    kernels = {(*key, b, "eager"): on(b, call) for key, (_, call) in ours.items() for b in backends}
    if settings.device == "cuda":
        for key, call in list(kernels.items()):
            try:
                kernels[(*key[:-1], "graph")] = captured(call)
            except Exception as error:  # one form that fails must not lose the other rows
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                skip(f"{what} {' '.join(key[:-1])}: in a CUDA graph", reason)
    else:
        skip(f"{what}: in a CUDA graph", "needs an NVIDIA GPU")
    loops = _loops(views, settings, DTYPES[dtype], dist, what)
    candidates = {**loops, "copy_inplace": lambda: copy_in_place(flat), **kernels}
    times = measure(candidates, settings.device, settings.seconds, min(settings.min_rounds, 5))
    compared = Compared({n: (numel, times[n]) for n in loops}, flat.numel(), times)
    where = {"device": settings.device, "dtype": dtype, "dist": dist, "threads": threads, "k": 1}
    where |= {"op": "step", "workload": workload, "scale": settings.scale, "tensors": len(shapes)}
    for key in kernels:
        form, rounding, backend, launch = key
        accesses, _ = ours[form, rounding]
        labels = {**where, "form": form, "rounding": rounding, "backend": backend, "launch": launch}
        labels["bytes_per_parameter"] = accesses * DTYPES[dtype].itemsize
        yield row(labels, times[key], numel, True, compared, accesses)
    for name in loops:
        # Those of MeZO are counted in its source; the others are four plain passes, as if z cost nothing.
        accesses = 37 if name == "mezo" else 8
        labels = {**where, "form": "eager", "rounding": "nearest", "backend": name, "launch": "eager"}
        labels["bytes_per_parameter"] = accesses * DTYPES[dtype].itemsize
        yield row(labels, times[name], numel, True, compared, accesses)
