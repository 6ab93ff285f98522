"""Evolution strategies for language models in inference engines, with a run that is a log.

A generation perturbs the weights once for each member of a population, lets an engine answer the same prompts
with each, turns the answers into rewards, and moves the weights along the members' noise:

    theta <- round((1 - lr * weight_decay) theta - lr sum_k g_k z_k)

g comes from the rewards by an :class:`~zokernels.step.estimators.Estimator` (z-scores, ranks, antithetic
pairs: :class:`Population`), as in an optimizer's step.  Each generation is a step of the log
(docs/trajectory.md), written before the update.  So ``zokernels replay`` makes the trained weights of the
base checkpoint and the log, bit for bit what every engine holds, and a run that was killed goes on from its
log with any number of engines.
"""

from .engines import Actors, Engine, Here
from .rewards import Reward, rewards_of
from .run import Run, Settings
from .training import Generation, texts_of, train

__all__ = [
    "Actors",
    "Engine",
    "Generation",
    "Here",
    "Reward",
    "Run",
    "Settings",
    "rewards_of",
    "texts_of",
    "train",
]
