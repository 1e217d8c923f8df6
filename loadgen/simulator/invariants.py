"""What must hold at every moment of every run, whatever the network does."""

from collections import Counter
from collections.abc import Iterator

from loadgen.simulator.engine import Engine
from loadgen.simulator.engines import Engines
from loadgen.simulator.world import World
from services.switcher.core import KEY
from services.switcher.walk import faults_of
from shared.core import Publish
from shared.hardware import GpuSpec
from shared.messages.plans import AdoptPlan, PlanInForce, StoredPlan, SwitchEnded, SwitchStarted
from shared.messages.replicas import RequestsTaken, WorkerReport
from shared.messages.requests import SubmitRequest


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


class MemoryWatch:
    """Weights and KV cache of everything that a GPU hosts, ranks in preparation included, are
    never more than it has."""

    def __init__(self, world: World) -> None:
        self._hosted: dict[str, tuple[Engines, GpuSpec]] = {}
        world.watches.append(self.check)

    def host(self, engines: Engines, gpu: GpuSpec) -> None:
        """``engines`` are what the GPU holds from now on: the process before it has ended."""
        self._hosted[gpu.gpu_id] = (engines, gpu)

    def check(self) -> None:
        for engines, gpu in self._hosted.values():
            if not gpu.memory_bytes or not engines.port.alive:
                continue
            held = {
                engine.replica_id: (engine.weight_bytes, engine.cache_bytes)
                for engine in engines.engines.values()
            }
            total = sum(weights + cache for weights, cache in held.values())
            assert total <= gpu.memory_bytes, f"{gpu} holds {total} bytes: {held}"

    def engines(self) -> Iterator[Engine]:
        """Of all processes that run, those that work."""
        for engines, _ in self._hosted.values():
            if engines.port.alive:
                yield from (engine for engine in engines.engines.values() if not engine.broken)


class RequestWatch:
    """Counts what switches do to requests. ``check`` is for worlds in which nothing goes wrong:
    there each request runs in one engine at a time, engines that share a GPU do not compute at
    once, and until a switch has to reload no request is begun again once it has tokens."""

    def __init__(self, world: World, memory: MemoryWatch, *, strict: bool = False) -> None:
        self._memory, self._strict = memory, strict
        self.ways: Counter[str] = Counter()  # of switches that have succeeded, and "failed"
        self.moved = self.replayed = self.restarted = 0
        self._reloaded = False
        world.taps.append(self._see)
        if strict:
            world.watches.append(self.check)

    def check(self) -> None:
        running: dict[str, str] = {}
        owners: dict[str, str] = {}
        for engine in self._memory.engines():
            if engine.start.rank or engine.stance != "running":
                continue
            for run in engine.runs.values():
                other = running.setdefault(run.request.request_id, engine.replica_id)
                assert other == engine.replica_id, f"{run.request} runs in {other}, too"
            for gpu in engine.spec.gpus if engine.steps else ():
                other = owners.setdefault(gpu, engine.replica_id)
                assert other == engine.replica_id, f"{gpu} computes for {engine.spec} and {other}"

    def _see(self, _: str, effect: Publish) -> None:
        match effect.message:
            case SwitchEnded(succeeded=succeeded, report=report):
                self.ways[report.way if succeeded and report is not None else "failed"] += 1
            case RequestsTaken(moved=moved, replayed=replayed):
                self.moved += moved
                self.replayed += replayed
            case SubmitRequest(attempt=attempt) as submit:
                again = bool(attempt and submit.output_tokens)
                self.restarted += again
                assert not (self._strict and again) or self._reloaded, submit
            case SwitchStarted(way=way):
                self._reloaded |= way == "reload"
            case _:
                pass
