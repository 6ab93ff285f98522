"""Subsets: only some parameters take part in a step, and the others cost no memory traffic at all."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import compress

from ..checks import check_choice, check_integer, fail
from ..contract import derive_seed_int
from .roles import OptimizerView
from .types import Bucket

#: Layers of transformers as their modules are named (LLaMA, OPT, GPT-2, BERT, nanoGPT).
LAYERS = r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\."

#: k of the seeds that choose layers, downwards from here: far above any direction's.
_FIRST_K = 0xFFFFFFFF


@dataclass(frozen=True)
class Subset:
    """Chooses the parameters of a step by a schedule that is a function of run seed and step alone.

    A parameter belongs to the layer whose number the first group of ``layers`` finds in its name.
    """

    #: Regular expression, searched in the parameters' names.
    layers: str = LAYERS

    def select(self, optimizer: OptimizerView, buckets: list[Bucket]) -> list[Bucket]:
        """``buckets`` with only the parameters of this step."""
        owner = self._layers(optimizer)
        chosen = self._chosen(optimizer, sorted({layer for layer in owner.values() if layer is not None}))
        selected = []
        for bucket in buckets:
            keep = [owner[id(p)] in chosen for p in bucket.params]
            if any(keep):
                params, streams = list(compress(bucket.params, keep)), list(compress(bucket.streams, keep))
                names = list(compress(bucket.names, keep))
                selected.append(replace(bucket, params=params, streams=streams, names=names))
        if not selected:
            fail(optimizer.op, "subset", "trainable parameters in every part", f"none in {chosen}")
        return selected

    def _layers(self, optimizer: OptimizerView) -> dict[int, int | None]:
        """The layer of each parameter, by id of the parameter; None where it is in no layer."""
        pattern, owner = re.compile(self.layers), {}
        for group in optimizer.param_groups:
            if group["params"] and "param_names" not in group:
                fail(optimizer.op, "subset", "named parameters (model.named_parameters())", "unnamed ones")
            for name, param in zip(group.get("param_names", ()), group["params"], strict=True):
                found = pattern.search(name)
                owner[id(param)] = int(found.group(1)) if found else None
        if all(layer is None for layer in owner.values()):
            got = ", ".join(repr(n) for g in optimizer.param_groups for n in g.get("param_names", ())[:2])
            fail(optimizer.op, "subset", f"names with a layer number ({self.layers!r})", got)
        return owner

    def _chosen(self, optimizer: OptimizerView, layers: list[int]) -> set[int | None]:
        raise NotImplementedError


@dataclass(frozen=True)
class Blocks(Subset):
    """Block coordinate descent: one block a time, for ``period`` steps.

    A block is ``size`` consecutive layers.  One more block holds what is in no layer (embeddings, head).

    Source: ZO-LLM, Zhang et al. 2024 (arXiv 2402.11592).
    """

    size: int = 1
    period: int = 1
    #: "cyclic": blocks in their order; "random": a block drawn anew for each period.
    order: str = "cyclic"

    def __post_init__(self) -> None:
        check_integer("Blocks", "size", self.size)
        check_integer("Blocks", "period", self.period)
        check_choice("Blocks", "order", self.order, ("cyclic", "random"))

    def _chosen(self, optimizer: OptimizerView, layers: list[int]) -> set[int | None]:
        blocks: list[set[int | None]] = [
            set(layers[i : i + self.size]) for i in range(0, len(layers), self.size)
        ]
        if any(layer is None for layer in self._layers(optimizer).values()):
            blocks.append({None})
        turn = optimizer.step_count // self.period
        if self.order == "random":
            turn = derive_seed_int(optimizer.seed, turn, _FIRST_K)
        return blocks[turn % len(blocks)]


@dataclass(frozen=True)
class LayerSkip(Subset):
    """Each step draws round(skipped * layers) layers that it leaves out.

    What is in no layer always takes part.

    Source: LeZO, Wang et al. 2024 (arXiv 2410.09823).
    """

    #: Share of the layers left out.
    skipped: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.skipped < 1:
            fail("LayerSkip", "skipped", "a number in [0, 1)", self.skipped)

    def _chosen(self, optimizer: OptimizerView, layers: list[int]) -> set[int | None]:
        drawn = lambda layer: derive_seed_int(optimizer.seed, optimizer.step_count, _FIRST_K - layer)
        order = sorted(layers, key=drawn)
        return {None, *order[round(self.skipped * len(layers)) :]}
