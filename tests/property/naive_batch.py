"""Continuous batching written the obvious way: lists, loops over every request, a step at a time.

It shares no code with services/worker/engine/batching.py and exists to be compared with it.
"""

from dataclasses import dataclass, field

from services.worker.engine.batching_types import PrefillWork
from shared.cost.limits import EngineLimits
from shared.cost.step import DecodeTimes


class PrimeTimes:
    """Step times in which each thing counted has a weight of its own."""

    def decode(self, batch: int, /) -> DecodeTimes:
        return DecodeTimes(batch, 1009 + 101 * batch, 13)

    def step_ps(self, batch: int, context: int, prefill: PrefillWork, /) -> int:
        return (
            1009
            + 101 * batch
            + 13 * context
            + 7 * prefill.tokens
            + 211 * prefill.chunks
            + 3 * prefill.pairs
            + 307 * prefill.ending
            + 17 * prefill.context
        )


@dataclass(eq=False)
class Request:
    key: str
    prompt: int
    tokens_max: int
    known: int
    hashes: tuple[int, ...] = ()
    piece: int = 16
    computed: int = 0
    blocks: int = 0  # all it holds, shared ones included
    held: list[int] = field(default_factory=list[int])  # hashes of cached blocks it refers to
    prefilled: bool = False
    started: bool = False


@dataclass
class Step:
    duration_ps: int = 0
    first: list[str] = field(default_factory=list[str])
    resumed: list[str] = field(default_factory=list[str])
    ended: list[str] = field(default_factory=list[str])
    preempted: list[str] = field(default_factory=list[str])


class NaiveBatch:
    def __init__(self, limits: EngineLimits, *, kv_blocks: int) -> None:
        self.limits, self.kv_blocks = limits, kv_blocks
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.sizes: dict[int, int] = {}  # blocks behind each hash that can be found
        self.idle: list[int] = []  # hashes nobody refers to, least recently used first
        self.made = 0

    @property
    def live(self) -> list[Request]:
        return [*self.running, *self.waiting]

    @property
    def used(self) -> int:
        private = sum(r.blocks - sum(self.sizes[h] for h in r.held) for r in self.running)
        shared = {h for r in self.running for h in r.held}
        return private + sum(self.sizes[h] for h in shared)

    @property
    def pending(self) -> int:
        return sum(r.tokens_max - (r.known if r.prefilled else r.computed) for r in self.live)

    def remove(self, key: str) -> None:
        for requests in (self.running, self.waiting):
            for request in [r for r in requests if r.key == key]:
                requests.remove(request)
                self._leave(request)

    def step(self) -> Step:
        step = Step()
        decoded = self._decode(step)
        context = sum(r.computed for r in decoded)
        chunks = self._prefill(self.limits.batch_tokens_max - len(decoded), step)
        work = PrefillWork(
            tokens=sum(count for _, count in chunks),
            chunks=len(chunks),
            pairs=sum(r.computed - i for r, count in chunks for i in range(count)),
            ending=sum(r.computed == r.known for r, _ in chunks),
            context=sum(r.computed for r, _ in chunks),
        )
        step.duration_ps = PrimeTimes().step_ps(len(decoded), context, work)
        for request in [*decoded, *(r for r, _ in chunks)]:
            if request.computed < request.known:
                continue
            if not request.prefilled:
                (step.resumed if request.started else step.first).append(request.key)
            request.prefilled = request.started = True
            request.known += 1
            self.made += 1
            if request.known == request.tokens_max:
                step.ended.append(request.key)
        for key in step.ended:
            self.remove(key)
        return step

    def _decode(self, step: Step) -> list[Request]:
        decoded: list[Request] = []
        for request in list(self.running):
            if request not in self.running or not request.prefilled:
                continue
            if request.computed == request.blocks * self.limits.block_tokens:
                while request in self.running and self.used == self.kv_blocks:
                    step.preempted.append(self._preempt().key)
                if request not in self.running:
                    continue
                request.blocks += 1
                self._evict()
            request.computed += 1
            decoded.append(request)
        return decoded

    def _preempt(self) -> Request:
        victim = self.running.pop()
        self._leave(victim)
        victim.computed, victim.blocks, victim.prefilled = 0, 0, False
        self.waiting.insert(0, victim)
        return victim

    def _prefill(self, budget: int, step: Step) -> list[tuple[Request, int]]:
        chunks: list[tuple[Request, int]] = []
        for request in self.running:
            if not request.prefilled and budget:
                budget -= self._compute(request, budget, chunks)
        while budget and self.waiting and not step.preempted and self._admit():
            budget -= self._compute(self.running[-1], budget, chunks)
        return chunks

    def _admit(self) -> bool:
        if len(self.running) == self.limits.running_max:
            return False
        request, size = self.waiting[0], self.limits.block_tokens
        found: list[int] = []
        for hash_ in request.hashes:
            if hash_ not in self.sizes:
                break
            found.append(hash_)
        blocks = -(-request.known // size)
        in_use = {h for r in self.running for h in r.held}
        need = blocks - sum(self.sizes[h] for h in found if h in in_use)
        if self.running and need > self.kv_blocks - self.used - len(self.running):
            return False
        request.held = found
        request.blocks = blocks
        self.idle = [h for h in self.idle if h not in found]
        hit = sum(self.sizes[h] for h in found) * size
        request.computed = min(hit, (request.known - 1) // size * size)
        self.running.append(self.waiting.pop(0))
        self._evict()
        return True

    def _compute(self, request: Request, budget: int, chunks: list[tuple[Request, int]]) -> int:
        count = min(budget, request.known - request.computed)
        request.computed += count
        chunks.append((request, count))
        size, piece = self.limits.block_tokens, request.piece
        for i in range(len(request.held), len(request.hashes)):
            if (i + 1) * piece > request.computed or request.hashes[i] in self.sizes:
                break
            self.sizes[request.hashes[i]] = (i + 1) * piece // size - i * piece // size
            request.held.append(request.hashes[i])
        return count

    def _leave(self, request: Request) -> None:
        held, request.held = request.held, []
        others = {h for r in self.running if r is not request for h in r.held}
        self.idle += [h for h in reversed(held) if h not in others]

    def _evict(self) -> None:
        while self.used + sum(self.sizes[h] for h in self.idle) > self.kv_blocks:
            del self.sizes[self.idle.pop(0)]
