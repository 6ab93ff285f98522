"""Optimizers on the noise contract, which hold a seed and a step counter instead of a state of each weight.

An optimizer has an estimator (where the closure runs), a direction (what z is), a subset (which parameters
take part) and an update rule.  The named classes put them together.
"""

from ..step.directions.direction import Direction
from ..step.directions.low_rank import FreshFactors, KeptRight, Subspace, TemporalFactor
from ..step.directions.masks import GivenMask, MagnitudeMask, RandomMask
from ..step.directions.scaling import Sphere, TensorScale
from ..step.estimators import ForwardMode, OneSided, Ranking, StdNormalized, ThreePoint, TwoSided
from ..step.rules.rule import Rule
from ..step.rules.sgd import SGD, Conservative
from ..step.rules.stateful import Adam, Curvature, Momentum, Sign
from ..step.rules.window import AdamWindow, MomentumWindow
from ..step.subset import Blocks, LayerSkip
from .adaptive import HiZOO, ZOAdam, ZOAdamW, ZOSignSGD
from .cge import ZOCGE
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
from .zosgd import ZOSGD

__all__ = [
    "EGGROLL", "FZOO", "LOZO", "SGD", "ZOBCD", "ZOCGE", "ZOSGD", "Adam", "AdamWindow", "Blocks",
    "Conservative", "Curvature", "Direction", "ForwardGradient", "ForwardMode", "FreshFactors",
    "GivenMask", "HiZOO", "KeptRight", "LayerSkip", "LeZO", "MagnitudeMask", "Momentum", "MomentumWindow",
    "OneSided", "QuZO", "RandomMask", "Ranking", "Rule", "Sign", "SparseMeZO", "Sphere", "StdNormalized",
    "SubZero", "Subspace", "TeZO", "TemporalFactor", "TensorScale", "ThreePoint", "TwoSided", "ZOAdam",
    "ZOAdamW", "ZOConservative", "ZORankSGD", "ZOSignSGD", "ZerothOrder",
]  # fmt: skip
