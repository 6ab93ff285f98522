"""A run as its base weights and a log: a header, and for each step a seed's number, its coefficients and lr.

``ZOSGD(..., trajectory="run.zk")`` or :func:`record` writes one, :func:`replay_` makes the run's weights of it,
``resume=True`` goes on with it.  docs/trajectory.md has the format.
"""

from .format import Log, Record, read
from .recorder import Follower, Recorder, record
from .replay import replay_

__all__ = ["Follower", "Log", "Record", "Recorder", "read", "record", "replay_"]
