"""Meshes of two and four processes against one process, bit for bit.  The cases: distributed_cases.py."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import subprocess
import sys

import distributed_cases
import distributed_worker
import pytest
import torch
import trajectory_cases
from case_process import TESTS, CaseProcess, environment
from torch import distributed as dist

from zokernels.distributed import mean_of
from zokernels.distributed.agreement import fingerprint
from zokernels.optim import ZOSGD

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")  # ranks that wait still take a tenth of a core each
def meshes(tmp_path_factory):
    """For each number of ranks the processes, which run one case after the other."""
    made = {}
    for ranks in distributed_cases.CASES:
        arguments = "distributed_worker.py", tmp_path_factory.mktemp(f"ranks{ranks}"), ranks
        made[ranks] = CaseProcess(*arguments, limit=distributed_worker.LIMIT + 60, OMP_NUM_THREADS="1")
    yield made
    for process in made.values():
        process.stop()


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks, cases in distributed_cases.CASES.items() for name in cases]
)
def test_mesh(meshes, ranks, name, rng):
    results = meshes[ranks].ask(name=name, seed=rng.getrandbits(48))
    failed = [f"rank {rank}: {result}" for rank, result in enumerate(results) if result != "ok"]
    if failed:
        pytest.fail("\n".join((*failed, meshes[ranks].said())), pytrace=False)


@pytest.mark.parametrize(
    ("fault", "limit", "said"),
    [
        ("raises", distributed_worker.LIMIT, "KeyError: 'mine'"),
        ("dies", distributed_worker.LIMIT, "the process ended with -9"),
        ("hangs", 3, "did not come to an end"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_fault_of_one_case_is_no_other_cases(meshes, fault, limit, said):
    """A case that fails, dies or hangs on one rank is a failure; the next case has ranks that work."""
    results = meshes[2].ask(name=fault, seed=0, limit=limit)
    assert said in results[1]
    assert results[0] != "ok"  # it waited for the other
    assert meshes[2].ask(name="data of two", seed=0) == ["ok", "ok"]


@pytest.mark.slow
def test_ranks_that_die_rejoin_from_the_log(tmp_path):
    """torchrun restarts its workers after each SIGKILL; sharded weights end with the bits of one process."""
    kills = ["1:4", "0:9"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", str(TESTS / "elastic_worker.py"), str(tmp_path), "14", *kills]
    # docs/distributed.md
    env = environment(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert all((tmp_path / f"killed {kill}").exists() for kill in kills)
    assert [int(line.split()[-1]) for line in run.stdout.splitlines() if "begins" in line] == [0, 4, 9]
    assert_like_one_process(tmp_path, 14)


def assert_like_one_process(folder: pathlib.Path, steps: int) -> None:
    """Compares the weights and the log of elastic_worker.py on two ranks with those of one process."""
    alone = trajectory_cases.Model(torch.bfloat16, random.Random(5))
    optimizer = ZOSGD(alone.named_parameters(), lr=0.05, momentum=0.9, seed=6, trajectory=folder / "alone.zk")
    for step in range(steps):
        optimizer.step(lambda: distributed_cases.whole_loss(alone, step, 2))  # noqa: B023
    optimizer.trajectory.close()
    trajectory_cases.assert_same(torch.load(folder / "weights.pt"), trajectory_cases.base_of(alone))
    assert (folder / "run.zk").read_bytes() == (folder / "alone.zk").read_bytes()


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them.

    Of each: the prefix of a command that runs in it, its address, and its interface.
    """
    if shutil.which("ip") is None:
        pytest.skip("needs ip (iproute2)")
    ip = lambda *words: subprocess.run(["ip", *words], capture_output=True, text=True)
    # Names end with this process's number, addresses are of the block for documentation, and both only live
    # inside.
    names, links = ([f"{kind}{os.getpid()}{side}" for side in "ab"] for kind in ("zkns", "zk"))
    found = []
    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"ip netns add: {made.stderr.strip()}")
        inside = ("netns", names[0])
        steps = [
            ["link", "add", links[0], *inside, "type", "veth", "peer", "name", links[1], "netns", names[1]]
        ]
        for i, (name, link) in enumerate(zip(names, links, strict=True)):
            address = f"192.0.2.{i + 1}"
            steps += [["-n", name, "addr", "add", f"{address}/24", "dev", link]]
            steps += [["-n", name, "link", "set", device, "up"] for device in ("lo", link)]
            found.append((["ip", "netns", "exec", name], address, link))
        for words in steps:
            if (made := ip(*words)).returncode:
                pytest.skip(f"ip {' '.join(words)}: {made.stderr.strip()}")
        yield found
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_hosts(hosts, tmp_path):
    """torchrun on each of two hosts that reach each other by their cable alone: weights sharded between
    them.
    """
    master, nodes = hosts[0][1], []
    for node, (inside, _, link) in enumerate(hosts):
        command = [
            *inside,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
        ]
        command += ["--node-rank", str(node), "--master-addr", master, "--master-port", "29511"]
        command += [str(TESTS / "elastic_worker.py"), str(tmp_path), "6"]
        env = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=link)
        nodes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        )
    try:
        ends = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "".join(errors[-2000:] for _, errors in ends)
    assert [out.count("begins at step 0") for out, _ in ends] == [1, 0]
    assert_like_one_process(tmp_path, 6)


#: The order of the sums.
TREES = {
    1: lambda a: a,
    2: lambda a, b: a + b,
    3: lambda a, b, c: (a + b) + c,
    7: lambda a, b, c, d, e, f, g: ((a + b) + (c + d)) + ((e + f) + g),
    8: lambda a, b, c, d, e, f, g, h: ((a + b) + (c + d)) + ((e + f) + (g + h)),
}


def random_losses(rng, count):
    return [rng.uniform(-1, 1) * 10 ** rng.randrange(-9, 9) for _ in range(count)]


@pytest.mark.parametrize("count", TREES)
def test_mean_is_a_tree_in_the_order_of_the_list(rng, count):
    losses = random_losses(rng, count)
    want = TREES[count](*losses) / count
    assert mean_of(losses).item() == want
    rows = torch.tensor(losses, dtype=torch.float64)[:, None].expand(-1, 3)
    assert mean_of(rows).tolist() == [want] * 3


def test_mean_of_many(rng):
    """The sum of 2^m numbers is the sum of those of its halves, and zeros at the end change nothing."""
    losses = random_losses(rng, 1000)
    padded = [*losses, *[0.0] * 24]
    halves = mean_of(padded[:512]).item() * 512 + mean_of(padded[512:]).item() * 512
    assert mean_of(padded).item() * 1024 == halves
    assert mean_of(losses).item() == halves / 1000
    with pytest.raises(ValueError, match="at least one"):
        mean_of([])


def test_mean_of_what_is_not_finite_is_not_finite():
    assert mean_of([1.0, float("nan"), 2.0]).isnan()
    assert mean_of([1.0, float("inf"), 2.0]).isinf()
    assert mean_of([float("-inf"), float("inf")]).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_fingerprint_sees_every_single_change(rng, dtype):
    weights = torch.randn(3, 1000).mul(50).to(dtype)
    before = fingerprint(weights)
    assert fingerprint(weights.clone()) == before
    raw = weights.view(-1).view(torch.uint8)
    for _ in range(50):
        at, bit = rng.randrange(raw.numel()), 1 << rng.randrange(8)
        raw[at] ^= bit
        assert fingerprint(weights) != before
        raw[at] ^= bit
    swapped = weights.flatten().clone()
    i, j = (swapped != swapped[0]).nonzero()[0].item(), 0
    swapped[[i, j]] = swapped[[j, i]]
    assert fingerprint(swapped) != before
