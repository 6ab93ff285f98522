"""``python -m zokernels``: what is built and what is present; with a command, the tools of a recorded run."""

from .cli import main

raise SystemExit(main())
