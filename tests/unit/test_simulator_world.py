"""The simulated world itself: what it delivers, and what its faults do."""

import pytest

from loadgen.simulator.bucket import Bucket
from loadgen.simulator.faults import Incident, IncidentKind, Weather
from loadgen.simulator.process import NodeSpec, matches
from loadgen.simulator.world import World
from shared import subjects
from shared.core import (
    Ask,
    Effect,
    Load,
    Loaded,
    Log,
    Publish,
    Query,
    Reply,
    SetTimer,
    Start,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.messages.base import Message
from shared.messages.plans import PlanKept
from shared.messages.requests import RouteReply, RouteRequest


class Beat(Message, frozen=True, kw_only=True):
    """Timer of the cores below."""


class Recorder:
    """Remembers what it hears; answers questions; beats once a second if told to."""

    def __init__(self, *first: Effect, beats: bool = False) -> None:
        self.first, self.beats = first, beats
        self.heard: list[object] = []
        self.times_s: list[float] = []

    def step(self, event: object, now_s: float) -> list[Effect]:
        self.heard.append(event)
        self.times_s.append(now_s)
        match event:
            case Started():
                return [*self.first, *([SetTimer(now_s + 1.0, Beat())] if self.beats else [])]
            case Beat():
                return [SetTimer(now_s + 1.0, Beat()), subjects.PLAN_KEPT.send(kept(now_s))]
            case Query(reply_to=reply_to):
                reply = RouteReply(request_id="q", replica_id="r0")
                return [Reply(reply_to, reply)]
            case _:
                return []

    def check(self) -> None:
        pass

    @property
    def events(self) -> list[object]:
        return self.heard[1:]


def kept(now_s: float) -> PlanKept:
    return PlanKept(epoch=round(now_s), reason="beat")


def add(world: World, name: str, core: Recorder, *inputs: subjects.Subject[PlanKept]) -> Recorder:
    world.add(NodeSpec(name=name, make=lambda _n, _p: (core, {}), inputs=inputs))
    return core


@pytest.mark.parametrize(
    ("subject", "wildcard", "heard"),
    [
        ("a.b.c", "a.b.c", True),
        ("a.b.c", "a.*.c", True),
        ("a.b.c", "a.*", False),
        ("a.b.c", "a.>", True),
        ("a", "a.>", False),
        ("a.b", "a.b.c", False),
        ("a.b.c.d", "*.b.>", True),
        ("a.x", "a.b", False),
    ],
)
def test_subjects_match_as_on_nats(subject: str, wildcard: str, *, heard: bool) -> None:
    """Otherwise cores would hear in simulation what they never hear in production."""
    assert matches(subject, wildcard) is heard


def test_a_question_reaches_one_member_of_the_group_and_is_answered() -> None:
    """Otherwise two routers would answer one question, or none."""
    world = World(1)
    question = RouteRequest(request_id="q", model_id="m", input_tokens=1, output_tokens_max=1)
    asker = Recorder(Ask(subjects.ROUTE.pattern, question, "oserve.v1.data.ingress.i.route"))
    routers = [Recorder(), Recorder()]
    for i, router in enumerate(routers):
        world.add(
            NodeSpec(
                name=f"router-{i}",
                make=lambda _n, _p, router=router: (router, {}),
                queries=((subjects.ROUTE, "router"),),
            )
        )
    reply = subjects.ROUTE_REPLY.of(ingress_id="i")
    world.add(NodeSpec(name="asker", make=lambda _n, _p: (asker, {}), inputs=(reply,)))
    world.run(1.0)
    assert sorted(len(router.events) for router in routers) == [0, 1]
    assert asker.events == [RouteReply(request_id="q", replica_id="r0")]


def test_the_bucket_takes_a_write_only_on_top_of_what_it_holds() -> None:
    """Otherwise the compare-and-set that keeps two switchers apart would not be tested."""
    bucket = Bucket()
    assert bucket.load("k") == (None, 0)
    assert bucket.store("a", "k", kept(1), 0) == 1
    assert bucket.store("b", "k", kept(2), 0) is None
    assert bucket.store("a", "k", kept(1), 0) == 1, "a repeat of what is held is that write"
    assert bucket.store("b", "k", kept(2), 1) == 2
    assert bucket.load("k") == (kept(2), 2)


def test_writes_and_reads_come_back_as_events() -> None:
    """Otherwise a core would wait for ever for its state."""
    world = World(1)
    core = add(world, "n", Recorder(Store("k", kept(1), 0)))
    world.run(1.0)
    assert core.events == [Stored(key="k", revision=1)]
    late = add(world, "late", Recorder(Load("k", PlanKept), Store("k", kept(2), 9)))
    world.run(2.0)
    assert Loaded(key="k", message=kept(1), revision=1) in late.events
    assert StoreConflict(key="k") in late.events


def test_jobs_and_logs_are_performed() -> None:
    """Otherwise slow work would never end, and a trace would not say what cores say."""
    world = World(1)
    done: list[object] = []
    core = Recorder(Start("job", 5), Log("said", {"x": 1}))
    world.add(NodeSpec(name="n", make=lambda _n, _p: (core, {"job": done.append})))
    world.run(1.0)
    assert done == [5]
    assert any("(info) said {'x': 1}" in line for line in world.trace.lines())


@pytest.mark.parametrize(
    ("kind", "beats"),
    [("crash", [1, 2]), ("stall", [1, 2, 5, 6]), ("partition", [1, 2, 5, 6])],
)
def test_faults_take_a_process_away_and_give_it_back(kind: IncidentKind, beats: list[int]) -> None:
    """Otherwise runs would be called faulty in which nothing had gone wrong."""
    world = World(1)
    listener = add(world, "listener", Recorder(), subjects.PLAN_KEPT)
    cores = [Recorder(beats=True), Recorder()]
    spec = NodeSpec(name="n", make=lambda number, _p: (cores[number - 1], {}))
    world.add(spec)
    world.plan([Incident(kind=kind, node="n", at_s=2.5, for_s=2.0)])
    world.run(6.5)
    heard = [round(at_s) for at_s in listener.times_s[1:]]
    assert heard == beats
    assert (len(cores[1].heard) == 1) == (kind == "crash"), "a new process, and no old timer"


def test_twins_both_hear_and_the_older_one_ends() -> None:
    """Otherwise a switcher that wakes up beside its replacement would not be simulated."""
    world = World(1)
    cores = [Recorder(), Recorder()]
    world.add(
        NodeSpec(
            name="n", make=lambda number, _p: (cores[number - 1], {}), inputs=(subjects.PLAN_KEPT,)
        )
    )
    add(world, "beater", Recorder(beats=True))
    world.plan([Incident(kind="twin", node="n", at_s=1.5, for_s=4.0)])
    world.run(8.0)
    assert [event.epoch for event in cores[0].events if isinstance(event, PlanKept)] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip
    assert [event.epoch for event in cores[1].events if isinstance(event, PlanKept)] == [
        2, 3, 4, 5, 6, 7,
    ]  # fmt: skip


def test_weather_loses_repeats_and_delays() -> None:
    """Otherwise the network of every run would be a perfect one."""
    world = World(3, weather=Weather(delay_s_max=2.0, loss=0.3, duplicate=0.3))
    listener = add(world, "listener", Recorder(), subjects.PLAN_KEPT)
    add(world, "beater", Recorder(beats=True))
    world.run(200.0)
    epochs = [event.epoch for event in listener.events if isinstance(event, PlanKept)]
    assert len(set(epochs)) < 197, "some were lost"
    assert len(epochs) > len(set(epochs)), "some came twice"
    assert epochs != sorted(epochs), "some overtook others"


def test_calm_brings_everyone_back() -> None:
    """Otherwise liveness would be demanded of a mesh in which someone is still down."""
    world = World(1, weather=Weather(loss=1.0))
    cores = [Recorder(), Recorder(beats=True)]
    world.add(NodeSpec(name="n", make=lambda number, _p: (cores[number - 1], {})))
    listener = add(world, "listener", Recorder(), subjects.PLAN_KEPT)
    world.plan([Incident(kind="crash", node="n", at_s=1.0, for_s=1000.0)])
    world.run(2.0)
    assert world.core("n") is None
    world.calm()
    world.run(4.5)
    assert world.core("n") is cores[1]
    assert len(listener.events) == 2


def test_taps_see_messages_that_are_lost() -> None:
    """Otherwise an invariant about what is said would miss what was not heard."""
    world = World(1, weather=Weather(loss=1.0))
    seen: list[Publish] = []
    world.taps.append(lambda _, effect: seen.append(effect))
    add(world, "beater", Recorder(beats=True))
    world.run(2.5)
    assert [effect.message for effect in seen] == [kept(1), kept(2)]
