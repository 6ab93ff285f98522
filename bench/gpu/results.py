"""What a check knows so far, on disk after every stage: a check that is cut off, even by kill -9, still says
it.

The folder holds result.json, README.md (both replaced whole), log.txt with the logs of all stages that have
ended, and, while a stage runs, its own <stage>.log and <stage>.json: few files, since some machines hand back
only a few.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import summary
from .plot import plot
from .runner import Outcome, verdict
from .stage import Stage, replace
from .stages import count_tests, in_words

#: How many lines of a failed stage's log the report shows.
_TAIL = 15


class Results:
    """machine: the header of bench.machine.  minutes: those that were asked for.  plan: the stages that are
    to come.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        machine: dict[str, Any],
        minutes: float,
        rehearse: bool,
        plan: Sequence[Stage],
    ) -> None:
        self.folder, self.rehearse, self.outcomes = folder, rehearse, list[Outcome]()
        self._decides = {stage.name: stage.decides for stage in plan}
        self.result: dict[str, Any] = {
            "schema": 1,
            "machine": machine,
            "minutes": minutes,
            "rehearsal": rehearse,
        }
        self.result |= {"passed": False, "finished": False, "running": [], "stopped_by": None, "stages": []}
        self.result |= {"skipped": {}, "rows": [], "clock_mhz": {}}
        self.result |= {"offload": [], "ncu": [], "population": []}
        folder.mkdir(parents=True, exist_ok=True)
        # What an earlier check left is removed: if a stage does not run now, its old figures must not be
        # shown.
        for stale in folder.iterdir():
            if stale.suffix in (".json", ".log", ".txt", ".png", ".md"):
                stale.unlink()

    def starting(self, group: Sequence[Stage]) -> None:
        self.result["running"] = [stage.name for stage in group]
        self.save()

    def add(self, outcome: Outcome) -> None:
        """Adds how a stage ended, its rows and its log, and saves the result."""
        self.outcomes.append(outcome)
        self.result["running"] = [name for name in self.result["running"] if name != outcome.name]
        log = self.folder / f"{outcome.name}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        tail = [line[:300] for line in text.splitlines() if line.strip()][-_TAIL:]
        kept = self._take_rows(outcome.name)
        entry = {**asdict(outcome), "decides": self._decides[outcome.name]}
        if outcome.status == "stopped":
            before = f"{kept} rows" if kept else in_words(count_tests(text))
            entry["note"] += f"; before that: {before}" if before else ""
        if outcome.status in ("failed", "stopped"):
            entry["tail"] = tail
        self.result["stages"].append(entry)
        with (self.folder / "log.txt").open("a") as file:
            heading = f"{outcome.name}: {outcome.status}, {outcome.seconds} s: {outcome.note}"
            file.write(f"=== {heading} ===\n{text}\n")
        log.unlink(missing_ok=True)
        self.save()

    def _take_rows(self, name: str) -> int:
        """Moves the rows of <stage>.json into the result, also those of a stage that was stopped; returns
        their number.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            return 0
        try:
            found = json.loads(path.read_text())
        except ValueError:
            return 0  # the stage was killed while it wrote
        self.result[found.get("kind", "rows")] += found["rows"]
        self.result["skipped"] |= found.get("skipped", {})
        if "clock_mhz" in found:
            self.result["clock_mhz"][name] = found["clock_mhz"]
        path.unlink()
        return len(found["rows"])

    @property
    def passed(self) -> bool:
        return self.result["stopped_by"] is None and verdict(self.outcomes, self.rehearse)

    def save(self) -> None:
        goals = summary.all_goals(self.result)
        found = {
            **self.result,
            "goals": [{**asdict(g), "ratio": g.ratio, "verdict": g.verdict} for g in goals],
        }
        replace(self.folder / "result.json", json.dumps(found, indent=1) + "\n")
        replace(
            self.folder / "README.md",
            summary.readme(self.result, goals, (self.folder / "result.png").exists()),
        )

    def finish(self, stopped_by: str | None) -> list[pathlib.Path]:
        """Saves the verdict and, unless time is short, the picture.  Returns the files in the folder."""
        self.result |= {"finished": True, "running": [], "stopped_by": stopped_by}
        self.result["passed"] = self.passed
        if stopped_by is None:
            try:
                plot(self.folder / "result.png", self.result)
            # without matplotlib, say: the figures must not be lost with it
            except (Exception, SystemExit) as error:
                self.result["skipped"]["plot"] = f"{type(error).__name__}: {error}"
        self.save()
        return sorted(self.folder.iterdir())
