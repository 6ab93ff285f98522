"""Tables of the tensors of a call, so that one launch serves them all.

The device copies are kept between calls: a step with the same tensors copies nothing to the device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Of one tensor: its number of programs, its number in the call, and then what the kernel reads, addresses
#: last.
Row = tuple[int, ...]

#: Tables kept: more than the modules of OPT-13B (330), which exact restoring perturbs one by one.  One takes
#: 4 bytes for 16384 elements and about 60 for a tensor: a table of each module together 0.02% of bf16
#: parameters.
KEPT = 512


class Table(NamedTuple):
    rows: Tensor  # int64 [n, width]: a Row with its first program in the place of their number
    owner: Tensor  # int32 [programs]: the row of each program
    cuda_stream: int  # the stream whose allocations they are


@triton.jit
def row_of(table, owner, WIDTH: tl.constexpr):
    """The row of this program, and the program's number among the row's own."""
    pid = tl.program_id(0).to(tl.int64)
    row = table + tl.load(owner + pid).to(tl.int64) * WIDTH
    return row, pid - tl.load(row)


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """The address in a row's column; None where DTYPE is: assign it to a name of its own, since Triton 3.6
    has no tuples with None."""
    if DTYPE is None:
        return  # of `return None` Triton 3.6 would try to make a tensor
    else:
        return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


def build(device: torch.device, rows: tuple[Row, ...]) -> Table:
    """The copy waits for its end, so that any stream may read the table; it is paid once for new
    addresses.
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
    """The table of ``rows``, or None where it would have to be built while a CUDA graph is captured.

    The key is everything that a table holds, so none is ever stale.  What a graph has captured is kept for
    good."""
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
