"""Rows as an aligned table: for the terminal and, with bars, for markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .registry import Row


def short(value: float) -> str:
    """Three significant digits without an exponent; up to 99999 they take at most five characters."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class Column:
    head: str
    show: Callable[[Row], str]
    width: int
    right: bool = True


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda r: f"{r['ratio'][name]:.1f}" if name in r["ratio"] else "-"


def _text(head: str, key: str, width: int) -> Column:
    return Column(head, lambda r: r[key], width, right=False)


_K = Column("K", lambda r: str(r["k"]), 2)
_DTYPE, _DIST, _BACKEND = (
    _text("dtype", "dtype", 5),
    _text("dist", "dist", 10),
    _text("backend", "backend", 10),
)
_ROUNDING = _text("rounding", "rounding", 10)
_THREADS = Column("thr", lambda r: str(r["threads"]), 3)
_P20, _P50, _P80 = (Column(f"{p} ms", lambda r, p=p: short(r[p] * 1e3), 6) for p in ("p20", "p50", "p80"))
_GB = Column("GB/s", lambda r: short(r["gb_per_s"]), 5)
_NS = Column("ns/el", lambda r: short(r["ns_per_element"]), 5)
_COPY = Column("of copy", lambda r: f"{r['copy_fraction']:.2f}", 7)
_HOST = Column("host ms", lambda r: short(r["host"] * 1e3) if r.get("host") else "-", 7)
_MEZO, _FOREACH = Column("x MeZO", _ratio("mezo"), 6), Column("x foreach", _ratio("foreach"), 9)
_ADD = Column("x add_", _ratio("inplace"), 6)
_TIMES = [_THREADS, _P20, _P50, _P80]

#: The columns of the ops that pass over one tensor.
COLUMNS = [
    _text("op", "op", 8),
    _K,
    _DTYPE,
    _DIST,
    _ROUNDING,
    _BACKEND,
    *_TIMES,
    *(_GB, _NS, _COPY, _MEZO, _FOREACH, _ADD),
]
STEP = [
    _text("workload", "workload", 10),
    _text("form", "form", 8),
    _text("launch", "launch", 6),
    *(_DTYPE, _DIST, _ROUNDING, _BACKEND, *_TIMES, _HOST),
    Column("B/par", lambda r: str(r["bytes_per_parameter"]), 5),
    *(_COPY, _MEZO, _FOREACH, _ADD),
]
FAN_OUT = [
    _text("op", "op", 8),
    _text("form", "form", 8),
    *(_DTYPE, _DIST, _BACKEND, *_TIMES, _GB, _NS, _COPY),
    Column("x composed", lambda r: f"{r['ratio']['composed']:.2f}", 10),
    _MEZO,
]
MANY = [
    _text("op", "op", 8),
    *(_K, _DTYPE, _DIST, _BACKEND, *_TIMES),
    Column("G noise/s", lambda r: short(r["noise_per_s"] / 1e9), 9),
    *(_MEZO, _ADD),
]
PUBLISHED = [
    _text("workload", "workload", 13),
    *(_DTYPE, _DIST, _ROUNDING, _BACKEND, *_TIMES, _GB, _COPY),
    Column("of peak", lambda r: f"{r['of_peak']:.2f}" if r["of_peak"] else "-", 7),
    Column("theirs", lambda r: f"{r['published']['of_peak']:.2f}", 6),
    Column("their ms", lambda r: short(r["published"]["p50"] * 1e3), 8),
    Column("on", lambda r: r["published"]["gpu"], 9, right=False),
    _MEZO,
]
_KINDS = {"published": PUBLISHED, "step": STEP, "fan_out_": FAN_OUT, "many": MANY}


def columns_of(row: Row) -> list[Column]:
    return _KINDS.get(row["op"], COLUMNS)


LEGEND = (
    "perturb_: one pass of an eager loop or of a kernel on another generator, named in the column backend.\n"
    "of copy: share of the bandwidth of a plain pass over the same bytes (in place for combine_).\n"
    "of peak: share of what the memory can move by its clock and width; theirs: of the card named, "
    "by its data sheet.\n"
    "x MeZO, x foreach, x add_: times faster, per element, than MeZO's loop, torch._foreach_add_ and "
    "a draw + add_.\n"
    "All of these were timed in turns with the row, in the same run."
)


class Printer:
    """Prints rows as they come, in columns of fixed width, with a new heading wherever the columns change."""

    def __init__(self) -> None:
        self._columns: list[Column] | None = None

    @staticmethod
    def _line(cells: Sequence[str], columns: Sequence[Column]) -> str:
        pairs = zip(cells, columns, strict=True)
        return " ".join(c.rjust(k.width) if k.right else c.ljust(k.width) for c, k in pairs).rstrip()

    def head(self, row: Row) -> str | None:
        """The heading to print above ``row``, if it needs another one than the row before."""
        columns = columns_of(row)
        if columns is self._columns:
            return None
        gap = "" if self._columns is None else "\n"
        self._columns = columns
        line = self._line([c.head for c in columns], columns)
        return f"{gap}{line}\n{'-' * len(line)}"

    def row(self, row: Row) -> str:
        columns = columns_of(row)
        return self._line([c.show(row) for c in columns], columns)


def markdown(rows: Sequence[Row]) -> str:
    """One table for each kind of row, in the order in which the kinds come."""
    tables = []
    for columns in ({id(columns_of(r)): columns_of(r) for r in rows}).values():
        lines = ["| " + " | ".join(c.head for c in columns) + " |"]
        lines.append("|" + "|".join("--:" if c.right else "---" for c in columns) + "|")
        mine = (r for r in rows if columns_of(r) is columns)
        lines += ["| " + " | ".join(c.show(r) for c in columns) + " |" for r in mine]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
