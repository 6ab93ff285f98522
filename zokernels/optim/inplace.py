"""The classical probe: the weights themselves move by +eps z, then -2 eps z; the update brings them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..functional import combine_
from .groups import Bucket
from .guards import uninterrupted


class InplaceProbe:
    """Weights at theta + at * eps * z, rounded to nearest at each move: in half precision the way back is not exact.

    ``key``: (run seed, step) of the direction, for the two-pass form.
    """

    def __init__(
        self, buckets: list[Bucket], seeds: dict[torch.device, Tensor], key: tuple[int, int] | None = None
    ) -> None:
        self.buckets, self.seeds, self.key = buckets, seeds, key

    def move(self, to: int) -> None:
        """Weights from theta + at * eps * z to theta + to * eps * z."""
        with uninterrupted():
            for b in self.buckets:
                if b.at != to:
                    shift = (to - b.at) * b.eps
                    combine_(b.params, self.seeds[b.device], shift, streams=b.streams, dist=b.dist)
                    b.at = to
            # autocast would go on computing with the casts it made of the weights before the move
            torch.clear_autocast_cache()

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        self.move(sign)
        yield

    def __enter__(self) -> InplaceProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.move(0)  # after an update nothing is left to move; after an exception this restores the weights
