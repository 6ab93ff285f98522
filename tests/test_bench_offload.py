"""``python -m bench offload``: every form that streams has its rows, and moves the bytes that it should."""

from __future__ import annotations

import json

import pytest
import torch

from bench import offload
from bench.__main__ import main


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, str], dict]:
    path, threads = tmp_path_factory.mktemp("bench") / "result.json", torch.get_num_threads()
    try:
        assert main(["offload", "--tiny", "--form", "all", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(path.read_text())["rows"]
    assert len({(r["form"], r["storage"]) for r in found}) == len(found)
    return {(r["form"], r["storage"]): r for r in found}


def test_every_form_has_a_row_of_each_of_its_storages(rows):
    expected = [(name, s) for name, form in offload.FORMS.items() for s in form.storages if s != "device"]
    assert sorted(rows) == sorted(expected)


def test_rows_say_what_bounds_a_step(rows):
    for (_, storage), row in rows.items():
        assert row["step"] > 0 < row["compute"]
        assert row["read"] > 0
        assert row["bound"] == max(row["compute"], row["read"] + row["write"])
        assert row["ratio"] == row["step"] / row["bound"]
        if storage == "disk":
            assert row["write"] == 0  # nothing is written


def test_states_and_integers_are_in_the_bytes_that_move(rows):
    """A layer has 12 width^2 weights in matrices and 13 width in vectors."""
    size = {form: gib * 2**30 for form, gib in ((f, r["gib"]) for (f, s), r in rows.items())}
    layers, width, _ = offload.SHAPES["tiny"]
    weights = layers * (12 * width**2 + 13 * width)
    room = layers * 30 * 4096  # tensors and blocks begin at multiples of 256 and 4,096 bytes
    wanted = {"sgd": 4, "adam": 12, "adam, bf16 states": 8, "sparse-mezo": 4 + 1 / 8, "lozo": 4, "cache": 4}
    wanted["bf16 master"] = 2
    for form, each in wanted.items():
        assert each * weights <= size[form] < each * weights + room, form
    for form in ("qzo", "quzo"):
        assert layers * 12 * width**2 < size[form] < 0.5 * size["sgd"], form
