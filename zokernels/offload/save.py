"""A checkpoint of a streamed model, written a block at a time."""

from __future__ import annotations

import json
import os
import pathlib
from typing import TYPE_CHECKING

from torch import Tensor

from ..trajectory.checkpoint import replacing
from .blocks import aliases
from .files import NAMES, memory_of
from .stream import persistent_buffers

if TYPE_CHECKING:
    from .engine import Engine


def save(engine: Engine, path: str | os.PathLike[str]) -> None:
    streamed = {id(e.param): (block, i) for block in engine.blocks for i, e in enumerate(block.entries)}
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, _, _, p in aliases(engine.model):
        tensors.setdefault(id(p), (name, p))
    for name, buffer in persistent_buffers(engine.model):
        tensors.setdefault(id(buffer), (name, buffer))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, at = {}, 0
    for key, (name, t) in sorted(tensors.items(), key=lambda item: -item[1][1].element_size()):  # all aligned
        size = t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        begins[key], at = at, at + size
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    first = 8 + len(data)
    with replacing(pathlib.Path(path).resolve()) as file:
        os.posix_fallocate(file.fileno(), 0, first + at)  # a full disk is an error before anything else
        file.write(len(data).to_bytes(8, "little") + data)

        def put(key: int, t: Tensor) -> None:
            file.seek(first + begins[key])
            host = t.detach().cpu().contiguous()
            file.write(memory_of(host))

        for key, (_, t) in tensors.items():
            if key not in streamed:
                put(key, t)
        for block in engine.blocks:
            with engine.opened(block) as params:
                for e, value in zip(block.entries, params, strict=True):
                    put(id(e.param), value)
        file.flush()
