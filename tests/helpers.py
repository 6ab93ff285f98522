"""Random calls of the operations, and exact comparison of backends."""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import weakref
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zokernels
from zokernels.backends import select
from zokernels.contract import seed_to_int64

CPU_KERNELS = ["cpu-portable", "cpu-avx2", "cpu-avx512", "cpu-neon"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE_DTYPES = [torch.float32, torch.bfloat16]
DISTS = ["normal", "rademacher"]
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())


@contextlib.contextmanager
def poisoned():
    """``torch.empty`` and its relatives, in C++ too, give NaN or the largest integer: what nobody wrote
    shows.

    By torch's own switch for it, which is part of its deterministic algorithms.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def watched(operation: str, before: Callable[..., object]):
    """Calls ``before`` with the arguments of ``torch.ops.zokernels.<operation>`` ahead of each call, in any
    thread.

    What ``before`` raises, the operation raises.  It does not matter where in the package the operation is
    called: torch's dispatcher asks the kernel for autograd first, and this is one.  Inference mode leaves it
    out."""
    real = getattr(torch.ops.zokernels, operation).default

    def entry(*args: object) -> object:
        before(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return real(*args)

    with torch.library._scoped_library("zokernels", "IMPL") as library:
        library.impl(operation, entry, "AutogradCPU")
        yield


@contextlib.contextmanager
def watched_kernel(kernel: str, before: Callable[..., object]):
    """Calls ``before`` with the arguments of a kernel of the CPU's backend ahead of each call.

    Unlike :func:`watched` it sees calls that do not go through torch's dispatcher, too."""
    backend = select("cpu")
    real = getattr(backend, kernel)

    def entry(*args: object) -> object:
        before(*args)
        return real(*args)

    object.__setattr__(backend, kernel, entry)  # as the backend itself keeps what it has found
    try:
        yield
    finally:
        object.__setattr__(backend, kernel, real)


def bits(x: Tensor) -> Tensor:
    """The bit patterns of ``x``, with every NaN made the same: its payload is not part of the contract."""
    if not x.is_floating_point():
        return x
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def assert_same_bits(got: Tensor, want: Tensor, note: str = "") -> None:
    a, b = bits(got.cpu()).flatten(), bits(want.cpu()).flatten()
    wrong = (a != b).nonzero().flatten()
    assert wrong.numel() == 0, (
        f"{note}: {wrong.numel()} of {a.numel()} differ, first at {wrong[0].item()}: "
        f"got {got.flatten()[wrong[0]]}, want {want.flatten()[wrong[0]]}"
    )


def rounding_bound(want: Tensor, dtype: torch.dtype, magnitude: Tensor, roundings: int) -> Tensor:
    """The most by which a sum computed in fp32 and then rounded to ``dtype`` may differ from ``want``,
    elementwise.

    ``want``: the sum in float64.  ``magnitude``: the sum of the absolute values of its terms, which no
    intermediate result exceeds.  ``roundings``: how often an intermediate result is rounded to fp32, each
    time by at most 2^-24 of its value."""
    last = torch.finfo(dtype).eps / 2 * (want.abs() + 2.0**-22 * magnitude)
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    return roundings * 2.0**-24 * magnitude * (1 + 2.0**-20) + last + subnormal


def random_values(n: int, dtype: torch.dtype, rng: random.Random) -> Tensor:
    """Values of all magnitudes of ``dtype``, subnormals included, and a few specials."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    exponent = torch.randint(-30 if dtype is torch.float16 else -130, 12, (n,), generator=generator)
    x = (torch.randn(n, generator=generator).double() * torch.exp2(exponent.double())).to(dtype)
    typical = (torch.randn(n, generator=generator) * 0.02).to(dtype)
    x = torch.where(torch.rand(n, generator=generator) < 0.5, x, typical)
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for special in (0.0, -0.0, float("inf"), float("-inf"), float("nan"), largest, -largest, least, -least):
        if n and rng.random() < 0.2:
            x[rng.randrange(n)] = special
    if (
        n and rng.random() < 0.5
    ):  # NaNs with any sign and payload, all bits set among them, which rounding could carry out
        words = x.view(torch.int32 if dtype is torch.float32 else torch.int16)
        infinity = torch.tensor(float("inf"), dtype=dtype).view(words.dtype).item()
        mantissa = words.new_tensor(torch.iinfo(words.dtype).max).item() - infinity
        for _ in range(3):
            payload = rng.choice([mantissa, 1, rng.randrange(1, mantissa + 1)])
            words[rng.randrange(n)] = (
                infinity + payload - rng.choice([0, 1]) * (torch.iinfo(words.dtype).max + 1)
            )
    return x


SENTINELS = 8


def random_call(
    rng: random.Random, *, max_size: int = 4100, **fixed
) -> tuple[list[Tensor], list[slice], dict]:
    """Buffers, the part of each that is the parameter (at any alignment), and the other arguments of
    combine_.
    """
    dtype = fixed.pop("dtype", None) or rng.choice(DTYPES)
    count = fixed.pop("count", None)
    count = rng.choice([0, 1, 2, 7]) if count is None else count
    sizes = fixed.pop("sizes", None) or [rng.randrange(max_size + 1) for _ in range(rng.randrange(1, 4))]
    buffers = [random_values(n + 2 * SENTINELS, dtype, rng) for n in sizes]
    parts = []
    for n in sizes:
        begin = rng.randrange(SENTINELS + 1)
        parts.append(slice(begin, begin + n))
    aligned = fixed.pop("aligned", rng.random() < 0.3)
    if aligned:
        parts = [slice(0, n) for n in sizes]
    offsets = []
    for n in sizes:
        near_wrap = 8 * 2**32 - rng.randrange(n + 1)  # the low counter word wraps inside the tensor
        offset = rng.choice([0, rng.randrange(10000), rng.randrange(2**50), near_wrap, 2**63 - 1 - n])
        offsets.append(offset // 8 * 8 if aligned else offset)
    kwargs = {
        "seeds": torch.tensor([seed_to_int64(rng.getrandbits(64)) for _ in range(count)], dtype=torch.int64),
        "coeffs": torch.tensor([rng.gauss(0, 1) * 10.0 ** rng.randrange(-6, 2) for _ in range(count)]),
        "streams": [rng.getrandbits(56) for _ in sizes],
        "offsets": offsets,
        "dist": rng.choice(DISTS),
        "decay": rng.choice([None, 1.0, 0.97]),
        "rounding": rng.choice(["nearest", "stochastic"]),
        "rounding_seed": rng.getrandbits(64),
    }
    return buffers, parts, {**kwargs, **fixed}


def reference_result(buffers: list[Tensor], parts: list[slice], kwargs: dict) -> list[Tensor]:
    """The whole buffers after combine_ by the reference backend."""
    result = [b.clone() for b in buffers]
    with zokernels.backend("reference"):
        zokernels.combine_([b[p] for b, p in zip(result, parts, strict=True)], **kwargs)
    return result


def add_extras(
    rng: random.Random,
    parts: list[slice],
    kwargs: dict,
    *,
    curvature: bool = True,
    extras: Collection[str] | None = None,
) -> dict:
    """``kwargs`` of :func:`random_call` with ``extras``, or with some by chance: "each" (coefficients of each
    tensor's own), "masks", "density" and "curvature"."""
    sizes = [p.stop - p.start for p in parts]
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    kwargs = dict(kwargs)
    wanted = lambda name: rng.random() < 0.5 if extras is None else name in extras
    if wanted("each"):
        scales = 10.0 ** torch.randint(-6, 2, (len(sizes), 1), generator=generator)
        kwargs["coeffs"] = scales * torch.randn(len(sizes), kwargs["seeds"].numel(), generator=generator)
    if wanted("masks"):
        keep = [torch.rand(n, generator=generator) < rng.choice([0.1, 0.5, 0.9]) for n in sizes]
        kwargs["masks"] = [
            zokernels.pack_mask(k, offset) for k, offset in zip(keep, kwargs["offsets"], strict=True)
        ]
    if wanted("density"):
        kwargs |= {
            "mask_seed": rng.getrandbits(64),
            "density": rng.choice([0.0, 0.01, 0.5, rng.random(), 1.0]),
        }
    if curvature and wanted("curvature"):
        dtype = rng.choice(STATE_DTYPES)
        # negative ones too: the root is NaN
        kwargs["curvature"] = [random_values(n, dtype, rng) for n in sizes]
    return kwargs


def moved(value: object, device: str) -> object:
    """A copy of ``value``, an argument of an operation or a nest of them, with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    return [moved(v, device) for v in value] if isinstance(value, list) else value


def check_backend(
    run: Callable[..., list[Tensor]], args: dict, device: str = "cpu", threads: tuple[int, ...] = ()
) -> None:
    """``run(**args)``, which gives the tensors it wrote, has the reference's bits on the backend chosen.

    With ``threads``, for each of these numbers of threads.
    """
    with zokernels.backend("reference"):
        want = run(**moved(args, "cpu"))
    before = torch.get_num_threads()
    for count in threads or (before,):
        arguments = moved(args, device)
        torch.set_num_threads(count)
        try:
            with poisoned():
                got = run(**arguments)
        finally:
            torch.set_num_threads(before)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same_bits(a, b, f"tensor {i}, {a.dtype}, {count} threads")


def placed(buffers: list[Tensor], parts: list[slice]) -> list[Tensor]:
    return [b[p] for b, p in zip(buffers, parts, strict=True)]


class Live(TorchDispatchMode):
    """The most bytes that the tensors that operations make on ``device`` inside the block hold at once."""

    def __init__(self, device="meta"):
        super().__init__()
        self.device = device
        self.now = self.most = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == self.device:
                storage = t.untyped_storage()
                if storage._cdata not in self._seen and storage._cdata not in known:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key, nbytes):
        self._seen.discard(key)
        self.now -= nbytes
