"""One zeroth-order step: forwards at perturbed weights, an estimate from their losses, an update.

``step.py`` runs it.  Each of its parts has a file or a folder: where the closure runs (``estimators.py``),
what z is (``directions``), which parameters take part (``subset.py``), how the closure sees perturbed weights
(``probes``), and what is done with the estimate (``rules``).  Nothing here knows of logs, processes or
streamed weights: a step meets them as the roles of ``roles.py``.  Users import the public parts from
:mod:`zokernels.optim`.
"""
