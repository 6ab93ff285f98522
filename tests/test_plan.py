"""Plans: the same bits and the same errors as the calls that they stand for, whatever happens between two
calls.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import (
    DTYPES,
    STATE_DTYPES,
    add_extras,
    assert_same_bits,
    placed,
    random_call,
    random_values,
    watched,
)
from torch import Tensor, nn

import zokernels
from zokernels.backends import get
from zokernels.ops import plan as plans
from zokernels.ops.update import RULES

needs_reader = pytest.mark.skipif(
    plans.fingerprint(([torch.zeros(1)],)) is None, reason="the host module is not built"
)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """The compiled backend, which takes tables, and one that takes tensors."""
    try:
        get(request.param)
    except zokernels.BackendUnavailable as error:
        pytest.skip(str(error))
    with zokernels.backend(request.param):
        yield request.param


def kernels_called(library: str, call: Callable[[], object]) -> list[str]:
    """The kernels of a compiled library that ``call`` runs, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = (event.name for event in profile.events())
    return [name.removeprefix(f"{library}::") for name in names if name.startswith(f"{library}::")]


def weights(count: int = 5, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3 + 7 * i, 5).to(dtype)) for i in range(count)]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


SEEDS, COEFFS = torch.tensor([3, -4]), torch.tensor([1e-2, -3e-3])


# --- bits -------------------------------------------------------------------------------------------------


def both(
    planned: Callable[..., object], plain: Callable[..., object], sides: list[list[Tensor]], calls: int = 3
) -> None:
    """``planned`` and ``plain``, called in turns on tensors of their own, write the same bits each time.

    ``sides``: the tensors that both write to, and those of the plain calls.
    """
    for i in range(calls):
        planned()
        plain()
        for a, b in zip(*sides, strict=True):
            assert_same_bits(a, b, f"call {i}")


@pytest.mark.parametrize("case", range(6))
def test_combine_in_place(backend, case, rng):
    buffers, parts, kwargs = random_call(rng, max_size=900, count=rng.choice([0, 1, 2, 5]))
    if rng.random() < 0.7:
        kwargs = add_extras(rng, parts, kwargs)
    theirs = copies(buffers)
    places = {"streams": kwargs.pop("streams"), "offsets": kwargs.pop("offsets")}
    kept = zokernels.plan(placed(buffers, parts), **places)
    plain = lambda: zokernels.combine_(placed(theirs, parts), **places, **kwargs)
    both(lambda: zokernels.combine_(kept, **kwargs), plain, [buffers, theirs])


@pytest.mark.parametrize("case", range(4))
def test_combine_out_of_place(backend, case, rng):
    buffers, parts, kwargs = random_call(rng, max_size=900)
    kwargs = add_extras(rng, parts, kwargs)
    places = {"streams": kwargs.pop("streams"), "offsets": kwargs.pop("offsets")}
    ours, theirs = ([torch.full_like(b, 7.0) for b in buffers] for _ in range(2))
    tensors = placed(buffers, parts)
    kept = zokernels.plan(tensors, **places)
    planned = lambda: zokernels.combine(placed(ours, parts), kept, **kwargs)
    both(
        planned, lambda: zokernels.combine(placed(theirs, parts), tensors, **places, **kwargs), [ours, theirs]
    )


@pytest.mark.parametrize("pending", [False, True])
def test_fan_out(backend, pending, rng):
    buffers, parts, kwargs = random_call(rng, max_size=900, count=2 if pending else 0, decay=None)
    places = {"streams": kwargs.pop("streams"), "offsets": kwargs.pop("offsets")}
    ours = [copies(buffers) for _ in range(3)]
    theirs = [copies(buffers) for _ in range(3)]
    kept = zokernels.plan(placed(ours[0], parts), **places)
    sides = lambda all_three: [placed(buffer, parts) for buffer in all_three]
    planned = lambda: zokernels.fan_out_(kept, *sides(ours)[1:], 5, 1e-3, **kwargs)
    plain = lambda: zokernels.fan_out_(*sides(theirs), 5, 1e-3, **places, **kwargs)
    both(planned, plain, [[t for side in ours for t in side], [t for side in theirs for t in side]])


@pytest.mark.parametrize("rule", RULES)
def test_update(backend, rule, rng):
    buffers, parts, kwargs = random_call(
        rng, max_size=700, count=1 if rule == "hizoo" else rng.choice([1, 3])
    )
    kwargs = add_extras(rng, parts, kwargs, curvature=False)
    places = {"streams": kwargs.pop("streams"), "offsets": kwargs.pop("offsets")}
    states, values = RULES[rule]
    values += kwargs["seeds"].numel() if rule == "adam_window" else 0
    hyper = torch.tensor([0.1 + 0.01 * rng.random() for _ in range(values)])
    dtype = rng.choice(STATE_DTYPES)
    ours = [[random_values(p.stop - p.start, dtype, rng).abs() for p in parts] for _ in range(states)]
    theirs = [copies(state) for state in ours]
    named = lambda lists: dict(zip(("first", "second"), lists, strict=False))
    copied = copies(buffers)
    kept = zokernels.plan(placed(buffers, parts), **places)
    planned = lambda: zokernels.update_(kept, rule, hyper, **named(ours), **kwargs)
    plain = lambda: zokernels.update_(placed(copied, parts), rule, hyper, **named(theirs), **places, **kwargs)
    both(planned, plain, [sum(ours, buffers), sum(theirs, copied)])


@pytest.mark.parametrize("masked", [False, True])
def test_rows(backend, masked, rng):
    """Columns of matrices, whose rows are no multiple of a block."""
    shapes, widths = [(40, 24), (7, 130)], [8, 65]
    parts = [torch.randn(m, w) for (m, _), w in zip(shapes, widths, strict=True)]
    theirs = copies(parts)
    places = {
        "streams": [4, 9],
        "offsets": [8, 13],
        "rows": [(w, n) for (_, n), w in zip(shapes, widths, strict=True)],
    }
    options = {}
    if masked:
        keep = [torch.rand_like(p) < 0.5 for p in parts]
        where = zip(keep, places["offsets"], places["rows"], strict=True)
        options["masks"] = [zokernels.pack_mask(*one) for one in where]
    kept = zokernels.plan(parts, **places)
    plain = lambda: zokernels.combine_(theirs, SEEDS, COEFFS, **places, **options)
    both(lambda: zokernels.combine_(kept, SEEDS, COEFFS, **options), plain, [parts, theirs])


def test_hundreds_of_tensors_with_empty_ones(backend, rng):
    sizes = [rng.choice([0, 1, 3, 8, 64, 65]) for _ in range(388)]
    ours = [torch.randn(n) for n in sizes]
    theirs = copies(ours)
    kept = zokernels.plan(ours, range(388))
    coeffs = torch.randn(388, 2)
    plain = lambda: zokernels.combine_(theirs, SEEDS, coeffs, streams=range(388), dist="rademacher")
    both(lambda: zokernels.combine_(kept, SEEDS, coeffs, dist="rademacher"), plain, [ours, theirs])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(backend, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = [torch.randn(70_001), torch.randn(3), torch.randn(50_000)]
        theirs = copies(ours)
        kept = zokernels.plan(ours, [1, 2, 3])
        plain = lambda: zokernels.combine_(theirs, SEEDS, COEFFS, streams=[1, 2, 3])
        both(lambda: zokernels.combine_(kept, SEEDS, COEFFS), plain, [ours, theirs], calls=2)
    finally:
        torch.set_num_threads(before)


def test_no_tensors(backend):
    for _ in range(2):
        zokernels.combine_(zokernels.plan([], []), SEEDS, COEFFS)


# --- one kernel, and when ---------------------------------------------------------------------------------


@needs_reader
def test_the_second_call_takes_the_table():
    get("cpu")
    check_tables_are_taken("zokernels_cpu")


def check_tables_are_taken(library: str) -> None:
    params, scratch = weights(70), [torch.empty_like(p) for p in weights(70)]
    plus, minus = copies(scratch), copies(scratch)
    states = [torch.zeros_like(p, requires_grad=False) for p in params]
    kept = zokernels.plan(params, range(70))
    calls = {
        "combine_planned": lambda: zokernels.combine_(kept, SEEDS, COEFFS),
        "combine_planned ": lambda: zokernels.combine(scratch, kept, SEEDS, COEFFS),
        "fan_out_planned": lambda: zokernels.fan_out_(kept, plus, minus, 1, 1e-3),
        "update_planned": lambda: zokernels.update_(
            kept, "momentum", [0, 0.9, 1, 1e-3], 1, 1.0, first=states
        ),
    }
    for name, call in calls.items():
        assert kernels_called(library, call) == [name.strip().removesuffix("_planned")]
    for _ in range(2):  # in turns, too: a plan keeps the outcomes of several calls
        for name, call in calls.items():
            assert kernels_called(library, call) == [name.strip()]


@needs_reader
def test_versions_advance():
    get("cpu")
    params, scratch = weights(), copies(weights())
    kept = zokernels.plan(params, range(5))
    for _ in range(3):
        before = [(p._version, s._version) for p, s in zip(params, scratch, strict=True)]
        zokernels.combine_(kept, SEEDS, COEFFS)
        zokernels.combine(scratch, kept, SEEDS, COEFFS)
        after = [(p._version, s._version) for p, s in zip(params, scratch, strict=True)]
        assert all(a > c and b > d for (a, b), (c, d) in zip(after, before, strict=True))


def test_a_plan_holds_no_other_tensor():
    params, scratch = weights(), copies(weights())
    kept = zokernels.plan(params, range(5))
    for _ in range(2):
        zokernels.combine(scratch, kept, SEEDS, COEFFS)
    held = [weakref.ref(s) for s in scratch]
    del scratch
    gc.collect()
    assert [ref() for ref in held] == [None] * 5


def test_backends_in_turns():
    """An outcome belongs to a backend."""
    get("cpu")
    ours, theirs = weights(), copies(weights())
    theirs = copies(ours)
    kept = zokernels.plan(ours, range(5))
    for name in ("cpu", "reference", "cpu", "reference", "cpu"):
        with zokernels.backend(name):
            zokernels.combine_(kept, SEEDS, COEFFS)
            zokernels.combine_(theirs, SEEDS, COEFFS, streams=range(5))
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a.detach(), b, name)


def test_without_the_host_module():
    """Plans then make ordinary calls."""
    code = """
import sys
sys.modules["zokernels._host"] = None  # importing it fails
import torch, zokernels
ours = [torch.linspace(-1, 1, n) for n in (5, 1, 300)]
theirs, plain = [p.clone() for p in ours], [p.clone() for p in ours]
kept = zokernels.plan(ours, range(3))
for _ in range(3):
    zokernels.combine_(kept, [3, 4], [0.5, 0.25])
    zokernels.combine_(theirs, [3, 4], [0.5, 0.25], streams=range(3))
assert all(map(torch.equal, ours, theirs)), (ours, theirs)
assert not any(map(torch.equal, ours, plain))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what changes between calls ---------------------------------------------------------------------------


def other_memory(params: list[nn.Parameter]) -> None:
    params[2].data = params[2].data.clone() + 1


def other_size(params: list[nn.Parameter]) -> None:
    params[2].data.resize_(200, 3).fill_(0.5)


def other_storage(params: list[nn.Parameter]) -> None:
    params[2].data.set_(torch.randn(4, 4))


def other_dtype(params: list[nn.Parameter]) -> None:
    for p in params:
        p.data = p.data.bfloat16()


def swapped(params: list[nn.Parameter]) -> None:
    other = nn.Parameter(torch.randn(6, 6))
    torch.utils.swap_tensors(params[2], other)


def freed_and_used_again(params: list[nn.Parameter]) -> None:
    """Likely at the same address, of another dtype: the address alone says nothing."""
    params[2].data = torch.empty(0)
    params[2].data = torch.randn(17, 5)


CHANGES = [other_memory, other_size, other_storage, other_dtype, swapped, freed_and_used_again]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(backend, change):
    ours = weights()
    kept = zokernels.plan(ours, range(5))
    for _ in range(2):
        zokernels.combine_(kept, SEEDS, COEFFS)
    change(ours)
    theirs = copies(ours)
    for _ in range(3):
        zokernels.combine_(kept, SEEDS, COEFFS)
        zokernels.combine_(theirs, SEEDS, COEFFS, streams=range(5))
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a.detach(), b)


def scattered(params: list[Tensor]) -> None:
    params[2].data = torch.randn(5, 17).t()


def shared(params: list[Tensor]) -> None:
    params[2].data = params[3].data[:2]


def one_of_another_dtype(params: list[Tensor]) -> None:
    params[2].data = params[2].data.half()


def integers(params: list[Tensor]) -> None:
    for p in params:
        p.data = torch.ones(2, 3)
        p.requires_grad_(False)
        p.data = p.data.long()


FAULTS = [scattered, shared, one_of_another_dtype, integers]


def message(call: Callable[[], object]) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    return f"{error.type.__name__}: {error.value}"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_those_of_a_plain_call(backend, fault):
    params = weights()
    kept = zokernels.plan(params, range(5))
    for _ in range(2):
        zokernels.combine_(kept, SEEDS, COEFFS)
    fault(params)
    before = copies(params)
    for _ in range(2):
        ours = message(lambda: zokernels.combine_(kept, SEEDS, COEFFS))
        assert ours == message(lambda: zokernels.combine_(params, SEEDS, COEFFS, streams=range(5)))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_faults_of_what_comes_with_a_call(backend):
    """Seeds, coefficients and the rest are checked in each call, before anything is written."""
    params, good = weights(), {"seeds": SEEDS, "coeffs": COEFFS}
    kept = zokernels.plan(params, range(5))
    scratch, other = copies(params), copies(params)
    states = copies(params)
    for _ in range(2):
        zokernels.combine_(kept, **good)
        zokernels.combine(scratch, kept, **good)
        zokernels.fan_out_(kept, scratch, other, 1, 1e-3)
        zokernels.update_(kept, "sign", [0.0, 0.1], **good)
        zokernels.update_(kept, "momentum", [0.0, 0.9, 1.0, 0.1], **good, first=states)
    bad = [
        {"coeffs": COEFFS[:1]},
        {"coeffs": COEFFS.double()},
        {"seeds": SEEDS.int()},
        {"seeds": SEEDS[:, None]},
        {"coeffs": torch.ones(4, 2)},
        {"coeffs": torch.ones(5, 2, dtype=torch.float64)},
        {"dist": "uniform"},
        {"decay": torch.ones(2)},
        {"rounding": "up"},
        {"rounding": "stochastic"},
        {"mask_seed": 1},
        {"density": 2.0, "mask_seed": 1},
        {"masks": [torch.ones(3, dtype=torch.uint8)] * 5},
        {"curvature": other[:4]},
    ]
    before = copies(params)
    where = {"streams": range(5)}
    for wrong in bad:
        options = {**good, **wrong}
        one = message(lambda options=options: zokernels.combine_(kept, **options))
        assert one == message(lambda options=options: zokernels.combine_(params, **options, **where))
    calls = [
        lambda p, **w: zokernels.combine(scratch[:4], p, **good, **w),
        lambda p, **w: zokernels.combine(params, p, **good, **w),  # out is theta
        lambda p, **w: zokernels.fan_out_(p, scratch, scratch, 1, 1e-3, **w),
        lambda p, **w: zokernels.fan_out_(p, scratch, other, torch.tensor([1, 2]), 1e-3, **w),
        lambda p, **w: zokernels.fan_out_(
            p, scratch, other, 1, torch.tensor([1.0], dtype=torch.float64), **w
        ),
        lambda p, **w: zokernels.update_(p, "sign", [0.0], **good, **w),
        lambda p, **w: zokernels.update_(p, "signs", [0.0, 0.1], **good, **w),
        lambda p, **w: zokernels.update_(p, "sign", [0.0, 0.1], **good, first=scratch, **w),
        lambda p, **w: zokernels.update_(p, "momentum", [0.0, 0.9, 1.0, 0.1], **good, **w),
        lambda p, **w: zokernels.update_(p, "hizoo", [0.1, 0.1], **good, first=scratch, **w),
    ]
    for call in calls:
        assert message(lambda call=call: call(kept)) == message(lambda call=call: call(params, **where))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_streams_are_the_plans():
    params = weights()
    with pytest.raises(ValueError, match="combine_: streams, offsets, rows: expected None with a plan"):
        zokernels.combine_(zokernels.plan(params, range(5)), SEEDS, COEFFS, streams=range(5))
    with pytest.raises(TypeError, match="combine_: streams: expected an integer for each tensor"):
        zokernels.combine_(params, SEEDS, COEFFS)
    kept = zokernels.plan(params, [1, 2, 3, 4, -1])  # wrong, and the first call says so
    with pytest.raises(ValueError, match=r"combine_: streams\[4\]"):
        zokernels.combine_(kept, SEEDS, COEFFS)


@needs_reader
def test_a_table_of_another_shape_is_refused():
    get("cpu")
    run = torch.ops.zokernels_cpu.combine_planned.default
    for table in (
        torch.zeros(3, 13, dtype=torch.int64),
        torch.zeros(0, 14, dtype=torch.int64),
        torch.zeros(3, 14),
    ):
        with pytest.raises(RuntimeError, match="expected a plan's"):
            run(table, SEEDS, COEFFS, 1, None, None, None, 65536, "auto")


# --- who else looks at calls ------------------------------------------------------------------------------


def test_kernels_for_autograd_see_each_call():
    """As tests of this package register one, so may users."""
    kept, seen = zokernels.plan(weights(), range(5)), []
    zokernels.combine_(kept, SEEDS, COEFFS)
    with watched("combine_", lambda *args: seen.append(len(args[0]))):
        for _ in range(2):
            zokernels.combine_(kept, SEEDS, COEFFS)
    zokernels.combine_(kept, SEEDS, COEFFS)
    assert seen == [5, 5]


def test_modes_see_each_call():
    class Counts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    kept, seen = zokernels.plan(weights(), range(5)), []
    for _ in range(2):
        zokernels.combine_(kept, SEEDS, COEFFS)
    with Counts():
        zokernels.combine_(kept, SEEDS, COEFFS)
    assert "zokernels.combine_.default" in seen


def test_function_modes_see_each_call():
    class Counts(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    kept, seen = zokernels.plan(weights(), range(5)), []
    for _ in range(2):
        zokernels.combine_(kept, SEEDS, COEFFS)
    with Counts():
        zokernels.combine_(kept, SEEDS, COEFFS)
    assert "zokernels.combine_.default" in seen


@needs_reader
def test_a_default_device_is_no_watcher():
    get("cpu")
    kept = zokernels.plan(weights(), range(5))
    zokernels.combine_(kept, SEEDS, COEFFS)
    with torch.device("cpu"):
        assert kernels_called("zokernels_cpu", lambda: zokernels.combine_(kept, SEEDS, COEFFS)) == [
            "combine_planned"
        ]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_traced():
    """A traced function holds the call, not the addresses of the tensors that it was traced with."""
    ours = [torch.randn(4, 3) for _ in range(3)]
    kept = zokernels.plan(ours, range(3))
    for _ in range(2):
        zokernels.combine_(kept, SEEDS, COEFFS)

    def call(coeffs: Tensor) -> Tensor:
        zokernels.combine_(kept, SEEDS, coeffs)
        return coeffs * 2

    traced = torch.jit.trace(call, (COEFFS,), check_trace=False)
    assert "combine_planned" not in str(traced.graph)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        params = [torch.ones(3, 4) for _ in range(3)]
        kept = zokernels.plan(params, range(3))
        for _ in range(2):
            zokernels.combine_(kept, torch.ones(2, dtype=torch.int64), torch.ones(2))
        with pytest.raises(ValueError, match="coeffs: expected 2 values"):
            zokernels.combine_(kept, torch.ones(2, dtype=torch.int64), torch.ones(3))
    for _ in range(2):  # fake ones outside of their mode
        zokernels.combine_(kept, *[torch._subclasses.FakeTensorMode.from_tensor(kept.params[0].fake_mode, t)
                                   for t in (SEEDS, COEFFS)])  # fmt: skip


def test_compiled():
    ours = [torch.randn(4, 3) for _ in range(3)]
    theirs = copies(ours)
    kept = zokernels.plan(ours, range(3))
    zokernels.combine_(kept, SEEDS, COEFFS)
    zokernels.combine_(theirs, SEEDS, COEFFS, streams=range(3))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(coeffs: Tensor) -> Tensor:
        zokernels.combine_(kept, SEEDS, coeffs)
        return ours[0] * 2

    for _ in range(2):
        doubled = step(COEFFS)
        zokernels.combine_(theirs, SEEDS, COEFFS, streams=range(3))
        assert torch.equal(doubled, theirs[0] * 2)
        assert all(map(torch.equal, ours, theirs))


def test_a_view_that_is_negated_when_read(backend):
    """Its memory holds the negatives, and no address tells of that."""
    theta = torch._neg_view(torch.randn(6))
    ours, theirs = torch.empty(6), torch.empty(6)
    kept = zokernels.plan([theta], [1])
    for _ in range(3):
        zokernels.combine([ours], kept, SEEDS, COEFFS)
        zokernels.combine([theirs], [theta.resolve_neg()], SEEDS, COEFFS, streams=[1])
        assert torch.equal(ours, theirs)


def test_a_lazy_clone_keeps_its_values(backend):
    """It shares memory with its original until one of them is written to, and no address tells of that."""
    theta = torch.randn(100)
    kept = zokernels.plan([theta], [1])
    for _ in range(3):
        zokernels.combine_(kept, SEEDS, COEFFS)
    before, lazy = theta.clone(), torch._lazy_clone(theta)
    zokernels.combine_(kept, SEEDS, COEFFS)
    assert torch.equal(lazy, before)
    assert not torch.equal(theta, before)


def test_many_random_histories(rng):
    """Calls and changes in any order: the plan's tensors always have the bits of plain calls."""
    get("cpu")
    ours = weights(4)
    kept = zokernels.plan(ours, range(4))
    scratch = copies(ours)
    for _ in range(60):
        deed = rng.choice(["call", "call", "call", "out", "move", "cast", "resize"])
        if deed == "move":
            ours[rng.randrange(4)].data = torch.randn(rng.randrange(1, 9), 5).to(ours[0].dtype)
        elif deed == "cast":
            dtype = rng.choice(DTYPES)
            for p in ours:
                p.data = p.data.to(dtype)
        elif deed == "resize":
            ours[rng.randrange(4)].data.resize_(rng.randrange(1, 40)).fill_(rng.random())
        elif deed == "out":
            if rng.random() < 0.5 or any(
                s.shape != p.shape or s.dtype is not p.dtype for s, p in zip(scratch, ours, strict=False)
            ):
                scratch = copies(ours)
            theirs = copies(ours)
            zokernels.combine(scratch, kept, SEEDS, COEFFS)
            zokernels.combine_(theirs, SEEDS, COEFFS, streams=range(4))
            assert all(map(torch.equal, scratch, theirs))
        else:
            theirs = copies(ours)
            zokernels.combine_(kept, SEEDS, COEFFS)
            zokernels.combine_(theirs, SEEDS, COEFFS, streams=range(4))
            assert all(map(torch.equal, ours, theirs))
