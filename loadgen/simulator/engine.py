"""One replica's engine in virtual time, the attempts that run in it, and what they have to say."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from loadgen.simulator.process import Port
from services.worker.engine.batching import Batch
from services.worker.engine.batching_types import Sequence as Running
from services.worker.engine.interface import EngineLoad
from services.worker.events import EndedAttempt, EngineStart, MeasuredEngine, RequestsEnded
from shared.cost.limits import EngineLimits
from shared.errors import Rejected
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import Shares
from shared.messages.requests import SubmitRequest, TokenChunk, TokenChunks
from shared.subjects import TOKEN_CHUNKS

Stance = Literal["running", "pausing", "paused"]


class Owner(Protocol):
    """The process that speaks for an engine."""

    @property
    def port(self) -> Port: ...

    @property
    def incarnation(self) -> str: ...

    def resume(self, engine: "Engine") -> None: ...
    def refuse(self, request: SubmitRequest, error: Rejected) -> None: ...
    def show(self, engine: "Engine", run: "Run", out: "Outgoing", *, done: int = 0) -> None: ...


@dataclass(slots=True)
class Run:
    """One attempt in an engine; ``shown`` of its output tokens have left. ``home`` speaks for it,
    wherever it runs."""

    request: SubmitRequest
    sequence: Running
    shown: int
    output_tokens: int
    home: "Engine"


@dataclass(slots=True)
class Held:
    """Requests taken over for ``epoch``, until they are let go on. ``paused_s``: by replica that
    had them, since when it stands still, and how many came from it. ``refused``: never fit."""

    epoch: int
    runs: dict[str, Run] = field(default_factory=dict[str, Run])
    paused_s: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    refused: list[tuple[SubmitRequest, Rejected]] = field(
        default_factory=list[tuple[SubmitRequest, Rejected]]
    )


@dataclass(slots=True, eq=False)
class Engine:
    """``steps`` of the batch are under way since ``since_ps``; 0: it stands still. Of a rank other
    than the leading one, all that matters is that it is there, and what it holds."""

    spec: ReplicaSpec
    generation: int
    owner: Owner
    batch: Batch
    start: EngineStart
    ready: bool = False
    broken: bool = False
    since_ps: int = 0
    steps: int = 0
    number: int = 0  # of the plan under way: a wake-up call for another is void
    requests_total: int = 0
    step_s: float = 0.0
    runs: dict[str, Run] = field(default_factory=dict[str, Run])
    away: dict[str, "Engine"] = field(default_factory=dict[str, "Engine"])  # ours that run there
    stance: Stance = "running"
    shares: Shares = field(default_factory=Shares)  # who takes its requests over, once it pauses
    paused_s: float = 0.0
    moving: frozenset[str] = frozenset()  # keys of what may be taken over while it stands still
    held: Held | None = None
    takes: int = 0  # begun: an answer to an earlier one is void
    group: dict[int, "Engine"] = field(default_factory=dict[int, "Engine"])  # the other ranks
    weight_bytes: int = 0
    cache_bytes: int = 0
    cache_bytes_full: int = 0  # what it grows to
    fetched: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def replica_id(self) -> str:
        return self.spec.replica_id

    def done(self, now_ps: int) -> int:
        """Steps of the leap under way that have ended by now, and of which the batch will only
        hear at the leap's end. The last one, in which requests may end, it hears of itself."""
        if self.steps <= 1:
            return 0
        plan = self.batch.plan()
        assert plan is not None, "a leap without a plan"
        elapsed_ps = now_ps - self.since_ps
        steps, end_ps = plan.steps_until(elapsed_ps)
        return min(self.steps - 1, steps if end_ps <= elapsed_ps else steps - 1)

    def load(self, now_ps: int) -> EngineLoad:
        """As the engine would report it now."""
        load, batch, done = self.batch.load(), self.batch, self.done(now_ps)
        if not done:
            return load
        grown = batch.kv.growth(batch.steps_total, done, batch.decoding)
        return EngineLoad(
            running=load.running,
            waiting=load.waiting,
            tokens_pending=load.tokens_pending - done * batch.decoding,
            kv_blocks_used=load.kv_blocks_used + grown,
            kv_blocks_total=load.kv_blocks_total,
        )

    def measured(self, limits: EngineLimits, now_ps: int) -> MeasuredEngine:
        if self.start.rank:  # the leader tells the replica's load
            return MeasuredEngine(
                replica_id=self.replica_id,
                generation=self.generation,
                load=EngineLoad(),
                fetched_bytes=self._fetched_bytes,
                cache_bytes=self.cache_bytes,
            )
        return MeasuredEngine(
            replica_id=self.replica_id,
            generation=self.generation,
            load=self.load(now_ps),
            running_max=limits.running_max,
            waiting_max=limits.waiting_max,
            output_tokens_total=self.batch.output_tokens_total,
            requests_total=self.requests_total,
            step_s=self.step_s,
            cache_tokens=self.cache_tokens,
            fetched_bytes=self._fetched_bytes,
            cache_bytes=self.cache_bytes,
        )

    @property
    def _fetched_bytes(self) -> int:
        own = self.spec.gpus[self.start.rank]
        return sum(count for source, count in self.fetched.items() if source != own)

    @property
    def cache_tokens(self) -> int:
        """Of live requests, by the steps that the batch has heard of."""
        batch = self.batch
        return batch.context + sum(sequence.computed for sequence in batch.partials)


@dataclass(slots=True)
class Outgoing:
    """What leaves after some steps: one message for each replica and ingress."""

    chunks: dict[tuple[Engine, str], list[TokenChunk]] = field(
        default_factory=dict[tuple[Engine, str], list[TokenChunk]]
    )
    ended: dict[Engine, list[EndedAttempt]] = field(
        default_factory=dict[Engine, list[EndedAttempt]]
    )

    def add(self, run: Run, tokens: list[int], *, ended: bool) -> None:
        """The next ``tokens`` of ``run`` leave; with the last of them its attempt ends."""
        request, shown = run.request, run.shown
        run.shown = made = shown + len(tokens)
        limit = request.sampling.output_tokens_max
        chunk = TokenChunk(
            request_id=request.request_id,
            attempt=request.attempt,
            position=shown,
            tokens=tokens,
            finish=("length" if made >= limit else "stop") if ended else None,
        )
        self.chunks.setdefault((run.home, request.ingress_id), []).append(chunk)
        if ended:
            attempt = EndedAttempt(request_id=request.request_id, attempt=request.attempt)
            self.ended.setdefault(run.home, []).append(attempt)

    def send(self) -> None:
        """The dead say nothing, wherever their requests go on."""
        for (home, ingress_id), chunks in self.chunks.items():
            owner = home.owner
            if not owner.port.alive:
                continue
            message = TokenChunks(
                replica_id=home.replica_id, incarnation=owner.incarnation, chunks=chunks
            )
            owner.port.publish(TOKEN_CHUNKS.send(message, ingress_id=ingress_id))
        for home, ended in self.ended.items():
            home.owner.port.feed(RequestsEnded(ended=tuple(ended)))


def recall(home: Engine) -> None:
    """Nobody speaks for its requests any more: end those that run elsewhere."""
    for key, place in home.away.items():
        if place.runs.pop(key, None) is not None:
            place.owner.resume(place)
            place.batch.abort(key)
    home.away.clear()
