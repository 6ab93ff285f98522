"""Several processes on one run: each evaluates its share of a step's losses, and all take the same update.

``ZOSGD(..., mesh=mesh)`` with a ``torch.distributed.DeviceMesh`` is all that a script needs
(docs/distributed.md).
"""

from .agreement import RanksDiffer
from .asynchronous import AsyncExchange
from .exchange import Exchange, mean_of

__all__ = ["AsyncExchange", "Exchange", "RanksDiffer", "mean_of"]


def __dir__() -> list[str]:
    return sorted(__all__)
