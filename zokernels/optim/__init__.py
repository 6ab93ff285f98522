"""Optimizers on the noise contract: they hold a seed and a step counter instead of per-weight state.

An optimizer is an estimator (where the closure runs), a direction (what z is), a subset (which parameters take part)
and an update rule; the named classes put them together.
"""

from .adaptive import HiZOO, ZOAdam, ZOAdamW, ZOSignSGD
from .cge import ZOCGE
from .direction import Direction
from .estimators import ForwardMode, OneSided, Ranking, StdNormalized, ThreePoint, TwoSided
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
from .rules import SGD, Conservative, Rule
from .scaling import Sphere, TensorScale
from .stateful import Adam, Curvature, Momentum, Sign
from .subset import Blocks, LayerSkip
from .window import AdamWindow, MomentumWindow
from .zosgd import ZOSGD

__all__ = [
    "EGGROLL",
    "FZOO",
    "LOZO",
    "SGD",
    "ZOBCD",
    "ZOCGE",
    "ZOSGD",
    "Adam",
    "AdamWindow",
    "Blocks",
    "Conservative",
    "Curvature",
    "Direction",
    "ForwardGradient",
    "ForwardMode",
    "FreshFactors",
    "GivenMask",
    "HiZOO",
    "KeptRight",
    "LayerSkip",
    "LeZO",
    "MagnitudeMask",
    "Momentum",
    "MomentumWindow",
    "OneSided",
    "QuZO",
    "RandomMask",
    "Ranking",
    "Rule",
    "Sign",
    "SparseMeZO",
    "Sphere",
    "StdNormalized",
    "SubZero",
    "Subspace",
    "TeZO",
    "TemporalFactor",
    "TensorScale",
    "ThreePoint",
    "TwoSided",
    "ZOAdam",
    "ZOAdamW",
    "ZOConservative",
    "ZORankSGD",
    "ZOSignSGD",
    "ZerothOrder",
]
