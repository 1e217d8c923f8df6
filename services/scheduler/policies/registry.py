"""The policies by name: what ``scheduler.policy`` may be.

Those that solve programs load scipy, most of a second, only when they are asked for.
"""

from collections.abc import Callable, Mapping

from services.scheduler.config import PolicyName, SchedulerConfig
from services.scheduler.policies.dynamo import Dynamo
from services.scheduler.policies.interface import Planned, Policy, Problem, StagedPolicy
from services.scheduler.policies.starting import Starting
from services.scheduler.policies.uniform import Uniform
from services.scheduler.static_policy import Static


def _melange(_: SchedulerConfig) -> Policy:
    from services.scheduler.policies.melange import Melange  # noqa: PLC0415  # loads scipy

    return Melange()


def _exhaustive(_: SchedulerConfig) -> Policy:
    from services.scheduler.policies.exhaustive_policy import (  # noqa: PLC0415  # loads scipy
        Exhaustive,
    )

    return Exhaustive()


def _oserve_paper(_: SchedulerConfig) -> Policy:
    from services.scheduler.policies.oserve_paper_policy import (  # noqa: PLC0415  # loads scipy
        OServePaper,
    )

    return OServePaper()


def _oserve(config: SchedulerConfig) -> Policy:
    from services.scheduler.policies.joint_policy import OServe  # noqa: PLC0415  # loads scipy

    return OServe(switch_s=config.switch_s or None)


POLICIES: Mapping[PolicyName, Callable[[SchedulerConfig], Policy]] = {
    "static": lambda _: Static(),
    "uniform": lambda _: Uniform(),
    "dynamo": Dynamo.of,
    "melange": _melange,
    "exhaustive": _exhaustive,
    "oserve-paper": _oserve_paper,
    "oserve": _oserve,
}


class Staged:
    """A policy that plans for what is expected, and ``Starting`` until anything is."""

    def __init__(self, policy: Policy, *, period_s: float) -> None:
        self.period_s = period_s
        self._policy, self._starting = policy, Starting()

    @property
    def slow(self) -> bool:
        return self._policy.slow

    def plan(self, problem: Problem) -> Planned:
        return self._policy.plan(problem)

    def start(self, problem: Problem) -> Planned:
        return self._starting.plan(problem)


def make_policy(config: SchedulerConfig) -> StagedPolicy:
    """The policy that ``config`` names, with a memory of its own."""
    if config.policy == "static":
        return Static()
    policy = POLICIES[config.policy](config)
    if config.policy == "dynamo":  # the period set is that of its slower loop
        return Staged(policy, period_s=policy.period_s)
    return Staged(policy, period_s=config.policy_period_s or policy.period_s)
