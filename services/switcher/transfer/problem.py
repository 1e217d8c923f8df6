"""What a planner of copies is asked, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.cost.profile import GpuFacts
from shared.messages.plans import ReplicaSpec
from shared.placement.copies import Copy
from shared.placement.sheets import ModelShape, Span

EMPTY: Span = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Bytes per second in one direction. ``local``: within one GPU's memory. ``peer``: of each GPU,
    in and out, to the rest. ``network``: of each node, in and out. ``disk``: of each node.
    ``host``: of each GPU, from its node's memory, which bytes from the disk pass.

    ``one_memory``: the devices of a node are its CPU. Then there are no links between them: every
    copy within the node reads and writes the one memory, at ``local``, which all of them share."""

    local: float = 1.3e12
    peer: float = 3.5e11
    host: float = 5.0e10
    network: float = 3.5e10
    disk: float = 3.0e9
    one_memory: bool = False

    @classmethod
    def of(cls, facts: GpuFacts) -> "Links":
        """Those of a kind of GPU that has been measured. The node's network link is that of one
        GPU times those of the node: each has its own adapter where links are that fast."""
        return cls(
            local=facts.local.bytes_per_s,
            peer=facts.peer.bytes_per_s,
            host=facts.host.bytes_per_s,
            network=facts.network.bytes_per_s * facts.gpus_per_node,
            disk=facts.disk.bytes_per_s,
        )

    @classmethod
    def cpu(cls) -> "Links":
        """Nodes whose devices are virtual: what a server's memory, a 10 Gbit/s adapter and a disk
        give. Only ratios matter, and within one node not even those."""
        return cls(local=5e9, peer=5e9, host=5e9, network=1.2e9, disk=1e9, one_memory=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A GPU now; its weights follow from its replica. ``cache_bytes``: of the KV cache, used or
    not; ``cache_used_bytes`` of them by live requests."""

    cache_bytes: int = 0
    cache_used_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Requests of ``source``, which goes, that ``target`` takes over: ``tokens`` in the KV cache, 0
    if none are there yet; the way is planned all the same."""

    source: str  # replica_id
    target: str
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferProblem:
    """A switch, as far as bytes are concerned. GPUs are named as in plans, and so are workers.

    ``leaving`` and ``staying`` hold all their weights, ``arriving`` none. ``budget_bytes``: of a
    GPU for weights and KV cache; absent or 0: unbounded. ``cache_bytes``: the KV cache that an
    arriving rank is configured to have; absent or 0: all that is left, or where that is unbounded,
    what it decides itself. ``cache_tokens_min``: with less KV cache a replica is of no use.
    ``headroom``: by which factor the KV cache of an arriving rank exceeds what is moved to it, as
    requests go on growing (OServe takes 1.1 to 1.2, as reported in secondary notes)."""

    models: Mapping[str, ModelShape]
    nodes: Mapping[str, str]  # GPU -> node
    leaving: tuple[ReplicaSpec, ...] = ()
    staying: tuple[ReplicaSpec, ...] = ()
    arriving: tuple[ReplicaSpec, ...] = ()
    dead: frozenset[str] = frozenset()  # GPUs whose worker is gone
    moves: tuple[Move, ...] = ()
    links: Links = field(default_factory=Links)
    budget_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    held: Mapping[str, Held] = field(default_factory=dict[str, Held])
    cache_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    cache_tokens_min: int = 1
    headroom: float = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    """``copies[worker_id][replica_id]``: what a rank fetches of every sheet, the cache included.
    Each cell that it needs is in exactly one of them, those in place too (``source`` is the worker
    itself), so that a rank needs to know nothing else. Copies of the cache are of stage 0; they
    are made when requests are taken over.

    ``stages[k]``: the layers whose weights leaving replicas may free when the copies of stage k
    are done everywhere; empty for the only stage of a switch whose old and new fit side by side.
    A rank's memory for a layer is counted from the stage in which it is fetched.

    ``bytes_by_link``: "<source>><target>" of workers, "disk" as a source. ``bytes_bound``: the
    least that any plan moves: what is not in place, from disks too. ``cache_bytes``: the part of
    either that is KV cache. ``seconds``: of the busiest link, stages and the KV cache one after
    the other; ``seconds_bound``: no plan of these stages does better; ``cache_seconds``: the part
    in which requests wait for their KV cache. ``cache_bytes_max``: of each arriving rank, as long
    as the old replicas are there; 0 for as configured. ``replayed``: moves without KV cache, as
    (source, target). ``infeasible``: why there is no plan; all else is empty then."""

    copies: dict[str, dict[str, tuple[Copy, ...]]] = field(
        default_factory=dict[str, dict[str, tuple[Copy, ...]]]
    )
    stages: tuple[Span, ...] = (EMPTY,)
    bytes_by_link: dict[str, int] = field(default_factory=dict[str, int])
    bytes_bound: int = 0
    bytes_in_place: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0
    seconds_bound: float = 0.0
    cache_seconds: float = 0.0
    cache_bytes_max: dict[str, int] = field(default_factory=dict[str, int])
    replayed: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    infeasible: str = ""
