"""The probe of perturbed products: the weights stay, no perturbed weight is made, and one forward may serve
many members.

With z = A B^T of low rank, x (W + c z)^T is x W^T + c (x B) A^T.  While forwards run, every parameter is
guarded (``guard.py``).  A product with one is computed as it is, by whichever library torch calls, and
:func:`zokernels.low_rank_linear_` adds what the perturbation of each row's member makes of it.  Factors are
drawn when a product needs them, for all members of a cohort, and are gone after it.
"""

from .forward import neighbours
from .kept import Learned
from .probe import ProductProbe

__all__ = ["Learned", "ProductProbe", "neighbours"]
