"""Correction of weights between decisions: by what replicas bear, bounded, and without swinging."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from services.scheduler.balance import Balance
from services.scheduler.correction import (
    CHANGE_MIN,
    FACTOR_MAX,
    LENT_MAX,
    Bias,
    advanced,
    corrected,
    parts,
)
from services.scheduler.correction_size import largest_move
from services.scheduler.plan_id import make_plan
from services.scheduler.standing import Standing
from shared.messages.plans import PlanInForce, ReplicaSpec
from shared.messages.replicas import ReplicaPhase, ReplicaReport

PERIOD_S = 5.0


def replicas(*models: str, shape: str = "tp1pp1") -> tuple[ReplicaSpec, ...]:
    return tuple(
        ReplicaSpec(replica_id=f"r{i}", model_id=model, parallelism=shape, gpus=(f"g{i}",))
        for i, model in enumerate(models)
    )


def load(
    number: int,
    running: int,
    waiting: int = 0,
    *,
    step_s: float = 0.02,
    phase: ReplicaPhase = "serving",
    kv_blocks_total: int = 1000,
) -> ReplicaReport:
    return ReplicaReport(
        replica_id=f"r{number}", worker_id=f"g{number}", incarnation="i", epoch=1, phase=phase,
        running=running, waiting=waiting, step_s=step_s, kv_blocks_total=kv_blocks_total,
    )  # fmt: skip


def after(
    seconds: int,
    rows: Mapping[str, Mapping[str, float]],
    specs: tuple[ReplicaSpec, ...],
    *loads: ReplicaReport,
    bias: Bias | None = None,
) -> Bias:
    bias = bias or Bias()
    for _ in range(seconds):
        bias = advanced(bias, specs, rows, loads, seconds=1.0)
    return bias


@dataclass
class Loop:
    """Replicas as fluids, all alike until the first slows down: each holds requests, serves up to
    ``slots`` at a time, and gets its share of arrivals, bent by load as by routers' ``gain``."""

    used: float  # of what all together could serve
    latency_s: float
    slow: float  # of its speed that the first keeps while it is slow
    gain: float
    count: int = 4
    slots: int = 64

    def run(self, *, slow_s: int, then_s: int) -> list[tuple[int, float]]:
        """When the share of the first replica was changed, and to what."""
        specs = replicas(*["m"] * self.count)
        base = {"*": {spec.replica_id: 1.0 / self.count for spec in specs}}
        standing, balance = Standing(period_s=1.0), Balance(PERIOD_S)
        standing.hear(PlanInForce(epoch=1, plan=make_plan(specs, base, reason="base")), 0.0)
        rate = self.slots / self.latency_s
        held, changes = [0.0] * self.count, list[tuple[int, float]]()
        for now_s in range(slow_s + then_s):
            pace = [self.slow if i == 0 and now_s < slow_s else 1.0 for i in range(self.count)]
            assert standing.plan is not None
            self._second(held, standing.plan.weights["*"], pace, rate)
            loads = [
                load(i, int(min(h, self.slots)), int(max(0.0, h - self.slots)), step_s=0.02 / p)
                for i, (h, p) in enumerate(zip(held, pace, strict=True))
            ]
            balance.look(standing, loads, float(now_s))
            proposed = balance.proposal(standing, loads, float(now_s))
            if proposed is not None and proposed.plan is not None:
                standing.asked_for(proposed.plan, standing.weights)
                standing.hear(PlanInForce(epoch=1, plan=proposed.plan), float(now_s))
                changes.append((now_s, proposed.plan.weights["*"]["r0"]))
        return changes

    def _second(
        self, held: list[float], shares: Mapping[str, float], pace: list[float], rate: float
    ) -> None:
        loads = [min(h, self.slots) / self.slots + 2 * max(0.0, h / self.slots - 1.0) for h in held]
        bent = [shares[f"r{i}"] / (1.0 + self.gain * x * x) for i, x in enumerate(loads)]
        for i, part in enumerate(bent):
            served = rate * pace[i] * min(held[i], self.slots) / self.slots
            held[i] += self.used * rate * self.count * part / sum(bent) - served


@pytest.mark.parametrize("gain", [0.0, 4.0])
@pytest.mark.parametrize(
    ("used", "latency_s", "slow"),
    [(0.8, 10.0, 0.5), (0.6, 10.0, 0.3), (0.8, 2.0, 0.5), (0.8, 60.0, 0.5)],
)
def test_a_slow_replica_loses_share_and_gets_it_back_without_swinging(
    used: float, latency_s: float, slow: float, gain: float
) -> None:
    """Otherwise the fast loop would chase queues that it made itself, or leave a replica that has
    recovered idle."""
    loop = Loop(used=used, latency_s=latency_s, slow=slow, gain=gain)
    changes = loop.run(slow_s=900, then_s=1500)
    shares = [0.25, *(share for _, share in changes)]
    assert min(shares) < 0.21, changes
    assert max(shares) <= 0.25 + 1e-9, changes
    steps = [later - before for before, later in itertools.pairwise(shares)]
    turns = sum(a * b < 0.0 for a, b in itertools.pairwise(steps))
    assert turns <= 1, changes
    assert shares[-1] > 0.25 - CHANGE_MIN, changes
    assert len(changes) <= 8, changes


def test_at_the_edge_of_capacity_it_hunts_slowly_at_most() -> None:
    """Otherwise, where shares matter most, plans would follow each other within seconds."""
    loop = Loop(used=0.85, latency_s=10.0, slow=0.6, gain=0.0)
    changes = [(0, 0.25), *loop.run(slow_s=1500, then_s=0)]
    steps = [(b[0], b[1] - a[1]) for a, b in itertools.pairwise(changes)]
    turns = [b[0] for a, b in itertools.pairwise(steps) if a[1] * b[1] < 0.0]
    assert all(later - before > 100 for before, later in itertools.pairwise(turns)), changes
    assert len(changes) < 12, changes


def test_what_the_router_balances_by_itself_is_left_to_it() -> None:
    """Otherwise a new plan would come into force for what each request's route corrects anyway."""
    assert Loop(used=0.9, latency_s=10.0, slow=0.7, gain=4.0).run(slow_s=900, then_s=100) == []


def test_even_replicas_keep_their_weights_however_loaded() -> None:
    """Otherwise a demand that is too much for all would be shuffled about."""
    specs = replicas("m", "m", "m")
    rows = {"*": {"r0": 0.2, "r1": 0.3, "r2": 0.5}}
    bias = after(100, rows, specs, load(0, 64, 90), load(1, 64, 100), load(2, 64, 110))
    assert corrected(rows, specs, bias) == rows


def test_small_differences_are_within_the_dead_band() -> None:
    """Otherwise noise would put a new plan in force every few seconds."""
    specs = replicas("m", "m")
    rows = {"*": {"r0": 0.5, "r1": 0.5}}
    bias = after(300, rows, specs, load(0, 64, 40), load(1, 40, 0, step_s=0.025))
    assert corrected(rows, specs, bias) == rows


def test_a_replica_whose_steps_are_slower_than_its_likes_is_relieved() -> None:
    """Otherwise a throttled GPU would make its requests late before any queue shows."""
    specs = replicas("m", "m", "m")
    rows = {"*": {"r0": 0.25, "r1": 0.25, "r2": 0.5}}
    bias = after(60, rows, specs, load(0, 30, step_s=0.08), load(1, 30), load(2, 30))
    shares = corrected(rows, specs, bias)["*"]
    assert shares["r0"] < 0.2
    assert shares["r2"] / shares["r1"] == pytest.approx(2.0, rel=1e-4)
    unlike = (specs[0], *replicas("m", "m", "m", shape="tp2pp1")[1:])
    bias = after(60, rows, unlike, load(0, 30, step_s=0.08), load(1, 30), load(2, 30))
    assert corrected(rows, unlike, bias) == rows, "other shapes are no measure"


def test_each_model_keeps_its_part_of_a_row() -> None:
    """Otherwise a queue at one model would take weight from the other's replicas."""
    specs = replicas("m", "m", "n", "n")
    rows = {"*": {"r0": 0.25, "r1": 0.25, "r2": 0.25, "r3": 0.25}}
    bias = after(200, rows, specs, load(0, 64, 300), load(1, 64), load(2, 64), load(3, 64))
    row = corrected(rows, specs, bias)["*"]
    assert row["r0"] + row["r1"] == pytest.approx(0.5)
    assert (row["r2"], row["r3"]) == pytest.approx((0.25, 0.25), abs=1e-6)
    assert 1.0 / FACTOR_MAX**2 - 1e-3 <= row["r0"] / row["r1"] < 0.5, "bounded"


def test_who_serves_a_type_not_gets_none_of_it_unless_all_that_do_have_broken() -> None:
    """Otherwise long prompts would be sent among the short ones that the plan keeps them from,
    whenever they queue."""
    specs = replicas("m", "m", "m")
    rows = {"0": {"r0": 0.5, "r1": 0.5}, "1": {"r2": 1.0}}
    idle = load(2, 5)
    for first in (load(0, 64, 200), load(0, 1, 5000), load(0, 0, phase="failed")):
        for second in (load(1, 64), load(1, 64, 200), load(1, 1, 5000)):
            bias = after(100, rows, specs, first, second, idle)
            assert corrected(rows, specs, bias)["0"].keys() == {"r0", "r1"}
            assert not bias.loans
    broke = (load(0, 0, phase="failed"), load(1, 0, phase="failed"))
    both = after(100, rows, specs, *broke, idle)
    row = corrected(rows, specs, both)
    assert row["0"]["r2"] == pytest.approx(LENT_MAX)
    assert row["1"] == {"r2": 1.0}
    over = after(60, rows, specs, load(0, 64), load(1, 64), idle, bias=both)
    assert corrected(rows, specs, over)["0"].keys() == {"r0", "r1"}
    busy = after(100, rows, specs, *broke, load(2, 64, 60))
    assert corrected(rows, specs, busy)["0"].keys() == {"r0", "r1"}
    tight = load(2, 5, kv_blocks_total=500)
    small = after(100, rows, specs, *broke, tight)
    assert corrected(rows, specs, small)["0"].keys() == {"r0", "r1"}, "it might not fit there"


A_AND_B = {"0": {"r0": 0.5, "r1": 0.5}, "1": {"r2": 0.5, "r3": 0.5}}
EVERYBODY: dict[str, float] = dict.fromkeys(["r0", "r1", "r2", "r3"], 0.25)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ({"*": EVERYBODY}, [["r0", "r1", "r2", "r3"]]),
        (A_AND_B, [["r0", "r1"], ["r2", "r3"]]),
        ({"*": EVERYBODY, **A_AND_B}, [["r0", "r1"], ["r2", "r3"]]),
        ({"*": EVERYBODY, **A_AND_B, "7": EVERYBODY}, [["r0", "r1"], ["r2", "r3"]]),
        (  # a way out at need: little of a type, beside those who mainly serve it
            {"0": {"r0": 0.45, "r1": 0.45, "r2": 0.05, "r3": 0.05}, "1": A_AND_B["1"]},
            [["r0", "r1"], ["r2", "r3"]],
        ),
        (  # one type more that all three serve: whoever is late is late for it, too
            {"0": {"r0": 0.5, "r1": 0.5}, "1": {"r1": 0.5, "r2": 0.5}, "2": {"r3": 1.0}},
            [["r0", "r1", "r2"], ["r3"]],
        ),
        ({"0": {"r0": 1.0}, "1": {"other": 1.0}}, [["r0"], ["r1"], ["r2"], ["r3"]]),
    ],
)
def test_parts_are_those_who_mainly_serve_the_same_types(
    rows: Mapping[str, Mapping[str, float]], found: list[list[str]]
) -> None:
    """Otherwise types that a plan keeps apart would be mixed by corrections; the row of any type,
    and rows of other models for which it stands in, have everybody in all plans."""
    assert parts(["r0", "r1", "r2", "r3"], rows) == found


def test_types_that_are_kept_apart_are_not_mixed_by_corrections() -> None:
    """Otherwise a burst of one type would become everybody's, which the plan was made to avoid."""
    specs = replicas("m", "m", "m", "m")
    leaky = {"r0": 0.45, "r1": 0.45, "r2": 0.05, "r3": 0.05}
    rows = {"*": EVERYBODY, "0": leaky, "1": A_AND_B["1"]}
    late = (load(0, 64, 120), load(1, 64, 120))
    calm = (load(2, 20), load(3, 20))
    bias = after(300, rows, specs, *late, *calm)
    assert corrected(rows, specs, bias) == rows, "both of them alike, so none is relieved"
    slow = after(300, rows, specs, load(0, 64, 300), load(1, 64), *calm)
    found = corrected(rows, specs, slow)
    assert found["1"] == rows["1"]
    assert found["0"]["r0"] < 0.4
    assert found["0"]["r1"] > 0.5
    assert found["0"]["r2"] == found["0"]["r3"] < 0.07


def test_a_replica_that_broke_has_its_type_lent_and_one_that_starts_counts_as_unknown() -> None:
    """Otherwise a type whose replicas all broke would wait for the next decision."""
    specs = replicas("m", "m")
    rows = {"0": {"r0": 1.0}, "1": {"r1": 1.0}}
    broke = after(30, rows, specs, load(0, 0, phase="failed"), load(1, 5))
    assert corrected(rows, specs, broke)["0"]["r1"] > 0.2
    starts = after(30, rows, specs, load(0, 0, phase="starting"), load(1, 5))
    assert corrected(rows, specs, starts) == rows


def test_what_was_learnt_does_not_follow_an_id_to_another_gpu() -> None:
    """Otherwise a replica placed anew would be shunned for what its namesake bore."""
    specs, row = replicas("m", "m"), {"*": {"r0": 0.5, "r1": 0.5}}
    standing, balance = Standing(period_s=1.0), Balance(PERIOD_S)
    standing.hear(PlanInForce(epoch=1, plan=make_plan(specs, row, reason="")), 0.0)
    for now_s in range(60):
        balance.look(standing, [load(0, 64, 300), load(1, 10)], float(now_s))
    assert standing.plan is not None
    assert balance.applied(standing.plan).weights["*"]["r0"] < 0.3
    moved = (
        ReplicaSpec(replica_id="r0", model_id="m", parallelism="tp1pp1", gpus=("g9",)),
        specs[1],
    )
    assert balance.applied(make_plan(moved, row, reason="")).weights["*"]["r0"] > 0.3


def test_moves_are_measured_in_parts_of_a_models_requests() -> None:
    """Otherwise a correction would have to be twice as large where two models share the rows."""
    specs = replicas("m", "m", "n", "n")
    before = {"*": {"r0": 0.25, "r1": 0.25, "r2": 0.25, "r3": 0.25}}
    later = {"*": {"r0": 0.2, "r1": 0.3, "r2": 0.25, "r3": 0.25}}
    move = largest_move(before, later, specs)
    assert (move.before, move.size) == pytest.approx((0.5, 0.1))
    assert largest_move(before, {**before, "0": later["*"]}, specs).size == pytest.approx(0.1)


@pytest.mark.parametrize("phase", ["preparing", "prepared", "paused", "draining", "starting"])
def test_a_replica_in_a_switch_has_not_failed(phase: ReplicaPhase) -> None:
    """A live switch would be taken for a broken replica, and its requests be sent to others."""
    specs = replicas("m", "m", "m")
    rows = {"0": {"r0": 0.5, "r1": 0.5}, "1": {"r2": 1.0}}
    still = (load(0, 40, 300, phase=phase), load(1, 40, 300, phase=phase))
    bias = after(100, rows, specs, *still, load(2, 5))
    assert corrected(rows, specs, bias) == rows


def test_a_pause_forgets_nothing() -> None:
    """What was learnt of a slow replica would be lost whenever another one is switched."""
    specs = replicas("m", "m")
    rows = {"*": {"r0": 0.5, "r1": 0.5}}
    learnt = after(100, rows, specs, load(0, 40, 300), load(1, 40))
    assert corrected(rows, specs, learnt)["*"]["r0"] < 0.5
    still = (load(0, 40, phase="paused"), load(1, 40, phase="paused"))
    paused = after(1, rows, specs, *still, bias=learnt)
    assert corrected(rows, specs, paused) == corrected(rows, specs, learnt)
