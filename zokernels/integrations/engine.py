"""The weights of an inference engine: noise by the names of the checkpoint, inside fused and sharded tensors.

An engine keeps the parameters of a Hugging Face checkpoint in tensors of its own.  It joins ``q_proj``,
``k_proj`` and ``v_proj`` into one ``qkv_proj``, gives each rank its rows or columns, pads the vocabulary, and
copies key heads that are fewer than the ranks.  The noise of a weight belongs to its name and index in the
checkpoint, wherever an engine keeps it.  So every number of ranks, a Hugging Face model in memory and a
checkpoint on a disk get the same bits.

Where each weight is kept is not written down for any engine or model.  :func:`trace` lets the model load a
checkpoint that has shapes but no memory, and notes which part of which tensor is copied where.  Each copy is
a :class:`Piece`, and a model whose loading does anything else than copying is refused by the name of the
parameter.

:class:`Weights` perturbs and updates the pieces.  It needs only the engine's tensors, so a bridge to another
engine has to find these alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import DTYPES, check_choice, fail
from ..contract import streams_of
from ..files.safetensors import Checkpoint
from ..functional import Dist, Plan, Rounding, combine, combine_, plan
from .parts import create, write_parts
from .pieces import Piece, Shape, shapes_of, trace, whole

__all__ = ["Piece", "Shape", "Update", "Weights", "create", "shapes_of", "trace", "whole", "write_parts"]


class Update(NamedTuple):
    """theta <- round(decay theta + sum_k c_k z_k), rounded as ``rounding`` says with ``rounding_seed``."""

    seeds: tuple[int, ...]
    coeffs: tuple[float, ...]
    decay: float | None = None
    rounding: Rounding = "nearest"
    rounding_seed: int | None = None

    @property
    def terms(self) -> dict[str, Any]:
        return {"decay": self.decay, "rounding": self.rounding, "rounding_seed": self.rounding_seed}


#: The seeds and coefficients where no noise is added.
NOTHING: tuple[tuple[int, ...], tuple[float, ...]] = ((), ())


class Weights:
    """The weights theta of an engine, of one rank, perturbed and updated by seeds and coefficients.

    theta is the weights themselves.  What the engine computes with is theta + sum_k c_k z_k of the last
    :meth:`perturb`, rounded once, and theta after every other call.

    Args:
        pieces: of :func:`trace`.
        tensors: the engine's tensors by the names of the pieces, contiguous, of fp32, bf16 or fp16.  They are
            changed in place, so that CUDA graphs that hold their addresses go on.
        memory: "master": theta is kept in a second copy.  Each :meth:`perturb` is one pass from the copy to
            the engine's tensors, 4 bytes a weight of bf16, whatever came before, and nothing is rounded away.
            "inplace": there is no second copy.  A perturb moves from the last point to the new one in one
            pass, also 4 bytes a weight, but rounds at each, so that the engine computes with theta plus an
            error (the drift, :meth:`drift`).  :meth:`update` first goes back to theta exactly: it reads the
            checkpoint again and repeats the updates so far.
        dist: of the noise, "normal" or "rademacher".
        base: the checkpoint that the engine has loaded, by name; "inplace" needs it.

    Raises: TypeError or ValueError naming the parameter where a tensor is quantised or its layout is not that
    of the pieces.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        tensors: Mapping[str, Tensor],
        memory: str = "master",
        dist: Dist = "normal",
        base: Checkpoint | Mapping[str, Tensor] | None = None,
    ) -> None:
        check_choice("Weights", "memory", memory, ("master", "inplace"))
        check_choice("Weights", "dist", dist, ("normal", "rademacher"))
        if memory == "inplace" and base is None:
            fail("Weights", "base", "the checkpoint, which memory='inplace' reads again", None)
        self.pieces, self.tensors, self.memory, self.dist, self.base = pieces, tensors, memory, dist, base
        needed: dict[str, int] = {}  # elements of each tensor that have to be there
        for p in pieces:
            needed[p.parameter] = max(needed.get(p.parameter, 0), p.begin + p.numel)
        for name, numel in needed.items():
            _check_tensor(name, tensors.get(name), numel)
        master = memory == "master"
        self._theta = {name: tensors[name].detach().clone() if master else tensors[name] for name in needed}
        stream = dict(zip(names := sorted({p.name for p in pieces}), streams_of(names), strict=True))
        self._buckets: list[tuple[Plan, list[Tensor]]] = []
        for key in dict.fromkeys((tensors[p.parameter].device, tensors[p.parameter].dtype) for p in pieces):
            here = [p for p in pieces if (tensors[p.parameter].device, tensors[p.parameter].dtype) == key]
            theta = plan(
                [p.of(self._theta[p.parameter]) for p in here],
                [stream[p.name] for p in here],
                offsets=[p.offset for p in here],
                rows=[p.row for p in here],
            )
            self._buckets.append((theta, [p.of(tensors[p.parameter].detach()) for p in here]))
        self.at = NOTHING  #: seeds and coefficients of the point where the engine's weights are
        self.history: list[Update] = []  #: the updates since ``base``; kept with memory="inplace"
        self._moved = False  # whether in place weights have been rounded on their way since they were exact
        self._torn = False  # whether some weights may have a part of a move or an update

    def perturb(self, seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        """The engine computes with theta + sum_k coeffs[k] z_k from now on: one pass.  theta stays."""
        if len(seeds) != len(coeffs):
            fail("perturb", "coeffs", f"{len(seeds)} numbers, one for each seed", len(coeffs))
        to = tuple(seeds), tuple(coeffs)
        self._mend()
        if self.memory == "master":
            for theta, live in self._buckets:
                combine(live, theta, list(to[0]), list(to[1]), dist=self.dist)
        elif to != self.at:
            back = [-c for c in self.at[1]]
            self._moved = self._torn = True
            for theta, _ in self._buckets:
                combine_(theta, [*self.at[0], *to[0]], [*back, *to[1]], dist=self.dist)
        self.at, self._torn = to, False

    def restore(self) -> None:
        """The engine computes with theta again: exactly with memory="master", else up to the drift."""
        self.perturb(*NOTHING)

    def update(
        self,
        seeds: Sequence[int],
        coeffs: Sequence[float],
        *,
        decay: float | None = None,
        rounding: Rounding = "stochastic",
        rounding_seed: int | None = None,
    ) -> None:
        """theta <- round(decay theta + sum_k coeffs[k] z_k), in one pass for all k.

        The engine computes with the new theta from then on.

        ``rounding_seed``: by default the first of the seeds, as the optimizers of the package have it.

        The same call on every rank and every engine makes the same weights everywhere, so nothing has to be
        sent from one to the other.
        """
        if len(seeds) != len(coeffs):
            fail("update", "coeffs", f"{len(seeds)} numbers, one for each seed", len(coeffs))
        if rounding_seed is None and seeds:
            rounding_seed = seeds[0]
        if rounding == "stochastic" and rounding_seed is None:
            rounding = "nearest"  # no noise is added, and decay alone may be rounded to nearest
        step = Update(tuple(seeds), tuple(coeffs), decay, rounding, rounding_seed)
        self._mend()
        if self.memory == "inplace":
            self.return_exactly()
        self._moved = self._torn = True
        self._apply(step)
        if self.memory == "inplace":
            self.history.append(step)
        self._moved = self._torn = False
        if self.memory == "master":
            self.restore()

    def _apply(self, step: Update) -> None:
        if step.seeds or step.decay is not None:
            for theta, _ in self._buckets:
                combine_(theta, list(step.seeds), list(step.coeffs), dist=self.dist, **step.terms)

    def return_exactly(self) -> None:
        """The engine computes with theta again, bit for bit, with either memory."""
        if self.memory == "master":
            self._mend()
        if self.memory == "master":
            self.restore()
        elif self._moved:
            self._copy_base()
            for step in self.history:
                self._apply(step)
            self.at, self._moved, self._torn = NOTHING, False, False

    def _mend(self) -> None:
        """Finds theta again where an exception has left a part of a move or an update.

        Raises RuntimeError where there is nothing from which it can be made."""
        if not self._torn:
            return
        if self.memory == "master":
            expected = "weights that no exception has left half updated (load a checkpoint)"
            fail("Weights", "theta", expected, "a part of an update", RuntimeError)
        self.return_exactly()

    def load(self, base: Checkpoint | Mapping[str, Tensor]) -> None:
        """theta becomes the weights of ``base``, from which updates are counted again."""
        self.base, self.history = base, []
        self._copy_base()
        self.at, self._moved, self._torn = NOTHING, False, False
        if self.memory == "master":
            self.restore()

    def _copy_base(self) -> None:
        base = self._base()
        for piece in self.pieces:
            theta = piece.of(self._theta[piece.parameter])
            source = piece.source(base[piece.name])
            theta.view(source.shape).copy_(source)

    def _base(self) -> Mapping[str, Tensor]:
        if self.base is None:
            fail("Weights", "base", "a checkpoint", None)
        base = self.base.tensors() if isinstance(self.base, Checkpoint) else self.base
        for piece in self.pieces:
            found = base.get(piece.name)
            if found is None or tuple(found.shape) != piece.shape:
                got = "none" if found is None else str(tuple(found.shape))
                fail("Weights", f"base: {piece.name}", f"a tensor of shape {piece.shape}", got)
        return base

    def check_base(self) -> None:
        """Raises, naming the parameter, where theta does not have the bits of ``base``.

        This is the proof that :func:`trace` has found every weight, and that the engine has changed none."""
        base = self._base()
        for piece in self.pieces:
            theta = piece.of(self._theta[piece.parameter])
            source = piece.source(base[piece.name])
            if source.dtype is not theta.dtype:
                fail("Weights", piece.name, f"dtype {source.dtype}, as in the checkpoint", theta.dtype)
            bits = lambda t: t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])
            if not torch.equal(bits(theta.view(source.shape)), bits(source.to(theta.device))):
                fail("Weights", piece.parameter, f"the weights of {piece.name} in the checkpoint", "others")

    def drift(self) -> dict[str, float]:
        """How far theta of an "inplace" engine is from the exact one: the share of weights that differ, and
        the root of the mean squared difference.  The engine then computes with the exact theta."""
        if self.memory == "master":
            return {"changed": 0.0, "rms": 0.0}
        self.restore()
        before = [[t.clone() for t in theta.params] for theta, _ in self._buckets]
        self.return_exactly()
        pairs = [(a, b) for old, (theta, _) in zip(before, self._buckets, strict=True)
                 for a, b in zip(old, theta.params, strict=True)]  # fmt: skip
        total = sum(a.numel() for a, _ in pairs)
        summed = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        changed = sum(int((a != b).sum()) for a, b in pairs)
        return {"changed": changed / total, "rms": (summed / total) ** 0.5}

    def parts(self) -> list[tuple[Piece, Tensor]]:
        """The pieces of this rank with their exact weights, on the CPU."""
        self.return_exactly()
        return [(p, p.of(self._theta[p.parameter]).cpu()) for p in self.pieces]


def _check_tensor(name: str, tensor: Tensor | None, numel: int) -> None:
    if tensor is None:
        fail("Weights", name, "a tensor of the engine", "none")
    if tensor.dtype not in DTYPES:
        expected = "weights of fp32, bf16 or fp16 (quantised layers have none)"
        fail("Weights", name, expected, tensor.dtype, TypeError)
    if not tensor.is_contiguous() or tensor.numel() < numel:
        fail("Weights", name, f"a contiguous tensor of at least {numel} elements", tuple(tensor.shape))
