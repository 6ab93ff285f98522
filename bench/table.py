"""Rows as an aligned table: for the terminal and, with bars, for markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .registry import Row


def short(value: float) -> str:
    """Three significant digits without an exponent, in five characters up to 99999."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


#: Heading, how a row is shown, and whether it is a number (flush right).
COLUMNS: list[tuple[str, Callable[[Row], str], bool]] = [
    ("op", lambda r: r["op"], False),
    ("K", lambda r: str(r["k"]), True),
    ("dtype", lambda r: r["dtype"], False),
    ("dist", lambda r: r["dist"], False),
    ("rounding", lambda r: r["rounding"], False),
    ("backend", lambda r: r["backend"], False),
    ("thr", lambda r: str(r["threads"]), True),
    ("p20 ms", lambda r: short(r["p20"] * 1e3), True),
    ("p50 ms", lambda r: short(r["p50"] * 1e3), True),
    ("p80 ms", lambda r: short(r["p80"] * 1e3), True),
    ("GB/s", lambda r: short(r["gb_per_s"]), True),
    ("ns/el", lambda r: short(r["ns_per_element"]), True),
    ("of copy", lambda r: f"{r['copy_fraction']:.2f}", True),
    ("x MeZO", lambda r: f"{r['ratio']['mezo']:.1f}", True),
    ("x foreach", lambda r: f"{r['ratio']['foreach']:.1f}", True),
    ("x add_", lambda r: f"{r['ratio']['inplace']:.1f}", True),
]

LEGEND = (
    "of copy: share of the bandwidth of a plain pass over the same bytes (in place for combine_).\n"
    "x MeZO, x foreach, x add_: times faster, per element, than MeZO's loop, torch._foreach_add_ and a draw + add_.\n"
    "All of these were timed in turns with the row, in the same run."
)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    return [[show(row) for _, show, _ in COLUMNS] for row in rows]


class Printer:
    """Prints rows as they come: widths are those of the headings and of the widest value that a column can take."""

    WIDTHS = (8, 1, 5, 10, 10, 9, 3, 6, 6, 6, 5, 5, 7, 6, 9, 6)

    def _line(self, cells: Sequence[str]) -> str:
        pairs = zip(cells, self.WIDTHS, COLUMNS, strict=True)
        return " ".join(c.rjust(w) if right else c.ljust(w) for c, w, (_, _, right) in pairs).rstrip()

    def head(self) -> str:
        line = self._line([name for name, _, _ in COLUMNS])
        return f"{line}\n{'-' * len(line)}"

    def row(self, row: Row) -> str:
        return self._line(_cells([row])[0])


def markdown(rows: Sequence[Row]) -> str:
    head = "| " + " | ".join(name for name, _, _ in COLUMNS) + " |"
    rule = "|" + "|".join("--:" if right else "---" for _, _, right in COLUMNS) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(cells) + " |" for cells in _cells(rows))])
