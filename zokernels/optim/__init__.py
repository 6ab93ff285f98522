"""Optimizers on the noise contract, which hold a seed and a step counter instead of a state of each weight.

An optimizer has an estimator (where the closure runs), a direction (what z is), a subset (which parameters
take part) and an update rule.  The named classes put them together.
"""

from ..step.candidates import Consensus, RankingRounds
from ..step.cohort import Cohort
from ..step.directions.covariance import RankOneCovariance
from ..step.directions.direction import Direction
from ..step.directions.integers import RoundedSteps
from ..step.directions.low_rank import FreshFactors, KeptLeft, KeptRight, Subspace, TemporalFactor
from ..step.directions.masks import GivenMask, MagnitudeMask, RandomMask
from ..step.directions.sampled import SampledTensors
from ..step.directions.scaling import Sphere, TensorScale
from ..step.directions.spaces import ActivationSpace, GradientSpace
from ..step.directions.summed import Cone
from ..step.estimators import (
    Bayesian,
    ForwardMode,
    Guided,
    LeaveOneOut,
    OneSided,
    Population,
    ProjectedDifference,
    Ranking,
    ScaledPopulation,
    SignOfDifference,
    StdNormalized,
    ThreePoint,
    TwoSided,
)
from ..step.rules.cone import ConeMomentum
from ..step.rules.covariance import CovarianceDescent
from ..step.rules.factors import FactorAdam, FactorMomentum, Orthogonal
from ..step.rules.feedback import ErrorFeedback, ErrorWindow
from ..step.rules.rule import Rule
from ..step.rules.sampled import Sensitivity
from ..step.rules.sgd import SGD, Conservative, Floored, Recalling
from ..step.rules.spaces import Projected
from ..step.rules.stateful import Adam, AMSGrad, Curvature, Momentum, Sign
from ..step.rules.window import AdamWindow, MomentumWindow
from ..step.subset import Blocks, LayerSkip
from .adaptive import HiZOO, ZOAdam, ZOAdamW, ZOSignSGD
from .candidates import ConsensusHopping, ZORankSearch
from .cge import ZOCGE
from .diagnosis import Diagnosis
from .informed import AGZO, LOREN, PGAP, ConMeZO, CurvZO
from .methods import FZOO, QZO, ForwardGradient, MeZOGV, ZOConservative, ZORankSGD
from .narrowed import LOZO, ZOBCD, LeZO, SparseMeZO, SubZero, TeZO
from .optimizer import ZerothOrder
from .param_groups import decay_groups, groups_without
from .pruning import grasp_shares
from .quzo import QES, QuZO
from .strategies import EGGROLL, ES
from .sweep import Sweep, find_lr
from .zosgd import ZOSGD

__all__ = [
    "AGZO", "EGGROLL", "ES", "FZOO", "LOREN", "LOZO", "PGAP", "QES", "QZO", "SGD", "ZOBCD", "ZOCGE", "ZOSGD",
    "AMSGrad", "ActivationSpace", "Adam", "AdamWindow", "Bayesian", "Blocks", "Cohort", "ConMeZO", "Cone",
    "ConeMomentum", "Consensus", "ConsensusHopping", "Conservative", "CovarianceDescent", "CurvZO",
    "Curvature", "Diagnosis", "Direction", "ErrorFeedback", "ErrorWindow", "FactorAdam", "FactorMomentum",
    "Floored", "ForwardGradient", "ForwardMode", "FreshFactors", "GivenMask", "GradientSpace", "Guided",
    "HiZOO", "KeptLeft", "KeptRight", "LayerSkip", "LeZO", "LeaveOneOut", "MagnitudeMask", "MeZOGV",
    "Momentum", "MomentumWindow", "OneSided", "Orthogonal", "Population", "Projected", "ProjectedDifference",
    "QuZO", "RandomMask", "RankOneCovariance", "Ranking", "RankingRounds", "Recalling", "RoundedSteps",
    "Rule", "SampledTensors", "ScaledPopulation", "Sensitivity", "Sign", "SignOfDifference", "SparseMeZO",
    "Sphere", "StdNormalized", "SubZero", "Subspace", "Sweep", "TeZO", "TemporalFactor", "TensorScale",
    "ThreePoint", "TwoSided", "ZOAdam", "ZOAdamW", "ZOConservative", "ZORankSGD", "ZORankSearch", "ZOSignSGD",
    "ZerothOrder", "decay_groups", "find_lr", "grasp_shares", "groups_without",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
