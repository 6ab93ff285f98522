"""A checkpoint of a streamed model, written a block at a time."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from ..files.atomic import replacing
from ..files.safetensors import NAMES, Entry, lay_out
from .blocks import Block, aliases, persistent_buffers
from .disk import memory_of


def save(
    model: nn.Module,
    blocks: Sequence[Block],
    opened: Callable[[Block], AbstractContextManager[list[Tensor]]],
    path: str | os.PathLike[str],
) -> None:
    """Writes the model as the safetensors file ``path``.

    ``opened``: gives a block's parameters with all updates, while its context lasts (:meth:`Engine.opened`).
    """
    streamed = {id(e.param) for block in blocks for e in block.entries}
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, _, _, p in aliases(model):
        tensors.setdefault(id(p), (name, p))
    for name, buffer in persistent_buffers(model):
        tensors.setdefault(id(buffer), (name, buffer))
    sizes = {name: t.nbytes for name, t in tensors.values()}
    header, entries = lay_out(
        {name: Entry(NAMES[t.dtype], tuple(t.shape), 0, sizes[name]) for name, t in tensors.values()},
        {"format": "pt"},
    )
    with replacing(pathlib.Path(path).resolve()) as file:
        total = len(header) + sum(sizes.values())
        os.posix_fallocate(file.fileno(), 0, total)  # a full disk is an error before anything else
        file.write(header)

        def put(key: int, t: Tensor) -> None:
            file.seek(entries[tensors[key][0]].begin)
            host = t.detach().cpu().contiguous()
            file.write(memory_of(host))

        for key, (_, t) in tensors.items():
            if key not in streamed:
                put(key, t)
        for block in blocks:
            with opened(block) as params:
                for e, value in zip(block.entries, params, strict=True):
                    put(id(e.param), value)
