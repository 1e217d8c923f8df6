"""One decision of a policy, whatever becomes of it. Used by the core, by the job that runs a slow
policy in a thread, and by the simulator in that job's place."""

from collections.abc import Callable
from dataclasses import replace

import msgspec

from services.scheduler.policies.interface import Planned, Policy, Problem
from shared.messages.base import Message


class Solved(Message, frozen=True, kw_only=True):
    """Outcome of a solve: ``planned``, or None and the ``failure`` in words."""

    based_on_epoch: int
    took_s: float = 0.0
    planned: Planned | None = None
    failure: str = ""


def solve(policy: Policy, problem: Problem) -> Solved:
    """What the job ``solve`` does with the policy."""
    return attempt(policy.plan, problem)


def attempt(plan: Callable[[Problem], Planned], problem: Problem) -> Solved:
    """The policy's answer, or what it raised. A policy that fails must cost a plan, not the
    service: the plan in force goes on serving meanwhile."""
    try:
        planned = plan(problem)
    except Exception as error:  # noqa: BLE001  # whatever it is: named in the log and the reason
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" at {trace.tb_frame.f_code.co_name}:{trace.tb_lineno}" if trace else ""
        failure = f"{type(error).__name__}: {error}{where}"
        return Solved(based_on_epoch=problem.epoch, failure=failure)
    return Solved(based_on_epoch=problem.epoch, planned=planned)


def timed(solved: Solved) -> Planned | None:
    """The answer, told how long it took: policies read no clock."""
    planned = solved.planned
    if planned is None or planned.decision is None or solved.took_s <= 0.0:
        return planned
    told = msgspec.structs.replace(planned.decision, solve_s=solved.took_s)
    return replace(planned, decision=told)
