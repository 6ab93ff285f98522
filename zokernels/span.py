"""Linear algebra in the span of K noise directions: a vector is K coefficients, whatever the size of the
model.

v = sum_k a_k z_k over a list of tensors.  The inner product of two such vectors is a^T G b with the Gram
matrix G of the directions, so points, distances and projections need no vector of the model's size:
``combine_`` makes one of coefficients, ``project`` and a solve make coefficients of one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .checks import check_noise_of, fail
from .contract import seed_to_int64, streams_of
from .functional import Dist, combine_, project, spread
from .ops.arguments import places, seeds_of

#: z in units of 2^-17.  |z| <= 6.556, so the products of 8192 elements sum up to less than 2^53: exact in
#: float64.
_SCALE, _CHUNK = 2.0**17, 8192
#: Elements of noise at a time, 4 MiB of fp32.
_SCRATCH = 1 << 20


def _add_products(total: Tensor, z: Tensor, dist: str) -> None:
    """Adds z z^T of z [K, n] to total, int64 [2, K, K]: what is above 2^20 units, and below.

    Exact in any order.
    """
    if dist == "rademacher":  # sums of +-1: exact in fp32 up to 2^24
        total[1] += (z @ z.T).long()
        return
    for part in z.double().mul_(_SCALE).round_().split(_CHUNK, 1):
        products = (part @ part.T).long()
        total[0] += products >> 20
        total[1] += products & (1 << 20) - 1


@torch.no_grad()
def gram(
    seeds: int | Sequence[int] | Tensor,
    sizes: Sequence[int],
    *,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    dist: Dist = "normal",
    device: torch.device | str | None = None,
) -> Tensor:
    """G_jk = <z_j, z_k> of the seeds' noise over tensors of ``sizes`` elements, float64 [K, K].

    The noise passes through a few MiB of scratch.  Normal noise is rounded to multiples of 2^-17 and its
    products are summed as integers, so no order of summation, shard or device changes a bit; that costs about
    3e-6 sqrt(n) in n elements, whose products themselves spread by sqrt(n).  Of Rademacher noise the products
    are exact and the diagonal is n.  The sums fit for 2^43 elements.

    Args: as for :func:`squared_norm`.  Time: K n numbers and K^2 n multiplications.
    """
    seeds = seeds_of("gram", "seeds", seeds, device)
    stream_list, offset_list = places("gram", streams, offsets, len(sizes))
    check_noise_of("gram", seeds, list(sizes), stream_list, offset_list, dist)
    count = seeds.numel()
    total = torch.zeros((2, count, count), dtype=torch.int64, device=seeds.device)
    width = max(_CHUNK, _SCRATCH // max(count, 1))
    ones = torch.ones(count, device=seeds.device)
    zeros = torch.full((min(width, max(sizes, default=0)),), -0.0, device=seeds.device)
    for size, stream, offset in zip(sizes, stream_list, offset_list, strict=True):
        for at in range(0, size if count else 0, width):
            n = min(width, size - at)
            z = torch.empty((count, n), device=seeds.device)
            spread(z, zeros[:n], seeds, ones, stream=stream, offset=offset + at, dist=dist)
            _add_products(total, z, dist)
    high, low = total.double().unbind()
    return low if dist == "rademacher" else high * (2.0**20 / _SCALE**2) + low / _SCALE**2


class Span:
    """The span of the noise of ``seeds`` over ``tensors``, of which only sizes and names are kept.

    Coefficients are float64 [K], or [..., K] for many vectors, on the tensors' device.

    Args:
        tensors: (name, tensor) pairs, as ``named_parameters()`` gives them; the noise goes by name.
        seeds: int64 [K], or integers.
        dist: "normal" or "rademacher".
    """

    def __init__(
        self, tensors: Sequence[tuple[str, Tensor]], seeds: Sequence[int] | Tensor, dist: Dist = "normal"
    ) -> None:
        named = list(tensors)
        if not named:
            fail("Span", "tensors", "at least one", "none")
        self.device = named[0][1].device
        if not isinstance(seeds, Tensor):
            seeds = torch.tensor([seed_to_int64(s) for s in seeds], dtype=torch.int64)
        self.seeds = seeds.to(self.device)
        self.streams = streams_of(name for name, _ in named)
        self.sizes = [t.numel() for _, t in named]
        self.dist = dist

    def __repr__(self) -> str:
        return f"Span({len(self.streams)} tensors, {sum(self.sizes):,} elements, {len(self.seeds)} seeds)"

    def __len__(self) -> int:
        return self.seeds.numel()

    @cached_property
    def gram(self) -> Tensor:
        """G_jk = <z_j, z_k>, float64 [K, K]."""
        return gram(self.seeds, self.sizes, streams=self.streams, dist=self.dist)

    @cached_property
    def _factor(self) -> Tensor:
        factor: Tensor = torch.linalg.cholesky(self.gram)
        return factor

    @cached_property
    def _root(self) -> Tensor:
        """R with R R^T = G, also where the directions depend on one another: |v| = |a R|."""
        values, vectors = torch.linalg.eigh(self.gram)
        root: Tensor = vectors * values.clamp(min=0).sqrt()
        return root

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros((*shape, len(self)), dtype=torch.float64, device=self.device)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """<u, v> of the vectors with coefficients ``a`` and ``b``: a^T G b, over the last dimension."""
        return ((a @ self.gram) * b).sum(-1)

    def norm(self, a: Tensor) -> Tensor:
        return self.dot(a, a).clamp(min=0).sqrt()

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """|u_i - v_j| of the vectors [n, K] and [m, K]: [n, m]."""
        return torch.cdist(a @ self._root, b @ self._root, compute_mode="donot_use_mm_for_euclid_dist")

    def project(self, tensors: Sequence[Tensor]) -> Tensor:
        """<x, z_k>, [K], of ``tensors`` in the order of the span's."""
        self._check(tensors)
        return project(list(tensors), self.seeds, streams=self.streams, dist=self.dist)

    def solve(self, products: Tensor) -> Tensor:
        """The coefficients of the vector in the span whose inner products with the directions are
        ``products``.

        G's Cholesky factor is kept.  Its last bits depend on LAPACK: write coefficients down, not products,
        where two machines must agree."""
        return torch.cholesky_solve(products[..., None], self._factor)[..., 0]

    def fit(self, tensors: Sequence[Tensor]) -> Tensor:
        """The coefficients whose vector is nearest to ``tensors``: G^-1 p, least squares in one read of
        them.
        """
        return self.solve(self.project(tensors))

    @torch.no_grad()
    def add_(self, tensors: Sequence[Tensor], coeffs: Tensor) -> None:
        """tensors += sum_k coeffs[k] z_k, one rounding an element (``combine_``; coefficients in fp32)."""
        self._check(tensors)
        coeffs = coeffs.to(device=self.device, dtype=torch.float32)
        combine_(list(tensors), self.seeds, coeffs, streams=self.streams, dist=self.dist)

    def _check(self, tensors: Sequence[Tensor]) -> None:
        sizes = [t.numel() for t in tensors]
        if sizes != self.sizes:
            fail("Span", "tensors", f"tensors of {self.sizes} elements", sizes)
