"""The noise contract ``zk1`` in scalar form: constants, Philox, seeds and streams.

This module needs neither torch nor a compiled library, so a log reader or a launcher can use it alone.
The element-wise part of the contract (normal, Rademacher, rounding) is written twice on purpose: in
``backends/reference`` (PyTorch) and in ``csrc/noise`` (shared by CPU and CUDA); the Triton kernels restate it
in their own language.  ``docs/contract.md`` is the specification of all of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

CONTRACT = "zk1"

#: The low byte of the fourth counter word: it separates the uses of one seed.
DOMAIN_SEED, DOMAIN_NORMAL, DOMAIN_RADEMACHER, DOMAIN_MASK, DOMAIN_ROUNDING = range(5)
#: Rounding of an optimizer's first state tensor; the second has the next number.
DOMAIN_STATE = 5

#: Distributions of z by name, with the counter domain that each draws from.
DISTS = {"normal": DOMAIN_NORMAL, "rademacher": DOMAIN_RADEMACHER}

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10

# The normal transform: fp32 bit patterns, lowest power first.
NORMAL_NC2 = 0xB4317218
NORMAL_LK = 0x435EEC6F
NORMAL_R = (0xC0E28E35, 0x409E52CC, 0xC011A278, 0x3F14D1EE, 0xBD8030E7)
NORMAL_COS = (0x3F7FFF90, 0xB09DE2D2, 0x20815232, 0x8F9C6EA9)
NORMAL_SIN = (0x38490FAE, 0xA8A5593C, 0x1822AE79, 0x870DFCA3)

RADEMACHER_TILE = 4096

#: Sums of z^2 are integers in units of 1 / SQUARE_SCALE, so that no order of summation changes them.
SQUARE_SCALE = 2.0**20

#: A stream is an integer in [0, 2^STREAM_BITS).
STREAM_BITS = 56

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One Philox4x32-10 block (Salmon et al., SC'11): four 32-bit words from a 128-bit counter and a
    64-bit key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = PHILOX_M0 * c0, PHILOX_M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + PHILOX_W0) & _MASK32, (k1 + PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def stream_words(stream: int, domain: int) -> tuple[int, int]:
    """The third and the fourth counter word: (stream mod 2^32, domain + 256 * (stream div 2^32))."""
    return stream & _MASK32, domain | stream >> 32 << 8


def seed_to_int64(seed: int) -> int:
    """``seed`` modulo 2^64, as the int64 with the same bits: the form in which a seed travels in tensors.

    Raises ``ValueError`` outside [-2^63, 2^64).
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer in [-2^63, 2^64), got {seed}")
    seed &= _MASK64
    return seed - 2**64 if seed >> 63 else seed


def derive_seed_int(run_seed: int, step: int, k: int) -> int:
    """Seed of direction ``k`` at ``step``: Philox(key = run_seed, counter = (step_lo, step_hi, k, 0)), in [0,
    2^64).

    Raises ``ValueError`` when ``step`` is not in [0, 2^64) or ``k`` not in [0, 2^32).
    """
    if not 0 <= step < 2**64:
        raise ValueError(f"derive_seed: step: expected an integer in [0, 2^64), got {step}")
    if not 0 <= k < 2**32:
        raise ValueError(f"derive_seed: k: expected an integer in [0, 2^32), got {k}")
    return _seed_at(run_seed, step, k)


def derive_stream_seed(run_seed: int, step: int, stream: int) -> int:
    """A parameter's own seed: as :func:`derive_seed_int`, with the parameter's ``stream`` in the place of k.

    Philox(key = run_seed, counter = (step_lo, step_hi, stream mod 2^32, 256 * (stream div 2^32))), in [0,
    2^64).  A stream of more than 32 bits is no k, so it is spread over two counter words as it is for noise.
    Raises ``ValueError`` when ``step`` is not in [0, 2^64) or ``stream`` not in [0, 2^56)."""
    if not 0 <= step < 2**64:
        raise ValueError(f"derive_stream_seed: step: expected an integer in [0, 2^64), got {step}")
    if not 0 <= stream < 2**STREAM_BITS:
        raise ValueError(
            f"derive_stream_seed: stream: expected an integer in [0, 2^{STREAM_BITS}), got {stream}"
        )
    return _seed_at(run_seed, step, stream)


def _seed_at(run_seed: int, step: int, stream: int) -> int:
    key = seed_to_int64(run_seed) & _MASK64
    counter = (step & _MASK32, step >> 32, *stream_words(stream, DOMAIN_SEED))
    w0, w1, _, _ = philox4x32(counter, (key & _MASK32, key >> 32))
    return w0 | w1 << 32


_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def canonical_name(name: str) -> str:
    """``name`` without the components that wrappers add, so that every wrapper and stage of a model agrees on
    it.

    ``_orig_mod.`` (torch.compile), ``_checkpoint_wrapped_module.`` (activation checkpointing) and
    ``_fsdp_wrapped_module.`` (fully sharded data parallel) can stand at any depth and are removed everywhere.
    ``module.`` (data parallel) is removed only in front, because a model may own a submodule that is called
    ``module``."""
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):
        name = name[len("module.") :]
    return name


def stream_of(name: str) -> int:
    """The stream of a named parameter, in [0, 2^56): BLAKE2b(canonical name, digest_size=7), read
    little-endian.
    """
    name = canonical_name(name)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=STREAM_BITS // 8).digest(), "little")


# So a graph holds the number.  torch.compiler.assume_constant_result sets the same, but imports the compiler.
stream_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def streams_of(names: Iterable[str]) -> list[int]:
    """The streams of several names, by :func:`stream_of`.

    Raises ``ValueError`` naming the pair when two of them collide, ``TypeError`` for one text.
    """
    if isinstance(names, str):
        raise TypeError(f"streams_of: names: expected several names (stream_of takes one), got {names!r}")
    owner: dict[int, str] = {}
    streams = []
    for name in names:
        stream = stream_of(name)
        if stream in owner:
            raise ValueError(
                f"streams: parameters {owner[stream]!r} and {name!r} share stream {stream}; "
                "give explicit streams (param group key 'streams')"
            )
        owner[stream] = name
        streams.append(stream)
    return streams
