"""From a policy's answer to what the scheduler asks for: every plan is verified, and corrected by
what replicas bear now; or it is said why nothing moves."""

import dataclasses
from collections.abc import Callable, Iterable

from services.scheduler.balance import Balance
from services.scheduler.config import SchedulerConfig
from services.scheduler.correction import Weights
from services.scheduler.correction_size import largest_move
from services.scheduler.demands import Demands
from services.scheduler.events import CORRECTING
from services.scheduler.fleet import Fleet
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.verify import shortages, verify
from services.scheduler.standing import Standing
from services.scheduler.wish import Wish
from shared.core import Effect, Log
from shared.mesh import MeshConfig
from shared.messages.decisions import Decision
from shared.messages.plans import DeploymentPlan

SAME = 1e-4
"""Of a model's requests: weights that differ by less differ by rounding."""


@dataclasses.dataclass(slots=True)
class Asking:
    config: SchedulerConfig
    mesh: MeshConfig
    fleet: Fleet
    demands: Demands
    standing: Standing
    balance: Balance
    wish: Wish

    def settle(self, planned: Planned, problem: Problem) -> Iterable[Effect]:
        """Ask for the plan, if it can be and differs from the one in force as it was decided."""
        plan, standing = planned.plan, self.standing
        assert standing.plan is not None
        as_decided = standing.as_decided()
        if plan is None:
            if self._pin_comes_off:
                yield from self.ask(
                    dataclasses.replace(planned, plan=as_decided), problem, as_decided.weights
                )
            else:
                yield from self.keep(planned.reason, problem.now_s, planned.decision)
            return
        wrong = self.faults(plan, problem)
        if wrong:
            yield Log("plan.dropped", {"plan_id": plan.plan_id, "wrong": wrong}, "warning")
            why = f"the plan computed cannot be: {'; '.join(wrong)}"
            yield from self.keep(why, problem.now_s, planned.decision)
        elif _same(plan, as_decided) and not self._pin_comes_off:
            gone = self.fleet.absent(offer.gpu_id for offer in problem.offers)
            absent = f"; workers absent: {', '.join(gone)}" if gone else ""
            why = f"the plan in force is as wished: {planned.reason}{absent}"
            yield from self.keep(why, problem.now_s, planned.decision)
        else:
            asked = dataclasses.replace(planned, plan=self.balance.applied(plan))
            yield from self.ask(asked, problem, plan.weights)

    def settle_answer(self, planned: Planned, problem: Problem) -> Iterable[Effect]:
        """``settle`` what a policy answered, which has to heed the minimum of replicas, too."""
        if planned.plan is None or self.config.policy != CORRECTING:
            yield from self.settle(planned, problem)
            return
        needs = {id_: problem.needs.replicas_min.get(id_, 1) for id_ in self.mesh.model_ids}
        wrong, missing = shortages(
            planned.plan, problem.offers, problem.in_force, replicas_min=needs
        )
        if wrong:
            yield Log("plan.dropped", {"plan_id": planned.plan.plan_id, "wrong": wrong}, "warning")
            yield from self.keep(f"the plan computed lacks replicas: {'; '.join(wrong)}",
                                 problem.now_s, planned.decision)  # fmt: skip
            return
        reason = "; ".join([planned.reason, *missing])
        yield from self.settle(dataclasses.replace(planned, reason=reason), problem)

    def correct(self, now_s: float, problem: Callable[[], Problem]) -> Iterable[Effect]:
        """Between decisions, weights alone. ``problem``: as it is now, made if it is needed."""
        standing, loads = self.standing, self.demands.loads
        self.balance.look(standing, loads, now_s)
        planned = None if self.wish.plan else self.balance.proposal(standing, loads, now_s)
        if planned and planned.plan and not self.faults(planned.plan, now := problem()):
            yield from self.ask(planned, now, standing.weights)

    def faults(self, plan: DeploymentPlan, problem: Problem) -> list[str]:
        """Why it cannot be; empty if it can."""
        wished = {wish.replica_id for wish in problem.wishes}
        return verify(plan, problem.offers, self.mesh.model_ids, across_nodes=wished)

    def ask(self, planned: Planned, problem: Problem, decided: Weights) -> Iterable[Effect]:
        """Wish for the plan, which has been verified. ``decided``: its weights, uncorrected."""
        plan, standing = planned.plan, self.standing
        assert plan is not None
        assert standing.plan is not None
        standing.asked_for(plan, decided)
        yield from self.wish.ask(
            planned,
            epoch=standing.epoch,
            against=(standing.replicas, problem.in_force.replicas),
            workers=len(problem.offers),
            expected_rps=self.demands.expected_rps(problem.now_s),
        )

    def keep(self, why: str, now_s: float, decision: Decision | None = None) -> Iterable[Effect]:
        return self.wish.keep(
            why,
            now_s=now_s,
            epoch=self.standing.epoch,
            expected_rps=self.demands.expected_rps(now_s),
            decision=decision,
        )

    @property
    def _pin_comes_off(self) -> bool:
        """Policies are asked although the plan in force is pinned: it was released."""
        return self.standing.plan is not None and self.standing.plan.pinned


def _same(plan: DeploymentPlan, other: DeploymentPlan) -> bool:
    if plan.plan_id == other.plan_id:
        return True
    if plan.replicas != other.replicas or plan.weights.keys() != other.weights.keys():
        return False
    return largest_move(plan.weights, other.weights, plan.replicas).size < SAME
