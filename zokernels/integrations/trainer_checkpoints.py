"""Checkpoints of a Trainer that are whole, or that are not there."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager


def is_whole(checkpoint: pathlib.Path) -> bool:
    """Whether the last file of a checkpoint is there, and can be read."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def whole_or_as_before(folder: pathlib.Path, writes: bool, several: bool) -> Iterator[None]:
    """Around the writing of a checkpoint: if it fails, ``folder`` is as it was before, or is not there.

    Of several processes only the first one, which ``writes``, does this, and only where the folder is new:
    the others write their own files there."""
    before = folder.with_name(f".{folder.name}.before")
    if kept := folder.exists() and writes and not several:
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if writes and new:
            shutil.rmtree(folder, ignore_errors=True)
        if kept:
            os.replace(before, folder)
        raise
    if kept:
        shutil.rmtree(before, ignore_errors=True)
