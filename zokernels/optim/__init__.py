"""Optimizers on the noise contract, which hold a seed and a step counter instead of a state of each weight.

An optimizer has an estimator (where the closure runs), a direction (what z is), a subset (which parameters
take part) and an update rule.  The named classes put them together.
"""

from ..step.directions.direction import Direction
from ..step.directions.low_rank import FreshFactors, KeptLeft, KeptRight, Subspace, TemporalFactor
from ..step.directions.masks import GivenMask, MagnitudeMask, RandomMask
from ..step.directions.scaling import Sphere, TensorScale
from ..step.directions.summed import Cone
from ..step.estimators import (
    Bayesian,
    ForwardMode,
    Guided,
    OneSided,
    Population,
    Ranking,
    ScaledPopulation,
    SignOfDifference,
    StdNormalized,
    ThreePoint,
    TwoSided,
)
from ..step.rules.cone import ConeMomentum
from ..step.rules.factors import FactorMomentum, Orthogonal
from ..step.rules.rule import Rule
from ..step.rules.sgd import SGD, Conservative, Floored
from ..step.rules.stateful import Adam, AMSGrad, Curvature, Momentum, Sign
from ..step.rules.window import AdamWindow, MomentumWindow
from ..step.subset import Blocks, LayerSkip
from .adaptive import HiZOO, ZOAdam, ZOAdamW, ZOSignSGD
from .cge import ZOCGE
from .informed import ConMeZO
from .methods import (
    EGGROLL,
    ES,
    FZOO,
    LOZO,
    QZO,
    ZOBCD,
    ForwardGradient,
    LeZO,
    MeZOGV,
    SparseMeZO,
    SubZero,
    TeZO,
    ZOConservative,
    ZORankSGD,
)
from .optimizer import ZerothOrder
from .param_groups import decay_groups
from .quzo import QuZO
from .zosgd import ZOSGD

__all__ = [
    "EGGROLL", "ES", "FZOO", "LOZO", "QZO", "SGD", "ZOBCD", "ZOCGE", "ZOSGD", "AMSGrad", "Adam",
    "AdamWindow", "Bayesian", "Blocks", "ConMeZO", "Cone", "ConeMomentum", "Conservative", "Curvature", "Direction", "FactorMomentum",
    "Floored", "ForwardGradient", "ForwardMode", "FreshFactors", "GivenMask", "Guided", "HiZOO", "KeptLeft",
    "KeptRight", "LayerSkip", "LeZO", "MagnitudeMask", "MeZOGV", "Momentum", "MomentumWindow", "OneSided",
    "Orthogonal", "Population", "QuZO", "RandomMask", "Ranking", "Rule", "ScaledPopulation", "Sign",
    "SignOfDifference", "SparseMeZO", "Sphere", "StdNormalized", "SubZero", "Subspace", "TeZO",
    "TemporalFactor", "TensorScale", "ThreePoint", "TwoSided", "ZOAdam", "ZOAdamW", "ZOConservative",
    "ZORankSGD", "ZOSignSGD", "ZerothOrder", "decay_groups",
]  # fmt: skip
