"""What must hold at every moment of every run, whatever the network does."""

from loadgen.simulator.world import World
from services.switcher.core import KEY
from services.switcher.walk import faults_of
from shared.core import Publish
from shared.messages.plans import AdoptPlan, PlanInForce, StoredPlan
from shared.messages.replicas import WorkerReport


class PlanHistory:
    """The bucket's history of plans: one writer, epochs that only grow, no GPU given twice, no
    plan in force that was not the target before, and no target that the scheduler did not wish
    for on top of the very plan it replaces."""

    def __init__(self, world: World, *, writer: str) -> None:
        self._world, self._writer = world, writer
        self._checked = 0
        self._wishes: set[tuple[str, int]] = set()
        self._last: StoredPlan | None = None
        self._used = 0
        self.switches = 0
        self.rollbacks = 0
        world.taps.append(self._see)
        world.watches.append(self.check)

    def check(self) -> None:
        history = self._world.bucket.history
        for write in history[self._checked :]:
            assert write.writer == self._writer, write
            assert write.key == KEY, write
            assert isinstance(write.message, StoredPlan), write
            self._check_write(write.message)
            self._last = write.message
        self._checked = len(history)

    def _check_write(self, plan: StoredPlan) -> None:
        last = self._last
        assert not faults_of(plan.in_force), plan
        if last is None:
            assert plan.epoch == 0, plan
            assert plan.target is None, plan
            return
        assert plan.epoch >= last.epoch, (last, plan)
        if plan.target is not None:
            assert plan.target_epoch > self._used, f"epoch used before: {plan}"
            assert (plan.epoch, plan.in_force) == (last.epoch, last.in_force), (last, plan)
            self._used = plan.target_epoch
            if plan.target.plan_id != plan.in_force.plan_id:
                assert last.target is None, f"a switch under way was forgotten: {last} {plan}"
                wish = (plan.target.plan_id, plan.epoch)
                assert wish in self._wishes, f"nobody wished for {wish}"
                self.switches += 1
            else:
                self.rollbacks += 1
        elif plan != last:
            assert plan.epoch == last.target_epoch, (last, plan)
            assert plan.in_force == last.target, (last, plan)

    def _see(self, _: str, effect: Publish) -> None:
        if isinstance(effect.message, AdoptPlan):
            self._wishes.add((effect.message.plan.plan_id, effect.message.based_on_epoch))


class EpochWatch:
    """No process ever says that an epoch went back: neither the switcher of the plan in force,
    nor a worker of a replica that it holds. Keeps what each worker said last."""

    def __init__(self, world: World) -> None:
        self.reports: dict[str, WorkerReport] = {}
        self._held: dict[tuple[str, str, str], int] = {}
        self._plans: dict[int, str] = {}
        world.taps.append(self._see)

    def _see(self, _: str, effect: Publish) -> None:
        message = effect.message
        if isinstance(message, WorkerReport):
            self.reports[message.worker_id] = message
            for held in message.replicas:
                key = (message.worker_id, message.incarnation, held.replica_id)
                assert held.epoch >= self._held.get(key, 0), f"{key} obeyed an older epoch: {held}"
                self._held[key] = held.epoch
        elif isinstance(message, PlanInForce):
            known = self._plans.setdefault(message.epoch, message.plan.plan_id)
            assert known == message.plan.plan_id, f"two plans share epoch {message.epoch}"
