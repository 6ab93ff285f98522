"""Tables of the tensors of a call, in device memory, so that one launch serves all of them.

Tables are kept between calls, so a step with the same tensors as the last copies nothing to the device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: What a table has of one tensor: how many programs it has, its number in the call, and then what the kernel
#: reads, the addresses last.
Row = tuple[int, ...]

#: How many tables are kept: more than OPT-13B has modules (330), which restore="exact" perturbs one by one.
#: A table takes 4 bytes for 16,384 elements and about 60 for a tensor.  One for each module of a bf16 model
#: takes 0.02 % of the model.
KEPT = 512


class Table(NamedTuple):
    rows: Tensor  #: int64 [n, width]: each is a Row, with the number of its first program in the first column
    owner: Tensor  #: int32 [programs]: the row that each program works on
    cuda_stream: int  #: the CUDA stream on which both were allocated


@triton.jit
def row_of(table, owner, WIDTH: tl.constexpr):
    """The row of this program, and the program's number among the row's own."""
    pid = tl.program_id(0).to(tl.int64)
    row = table + tl.load(owner + pid).to(tl.int64) * WIDTH
    return row, pid - tl.load(row)


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """The pointer in a row's column; None where DTYPE is None.

    Assign it to a name of its own: Triton 3.6 has no tuples with None.
    """
    if DTYPE is None:
        return  # not `return None`, of which Triton 3.6 would try to make a tensor
    else:
        return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


def build(device: torch.device, rows: tuple[Row, ...]) -> Table:
    """A new table on ``device``.

    The copy to the device waits for its end, so that every stream may read the table afterwards.  This is
    paid once for tensors at new addresses.
    """
    table = torch.tensor(rows, dtype=torch.int64)
    counts = table[:, 0].clone()
    table[:, 0] = counts.cumsum(0) - counts
    owner = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), counts)
    return Table(table.to(device), owner.to(device), _current_stream(device))


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_tables: OrderedDict[tuple[torch.device, tuple[Row, ...]], Table] = OrderedDict()
_captured: list[Table] = []
_lock = threading.Lock()


def table_of(device: torch.device, rows: tuple[Row, ...]) -> Table | None:
    """The table of ``rows``; None where it would have to be built while a CUDA graph is captured.

    Tables are found by all that they hold, so none is ever out of date.  Those that a graph has captured are
    kept for good, because the graph reads them whenever it is replayed.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        table = _tables.get((device, rows))
        if table is None:
            if capturing:
                return None
            table = _tables[device, rows] = build(device, rows)
            if len(_tables) > KEPT:
                _tables.popitem(last=False)
        _tables.move_to_end((device, rows))
        if capturing:
            _captured.append(table)
    if table.cuda_stream != _current_stream(device):
        for tensor in (table.rows, table.owner):
            tensor.record_stream(torch.cuda.current_stream(device))
    return table
