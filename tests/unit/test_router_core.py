"""The router's core: what it learns, what it answers, and what it says about it."""

from typing import Any

import pytest

from services.router.config import PolicyName, RouterConfig
from services.router.core import HoldDeadline, Router
from shared.core import Draining, Load, Loaded, Log, Query, Reply, SetTimer, Started
from shared.errors import ConfigInvalid
from shared.messages.demand import (
    DemandReport,
    ModelTypes,
    ProfilerState,
    TypeCentroid,
    TypeDemand,
)
from shared.messages.plans import DeploymentPlan, PlanInForce, ReplicaSpec, StoredPlan
from shared.messages.replicas import ReplicaPhase, ReplicaReport
from shared.messages.requests import (
    RequestCompleted,
    RequestsCompleted,
    RouteReply,
    RouteRequest,
)


def plan_of(*ids: str, plan_id: str = "p1", **weights: dict[str, float]) -> DeploymentPlan:
    return DeploymentPlan(
        plan_id=plan_id,
        replicas=tuple(
            ReplicaSpec(replica_id=id_, model_id="m", parallelism="tp1pp1", gpus=(f"gpu-{id_}",))
            for id_ in ids
        ),
        weights={name.replace("any", "*").removeprefix("t"): row for name, row in weights.items()},
    )


def report(
    id_: str, *, phase: ReplicaPhase = "serving", **fields: Any
) -> ReplicaReport:  # any field
    known: dict[str, Any] = {
        "worker_id": f"gpu-{id_}",
        "incarnation": "a",
        "epoch": 1,
        "running_max": 8,
        "waiting_max": 4,
    }
    return ReplicaReport(replica_id=id_, phase=phase, **(known | fields))


def ask(id_: str = "q", **fields: Any) -> Query:
    known: dict[str, Any] = {"model_id": "m", "input_tokens": 10, "output_tokens_max": 100}
    return Query(RouteRequest(request_id=id_, **(known | fields)), "inbox")


def router_of(
    plan: DeploymentPlan,
    *reports: ReplicaReport,
    **config: Any,
) -> Router:
    """A router at time 0 that knows ``plan`` and has taken ``reports``."""
    router = Router(RouterConfig(**config), models=("m",), instance_id="router-1")
    router.step(Started(), 0.0)
    router.step(PlanInForce(epoch=1, plan=plan), 0.0)
    for each in reports:
        router.step(each, 0.0)
    router.step(HoldDeadline(), 0.0)
    return router


def reply_of(router: Router, query: Query, now_s: float = 0.0) -> RouteReply:
    (message,) = [e.message for e in router.step(query, now_s) if isinstance(e, Reply)]
    assert isinstance(message, RouteReply)
    router.check()
    return message


def test_the_first_thing_it_does_is_to_find_plan_and_types() -> None:
    """A restarted router would know nothing until the switcher's and profiler's next message."""
    router = Router(RouterConfig(start_hold_s=0.3), models=("m",), instance_id="r")
    assert router.step(Started(), 5.0) == [
        Load("plan", StoredPlan),
        Load("profiler", ProfilerState),
        SetTimer(5.3, HoldDeadline()),
    ]


def test_answers_with_replica_leader_epoch_and_reason() -> None:
    """The ingress would not know where to submit, or an operator why a request went there."""
    router = router_of(plan_of("a"), report("a", running=3, waiting=1))
    assert reply_of(router, ask("q7", attempt=2)) == RouteReply(
        request_id="q7",
        attempt=2,
        replica_id="a",
        leader_id="gpu-a",
        epoch=1,
        request_type=-1,
        reason="plan: type -1, weight 1.00, load 4/8, 1 candidates",
    )


def test_questions_at_start_wait_until_every_replica_was_heard() -> None:
    """A restarted router would refuse requests of a healthy mesh, or send all that came in its
    first moments to the one replica that reported first."""
    router = Router(RouterConfig(), models=("m",), instance_id="r")
    router.step(Started(), 0.0)
    assert router.step(ask("q1"), 0.0) == []
    stored = StoredPlan(epoch=3, in_force=plan_of("a", "b"))
    router.step(Loaded(key="plan", message=stored, revision=7), 0.01)
    assert router.step(ask("q2"), 0.02) == []
    assert router.step(report("a"), 0.03) == []
    replies = [e.message for e in router.step(report("b"), 0.04) if isinstance(e, Reply)]
    chosen = {r.replica_id for r in replies if isinstance(r, RouteReply)}
    assert chosen == {"a", "b"}
    router.check()


@pytest.mark.parametrize("end", [HoldDeadline(), Draining()])
def test_the_hold_ends_even_when_nothing_is_heard(end: HoldDeadline | Draining) -> None:
    """Clients would hang on a mesh that is down, instead of being told so."""
    router = Router(RouterConfig(), models=("m",), instance_id="r")
    router.step(Started(), 0.0)
    router.step(ask("q1"), 0.0)
    reply, log = router.step(end, 0.3)
    assert isinstance(reply, Reply)
    assert isinstance(log, Log)
    assert isinstance(reply.message, RouteReply)
    assert (reply.message.failure, reply.message.retry_after_s) == ("no_replica", 0.5)
    assert reply.message.reason == "no plan heard yet: is the switcher running?"


def test_parked_questions_are_bounded() -> None:
    """A storm of requests during a start would take memory without end."""
    router = Router(RouterConfig(parked_max=2), models=("m",), instance_id="r")
    router.step(Started(), 0.0)
    assert router.step(ask("q1"), 0.0) == []
    assert router.step(ask("q2"), 0.0) == []
    assert reply_of(router, ask("q3")).failure == "no_replica"


@pytest.mark.parametrize("phase", ["starting", "preparing", "prepared", "draining", "failed"])
def test_a_replica_that_does_not_serve_gets_nothing(phase: ReplicaPhase) -> None:
    """Requests would be refused by a replica on its way out, and lose their time."""
    router = router_of(plan_of("a", "b"), report("a", phase=phase), report("b"))
    assert {reply_of(router, ask(f"q{i}")).replica_id for i in range(4)} == {"b"}


def test_a_paused_replica_keeps_requests_when_nobody_serves() -> None:
    """In a live switch of all replicas, new requests would be refused for as long as it takes."""
    router = router_of(plan_of("a", "b"), report("a", phase="paused"), report("b"))
    assert {reply_of(router, ask(f"q{i}")).replica_id for i in range(4)} == {"b"}
    router.step(report("b", phase="paused"), 0.0)
    assert {reply_of(router, ask(f"p{i}")).replica_id for i in range(4)} == {"a", "b"}
    router.step(report("b"), 0.0)
    assert {reply_of(router, ask(f"s{i}")).replica_id for i in range(4)} == {"b"}
    full: dict[str, Any] = {"running": 8, "waiting": 4}
    router.step(report("a", phase="paused", **full), 0.0)
    router.step(report("b", phase="prepared"), 0.0)
    reply = reply_of(router, ask())
    assert (reply.failure, reply.reason) == ("overloaded", "2 replicas in plan: 1 full, 1 prepared")


def test_after_the_flip_nothing_goes_to_old_replicas() -> None:
    """A request would wait on a replica that is about to be stopped, paused or not."""
    router = router_of(plan_of("a", "b"), report("a", phase="paused"), report("b", phase="paused"))
    router.step(report("c"), 0.0)
    router.step(PlanInForce(epoch=2, plan=plan_of("c")), 0.0)
    assert {reply_of(router, ask(f"q{i}")).replica_id for i in range(4)} == {"c"}
    router.step(report("c", phase="failed"), 0.0)
    assert reply_of(router, ask()).failure == "no_replica"


def test_a_silent_replica_fades_and_is_then_left_out() -> None:
    """Requests would go on flowing to a worker that died a minute ago."""
    router = router_of(plan_of("a", "b"), report("a"), report("b"))
    router.step(report("b", running=2), 2.9)
    fading = [reply_of(router, ask(), 2.9).replica_id for _ in range(4)]
    assert fading.count("a") <= 1
    router.step(report("b", running=2), 3.5)
    assert [reply_of(router, ask(), 3.5).replica_id for _ in range(4)] == ["b"] * 4


def test_nothing_serves() -> None:
    """The ingress would not know that waiting helps, nor the operator what is wrong."""
    router = router_of(plan_of("a", "b", "c"), report("a", phase="draining"), report("b"))
    reply = reply_of(router, ask(), 9.0)
    assert (reply.failure, reply.retry_after_s) == ("no_replica", 0.5)
    assert reply.reason == "3 replicas in plan: 3 not reporting"
    router.step(report("b", phase="starting"), 9.0)
    assert reply_of(router, ask(), 9.0).reason == (
        "3 replicas in plan: 2 not reporting, 1 starting"
    )


def test_full_queues_are_overload() -> None:
    """Requests would be sent to be refused, instead of told when to come back."""
    full: dict[str, Any] = {"running": 8, "waiting": 4}
    router = router_of(plan_of("a", "b"), report("a", **full), report("b", **full))
    reply = reply_of(router, ask())
    assert (reply.failure, reply.retry_after_s) == ("overloaded", 1.0)
    assert reply.reason == "2 replicas in plan: 2 full"


def test_own_decisions_fill_a_replica_between_its_reports() -> None:
    """A burst between two reports would pile up on one replica that is full by then."""
    router = router_of(plan_of("a"), report("a", running=0, waiting=0))
    replies = [reply_of(router, ask(f"q{i}"), 0.01) for i in range(13)]
    assert [r.failure for r in replies] == [None] * 12 + ["overloaded"]
    router.step(report("a", running=8, waiting=3), 0.1)
    assert reply_of(router, ask(), 0.1).failure is None


def test_a_question_asked_again_counts_once() -> None:
    """A router that was held up finds each question many times, one for each time that an ingress
    lost its patience: it would call idle replicas full, and clients be turned away."""
    router = router_of(plan_of("a"), report("a"))
    replies = [reply_of(router, ask("q1"), 0.01) for _ in range(50)]
    assert {reply.failure for reply in replies} == {None}
    assert " load 1/8," in replies[-1].reason


def test_decisions_are_remembered_within_bounds() -> None:
    """A replica that never reports would grow the router until it ends."""
    router = router_of(plan_of("a"), report("a", waiting_max=0), decisions_max=4)
    replies = [reply_of(router, ask(f"q{i}"), 0.01) for i in range(9)]
    router.check()
    assert " load 4/8," in replies[-1].reason


def test_decisions_on_their_way_outlive_a_report() -> None:
    """A report sent just before a request arrived would hide that request from the router."""
    router = router_of(plan_of("a"), report("a"), decision_lag_s=0.05)
    reply_of(router, ask("q1"), 0.01)
    reply_of(router, ask("q2"), 0.09)
    router.step(report("a", running=1), 0.1)
    assert " load 2/8," in reply_of(router, ask("q3"), 0.1).reason


def test_a_restarted_worker_owes_nothing() -> None:
    """Requests lost with a worker's former life would count as load of its next one."""
    router = router_of(plan_of("a"), report("a"))
    for _ in range(5):
        reply_of(router, ask(), 0.09)
    router.step(report("a", incarnation="b"), 0.1)
    assert " load 0/8," in reply_of(router, ask(), 0.1).reason


def test_excluded_is_a_preference() -> None:
    """A retry would return to the replica that just failed it; or fail although that replica, the
    only one, could serve."""
    router = router_of(plan_of("a", "b"), report("a"), report("b"))
    assert {reply_of(router, ask(excluded=("a",))).replica_id for _ in range(4)} == {"b"}
    reply = reply_of(router, ask(excluded=("a", "b")))
    assert reply.failure is None
    assert reply.reason.endswith("2 candidates, excluded but alone")


def test_unknown_model_and_model_without_replicas_differ() -> None:
    """A client with a typo would be told to wait, or one during a repair that it has a typo."""
    router = router_of(plan_of())
    unknown = reply_of(router, ask(model_id="nonesuch"))
    assert (unknown.failure, unknown.reason) == ("unknown_model", "no model nonesuch here")
    missing = reply_of(router, ask(model_id="m"))
    assert missing.failure == "no_replica"
    assert missing.reason == "the plan of epoch 1 has no replica of m"


def test_models_share_a_plan_and_keep_to_themselves() -> None:
    """One model's requests would reach another's replicas, or a model with few replicas would
    mix its request types by the other model's shares."""
    specs = [
        ReplicaSpec(replica_id=id_, model_id=model_id, parallelism="tp1pp1", gpus=(f"gpu-{id_}",))
        for id_, model_id in (("a", "m"), ("b", "m"), ("c", "n"))
    ]
    weights = {"0": {"a": 0.9, "c": 0.1}, "1": {"b": 0.1, "c": 0.9}}
    plan = DeploymentPlan(plan_id="p1", replicas=tuple(specs), weights=weights)
    roomy = [report(id_, running_max=1000) for id_ in ("a", "b", "c")]
    router = router_of(plan, *roomy, load_gain=0.0)
    router.step(demand((10, 10), (10, 10)), 0.0)
    chosen = [reply_of(router, ask(f"m{i}")).replica_id for i in range(40)]
    assert abs(chosen.count("a") - chosen.count("b")) <= 2, "each of the two types is as likely"
    assert "c" not in chosen
    other = reply_of(router, ask("n0", model_id="n"))
    assert other.replica_id == "c"
    assert "weight 1.00" in other.reason


def test_a_late_plan_is_ignored() -> None:
    """A plan overtaken on the network would send requests to replicas that are gone."""
    router = router_of(plan_of("a"), report("a"), report("b"))
    router.step(PlanInForce(epoch=2, plan=plan_of("b", plan_id="p2")), 0.0)
    assert router.step(PlanInForce(epoch=1, plan=plan_of("a")), 0.5) == []
    reply = reply_of(router, ask(), 0.5)
    assert (reply.replica_id, reply.epoch) == ("b", 2)


def test_epochs_may_start_again() -> None:
    """After the state bucket was lost, routers would follow a dead plan until restarted."""
    router = router_of(plan_of("a"), report("a"), epoch_reset_s=10.0)
    effects = router.step(PlanInForce(epoch=0, plan=plan_of("b", plan_id="p2")), 10.1)
    fields = {"epoch": 0, "plan_id": "p2", "replicas": 1}
    assert effects == [Log("router.plan_followed", fields, "warning")]


def test_reports_count_only_from_the_leader_the_plan_names() -> None:
    """Requests would be sent to where a replica was before it moved, on that place's word."""
    router = router_of(plan_of("a"), report("a", worker_id="gpu-old"))
    assert reply_of(router, ask()).failure == "no_replica"
    router.step(report("a"), 0.0)
    assert reply_of(router, ask()).leader_id == "gpu-a"


def test_reports_of_strangers_are_bounded_and_never_displace_the_plan() -> None:
    """A router would grow with every replica ever seen, or forget one in use."""
    router = router_of(plan_of("a", "b"), report("a"), report("b"), replicas_max=3)
    for i in range(20):
        router.step(report(f"stranger-{i}"), 0.1 + i / 100)
        router.check()
    assert {reply_of(router, ask(), 0.5).replica_id for _ in range(4)} == {"a", "b"}


def demand(*centroids: tuple[int, int], requests: tuple[int, ...] = (10, 10)) -> DemandReport:
    return DemandReport(
        model_id="m",
        window_start_s=0.0,
        window_s=10.0,
        types=tuple(
            TypeDemand(
                request_type=i,
                requests=requests[i],
                arrivals_rps=1.0,
                input_tokens_mean=float(inputs),
                output_tokens_mean=float(outputs),
                input_tokens_centroid=float(inputs),
                output_tokens_centroid=float(outputs),
            )
            for i, (inputs, outputs) in enumerate(centroids)
        ),
    )


def test_each_type_follows_its_own_row() -> None:
    """The scheduler's split of request types over unlike replicas would have no effect."""
    plan = plan_of("a", "b", any={"a": 0.5, "b": 0.5}, t0={"a": 1.0}, t1={"b": 1.0})
    router = router_of(plan, report("a"), report("b"))
    router.step(demand((50, 100), (4000, 100)), 0.0)
    short = reply_of(router, ask(input_tokens=50))
    long = reply_of(router, ask(input_tokens=4000))
    assert (short.request_type, short.replica_id) == (0, "a")
    assert (long.request_type, long.replica_id) == (1, "b")


def test_types_are_known_again_after_a_restart() -> None:
    """For a window after each restart, requests would be routed without their type."""
    plan = plan_of("a", "b", t0={"a": 1.0}, t1={"b": 1.0})
    router = router_of(plan, report("a"), report("b"))
    types = (
        TypeCentroid(request_type=0, input_ln=4.0, output_ln=4.0, weight=10.0),
        TypeCentroid(request_type=1, input_ln=8.0, output_ln=4.0, weight=10.0),
    )
    state = ProfilerState(models=(ModelTypes(model_id="m", types=types),))
    router.step(Loaded(key="profiler", message=state, revision=1), 0.0)
    assert reply_of(router, ask(input_tokens=3000)).request_type == 1


def test_a_tenants_habit_decides_between_types_alike_in_input() -> None:
    """A tenant of long answers would be routed as everybody else is, though its past is known."""
    router = router_of(plan_of("a"), report("a"))
    router.step(demand((100, 50), (100, 2000), requests=(60, 40)), 0.0)
    done = tuple(
        RequestCompleted(
            request_id=str(i),
            outcome="completed",
            model_id="m",
            tenant="writer",
            input_tokens=100,
            output_tokens=2000,
        )
        for i in range(30)
    )
    router.step(RequestsCompleted(ingress_id="i", completed=done), 0.0)
    query: dict[str, Any] = {"input_tokens": 100, "output_tokens_max": 4000}
    assert reply_of(router, ask(tenant="writer", **query)).request_type == 1
    assert reply_of(router, ask(tenant="other", **query)).request_type == 0


def test_refusals_are_logged_once_per_change() -> None:
    """The log of a mesh without replicas would grow by a line for each refused request."""
    router = router_of(plan_of("a"))
    kinds = [[type(e) for e in router.step(ask(f"q{i}"), 0.0)] for i in range(3)]
    assert kinds == [[Reply, Log], [Reply], [Reply]]
    router.step(report("a"), 0.0)
    assert [type(e) for e in router.step(ask("q9"), 0.0)] == [Reply, Log]


def test_what_is_no_question_is_said_and_survived() -> None:
    """One stray message would end the router."""
    router = router_of(plan_of("a"), report("a"))
    assert [
        type(e) for e in router.step(Query(PlanInForce(epoch=1, plan=plan_of()), "x"), 0.0)
    ] == [Log]
    assert [type(e) for e in router.step(ask().message, 0.0)] == [Log]  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["plan", "least_load", "round_robin", "prefix_affinity"])
def test_two_instances_do_not_walk_in_step(policy: PolicyName) -> None:
    """All routers would send their next request to the same replica at the same moment."""
    ids = [f"r{i}" for i in range(8)]
    chosen: set[str] = set()
    for instance in range(6):
        config = RouterConfig(policy=policy)
        router = Router(config, models=("m",), instance_id=f"router-{instance}")
        router.step(PlanInForce(epoch=1, plan=plan_of(*ids)), 0.0)
        for id_ in ids:
            router.step(report(id_), 0.0)
        chosen.add(reply_of(router, ask()).replica_id)
    assert len(chosen) >= 3


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"report_dead_s": 0.5}, "router.report_dead_s"),
        ({"inbox_max": 0}, "router.inbox_max"),
        ({"load_gain": -1.0}, "router.load_gain"),
        ({"length_spread_ln": 0.0}, "router.length_spread_ln"),
    ],
)
def test_settings_that_make_no_sense_name_themselves(setting: dict[str, Any], field: str) -> None:
    """An operator would search for which of the settings is wrong."""
    with pytest.raises(ConfigInvalid) as raised:
        RouterConfig(**setting).checked()
    assert raised.value.field == field
