"""One replica of a rehearsal: continuous batching with chunked prefill, a request at a time.

It decides as the engines' batch scheduler does: each running request decodes one token a step, what
is left of the step's token budget goes to prompts in order of arrival (chunked prefill, Agrawal et
al., Sarathi, 2023), and when the KV cache is full the youngest is preempted and computed again
(Kwon et al., PagedAttention, 2023). KV is counted in tokens, with half a block for each request
in place of whole blocks; prefixes are not cached.

Steps that differ in counts only are leapt over: those that decode are a counter of steps, the sum
of their contexts and a heap of the steps at which they end. So a request costs a few events,
whatever its length. Between two calls of ``advance`` a replica depends on nothing but itself, so
it needs to be advanced only when somebody wants to know how it stands.
"""

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, isnan, nan, sqrt

from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.cost.step import PS_PER_S, Prefill

NONE = -1
QUEUE_FULL = 16  # routers' own: services/router/loads.py


@dataclass(slots=True)
class Log:
    """Requests by number: what they are, and when they had their first token and their last (NaN:
    not yet). Times are seconds of the rehearsal."""

    at_s: list[float]
    input_tokens: list[int]
    output_tokens: list[int]
    first_s: list[float] = field(default_factory=list[float])
    ended_s: list[float] = field(default_factory=list[float])

    def __post_init__(self) -> None:
        self.first_s = [nan] * len(self.at_s)
        self.ended_s = [nan] * len(self.at_s)


class Replica:
    """``sent`` and ``ended`` count requests; ``tokens_max`` is the longest that it can hold,
    ``seat`` the pressure that one more request adds."""

    __slots__ = (
        "_context", "_decode_s", "_decoding", "_done", "_ends", "_half_block", "_known", "_limits",
        "_log", "_model", "_now_s", "_offset", "_partial", "_queue", "_reserved", "_running",
        "_steps", "ended", "seat", "sent", "tokens_max",
    )  # fmt: skip

    def __init__(self, model: CostModel, limits: EngineLimits, log: Log) -> None:
        self._model, self._log = model, log
        self._limits = limits.in_stages(model.shape.pp)
        self._half_block = (limits.block_tokens - 1) / 2
        self.tokens_max = model.kv_tokens
        self.seat = 1.0 / limits.running_max
        self.sent = self.ended = 0
        self._now_s = 0.0
        self._queue: deque[int] = deque()  # by arrival; the preempted in front
        self._running: dict[int, None] = {}  # by admission, the youngest last
        self._known: dict[int, int] = {}  # tokens of those that were preempted
        self._partial = NONE  # the request whose prompt is being computed, if it was begun
        self._done = 0  # tokens of it
        self._reserved = 0  # tokens of the prompts that were admitted and are not done
        self._decoding = self._context = self._steps = 0
        self._offset: dict[int, int] = {}  # of those that decode: tokens held, less the step
        self._ends: list[tuple[int, int]] = []  # heap of (step, request); preempted ones remain
        self._decode_s: dict[int, tuple[float, float]] = {}

    def send(self, request: int) -> None:
        """Queue a request; those sent to a replica come in order of arrival."""
        self._queue.append(request)
        self.sent += 1

    def pressure(self) -> float:
        """As routers reckon it from reports: seats or KV taken, and the queue on top."""
        alive, running = self.sent - self.ended, len(self._running)
        held = self._context + self._reserved + self._half_block * running
        queue = (alive - running) * max(self.seat, 1.0 / QUEUE_FULL)
        return max(alive * self.seat, held / self.tokens_max) + queue

    def advance(self, until_s: float) -> None:
        """Perform all steps that begin before ``until_s``."""
        queue, at_s = self._queue, self._log.at_s
        while self._now_s < until_s:
            if self._partial >= 0 or self._admissible():
                self._mixed_step()
            elif self._decoding:
                self._leap(until_s)
            elif queue and at_s[queue[0]] < until_s:
                self._now_s = at_s[queue[0]]
            else:
                return

    def _admissible(self) -> bool:
        """Whether the first in the queue has come and has room: all that it holds, with a block
        to spare for each that runs, or else a newcomer would soon be preempted."""
        if not self._queue:
            return False
        first = self._queue[0]
        if self._log.at_s[first] > self._now_s:
            return False
        running = len(self._running)
        if not running:
            return True
        if running >= self._limits.running_max:
            return False
        spare = (self._limits.block_tokens + self._half_block) * running + self._decoding
        room = self.tokens_max - self._context - self._reserved - spare
        return self._tokens(first) + self._half_block <= room

    def _tokens(self, request: int) -> int:
        """What is to be computed before it decodes."""
        return self._known.get(request, 0) or self._log.input_tokens[request]

    def _mixed_step(self) -> None:
        """One step of prompts, beside those that decode."""
        budget = self._limits.batch_tokens_max - self._decoding
        tokens = chunks = pairs = 0
        joining: list[int] = []
        while budget > 0:
            request = self._partial
            if request < 0:
                if not self._admissible():
                    break
                request = self._queue.popleft()
                self._running[request] = None
                self._reserved += self._tokens(request)
                self._done = 0
            known, done = self._tokens(request), self._done
            count = min(budget, known - done)
            tokens, chunks, budget = tokens + count, chunks + 1, budget - count
            pairs += count * done + count * (count + 1) // 2
            if done + count == known:
                joining.append(request)
                self._partial = NONE
            else:
                self._partial, self._done = request, done + count
        work = Prefill(tokens, chunks, pairs, len(joining))
        batch = self._decoding
        took_ps = self._model.step.step_ps(batch, self._context + batch, work)
        self._pass(1, took_ps / PS_PER_S)
        for request in joining:
            self._join(request)

    def _join(self, request: int) -> None:
        """Its prompt is done and has made a token; it decodes on, if there is more to make."""
        log, known = self._log, self._tokens(request)
        self._reserved -= known
        if isnan(log.first_s[request]):
            log.first_s[request] = self._now_s
        left = log.input_tokens[request] + log.output_tokens[request] - known - 1
        if left <= 0:
            self._end(request)
            return
        self._decoding += 1
        self._context += known
        self._offset[request] = known - self._steps
        heappush(self._ends, (self._steps + left, request))

    def _leap(self, until_s: float) -> None:
        """Decode until one ends, one comes that has room, KV is full, or ``until_s``."""
        batch, context = self._decoding, self._context
        ends, offset = self._ends, self._offset
        while not self._valid(ends[0]):
            heappop(ends)
        steps = ends[0][0] - self._steps
        free = self.tokens_max - context - self._reserved - self._half_block * len(self._running)
        if free < steps * batch and len(offset) > 1:
            if free < batch:
                self._preempt()
                return
            steps = min(steps, int(free) // batch)
        queue, stop_s = self._queue, until_s
        if queue and self._log.at_s[queue[0]] > self._now_s:
            stop_s = min(stop_s, self._log.at_s[queue[0]])
        fixed_s, slope_s = self._decode_s.get(batch) or self._times(batch)
        linear = fixed_s + slope_s * (context + batch / 2)  # of steps, in the time they take
        square = slope_s * batch / 2
        took_s = steps * (linear + square * steps)
        left_s = stop_s - self._now_s
        if took_s > left_s:  # the first step that ends at ``stop_s`` or later
            root = 2 * left_s / (linear + sqrt(linear * linear + 4 * square * left_s))
            steps = min(steps, max(1, ceil(root)))
            took_s = steps * (linear + square * steps)
        self._pass(steps, took_s)

    def _times(self, batch: int) -> tuple[float, float]:
        """Seconds of a step in which ``batch`` requests decode, and for each token they hold."""
        times = self._model.step.decode(batch)
        found = self._decode_s[batch] = (times.fixed_ps / PS_PER_S, times.slope_ps / PS_PER_S)
        return found

    def _pass(self, steps: int, took_s: float) -> None:
        """Steps in which those that decode all get a token; some may end with the last."""
        self._now_s += took_s
        self._steps += steps
        self._context += self._decoding * steps
        ends = self._ends
        while ends and ends[0][0] <= self._steps:
            entry = heappop(ends)
            if self._valid(entry):
                self._part(entry[1])
                self._end(entry[1])

    def _valid(self, entry: tuple[int, int]) -> bool:
        """Whether it still decodes, and was not preempted since: then it would end later."""
        step, request = entry
        offset = self._offset.get(request)
        if offset is None:
            return False
        log = self._log
        return step == log.input_tokens[request] + log.output_tokens[request] - 1 - offset

    def _part(self, request: int) -> int:
        """It decodes no more; the tokens that it held."""
        held = self._offset.pop(request) + self._steps
        self._decoding -= 1
        self._context -= held
        return held

    def _end(self, request: int) -> None:
        del self._running[request]
        self._log.ended_s[request] = self._now_s
        self.ended += 1

    def _preempt(self) -> None:
        """The youngest gives its room up, and begins again at the head of the queue. It decodes:
        prompts that were begun are gone on with before anybody decodes alone."""
        request, _ = self._running.popitem()
        self._known[request] = self._part(request) + 1
        self._queue.appendleft(request)
