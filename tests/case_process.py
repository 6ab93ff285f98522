"""A process that runs the cases of a test file which cannot run in pytest's own: one case for each test."""

from __future__ import annotations

import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile

import pytest

TESTS = pathlib.Path(__file__).parent


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that can import the tests' modules and this tree's package."""
    path = os.pathsep.join((str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])))
    return {**os.environ, "PYTHONPATH": path, **variables}


class CaseProcess:
    """``script``, which answers each line of JSON on its standard input with one on its standard output.

    It starts with the first question.  A process that ends, or gives no answer for ``limit`` seconds, is the
    failure of that one case; the next question starts another."""

    def __init__(self, script: str, *arguments: object, limit: float, **variables: str) -> None:
        self.command = [sys.executable, str(TESTS / script), *map(str, arguments)]
        self.limit, self.variables = limit, variables
        self.process: subprocess.Popen | None = None
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  read after the process has ended

    def ask(self, **question: object) -> object:
        if self.process is None:
            self.errors.truncate(0)
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
            self.process = subprocess.Popen(
                self.command, env=environment(**self.variables), text=True, **pipes
            )
        answer, end = "", "ended"
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            if select.select([self.process.stdout], [], [], self.limit)[0]:
                answer = self.process.stdout.readline()
            else:
                end = f"did not answer for {self.limit} s"
        except BrokenPipeError:
            pass
        if not answer:
            self.stop()
            pytest.fail(f"{question}: the process {end}\n{self.said()}", pytrace=False)
        return json.loads(answer)

    def said(self) -> str:
        """The end of what the process wrote to its standard error."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-4000:]

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()  # the process ends at the end of its input
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            self.process = None
