"""What holds of the router for any mesh."""

from collections import Counter
from typing import Any, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.config import PolicyName, RouterConfig
from services.router.core import HoldDeadline, Router
from services.router.loads import ReplicaLoad
from services.router.policies import Ask, Candidate, Memory, Options, plan
from shared.core import Query, Reply, Started
from shared.messages.demand import DemandReport, TypeDemand
from shared.messages.plans import DeploymentPlan, PlanInForce, ReplicaSpec
from shared.messages.replicas import ReplicaPhase, ReplicaReport
from shared.messages.requests import (
    RequestCompleted,
    RequestsCompleted,
    RouteReply,
    RouteRequest,
)

IDS = tuple(f"r{i}" for i in range(6))
POLICY = st.sampled_from(get_args(PolicyName))
PHASE = st.sampled_from(get_args(ReplicaPhase))
NOW_S = 100.0


def plan_of(ids: tuple[str, ...], weights: dict[str, dict[str, float]]) -> DeploymentPlan:
    specs = tuple(
        ReplicaSpec(replica_id=id_, model_id="m", parallelism="tp1pp1", gpus=(f"g-{id_}",))
        for id_ in ids
    )
    return DeploymentPlan(plan_id="-".join(ids), replicas=specs, weights=weights)


@st.composite
def replica_reports(draw: st.DrawFn) -> ReplicaReport:
    id_ = draw(st.sampled_from(IDS))
    fields: dict[str, Any] = {
        name: draw(st.integers(0, 6))
        for name in ("running", "waiting", "running_max", "waiting_max", "kv_blocks_used")
    }
    return ReplicaReport(
        replica_id=id_,
        worker_id=draw(st.sampled_from([f"g-{id_}", "elsewhere"])),
        incarnation=draw(st.sampled_from(["a", "b"])),
        epoch=1,
        phase=draw(PHASE),
        kv_blocks_total=draw(st.integers(0, 6)),
        **fields,
    )


def requests() -> st.SearchStrategy[RouteRequest]:
    return st.builds(
        RouteRequest,
        request_id=st.just("q"),
        model_id=st.sampled_from(["m", "m", "m", "other"]),
        input_tokens=st.integers(-1, 10**7),
        output_tokens_max=st.integers(-1, 10**7),
        tenant=st.sampled_from(["", "a", "b", "c"]),
        prefix_hashes=st.lists(st.integers(0, 20), max_size=6).map(tuple),
        excluded=st.lists(st.sampled_from(IDS), max_size=3).map(tuple),
    )


def available(
    report: ReplicaReport | None, age_s: float, *, phase: ReplicaPhase = "serving"
) -> bool:
    """The rule of the README in plain words, written without the router's own code."""
    if report is None or age_s > 3.0 or report.phase != phase:
        return False
    return report.waiting_max == 0 or report.waiting < report.waiting_max


@given(
    policy=POLICY,
    reports=st.dictionaries(
        st.sampled_from(IDS), st.tuples(replica_reports(), st.floats(0.0, 5.0)), max_size=6
    ),
    request=requests(),
    weights=st.dictionaries(st.sampled_from(IDS), st.floats(0.0, 1.0)),
)
def test_chooses_an_available_replica_exactly_when_there_is_one(
    policy: PolicyName,
    reports: dict[str, tuple[ReplicaReport, float]],
    request: RouteRequest,
    weights: dict[str, float],
) -> None:
    """Requests would go to a replica that drains, is dead, or just failed them, while another
    could serve; or be refused although one could, or although one keeps them in a switch."""
    router = Router(RouterConfig(policy=policy), models=("m",), instance_id="x")
    router.step(PlanInForce(epoch=1, plan=plan_of(IDS, {"*": weights})), 0.0)
    open_: set[str] = set()
    keeping: set[str] = set()
    for id_, (report, age_s) in reports.items():
        changed = ReplicaReport(
            replica_id=id_,
            worker_id=f"g-{id_}",
            incarnation="a",
            epoch=1,
            phase=report.phase,
            running=report.running,
            waiting=report.waiting,
            running_max=report.running_max,
            waiting_max=report.waiting_max,
        )
        router.step(changed, NOW_S - age_s)
        if available(changed, NOW_S - (NOW_S - age_s)):
            open_.add(id_)
        if available(changed, NOW_S - (NOW_S - age_s), phase="paused"):
            keeping.add(id_)
    router.step(HoldDeadline(), NOW_S)
    if request.model_id == "other":
        assert route(router, request).failure == "unknown_model"
        return
    reply = route(router, request)
    excluded = set(request.excluded)
    tiers = (open_ - excluded, keeping - excluded, open_, keeping)
    preferred = next(filter(None, tiers), None)
    if preferred:
        assert reply.replica_id in preferred
    else:
        assert reply.failure in ("no_replica", "overloaded")
        assert reply.retry_after_s > 0.0
    assert reply.reason


def route(router: Router, request: RouteRequest) -> RouteReply:
    (message,) = [
        e.message for e in router.step(Query(request, "to"), NOW_S) if isinstance(e, Reply)
    ]
    assert isinstance(message, RouteReply)
    router.check()
    return message


@given(
    weights=st.lists(st.integers(0, 100), min_size=1, max_size=8).filter(any), load=st.floats(0, 3)
)
def test_weights_are_kept_when_loads_are_equal(weights: list[int], load: float) -> None:
    """The scheduler's shares would not be what the replicas get."""
    total = sum(weights)
    options = options_of([w / total for w in weights], [load] * len(weights))
    memory = memory_of(len(weights))
    counts = Counter(plan(options, Ask(0), memory) for _ in range(500))
    for position, weight in enumerate(weights):
        assert abs(counts[position] - 500 * weight / total) <= 2.0
        assert weight > 0 or counts[position] == 0


@settings(max_examples=60)
@given(
    rounds=st.lists(
        st.lists(
            st.tuples(st.booleans(), st.floats(0, 1), st.floats(0, 5)), min_size=4, max_size=4
        ),
        min_size=1,
        max_size=60,
    )
)
def test_credit_stays_small_whatever_comes_and_goes(
    rounds: list[list[tuple[bool, float, float]]],
) -> None:
    """A replica that was away would be owed a thousand requests and get them all at once."""
    memory = memory_of(4)
    for states in rounds:
        everyone = options_of([share for _, share, _ in states], [load for *_, load in states])
        kept = [i for i, (there, _, _) in enumerate(states) if there]
        if not kept:
            continue
        options = Options(
            [everyone.candidates[i] for i in kept],
            [everyone.loads[i] for i in kept],
            [everyone.shares[i] for i in kept],
        )
        assert 0 <= plan(options, Ask(0), memory) < len(kept)
        assert all(abs(credit) <= 4.0 for credit in memory.credits_of(0))


def memory_of(size: int) -> Memory:
    memory = Memory(instance_id="x", load_gain=4.0, prefix_load_slack=0.2, prefixes_max=50)
    memory.replan(size)
    return memory


def options_of(shares: list[float], loads: list[float]) -> Options:
    candidates = [
        Candidate(index=i, replica_id=f"r{i}", leader_id="g", load=ReplicaLoad(decisions_max=4))
        for i in range(len(shares))
    ]
    return Options(candidates, loads, shares)


def completions() -> st.SearchStrategy[RequestsCompleted]:
    one = st.builds(
        RequestCompleted,
        request_id=st.just("q"),
        outcome=st.sampled_from(["completed", "failed"]),
        model_id=st.sampled_from(["m", "other"]),
        tenant=st.text(max_size=2),
        input_tokens=st.integers(-1, 10**6),
        output_tokens=st.integers(-1, 10**6),
    )
    return st.builds(
        RequestsCompleted, ingress_id=st.just("i"), completed=st.lists(one, max_size=4).map(tuple)
    )


def demands() -> st.SearchStrategy[DemandReport]:
    lengths = st.floats(-1, 1e6)
    one = st.builds(
        TypeDemand,
        request_type=st.integers(0, 3),
        requests=st.integers(0, 100),
        arrivals_rps=st.just(1.0),
        input_tokens_mean=lengths,
        output_tokens_mean=lengths,
        input_tokens_centroid=lengths,
        output_tokens_centroid=lengths,
    )
    types = st.lists(one, max_size=4, unique_by=lambda t: t.request_type).map(tuple)
    return st.builds(
        DemandReport,
        model_id=st.sampled_from(["m", "other"]),
        window_start_s=st.just(0.0),
        window_s=st.just(10.0),
        types=types,
    )


def plans() -> st.SearchStrategy[PlanInForce]:
    row = st.dictionaries(st.sampled_from(IDS), st.floats(0, 1) | st.floats(), max_size=3)
    weights = st.dictionaries(st.sampled_from(["*", "0", "1", "2"]), row, max_size=3)
    ids = st.lists(st.sampled_from(IDS), unique=True, max_size=6).map(tuple)
    return st.builds(PlanInForce, epoch=st.integers(0, 3), plan=st.builds(plan_of, ids, weights))


@settings(max_examples=150)
@given(
    policy=POLICY,
    events=st.lists(
        st.tuples(
            st.floats(0, 2),
            st.one_of(
                requests(),
                requests(),
                replica_reports(),
                plans(),
                demands(),
                completions(),
                st.just(HoldDeadline()),
            ),
        ),
        max_size=60,
    ),
)
def test_survives_any_history_within_its_bounds(
    policy: PolicyName, events: list[tuple[float, Any]]
) -> None:
    """Some order of messages would end the router, leave a question unanswered, or grow it."""
    config = RouterConfig(
        policy=policy, replicas_max=4, decisions_max=3, tenants_max=2, prefixes_max=5, parked_max=3
    )
    router = Router(config, models=("m",), instance_id="x")
    router.step(Started(), 0.0)
    now_s, asked, answered = 0.0, 0, 0
    for wait_s, event in events:
        now_s += wait_s
        question = isinstance(event, RouteRequest)
        asked += question
        effects = router.step(Query(event, "to") if question else event, now_s)
        answered += sum(isinstance(e, Reply) for e in effects)
        router.check()
    answered += sum(isinstance(e, Reply) for e in router.step(HoldDeadline(), now_s))
    assert answered == asked
