"""encode, decode and decode_fan_out in pure PyTorch (formats: ``zokernels.wire``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...wire import BLOCK, FORMATS, scale_begin, scale_count
from ..registry import implements
from ..terms import Terms
from .combine import CHUNK, accumulate, chunks
from .fan_out import fan_out


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly: the exponent is put into its bits."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


def _blocks(x: Tensor, offset: int) -> tuple[Tensor, slice]:
    """Flat ``x`` in blocks of 32, float64 [blocks, 32], and the slice of these elements that is ``x``.

    What the first and the last block have beside ``x`` is 0.
    """
    lead, count = offset % BLOCK, scale_count(x.numel(), offset)
    padded = x.new_zeros(count * BLOCK, dtype=torch.float64)
    inside = slice(lead, lead + x.numel())
    padded[inside] = x.double()
    return padded.view(count, BLOCK), inside


def encode_blocks(x: Tensor, wire: str, offset: int) -> tuple[Tensor, Tensor]:
    """The codes of flat ``x``, uint8 [n], and the scale bytes of its blocks, uint8 [blocks]."""
    emax = FORMATS[wire].emax
    assert emax is not None
    blocks, inside = _blocks(x, offset)
    top = blocks.abs().amax(1)
    special = ~top.isfinite()  # an infinity or a NaN makes NaNs of its block
    # floor(log2(top)).  Of a block of zeros it is replaced below.
    exponent = torch.frexp(torch.where(special, 1.0, top)).exponent - 1
    exponent = torch.where(top == 0, -127, exponent - emax).clamp(-127, 127)
    scaled = blocks * _power(-exponent)[:, None]  # exact, by a power of two
    if wire == "fp8":
        codes = scaled.clamp(-448, 448).float().to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = (scaled * 64).nan_to_num(0).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    codes = torch.where(special[:, None], 0, codes)
    scales = torch.where(special, 255, exponent + 127).to(torch.uint8)
    return codes.view(-1)[inside], scales


@implements
def encode(out: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]) -> None:
    form = FORMATS[wire]
    for data, param, offset in zip(out, params, offsets, strict=True):
        x, n = param.detach().view(-1), param.numel()
        for at in range(0, n, CHUNK):
            part = x[at : at + CHUNK]
            m = part.numel()
            if form.emax is None:
                if wire == "fp16" and x.dtype is not torch.float16:
                    part = torch.where(part.isinf(), part.float(), part.float().clamp(-65504, 65504))
                data.view(form.dtype)[at : at + m] = part.to(form.dtype)
                continue
            codes, scales = encode_blocks(part, wire, offset + at)
            data[at : at + m] = codes
            first = scale_begin(n) + (offset + at) // BLOCK - offset // BLOCK
            data[first : first + scales.numel()] = scales


def decoded(data: Tensor, wire: str, n: int, offset: int, at: int, m: int) -> Tensor:
    """Elements [at, at + m), fp32, of the ``n`` that the buffer ``data`` holds."""
    form = FORMATS[wire]
    if form.emax is None:
        return data.view(form.dtype)[at : at + m].float()
    codes = data[at : at + m].view(form.dtype).double() / (64 if wire == "int8" else 1)
    index = torch.arange(offset + at, offset + at + m, device=data.device) // BLOCK - offset // BLOCK
    scale = data[scale_begin(n) + index].long()
    scale = torch.where(scale == 255, float("nan"), _power(scale - 127))
    return (codes * scale).float()  # exact where fp32 can hold it


@implements
def decode(out: list[Tensor], wires: list[Tensor], wire: str, terms: Terms) -> None:
    for chunk in chunks(out, terms):
        theta, offset = out[chunk.index], terms.offsets[chunk.index]
        acc = decoded(wires[chunk.index], wire, theta.numel(), offset, chunk.at, chunk.n)
        if terms.decay is not None:
            acc = terms.decay * acc
        chunk.of(theta).copy_(chunk.rounded(accumulate(chunk, acc), theta.dtype))


@implements
def decode_fan_out(
    plus: list[Tensor],
    minus: list[Tensor],
    wires: list[Tensor],
    wire: str,
    seed: Tensor,
    coeff: Tensor,
    terms: Terms,
) -> None:
    theta = [torch.empty_like(p) for p in plus]
    decode(theta, wires, wire, terms)
    none = terms._replace(seeds=seed[:0], coeffs=coeff[:0], decay=None, rounding_seed=None)
    fan_out(theta, plus, minus, seed, coeff, none)
