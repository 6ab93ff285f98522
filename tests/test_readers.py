"""The readers of files on the corpus of their fuzzing: real files, cut and edited ones, and what was once
a fault.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from reader_cases import CORPUS, READERS, accepts, corpus_of, edited, mended

FILES = [(reader, path) for reader in READERS for path in sorted(corpus_of(reader).iterdir())]


@pytest.mark.parametrize(("reader", "path"), FILES, ids=[f"{reader}-{path.name}" for reader, path in FILES])
def test_a_file_is_read_or_refused(reader, path):
    """Another error than ValueError and OSError fails here.

    Mended, a damaged log is one with other contents.
    """
    assert path.name.startswith(("good-", "bad-"))
    found = accepts(reader, path.read_bytes())
    if reader != "mended_log":
        assert found == path.name.startswith("good-")


@pytest.mark.parametrize("reader", READERS)
def test_edited_files_are_read_or_refused(reader, rng):
    """What the fuzzer does, without its search: 200 files of the corpus with odd values in their JSON."""
    files = [
        path.read_bytes() for path in sorted(corpus_of(reader).iterdir()) if path.name.startswith("good-")
    ]
    refused = 0
    for _ in range(200):
        data = edited(reader, rng.choice(files), rng)
        try:
            refused += not accepts(reader, data)
        except Exception as error:
            error.add_note(f"{reader} of {data!r}") if hasattr(error, "add_note") else None
            raise
    assert refused > 0


def test_every_reader_has_good_and_bad_files():
    for reader in READERS:
        names = [path.name for path in corpus_of(reader).iterdir()]
        assert {name.partition("-")[0] for name in names} == {"good", "bad"}, reader


def test_the_corpus_is_small():
    """It is cloned by everyone: at most 256 KiB, no file of more than 16."""
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert max(sizes) <= 16 << 10
    assert sum(sizes) <= 256 << 10


def test_mending_keeps_a_good_log_and_mends_checksums():
    data = (CORPUS / "log" / "good-sgd").read_bytes()
    assert mended(data) == data
    assert accepts("log", mended((CORPUS / "log" / "bad-a-flipped-bit").read_bytes()))


#: Of each part of an optimizer, the names of the package's classes that a process knows.
KINDS = """
import json, sys
{}
from zokernels.step.directions.direction import Direction
from zokernels.step.estimators import Estimator
from zokernels.step.rules.rule import Rule
from zokernels.step.subset import Subset

def below(kind):
    return {{kind}}.union(*map(below, kind.__subclasses__()))

kinds = set().union(*map(below, (Direction, Estimator, Rule, Subset)))
print(json.dumps(sorted(kind.__name__ for kind in kinds if kind.__module__.startswith("zokernels."))))
"""


def test_a_process_that_only_replays_knows_every_class_that_a_log_may_name():
    """zokernels replay imports no optimizer; a class that it does not know is a log that it refuses."""
    found = []
    for imports in ("import zokernels.trajectory", "import zokernels.trajectory, zokernels.optim"):
        command = [sys.executable, "-c", KINDS.format(imports)]
        found.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    alone, with_optimizers = found
    assert "Adam" in alone
    assert alone == with_optimizers
