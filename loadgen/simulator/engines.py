"""The engines of one worker in virtual time: the jobs of services/worker/events.py.

Each replica runs the production batching core (services/worker/engine/batching.py) under the cost
model's step times. Steps in which nothing but counts changes are taken in one leap, and a request's
tokens leave in two chunks, the first token and the rest: nothing happens per token. Whoever could
notice gets the truth in time: before a replica is drained, stopped, cut off, stalled or dies, and
before an abort, ``flush`` sends every token that was made until then. With ``streaming`` each step
is taken by itself and its tokens leave at once, as in production, for worlds in which messages get
lost.
"""

import random
from collections.abc import Mapping

from loadgen.simulator.engine import Engine, Outgoing, Run, recall
from loadgen.simulator.peers import Peers
from loadgen.simulator.process import Job, Port
from loadgen.simulator.pulse import Pulse
from loadgen.simulator.ranks import LOOK_S, Ranks
from loadgen.simulator.stages import Stages
from loadgen.simulator.takeovers import Takeovers
from loadgen.simulator.workshop import Workshop
from services.worker.engine.batching_types import DECODE
from services.worker.events import (
    ABORT,
    ADMIT,
    GROW,
    MEASURE,
    STAGE,
    START_ENGINE,
    STOP_ENGINE,
    Admission,
    EngineAbort,
    EngineBroken,
    EngineLoads,
    EngineStart,
    EngineStop,
    EngineStopped,
    RequestRefused,
)
from shared.cost.step import PS_PER_S
from shared.errors import Rejected
from shared.messages.requests import FailureCode, SubmitRequest

STEP_WEIGHT = 0.1  # of the newest step in the mean step time, as in production
LATE_PS = PS_PER_S // 1_000_000
"""An engine that hears of a step's end later than this was standing still, and not computing."""


class Engines:
    """Everything slow that one worker process does."""

    def __init__(
        self,
        port: Port,
        *,
        incarnation: str,
        workshop: Workshop,
        rng: random.Random,
        peers: Peers,
        pulse: Pulse | None = None,
    ) -> None:
        """``peers`` reach it by its incarnation. ``pulse``: leaves out measurements that would find
        nothing new."""
        self.engines: dict[str, Engine] = {}
        self.steps = self.preemptions = 0  # of engines that have ended
        self._port, self._incarnation = port, incarnation
        self._workshop, self._rng, self._pulse = workshop, rng, pulse
        self._takeovers = Takeovers(self, peers, workshop, rng)
        self._stages = Stages(self, peers, workshop)
        self._ranks = Ranks(self, peers, workshop, rng)
        peers.join(incarnation, self)
        port.before_trouble = self._before_trouble

    def jobs(self) -> Mapping[str, Job]:
        return {
            START_ENGINE: self._start,
            STOP_ENGINE: self._stop,
            ADMIT: self._admit,
            ABORT: self._abort,
            MEASURE: self._measure,
            STAGE: self._stages.stage,
            GROW: self._ranks.grow,
            **self._takeovers.jobs(),
        }

    def check(self) -> None:
        for engine in self.engines.values():
            engine.batch.check()

    def flush(self) -> None:
        """Send every token made until now."""
        for engine in self.engines.values():
            done = engine.done(round(self._port.now_s * PS_PER_S))
            out = Outgoing()
            for run in engine.runs.values():
                self.show(engine, run, out, done=done)
            out.send()

    def _before_trouble(self) -> None:
        """Nothing may be heard of this process for a while: what it has made until now has left,
        and the leaps end with the steps under way."""
        self.flush()
        for engine in self.engines.values():
            if engine.steps > 1:
                self.resume(engine)

    def _start(self, start: EngineStart) -> None:
        batch = self._workshop.batch(
            start.spec, rank=start.rank, cache_bytes_max=start.cache_bytes_max
        )
        engine = Engine(start.spec, start.generation, self, batch, start)
        self.engines[engine.replica_id] = engine
        self._ranks.start(engine)

    def _stop(self, stop: EngineStop) -> None:
        engine = self.engines.get(stop.replica_id)
        if engine is not None and engine.generation == stop.generation:
            self._forget(engine)
        self._port.feed(EngineStopped(replica_id=stop.replica_id, generation=stop.generation))

    def _forget(self, engine: Engine) -> None:
        del self.engines[engine.replica_id]
        recall(engine)
        self.steps += engine.batch.steps_total
        self.preemptions += engine.batch.preemptions

    def _admit(self, admission: Admission) -> None:
        request = admission.request
        engine = self.engines[request.replica_id]
        if engine.broken:
            return  # the core is about to hear of it, and ends what it has admitted
        assert engine.ready, f"{request.request_id} was admitted to an engine that is not ready"
        facts = self._workshop.facts(request)
        earlier = len(request.output_tokens)
        try:
            sequence = engine.batch.add(
                admission.key,
                prompt_tokens=len(request.prompt_tokens),
                output_tokens=facts.output_tokens,
                earlier_tokens=earlier,
                hashes=facts.hashes,
                hash_tokens=facts.hash_tokens,
            )
        except Rejected as error:
            self.refuse(request, error)
            return
        engine.requests_total += 1
        engine.runs[admission.key] = Run(request, sequence, earlier, facts.output_tokens, engine)
        self.resume(engine)

    def refuse(self, request: SubmitRequest, error: Rejected) -> None:
        code: FailureCode = "too_long" if error.code == "too_long" else "overloaded"
        refused = RequestRefused(
            request_id=request.request_id,
            attempt=request.attempt,
            failure=code,
            detail=error.detail,
        )
        self._port.feed(refused)

    def _abort(self, abort: EngineAbort) -> None:
        """The step under way still takes the time that it takes."""
        engine = self.engines.get(abort.replica_id)
        engine = engine and engine.away.pop(abort.key, engine)
        if engine is None:
            return
        if engine.held is not None and engine.held.runs.pop(abort.key, None) is not None:
            engine.batch.unhold(abort.key)
            return
        run = engine.runs.pop(abort.key, None)
        if run is None:
            return
        self.resume(engine)
        engine.batch.abort(abort.key)

    def _measure(self, _: None) -> None:
        now_ps, limits = round(self._port.now_s * PS_PER_S), self._workshop.limits
        measured = tuple(
            engine.measured(limits, now_ps) for engine in self.engines.values() if engine.ready
        )
        self._port.feed(EngineLoads(engines=measured))

    def resume(self, engine: Engine) -> None:
        """Something has changed: start the next steps, or end a leap with the step under way."""
        if self._pulse is not None:
            self._pulse.quicken()
        if not engine.steps:
            self._plan(engine, round(self._port.now_s * PS_PER_S))
        elif engine.steps > 1:
            elapsed_ps = round(self._port.now_s * PS_PER_S) - engine.since_ps
            steps, end_ps = engine.batch.steps_until(elapsed_ps)
            if steps < engine.steps:
                engine.steps = steps
                self._wake_at(engine, engine.since_ps + end_ps)

    def _plan(self, engine: Engine, since_ps: int) -> None:
        if engine.stance != "running":
            engine.steps = 0
            if engine.stance == "pausing":
                self._takeovers.stand_still(engine)
            return
        if len(engine.spec.gpus) > 1 and self._ranks.missing(engine):
            engine.steps = 0  # no step without all ranks
            self._port.later(LOOK_S, lambda: self._look_again(engine))
            return
        plan = engine.batch.plan()
        if plan is None:
            engine.steps = 0
            return
        engine.since_ps, engine.steps = since_ps, plan.steps
        end_ps = plan.duration_ps
        if self._workshop.streaming and plan.steps > 1:
            engine.steps, end_ps = engine.batch.steps_until(1)  # the first of them
        mean_s = end_ps / engine.steps / PS_PER_S
        engine.step_s += STEP_WEIGHT * (mean_s - engine.step_s) if engine.step_s else mean_s
        self._wake_at(engine, since_ps + end_ps)

    def _look_again(self, engine: Engine) -> None:
        if self.engines.get(engine.replica_id) is engine and not engine.broken and not engine.steps:
            self._plan(engine, round(self._port.now_s * PS_PER_S))

    def _wake_at(self, engine: Engine, at_ps: int) -> None:
        engine.number = number = engine.number + 1

        def wake() -> None:
            if engine.number == number and self.engines.get(engine.replica_id) is engine:
                self._wake(engine, at_ps)

        self._port.later(at_ps / PS_PER_S - self._port.now_s, wake)

    def _wake(self, engine: Engine, at_ps: int) -> None:
        """The steps under way are done."""
        if (
            self._workshop.faults.step_breaks
            and self._rng.random() < self._workshop.faults.step_breaks
        ):
            self.break_down(engine, "illegal memory access (injected)")
            return
        progress = engine.batch.advance(engine.steps)
        engine.steps = 0
        out = Outgoing()
        changed = bool(progress.ended)
        if self._workshop.streaming:
            for run in engine.runs.values():
                self.show(engine, run, out)
        else:
            for sequence in progress.first:
                run = engine.runs.get(sequence.key)
                if run is not None and run.shown < run.output_tokens:
                    self.show(engine, run, out)
        for sequence in progress.ended:
            run = engine.runs.pop(sequence.key, None)
            if run is not None:
                run.home.away.pop(sequence.key, None)
                self.show(engine, run, out, ended=True)
        out.send()
        if changed and self._pulse is not None:
            self._pulse.quicken()
        now_ps = round(self._port.now_s * PS_PER_S)
        self._plan(engine, now_ps if now_ps > at_ps + LATE_PS else at_ps)

    def show(
        self, engine: Engine, run: Run, out: Outgoing, *, done: int = 0, ended: bool = False
    ) -> None:
        """Chunk the tokens of ``run`` that have not left yet; ``done`` steps of the leap under way
        have ended."""
        made = run.output_tokens
        if not ended:
            decoded = run.sequence.phase == DECODE
            made = engine.batch.made(run.sequence) + (done if decoded else 0)
        count = made - run.shown
        if count > 0 or ended:
            tokens = self._workshop.tokens(run.request.request_id, run.shown, count)
            out.add(run, tokens, ended=ended)

    def break_down(self, engine: Engine, detail: str) -> None:
        """It runs no more, and holds nothing."""
        engine.ready, engine.broken, engine.steps = False, True, 0
        engine.weight_bytes = engine.cache_bytes = 0
        engine.held = None
        engine.batch.release(keep=False)
        engine.number += 1
        recall(engine)
        engine.runs.clear()
        for key in list(engine.batch.sequences):
            engine.batch.abort(key)
        self._port.feed(
            EngineBroken(replica_id=engine.replica_id, generation=engine.generation, detail=detail)
        )

    @property
    def incarnation(self) -> str:
        return self._incarnation

    @property
    def port(self) -> Port:
        return self._port
