"""What a switch costs, how a change is divided into steps, and which way is affordable."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.scheduler.policies.capacity import Column, build
from services.scheduler.policies.capacity_plan import Placed, place_counts
from services.scheduler.policies.horizon import Foresight
from services.scheduler.policies.horizon_judge import Weighed, weighed
from services.scheduler.policies.horizon_lasting import Demand
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.transition import (
    DRAIN_S,
    Phase,
    backlog,
    change,
    payback,
    strains,
    toll,
)
from services.scheduler.policies.transition_columns import columns_of, mix_headrooms
from services.scheduler.policies.transition_memory import (
    HELD_S,
    REVIEW_S,
    Asked,
    Memory,
    offered,
)
from services.scheduler.policies.transition_rules import ruled
from services.scheduler.policies.transition_running import running
from services.scheduler.policies.transition_steps import batches, components, walk
from services.scheduler.policies.transition_verdict import Move, Way, affordable_way
from shared.cost.memory import weight_bytes
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import ReplicaReport
from tests.unit.joint_cases import FACTS, GPU, MadeUpRates, offers, problem

M, SMALL = "llama-2-70b", "llama-3.1-8b"
FOUR = [(4.0, 600.0, 60.0), (2.0, 1500.0, 250.0), (1.0, 3000.0, 30.0), (0.5, 500.0, 900.0)]


def replicas(shape: str, firsts: Sequence[int], *, model_id: str = M) -> tuple[ReplicaSpec, ...]:
    """One replica of the shape from each of these GPUs on."""
    size = Parallelism.parse(shape).gpus
    return tuple(
        ReplicaSpec(
            replica_id=f"{model_id}-{shape}-{first}",
            model_id=model_id,
            parallelism=str(Parallelism.parse(shape)),
            gpus=tuple(f"h100-{gpu:03d}" for gpu in range(first, first + size)),
        )
        for first in firsts
    )


def in_force(*specs: ReplicaSpec) -> DeploymentPlan:
    return DeploymentPlan(plan_id="standing", replicas=specs)


def judge_of(case: Problem, *, lasts_s: float = 300.0) -> Weighed:
    foreseen = Foresight().foresee(case)
    table = build(foreseen.high, MadeUpRates())
    return weighed(foreseen, table, MadeUpRates(), horizon_s=lasts_s)


def move_of(
    judge: Weighed, before: Sequence[ReplicaSpec], after: Sequence[ReplicaSpec], *, lasts_s: float
) -> Move:
    """From one set of replicas to another, each with its best shares."""
    old, new = columns_of(judge.table, before), columns_of(judge.table, after)
    return Move(
        judge=judge,
        kept=judge.dispatched(Counter(old.values())),
        choice=judge.dispatched(Counter(new.values())),
        before=tuple(before),
        placed=Placed(replicas=tuple(after), columns=new, dropped=(), reason=""),
        lasts_s=lasts_s,
    )


def test_a_change_is_what_the_switcher_would_do() -> None:
    """A replica stays only if nothing about it differs; the order of replicas is nothing."""
    one, two = replicas("tp4", [0]), replicas("tp4", [4])
    moved = replace_gpus(two[0], ("h100-008", "h100-009", "h100-010", "h100-011"))
    made = change((*one, *two), (moved, *one))
    assert made.staying == one
    assert made.going == two
    assert made.coming == (moved,)
    assert set(made.after) == {*one, moved}


def replace_gpus(spec: ReplicaSpec, gpus: tuple[str, ...]) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id=spec.replica_id, model_id=spec.model_id, parallelism=spec.parallelism, gpus=gpus
    )


def test_a_switch_takes_a_drain_and_the_slowest_start() -> None:
    """Bytes are the new replicas' weights, and the disk that reads most of them is the busiest."""
    case = problem({M: FOUR}, offers(16))
    judge = judge_of(case)
    coming = (*replicas("tp8", [0]), *replicas("tp4", [8, 12]))
    made = change(replicas("tp2", [0, 2]), coming)
    columns = columns_of(judge.table, coming)
    models = {id_: judge.model(column) for id_, column in columns.items()}
    paid = toll(made, case.offers, models, running={"llama-2-70b-tp2-0": 7.0, "other": 100.0})
    slowest = max(model.start_s for model in models.values())
    assert paid.seconds == pytest.approx(DRAIN_S + slowest)
    of_tp8 = 8 * weight_bytes(FACTS[M], Parallelism(8, 1))[0]
    of_tp4 = 2 * 4 * weight_bytes(FACTS[M], Parallelism(4, 1))[0]
    assert paid.bytes_moved == pytest.approx(of_tp8 + of_tp4)
    assert paid.busiest_link_s == pytest.approx(
        max(of_tp8, of_tp4) / GPU.disk.bytes_per_s + GPU.disk.latency_s
    )
    assert paid.requests_paused == 7.0


def test_replicas_on_free_gpus_need_no_drain_and_leaving_ones_no_start() -> None:
    """Nothing goes, nothing is waited for; nothing comes, nothing is loaded."""
    case = problem({M: FOUR}, offers(16))
    judge = judge_of(case)
    one, two = replicas("tp4", [0]), replicas("tp4", [4])
    models = {id_: judge.model(c) for id_, c in columns_of(judge.table, two).items()}
    added = toll(change(one, (*one, *two)), case.offers, models, running={})
    assert added.seconds == pytest.approx(models[two[0].replica_id].start_s)
    left = toll(change((*one, *two), one), case.offers, {}, running={})
    assert (left.seconds, left.bytes_moved, left.busiest_link_s) == (DRAIN_S, 0.0, 0.0)


def test_requests_that_run_are_those_reported_else_those_foreseen_by_littles_law() -> None:
    """What a switch would pause."""
    one, two = replicas("tp4", [0]), replicas("tp4", [4])
    report = ReplicaReport(
        replica_id=one[0].replica_id, worker_id="w", incarnation="i", epoch=1, phase="serving",
        running=5, waiting=2,
    )  # fmt: skip
    case = replace(problem({M: FOUR}, offers(8)), loads=(report,))
    judge = judge_of(case)
    counts = Counter(columns_of(judge.table, (*one, *two)).values())
    found = running(judge, judge.dispatched(counts), (*one, *two))
    assert found[one[0].replica_id] == 7.0
    foreseen = found[two[0].replica_id]
    decoding = sum(rate / 2 * tokens_out * 0.005 for rate, _, tokens_out in FOUR)
    assert decoding < foreseen < 100.0  # a step takes 5 ms at least


@pytest.mark.parametrize(
    ("phases", "horizon_s", "gain", "cost", "payback_s"),
    [
        ([], 100.0, 50.0, 0.0, 0.0),  # 1.0 to 0.5, at once
        ([Phase(seconds=10, lateness=3.0, headroom=1)], 100.0, 45.0, 20.0, 50.0),
        ([Phase(seconds=10, lateness=3.0, headroom=1)], 5.0, 0.0, 20.0, 50.0),
        (  # the first step gains already while the second costs
            [
                Phase(seconds=10, lateness=2.0, headroom=1),
                Phase(seconds=10, lateness=0.8, headroom=1),
            ],
            100.0, 42.0, 10.0, 36.0,
        ),
    ],
)  # fmt: skip
def test_payback_is_when_what_was_gained_exceeds_what_it_cost(
    phases: list[Phase], horizon_s: float, gain: float, cost: float, payback_s: float
) -> None:
    """In seconds of lateness, from 1.0 to 0.5."""
    sums = payback(phases, before=1.0, after=0.5, horizon_s=horizon_s)
    assert (sums.gain, sums.cost) == (pytest.approx(gain), pytest.approx(cost))
    assert sums.payback_s == pytest.approx(payback_s)


def test_what_gains_nothing_never_pays_back() -> None:
    """Also when it costs nothing."""
    assert payback([], before=0.5, after=0.5, horizon_s=300.0).payback_s is None


def test_waiting_may_not_exceed_what_staying_would_build_up() -> None:
    """Those in force carry the demand: a switch may leave no queue. They do not: it may, if the new
    plan works it off."""
    during = [Phase(seconds=100, lateness=0, headroom=0.5)]
    ample = Phase(seconds=600, lateness=0, headroom=2.0)
    enough, little = replace(ample, headroom=1.0), replace(ample, headroom=0.7)
    assert strains(during, before=enough, after=ample)
    assert not strains(during, before=little, after=ample)
    assert strains(during, before=little, after=replace(ample, headroom=0.71))
    assert not strains([replace(during[0], headroom=1.0)], before=enough, after=ample)


def test_a_queue_goes_on_from_phase_to_phase() -> None:
    """Two switches in a row are worse than each by itself."""
    once = backlog([(100.0, 0.5), (200.0, 1.0)])
    assert backlog([(100.0, 0.5), (100.0, 0.5), (100.0, 1.0)]) > 2 * backlog([(100.0, 0.5)])
    assert once == pytest.approx(50 * 100 / 2 + 50 * 200)
    assert backlog([(10.0, 2.0)], queue=5.0) == pytest.approx(5 * 5 / 2)


def test_components_share_no_gpu() -> None:
    """Two tp4 to one tp8 hang together, what is on other GPUs does not."""
    before = replicas("tp4", [0, 4, 8, 12])
    after = (*replicas("tp8", [0]), *replicas("tp2", [8, 10]), *replicas("tp4", [12]))
    parts = components(change(before, after))
    assert [(len(part.going), len(part.coming)) for part in parts] == [(2, 1), (1, 2)]
    gpus = [{g for s in (*p.going, *p.coming) for g in s.gpus} for p in parts]
    assert gpus[0].isdisjoint(gpus[1])


def test_gpus_that_are_freed_or_taken_are_components_of_their_own() -> None:
    """Nothing that goes waits for something that comes elsewhere."""
    parts = components(change(replicas("tp4", [0]), replicas("tp4", [4])))
    assert [(len(part.going), len(part.coming)) for part in parts] == [(1, 0), (0, 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_every_step_is_a_plan_and_the_last_one_the_target(count: int) -> None:
    """Whatever the batches, no GPU has two owners on the way and nothing is left out."""
    before = replicas("tp4", [0, 4, 8, 12])
    after = replicas("tp2", range(0, 16, 2))
    made = change(before, after)
    steps = walk(before, batches(components(made), count, {}))
    assert len(steps) == min(count, 4)
    standing = set(before)
    for step in steps:
        assert set(step.staying) | set(step.going) == standing
        standing = set(step.after)
        gpus = [gpu for spec in standing for gpu in spec.gpus]
        assert len(gpus) == len(set(gpus)) == 16
    assert standing == set(after)


def test_what_brings_most_per_gpu_comes_first() -> None:
    """Capacity grows as early as it can."""
    before = replicas("tp4", [0, 4])
    after = (*replicas("tp2", [0, 2]), *replicas("tp1", [4, 5, 6, 7]))
    worth = {spec.replica_id: 1.0 for spec in before}
    worth |= {spec.replica_id: 0.6 if "tp2" in spec.replica_id else 0.5 for spec in after}
    first, second = batches(components(change(before, after)), 2, worth)
    assert {spec.parallelism for part in first for spec in part.coming} == {"tp1pp1"}
    assert {spec.parallelism for part in second for spec in part.coming} == {"tp2pp1"}


def test_a_replica_is_worth_the_mix_that_it_can_carry() -> None:
    """Of a model's types in their proportion, as times of its demand."""
    judge = judge_of(problem({M: FOUR}, offers(8)))
    table = judge.table
    worth = mix_headrooms(table)
    for s in range(len(table.columns)):
        time = sum(d / n for d, n in zip(table.demand, table.rates[s], strict=True) if n > 0)
        assert worth[s] == pytest.approx(1 / time if time else 0.0)


def scaled(case: Problem, *, counts: dict[str, int], headroom: float) -> Problem:
    """``case`` with as much demand as leaves the replicas that headroom."""
    judge = judge_of(case)
    columns = {Column(M, "h100", Parallelism.parse(shape)): n for shape, n in counts.items()}
    times = judge.dispatched(columns).headroom / headroom
    scaled_types = [(times * rate, tokens_in, out) for rate, tokens_in, out in FOUR]
    return problem({M: scaled_types}, case.offers, in_force=case.in_force)


BEFORE, AFTER = replicas("tp8", [0, 8, 16, 24]), replicas("tp4", range(0, 32, 4))


def way_of(headroom: float) -> tuple[Way, Move]:
    """From four tp8 that have that headroom to eight tp4, which have more."""
    case = problem({M: FOUR}, offers(32), in_force=in_force(*BEFORE))
    judge = judge_of(scaled(case, counts={"tp8": 4}, headroom=headroom))
    move = replace(move_of(judge, BEFORE, AFTER, lasts_s=3600.0), must_pay=False)
    assert move.choice.headroom > move.kept.headroom
    return affordable_way(move), move


def test_a_light_load_is_moved_in_few_steps_and_a_heavy_one_in_more() -> None:
    """Two replicas of four are not missed at four times the demand; hardly one is at 1.6 times; and
    none may go at 1.15 times."""
    light, _ = way_of(4.0)
    assert (len(light.steps), light.refused) == (2, "")
    heavy, _ = way_of(1.6)
    assert len(heavy.steps) > 2
    assert not heavy.refused
    full, _ = way_of(1.15)
    assert len(full.steps) == 4
    assert "is served, and what waits then is not worked off in time" in full.refused


@pytest.mark.parametrize("headroom", [4.0, 2.5, 1.6])
def test_what_stays_carries_the_demand(headroom: float) -> None:
    """In each switch of an affordable way, as long as those in force carry it; and what is said of
    the first step is of the first step."""
    way, move = way_of(headroom)
    assert not way.refused
    assert min(way.served) >= 1.0
    outlook = way.outlook(move, "", moves=True)
    assert outlook.step == f"step 1 of {len(way.steps)}"
    assert outlook.served_share == 1.0
    assert outlook.seconds == way.tolls[0].seconds < way.seconds


def test_overload_justifies_larger_steps() -> None:
    """Replicas that fall behind anyhow are replaced at once if those that come can catch up."""
    way, _ = way_of(0.7)
    assert not way.refused
    assert len(way.steps) == 1


def test_no_model_is_left_without_a_replica_between_two_steps() -> None:
    """GPUs that go from one model to another may be taken before others are given."""
    before = (*replicas("tp4", [0]), *replicas("tp1", [4], model_id=SMALL))
    after = (*replicas("tp1", [0], model_id=SMALL), *replicas("tp4", [4]))
    case = problem({M: FOUR, SMALL: FOUR}, offers(8), in_force=in_force(*before))
    judge = judge_of(case)
    way = affordable_way(move_of(judge, before, after, lasts_s=3600.0))
    for step in way.steps[:-1]:
        models = {spec.model_id for spec in step.after}
        assert models == {M, SMALL} or way.refused


def test_rules_say_why() -> None:
    """The same plan, a gain that is none, replicas that are held, and a way."""
    before, after = replicas("tp8", [0, 8]), replicas("tp4", range(0, 16, 4))
    case = problem({M: FOUR}, offers(16), in_force=in_force(*before))
    judge = judge_of(scaled(case, counts={"tp8": 2}, headroom=0.7))
    move = move_of(judge, before, after, lasts_s=3600.0)
    assert ruled(move).moves
    assert ruled(move, held="by rule").moves, "those in force cannot carry the demand"
    calm = judge_of(scaled(case, counts={"tp8": 2}, headroom=6.0))
    assert "a gain below 10%" in ruled(move_of(calm, before, after, lasts_s=3600.0)).why
    back = move_of(calm, after, before, lasts_s=3600.0)
    assert ruled(back).moves
    assert "held: by rule" in ruled(back, held="by rule").why
    assert ruled(replace(back, done=1), held="by rule").moves, "a way begun is gone on with"
    same = move_of(calm, before, before, lasts_s=3600.0)
    assert ruled(same).why.startswith("the replicas in force are the best")
    forced = ruled(move_of(calm, before, after, lasts_s=3600.0), lacking="too few replicas")
    assert forced.moves
    assert forced.why.startswith("too few replicas")


def asked_for(
    case: Problem, after: Sequence[ReplicaSpec], *, target: Sequence[ReplicaSpec]
) -> Asked:
    return Asked(
        answer=Planned(plan=in_force(*after), reason="asked for"),
        at_s=case.now_s,
        seconds=100.0,
        epoch=case.epoch,
        before=frozenset(case.in_force.replicas),
        after=frozenset(after),
        target=tuple(target),
        done=1,
        demand=Foresight().foresee(case).lines,
        offered=offered(case),
    )


def test_what_is_under_way_is_answered_again() -> None:
    """Until it stands, fails (another epoch), takes too long, or a GPU is gone."""
    before, after = replicas("tp8", [0]), replicas("tp4", [0, 4])
    case = problem({M: FOUR}, offers(8), in_force=in_force(*before))
    memory = Memory()
    assert memory.under_way(case) is None
    memory.asked(asked_for(case, after, target=after))
    later = replace(case, now_s=60.0)
    again = memory.under_way(later)
    assert again is not None
    assert again.reason == "asked for"
    assert memory.under_way(replace(later, epoch=case.epoch + 1)) is None
    assert memory.under_way(replace(later, now_s=1e4)) is None
    assert memory.under_way(replace(later, offers=case.offers[1:])) is None
    assert memory.under_way(replace(later, in_force=in_force(*after))) is None


def test_replicas_that_were_chosen_are_held_for_an_hour() -> None:
    """Unless demand or GPUs are others, or somebody else chose them."""
    before, after = replicas("tp8", [0]), replicas("tp4", [0, 4])
    case = problem({M: FOUR}, offers(8), in_force=in_force(*before))
    demand = Foresight().foresee(case).lines
    memory = Memory()
    memory.asked(asked_for(case, after, target=after))
    stands = replace(case, now_s=100.0, in_force=in_force(*after))
    assert memory.holds(stands, demand, horizon_s=60.0) == "", "it does not stand as far as known"
    memory.look(stands)
    soon = replace(stands, now_s=400.0, dwell_s=300.0)
    assert "chosen for this demand" in memory.holds(soon, demand, horizon_s=60.0)
    assert (
        memory.holds(replace(soon, now_s=101.0 + HELD_S, dwell_s=HELD_S), demand, horizon_s=60.0)
        == ""
    )
    more = [(3 * rate, tokens_in, out) for rate, tokens_in, out in FOUR]
    other = Foresight().foresee(problem({M: more}, offers(8))).lines
    assert memory.holds(soon, other, horizon_s=60.0) == ""
    assert memory.holds(replace(soon, offers=offers(16)), demand, horizon_s=60.0) == ""
    strange = replace(soon, in_force=in_force(*before))
    memory.look(strange)
    assert memory.holds(strange, demand, horizon_s=60.0) == ""


def test_plans_are_compared_again_after_a_while_or_when_anything_is_other() -> None:
    """Each period the same comparison would be made; or a rise would wait for its turn."""
    stands = replicas("tp4", [0, 4])
    case = problem({M: FOUR}, offers(8), in_force=in_force(*stands))
    demand = Foresight().foresee(case).lines
    memory = Memory()
    assert memory.review_due(case, demand, horizon_s=60.0)
    memory.reviewed(case, demand)

    def due(now: Problem, *, expected: Demand = demand) -> bool:
        return memory.review_due(now, expected, horizon_s=60.0)

    soon = replace(case, now_s=REVIEW_S - 1.0)
    assert not due(soon)
    assert due(replace(case, now_s=REVIEW_S))
    assert due(replace(case, now_s=-1.0)), "a clock set back"
    assert due(replace(soon, offers=offers(16)))
    assert due(replace(soon, in_force=in_force(stands[0])))
    more = [(3 * rate, tokens_in, out) for rate, tokens_in, out in FOUR]
    other = Foresight().foresee(problem({M: more}, offers(8))).lines
    assert due(soon, expected=other)
    memory.asked(asked_for(case, stands, target=replicas("tp8", [0])))
    memory.look(soon)
    assert due(soon), "one step of a way"


def test_a_step_knows_where_it_leads() -> None:
    """As long as it stands and all GPUs of the target are there."""
    before = replicas("tp4", [0, 4])
    target = replicas("tp2", [0, 2, 4, 6])
    step = (*target[:2], before[1])
    case = problem({M: FOUR}, offers(8), in_force=in_force(*before))
    memory = Memory()
    memory.asked(asked_for(case, step, target=target))
    assert memory.way(case) is None
    stands = replace(case, in_force=in_force(*step))
    memory.look(stands)
    assert memory.way(stands) == (target, 1)
    assert memory.way(replace(stands, offers=case.offers[:6])) is None


def test_placing_moves_as_little_as_it_can() -> None:
    """A change of one replica is a change of one replica."""
    before = replicas("tp4", [0, 4, 8, 12])
    case = problem({M: FOUR}, offers(16), in_force=in_force(*before))
    judge = judge_of(case)
    four, two = (Column(M, "h100", Parallelism(tp, 1)) for tp in (4, 2))
    placed = place_counts(judge.table, {four: 3, two: 2}, case.in_force)
    made = change(before, placed.replicas)
    assert (len(made.staying), len(made.going), len(made.coming)) == (3, 1, 2)
    assert len(components(made)) == 1


@pytest.mark.parametrize(
    ("kept", "choice", "refused"),
    [
        (0.8, 0.6, "would overload these as well"),
        (0.8, 0.85, "would overload these as well"),
        (0.8, 0.95, ""),
        (3.0, 1.5, "carries less than those in force"),
        (3.0, 1.7, ""),  # room enough for bursts
        (1.2, 1.3, ""),
    ],
)
def test_a_plan_that_is_less_late_must_have_the_room_as_well(
    kept: float, choice: float, refused: str
) -> None:
    """Or replicas that answer sooner until they are full would be fled to in an overload; others
    that have the room are worth a look."""
    judge = judge_of(problem({M: FOUR}, offers(16)))
    move = move_of(judge, replicas("tp8", [0, 8]), replicas("tp4", [0, 4, 8, 12]), lasts_s=1e5)
    move = replace(
        move,
        kept=replace(move.kept, headroom=kept, lateness=9.0),
        choice=replace(move.choice, headroom=choice, lateness=0.5),
    )
    found = ruled(move)
    assert refused in found.why
    assert found.unreachable == bool(refused)
    assert found.moves != bool(refused)
