"""Optimizers on the noise contract: they hold a seed and a step counter instead of per-weight state."""

from .optimizer import ZerothOrder
from .zosgd import ZOSGD

__all__ = ["ZOSGD", "ZerothOrder"]
