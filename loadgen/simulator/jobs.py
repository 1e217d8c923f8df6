"""Slow work in virtual time: it is done at once, and its outcome comes when it would have."""

import time
from collections.abc import Callable
from typing import Any

import msgspec

from loadgen.simulator.process import Job, Port
from services.scheduler.solving import Solved
from services.switcher.events import TransferPlanned


def slow_job(
    work: Callable[[Any], Solved | TransferPlanned], port: Port, *, took_s: float | None
) -> Job:
    """``took_s`` virtual seconds later, or as many as it takes this machine now."""

    def perform(argument: Any) -> None:  # noqa: ANN401  # the job's own type
        began_s = time.thread_time()  # what others do on this machine is none of its time
        outcome = work(argument)
        measured_s = time.thread_time() - began_s
        delay_s = measured_s if took_s is None else took_s
        port.feed(msgspec.structs.replace(outcome, took_s=delay_s), delay_s=delay_s)

    return perform
