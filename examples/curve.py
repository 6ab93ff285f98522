"""Draws the loss curve of the demo as a PNG."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_INK, _BLUE, _ORANGE = "#222222", "#3b6ea5", "#d1662a"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean over the last ``window`` values, or over fewer at the start."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def draw(
    path: pathlib.Path, losses: Sequence[float], points: Sequence[tuple[int, float, float]], title: str
) -> None:
    """Draws the losses of the steps, and ``points`` of the validation sentences to ``path``.

    A point is (steps taken, loss, accuracy in [0, 1]).
    """
    window = max(1, len(losses) // 20)
    steps = range(1, len(losses) + 1)
    at, val_loss, accuracy = zip(*points, strict=True)
    with plt.rc_context(
        {"font.size": 10, "axes.edgecolor": "#999999", "axes.labelcolor": _INK, "text.color": _INK}
    ):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2), constrained_layout=True
        )
        top.plot(steps, losses, color=_BLUE, alpha=0.18, linewidth=0.8, label="training, each step")
        full = slice(window - 1, None)  # from the first full window on
        mean = smooth(losses, window)[full]
        top.plot(steps[full], mean, color=_BLUE, linewidth=1.8, label=f"training, mean of {window} steps")
        top.plot(at, val_loss, "o-", color=_ORANGE, linewidth=1.2, markersize=4.5, label="validation")
        top.set_ylabel("cross entropy")
        ordered = sorted(losses)
        trim = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]
        low, high = min(trim(0.01), *val_loss), max(trim(0.99), *val_loss)
        top.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        top.legend(frameon=False)
        bottom.plot(at, [100 * a for a in accuracy], "o-", color=_ORANGE, linewidth=1.2, markersize=4.5)
        for i, offset, align in ((0, (9, -3), "left"), (-1, (0, 8), "right")):
            where = (at[i], 100 * accuracy[i])
            bottom.annotate(f"{where[1]:.1f} %", where, xytext=offset, textcoords="offset points", ha=align)
        bottom.margins(y=0.2)
        bottom.set_ylabel("validation accuracy, %")
        bottom.set_xlabel("step (two forwards each)")
        bottom.set_xlim(0, max(at[-1], 1) * 1.01)
        for axes in (top, bottom):
            axes.grid(color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(color="#999999", labelcolor=_INK)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=150)
        plt.close(figure)
