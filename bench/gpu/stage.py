"""What a stage of gpu-check is, and what its function may use.  Each runs in a process of its own."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Skip(Exception):
    """Raised by a stage that cannot run on this machine; the message says why."""


class Failure(Exception):
    """Raised by a stage that ran and found something wrong; the message says what."""


@dataclass(frozen=True)
class Context:
    """What is the same for all stages of a check, and is given to each."""

    output: pathlib.Path  # the folder of the results, in which a stage leaves its rows as <stage>.json
    scratch: pathlib.Path  # a folder that is removed after the check
    arch: str = "9.0"  # compute capability of the GPU
    rehearse: bool = False  # tiny sizes on the CPU
    prebuilt: pathlib.Path | None = None  # the folder that `make gpu-prebuilt` made

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def sm(self) -> str:
        return self.arch.replace(".", "")

    def dumps(self) -> str:
        return json.dumps({k: str(v) if isinstance(v, pathlib.Path) else v for k, v in asdict(self).items()})

    @classmethod
    def loads(cls, text: str) -> Context:
        found = json.loads(text)
        paths = {k: pathlib.Path(found[k]) for k in ("output", "scratch", "prebuilt") if found[k]}
        return cls(**{**found, **paths})


@dataclass(frozen=True)
class Stage:
    """A step of the check, which is one line of the plan.

    name: also that of its log and of its rows.
    kind: "required" must pass; "optional" may be skipped but not fail; "measure" does not decide whether the
    check passes.
    seconds: what it is expected to take.  It is started only where that much time is left.
    limit: seconds after which it is stopped.
    run: the work.  Returns a note for the report; raises Skip or Failure, and any other exception counts as a
    failure.
    decides: what its end tells, in words.
    beside: it is started together with the stage before it.
    """

    name: str
    kind: str
    seconds: int
    limit: int
    run: Callable[[Context], str]
    decides: str
    beside: bool = False


def command(stage: Stage, ctx: Context) -> list[str]:
    """The process of ``stage``: ``bench/gpu/__main__.py``."""
    return [sys.executable, "-m", "bench.gpu", stage.name, ctx.dumps(), str(os.getpid())]


def environment(**more: str) -> dict[str, str]:
    """The variables of a process: this tree first on Python's path, so that no installed copy is tested
    instead.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def run(arguments: list[str], **env: str) -> tuple[int, str]:
    """Exit status and output of a program, which is printed (to the stage's log) as it comes; 127: no such
    program.
    """
    print("$ " + " ".join(arguments), flush=True)
    try:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment(**env), text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        print(error, flush=True)
        return 127, str(error)
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        print(line, end="", flush=True)
    return process.wait(), "".join(lines)


_ERROR = re.compile(r"[\w.]*(Error|Exception): ")


def must(arguments: list[str], **env: str) -> str:
    """The output of a program, which must end with exit status 0."""
    code, text = run(arguments, **env)
    if code:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]  # an error of torch is followed by advice
        raise Failure(f"exit status {code}: {''.join((errors or lines)[-1:])[:300]}")
    return text


def execute(stage: Stage, ctx: Context) -> tuple[str, str]:
    """Runs a stage in this process and returns its status and note.  A traceback is printed."""
    try:
        return "passed", stage.run(ctx)
    except Skip as reason:
        return "skipped", str(reason)
    except Failure as found:
        return "failed", str(found)
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {str(error)[:300]}"


def end_with(parent: int) -> None:
    """Ends this process and all that it started once the process ``parent``, which started it, is gone.

    So a check that was killed (kill -9) leaves nothing running.  This process leads a group of its own.

    The number is told and not asked for here: the parent may be gone before this process has come so far.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)
