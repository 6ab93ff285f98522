"""Models whose blocks are stored somewhere, and those of them whose blocks are on the device itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checks import fail
from .blocks import Block
from .save import save
from .timeline import Timeline

if TYPE_CHECKING:
    from typing_extensions import Self


class StoredModel:
    """What :func:`zokernels.offload.stream` returns: a model with its blocks, wherever these are stored.

    It is a context manager, which is closed at its end.
    """

    op = "stream"
    model: nn.Module
    blocks: list[Block]
    device: torch.device
    timeline: Timeline
    closed: bool

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        model = type(self.model).__name__
        return f"<{type(self).__name__} of {model}: {len(self.blocks)} blocks for {self.device}, {state}>"

    @property
    def is_lossless(self) -> bool:
        """Whether the device computes with the very weights of the storage; always so without ``wire``."""
        return True

    @property
    def has_states(self) -> bool:
        """Whether what the optimizer keeps of each weight is streamed with the weights."""
        return False

    def flush(self) -> None:
        """Brings all updates into the storage, and waits until they are there.

        Storage that is only read stays as it is; blocks take their updates as they come in.
        """
        raise NotImplementedError

    def opened(self, block: Block) -> AbstractContextManager[list[Tensor]]:
        """The parameters of ``block`` with all updates, while the context lasts."""
        raise NotImplementedError

    def values(self, block: Block) -> list[Tensor]:
        """Copies of the parameters of ``block`` on the device, with all updates."""
        with self.opened(block) as params:
            return [v.to(self.device, copy=True) for v in params]

    def value(self, param: Tensor) -> Tensor:
        """A copy of one parameter on the device, with all updates."""
        for block in self.blocks:
            for i, e in enumerate(block.entries):
                if e.param is param:
                    with self.opened(block) as params:
                        return params[i].to(self.device, copy=True)
        fail(self.op, "param", "a streamed parameter", "another")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all parameters and persistent buffers, with all updates, as the safetensors file ``path``.

        Blocks are streamed.  The file appears, whole and synced, when all is done.  Tied weights are in it
        once.
        """
        save(self.model, self.blocks, self.opened, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Flushes, and ends what runs in the background."""
        raise NotImplementedError


class OnDevice(StoredModel):
    """Blocks that are on the device, where nothing moves.

    Their parameters are ordinary ones, which steps perturb as those of any model in memory: block by block,
    one forward after another, and with every optimizer.  They stay ordinary when the engine is closed.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], device: torch.device, timeline: Timeline
    ) -> None:
        self.model, self.blocks, self.device, self.timeline = model, list(blocks), device, timeline
        self.closed = False

    def flush(self) -> None:
        """Does nothing: an update is made by the step itself."""

    @contextmanager
    def opened(self, block: Block) -> Iterator[list[Tensor]]:
        yield [e.param.detach() for e in block.entries]

    def close(self) -> None:
        self.closed = True
