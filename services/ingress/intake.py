"""What each message from a replica means for the requests it speaks of. Pure, like the core.

The data plane between the core, which decides about attempts, and the choices, which show tokens:
a chunk of a stream that runs well goes straight from ``journey.take`` to its choice, and only what
changes an attempt becomes an event of the core. Whoever drives it is its ``Shell``: the gateway in
production, the simulator in virtual time.
"""

from typing import Protocol

from services.ingress.choices import Choice, Choices
from services.ingress.config import IngressConfig
from services.ingress.core import IngressCore
from services.ingress.events import (
    Acknowledged,
    Arrived,
    AttemptLost,
    ClientGone,
    Finished,
    IngressEvent,
    LeaderHeard,
    ReplicaRestarted,
    StaleChunk,
    Sweep,
    TakenOver,
)
from services.ingress.handover import crossing, keep_early, unpack_early, was_home
from services.ingress.journey import HELD, Journey, Taken, take
from shared.core import Ask, Log, Publish, Start
from shared.messages.requests import FinishReason, TokenChunk, TokenChunks

STALE_REPLIES_MAX = 1_000  # aborts of stale attempts remembered between two calls of ``forget``


class Shell(Protocol):
    """What the intake leaves to whoever drives it."""

    def perform(self, effect: Publish | Ask | Log) -> None: ...

    def on_ended(self, request_id: str) -> None:
        """Nothing more will be said of the request."""
        ...

    def on_unexpected(self) -> None:
        """A chunk of an attempt that was never made."""
        ...


class Intake:
    """``heard`` is when each replica was last heard of, by the run of its worker that leads it."""

    def __init__(self, config: IngressConfig, *, ingress_id: str, shell: Shell) -> None:
        self._config, self._shell = config, shell
        self.core = IngressCore(config, ingress_id=ingress_id)
        self.choices = Choices()
        self._heard: dict[str, float] = {}
        self._runs: dict[str, tuple[str, str]] = {}  # replica -> incarnation now, and before
        self._stale: set[tuple[str, int, str]] = set()

    def open(self, journey: Journey, choice: Choice, now_s: float) -> None:
        """Take charge of a request; ``choice`` hears of it until ``on_end`` or ``on_fail``."""
        self.choices.open(journey.request_id, choice)
        self.step(Arrived(journey), now_s)

    def abort(self, request_id: str, now_s: float) -> None:
        """The client is gone, or wants no more: its choice hears nothing from now on."""
        self.choices.forget(request_id)
        self.step(ClientGone(request_id), now_s)

    def step(self, event: IngressEvent, now_s: float) -> None:
        """Step the core; clients are told here, the rest is the shell's to perform."""
        for effect in self.core.step(event, now_s):
            match effect:
                case Publish() | Ask() | Log():
                    self._shell.perform(effect)
                case Start(job="fail", argument=failure):
                    self._shell.on_ended(failure.request_id)
                    self.choices.fail(failure)
                case Start(job="finish", argument=finished):
                    self._end(finished.request_id, finished.finish, now_s)
                case _:
                    raise AssertionError(effect)

    def sweep(self, now_s: float) -> None:
        """Look for phases that last too long."""
        self.step(Sweep(self._heard), now_s)

    def forget(self, now_s: float) -> None:
        """Let go of replicas that no open request can depend on; stale attempts may be answered
        once more."""
        self._stale.clear()
        horizon_s = now_s - self._config.request_s
        self._heard = {r: t for r, t in self._heard.items() if t > horizon_s}
        self._runs = {r: run for r, run in self._runs.items() if r in self._heard}

    def on_chunks(self, batch: TokenChunks, now_s: float) -> None:
        """One message of a replica; without chunks it is a heartbeat."""
        run = self._runs.get(batch.replica_id)
        if (run is not None and run[0] == batch.incarnation) or self._is_new_run(batch, run, now_s):
            self._heard[batch.replica_id] = now_s
            if batch.worker_id and self.core.leaders.of(batch.replica_id) != batch.worker_id:
                self.step(LeaderHeard(batch.replica_id, batch.worker_id), now_s)
        for chunk in batch.chunks:
            self._on_chunk(batch, chunk, now_s)

    def _is_new_run(self, batch: TokenChunks, known: tuple[str, str] | None, now_s: float) -> bool:
        """Another run of the worker leads the replica; False for the last words of the former."""
        if known is not None and known[1] == batch.incarnation:
            return False
        self._runs[batch.replica_id] = (batch.incarnation, known[0] if known else "")
        if known is not None:
            self.step(ReplicaRestarted(batch.replica_id, batch.incarnation), now_s)
        return True

    def _on_chunk(self, batch: TokenChunks, chunk: TokenChunk, now_s: float) -> None:
        request_id, attempt = chunk.request_id, chunk.attempt
        journey = self.core.journey(request_id)
        if journey is None or attempt != journey.attempt:
            if journey is None or attempt < journey.attempt:
                self._on_stale(batch.replica_id, chunk, now_s)
            else:
                self._shell.on_unexpected()
            return
        if batch.replica_id != journey.replica_id and journey.phase in HELD:
            if not self._is_taken_over(journey, batch, chunk, now_s):
                return
            home = (batch.replica_id, batch.worker_id, batch.incarnation)
            self.step(TakenOver(request_id, attempt, *home), now_s)
        finish = chunk.finish
        if finish in ("refused", "failed", "abort"):  # an abort that we did not ask for
            reason = "refused" if finish == "refused" else "failed"
            lost = AttemptLost(request_id, attempt, reason, chunk.failure, chunk.detail)
            self.step(lost, now_s)
            return
        streaming = journey.phase == "streaming" and journey.incarnation == batch.incarnation
        if not streaming or journey.probing:
            self.step(Acknowledged(request_id, attempt, batch.incarnation), now_s)
            if journey.attempt != attempt or journey.phase != "streaming":
                return
        self._feed(journey, chunk, now_s)

    def _is_taken_over(
        self, journey: Journey, batch: TokenChunks, chunk: TokenChunk, now_s: float
    ) -> bool:
        """Whether a chunk from another replica than the journey's tells that this one has its
        attempt now. The late tokens of a former home are fed here; how the attempt ended there
        otherwise says nothing, since it lives elsewhere."""
        run = self._runs.get(batch.replica_id)
        if run is None or run[0] != batch.incarnation:
            return False  # of a run that is no more: whatever it took over is lost
        if not was_home(journey, batch.replica_id):
            return True
        if chunk.finish in ("refused", "failed", "abort"):
            return False
        if not crossing(journey, now_s):
            return True  # it was taken back
        self._feed(journey, chunk, now_s)
        return False

    def _feed(self, journey: Journey, chunk: TokenChunk, now_s: float) -> None:
        """Take the tokens of the attempt in progress, and its end."""
        more = False
        if chunk.tokens:
            verdict, taken = take(journey, chunk)
            if verdict == "gap":
                detail = f"position {chunk.position} came after {len(journey.tokens)} tokens"
                self._on_gap(journey, chunk, detail, now_s)
                return
            journey.heard_s = now_s
            more = taken is not None
            if taken is not None and self._show(journey, taken, now_s):
                return
        if chunk.finish is not None:
            self._on_finish(journey, chunk, chunk.finish, now_s)
        if more and journey.early:  # what waited for these tokens
            for early in unpack_early(journey):
                if journey.live and journey.attempt == chunk.attempt:
                    self._feed(journey, early, now_s)

    def _on_gap(self, journey: Journey, chunk: TokenChunk, detail: str, now_s: float) -> None:
        """Tokens are missing: lost, unless another replica has just taken the attempt over, and
        the last words of the former one come late."""
        if not keep_early(journey, chunk, now_s):
            lost = AttemptLost(journey.request_id, chunk.attempt, "gap", detail=detail)
            self.step(lost, now_s)

    def _show(self, journey: Journey, taken: Taken, now_s: float) -> bool:
        """Hand on new tokens; True if a stop string ended the request here."""
        if journey.first_token_s is None:
            journey.first_token_s = now_s
        ended = self.choices.show(journey.request_id, taken)
        if ended is None:
            return False
        # No harm if the engine has seen the stop string too.
        self.step(ClientGone(journey.request_id), now_s)
        journey.finish = ended
        self._shell.on_ended(journey.request_id)
        self.choices.end(journey.request_id, ended)
        return True

    def _on_finish(
        self, journey: Journey, chunk: TokenChunk, finish: FinishReason, now_s: float
    ) -> None:
        if chunk.position + len(chunk.tokens) > len(journey.tokens):
            detail = f"ended at {chunk.position}, known are {len(journey.tokens)} tokens"
            self._on_gap(journey, chunk, detail, now_s)
            return
        self._end(journey.request_id, finish, now_s)

    def _end(self, request_id: str, finish: FinishReason, now_s: float) -> None:
        self._shell.on_ended(request_id)
        self.step(Finished(request_id, finish), now_s)
        self.choices.end(request_id, finish)

    def _on_stale(self, replica_id: str, chunk: TokenChunk, now_s: float) -> None:
        """Somebody still works on what nobody waits for: say so, but not to each chunk."""
        key = (chunk.request_id, chunk.attempt, replica_id)
        if chunk.finish is None and key not in self._stale and len(self._stale) < STALE_REPLIES_MAX:
            self._stale.add(key)
            self.step(StaleChunk(chunk.request_id, chunk.attempt, replica_id), now_s)
