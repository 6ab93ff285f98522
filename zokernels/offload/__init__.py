"""Weights that live in host memory or on disk, and come to the device block by block (docs/offload.md)."""

from .blocks import empty_weights
from .engine import Engine
from .footprint import footprint
from .rewind import rewind
from .stored import StoredModel
from .stream import stream
from .timeline import Span, plot

__all__ = ["Engine", "Span", "StoredModel", "empty_weights", "footprint", "plot", "rewind", "stream"]


def __dir__() -> list[str]:
    return sorted(__all__)
