"""Replaying a log onto a checkpoint file.

The file is worked on piece by piece, so no more of it than a piece needs to fit into memory.
"""

from __future__ import annotations

import math
import mmap
import os
import pathlib
import warnings
from collections.abc import Callable

from torch import Tensor

from ..checks import fail
from ..files.atomic import replacing
from ..files.safetensors import DTYPES, Checkpoint, lay_out, view
from .digests import digest
from .format import Log
from .rebuilding import match
from .replay import Progress, replay_
from .settings import check_base

#: Elements that are worked on before their pages are given back.
_RELEASE = 1 << 24


def trained(log: Log) -> list[str]:
    """The names of the parameters that the run trained; none for a log of parameters without names."""
    params = [p for group in log.header["groups"] for p in group["params"] if p["sha256"] is not None]
    return [p["name"] for p in params if p["name"] is not None]


def checked(base: Checkpoint, log: Log) -> dict[str, Tensor]:
    """The tensors of ``base``.  Raises where they are not the weights that the run of ``log`` began with."""
    base.adopt(trained(log))
    tensors = base.tensors()
    check_base(log.header, match(log.header, tensors))
    base.release()
    return tensors


def compare(log: Log, ours: Checkpoint, theirs: Checkpoint) -> int:
    """The number of trained tensors.  Raises ValueError where one of them differs in a bit."""
    names = trained(log)
    for checkpoint in (ours, theirs):
        checkpoint.adopt(names)
    a, b = ours.tensors(), theirs.tensors()
    for name in names:
        if name not in b:
            fail("verify", name, f"a tensor in {theirs.path}", "none")
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            got = f"{b[name].dtype} of shape {tuple(b[name].shape)}"
            fail("verify", name, f"{a[name].dtype} of shape {tuple(a[name].shape)}", got)
        if digest(a[name]) != digest(b[name]):
            fail("verify", name, "the bits of the run", "others")
        ours.release()
        theirs.release()
    return len(names)


def replay_file(
    base: Checkpoint,
    log: Log,
    out: str | os.PathLike[str],
    upto: int | None = None,
    *,
    mode: str = "exact",
    progress: Progress = lambda elements: None,
) -> int:
    """Writes ``base``, with the weights of the run (:func:`replay_`), as the safetensors file ``out``.

    ``out`` appears, whole and synced, when all is done.  The work is done in the mapped file itself.
    """
    path = pathlib.Path(out).resolve()
    if path in {pathlib.Path(log.path).resolve(), *(f.path.resolve() for f in base.files)}:
        fail("replay", "out", "another file than the base and the log", str(out))
    log.check_upto(upto)
    if "part" in log.header:
        text = "replay: the log is a part of its run: weights that gradients trained stay as in the base"
        warnings.warn(text, stacklevel=2)
    tensors = checked(base, log)
    names = set(trained(log))
    widened = {name for name in base.where if mode == "fp32" and base.parameter(name) in names}
    entries = {name: file.entries[name] for name, file in base.where.items()}
    for name in widened:
        entries[name] = entries[name]._replace(dtype="F32", size=4 * math.prod(entries[name].shape))
    header, entries = lay_out(entries, base.files[0].metadata)
    total = max([len(header), *(e.begin + e.size for e in entries.values())])
    with replacing(path) as file:
        os.posix_fallocate(file.fileno(), 0, total)  # a full disk is an error here, not a signal later
        with mmap.mmap(file.fileno(), total) as mapped:
            mapped[: len(header)] = header
            weights = {}
            for name, source in base.where.items():
                entry = entries[name]
                if name in widened:
                    view(mapped, entry).copy_(tensors[base.parameter(name)])
                else:
                    mapped[entry.begin : entry.begin + entry.size] = source.data(name)
                if entry.dtype in DTYPES:
                    weights[base.parameter(name)] = view(mapped, entry)
                source.release()
                mapped.madvise(mmap.MADV_DONTNEED)
            steps = replay_(weights, log, upto, mode=mode, check=False, progress=_releasing(mapped, progress))
            mapped.flush()
            weights.clear()  # a map with views cannot be closed
    return steps


def _releasing(mapped: mmap.mmap, progress: Progress) -> Callable[[int], None]:
    touched = 0

    def done(elements: int) -> None:
        nonlocal touched
        touched += elements
        if touched >= _RELEASE:
            touched = 0
            mapped.madvise(mmap.MADV_DONTNEED)  # of a shared map: what was written stays in the file
        progress(elements)

    return done
