"""Scheduler service: its core on the bus, and a thread for policies that take their time. Nothing
is decided here."""

import asyncio
import threading
from contextlib import suppress

import msgspec

from services.scheduler.config import SchedulerConfig
from services.scheduler.core import QUERIES, Scheduler, inputs
from services.scheduler.policies.interface import Policy, Problem
from services.scheduler.policies.registry import make_policy
from services.scheduler.solving import Solved, solve
from shared.clock import Clock
from shared.runtime import Job, Wiring
from shared.service import ServiceContext, run


async def serve(config: SchedulerConfig, context: ServiceContext) -> None:
    policy = make_policy(config.checked_for(context.mesh.model_ids))
    wiring = Wiring(
        inputs=inputs(config.policy),
        queries=QUERIES,
        jobs={"solve": solver(policy, context.clock)},
        inbox_max=config.inbox_max,
    )
    await run(Scheduler(config, context.mesh, policy), wiring, context)


def solver(policy: Policy, clock: Clock) -> Job:
    """The job ``solve``. The core starts one at a time, so the policy's memory needs no lock. Its
    thread is a daemon: a process told to end does not wait for a plan that nobody will hear."""

    async def job(problem: Problem) -> Solved:
        loop, outcome = asyncio.get_running_loop(), asyncio.Queue[Solved](1)
        started_s = clock.now_s()

        def work() -> None:
            solved = solve(policy, problem)
            with suppress(RuntimeError):  # the loop has closed meanwhile
                loop.call_soon_threadsafe(outcome.put_nowait, solved)

        threading.Thread(target=work, name="solve", daemon=True).start()
        solved = await outcome.get()
        return msgspec.structs.replace(solved, took_s=clock.now_s() - started_s)

    return job
