"""What the ranks of test_distributed.py do.

A case is a function of a :class:`World`; all ranks run it together.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import pathlib
import random
import re
import signal
import time
import warnings
from collections.abc import Callable

import offload_cases
import pytest
import torch
import torch.distributed as dist
import trajectory_cases
from test_interrupts import Preempted, injected_at, signal_at
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from trajectory_cases import CASES as OPTIMIZERS
from trajectory_cases import assert_same, base_of

import zokernels
from zokernels import offload
from zokernels.contract import derive_seed_int, streams_of
from zokernels.distributed import AsyncExchange, Exchange, RanksDiffer, mean_of
from zokernels.optim import (
    ZOCGE,
    ZOSGD,
    Ranking,
    SparseMeZO,
    ThreePoint,
    ZerothOrder,
    ZOAdam,
    ZOConservative,
    ZORankSGD,
)
from zokernels.step.rules.sgd import SGD
from zokernels.step.shard import shard_of, whole_of
from zokernels.trajectory import read, record, replay_

#: Where the models are: "cpu" with gloo, or "cuda" with NCCL (``make gpu-check``).  The worker sets it.
DEVICE = "cpu"


class Model(trajectory_cases.Model):
    def __init__(self, dtype: torch.dtype, rng: random.Random) -> None:
        super().__init__(dtype, rng)
        self.to(DEVICE)


class World:
    """This rank.  It has the same random numbers as all others, and a folder for this case."""

    def __init__(self, folder: pathlib.Path, rank: int, ranks: int, seed: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.rng = random.Random(f"{seed} {folder.name}")
        folder.mkdir(exist_ok=True)

    def mesh(self, **sizes: int) -> DeviceMesh:
        """A mesh of dimensions by name.

        If there are more ranks than it has, they form further meshes like it.
        """
        total = 1
        for size in sizes.values():
            total *= size
        if total == self.ranks:
            return init_device_mesh(DEVICE, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        whole = init_device_mesh(
            DEVICE, (self.ranks // total, *sizes.values()), mesh_dim_names=("copy", *sizes)
        )
        return whole[tuple(sizes)]


CASES: dict[int, dict[str, Callable[[World], None]]] = {2: {}, 4: {}}


def case(ranks: int, title: str = "", **arguments: object) -> Callable:
    def add(function: Callable) -> Callable:
        CASES[ranks][title or function.__name__] = lambda world: function(world, **arguments)
        return function

    return add


def _raises(world: World) -> None:
    if world.rank == 1:
        raise KeyError("mine")
    dist.barrier()


def _dies(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hangs(world: World) -> None:
    while world.rank == 1:
        time.sleep(1)


#: What a case may do wrong on rank 1.  Each must be the failure of this case alone.
FAULTS = {"raises": _raises, "dies": _dies, "hangs": _hangs}


def loss_of(model: Model, step: int, shard: int) -> torch.Tensor:
    """The loss of one data shard, in fp32."""
    scale = 1 + 0.1 * step + 0.03 * shard
    return torch.stack([(whole_of(p).float() * scale).sin().square().sum() for p in model.parameters()]).sum()


def whole_loss(model: Model, step: int, shards: int) -> torch.Tensor:
    """The loss that one process computes in the place of ``shards`` data ranks."""
    return (
        loss_of(model, step, 0) if shards == 1 else mean_of([loss_of(model, step, s) for s in range(shards)])
    )


def take(optimizer: ZerothOrder, loss: Callable[[int], object], steps: int) -> list[float]:
    returned = []
    for _ in range(steps):
        step = optimizer.step_count
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)
        returned.append(float(optimizer.step(lambda: loss(step))))  # noqa: B023
    return returned


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole_of(p).detach().clone() for name, p in model.named_parameters()}


def compare(
    world: World,
    mesh: DeviceMesh,
    make: Callable[..., ZerothOrder],
    dtype: torch.dtype,
    steps: int,
    change: Callable[[Model], None] = lambda model: None,
) -> None:
    """Compares a run on ``mesh`` with one of this process alone: weights, returned losses and log, bit for
    bit.

    ``change`` changes the model of the mesh.
    """
    seed = world.rng.getrandbits(63)
    model = Model(dtype, random.Random(seed))
    change(model)
    exchange = Exchange(mesh, check_every=7)
    shard = mesh.get_local_rank("data") if "data" in mesh.mesh_dim_names else 0
    log = world.folder / f"{exchange.ranks[0]}.zk"
    optimizer = make(model.named_parameters(), seed=seed, mesh=exchange, trajectory=log)
    returned = take(optimizer, lambda step: loss_of(model, step, shard), steps)
    exchange.agreement.check_weights(optimizer)
    optimizer.trajectory.close()
    weights = whole(model)
    if exchange.is_first:
        alone, single = Model(dtype, random.Random(seed)), world.folder / f"{exchange.ranks[0]}-single.zk"
        reference = make(alone.named_parameters(), seed=seed, trajectory=single)
        assert returned == take(reference, lambda step: whole_loss(alone, step, exchange.data), steps)
        reference.trajectory.close()
        assert_same(weights, base_of(alone), world.folder.name)
        assert log.read_bytes() == single.read_bytes()
        assert reference.skipped_steps == 0


MESHES = {"data": {"data": 2}, "perturbation": {"perturbation": 2}, "both": {"data": 2, "perturbation": 2}}
MESHES |= {"transposed": {"perturbation": 2, "data": 2}, "with copies": {"copies": 2, "data": 2}}


def meshes(world: World, mesh: str, restore: str, dtype: torch.dtype) -> None:
    """Twenty steps of the plain optimizer, with two directions and with one."""
    directions = world.rng.choice((1, 2, 3))
    options = {"lr": 0.05, "weight_decay": 0.1, "restore": restore, "directions": directions}
    compare(world, world.mesh(**MESHES[mesh]), lambda p, **more: ZOSGD(p, **options, **more), dtype, 20)


for _mesh in MESHES:
    for _restore, _dtype in (("exact", torch.bfloat16), ("inplace", torch.float16), ("exact", torch.float32)):
        if _mesh in ("data", "perturbation", "both") or _dtype is torch.bfloat16:
            _name = f"{_mesh} {_restore} {str(_dtype).removeprefix('torch.')}"
            case(4, _name, mesh=_mesh, restore=_restore, dtype=_dtype)(meshes)
for _mesh in ("data", "perturbation"):
    case(2, f"{_mesh} of two", mesh=_mesh, restore="exact", dtype=torch.bfloat16)(meshes)


@case(4)
def four_of_data(world: World) -> None:
    make = lambda p, **more: ZOSGD(p, lr=0.05, estimator="one-sided", **more)
    compare(world, world.mesh(data=4), make, torch.bfloat16, 20)


@case(4)
def four_of_perturbation(world: World) -> None:
    """Four ranks share six points, so that their shares differ."""
    make = lambda p, **more: ZOSGD(p, lr=0.05, directions=3, restore="inplace", **more)
    compare(world, world.mesh(perturbation=4), make, torch.bfloat16, 20)


def optimizers(world: World, name: str) -> None:
    make, options = OPTIMIZERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that do not take part
        run = lambda p, **more: make(p, lr=0.05, **{**options, **more})
        compare(
            world,
            world.mesh(data=2, perturbation=2),
            run,
            world.rng.choice((torch.float32, torch.bfloat16)),
            5,
        )


#: A step that decides in its middle what is evaluated next is of one process: tests/test_candidates.py.
ALONE = ("ZORankSearch",)

for _name, (_make, _options) in OPTIMIZERS.items():
    if (
        _name not in ALONE
        and len(_make([torch.nn.Parameter(torch.ones(40, 40))], lr=1.0, **_options).estimator.points()) > 1
    ):
        case(4, f"optimizer {_name}", name=_name)(optimizers)


@case(4)
def three_points(world: World) -> None:
    """An estimator that no named class has with this rule; two ranks share its three points."""
    make = lambda p, **more: ZerothOrder(p, 0.05, estimator=ThreePoint(), rule=SGD(), **more)
    compare(world, world.mesh(data=2, perturbation=2), make, torch.float32, 20)


@case(4)
def sent(world: World) -> None:
    """8 bytes for each point of the largest share, whatever the mesh, and 48 of signs."""
    for sizes, directions, expected in (
        ({"data": 4}, 1, 16),
        ({"data": 4}, 4, 64),
        ({"perturbation": 4}, 4, 16),
        ({"data": 2, "perturbation": 2}, 1, 8),
        ({"data": 2, "perturbation": 2}, 3, 24),
    ):
        model = Model(torch.float32, random.Random(1))
        exchange = Exchange(world.mesh(**sizes), check_every=None)
        optimizer = ZOSGD(model.named_parameters(), lr=0.0, directions=directions, mesh=exchange)
        before = exchange.total_bytes_sent
        take(optimizer, lambda step: loss_of(model, step, 0), 3)  # noqa: B023
        assert optimizer.bytes_sent == expected + 48
        assert exchange.total_bytes_sent == before + 3 * (expected + 48)


@case(4)
def not_finite(world: World) -> None:
    """If a loss of one rank is not finite, all ranks skip the step and go on with the next."""
    for bad in (float("nan"), float("inf")):
        victim, model = world.rng.randrange(4), Model(torch.bfloat16, random.Random(5))
        optimizer = ZOSGD(model.named_parameters(), lr=0.05, mesh=world.mesh(data=2, perturbation=2))
        base = base_of(model)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            optimizer.step(lambda: loss_of(model, 0, 0) * (bad if world.rank == victim else 1))  # noqa: B023
        assert len(told) == 1
        assert "1 step(s) skipped" in str(told[0].message)
        assert_same(base_of(model), base)
        assert (optimizer.step_count, int(optimizer.skipped_steps)) == (1, 1)
        optimizer.step(lambda: loss_of(model, 0, 0))  # noqa: B023
        assert int(optimizer.skipped_steps) == 1
        assert not torch.equal(base_of(model)["head"], base["head"])


@case(4)
def resume(world: World) -> None:
    """A run goes on from its log with another mesh, and ends with the bits of one that was not stopped."""
    log, seed = world.folder / "run.zk", world.rng.getrandbits(63)
    make = lambda model, mesh: ZOSGD(
        model.named_parameters(), 0.05, momentum=0.9, seed=seed, mesh=mesh, trajectory=log, resume=True
    )
    for sizes, steps in (({"data": 2, "perturbation": 2}, 4), ({"perturbation": 2, "data": 2}, 5)):
        model = Model(torch.bfloat16, random.Random(3))
        mesh = world.mesh(**sizes)
        optimizer = make(model, mesh)
        assert optimizer.step_count == (0 if steps == 4 else 4)
        take(optimizer, lambda step: loss_of(model, step, mesh.get_local_rank("data")), steps)  # noqa: B023
        optimizer.trajectory.close()
        dist.barrier()
        if steps == 4 and world.rank == 0:
            with open(log, "ab") as file:  # the end that a kill leaves
                file.write(b"\0" * 7)
    if world.rank == 0:
        alone = Model(torch.bfloat16, random.Random(3))
        take(
            ZOSGD(alone.named_parameters(), 0.05, momentum=0.9, seed=seed),
            lambda s: whole_loss(alone, s, 2),
            9,
        )
        assert_same(base_of(model), base_of(alone))
        assert read(log).steps == 9


def refused(world: World, pattern: str, make: Callable[[], object], alike: bool = True) -> None:
    """Checks that all ranks raise an error with this message, and if ``alike`` with the same one."""
    try:
        make()
    except (RuntimeError, ValueError, TypeError) as error:
        message = str(error)
    else:
        raise AssertionError(f"expected an error like {pattern!r}")
    assert re.search(pattern, message), message
    everyone: list = [None] * world.ranks
    dist.all_gather_object(everyone, message)
    assert len(set(everyone)) == 1 or not alike, everyone


@case(4)
def start(world: World) -> None:
    """Whatever differs on one rank is named, with the values of both sides."""
    mesh, rank = world.mesh(data=4), world.rng.randrange(1, 4)
    odd = world.rank == rank

    def make(dtype=torch.float32, change=None, last=True, freeze=False, **options):
        model = Model(dtype, random.Random(2))
        if change:
            change(model)
        params = list(model.named_parameters())
        params[0][1].requires_grad_(not freeze)
        return ZOSGD(params if last else params[:-1], **{"lr": 0.1, "seed": 7, "mesh": mesh, **options})

    def halve(model):
        with torch.no_grad():
            model.head[300] *= 0.5

    def rename(model):
        model.tail = model.head
        del model.head

    both = lambda a, b: f"expected the same on all ranks, got {a} on rank 0 and {b} on rank {rank}"
    for pattern, options in (
        (both("7", "8"), {"seed": 8}),
        (r"param_groups\[0\]\['lr'\]: " + both("0.1", "0.2"), {"lr": 0.2}),
        (r"\['eps'\]: " + both("0.001", "0.01"), {"eps": 0.01}),
        ("restore: " + both("exact", "inplace"), {"restore": "inplace"}),
        ("'directions': 1.* on rank 0 and .*'directions': 2.* on rank", {"directions": 2}),
        (
            f"'head': .*float32 of shape .* on rank 0 and bfloat16 of .* on rank {rank}",
            {"dtype": torch.bfloat16},
        ),
        (f"'layers.2.w': .* on rank 0 and none on rank {rank}", {"last": False}),
        (f"'head': .* on rank 0 and none on rank {rank}", {"change": rename}),
        (f"'head': .* on rank 0 and .*, frozen on rank {rank}", {"freeze": True}),
        (f"'head' before step 0: .*weights .* on rank 0 and weights .* on rank {rank}", {"change": halve}),
    ):
        refused(world, pattern, lambda: make(**(options if odd else {})))  # noqa: B023
    from zokernels.trajectory import settings

    for name, value in (("__version__", "9.9"), ("CONTRACT", "zk9")):
        held = getattr(settings, name)
        setattr(settings, name, value if odd else held)
        refused(world, f"{held}.* on rank 0 and .*{value} on rank {rank}", make)
        setattr(settings, name, held)
    make()


@case(4)
def weights_checked(world: World) -> None:
    """A weight that changes on one rank alone is found within check_every steps, and parameter and rank
    are named.
    """
    model, rank = Model(torch.bfloat16, random.Random(2)), world.rng.randrange(1, 4)
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, mesh=Exchange(world.mesh(data=4), check_every=3))
    take(optimizer, lambda step: loss_of(model, step, 0), 3)
    with torch.no_grad():
        if world.rank == rank:
            model.embed.w[22, 9] *= 1.01
    pattern = f"'embed.w' before step 3: .* on rank 0 and .* on rank {rank}"
    refused(world, pattern, lambda: take(optimizer, lambda step: loss_of(model, step, 0), 3))


def _half_lr(optimizer: ZerothOrder, model: Model) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def _other_eps(optimizer: ZerothOrder, model: Model) -> None:
    optimizer.param_groups[0]["eps"] = 0.5


def _clip(optimizer: ZerothOrder, model: Model) -> None:
    optimizer.param_groups[0]["clip"] = 1e-3


def _freeze(optimizer: ZerothOrder, model: Model) -> None:
    model.head.requires_grad_(False)


def _seed(optimizer: ZerothOrder, model: Model) -> None:
    optimizer.run_state.seed += 1


@case(2, "lr changes on one rank", change=_half_lr, named="lr")
@case(2, "eps changes on one rank", change=_other_eps, named="hyper-parameters")
@case(2, "clip changes on one rank", change=_clip, named="hyper-parameters")
@case(2, "one rank freezes a parameter", change=_freeze, named="trainable parameters")
@case(2, "the seed changes on one rank", change=_seed, named="step")
def changes_on_one_rank(world: World, change: Callable, named: str) -> None:
    """A setting that one rank changes after the start: an error in that step, on all ranks, with base
    weights.
    """
    for restore in ("exact", "inplace"):
        model = Model(torch.float32, random.Random(2))
        optimizer = ZOSGD(model.named_parameters(), lr=0.1, restore=restore, mesh=world.mesh(data=2))
        take(optimizer, lambda step: loss_of(model, step, world.rank), 3)  # noqa: B023
        odd = world.rng.randrange(2)
        if world.rank == odd:
            change(optimizer, model)
        pattern = f"step 3: expected the same {named}.*on all ranks, got another on rank 1 than on rank 0"
        refused(world, pattern, lambda: optimizer.step(lambda: loss_of(model, 3, world.rank)))  # noqa: B023
        assert optimizer.step_count == 3


@case(2)
def dtypes_of_losses(world: World) -> None:
    """Losses of float64 on one rank and fp32 on another: an error where it would make other numbers, else
    the same.
    """
    own = lambda loss: loss.double().sqrt() if world.rank else loss.double().sqrt().float()
    model = Model(torch.float32, random.Random(2))
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, mesh=world.mesh(perturbation=2))
    refused(
        world,
        "step 0: expected the same dtype of the losses",
        lambda: optimizer.step(lambda: own(loss_of(model, 0, 0))),
    )
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, mesh=Exchange(world.mesh(data=2), check_every=1))
    take(optimizer, lambda step: own(loss_of(model, step, 0)), 3)


@case(2, "one rank raises, exact", restore="exact")
@case(2, "one rank raises, in place", restore="inplace")
def raises_on_one_rank(world: World, restore: str) -> None:
    """An exception in one rank's closure, which its caller catches, in either forward: the others hear of it
    at once.

    Then no step is taken before the weights have been compared: they are the same with "exact".
    """
    kinds = {"data": {"make": ZOSGD}, "perturbation": {"make": functools.partial(ZOSGD, directions=2)}}
    for dimension, forward in itertools.product(kinds, (0, 1)):
        model = Model(torch.float32, random.Random(2))
        make = kinds[dimension]["make"]
        optimizer = make(model.named_parameters(), lr=0.1, restore=restore, mesh=world.mesh(**{dimension: 2}))
        shard = world.rank if dimension == "data" else 0
        take(optimizer, lambda step: loss_of(model, step, shard), 2)  # noqa: B023
        base, calls = base_of(model), itertools.count()

        def closure():
            if world.rank == 1 and next(calls) == forward:  # noqa: B023
                raise KeyError("bad batch")
            return loss_of(model, 2, shard)  # noqa: B023

        with pytest.raises((KeyError, RanksDiffer)) as told:
            optimizer.step(closure)
        if world.rank:
            assert isinstance(told.value, KeyError)
        else:
            assert "step 2: expected a step without an exception on all ranks, got one on rank 1" in str(
                told.value
            )
        assert optimizer.step_count == 2
        try:
            take(optimizer, lambda step: loss_of(model, step, shard), 2)  # noqa: B023
            went_on = True
        except RanksDiffer as error:
            went_on = "weights" not in str(error)
        if restore == "exact":
            assert went_on
            assert optimizer.step_count == 4
        everyone: list = [None, None]
        dist.all_gather_object(everyone, (went_on, {name: p.tolist() for name, p in base_of(model).items()}))
        assert everyone[0][0] == everyone[1][0]
        assert everyone[0] == everyone[1] or not went_on
        assert base


#: The runs whose steps are interrupted.  Weights are compared before every second step.
INTERRUPTED: dict[str, dict] = {
    "exact": {},
    "inplace": {"restore": "inplace"},
    "momentum": {"momentum": 0.5},
    "trials": {"rule": "conservative"},
}


def _interrupted(world: World, mode: str, interrupt: Callable, tries: int | None = 8) -> None:
    """An exception at a random place of a step of one rank, eight times (None: at every place).

    The step is taken on both ranks or, for the next try, on none.  In place, weights that have made fewer
    moves differ by roundings: that is an error until they are the same.
    """
    model, log = Model(torch.float32, random.Random(2)), world.folder / "run.zk"
    options = dict(INTERRUPTED[mode])
    make = ZOSGD if options.pop("rule", None) is None else ZOConservative
    mesh = Exchange(world.mesh(data=2), check_every=2)
    optimizer = make(model.named_parameters(), lr=0.1, mesh=mesh, trajectory=log, **options)
    loss = lambda: loss_of(model, optimizer.step_count, world.rank)
    optimizer.step(loss)
    counts = []
    for _ in range(2):
        with interrupt(None) as count:
            optimizer.step(loss)
        counts.append(count[0])
    both: list = [None, None]
    dist.all_gather_object(both, min(counts))
    total = min(both)
    places = [1 + int(world.rng.random() * total) for _ in range(tries)] if tries else range(1, total + 1)
    for place in places:
        step, told, victim = optimizer.step_count, [], world.rng.randrange(2)
        while optimizer.step_count == step and len(told) < 4:
            first = world.rank == victim and not told
            try:
                with interrupt(place) if first else contextlib.nullcontext():
                    optimizer.step(loss)
            except (Preempted, RanksDiffer) as error:
                told.append(str(error))
        if optimizer.step_count == step:
            assert mode == "inplace", (place, victim, told)
            assert all("weights" in text for text in told[2:]), told
            for p in model.parameters():
                dist.broadcast(p.data, 0)
            optimizer.step(loss)
        states: list = [None, None]
        state = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
        kept = [None if m is None else m.tolist() for m in state]
        mine = optimizer.step_count, {name: p.tolist() for name, p in base_of(model).items()}, kept
        dist.all_gather_object(states, mine)
        assert states[0] == states[1], (place, victim, told)
        assert optimizer.step_count == step + 1
    optimizer.trajectory.close()
    dist.barrier()
    if world.rank == 0:
        assert read(log).steps == optimizer.step_count == 3 + len(places)


#: At every place: for the sweep of test_interrupts.py.
SWEEPS = {}

for _mode in INTERRUPTED:
    for _kind, _interrupt in (("signals", signal_at), ("exceptions", injected_at)):
        if _kind == "exceptions" or _mode in ("exact", "inplace"):
            case(2, f"{_kind} {_mode}", mode=_mode, interrupt=_interrupt)(_interrupted)
        SWEEPS[f"{_kind} {_mode} everywhere"] = functools.partial(
            _interrupted, mode=_mode, interrupt=_interrupt, tries=None
        )


@case(2)
def fails_before_the_step_begins(world: World) -> None:
    """A setting that one rank refuses, also where weights are compared first: the others do not wait."""
    for every in (1, None):
        model, mesh = Model(torch.float32, random.Random(2)), Exchange(world.mesh(data=2), every)
        optimizer = ZOSGD(model.named_parameters(), lr=0.1, mesh=mesh)
        take(optimizer, lambda step: loss_of(model, step, world.rank), 2)  # noqa: B023
        odd = world.rng.randrange(2)
        optimizer.param_groups[0]["lr"] = -1.0 if world.rank == odd else 0.1
        with pytest.raises(ValueError if world.rank == odd else RanksDiffer) as told:
            optimizer.step(lambda: loss_of(model, 2, world.rank))  # noqa: B023
        assert "lr" in str(told.value) if world.rank == odd else f"one on rank {odd}" in str(told.value)
        take(optimizer, lambda step: loss_of(model, step, world.rank), 2)  # noqa: B023
        mesh.agreement.check_weights(optimizer)
        assert optimizer.step_count == 4


@case(2)
def groups_and_states_of_one_rank(world: World) -> None:
    """A group that one rank adds, or a state that it loads, is an error in that step; of all it is none."""
    for restore in ("exact", "inplace"):
        model, mesh = Model(torch.float32, random.Random(2)), Exchange(world.mesh(data=2), check_every=2)
        optimizer = ZOSGD(model.named_parameters(), lr=0.1, restore=restore, mesh=mesh)
        step = lambda: optimizer.step(lambda: loss_of(model, optimizer.step_count, world.rank))  # noqa: B023
        step()
        saved, odd = copy.deepcopy(optimizer.state_dict()), world.rng.randrange(2)
        optimizer.load_state_dict(saved)
        step()
        assert optimizer.step_count == 2
        if world.rank == odd:
            optimizer.add_param_group(
                {"params": [("more", torch.nn.Parameter(torch.ones(3, device=DEVICE)))]}
            )
        refused(world, "got another on rank 1 than on rank 0", step, alike=False)
        refused(world, "the same on all ranks", step)
        if world.rank == odd:
            optimizer.param_groups.pop()
        step()
        if world.rank == odd:
            optimizer.load_state_dict(saved)
        refused(world, "got another on rank 1 than on rank 0", step, alike=False)
        refused(world, "step: expected the same on all ranks.*load a checkpoint on each", step)
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            model.head[world.rank] += 1
        refused(world, "weights", step)


@case(2)
def half_updated_on_one_rank(world: World) -> None:
    """Where an update cannot be finished, each rank says so at the next use, until all load a checkpoint."""
    model, mesh = Model(torch.float32, random.Random(2)), Exchange(world.mesh(data=2), 3)
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, momentum=0.5, window=2, mesh=mesh)
    loss = lambda: loss_of(model, optimizer.step_count, world.rank)
    optimizer.step(loss)
    saved, base = optimizer.state_dict(), base_of(model)
    odd, begin = world.rng.randrange(2), type(optimizer.rule).begin

    def interrupted(rule, *args):
        begin(rule, *args)
        raise Preempted

    if world.rank == odd:
        type(optimizer.rule).begin = interrupted
    with contextlib.suppress(Preempted):
        optimizer.step(loss)
    type(optimizer.rule).begin = begin
    text = "half updated .*load a checkpoint"
    for _ in range(2):
        refused(world, text, lambda: optimizer.step(loss), alike=False)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(base[name])
    optimizer.step(loss)
    optimizer.step(loss)
    mesh.agreement.check_weights(optimizer)
    assert optimizer.step_count == 3


@case(2)
def ctrl_c_on_one_rank(world: World) -> None:
    """Ctrl-C in one rank's forward, which it catches: the others wait for its next call, and hear of it."""
    for restore in ("exact", "inplace"):
        model = Model(torch.float32, random.Random(2))
        mesh = Exchange(world.mesh(data=2), check_every=1)
        optimizer = ZOSGD(model.named_parameters(), lr=0.1, restore=restore, mesh=mesh)
        calls, odd = [], world.rng.randrange(2)

        def closure():
            calls.append(1)  # noqa: B023
            if len(calls) == 6 and world.rank == odd:  # noqa: B023
                raise KeyboardInterrupt
            return loss_of(model, optimizer.step_count, world.rank)  # noqa: B023

        told = []
        while optimizer.step_count < 5 and len(told) < 3:
            try:
                optimizer.step(closure)
            except KeyboardInterrupt:
                pass
            except RanksDiffer as error:
                told.append(str(error))
        assert re.search(
            "same step .number, attempt and seed.* got another on rank 1 than on rank 0", told[0]
        )
        went_on = optimizer.step_count == 5  # in place, one rank may have made a move more, which rounds
        assert went_on or (restore == "inplace" and "weights" in told[1])
        everyone: list = [None, None]
        dist.all_gather_object(everyone, (went_on, told))
        assert everyone[0] == everyone[1]
        if went_on:
            mesh.agreement.check_weights(optimizer)


@case(2)
def a_log_that_cannot_be_written(world: World) -> None:
    """The first rank's disk is full: no rank takes the step, and all go on when there is room."""
    write, full = os.pwrite, []

    def pwrite(fd, data, at):
        if full:
            raise OSError(28, "No space left on device")
        return write(fd, data, at)

    model = Model(torch.float32, random.Random(2))
    optimizer = ZOSGD(
        model.named_parameters(), lr=0.1, mesh=world.mesh(data=2), trajectory=world.folder / "run.zk"
    )
    os.pwrite = pwrite
    try:
        take(optimizer, lambda step: loss_of(model, step, world.rank), 2)
        if world.rank == 0:
            full.append(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            take(optimizer, lambda step: loss_of(model, step, world.rank), 1)
        with pytest.raises((OSError, RanksDiffer)):
            take(optimizer, lambda step: loss_of(model, step, world.rank), 1)
        full.clear()
        take(optimizer, lambda step: loss_of(model, step, world.rank), 2)
    finally:
        os.pwrite = write
    optimizer.trajectory.close()
    dist.barrier()
    if world.rank == 0:
        assert read(world.folder / "run.zk").steps == optimizer.step_count == 5


@case(4)
def wrong(world: World) -> None:
    """Errors that a rank finds without communication."""
    from zokernels.optim import FZOO

    params = lambda: Model(torch.float32, random.Random(2)).named_parameters()
    mesh = world.mesh(perturbation=4)
    refused(
        world,
        "mesh: expected at most 2 ranks along 'perturbation'.*got 4",
        lambda: ZOSGD(params(), 1.0, mesh=mesh),
    )
    refused(
        world,
        "capturable: expected False with a mesh",
        lambda: FZOO(params(), 1.0, mesh=mesh, capturable=True),
    )
    nameless = DeviceMesh(DEVICE, list(range(4)))
    refused(world, "mesh: expected named dimensions", lambda: ZOSGD(params(), 1.0, mesh=nameless))
    ranked = ZORankSGD(params(), 1.0, mesh=mesh, candidates=4)
    assert ranked.estimator == Ranking(4)
    refused(
        world, "rank: expected losses with a mesh", lambda: ranked.step(lambda: 1.0, rank=lambda results: [0])
    )


def coordinates(world: World, sizes: dict[str, int], **options: object) -> None:
    """Coordinates over ranks: the weights, losses and differences of one process."""
    seed = world.rng.getrandbits(63)
    mesh = world.mesh(**sizes)
    model, alone = (Model(torch.bfloat16, random.Random(seed)) for _ in range(2))
    shard = mesh.get_local_rank("data") if "data" in sizes else 0
    make = lambda m, **more: ZOCGE(m.named_parameters(), 0.05, 0.02, seed=seed, **options, **more)
    exchange = Exchange(mesh)
    optimizer, reference = make(model, mesh=exchange), make(alone)
    forwards = []

    def own_loss(step: int) -> torch.Tensor:
        forwards.append(step)
        return loss_of(model, step, shard)

    returned = take(optimizer, own_loss, 3)
    assert returned == take(reference, lambda step: whole_loss(alone, step, exchange.data), 3)
    assert_same(whole(model), base_of(alone), world.folder.name)
    assert torch.equal(optimizer.last_projected_gradient, reference.last_projected_gradient)
    total = 3 * len(reference.last_losses)
    assert abs(len(forwards) - total / exchange.perturbation) <= 3


case(4, "coordinates of four", sizes={"perturbation": 4}, per_step=21)(coordinates)
case(4, "coordinates, data", sizes={"data": 2, "perturbation": 2}, per_step=10, estimator="two-sided")(
    coordinates
)
case(2, "coordinates, momentum", sizes={"perturbation": 2}, per_step=9, momentum=0.9, l2=1e-3)(coordinates)


@case(2)
def coordinates_of_ranks_that_differ(world: World) -> None:
    """Other numbers of coordinates are refused at the start; a rank that fails lets the other know."""
    params = lambda: Model(torch.float32, random.Random(2)).named_parameters()
    mesh = world.mesh(perturbation=2)
    with pytest.raises(RanksDiffer, match="per_step"):
        ZOCGE(params(), 0.1, per_step=5 + world.rank, mesh=mesh)
    optimizer = ZOCGE(params(), 0.1, per_step=9, mesh=mesh)

    def closure() -> float:
        if world.rank == 1:
            raise KeyError("mine")
        return 1.0

    with pytest.raises(KeyError if world.rank else RanksDiffer):
        optimizer.step(closure)
    with pytest.raises(ValueError, match="no 'pipeline'"):
        ZOCGE(params(), 0.1, per_step=9, mesh=world.mesh(pipeline=2))


# Pipeline -------------------------------------------------------------------------------------------------


class Stages(torch.nn.Module):
    """Layers in two stages, whose first and last layer share the embedding (as in transformers)."""

    def __init__(self, dtype: torch.dtype, seed: int, stage: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(dtype))
        shapes = {"embed": (19, 12), "layers_0": (12, 24), "layers_1": (24, 12), "scale": (12,)}
        params = {name: make(*shape) for name, shape in shapes.items()}
        here = {None: tuple(params), 0: ("embed", "layers_0"), 1: ("embed", "layers_1", "scale")}[stage]
        for name in here:
            self.register_parameter(name, params[name])
        self.to(DEVICE)

    def groups(self) -> list[dict]:
        """The parameter groups.  ``scale`` is a group of its own, of which the first stage has nothing."""
        of = lambda scale: [(n, p) for n, p in self.named_parameters() if (n == "scale") is scale]
        return [{"params": of(False), "eps": 1e-3}, {"params": of(True), "eps": 2e-2, "clip": 0.5}]

    def first(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.nn.functional.embedding(tokens, self.embed) @ self.layers_0)

    def last(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        out = (hidden @ self.layers_1) * self.scale @ self.embed.t()
        return torch.nn.functional.cross_entropy(out.float(), tokens.roll(-1))


def tokens_of(step: int, shard: int) -> torch.Tensor:
    return torch.randint(19, (16,), generator=torch.Generator().manual_seed(100 * step + shard)).to(DEVICE)


def pipeline(
    world: World, steps: int, make: Callable = ZOSGD, dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> None:
    """Compares two stages, with send and recv of activations, with one process: weights, losses and log.

    The run stops half-way and goes on from its log, in which each stage reads what belongs to it.
    """
    seed, half, options = world.rng.getrandbits(40), steps // 2, {"lr": 0.02}
    mesh = world.mesh(**sizes)
    shard = mesh.get_local_rank("data") if "data" in sizes else 0
    stage, group = mesh.get_local_rank("pipeline"), mesh.get_group("pipeline")
    log, names = world.folder / f"{Exchange(mesh).ranks[0]}.zk", ("embed", "layers_0", "layers_1", "scale")

    def loss(step: int) -> torch.Tensor | None:
        tokens = tokens_of(step, shard)
        if stage == 0:
            dist.send(model.first(tokens), group=group, group_dst=1)
            return None
        hidden = torch.empty(16, 24, dtype=dtype, device=DEVICE)
        dist.recv(hidden, group=group, group_src=0)
        return model.last(hidden, tokens)

    returned: list[float] = []
    for count in (half, steps - half):
        model = Stages(dtype, seed, stage)
        exchange = Exchange(mesh, check_every=3)
        optimizer = make(model.groups(), seed=seed, mesh=exchange, trajectory=log, resume=True, **options)
        assert optimizer.step_count == len(returned)
        returned += take(optimizer, loss, count)
        optimizer.trajectory.close()
        dist.barrier()
    exchange.agreement.check_weights(optimizer)
    alone, single = Stages(dtype, seed), world.folder / f"{exchange.ranks[0]}-{world.rank}-single.zk"
    reference = make(alone.groups(), seed=seed, trajectory=single, **options)
    shards = sizes.get("data", 1)
    one = lambda step, s: alone.last(alone.first(tokens_of(step, s)), tokens_of(step, s))
    expected = take(reference, lambda step: mean_of([one(step, s) for s in range(shards)]), steps)
    assert returned == expected, (world.folder.name, returned, expected)
    reference.trajectory.close()
    assert int(reference.skipped_steps) == 0
    weights = base_of(alone)
    assert_same(
        base_of(model), {name: weights[name] for name in names if name in base_of(model)}, world.folder.name
    )
    assert log.read_bytes() == single.read_bytes()


case(2, "pipeline", steps=20, pipeline=2)(pipeline)
case(4, "pipeline and data", steps=20, data=2, pipeline=2)(pipeline)
case(4, "data inside a pipeline", steps=20, pipeline=2, data=2, dtype=torch.float32)(pipeline)
case(4, "pipeline and perturbation", steps=20, pipeline=2, perturbation=2)(pipeline)


@case(2)
def stages_of_optimizers(world: World) -> None:
    """The optimizers whose rules or directions keep a state, without those that look at all parameters at
    once.
    """
    for name in ("momentum", "ZOAdamW", "sparse", "kept", "fzoo", "ZOConservative", "inplace", "window"):
        kind, options = OPTIMIZERS.get(name, (ZOSGD, {"restore": "inplace", "directions": 2}))
        folder = world.folder / name
        pipeline(
            World(folder, world.rank, world.ranks, world.rng.getrandbits(30)),
            4,
            lambda p, **more: kind(p, **{**options, **more}),  # noqa: B023
            pipeline=2,
        )


@case(4)
def stages_that_do_not_fit(world: World) -> None:
    """Settings that must be equal are compared within stages and between them.

    Here something differs within a stage, or between tied weights.
    """
    mesh = world.mesh(data=2, pipeline=2)
    stage = mesh.get_local_rank("pipeline")
    from zokernels.optim import LeZO

    def make(change=None, kind=ZOSGD, groups=lambda model: model.groups(), **options):
        model = Stages(torch.bfloat16, 3, stage)
        if change:
            change(model)
        return kind(groups(model), **{"lr": 0.1, "seed": 7, "mesh": mesh, **options})

    def double(name):
        def change(model):
            with torch.no_grad():
                getattr(model, name).mul_(2)

        return change

    def retype(model):
        model.embed = torch.nn.Parameter(model.embed.float())

    for victim, pattern, options in (
        (3, "'layers_1' before step 0: .*on rank 1 and weights .* on rank 3", {"change": double("layers_1")}),
        (2, "'layers_0' before step 0: .*on rank 0 and weights .* on rank 2", {"change": double("layers_0")}),
        (3, "'embed' before step 0: .*on rank 0 and weights .* on rank 3", {"change": double("embed")}),
        (1, "'embed': .*bfloat16 .* on rank 0 and float32 .* on rank 1", {"change": retype}),
        (1, r"param_groups\[0\]\['lr'\].* on rank 0 and 0.2 on rank 1", {"lr": 0.2}),
    ):
        refused(world, pattern, lambda: make(**(options if world.rank == victim else {})))  # noqa: B023
    unnamed = lambda model: list(model.parameters())
    refused(world, "expected named parameters where stages", lambda: make(groups=unnamed), alike=False)
    streams = lambda model: [
        {"params": list(model.named_parameters()), "streams": list(range(3 if stage else 2))}
    ]
    refused(
        world,
        "streams: expected one stream for each parameter, got 1 for both 'layers_",
        lambda: make(groups=streams),
    )
    refused(world, "mesh: expected no subset", lambda: make(kind=LeZO))


# Asynchronous ---------------------------------------------------------------------------------------------


def store_of(world: World, kind: str) -> dist.Store:
    if kind == "file":
        return dist.FileStore(str(world.folder / "store"), -1)
    box = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None]
    port = [box[0].port if world.rank == 0 else None]
    dist.broadcast_object_list(port, src=0)
    return box[0] or dist.TCPStore("127.0.0.1", port[0], is_master=False)


def own_steps(exchange: AsyncExchange, model: Model, rank: int, rng: random.Random) -> None:
    """Steps to the end of the run, with batches and delays of this rank's own."""
    for own in itertools.count():
        for group in exchange.optimizer.param_groups:
            group["lr"] = 0.03 / (1 + own)  # its learning rate is its own, too
        time.sleep(rng.choice((0, 0, 0.003)))

        def loss() -> torch.Tensor:
            time.sleep(rng.choice((0, 0.001, 0.004)))
            return loss_of(model, own, rank) * (float("nan") if own == 7 and rank == 1 else 1)  # noqa: B023

        if exchange.step(loss) is None:
            return


def ended_alike(world: World, exchange: AsyncExchange, model: Model, base: Model) -> None:
    """On all ranks the weights are those of the merged log, replayed by one process and by
    :func:`combine_` itself.
    """
    assert exchange.done
    log = world.folder / f"{world.rank}.zk"
    exchange.save(log)
    weights, saved = base_of(model), log.read_bytes()
    everyone: list = [None] * world.ranks
    dist.all_gather_object(everyone, saved)
    assert all(other == saved for other in everyone)
    alone = copy.deepcopy(base)
    assert replay_(alone, log) == exchange.steps
    assert_same(base_of(alone), weights)
    records, by_hand = list(read(log).records()), copy.deepcopy(base)
    assert len({r.step for r in records}) == len(records)
    if type(exchange.optimizer.rule) is SGD:
        for record in records:
            if record.finite:
                seed = derive_seed_int(exchange.optimizer.seed, record.step, 0)
                c = torch.tensor(-record.rates[0] * record.gradients[0][0], dtype=torch.float64).float()
                names, params = zip(*by_hand.named_parameters(), strict=True)
                options = {"rounding": "stochastic", "rounding_seed": seed, "streams": streams_of(names)}
                zokernels.combine_([p.data for p in params], seed, float(c), **options)
        assert_same(base_of(by_hand), weights)


def asynchronous(
    world: World, store: str, dtype: torch.dtype, staleness: int | None = None, **options
) -> None:
    """Ranks with different delays write one log, whose replay gives the weights of each of them."""
    seed = world.rng.getrandbits(63)
    model, base = Model(dtype, random.Random(seed)), Model(dtype, random.Random(seed))
    optimizer = ZOSGD(model.named_parameters(), lr=0.05, seed=seed, **options)
    exchange = AsyncExchange(optimizer, store_of(world, store), steps=80, staleness=staleness)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a step that is not finite is warned of
        own_steps(exchange, model, world.rank, random.Random(f"{seed} {world.rank}"))
    found = exchange.stalenesses()
    assert max(found) <= (world.ranks * 40 if staleness is None else staleness)
    assert staleness == 0 or max(found) > 0
    ended_alike(world, exchange, model, base)


case(2, "asynchronous, two", store="tcp", dtype=torch.bfloat16)(asynchronous)
case(4, "asynchronous, four", store="file", dtype=torch.float32)(asynchronous)
case(4, "asynchronous, momentum", store="tcp", dtype=torch.bfloat16, momentum=0.9, weight_decay=0.1)(
    asynchronous
)
case(4, "asynchronous, a bound", store="tcp", dtype=torch.float16, staleness=2)(asynchronous)
case(2, "asynchronous, never stale", store="tcp", dtype=torch.bfloat16, staleness=0)(asynchronous)


#: The cases that fork, which a process with a GPU cannot do.
FORKS = ("asynchronous_death",)


@case(2)
def asynchronous_death(world: World) -> None:
    """A child process of each rank dies in a forward.  The rank then reads what there is, and goes on."""
    seed, place = world.rng.getrandbits(63), str(world.folder / "store")

    def begin():
        model = Model(torch.bfloat16, random.Random(seed))
        optimizer = ZOSGD(model.named_parameters(), lr=0.05, seed=seed)
        return model, AsyncExchange(optimizer, dist.FileStore(place, -1), steps=40)

    if (child := os.fork()) == 0:
        model, exchange = begin()

        def loss() -> torch.Tensor:
            if exchange.count >= 5 + 3 * world.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss_of(model, 0, world.rank)

        while True:
            exchange.step(loss)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    model, exchange = begin()
    assert exchange.count >= 5 + 3 * world.rank
    own_steps(exchange, model, world.rank, random.Random(seed))
    dist.barrier()
    ended_alike(world, exchange, model, Model(torch.bfloat16, random.Random(seed)))
    draws = {r.step for r in read(world.folder / f"{world.rank}.zk").records()}
    assert not draws >= set(range(max(draws)))  # the last records of the dead processes are missing


@case(2)
def asynchronous_errors(world: World) -> None:
    def make(
        store: str, change: Callable = lambda model: None, kind=ZOSGD, steps=5, staleness=None, **options
    ):
        model = Model(torch.bfloat16, random.Random(2))
        change(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = kind(model.named_parameters(), **{"lr": 0.1, "seed": 7, **options})
        return model, AsyncExchange(
            optimizer, dist.FileStore(str(world.folder / store), -1), steps, staleness
        )

    def halve(model):
        with torch.no_grad():
            model.head[300] *= 0.5

    from zokernels.optim import FZOO, LeZO, RandomMask

    for pattern, options in (
        ("optimizer: expected restore='exact'", {"restore": "inplace"}),
        ("optimizer: expected restore='exact'", {"direction": RandomMask(0.5)}),
        ("optimizer: expected restore='exact'", {"kind": LeZO}),
        ("optimizer: expected restore='exact'", {"kind": FZOO, "capturable": True}),
        (r"steps: expected an integer in \[1, 2\^32\), got 0", {"steps": 0}),
        (r"staleness: expected an integer in \[0, 2\^32\), got -1", {"staleness": -1}),
    ):
        refused(world, pattern, lambda: make("none", **options))  # noqa: B023
    for i, (pattern, options) in enumerate(
        (
            ("seed: expected the same on all processes, got 8 here and 7 on the first process", {"seed": 8}),
            ("groups.0.options.eps: .*got 0.01 here and 0.001 on", {"eps": 0.01}),
            ("groups.0.params.head.sha256: expected the same", {"change": halve}),
            ("estimator.directions: .* got 2 here and 1 on", {"directions": 2}),
        )
    ):
        make(f"store{i}") if world.rank == 0 else None
        dist.barrier()
        if world.rank == 1:
            with pytest.raises(RanksDiffer, match=pattern):
                make(f"store{i}", **options)
    model, exchange = make("weights")
    dist.barrier()
    if world.rank == 1:  # as a broken kernel or broken memory would do
        halve(model)
    try:
        while exchange.step(lambda: loss_of(model, 0, 0)) is not None:
            pass
        failed = False
    except RanksDiffer as error:
        failed = "'head' (" in str(error)
    both: list = [None, None]
    dist.all_gather_object(both, failed)
    assert both.count(True) == 1, both
    if world.rank == 0:
        exchange.save(world.folder / "a.zk")
        late = ZOSGD(Model(torch.bfloat16, random.Random(2)).named_parameters(), lr=0.1, seed=7)
        with pytest.raises(
            ValueError, match="resume: asynchronous: expected that of the log, True, got None"
        ):
            record(late, world.folder / "a.zk", resume=True)


# Streamed -------------------------------------------------------------------------------------------------


def streamed(world: World, slots: int, dtype: torch.dtype, directions: int = 1, **sizes: int) -> None:
    """Each rank keeps a slice of every block.

    Weights, losses and log are those of one process that has everything in memory.
    """
    make = lambda: offload_cases.tower(dtype, seed=5, layers=4, dropout=0.0).to(DEVICE)
    model, mesh, folder = make(), world.mesh(**sizes), world.folder
    line = init_device_mesh(DEVICE, (world.ranks,), mesh_dim_names=("slices",))
    engine = offload.stream(
        model, storage="host", slots=slots, write_every=world.rng.choice((1, 3)), mesh=line
    )
    memory = engine.mover.source
    here = sum(region.data.numel() for of_block in memory.regions for region in of_block)
    assert here * world.ranks == sum(b.nbytes for b in engine.blocks)
    shard = mesh.get_local_rank("data") if "data" in sizes else 0
    options = {"lr": 0.02, "seed": 3, "weight_decay": 0.1, "directions": directions}
    with_log = lambda name: {"trajectory": folder / f"{world.rank}-{name}.zk", **options}
    loss = lambda model, step, s: offload_cases.loss_of(
        model, offload_cases.batch_of(10 * step + s).to(DEVICE)
    )
    optimizer = ZOSGD(model.named_parameters(), mesh=Exchange(mesh), **with_log("mesh"))
    returned = take(optimizer, lambda step: loss(model, step, shard), 20)
    optimizer.trajectory.close()
    ours = {name: value.clone() for name, value in model.state_dict().items()}  # all ranks gather it together
    engine.flush()
    after = [torch.cat([region.data for region in of_block]) for of_block in memory.regions]
    engine.close()
    alone = make()
    reference = ZOSGD(alone.named_parameters(), **with_log("alone"))
    whole = lambda step: mean_of([loss(alone, step,
        s) for s in range(sizes["data"])]) if "data" in sizes else (
        loss(alone, step, 0)
    )  # fmt: skip
    assert returned == take(reference, whole, 20)
    reference.trajectory.close()
    assert not offload_cases.same_state(ours, alone.state_dict())
    if world.rank == 0:
        assert (folder / "0-mesh.zk").read_bytes() == (folder / "0-alone.zk").read_bytes()
    everyone: list = [None] * world.ranks
    dist.all_gather_object(everyone, [r.cpu() for r in after])
    for i, block in enumerate(engine.blocks):  # the slices together are the block, and each is on one rank
        data = torch.cat([slices[i] for slices in everyone])
        assert data.numel() == block.nbytes
        assert all(offload_cases.same_bits(e.of(data), ours[e.name].cpu()) for e in block.entries)


case(2, "streamed in slices", slots=3, dtype=torch.bfloat16, data=2)(streamed)
case(2, "streamed in slices, shared points", slots=1, dtype=torch.float32, perturbation=2)(streamed)
case(4, "streamed in slices, both", slots=2, dtype=torch.bfloat16, directions=3, data=2, perturbation=2)(
    streamed
)
case(4, "streamed in slices, uneven", slots=2, dtype=torch.float16, directions=3, perturbation=4)(streamed)


def streamed_states(world: World, kind: type[ZerothOrder], **options: object) -> None:
    """What is kept of each weight is divided among the ranks as the weights are, and loaded again."""
    make = lambda: offload_cases.tower(torch.float32, seed=5, layers=3, dropout=0.0).to(DEVICE)
    model, alone, settings = make(), make(), {"lr": 1e-3, "eps": 1e-2, "seed": 3, **options}
    line = init_device_mesh(DEVICE, (world.ranks,), mesh_dim_names=("slices",))
    loss = lambda model, step: offload_cases.loss_of(model, offload_cases.batch_of(step).to(DEVICE))
    reference = kind(alone.named_parameters(), **settings)
    with offload.stream(model, storage="host", slots=world.rng.choice((1, 3)), mesh=line) as engine:
        mesh = world.mesh(perturbation=world.ranks)
        optimizer = kind(model.named_parameters(), mesh=Exchange(mesh), **settings)
        for step in range(6):
            if step == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            ours = float(optimizer.step(lambda: loss(model, step)))  # noqa: B023
            assert ours == float(reference.step(lambda: loss(alone, step)))  # noqa: B023
        regions = engine.mover.source.regions
        here = sum(region.data.numel() for of_block in regions for region in of_block)
        assert here * world.ranks == sum(b.nbytes for b in engine.blocks)
        assert all(len(of_block) == 2 for of_block in regions)  # weights and states
        assert not offload_cases.same_state(model.state_dict(), alone.state_dict())
        found, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
        assert found.keys() == expected.keys()
        for index, kept in expected.items():
            assert found[index].keys() == kept.keys()
            assert all(torch.equal(found[index][key].cpu(), value.cpu()) for key, value in kept.items())


case(2, "streamed states, Adam", kind=ZOAdam)(streamed_states)
case(2, "streamed states, Sparse-MeZO", kind=SparseMeZO, refresh=2)(streamed_states)


def streamed_from_disk(
    world: World,
    written: bool,
    kind: type[ZerothOrder] = ZOSGD,
    master: torch.dtype | None = None,
    **sizes: int,
) -> None:
    """Each rank reads a slice of every block; the first one writes whole blocks, into one folder.

    Weights, losses and log are those of one process; the run goes on with as many ranks, and with one.
    """
    make = lambda: offload_cases.tower(torch.float32, seed=5, layers=4, width=40, dropout=0.0, tied=False).to(
        DEVICE
    )
    model, mesh, folder, base = make(), world.mesh(**sizes), world.folder, world.folder / "base.safetensors"
    if world.rank == 0:
        whole = offload_cases.kept(make(), master)
        with offload.stream(whole, "layers", "host") as engine:  # a GPU's machine may lack safetensors
            engine.save(base)
    dist.barrier()
    line = init_device_mesh(DEVICE, (world.ranks,), mesh_dim_names=("slices",))
    path = folder / "run" if written else None
    options = {"weights": base, "path": path, "slots": world.rng.choice((1, 3)), "master": master}
    if written:
        options["write_every"] = world.rng.choice((1, 2))
    if world.rng.random() < 0.5:
        options["cache"] = 20_000  # of some slices
    settings = {"lr": 1e-3, "eps": 1e-2, "seed": 3}
    loss = lambda model, step: offload_cases.loss_of(model, offload_cases.batch_of(step).to(DEVICE))
    returned, begin = [], make().state_dict()
    for until in (3, 6, 9) if written else (9,):
        model = make()
        with offload.stream(
            model, storage="disk", mesh=line, resume=until > 3 and written, **options
        ) as engine:
            spans, read = [], engine.mover.source.reader.read
            engine.mover.source.reader.read = lambda block, data, begin, end: (
                spans.append((block.index, end - begin)), read(block, data, begin, end)  # noqa: B023
            )  # fmt: skip
            optimizer = kind(model.named_parameters(), mesh=Exchange(mesh), **settings)
            for step in range(optimizer.step_count, until):
                returned.append(float(optimizer.step(lambda: loss(model, step))))  # noqa: B023
            ours = {name: value.clone() for name, value in model.state_dict().items()}
            sizes_of = {b.index: b.nbytes for b in engine.blocks}
            slices = [size for index, size in spans if size < sizes_of[index]]
            assert slices  # but for the blocks whose checksums a run that goes on compares once
            assert len(spans) - len(slices) <= (len(sizes_of) if until > 3 and written else 0)
            assert all(size <= sizes_of[0] / world.ranks + 4096 for size in slices)
            if until == 6:  # as processes that die: nothing is flushed, and blocks lack different updates
                engine.mover.drain()
                optimizer.trajectory.close()
                engine.closed = True
    alone = make()
    reference = offload.stream(alone, storage="host", master=master) if master else contextlib.nullcontext()
    with reference:
        optimizer = kind(alone.named_parameters(), **settings, trajectory=folder / f"{world.rank}.zk")
        assert returned == [float(optimizer.step(lambda: loss(alone, step))) for step in range(9)]  # noqa: B023
        optimizer.trajectory.close()
        assert not offload_cases.same_state(ours, alone.state_dict())
    assert offload_cases.same_state(ours, {k: v.to(ours[k].dtype) for k, v in begin.items()})
    if written and world.rank == 0:  # one process goes on with what the ranks have left
        assert (path / "run.zk").read_bytes() == (folder / "0.zk").read_bytes()
        with offload.stream(model := make(), storage="disk", resume=True, **options):
            optimizer = kind(model.named_parameters(), **settings)
            assert optimizer.step_count == 9
            assert not offload_cases.same_state(model.state_dict(), ours)


case(2, "streamed from disk, read", written=False, perturbation=2)(streamed_from_disk)
case(2, "streamed from disk, written", written=True, perturbation=2)(streamed_from_disk)
case(2, "streamed from disk, Adam", written=True, kind=ZOAdam, perturbation=2)(streamed_from_disk)
case(2, "streamed from disk, master", written=True, master=torch.bfloat16, perturbation=2)(streamed_from_disk)
case(4, "streamed from disk, uneven", written=True, copies=4)(streamed_from_disk)


def streamed_encoded(
    world: World,
    wire: str,
    storage: str,
    dtype: torch.dtype = torch.float32,
    kind: type[ZerothOrder] = ZOSGD,
    written: bool = True,
    **options: object,
) -> None:
    """Each rank keeps or reads parts of every block, updates and encodes them; wire bytes are gathered.

    Losses, weights, states and log are those of a stream of one process, which goes on with the folder.
    """
    make = lambda: offload_cases.tower(dtype, seed=5, layers=4, width=40, dropout=0.0, tied=False).to(DEVICE)
    folder, base = world.folder, world.folder / "base.safetensors"
    line = init_device_mesh(DEVICE, (world.ranks,), mesh_dim_names=("slices",))
    mesh = Exchange(world.mesh(**{"perturbation" if world.ranks == 2 else "copies": world.ranks}))
    rng = world.rng
    settings = {"lr": 1e-3, "eps": 1e-2, "seed": 3, **options}
    loss = lambda model, step: offload_cases.loss_of(model, offload_cases.batch_of(step).to(DEVICE))
    how = {"wire": wire, "slots": rng.choice((1, 3)), "write_every": rng.choice((1, 2))}
    if storage == "disk":
        how |= {"weights": base, "cache": rng.choice((0, 20_000))}
        if not written:
            how["write_every"] = None
    if world.rank == 0:
        with offload.stream(make(), "layers", "host") as engine:
            engine.save(base)
    dist.barrier()
    of_folder = lambda name: {"path": folder / name} if storage == "disk" and written else {}
    steps = lambda optimizer, model, until: [
        float(optimizer.step(lambda: loss(model, step)))  # noqa: B023
        for step in range(optimizer.step_count, until)
    ]
    kept = lambda optimizer: [
        (key, t.cpu()) for of in optimizer.state_dict()["state"].values() for key, t in of.items()
    ]
    returned = []
    for until in (3, 6, 9) if of_folder("run") else (9,):
        model = make()
        more = {"resume": True, **of_folder("run")} if of_folder("run") else {}
        with offload.stream(model, storage=storage, mesh=line, **how, **more) as engine:
            optimizer = kind(model.named_parameters(), mesh=mesh, **settings)
            returned += steps(optimizer, model, until)
            ours = {name: value.clone() for name, value in model.state_dict().items()}
            states = kept(optimizer)
            if storage == "host":
                views = engine.mover.source.views
                held = sum(t.nbytes for b in engine.blocks for t in views(b).values())
                whole = sum(
                    e.nbytes for b in engine.blocks for e in (*b.entries, *(s.entry for s in b.states))
                )
                assert held < 1.2 * whole / world.ranks + 4096 * len(engine.blocks)
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            elif not any(b.states for b in engine.blocks):
                spans = [engine.mover.source.spans(b) for b in engine.blocks]
                assert all(
                    end - begin <= engine.blocks[0].nbytes / world.ranks + 8192
                    for of in spans
                    for begin, end in of
                )
            if until == 6:  # as processes that die
                engine.mover.drain()
                optimizer.log.close()
                engine.closed = True
    alone = make()
    with offload.stream(alone, storage=storage, **how, **of_folder(f"alone-{world.rank}")):
        optimizer = kind(alone.named_parameters(), **settings)
        assert returned == steps(optimizer, alone, 9)
        assert not offload_cases.same_state(ours, alone.state_dict())
        assert all(
            a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(states, kept(optimizer), strict=True)
        )
    if of_folder("run") and world.rank == 0:
        assert (folder / "run" / "run.zk").read_bytes() == (folder / "alone-0" / "run.zk").read_bytes()
        with offload.stream(model := make(), storage="disk", resume=True, **how, **of_folder("run")):
            optimizer = kind(model.named_parameters(), **settings)
            assert optimizer.step_count == 9
            assert not offload_cases.same_state(model.state_dict(), ours)


ADAM = {"kind": ZOAdam, "weight_decay": 0.0}
case(2, "encoded slices, fp8", wire="fp8", storage="host")(streamed_encoded)
case(2, "encoded slices, lossless", wire="bf16", storage="host", dtype=torch.bfloat16, directions=2)(
    streamed_encoded
)
case(2, "encoded slices, Adam", wire="int8", storage="host", **ADAM)(streamed_encoded)
case(4, "encoded slices of four", wire="int8", storage="host", dtype=torch.float16)(streamed_encoded)
case(2, "encoded from disk", wire="fp8", storage="disk")(streamed_encoded)
case(2, "encoded from disk, read", wire="bf16", storage="disk", dtype=torch.bfloat16, written=False)(
    streamed_encoded
)
case(2, "encoded from disk, read, lossy", wire="int8", storage="disk", written=False)(streamed_encoded)
case(2, "encoded from disk, Adam", wire="bf16", storage="disk", dtype=torch.bfloat16, **ADAM)(
    streamed_encoded
)
case(4, "encoded from disk, four", wire="bf16", storage="disk", dtype=torch.bfloat16)(streamed_encoded)


@case(2)
def streamed_to_a_full_disk(world: World) -> None:
    """What the first rank cannot write is an error on all of them, and the files stay whole."""
    line = init_device_mesh(DEVICE, (world.ranks,), mesh_dim_names=("slices",))
    model, path = offload_cases.tower(layers=3).to(DEVICE), world.folder / "run"
    engine = offload.stream(model, storage="disk", mesh=line, path=path)
    optimizer = ZOSGD(model.named_parameters(), lr=1e-3, mesh=Exchange(world.mesh(copies=2)))
    step = lambda: optimizer.step(lambda: offload_cases.loss_of(model, offload_cases.batch_of(0).to(DEVICE)))
    step()
    engine.flush()
    before = {p.name: p.read_bytes() for p in path.glob("block-*")}
    if world.rank == 0:

        def full(*args: object) -> None:
            raise OSError("no room")

        engine.mover.source._folder.write = full

    def fails() -> None:
        step()
        engine.flush()

    with pytest.raises(OSError, match="no room"):
        fails()
    assert {p.name: p.read_bytes() for p in path.glob("block-*")} == before
    with pytest.raises((OSError, RuntimeError)):
        engine.close()


@case(2)
def streamed_wrong(world: World) -> None:
    make = lambda mesh, **options: offload.stream(offload_cases.tower(), mesh=mesh, **options)
    line, plane = world.mesh(slices=2), world.mesh(a=2, b=1)
    refused(world, "mesh: expected a DeviceMesh of one dimension .* got 2 dimensions", lambda: make(plane))
    refused(world, "storage: expected 'host' or 'disk' with a mesh", lambda: make(line, storage="device"))
    path = world.folder / "run"
    if world.rank == 0:
        path.mkdir()
        (path / "block-00000.safetensors").touch()
    dist.barrier()
    pattern = "expected a folder without a run, or resume=True, got 'block-00000.safetensors'"
    with pytest.raises((ValueError, RuntimeError), match=pattern):
        make(line, storage="disk", path=path)


# Sharded weights ------------------------------------------------------------------------------------------


def split(model: Model, mesh: DeviceMesh, rng: random.Random) -> None:
    """Every parameter as a DTensor, replicated or split along any dimension, by each dimension of
    ``mesh``.
    """
    for name, p in list(model.named_parameters()):
        while True:
            places = [rng.choice([Replicate(), *map(Shard, range(p.dim()))]) for _ in range(mesh.ndim)]
            sharded = distribute_tensor(p.detach().clone(), mesh, places)
            try:
                shard_of(sharded)
                fine = True
            except ValueError:  # the slice is not rows of one matrix, on this rank or another
                fine = False
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, fine)
            if all(everyone):
                break
        *path, last = name.split(".")
        module = model.get_submodule(".".join(path))
        setattr(module, last, torch.nn.Parameter(sharded))


#: The names of a mesh's dimensions, and those by which the weights are split.
SPLITS = {
    "split": ({"copies": 2, "model": 2}, ("model",)),
    "split by four": ({"model": 4}, ("model",)),
    "split twice": ({"rows": 2, "columns": 2}, ("rows", "columns")),
    "split and data": ({"data": 2, "model": 2}, ("model",)),
    "split and perturbation": ({"perturbation": 2, "model": 2}, ("model",)),
    "split by data": ({"data": 4}, ("data",)),
}


def split_weights(world: World, name: str, mesh: str, restore: str = "exact") -> None:
    make, options = OPTIMIZERS[name]
    options = options | ({} if restore == "exact" else {"restore": restore})
    if name in LOW_RANK:
        options["rounding"] = "nearest"
    run = lambda p, **more: make(p, lr=0.05, **{**options, **more})
    sizes, by = SPLITS[mesh]
    device_mesh = world.mesh(**sizes)
    dtype = world.rng.choice((torch.float32, torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that do not take part
        compare(world, device_mesh, run, dtype, 4, lambda model: split(model, device_mesh[by], world.rng))


LOW_RANK = ("LOZO", "kept", "TeZO", "EGGROLL", "SubZero", "subspace")
for _name in OPTIMIZERS:
    if _name not in (*ALONE, "ForwardGradient", "LOREN", "PGAP"):  # which want whole tensors: wrong_splits
        _mesh = list(SPLITS)[len(CASES[4]) % len(SPLITS)]
        case(4, f"{_mesh}: {_name}", name=_name, mesh=_mesh)(split_weights)
for _name in LOW_RANK:  # by four, so that some ranks have no rows of a matrix
    case(4, f"split by four, low rank: {_name}", name=_name, mesh="split by four")(split_weights)
for _mesh in SPLITS:
    case(4, f"{_mesh}, in place", name="directions", mesh=_mesh, restore="inplace")(split_weights)
    case(4, f"{_mesh}, exact", name="rademacher", mesh=_mesh)(split_weights)


class Net(torch.nn.Module):
    """A model with odd sizes, a layer inside two others, and a weight that belongs to the root."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.scale = torch.nn.Parameter(torch.randn(7))
        self.first = torch.nn.Linear(7, 9)
        self.block = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.first(x * self.scale).relu())

    def loss(self, step: int, shard: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + shard)
        x = torch.randn(8, 7, generator=generator).to(DEVICE, self.scale.dtype)
        return torch.nn.functional.cross_entropy(self(x).float(), torch.arange(8, device=DEVICE) % 3)


def fsdp(world: World, restore: str, dtype: torch.dtype, **sizes: int) -> None:
    """Twenty steps with fully_shard along "data".

    The forward gathers the weights, also those that the root keeps.
    """
    mesh = world.mesh(**sizes)
    seed = world.rng.getrandbits(63)
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "seed": seed, "restore": restore}
    net = Net(dtype)
    fully_shard(net.block, mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])
    optimizer = ZOSGD(net.named_parameters(), mesh=mesh, **options)
    losses = take(optimizer, lambda step: net.loss(step, mesh.get_local_rank("data")), 20)
    with torch.no_grad():
        after = float(net.loss(20, 0))  # with the weights of the last update
    net.reshard()
    assert all(isinstance(p, DTensor) for p in net.parameters())
    weights, state = (
        whole(net),
        {n: whole_of(optimizer.state[p]["momentum_buffer"]) for n, p in net.named_parameters()},
    )
    alone = Net(dtype)
    reference = ZOSGD(alone.named_parameters(), **options)
    shards = mesh["data"].size()
    want = take(reference, lambda step: mean_of([alone.loss(step, s) for s in range(shards)]), 20)
    assert losses == want
    assert after == float(alone.loss(20, 0).detach())
    assert_same(weights, base_of(alone))
    assert_same(state, {n: reference.state[p]["momentum_buffer"] for n, p in alone.named_parameters()})


case(4, "fsdp of four", restore="exact", dtype=torch.bfloat16, data=4)(fsdp)
case(4, "fsdp in place", restore="inplace", dtype=torch.float16, data=4)(fsdp)
case(4, "fsdp and perturbation", restore="exact", dtype=torch.float32, perturbation=2, data=2)(fsdp)


def tensor_parallel(world: World, whole_model: bool) -> None:
    """Layers that are split by columns and by rows, and FSDP over them.

    A sum over ranks has other last bits than the product of one process, so the run of the mesh is the
    reference.  All ranks take the same steps, and the log, replayed on whole and on split weights, gives the
    same bits."""
    mesh = world.mesh(data=2, model=2)
    log = world.folder / "run.zk"

    def build() -> Net:
        net = Net(torch.bfloat16)
        plan = {"first": ColwiseParallel(use_local_output=False), "block.0": RowwiseParallel()}
        parallelize_module(
            net, mesh["model"], {**plan, "block.2": ColwiseParallel(output_layouts=Replicate())}
        )
        if whole_model:
            fully_shard(net, mesh=mesh["data"])
        return net

    net = build()
    if whole_model:  # first split by rows among the ranks of "model", then each part among those of "data"
        assert any(len(p.placements) == 2 for p in net.parameters())
    optimizer = ZOSGD(net.named_parameters(), lr=0.05, directions=2, mesh=Exchange(mesh, 3), trajectory=log)
    losses = take(optimizer, lambda step: net.loss(step, mesh.get_local_rank("data")), 20)
    optimizer.trajectory.close()
    everyone: list = [None] * 4
    dist.all_gather_object(everyone, losses)
    assert all(other == losses for other in everyone)
    net.reshard() if whole_model else None
    weights = whole(net)
    alone, again = Net(torch.bfloat16), build()
    assert not torch.equal(weights["block.0.weight"], alone.block[0].weight)
    replay_(alone, log)
    replay_(again, log)
    assert_same(base_of(alone), weights)
    assert_same(whole(again), weights)


case(4, "tensor parallel", whole_model=False)(tensor_parallel)
case(4, "tensor parallel and fsdp", whole_model=True)(tensor_parallel)


@case(4)
def wrong_splits(world: World) -> None:
    mesh = world.mesh(a=2, b=2)
    param = lambda shape, mesh, *places: [
        torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, places))
    ]
    cube = param((4, 4, 4), mesh, Shard(1), Shard(2))
    refused(world, "expected a shard that is rows of one matrix", lambda: ZOSGD(cube, 1.0, mesh=mesh))
    rows = param((8,), mesh["a"], Shard(0))
    refused(world, "mesh: expected a mesh with all ranks", lambda: ZOSGD(rows, 1.0).step(lambda: 1.0))
    points = world.mesh(perturbation=2, b=2)
    refused(
        world,
        r"is split \(\[., .\]\), at one point, got",
        lambda: ZOSGD(param((8,), points["perturbation"], Shard(0)), 1.0, mesh=points),
        alike=False,
    )
    refused(
        world,
        r"is split .*got ranks \[., .\],",
        lambda: ZOSGD(rows, 1.0, mesh=Exchange(mesh["b"])),
        alike=False,
    )
    from zokernels.optim import LOREN, LOZO, PGAP, ForwardGradient

    columns = param((8, 8), mesh["a"], Shard(1))[0].data.bfloat16().requires_grad_()
    lozo = LOZO([torch.nn.Parameter(columns)], 1.0, rank=2, mesh=mesh)
    refused(
        world,
        "rounding: expected 'nearest' for matrices of half",
        lambda: lozo.step(lambda: world.rng.random()),
    )
    for kind in (LOREN, PGAP):
        whole_only = kind(rows, 1.0, mesh=mesh)
        refused(world, "params: expected plain tensors", lambda: whole_only.step(lambda: rows[0].sum()))  # noqa: B023
    forward = ForwardGradient(rows, 1.0, mesh=mesh)
    refused(world, "expected plain tensors", lambda: forward.step(lambda: rows[0].sum()))
