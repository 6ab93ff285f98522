"""Feature reuse: a forward at one moved weight begins at the layer of that weight (DeepZero)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..checks import fail


class Features:
    """The outputs of modules that run one after the other, for the forwards of one step.

    While a weight of module i is moved, the modules before it have the outputs that they have at theta.  The
    first forward that computes them keeps them, and in later ones these modules return what was kept.  The
    losses are those of whole forwards, bit for bit, as long as a forward depends on nothing but weights and
    batch.

    Args:
        modules: in the order in which the forward calls them, each once.  A weight of none of them is moved
            in whole forwards.

    Raises: ValueError in a step, where a module runs twice in a forward or before one that comes before it,
        where the forward draws random numbers, and where an output that was kept has been changed in place.
    """

    def __init__(self, op: str, modules: Sequence[nn.Module]) -> None:
        self.op, self.modules = op, list(modules)
        for i, module in enumerate(self.modules):
            if not isinstance(module, nn.Module):
                fail(op, f"reuse[{i}]", "a module", repr(module), TypeError)
        for i, module in enumerate(self.modules):
            inside = set(module.modules())
            for j, other in enumerate(self.modules):
                if i != j and other in inside:
                    got = f"reuse[{j}], which is in reuse[{i}]"
                    fail(op, "reuse", "modules of which none is in another", got)
        self._kept: dict[int, tuple[Any, list[int]]] = {}

    def clear(self) -> None:
        """Forgets the outputs: the weights or the batch are about to be others."""
        self._kept = {}

    @contextmanager
    def forward(self, moved: Tensor | None) -> Iterator[None]:
        """Inside runs one forward, at which ``moved`` (flat, all elements of a parameter) differs from theta;
        None: nothing does.
        """
        first = self._first(moved)
        calls: list[int] = []
        before = self._random() if first else []
        with ExitStack() as stack:
            for i, module in enumerate(self.modules):
                stack.enter_context(self._watched(i, module, calls, keep=i < first))
            yield
        if before and not all(map(torch.equal, before, self._random())):
            self._fail("a forward without random numbers (eval())", "one that drew some")

    def _random(self) -> list[Tensor]:
        """The states of the generators that a forward draws from."""
        devices = {p.device for module in self.modules for p in module.parameters() if p.is_cuda}
        return [torch.random.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    def _first(self, moved: Tensor | None) -> int:
        """The number of the first module that has ``moved``."""
        if moved is None:
            return len(self.modules)
        address = moved.data_ptr()
        for i, module in enumerate(self.modules):
            if any(p.data_ptr() == address for p in module.parameters()):
                return i
        return 0

    @contextmanager
    def _watched(self, i: int, module: nn.Module, calls: list[int], *, keep: bool) -> Iterator[None]:
        own = module.__dict__.get("forward")
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if calls and calls[-1] >= i:
                got = f"reuse[{i}] after reuse[{calls[-1]}]"
                self._fail("modules in the order in which a forward calls them, each once", got)
            calls.append(i)
            if not keep:
                return forward(*args, **kwargs)
            if i not in self._kept:
                out = forward(*args, **kwargs)
                self._kept[i] = out, self._versions(out)
                return out
            out, versions = self._kept[i]
            if versions != self._versions(out):
                self._fail("outputs that no later module changes in place", f"those of reuse[{i}]")
            return out

        module.forward = run
        try:
            yield
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own

    def _versions(self, out: Any) -> list[int]:
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        return [-1 if t.is_inference() else t._version for t in tensors]

    def _fail(self, expected: str, got: str) -> None:
        self.clear()
        fail(self.op, "reuse", expected, got)
