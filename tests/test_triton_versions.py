"""The oldest and the newest supported Triton: every kernel compiles with both, and within the same ceilings.

Beside the environment's own Triton each has a folder with nothing else in it (triton-versions.txt), which a
process of its own puts before the environment's packages.  These processes run the tests of the kernels once
more, at one time."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
from packaging.requirements import Requirement

from zokernels.backends import BackendUnavailable, triton

ROOT = pathlib.Path(__file__).parent.parent
#: Where the folders are; ``make test`` has them in the environment.
FOLDERS = pathlib.Path(os.environ.get("ZOKERNELS_TRITONS") or sys.prefix)
LINES = [
    line.split()
    for line in (ROOT / "triton-versions.txt").read_text().splitlines()
    if not line.startswith("#")
]
#: Version by folder.
VERSIONS = {folder: Requirement(first).specifier for folder, first, *_ in LINES}

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)

#: Each a process: a folder, and a file of tests.  With the oldest the interpreter too, which has changed most
#: since.
RUNS = [*((folder, "test_triton_compile.py") for folder in VERSIONS), (LINES[0][0], "test_triton.py")]

_MAIN = """
import sys, pytest, triton
from packaging.specifiers import SpecifierSet
assert SpecifierSet(sys.argv[1]).contains(triton.__version__), triton
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def runs():
    """Of each run its process and the file with what it writes; all at one time."""
    found = {}
    for folder, tests in RUNS:
        if not (FOLDERS / folder).is_dir():
            continue
        path = os.pathsep.join(filter(None, (str(FOLDERS / folder), str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path}
        output = tempfile.TemporaryFile()  # noqa: SIM115  read by the test, closed below
        command = [sys.executable, "-c", _MAIN, str(VERSIONS[folder]), str(ROOT / "tests" / tests)]
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        found[folder, tests] = process, output
    yield found
    for process, output in found.values():
        process.kill()
        process.wait()
        output.close()


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "tests"), RUNS)
def test_kernels(runs, folder, tests):
    if (folder, tests) not in runs:
        pytest.skip(f"no {FOLDERS / folder}: `make test` installs it")
    process, output = runs[folder, tests]
    code = process.wait()
    output.seek(0)
    text = output.read().decode(errors="replace")
    if code:
        pytest.fail(f"{folder}, {tests}:\n{text[-20000:]}", pytrace=False)
    # Behind pytest's last line Triton 3.9 may tell of objects that Python did not free at its end.
    summary = [line for line in text.splitlines() if re.search(r"\d+ passed.* in \d", line)]
    assert summary, text[-2000:]
    assert int(re.search(r"(\d+) passed", summary[-1])[1]) > 60
    assert "skipped" not in summary[-1], text[-2000:]


def test_what_is_supported_is_what_is_tested():
    """Of triton-versions.txt, of pyproject.toml, and of the backend itself."""
    tested = sorted(tuple(map(int, re.findall(r"\d+", str(version))[:2])) for version in VERSIONS.values())
    assert (tested[0], tested[-1]) == (triton.OLDEST, triton.NEWEST)
    extra = re.search(r'^triton = \["triton>=(.+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra
    assert extra[1] == ".".join(map(str, triton.OLDEST))


@pytest.mark.parametrize("version", ["3.5.1", "3.5.0+git1234", "2.3.1", "3.6.0.dev1", "unknown"])
def test_an_older_version_is_unavailable(version):
    expected = f"triton: expected version 3.6 or later, got {version}; `pip install 'triton>=3.6'`"
    if version.startswith("3.6"):
        assert triton.load(version).note == ""
        return
    with pytest.raises(BackendUnavailable) as error:
        triton.load(version)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0", "3.9.7+git1234"])
def test_a_tested_version_is_ordinary(version):
    assert triton.load(version).note == ""


@pytest.mark.parametrize("version", ["3.10.0", "4.0.0"])
def test_a_newer_version_loads_and_is_noted(version):
    assert triton.load(version).note == f"Triton {version}: newer than 3.9, the newest that is tested"


def test_the_report_has_the_note(monkeypatch):
    from zokernels import report
    from zokernels.backends import registry

    monkeypatch.setitem(registry.LOADED, "triton", triton.load("3.10.0"))
    assert "newer than 3.9, the newest that is tested" in report.text(report.facts())
