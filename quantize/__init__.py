"""Step-3.5 and Step-3.7 checkpoints to NVFP4, streamed: `run(source, target)` is the command line's twin."""

from .convert import Summary, run
from .plan import Settings, UsageError

__all__ = ["Settings", "Summary", "UsageError", "run"]
