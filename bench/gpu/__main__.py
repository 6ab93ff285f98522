"""The process of one stage: ``python -m bench.gpu NAME CONTEXT PARENT``.  Its end is written to
``<scratch>/NAME.outcome``.
"""

from __future__ import annotations

import json
import sys

from .plan import STAGES
from .stage import Context, end_with, execute, replace

if __name__ == "__main__":
    end_with(parent=int(sys.argv[3]))
    name, ctx = sys.argv[1], Context.loads(sys.argv[2])
    outcome = execute(next(s for s in STAGES if s.name == name), ctx)
    replace(ctx.scratch / f"{name}.outcome", json.dumps(outcome))
