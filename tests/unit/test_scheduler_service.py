"""The job that runs a slow policy beside the scheduler's event loop, and the policies by name."""

import asyncio
import threading
from typing import get_args

import pytest

from services.scheduler.config import PolicyName, SchedulerConfig
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.registry import POLICIES, make_policy
from services.scheduler.service import solver
from services.scheduler.solving import Solved
from shared.clock import SystemClock
from shared.errors import ConfigInvalid
from shared.slo import SloTarget
from tests.unit.scheduler_cluster import demand, offers, problem


class Patient:
    """A policy that answers when it is let."""

    period_s = 1.0
    slow = True

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.threads: list[str] = []

    def plan(self, problem: Problem) -> Planned:
        self.threads.append(threading.current_thread().name)
        assert self.may_end.wait(10.0)
        return Planned(plan=None, reason=f"{len(problem.offers)} GPUs")


async def test_a_solve_leaves_the_event_loop_alone() -> None:
    """Otherwise a search of seconds would make the scheduler look dead."""
    policy = Patient()
    work = solver(policy, SystemClock())(problem(demand("m"), on=offers(3)))
    assert asyncio.iscoroutine(work)
    task = asyncio.create_task(work)
    while not policy.threads:
        await asyncio.sleep(0.001)
    assert not task.done()
    policy.may_end.set()
    solved = await task
    assert isinstance(solved, Solved)
    assert solved.planned == Planned(plan=None, reason="3 GPUs")
    assert (solved.based_on_epoch, policy.threads) == (1, ["solve"])
    assert solved.took_s > 0.0


async def test_what_a_policy_raises_comes_back_as_its_reason() -> None:
    """Otherwise an error in a thread would be lost, and the core wait for ever."""

    class Broken(Patient):
        def plan(self, problem: Problem) -> Planned:
            raise ValueError(f"epoch {problem.epoch}")

    work = solver(Broken(), SystemClock())(problem(demand("m"), on=offers(1)))
    assert asyncio.iscoroutine(work)
    solved = await work
    assert isinstance(solved, Solved)
    assert solved.failure.startswith("ValueError: epoch 1 at plan:")


def test_every_policy_that_can_be_configured_can_be_made() -> None:
    """Otherwise a name would pass the checks and crash the scheduler at its start."""
    assert set(POLICIES) == set(get_args(PolicyName))
    periods = {name: make_policy(SchedulerConfig(policy=name)).period_s for name in POLICIES}
    assert periods["static"] == 0.0
    assert (periods["uniform"], periods["dynamo"]) == (60.0, 5.0)
    assert all(period_s > 0.0 for name, period_s in periods.items() if name != "static")


def test_the_period_of_a_policy_can_be_set() -> None:
    """Otherwise nobody could see what deciding more or less often would change."""
    config = SchedulerConfig(policy="uniform", policy_period_s=7.0)
    assert make_policy(config).period_s == 7.0
    config = SchedulerConfig(policy="dynamo", policy_period_s=7.0)
    assert make_policy(config).period_s == 5.0, "its slower loop is what is set"


def test_policy_settings_that_cannot_work_are_refused() -> None:
    """Otherwise a shape nobody can read, or a target of no time, would fail at the first plan."""
    with pytest.raises(ConfigInvalid, match="parallelism"):
        SchedulerConfig(dynamo_shape="four").checked()
    with pytest.raises(ConfigInvalid, match=r"scheduler\.targets\.m"):
        SchedulerConfig(targets={"m": SloTarget(ttft_s=0.0, tpot_s=0.1)}).checked()
    with pytest.raises(ConfigInvalid, match="solve_timeout_s"):
        SchedulerConfig(solve_timeout_s=0.0).checked()
    with pytest.raises(ConfigInvalid, match="policy_period_s"):
        SchedulerConfig(policy_period_s=-1.0).checked()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SchedulerConfig(replicas_min={"m": -1}), r"replicas_min\.m"),
        (SchedulerConfig(replicas_min={"n": 1}), "replicas_min = 'n'"),
        (SchedulerConfig(targets={"n": SloTarget(ttft_s=1.0, tpot_s=0.1)}), "targets = 'n'"),
        (SchedulerConfig(survive=2), "survive"),
        (SchedulerConfig(gpu_prices={"h100": 0.0}), r"gpu_prices\.h100"),
        (SchedulerConfig(gpu_prices={"h100": float("nan")}), r"gpu_prices\.h100"),
        (SchedulerConfig(class_targets={"gold": SloTarget(ttft_s=1.0, tpot_s=0.1)}), "gold"),
        (SchedulerConfig(class_targets={"standard": SloTarget(ttft_s=1.0, tpot_s=0.1)}), "target"),
        (SchedulerConfig(class_targets={"batch": SloTarget(ttft_s=0.0, tpot_s=0.1)}), "batch"),
        (SchedulerConfig(correction_period_s=-1.0), "correction_period_s"),
        (SchedulerConfig(forecast_stale_s=-1.0), "forecast_stale_s"),
        (SchedulerConfig(keep_period_s=-1.0), "keep_period_s"),
    ],
)
def test_needs_that_cannot_be_met_are_refused_at_start(config: SchedulerConfig, field: str) -> None:
    """Otherwise a slip of the pen would be found by a plan that lacks a model."""
    with pytest.raises(ConfigInvalid, match=field):
        config.checked_for(("m",))
    SchedulerConfig(replicas_min={"m": 0}, survive=1).checked_for(("m",))
