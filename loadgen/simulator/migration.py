"""Live migration between simulated engines: a request goes on in another replica with its KV.

What moves where is a policy's (llumnix.py); this is how. The replica that accepted a request stays
its home and speaks for it wherever it runs, so that no ingress and no core notices. While its KV is
copied it goes on where it is; what it pays is the pause at the end. It joins as those do that are
taken over in a live switch.
"""

from collections.abc import Iterable

from loadgen.simulator.engine import Engine, Outgoing, Run, recall
from loadgen.simulator.engines import Engines
from loadgen.simulator.llumnix import (
    POLL_S,
    REMAINING_TOKENS_MIN,
    Move,
    ReplicaView,
    migrations,
)
from loadgen.simulator.world import World
from services.worker.engine.batching_types import DECODE
from shared.cost.step import PS_PER_S
from shared.errors import Rejected


class Migrator:
    """Looks every POLL_S, and carries out what ought to move."""

    def __init__(self, world: World, fleet: Iterable[Engines]) -> None:
        self._world, self._fleet = world, fleet
        self._busy: set[str] = set()
        self.migrations = 0
        world.at(POLL_S, self._look)

    def _look(self) -> None:
        self._world.at(self._world.now_s + POLL_S, self._look)
        self._part()
        by_model: dict[str, list[Engine]] = {}
        for engines in [engines for engines in self._fleet if engines.port.alive]:
            for engine in engines.engines.values():
                if engine.ready:
                    by_model.setdefault(engine.spec.model_id, []).append(engine)
        for replicas in by_model.values():
            known = {engine.replica_id: engine for engine in replicas}
            views = [self._view(engine) for engine in replicas]
            for move in migrations(views, self._world.now_s):
                self._move(known[move.from_id], known[move.to_id], move)

    def _part(self) -> None:
        """Requests whose home has died end where they run; those that run where everything has
        died are given back by their home, and go on elsewhere."""
        for engines in self._fleet:
            for home in engines.engines.values():
                if not engines.port.alive:
                    recall(home)
                    continue
                for key, place in list(home.away.items()):
                    run = place.runs.get(key)
                    if run is not None and not place.owner.port.alive:
                        del home.away[key]
                        lost = Rejected("overloaded", "the replica that it had moved to is gone")
                        engines.refuse(run.request, lost)

    def _view(self, engine: Engine) -> ReplicaView:
        """In tokens; the requests only where they could be asked for."""
        batch = engine.batch
        load = engine.load(self._now_ps())
        free = load.kv_blocks_total - load.kv_blocks_used
        kv_free = free * batch.limits.block_tokens
        kv_waiting = sum(sequence.known for sequence in batch.waiting.values())
        view = ReplicaView(
            replica_id=engine.replica_id,
            running=load.running,
            waiting=load.waiting,
            kv_free=kv_free,
            kv_waiting=kv_waiting,
            busy=engine.replica_id in self._busy,
        )
        if view.busy or view.remaining_tokens >= REMAINING_TOKENS_MIN:
            return view
        done = engine.done(self._now_ps())
        decoding = tuple(
            (key, batch.computed(sequence) + done)
            for key, sequence in batch.running.items()
            if sequence.phase == DECODE and key in engine.runs
        )
        return ReplicaView(
            replica_id=view.replica_id,
            running=view.running,
            waiting=view.waiting,
            kv_free=kv_free,
            kv_waiting=kv_waiting,
            requests=decoding,
        )

    def _move(self, source: Engine, target: Engine, move: Move) -> None:
        run = source.runs[move.key]
        out = Outgoing()
        source.owner.show(source, run, out, done=source.done(self._now_ps()))
        out.send()
        source.owner.resume(source)
        source.batch.abort(move.key)
        del source.runs[move.key]
        run.home.away[move.key] = target
        pair = {source.replica_id, target.replica_id}
        self._busy |= pair

        def arrive() -> None:
            self._busy -= pair
            home = run.home
            if home.away.get(move.key) is target and home.owner.port.alive:  # else it is over
                self._arrive(source, target, move, run)

        self._world.at(self._world.now_s + move.pause_s, arrive)

    def _arrive(self, source: Engine, target: Engine, move: Move, run: Run) -> None:
        """It joins its new replica; the old one takes it back if that has filled up meanwhile."""
        for place in (target, source):
            alive = place.ready and place.owner.port.alive
            if not alive or not self._take(place, run, copied=move.kv_tokens):
                continue
            if place is not run.home:
                run.home.away[move.key] = place
            else:
                run.home.away.pop(move.key, None)
            self.migrations += place is target
            return
        del run.home.away[move.key]
        run.home.owner.refuse(run.request, Rejected("overloaded", "no replica took it back"))

    def _take(self, place: Engine, run: Run, *, copied: int) -> bool:
        """Where there is no room for its KV it does not go."""
        key = run.sequence.key
        try:
            sequence = place.batch.hold(
                key,
                prompt_tokens=run.sequence.prompt_tokens,
                output_tokens=run.output_tokens,
                earlier_tokens=run.shown,
                computed_tokens=copied,
            )
        except Rejected:
            return False
        place.batch.release(keep=sequence.computed > 0, key=key)
        if not sequence.computed:
            return False
        run.sequence = sequence
        place.runs[key] = run
        place.owner.resume(place)
        return True

    def _now_ps(self) -> int:
        return round(self._world.now_s * PS_PER_S)
