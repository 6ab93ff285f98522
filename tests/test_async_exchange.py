"""AsyncExchange in one process: each record is applied once, whatever interrupts it, and crafted ones are
refused.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.distributed as dist
from helpers import watched
from trajectory_cases import Model, assert_same, base_of

from zokernels.distributed import AsyncExchange, RanksDiffer
from zokernels.optim import ZOSGD, ZOAdamW
from zokernels.trajectory import replay_

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
KINDS = {
    "plain": (ZOSGD, {}),
    "momentum": (ZOSGD, {"momentum": 0.9}),
    "window": (ZOSGD, {"momentum": 0.9, "window": 3}),
    "Adam": (ZOAdamW, {}),
}


def joined(store, kind="plain", steps=9):
    model = Model(torch.bfloat16, random.Random(2))
    make, options = KINDS[kind]
    optimizer = make(model.named_parameters(), lr=0.05, weight_decay=0.1, seed=7, **options)
    return model, AsyncExchange(optimizer, store, steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", ["combine_", "update_"])
def test_an_exception_at_any_call_of_a_kernel_applies_nothing_twice(kind, operation, rng, tmp_path):
    """MemoryError before each call in turn, in whatever thread; catch_up() goes on where it was."""
    store = dist.FileStore(str(tmp_path / "store"), -1)
    model, first = joined(store, kind)
    base = base_of(model)
    for step in range(5):
        first.step(lambda: model.loss(step))  # noqa: B023
    first.save(tmp_path / "run.zk")
    replay_(base, tmp_path / "run.zk")
    assert_same(base_of(model), base)
    late, failures = 1, 0
    while True:
        calls = []

        def before(*args):
            calls.append(1)  # noqa: B023
            if len(calls) == late:  # noqa: B023
                raise MemoryError

        ours, second = None, None
        with watched(operation, before):
            try:
                ours, second = joined(store, kind)  # which catches up
            except MemoryError:
                failures += 1
        if second is not None:
            assert_same(base_of(ours), base)
            break
        late += 1
    assert failures >= 1 or not calls  # of this operation there may be none


def test_catching_up_goes_on_where_an_exception_left_it(rng, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), -1)
    model, first = joined(store, "Adam")
    ours, second = joined(store, "Adam")
    for step in range(4):
        first.step(lambda: model.loss(step))  # noqa: B023
    failed = 0
    for late in range(1, 40):
        calls = []

        def before(*args):
            calls.append(1)  # noqa: B023
            if len(calls) == late:  # noqa: B023
                raise MemoryError

        with watched("update_", before):
            try:
                second.catch_up()
                break
            except MemoryError:
                failed += 1
                assert second.count in (0, 4)
    assert failed > 1
    assert second.count == 4
    assert_same(base_of(ours), base_of(model))
    with pytest.raises(KeyError):
        first.step(lambda: {}["no loss"])
    for step in range(4, 9):
        second.step(lambda: ours.loss(step))  # noqa: B023
    first.catch_up()
    assert_same(base_of(ours), base_of(model))


def test_crafted_records_are_refused(rng, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), -1)
    model, first = joined(store)
    first.step(lambda: model.loss(0))
    good = first._layout.unpack(bytes.fromhex(store.get("0").decode().partition(" ")[2]), 0)
    bad = {
        "lr": good._replace(rates=(-1.0,)),
        "g": good._replace(gradients=((math.nan,),)),
        "infinite": good._replace(gradients=((math.inf,),)),
        "flags": good._replace(two_pass=True),
    }
    crafted = {name: f"0 {first._layout.pack(record).hex()}" for name, record in bad.items()}
    crafted |= {"no hex": "0 xyz", "short": "0 00", "not text": "0 \udcff".encode("utf-8", "surrogateescape")}
    before = base_of(model)
    for data in crafted.values():
        first._next = [data.encode() if isinstance(data, str) else data]
        with pytest.raises((ValueError, RuntimeError), match=r"replay_: step|AsyncExchange: record 1"):
            first._apply()
        assert_same(base_of(model), before)
        assert first.count == 1
    first._next = []
    first.catch_up()


def test_what_all_processes_must_have_in_common_includes_the_end(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), -1)
    joined(store)
    with pytest.raises(RanksDiffer, match="steps: expected the same on all processes, got 8 here and 9"):
        joined(store, steps=8)


def test_a_log_that_cannot_be_saved_leaves_no_file(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), -1)
    model, first = joined(store)
    first.step(lambda: model.loss(0))

    class Gone:
        def get(self, key):
            raise RuntimeError("the store is gone")

    first.store = Gone()
    with pytest.raises(RuntimeError, match="is gone"):
        first.save(tmp_path / "merged.zk")
    assert not (tmp_path / "merged.zk").exists()
    first.store = store
    first.save(tmp_path / "merged.zk")
    with pytest.raises(FileExistsError):
        first.save(tmp_path / "merged.zk")
