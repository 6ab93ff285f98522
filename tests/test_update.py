"""update_: the reference against its formulas, and every kernel against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DISTS,
    DTYPES,
    STATE_DTYPES,
    add_extras,
    assert_same_bits,
    check_backend,
    placed,
    random_call,
    random_values,
)

import zokernels
from zokernels.backends.reference.noise import uniform16
from zokernels.backends.reference.rounding import round_stochastic
from zokernels.ops.update import RULES


def run(buffers, parts, first, second, rule, hyper, **kwargs):
    states = {
        "first": placed(first, parts) if first else (),
        "second": placed(second, parts) if second else (),
    }
    zokernels.update_(placed(buffers, parts), rule, hyper, **states, **kwargs)
    return [*buffers, *first, *second]


def random_hyper(rule, count, rng):
    values = RULES[rule][1] + (count if rule == "adam_window" else 0)
    return torch.tensor([rng.choice([rng.random(), rng.gauss(0, 1), 1e-6, 0.0]) for _ in range(values)])


def random_update(rng, rule, **fixed):
    """Arguments of run: states lie where the parameters do, in buffers of their own."""
    extras = fixed.pop("extras", None)
    if rule == "hizoo":
        fixed["count"] = 1
    buffers, parts, kwargs = random_call(rng, **fixed)
    kwargs = add_extras(rng, parts, kwargs, curvature=False, extras=extras)
    dtypes = [rng.choice(STATE_DTYPES) for _ in range(RULES[rule][0])] + [None, None]
    first, second = (
        [] if d is None else [random_values(b.numel(), d, rng) for b in buffers] for d in dtypes[:2]
    )
    hyper = random_hyper(rule, kwargs["seeds"].numel(), rng)
    return {
        "buffers": buffers,
        "parts": parts,
        "first": first,
        "second": second,
        "rule": rule,
        "hyper": hyper,
        **kwargs,
    }


def momentum(theta, decayed, z, c, states, hyper):
    l2, beta, gain, lr = hyper
    m = beta * states[0] + gain * ((c[:, None] * z).sum(0) + l2 * theta)
    return decayed - lr * m, [m]


def adam(theta, decayed, z, c, states, hyper):
    l2, beta1, gain1, beta2, gain2, lr, scale, eps = hyper
    g = (c[:, None] * z).sum(0) + l2 * theta
    m, v = beta1 * states[0] + gain1 * g, beta2 * states[1] + gain2 * g * g
    return decayed - lr * m / (scale * v.sqrt() + eps), [m, v]


def adam_window(theta, decayed, z, c, states, hyper):
    lr, eps, *b = hyper
    m, v = (c[:, None] * z).sum(0), (torch.stack(b)[:, None] * z * z).sum(0)
    return decayed - lr * m / (v.sqrt() + eps), []


def sign(theta, decayed, z, c, states, hyper):
    l2, lr = hyper
    return decayed - lr * ((c[:, None] * z).sum(0) + l2 * theta).sign(), []


def hizoo(theta, decayed, z, c, states, hyper):
    keep, gain = hyper
    h = keep * states[0] + gain * states[0] * z[0] * z[0]
    return decayed + c[0] * z[0] / h.sqrt(), [h]


FORMULAS = {"momentum": momentum, "adam": adam, "adam_window": adam_window, "sign": sign, "hizoo": hizoo}
HYPER = {
    "momentum": [0.1, 0.9, 0.7, 0.01],
    "adam": [0.1, 0.9, 0.1, 0.99, 0.01, 0.02, 1.3, 1e-3],
    "adam_window": [0.02, 1e-3, 0.3, 0.6, 0.1],
    "sign": [0.1, 0.003],
    "hizoo": [0.9, 0.1],
}


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("rule", RULES)
def test_reference_follows_the_formula(rule, dist, rng):
    n, count = 900, 1 if rule == "hizoo" else 3
    theta, states = torch.randn(n), [torch.rand(n) + 0.1 for _ in range(RULES[rule][0])]
    seeds, coeffs = [rng.getrandbits(64) for _ in range(count)], torch.tensor([0.3, -0.2, 0.05])[:count]
    keep, decay = torch.rand(n) < 0.7, 0.8
    z = torch.stack([zokernels.noise(n, seed=s, stream=5, offset=11, dist=dist).double() for s in seeds])
    hyper = torch.tensor(HYPER[rule])
    before, before_theta = [s.clone() for s in states], theta.double()
    wide = [s.double() for s in states]
    decayed = theta.double() * torch.tensor(decay).double()
    want, new = FORMULAS[rule](theta.double(), decayed, z, coeffs.double(), wide, hyper.double().unbind())
    with zokernels.backend("reference"):
        zokernels.update_(
            theta, rule, hyper, seeds, coeffs, first=states[:1], second=states[1:], streams=5, offsets=11,
            dist=dist,
            decay=decay, masks=zokernels.pack_mask(keep, 11),
        )  # fmt: skip
    if rule == "sign":  # whose argument may lie nearer to 0 than its rounding in fp32
        argument = (coeffs.double()[:, None] * z).sum(0) + hyper[0].double() * before_theta
        want = torch.where(argument.abs() < 1e-6, theta.double(), want)
    torch.testing.assert_close(theta.double(), torch.where(keep, want, decayed), rtol=1e-5, atol=1e-6)
    for got, expected, old in zip(states, new, before, strict=True):
        torch.testing.assert_close(
            got.double(), torch.where(keep, expected, old.double()), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("rule", ["momentum", "adam", "hizoo"])
def test_reference_rounds_states_with_bits_of_their_own(rule, rng):
    """bf16 states are the fp32 ones rounded with domains 5 and 6; theta with domain 4."""
    n, seed, offset = 1000, torch.tensor(rng.getrandbits(62)), rng.randrange(2**40)
    theta, states = torch.randn(n), [(torch.rand(n) + 0.1).bfloat16() for _ in range(RULES[rule][0])]
    half, wide = theta.bfloat16(), [s.float() for s in states]
    theta = half.float()
    args = {
        "rule": rule,
        "hyper": HYPER[rule],
        "seeds": [1],
        "coeffs": [0.1],
        "streams": 3,
        "offsets": offset,
    }
    with zokernels.backend("reference"):
        zokernels.update_(theta, first=wide[:1], second=wide[1:], **args)
        stochastic = {"rounding": "stochastic", "rounding_seed": seed}
        zokernels.update_(half, first=states[:1], second=states[1:], **args, **stochastic)
    for domain, exact, got in zip((4, 5, 6), (theta, *wide), (half, *states), strict=False):
        assert_same_bits(got, round_stochastic(exact, uniform16(seed, 3, domain, offset, n), torch.bfloat16))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("repeat", range(6))
def test_kernels_equal_reference(cpu_kernel, rng, rule, repeat):
    for _ in range(4):
        check_backend(run, random_update(rng, rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_at_every_alignment_and_small_size(cpu_kernel, rule, dtype, rng):
    for n in (0, 1, 7, 9, 63, 64, 127, 128, 129, 4097):
        offset = rng.choice([rng.randrange(140), 8 * 2**32 - n // 2, 2**63 - 1 - n])
        check_backend(run, random_update(rng, rule, sizes=[n], offsets=[offset], dtype=dtype))


@pytest.mark.parametrize("rule", RULES)
def test_many_tensors_and_threads(cpu_kernel, rule, rng):
    args = random_update(rng, rule, sizes=[rng.randrange(1, 2000) for _ in range(20)] + [70_001], count=1)
    check_backend(run, args, threads=(1, 3))


def test_what_the_states_hold_reaches_theta_as_nan(cpu_backend):
    """A NaN of a fp32 state with all bits set must not carry over into a zero."""
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32).repeat(70)
    for dtype in DTYPES:
        for rounding in ("nearest", "stochastic"):
            theta = torch.ones(210, dtype=dtype)
            zokernels.update_(
                theta, "momentum", HYPER["momentum"], 1, 0.1, first=payloads.clone(), streams=0,
                rounding=rounding,
                rounding_seed=5,
            )  # fmt: skip
            assert theta.isnan().all()
    theta, state = payloads.clone(), torch.ones(210, dtype=torch.bfloat16)
    zokernels.update_(theta, "momentum", HYPER["momentum"], 1, 0.1, first=state, streams=0)
    assert state.isnan().all()


def test_dropped_elements_keep_their_states(cpu_backend, rng):
    theta, state = random_values(500, torch.float32, rng), random_values(500, torch.bfloat16, rng)
    keep, before = torch.rand(500) < 0.5, (theta.clone(), state.clone())
    zokernels.update_(
        theta, "momentum", HYPER["momentum"], [1, 2], [float("inf"), float("nan")], first=state, streams=0,
        masks=zokernels.pack_mask(keep),
    )  # fmt: skip
    for got, old in zip((theta, state), before, strict=True):
        assert_same_bits(got[~keep], old[~keep])
        assert got[keep].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("rule", RULES)
def test_gpu_equals_reference(backend, rng, rule):
    for repeat in range(10):
        args = random_update(rng, rule, max_size=40000 if repeat % 3 == 0 else 4100)
        with zokernels.backend(backend):
            check_backend(run, args, "cuda")
