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


POLICIES: dict[PolicyName, Policy] = {
    "plan": plan,
    "least_load": least_load,
    "round_robin": round_robin,
    "prefix_affinity": prefix_affinity,
}
