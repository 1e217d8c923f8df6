"""Does a measured profile tell what the engine does? ``python -m loadgen.bench.bench_torch_fidelity``.

Sweeps the torch engine on a made checkpoint, then runs the same Poisson arrivals through that
engine in real time and through the modelled engine with the measured profile in virtual time, and
prints mean and p99 of TTFT, TPOT and E2E of both. Both are driven by one loop. Times in which the
thread waited for a CPU that others had are taken off the real run, as they are in the sweep.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from deploy.measure import run_measure
