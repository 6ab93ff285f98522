"""A checkpoint file that the ranks of an engine write together, each its own parts."""

from __future__ import annotations

import mmap
import os
import pathlib
from collections.abc import Iterable

from torch import Tensor

from ..contract import canonical_name
from ..files.atomic import replacing
from ..files.safetensors import Checkpoint, Entry, lay_out, view
from .pieces import Piece


def create(path: str | os.PathLike[str], base: Checkpoint) -> None:
    """A safetensors file with the tensors of ``base``, into which each rank then writes its parts."""
    entries, header = _file_of(base)
    with replacing(pathlib.Path(path).resolve()) as file:
        os.posix_fallocate(
            file.fileno(), 0, max([len(header), *(e.begin + e.size for e in entries.values())])
        )
        file.write(header)
        for name, source in base.where.items():
            file.seek(entries[name].begin)
            file.write(source.data(name))
            source.release()


def write_parts(
    path: str | os.PathLike[str], base: Checkpoint, parts: Iterable[tuple[Piece, Tensor]]
) -> None:
    """Writes the parts of one rank to their places in the file that :func:`create` has made."""
    entries, _ = _file_of(base)
    entries = {canonical_name(name): entry for name, entry in entries.items()}
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0) as mapped:
            for piece, values in parts:
                target = piece.source(view(mapped, entries[piece.name]))
                target.copy_(values.view(target.shape))
                del target  # a map with views cannot be closed
            mapped.flush()
        os.fsync(file.fileno())


def _file_of(base: Checkpoint) -> tuple[dict[str, Entry], bytes]:
    header, entries = lay_out(
        {name: file.entries[name] for name, file in base.where.items()}, base.files[0].metadata
    )
    return entries, header
