"""``python -m zokernels``: what is built and what is present."""

from .report import report

print(report())
