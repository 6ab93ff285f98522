"""An update that an exception has cut short: what is known of it, and how it is finished.

Signals are held back while weights are written.  But another thread can inject an exception
(``PyThreadState_SetAsyncExc``) after any call, and a kernel can fail in the second of two buckets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.journal import PART, journal
from .noise import Noise
from .probes.probe import Probe
from .roles import home_of
from .rules.rule import Rule
from .types import Bucket, Estimate


class Update:
    """The update of one step, which knows how far it has come.

    A bucket's update is one call of a kernel, for most rules and directions.  A compiled one has run or not;
    of one in Python a part may have.

    ``optimizer``: the StepOptimizer.
    """

    def __init__(self, optimizer: Any, probe: Probe, estimate: Estimate) -> None:
        self.optimizer, self.probe, self.estimate = optimizer, probe, estimate
        state = optimizer.run_state
        self._before = None if state.capturable else (state.step, state.skipped)
        self._renews = type(optimizer.rule).begin is not Rule.begin  # what is kept, by several calls
        self._begun = False
        self._done = 0  # buckets that have their update
        self._calls = 0  # of kernels, for the bucket whose turn it is, and of which the last may be a part

    def run(self) -> None:
        """Runs the update, or what is left of it."""
        optimizer, probe, estimate = self.optimizer, self.probe, self.estimate
        if not self._begun:
            self._begun = not self._renews
            optimizer.rule.begin(optimizer, probe, estimate)
            self._begun = True
        with optimizer.passes.ahead(probe, optimizer.run_state) as ends:
            outer = journal.calls
            calls = journal.calls = [] if outer is None else outer
            try:
                for i, bucket in enumerate(probe.buckets):
                    if i >= self._done:
                        before, (moved, at) = len(calls), ends[i]
                        try:
                            self._update(bucket, estimate.gradients[i])
                        except BaseException:
                            self._calls = len(calls) - before
                            if self._calls and self._is_one_call(bucket) and calls[-1] is not PART:
                                bucket.at, moved.at, self._done, self._calls = {}, at, i + 1, 0
                            raise
                        bucket.at, moved.at, self._done = {}, at, i + 1
            finally:
                journal.calls = outer
            torch.clear_autocast_cache()  # casts of the old weights, where step() runs inside autocast
            if self._before is not None:
                optimizer.run_state.step, optimizer.run_state.skipped = self._before
            optimizer.run_state.advance(estimate.finite)

    def _update(self, bucket: Bucket, g: Tensor) -> None:
        optimizer, estimate = self.optimizer, self.estimate
        if bucket.at or bucket.ahead is not None or not estimate.skip:
            g = g if estimate.multiple is None else estimate.multiple * g
            optimizer.rule.update(optimizer, bucket, self.probe.seeds[bucket.device], g, estimate.finite)

    def _is_one_call(self, bucket: Bucket) -> bool:
        return self.optimizer.rule.through_noise and type(bucket.noise) is Noise

    @property
    def has_happened(self) -> bool:
        """Whether the step counts already."""
        return self._before is not None and self.optimizer.run_state.step != self._before[0]

    @property
    def is_untouched(self) -> bool:
        """Whether nothing has changed yet."""
        return not (self._done or self._calls or self._renews or self._before is None)

    @property
    def can_go_on(self) -> bool:
        """Whether it is known what is left to do."""
        in_memory = all(home_of(b.params[0]).in_memory for b in self.probe.buckets)
        return self._begun and not self._calls and self._before is not None and in_memory
