"""One set-up of logging for every process: a line a fact, to stderr, never a word of a prompt."""

from __future__ import annotations

import logging
import sys


def setup_logging(process: str, level: str = "INFO") -> None:
    """Log to stderr as `time process level message`; third parties from WARNING up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s"))
    logging._srcfile = None  # nobody prints where a line came from: don't walk the stack for it
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("springtide").setLevel(level)
