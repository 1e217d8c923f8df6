"""Rehearsals: the same requests for every plan, replicas as engines are, figures that add up."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from services.router import loads
from services.router.config import RouterConfig
from services.scheduler.policies import rehearsal_choice
from services.scheduler.policies.capacity import Column, ReplicaKind, Table, TypeDemand, build
from services.scheduler.policies.history import Pattern
from services.scheduler.policies.interface import Needs, PastWindow, Problem
from services.scheduler.policies.joint_choice import Judge, candidates, choose, solve_capacity
from services.scheduler.policies.joint_verify import losses
from services.scheduler.policies.rehearsal import LOAD_GAIN, Rehearsed, rehearse, requests
from services.scheduler.policies.rehearsal_choice import (
    MIXED_GAIN,
    PAST_REQUESTS_MAX,
    PLENTY,
    ROOM_TIE,
    STRESS,
    TIE,
    UNIFORM_TIE,
    past_of,
    rehearsed,
    scene_of,
)
from services.scheduler.policies.rehearsal_outcome import Fared, Spread, worth
from services.scheduler.policies.rehearsal_replica import QUEUE_FULL, Log, Replica
from services.scheduler.policies.rehearsal_requests import Drawn, draw
from services.worker.engine.batching import Batch
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.cost.step import PS_PER_S
from shared.hardware import Parallelism
from shared.messages.decisions import ALTERNATIVES_MAX
from shared.slo import SloTarget
from tests.unit.joint_cases import MadeUpRates, offers, problem

M, SMALL = "llama-2-70b", "llama-3.1-8b"
MIX = [(2.0, 600.0, 60.0), (1.0, 1500.0, 250.0), (0.5, 3000.0, 30.0)]
LIMITS = EngineLimits(waiting_max=100_000)


def case(scale: float, gpus: int = 16, mix: list[tuple[float, float, float]] = MIX) -> Judge:
    asked = problem({M: [(scale * rps, i, o) for rps, i, o in mix]}, offers(gpus))
    return judge_of(asked)


def judge_of(asked: Problem) -> Judge:
    source = MadeUpRates()
    return Judge(problem=asked, table=build(asked, source), source=source, horizon_s=300.0)


def uniform(judge: Judge, shape: str) -> dict[Column, int]:
    gpus = judge.table.gpus()
    (column,) = [c for c in judge.table.columns if c.shape == Parallelism.parse(shape)]
    return {column: gpus // column.shape.gpus}


def play(judge: Judge, shape: str, *, seconds: float = 200.0, seed: int = 1) -> Rehearsed:
    counts = uniform(judge, shape)
    return rehearse(scene_of(judge), counts, shares_of(judge.table, counts),
                    requests(judge.table, seconds=seconds, seed=seed))  # fmt: skip


def shares_of(
    table: Table, counts: dict[Column, int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Equal for all replicas."""
    each = np.array([counts.get(column, 0) / sum(counts.values()) for column in table.columns])
    return np.repeat(each[:, None], len(table.types), axis=1)


def types(*demand: tuple[float, float, float]) -> list[TypeDemand]:
    return [
        TypeDemand(model_id=M, name=str(j), arrivals_rps=a, input_tokens=i, output_tokens=o)
        for j, (a, i, o) in enumerate(demand)
    ]


def of_type(drawn: Drawn, j: int) -> list[tuple[float, int, int]]:
    rows = drawn.kinds == j
    return list(
        zip(
            drawn.at_s[rows].tolist(),
            drawn.input_tokens[rows].tolist(),
            drawn.output_tokens[rows].tolist(),
            strict=True,
        )
    )


def test_constants_are_the_routers() -> None:
    """Services do not import each other; what one assumes of another may drift apart."""
    assert RouterConfig().load_gain == LOAD_GAIN
    assert loads.QUEUE_FULL == QUEUE_FULL


def test_requests_are_those_of_the_forecast() -> None:
    """A plan for other arrivals, or other lengths, would be judged."""
    drawn = draw(types((5.0, 800.0, 100.0)), seconds=2000.0, seed=3)
    assert len(drawn) == pytest.approx(10_000, rel=0.05)
    assert drawn.input_tokens.mean() == pytest.approx(800, rel=0.03)
    assert drawn.output_tokens.mean() == pytest.approx(100, rel=0.03)
    assert drawn.output_tokens.min() >= 1
    assert np.all(np.diff(drawn.at_s) >= 0)
    assert drawn.at_s[-1] < 2000.0
    gaps = np.diff(drawn.at_s)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05), "Poisson"


def test_more_of_one_type_changes_no_other() -> None:
    """Two forecasts that differ in one type would be told apart by the luck of the draw."""
    before = draw(types((2.0, 300.0, 50.0), (1.0, 900.0, 20.0)), seconds=100.0, seed=9)
    after = draw(
        types((2.0, 300.0, 50.0), (4.0, 900.0, 20.0), (1.0, 10.0, 10.0)), seconds=100.0, seed=9
    )
    assert of_type(before, 0) == of_type(after, 0)
    assert of_type(before, 1) != of_type(after, 1)


def test_patterns_bring_bursts_where_they_are() -> None:
    """Bursts decide between plans: they may not be smoothed away."""
    pattern = Pattern(seconds=np.array([10.0, 10.0]), rates=np.array([[1.0], [9.0]]))
    drawn = draw(types((5.0, 300.0, 50.0)), seconds=1000.0, seed=1, pattern=pattern)
    calm = (drawn.at_s % 20.0) < 10.0
    assert calm.mean() == pytest.approx(0.1, abs=0.02)
    assert len(drawn) == pytest.approx(5000, rel=0.06)


def test_what_waits_already_comes_first_and_counts() -> None:
    """A plan that is to work off a queue would be judged without it."""
    judge = case(1.0)
    drawn = requests(judge.table, seconds=60.0, seed=1, backlog={0: 400})
    assert int((drawn.at_s == 0.0).sum()) == 400
    assert drawn.warm_s == 0.0
    counts = uniform(judge, "tp4")
    shares = shares_of(judge.table, counts)
    burdened = rehearse(scene_of(judge), counts, shares, drawn)
    free = rehearse(scene_of(judge), counts, shares, requests(judge.table, seconds=60.0, seed=1))
    slow, fast = burdened.whole.ttft_s.p99, free.whole.ttft_s.p99
    assert slow is not None
    assert fast is not None
    assert slow > 3 * fast


def engine(model: CostModel, log: Log) -> tuple[list[float], list[float], int]:
    """First and last tokens, and preemptions, of the batch scheduler that engines have."""
    limits = LIMITS.in_stages(model.shape.pp)
    batch = Batch(limits, model.step, kv_blocks=model.kv_tokens // limits.block_tokens)
    at_ps = [round(at_s * PS_PER_S) for at_s in log.at_s]
    first, ended, now, come = [0.0] * len(at_ps), [0.0] * len(at_ps), 0, 0
    while come < len(at_ps) or batch.sequences:
        if not batch.sequences:
            now = max(now, at_ps[come])
        while come < len(at_ps) and at_ps[come] <= now:
            batch.add(
                str(come), prompt_tokens=log.input_tokens[come],
                output_tokens=log.output_tokens[come],
            )  # fmt: skip
            come += 1
        plan = batch.plan()
        assert plan is not None
        steps, took = plan.steps, plan.duration_ps
        if come < len(at_ps) and now + took > at_ps[come]:
            steps, took = batch.steps_until(at_ps[come] - now)
        now += took
        progress = batch.advance(steps)
        for sequence in progress.first:
            first[int(sequence.key)] = now / PS_PER_S
        for sequence in progress.ended:
            ended[int(sequence.key)] = now / PS_PER_S
    return first, ended, batch.preemptions


def log_of(rps: float, count: int, seed: int) -> Log:
    rng, at_s, arrivals = random.Random(seed), 0.0, list[float]()
    for _ in range(count):
        at_s += rng.expovariate(rps)
        arrivals.append(at_s)
    return Log(
        arrivals,
        [rng.choice([50, 400, 3000, 9000]) for _ in arrivals],
        [rng.choice([1, 20, 300]) for _ in arrivals],
    )


@pytest.mark.parametrize("shape", ["tp2", "tp4", "tp4pp2"])
@pytest.mark.parametrize("rps", [0.5, 2.0])
def test_a_replica_does_what_the_batch_scheduler_does(shape: str, rps: float) -> None:
    """Step by step, while KV suffices: every request has its tokens when the engine has them."""
    model = MadeUpRates().model(ReplicaKind("h100", M, Parallelism.parse(shape), 8))
    roomy = replace(model, kv_tokens=2_000_000)
    log = log_of(rps, 300, seed=5)
    first, ended, _ = engine(roomy, log)
    replica = Replica(roomy, LIMITS, log)
    for request in range(300):
        replica.send(request)
    for until_s in (10.0, 11.5, 1e6):  # when it is looked at makes no difference
        replica.advance(until_s)
    assert log.first_s == pytest.approx(first, rel=1e-6)
    assert log.ended_s == pytest.approx(ended, rel=1e-6)
    assert replica.ended == 300
    assert replica.pressure() == 0.0


def test_a_replica_short_of_memory_preempts_as_the_batch_scheduler_does() -> None:
    """Tokens stand for blocks, so not to the step; but queues and recomputation are the same."""
    model = MadeUpRates().model(ReplicaKind("h100", M, Parallelism(4, 1), 8))
    tight = replace(model, kv_tokens=16_000)
    log = log_of(1.2, 300, seed=6)
    _, ended, preemptions = engine(tight, log)
    assert preemptions > 0
    replica = Replica(tight, LIMITS, log)
    for request in range(300):
        replica.send(request)
    replica.advance(1e6)
    took = np.array(log.ended_s) - log.at_s
    assert np.all(np.isfinite(took))
    assert took.mean() == pytest.approx((np.array(ended) - log.at_s).mean(), rel=0.05)


def test_same_arguments_same_answer() -> None:
    """A replayed run must decide the same."""
    judge = case(1.5)
    assert play(judge, "tp4") == play(judge, "tp4")
    assert play(judge, "tp4") != play(judge, "tp4", seed=2)


def test_many_replicas_are_rehearsed_by_some_of_them() -> None:
    """Sixteen times the GPUs and the demand fare alike, for no more than the work is bounded to."""
    few, many = play(case(1.5, 16), "tp4"), play(case(96.0, 1024), "tp4")
    assert many.requests < 12_000
    assert few.whole.goodput_share == pytest.approx(many.whole.goodput_share, abs=0.02)
    for one, other in zip(few.types, many.types, strict=True):
        assert one.tpot_s.mean == pytest.approx(other.tpot_s.mean, rel=0.1)
        assert one.ttft_s.p50 == pytest.approx(other.ttft_s.p50, rel=0.15)


def test_overload_is_finite_and_grows() -> None:
    """Plans that all fail must still be told apart."""
    shares: list[float] = []
    tails: list[float] = []
    for scale in (2.0, 6.0, 12.0, 100.0):
        whole = play(case(scale), "tp4", seconds=60.0).whole
        assert whole.goodput_share is not None
        assert whole.e2e_s.p99 is not None
        shares.append(whole.goodput_share)
        tails.append(whole.e2e_s.p99)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1
    assert tails == sorted(tails)
    assert tails[-1] <= 5 * 60.0


def test_requests_without_a_replica_are_late() -> None:
    """Half of the demand left out is half of the goodput, and the tail is the bound."""
    judge = case(0.5)
    counts = uniform(judge, "tp8")
    shares = shares_of(judge.table, counts)
    found = rehearse(
        scene_of(judge), counts, shares / 2, requests(judge.table, seconds=300.0, seed=1)
    )
    for fared in (found.whole, *found.types):
        assert fared.goodput_share == pytest.approx(0.5, abs=0.1)
        assert fared.e2e_s.p99 is not None
        assert fared.e2e_s.p99 > 600.0
    nobody = rehearse(
        scene_of(judge), {}, np.zeros_like(shares), requests(judge.table, seconds=60.0, seed=1)
    )
    assert nobody.whole.goodput_share == 0.0


def test_requests_go_where_the_shares_say() -> None:
    """In calm; under a queue they bend to where there is room."""
    judge = case(0.3)
    small, large = (next(iter(uniform(judge, shape))) for shape in ("tp4", "tp8"))
    counts = {small: 2, large: 1}
    shares = np.zeros_like(judge.table.rates)
    shares[judge.table.columns.index(small)], shares[judge.table.columns.index(large)] = 0.25, 0.75
    drawn = requests(judge.table, seconds=600.0, seed=1)
    found = rehearse(scene_of(judge), counts, shares, drawn)
    sent = {column: fared.requests for column, fared in found.columns.items()}
    assert sent[large] / sum(sent.values()) == pytest.approx(0.75, abs=0.05)


def test_goodput_is_by_slo_class() -> None:
    """Half interactive, half batch: the same times are late for one and not for the other."""
    judge = case(1.0)
    strict, loose = SloTarget(ttft_s=1e-3, tpot_s=0.1), SloTarget(ttft_s=60.0, tpot_s=1.0)
    halves = {"interactive": 0.5, "batch": 0.5}
    kinds = tuple(replace(kind, class_shares=halves) for kind in judge.table.types)
    asked = replace(judge.problem, class_targets={"interactive": strict, "batch": loose})
    classed = replace(judge, problem=asked, table=replace(judge.table, types=kinds))
    assert play(classed, "tp4").whole.goodput_share == pytest.approx(0.5)


def found_for(judge: Judge, needs: Needs | None = None) -> tuple[Judge, bool]:
    asked = replace(judge.problem, needs=needs or Needs())
    return replace(judge, problem=asked), bool(needs and needs.elastic)


def test_every_uniform_plan_is_a_candidate() -> None:
    """No plan may lose to the best one of one shape."""
    judge = case(1.5)
    best, terms = solve_capacity(judge.table, [M], time_limit_s=10.0)
    assert best is not None
    found = candidates(judge, best, terms, time_limit_s=10.0)
    alone = {column for each in found for column in each.counts if len(each.counts) == 1}
    assert alone == set(judge.table.columns)


def test_the_best_by_rehearsal_is_taken_and_the_others_say_why_not() -> None:
    """In order of their worth; of those that are worth as much, the roomiest."""
    judge = case(3.0)
    best, terms = solve_capacity(judge.table, [M], time_limit_s=10.0)
    assert best is not None
    found = candidates(judge, best, terms, time_limit_s=10.0)
    ranking = rehearsed(judge, found, keep=5, seconds=60.0)
    assert 5 <= len(ranking.played) <= 7
    assert ranking.of(ranking.best) is ranking.played[0]
    assert ranking.outcome is ranking.played[0].outcome
    assert all(ranking.of(each.candidate) is each for each in ranking.played)
    most = max(each.worth for each in ranking.played)
    assert ranking.played[0].worth >= most * (1 - TIE) * (1 - MIXED_GAIN)
    assert len(ranking.alternatives) == ALTERNATIVES_MAX
    assert all(each.why for each in ranking.alternatives)
    assert "by formula" in ranking.alternatives[-1].why
    drowned = judge.dispatched(uniform(judge, "tp2pp4"))
    again = rehearsed(judge, found, keep=1, seconds=60.0, always=[drowned])
    assert again.of(drowned) is not None
    (why,) = [each.why for each in again.alternatives if each.plan == "2 x tp2pp4"][:1]
    assert why.startswith(("goodput", "P99 of E2E"))


@pytest.mark.parametrize(
    ("worths", "taken"),
    [
        ({"tp4": 1.0, "tp8": 1.0 - TIE / 2}, "tp4"),  # a tie: the roomier
        ({"tp4": 1.0 - TIE / 2, "tp8": 1.0}, "tp4"),
        ({"tp4": 1.0, "tp8": 1.0 + 2 * TIE}, "tp8"),
        ({"tp4": 1.0, "tp8": 0.5, "both": 1.0 + MIXED_GAIN / 2}, "tp4"),
        ({"tp4": 1.0, "tp8": 0.5, "both": 1.0 + 2 * MIXED_GAIN}, "both"),
    ],
)
def test_ties_go_to_the_roomier_and_unlike_replicas_must_be_clearly_better(
    worths: dict[str, float], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The luck of a few requests would choose the plan, or one that is good for this mix alone."""
    judge = case(1.0)
    four, eight = (next(iter(uniform(judge, shape))) for shape in ("tp4", "tp8"))
    plans = {"tp4": {four: 4}, "tp8": {eight: 2}, "both": {four: 2, eight: 1}}
    found = {name: judge.dispatched(plans[name]) for name in worths}
    assert found["tp4"].headroom > found["tp8"].headroom

    def seen(_: object, counts: Counter[Column], *__: object) -> Rehearsed:
        (name,) = [name for name, plan in plans.items() if plan == dict(counts)]
        whole = Fared(
            requests=9, ttft_s=Spread(), tpot_s=Spread(), goodput_share=1.0,
            e2e_s=Spread(p99=1.0 / worths[name]),
        )  # fmt: skip
        return Rehearsed(types=(), columns={}, whole=whole, requests=9)

    monkeypatch.setattr(rehearsal_choice, "rehearse", seen)
    for order in (list(found.values()), list(found.values())[::-1]):
        assert rehearsed(judge, order).best is found[taken]


@pytest.mark.parametrize(
    ("rooms", "taken"),
    [
        ({"tp4": 2.0, "tp8": 2.0 * (1 - UNIFORM_TIE / 2)}, "tp8"),  # about as much
        ({"tp4": 2.0, "tp8": 2.0 * (1 - 2 * UNIFORM_TIE)}, "tp4"),
        ({"tp4": 3.0 * PLENTY, "tp8": PLENTY}, "tp8"),  # calm: nothing comes near either
        ({"tp4": 2.0, "tp8": 0.5, "both": 2.0 * (1 - 2 * ROOM_TIE)}, "tp4"),
        ({"tp4": 2.0, "tp8": 0.5, "both": 2.0 * (1 - ROOM_TIE / 2)}, "both"),
    ],
)
def test_room_comes_before_speed(
    rooms: dict[str, float], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is gained by being faster in calm is lost many times over in the next burst."""
    judge = case(1.0)
    four, eight = (next(iter(uniform(judge, shape))) for shape in ("tp4", "tp8"))
    plans = {"tp4": {four: 4}, "tp8": {eight: 2}, "both": {four: 2, eight: 1}}
    worths = {"tp4": 1.0, "tp8": 2.0, "both": 2.0}
    found = {
        name: replace(judge.dispatched(plans[name]), headroom=headroom)
        for name, headroom in rooms.items()
    }

    def seen(_: object, counts: Counter[Column], *__: object) -> Rehearsed:
        (name,) = [name for name, plan in plans.items() if plan == dict(counts)]
        whole = Fared(
            requests=9, ttft_s=Spread(), tpot_s=Spread(), goodput_share=1.0,
            e2e_s=Spread(p99=1.0 / worths[name]),
        )  # fmt: skip
        return Rehearsed(types=(), columns={}, whole=whole, requests=9)

    monkeypatch.setattr(rehearsal_choice, "rehearse", seen)
    ranking = rehearsed(judge, list(found.values()))
    assert ranking.best is found[taken]
    assert all(each.why for each in ranking.alternatives)


def test_one_of_several_plans_that_are_worth_nothing_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under hopeless demand, with unlike replicas only, a decision would fail, and nothing move."""
    judge = case(1.0)
    four, eight = (next(iter(uniform(judge, shape))) for shape in ("tp4", "tp8"))
    mixed = judge.dispatched({four: 2, eight: 1})
    nothing = Fared(
        requests=9, ttft_s=Spread(), tpot_s=Spread(), goodput_share=0.0, e2e_s=Spread(p99=1.0)
    )
    hopeless = Rehearsed(types=(), columns={}, whole=nothing, requests=9)

    def seen(*_: object) -> Rehearsed:
        return hopeless

    def worthless(_: object) -> float:
        return 0.0

    monkeypatch.setattr(rehearsal_choice, "rehearse", seen)
    monkeypatch.setattr(rehearsal_choice, "worth", worthless)
    assert rehearsed(judge, [mixed]).best is mixed


def test_worth_falls_with_the_tail_and_with_what_is_late() -> None:
    """A dispatch that lets one type wait forever would win by a few requests in time."""

    def whole(goodput: float | None, p99_s: float | None) -> Fared:
        return Fared(
            requests=9, ttft_s=Spread(), tpot_s=Spread(), e2e_s=Spread(p99=p99_s),
            goodput_share=goodput,
        )  # fmt: skip

    assert worth(whole(0.9, 10.0)) > worth(whole(0.8, 10.0)) > worth(whole(0.8, 11.0))
    assert worth(whole(0.5, 60.0)) > worth(whole(0.6, 300.0))
    assert worth(whole(0.0, 60.0)) > worth(whole(0.0, 90.0)) > 0.0, "hopeless ones are told apart"
    assert worth(whole(None, None)) == worth(whole(None, 3.0)) == worth(whole(0.9, None)) == 0.0


def past(*rates: tuple[float, float, float]) -> tuple[PastWindow, ...]:
    """Half minutes, with these requests/s of types 0, 1, 2."""
    return tuple(PastWindow(seconds=30.0, arrivals_rps=dict(enumerate(each))) for each in rates)


def test_the_past_is_played_at_its_level_and_beyond() -> None:
    """Plans that are best at what was foreseen, and founder beyond, would be taken."""
    rates = [(2.0, 1.0, 0.5)] * 27 + [(6.0, 1.0, 0.5)] * 9
    judge = case(1.0)
    judge = replace(judge, problem=replace(judge.problem, history={M: past(*rates)}))
    usual, high = past_of(judge, horizon_s=60.0)
    burst_s, seconds = 270.0, usual.seconds
    assert high.seconds == seconds > burst_s
    bursts = 7.5 * burst_s
    assert len(usual) == pytest.approx(bursts + 3.5 * (seconds - burst_s), rel=0.1)
    part = 6.0 * burst_s / (6.0 * burst_s + 2.0 * (seconds - burst_s))
    assert len(high) / len(usual) == pytest.approx(STRESS, rel=0.05)
    for drawn in (usual, high):
        burst = drawn.at_s >= seconds - burst_s
        assert of_type(drawn, 0)
        share = (burst & (drawn.kinds == 0)).sum() / (drawn.kinds == 0).sum()
        assert share == pytest.approx(part, abs=0.05), "as it came"
    busy = case(5.0)
    five_fold = past(*[(5 * a, 5 * b, 5 * c) for a, b, c in rates])
    busy = replace(busy, problem=replace(busy.problem, history={M: five_fold}))
    for level, drawn in zip((1.0, STRESS), past_of(busy, horizon_s=60.0), strict=True):
        assert len(drawn) < 1.1 * level * PAST_REQUESTS_MAX, "the work is bounded"


def test_a_plan_that_founders_beyond_the_forecast_loses_to_one_that_bears_it() -> None:
    """Large replicas answer soonest until they are full, and forecasts err."""
    judge = case(1.0)
    levels = [
        requests(judge.table, seconds=240.0, seed=1),
        requests(case(10.0).table, seconds=240.0, seed=1),
    ]
    quick, roomy = (judge.dispatched(uniform(judge, shape)) for shape in ("tp8", "tp4"))
    assert rehearsed(judge, [quick, roomy], drawn=levels[:1]).best is quick
    ranking = rehearsed(judge, [quick, roomy], drawn=levels)
    for each in ranking.played:
        assert len(each.outcomes) == len(levels)
        low, high = (worth(outcome.whole) for outcome in each.outcomes)
        assert each.worth == pytest.approx((low * high) ** 0.5)
        assert each.outcome is each.outcomes[0]
    assert ranking.best is roomy
    (loser,) = ranking.alternatives
    assert f"at {STRESS:g} times the demand goodput" in loser.why


def test_elastic_plans_leave_gpus_unused_that_targets_do_not_need() -> None:
    """Under light load; and no more than the load allows."""
    needs = Needs(elastic=True)
    gpus: list[int] = []
    for scale in (0.2, 1.0, 3.0):
        judge = judge_of(replace(case(scale).problem, needs=needs))
        best, terms = solve_capacity(judge.table, [M], time_limit_s=10.0, needs=needs)
        assert best is not None
        found = candidates(judge, best, terms, time_limit_s=10.0)
        ranking = rehearsed(judge, found, elastic=True)
        assert ranking.played[0].goodput_share > 0.98
        assert ranking.best.price <= choose(found).price
        gpus.append(ranking.best.gpus)
    assert gpus[0] < gpus[-1] <= 16
    assert gpus == sorted(gpus)


def test_plans_that_are_to_survive_a_loss_all_do() -> None:
    """Any replica may be lost, and the rest carries the demand."""
    judge, needs = case(1.0), Needs(survive=1)
    best, terms = solve_capacity(judge.table, [M], time_limit_s=10.0, needs=needs)
    assert best is not None
    assert terms.survive == 1
    found = candidates(judge, best, terms, time_limit_s=10.0)
    assert len(found) > 3
    for candidate in found:
        assert min(losses(judge.table, candidate.counts).values()) >= 0.999


def test_where_gpus_do_not_suffice_less_is_asked_for() -> None:
    """First no replica may be lost any more, then single replicas have to do."""
    asked = problem({M: [(1.0, 500.0, 50.0)], SMALL: [(1.0, 500.0, 50.0)]}, offers(4))
    table = build(asked, MadeUpRates())
    needs = Needs(replicas_min={M: 2, SMALL: 2}, survive=1)
    best, terms = solve_capacity(table, [M, SMALL], time_limit_s=10.0, needs=needs)
    assert best is not None
    assert terms.survive == 0
    assert {column.model_id for column in best.counts} == {M, SMALL}
