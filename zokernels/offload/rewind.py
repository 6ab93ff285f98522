"""Bringing the folder of a run back to a checkpoint."""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..contract import canonical_name
from ..files.appending import AppendedFile, sha256_of
from ..files.atomic import replacing, sync_folder
from ..files.safetensors import NAMES, Checkpoint, File, encode_header
from ..trajectory.format import Log, scan
from .blocks import PAGE, state_named
from .disk import CHUNK, memory_of, version_of
from .memory import mapping
from .run import LOG, RESIDENT

_OP = "rewind"


def rewind(
    path: str | os.PathLike[str], weights: str | os.PathLike[str], state_dict: Mapping[str, Any]
) -> None:
    """Brings the folder of a streamed run back to the step of a checkpoint, from which it then goes on.

    Blocks with later updates get the checkpoint's weights and states, and the log loses its later records.
    ``stream(path=path, resume=True)`` then has the bits of the step.  If this is interrupted, by a kill too,
    the folder still is one of its last step: the log is cut when everything else is done, and until then
    blocks take the updates that they lack.

    Args:
        path: the folder; no process may have the run open.
        weights: a safetensors file, or a folder of shards, with the weights of that step
            (:meth:`Engine.save`).
        state_dict: that of the optimizer at that step, of this run.

    Raises: ValueError, OSError and RuntimeError, before anything changes, where the checkpoint is of another
    run or of later steps, or lacks something.
    """
    folder = pathlib.Path(path)
    if not (folder / LOG).is_file():
        fail(_OP, "path", f"a folder with the log of a run ({LOG})", os.fspath(path))
    file = AppendedFile(_OP, folder / LOG)
    try:
        log = scan(folder / LOG)
        if log is None:
            fail(_OP, "path", "a log with a whole header", "one that ends in it")
        mark, end = _mark(log, state_dict)
        if (updates := mark["step"] - log.start) == log.steps:
            return
        value_of = _values(log, Checkpoint(weights).tensors(), state_dict)
        later = [p for p in sorted(folder.glob("block-*.safetensors")) if version_of(_OP, File(p)) > updates]
        for block in later:
            _check(File(block), value_of)
        resident = folder / f"{RESIDENT}.safetensors"
        if resident.exists() and version_of(_OP, File(resident)) > updates:
            resident.unlink()  # these take the log's updates from the first one on
            sync_folder(folder)
        for block in later:
            _replace(block, value_of, updates, mark)
        file.cut(end)
        file.sync()
    finally:
        file.close()


def _mark(log: Log, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """What the state_dict knows of its log, and where in this log its step begins."""
    mark = dict(state_dict.get("zo", {}).get("log") or {})
    if not {"step", "sha256"} <= mark.keys():
        fail(_OP, "state_dict", "one of an optimizer with a log (zo.log)", "one without")
    if not log.start <= mark["step"] <= log.start + log.steps:
        got = f"steps {log.start} to {log.start + log.steps} (exclusive)"
        fail(_OP, log.path, f"a log with the steps before {mark['step']}, the checkpoint's", got)
    end = log.begin + (mark["step"] - log.start) * log.layout.size
    if sha256_of(log.path, [end])[end] != mark["sha256"]:
        fail(_OP, log.path, "the log with which the checkpoint was written", "another run's")
    return mark, end


#: Gives the weight, or the state, that is of this name in a block's file; None: the checkpoint lacks it.
_Values = Callable[[str], Tensor | None]


def _values(log: Log, weights: Mapping[str, Tensor], state_dict: Mapping[str, Any]) -> _Values:
    names = [str(entry["name"]) for group in log.header["groups"] for entry in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    index_of = {canonical_name(name): index for name, index in zip(names, indices, strict=True)}

    def value(name: str) -> Tensor | None:
        if (state := state_named(name, names)) is not None:
            found: Tensor | None = (
                state_dict["state"].get(index_of[canonical_name(state[1])], {}).get(state[0])
            )
            return found
        return weights.get(canonical_name(name))

    return value


def _check(file: File, value_of: _Values) -> None:
    """Raises where the checkpoint lacks a tensor of a block's file, or has one of another kind."""
    for name, e in file.entries.items():
        if not name.startswith("_gap"):
            value = value_of(name)
            found = None if value is None else (NAMES[value.dtype], tuple(value.shape))
            if found != (e.dtype, e.shape):
                fail(_OP, f"weights, state_dict: {name}", f"{(e.dtype, e.shape)}, as {file.path}", found)


def _replace(path: pathlib.Path, value_of: _Values, updates: int, mark: dict[str, Any]) -> None:
    """Replaces the file of a block by one of the same layout with the checkpoint's tensors."""
    file = File(path)
    first = min(e.begin for e in file.entries.values())
    data = mapping(max(e.begin + e.size for e in file.entries.values()) - first, torch.device("cpu"))
    for name, e in file.entries.items():
        if not name.startswith("_gap") and (value := value_of(name)) is not None:
            there = data[e.begin - first : e.begin - first + e.size]
            there.copy_(value.detach().cpu().contiguous().view(-1).view(torch.uint8))
    memory = memory_of(data)
    sums = [zlib.crc32(memory[at : at + CHUNK]) for at in range(0, len(memory), CHUNK)]
    metadata = {
        **file.metadata,
        "zokernels_updates": f"{updates:020d}",
        "crc32": "".join(f"{one:08x}" for one in sums),
        "log_step": f"{mark['step']:020d}",
        "log_sha256": mark["sha256"],
    }
    entries = sorted(file.entries.items(), key=lambda item: item[1].begin)
    head = encode_header([(n, e._replace(begin=e.begin - first)) for n, e in entries], metadata, PAGE)
    with replacing(path) as new:
        new.write(head)
        new.write(memory)
