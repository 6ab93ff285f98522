"""Optimizers on the noise contract: they hold a seed and a step counter instead of per-weight state.

An optimizer is an estimator (where the closure runs), a direction (what z is), a subset (which parameters take part)
and an update rule; the named classes put them together.
"""

from .adaptive import HiZOO, ZOAdam, ZOAdamW, ZOSignSGD
from .cge import ZOCGE
from .low_rank import FreshFactors, KeptRight, Subspace, TemporalFactor
from .masks import GivenMask, MagnitudeMask, RandomMask
from .methods import (
    EGGROLL,
    FZOO,
    LOZO,
    ZOBCD,
    ForwardGradient,
    LeZO,
    SparseMeZO,
    SubZero,
    TeZO,
    ZOConservative,
    ZORankSGD,
)
from .optimizer import ZerothOrder
from .quzo import QuZO
from .scaling import Sphere, TensorScale
from .subset import Blocks, LayerSkip
from .zosgd import ZOSGD

__all__ = [
    "EGGROLL",
    "FZOO",
    "LOZO",
    "ZOBCD",
    "ZOCGE",
    "ZOSGD",
    "Blocks",
    "ForwardGradient",
    "FreshFactors",
    "GivenMask",
    "HiZOO",
    "KeptRight",
    "LayerSkip",
    "LeZO",
    "MagnitudeMask",
    "QuZO",
    "RandomMask",
    "SparseMeZO",
    "Sphere",
    "SubZero",
    "Subspace",
    "TeZO",
    "TemporalFactor",
    "TensorScale",
    "ZOAdam",
    "ZOAdamW",
    "ZOConservative",
    "ZORankSGD",
    "ZOSignSGD",
    "ZerothOrder",
]
