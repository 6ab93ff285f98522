"""A run as its base weights and a log, which holds the coefficients and the learning rates of each step.

``ZOSGD(..., trajectory="run.zk")`` or :func:`record` writes a log, :func:`replay_` makes the run's weights
from it, and ``resume=True`` goes on with it.  docs/trajectory.md describes the format.
"""

from .format import Log, Record, read
from .recorder import Follower, Recorder
from .recording import record
from .replay import replay_

__all__ = ["Follower", "Log", "Record", "Recorder", "read", "record", "replay_"]


def __dir__() -> list[str]:
    return sorted(__all__)
