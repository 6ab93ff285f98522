"""Optimizers on the noise contract: they hold a seed and a step counter instead of per-weight state."""

from .methods import FZOO, ForwardGradient, ZOConservative, ZORankSGD
from .optimizer import ZerothOrder
from .zosgd import ZOSGD

__all__ = ["FZOO", "ZOSGD", "ForwardGradient", "ZOConservative", "ZORankSGD", "ZerothOrder"]
