"""Keeps standard output for the answer, whatever libraries print."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

STDOUT, STDERR = 1, 2


@contextmanager
def reserved_stdout() -> Generator[None]:
    """Meanwhile whatever this process and its children print goes to standard error. HiGHS prints
    from C++ on a few odd instances, past Python's ``sys.stdout``, and would spoil a JSON."""
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    try:
        os.dup2(STDERR, STDOUT)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, STDOUT)
        os.close(kept)
