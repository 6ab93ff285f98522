"""The noise contract: known answers on every backend that runs on the CPU, and the scalar form."""

from __future__ import annotations

import pytest
import torch
from helpers import GOLDEN

import zokernels
from zokernels import _host, contract
from zokernels.backends.reference.noise import uniform16
from zokernels.backends.reference.philox import philox


def stream_in(case: dict) -> int:
    """The stream of a known answer; one that has more than 32 bits is written in hexadecimal digits."""
    return int(case["stream"], 16) if isinstance(case["stream"], str) else case["stream"]


@pytest.mark.parametrize("case", GOLDEN["philox_kat"], ids=lambda c: c["key"][0])
def test_random123_known_answers(case):
    counter, key, out = ([int(w, 16) for w in case[name]] for name in ("counter", "key", "out"))
    seed = key[0] | key[1] << 32
    assert list(contract.philox4x32(counter, key)) == out
    assert list(_host.philox(counter, seed)) == out
    words = philox(*(torch.tensor(c) for c in counter), torch.tensor(contract.seed_to_int64(seed)))
    assert [int(w) for w in words] == out


@pytest.mark.parametrize("case", GOLDEN["normal"] + GOLDEN["normal_wide_stream"], ids=lambda c: c["seed"])
def test_normal_golden(case, cpu_backend):
    z = zokernels.noise(case["n"], seed=int(case["seed"], 16), stream=stream_in(case), offset=case["offset"])
    assert [f"{b & 0xFFFFFFFF:08x}" for b in z.view(torch.int32).tolist()] == case["z"]


@pytest.mark.parametrize("case", GOLDEN["rademacher"], ids=lambda c: c["seed"])
def test_rademacher_golden(case, cpu_backend):
    arguments = {"seed": int(case["seed"], 16), "stream": case["stream"], "offset": case["offset"]}
    z = zokernels.noise(case["n"], dist="rademacher", **arguments)
    assert z.abs().eq(1).all()
    assert "".join("+" if x > 0 else "-" for x in z.tolist()) == case["z"]


@pytest.mark.parametrize(("name", "domain"), [("mask_u16", 3), ("round_u16", 4)])
def test_uniform16_golden(name, domain):
    for case in GOLDEN[name] + GOLDEN[f"{name}_wide_stream"]:
        seed = torch.tensor(contract.seed_to_int64(int(case["seed"], 16)))
        u = uniform16(seed, stream_in(case), domain, case["offset"], case["n"])
        assert [f"{x:04x}" for x in u.tolist()] == case["u"]


@pytest.mark.parametrize("case", GOLDEN["derive_seed"], ids=lambda c: c["seed"])
def test_derive_seed_golden(case, cpu_backend):
    run_seed, step, k, want = int(case["run_seed"], 16), case["step"], case["k"], int(case["seed"], 16)
    assert zokernels.derive_seed(run_seed, step, k) == want
    assert _host.derive_seed(run_seed, step, k) == want
    seeds = zokernels.derive_seed(
        torch.tensor(contract.seed_to_int64(run_seed)), torch.tensor([step, step + 1]), k
    )
    want_next = zokernels.derive_seed(run_seed, step + 1, k)
    assert seeds.tolist() == [contract.seed_to_int64(want), contract.seed_to_int64(want_next)]


def test_stream_golden():
    for case in GOLDEN["stream"]:
        for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
            assert zokernels.stream_of(prefix + case["name"]) == case["stream"]
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        for name in ("{}layers.0.weight", "layers.{}0.{}weight", "module.{}layers.0.weight"):
            assert zokernels.stream_of(name.format(wrapper, wrapper)) == zokernels.stream_of(
                "layers.0.weight"
            )
        assert zokernels.stream_of(f"a{wrapper}weight") != zokernels.stream_of("aweight")
    assert zokernels.stream_of("head.module.weight") != zokernels.stream_of("head.weight")


def test_colliding_streams_are_named():
    """Names that are one without their wrappers are the collision at hand: another takes some 2^28 names
    to find.
    """
    names = ["a.weight", "b.weight", "_orig_mod.a.weight"]
    stream = zokernels.stream_of("a.weight")
    with pytest.raises(
        ValueError, match=rf"'a.weight' and '_orig_mod.a.weight' share stream {stream}; give explicit"
    ):
        zokernels.streams_of(names)


def test_seeds_are_64_bits():
    z = zokernels.noise(64, seed=2**64 - 1)
    assert torch.equal(z, zokernels.noise(64, seed=-1))
    assert not torch.equal(z, zokernels.noise(64, seed=2**32 - 1))
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed: expected an integer in"):
            zokernels.noise(1, seed=seed)


def test_noise_does_not_depend_on_where_a_shard_begins(cpu_backend, rng):
    n, seed, stream = 20000, rng.getrandbits(64), rng.getrandbits(56)
    for dist in ("normal", "rademacher"):
        whole = zokernels.noise(n, seed=seed, stream=stream, dist=dist)
        for _ in range(8):
            a = rng.randrange(n)
            b = rng.randrange(a, n)
            assert torch.equal(
                zokernels.noise(b - a, seed=seed, stream=stream, offset=a, dist=dist), whole[a:b]
            )


def test_streams_and_seeds_are_unrelated(rng):
    n, seed, stream = 1 << 17, rng.getrandbits(64), rng.getrandbits(56)
    for dist in ("normal", "rademacher"):
        z = zokernels.noise(n, seed=seed, stream=stream, dist=dist)
        for other in ({"seed": seed ^ 1, "stream": stream}, {"seed": seed, "stream": stream ^ 1}):
            correlation = (z * zokernels.noise(n, dist=dist, **other)).mean() * n**0.5
            assert abs(correlation) < 6  # standard normal under independence: 2e-9


def test_normal_moments(rng):
    n = 1 << 22
    z = zokernels.noise(n, seed=rng.getrandbits(64)).double()
    assert abs(z.mean()) * n**0.5 < 6
    assert abs(z.pow(2).mean() - 1) * (n / 2) ** 0.5 < 6
    assert abs(z.pow(4).mean() - 3) * (n / 96) ** 0.5 < 6
    assert z.abs().max() < 6.557
