"""The exact parameter lists of published models, as names and shapes worked out from their configurations.

Nothing is downloaded.  tests/test_bench_workloads.py compares each list with the model that transformers
builds from the same numbers, and its total with the published one.  A tied head is not listed: it is the
embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Opt:
    """OPT (Zhang et al., 2022, arXiv 2205.01068) with learned positions and norms before the layers."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    vocab: int = 50272
    positions: int = 2048

    def shapes(self) -> Shapes:
        h, f = self.hidden, self.ffn
        top = "model.decoder"
        # There are two positions more than the context, because the model counts them from 2.
        found: Shapes = {
            f"{top}.embed_tokens.weight": (self.vocab, h),
            f"{top}.embed_positions.weight": (self.positions + 2, h),
        }
        found |= _norm(f"{top}.final_layer_norm", h)
        for i in range(self.layers):
            at = f"{top}.layers.{i}"
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                found |= _linear(f"{at}.self_attn.{name}", h, h)
            found |= _norm(f"{at}.self_attn_layer_norm", h)
            found |= _linear(f"{at}.fc1", f, h) | _linear(f"{at}.fc2", h, f)
            found |= _norm(f"{at}.final_layer_norm", h)
        return found


@dataclass(frozen=True)
class Qwen3:
    """Qwen3 (2025, arXiv 2505.09388): grouped queries, a norm on each head's query and key, no biases, tied
    head.
    """

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head: int = 128
    vocab: int = 151936

    def shapes(self) -> Shapes:
        h, q, kv = self.hidden, self.heads * self.head, self.kv_heads * self.head
        found: Shapes = {"model.embed_tokens.weight": (self.vocab, h)}
        for i in range(self.layers):
            at = f"model.layers.{i}"
            found |= {
                f"{at}.self_attn.q_proj.weight": (q, h),
                f"{at}.self_attn.k_proj.weight": (kv, h),
                f"{at}.self_attn.v_proj.weight": (kv, h),
                f"{at}.self_attn.o_proj.weight": (h, q),
                f"{at}.self_attn.q_norm.weight": (self.head,),
                f"{at}.self_attn.k_norm.weight": (self.head,),
                f"{at}.mlp.gate_proj.weight": (self.ffn, h),
                f"{at}.mlp.up_proj.weight": (self.ffn, h),
                f"{at}.mlp.down_proj.weight": (h, self.ffn),
                f"{at}.input_layernorm.weight": (h,),
                f"{at}.post_attention_layernorm.weight": (h,),
            }
        return found | {"model.norm.weight": (h,)}


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, h: int) -> Shapes:
    return {f"{name}.weight": (h,), f"{name}.bias": (h,)}


WORKLOADS: dict[str, Opt | Qwen3] = {
    "opt-125m": Opt(hidden=768, layers=12, ffn=3072, heads=12),
    "opt-1.3b": Opt(hidden=2048, layers=24, ffn=8192, heads=32),
    "opt-13b": Opt(hidden=5120, layers=40, ffn=20480, heads=40),
    "qwen3-1.7b": Qwen3(hidden=2048, layers=28, ffn=6144, heads=16, kv_heads=8),
}


@dataclass(frozen=True)
class Published:
    """A pass in place over one tensor for which somebody else has published a time.

    ``peak``: bytes a second of the card's memory by its data sheet.
    """

    numel: int
    seconds: float
    gpu: str
    peak: float
    dtype: str = "bf16"
    dist: str = "rademacher"

    @property
    def of_peak(self) -> float:
        """The share of the card's bandwidth that one read and one write of two bytes for each element
        take.
        """
        return 4 * self.numel / self.seconds / self.peak


#: FlashOpt (github.com/plugyawn/FlashOpt), W0 + sigma R(seed) by a Triton kernel, on one NVIDIA L4.
PUBLISHED = {
    "flashopt-50m": Published(50_000_000, 0.91e-3, "NVIDIA L4", 300e9),
    "flashopt-200m": Published(200_000_000, 3.46e-3, "NVIDIA L4", 300e9),
}


def scaled(config: Opt | Qwen3, scale: float) -> Opt | Qwen3:
    """The model with ``scale`` times the layers and every width: about scale^3 of the parameters, for small
    machines.

    Widths stay multiples of 8, so that alignment is as in the model.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale: expected a number in (0, 1], got {scale}")
    if scale == 1:
        return config
    width: Callable[[int], int] = lambda n: max(8, 8 * round(n * scale / 8))
    widths = {
        name: width(getattr(config, name))
        for name in ("hidden", "ffn", "vocab", "positions", "head")
        if hasattr(config, name)
    }
    return replace(config, layers=max(1, round(config.layers * scale)), **widths)


def shapes(name: str, scale: float = 1.0) -> Shapes:
    """The shapes by parameter name, in the order of the model."""
    return scaled(WORKLOADS[name], scale).shapes()


def total(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def module_of(name: str) -> str:
    """The name of the module that owns the parameter; a weight and its bias have the same."""
    return name.rpartition(".")[0]


def layer_of(name: str) -> str:
    """The decoder layer that holds the parameter, or its module if it is in no layer."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else module_of(name)
