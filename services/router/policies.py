"""The routing policies: each picks one of the options, given its memory.

All have the signature ``Policy`` and depend on nothing else: same options, ask and memory give the
same choice. Several routers act without knowing of each other on the same reports; what keeps them
from choosing the same replica at the same moment is the instance's own phase in its memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

from services.router.config import PolicyName
from services.router.loads import ReplicaLoad

DRAWS_MODULUS = 1 << 32
PREFIX_HASHES_MAX = 256  # longest prefix remembered, in hashes
HOLDERS_MAX = 8  # replicas remembered as holding one prefix
KV_BLOCK_TOKENS = 16  # of a KV block, where only a prompt's tokens are known


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica of the plan. ``index`` is its place among the model's replicas."""

    index: int
    replica_id: str
    leader_id: str
    load: ReplicaLoad


@dataclass(slots=True)
class Options:
    """Who may serve one request, as parallel lists because one is made per request. ``loads`` are
    pressures (1: every slot taken), ``shares`` the plan's for the request's type."""

    candidates: list[Candidate]
    loads: list[float]
    shares: list[float]


@dataclass(frozen=True, slots=True)
class Ask:
    request_type: int
    prefix_hashes: tuple[int, ...] = ()
    input_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Memory:
    """What policies remember of one model between requests. All of it may be lost."""

    instance_id: str
    load_gain: float
    prefix_load_slack: float
    prefixes_max: int
    size: int = 0
    credits: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    last_index: int = -1
    draws: int = 0
    homes: dict[int, str] = field(default_factory=dict[int, str])
    holders: dict[int, tuple[str, ...]] = field(default_factory=dict[int, tuple[str, ...]])

    def __post_init__(self) -> None:
        self.draws = crc32(self.instance_id.encode())

    def replan(self, size: int) -> None:
        """Start on a plan of ``size`` replicas; homes of prefixes are kept, ids outlive plans."""
        self.size = size
        self.credits.clear()
        self.last_index = self.draw(size) if size else -1

    def credits_of(self, request_type: int) -> list[float]:
        """Credit of each replica for this type. They start at the instance's own phase, with sum
        0, so that two routers do not walk through the replicas in step."""
        known = self.credits.get(request_type)
        if known is None:
            phases = [self.draw(DRAWS_MODULUS) / DRAWS_MODULUS for _ in range(self.size)]
            mean = sum(phases) / max(1, self.size)
            known = self.credits[request_type] = [phase - mean for phase in phases]
        return known

    def draw(self, bound: int) -> int:
        """Next of the instance's own deterministic sequence (a linear congruential generator with
        Knuth's MMIX constants; the high bits are the good ones)."""
        self.draws = (self.draws * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (self.draws >> 32) * bound >> 32


Policy = Callable[[Options, Ask, Memory], int]
"""Position of the choice among the options, of which there is at least one."""


def plan(options: Options, ask: Ask, memory: Memory) -> int:
    """The plan's shares, corrected by load: smooth weighted round robin.

    Each option earns credit by its share and the richest one pays 1 for being chosen, as in nginx
    (I. Sysoev, 2012): over any run of requests each replica gets its share to within about one
    request. A share counts in full while its replica has room and shrinks with the square of its
    pressure, so the plan holds in calm and bends under a queue.
    """
    gain, loads = memory.load_gain, options.loads
    earned = [
        share / (1.0 + gain * load * load)
        for share, load in zip(options.shares, loads, strict=True)
    ]
    total = sum(earned)
    if total <= 0.0:  # only replicas left to which the plan gives nothing of this type
        earned = [1.0 / (1.0 + gain * load * load) for load in loads]
        total = sum(earned)
    credits_ = memory.credits_of(ask.request_type)
    best, best_index, best_credit = -1, -1, float("-inf")
    for position, (candidate, income) in enumerate(zip(options.candidates, earned, strict=True)):
        if income <= 0.0:
            continue
        index = candidate.index
        credit = credits_[index] = credits_[index] + income / total
        if credit > best_credit:
            best, best_index, best_credit = position, index, credit
    credits_[best_index] -= 1.0
    return best


def least_load(options: Options, ask: Ask, memory: Memory) -> int:
    """The less loaded of two options from the instance's sequence.

    Two, not all: with reports a tenth of a second old, routers that all choose the minimum flood
    it together (M. Mitzenmacher, "How useful is old information?", 2000).
    """
    del ask
    count, loads = len(options.candidates), options.loads
    if count == 1:
        return 0
    first = memory.draw(count)
    second = (first + 1 + memory.draw(count - 1)) % count
    return first if loads[first] <= loads[second] else second


def round_robin(options: Options, ask: Ask, memory: Memory) -> int:
    """The next replica after the last one chosen, in the plan's order, whatever its load."""
    del ask
    choice = 0
    for position, candidate in enumerate(options.candidates):
        if candidate.index > memory.last_index:
            choice = position
            break
    memory.last_index = options.candidates[choice].index
    return choice


def prefix_affinity(options: Options, ask: Ask, memory: Memory) -> int:
    """The replica that last got the longest known prefix of the prompt, since it may still hold
    its KV blocks; as ``plan`` does when none is known or its home is too busy."""
    hashes = ask.prefix_hashes[:PREFIX_HASHES_MAX]
    choice = -1
    if hashes:
        positions = {c.replica_id: p for p, c in enumerate(options.candidates)}
        limit = min(options.loads) + memory.prefix_load_slack
        for prefix in reversed(hashes):
            home = positions.get(memory.homes.get(prefix, ""), -1)
            if home >= 0 and options.loads[home] <= limit:
                choice = home
                break
    if choice < 0:
        choice = plan(options, ask, memory)
    _settle(memory, hashes, options.candidates[choice].replica_id)
    return choice


def _settle(memory: Memory, hashes: tuple[int, ...], replica_id: str) -> None:
    """Make ``replica_id`` the home of these prefixes; the least recently used are forgotten. The
    longest goes in first: when room is short, the short prefixes that many share remain."""
    homes = memory.homes
    for prefix in reversed(hashes):
        homes.pop(prefix, None)
        homes[prefix] = replica_id
    while len(homes) > memory.prefixes_max:
        del homes[next(iter(homes))]


def free_kv(options: Options, ask: Ask, memory: Memory) -> int:
    """The replica with the most free KV blocks for each of its requests, the new one included.

    Llumnix's dispatch (Sun et al., OSDI 2024): an instance's "freeness" is its free blocks, less
    what its waiting requests will take, over its requests. Reports do not say what the waiting ones
    will take: they, and our own decisions that no report shows yet, are taken to need what a
    running request holds on average.
    """
    del ask, memory
    best, most_free = 0, float("-inf")
    for position, candidate in enumerate(options.candidates):
        load = candidate.load
        report = load.report
        if report is None or report.kv_blocks_total <= 0:
            free = -options.loads[position]  # behind every replica that has room
        else:
            requests = load.in_flight
            running = report.running or 1
            queued_blocks = (requests - report.running) * report.kv_blocks_used / running
            left = report.kv_blocks_total - report.kv_blocks_used - queued_blocks
            free = left / (requests + 1)
        if free > most_free:
            best, most_free = position, free
    return best


def kv_cost(options: Options, ask: Ask, memory: Memory) -> int:
    """The replica with the fewest blocks to compute and to hold: NVIDIA Dynamo's router cost.

    Blocks of prompts to prefill there (the new one's less its cached prefix, and those that wait)
    plus blocks of running requests, with an overlap weight of 1 and the minimum taken, as its
    documentation has it by default (router-design.md). It follows KV events; we remember to
    which replicas a prefix went, and take a waiting request to hold what a running one does.
    """
    hashes = ask.prefix_hashes[:PREFIX_HASHES_MAX]
    cached = _cached_hashes(memory, hashes)
    prompt_blocks = ask.input_tokens / KV_BLOCK_TOKENS
    hash_blocks = prompt_blocks / len(hashes) if hashes else 0.0
    best, least = 0, float("inf")
    for position, candidate in enumerate(options.candidates):
        load = candidate.load
        report = load.report
        cost = prompt_blocks - cached.get(candidate.replica_id, 0) * hash_blocks
        if report is not None:
            waiting = load.in_flight - report.running
            each = report.kv_blocks_used / report.running if report.running else prompt_blocks
            cost += report.kv_blocks_used + 2.0 * waiting * each  # to prefill, then to hold
        if cost < least:
            best, least = position, cost
    if hashes:
        _hold(memory, hashes, options.candidates[best].replica_id)
    return best


def _cached_hashes(memory: Memory, hashes: tuple[int, ...]) -> dict[str, int]:
    """How many leading hashes each replica holds, for those that hold any."""
    cached: dict[str, int] = {}
    for count, prefix in enumerate(hashes, 1):
        holders = memory.holders.get(prefix)
        if not holders:
            break
        for replica_id in holders:
            if cached.get(replica_id, 0) == count - 1:
                cached[replica_id] = count
    return cached


def _hold(memory: Memory, hashes: tuple[int, ...], replica_id: str) -> None:
    """Remember that ``replica_id`` holds these prefixes; forgets as ``_settle`` does."""
    holders = memory.holders
    for prefix in reversed(hashes):
        others = [other for other in holders.pop(prefix, ()) if other != replica_id]
        holders[prefix] = (*others[-(HOLDERS_MAX - 1) :], replica_id)
    while len(holders) > memory.prefixes_max:
        del holders[next(iter(holders))]


POLICIES: dict[PolicyName, Policy] = {
    "plan": plan,
    "least_load": least_load,
    "round_robin": round_robin,
    "prefix_affinity": prefix_affinity,
    "free_kv": free_kv,
    "kv_cost": kv_cost,
}
