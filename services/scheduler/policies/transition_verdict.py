"""Whether to go from the replicas in force to a better plan, and how far at once.

A whole change may cost more than it brings while the same change in steps does not: sixteen GPUs
that load weights for a minute serve nobody, two of them are hardly missed. So the change is tried
in as few steps as can be, then in more, until a way is affordable:

- it pays back: ``transition.payback`` over the time that the demand is expected to last; and
- it builds up no more waiting than staying would (``transition.strains``): as long as the replicas
  in force carry the demand, those that stay must carry it too, with ``MARGIN``. When those in force
  are overloaded, what waits for them in vain justifies larger steps.

The first step of the first way that is affordable is what to do now. When it is in force the rest
is decided anew: the next steps follow as long as the plan they lead to remains the better one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from services.scheduler.policies.capacity import Column
from services.scheduler.policies.capacity_plan import Placed
from services.scheduler.policies.flow import best_flow
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.joint_choice import Candidate
from services.scheduler.policies.transition import (
    Change,
    Payback,
    Phase,
    Toll,
    change,
    payback,
    strains,
    toll,
)
from services.scheduler.policies.transition_columns import columns_of, mix_headrooms
from services.scheduler.policies.transition_live import is_live, live_toll
from services.scheduler.policies.transition_steps import batches, components, walk
from shared.messages.decisions import SwitchOutlook
from shared.messages.plans import ReplicaSpec

STEPS = (1, 2, 3, 4, 6, 8, 16)  # ways tried, by their number of steps
MARGIN = 1.05  # times the demand that the replicas that stay must carry
OUTLOOK = 6.0  # backlogs are foreseen for so many times a change's length, or for the horizon
PHASE_S_MIN = 1.0  # over less, queues are no queues


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """The change in question. ``before``: replicas of ``kept``; ``placed``: those of ``choice``;
    ``running``: requests by replica; ``switch_s``: how long each switch takes, None: as the cost
    model says; ``done``: steps of the same way that were walked already; ``must_pay``: whether it
    is made for what it gains in lateness; ``scale``: times the lateness that formulas predict."""

    judge: Weighed
    kept: Candidate
    choice: Candidate
    before: tuple[ReplicaSpec, ...]
    placed: Placed
    lasts_s: float
    running: Mapping[str, float] = field(default_factory=dict[str, float])
    switch_s: float | None = None
    done: int = 0
    must_pay: bool = True
    scale: float = 1.0

    @property
    def after(self) -> tuple[ReplicaSpec, ...]:
        return self.placed.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """``steps`` in their order, each with its toll; ``served``: times the demand that replicas
    carry while they last, on the mean."""

    steps: tuple[Change, ...]
    tolls: tuple[Toll, ...]
    served: tuple[float, ...]
    sums: Payback | None = None
    refused: str = ""

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.tolls)

    def outlook(self, move: Move, why: str, *, moves: bool) -> SwitchOutlook:
        """Its first step, and what the whole way costs and gains."""
        first, sums = self.tolls[0], self.sums
        several = len(self.steps) + move.done > 1
        return SwitchOutlook(
            seconds=first.seconds,
            pause_s=first.pause_s,
            served_share=min(1.0, self.served[0]),
            bytes_moved=first.bytes_moved,
            busiest_link_s=first.busiest_link_s,
            requests_paused=first.requests_paused,
            gain=sums.gain if sums else 0.0,
            cost=sums.cost if sums else 0.0,
            payback_s=sums.payback_s if sums else None,
            horizon_s=move.lasts_s,
            moves=moves,
            step=f"step {move.done + 1} of {move.done + len(self.steps)}" if several else "",
            why=why,
        )


@dataclass(frozen=True, slots=True)
class _Time:
    """For how long ``specs`` serve, and no others: ``headroom`` times the demand, which has to be
    ``margin`` at least. ``known``: what they are as a plan, with its lateness."""

    seconds: float
    specs: tuple[ReplicaSpec, ...]
    headroom: float
    margin: float = MARGIN
    known: Candidate | None = None


def affordable_way(move: Move) -> Way:
    """The way of fewest steps that is affordable; else the one whose steps are smallest, with why
    it is ``refused``. Replicas differ between ``move.before`` and ``move.after``."""
    meanwhile = _Meanwhile(move)
    whole = change(move.before, move.after)
    parts = components(whole)
    carries = meanwhile.carries()
    way: Way | None = None
    for count in STEPS:
        if way is not None and (count > len(parts) or len(way.steps) < count // 2):
            break
        way = meanwhile.judged(walk(move.before, batches(parts, count, carries)))
        if not way.refused:
            return way
    assert way is not None, "there is a way of one step"
    return way if way.sums else replace(way, sums=meanwhile.summed(way))


class _Meanwhile:
    """What serves while a change is under way, worked out once for equal counts."""

    def __init__(self, move: Move) -> None:
        self._move, self._table = move, move.judge.table
        self._columns = columns_of(self._table, (*move.before, *move.after))
        self._headrooms: dict[tuple[tuple[Column, int], ...], float] = {}

    def carries(self) -> dict[str, float]:
        """Requests/s by replica of its model's mix, as a multiple of what is expected of it."""
        rates = dict(zip(self._table.columns, mix_headrooms(self._table), strict=True))
        return {id_: rates[column] for id_, column in self._columns.items()}

    def judged(self, steps: Sequence[Change]) -> Way:
        move = self._move
        tolls = tuple(self._toll(step) for step in steps)
        times = [self._times(step, each) for step, each in zip(steps, tolls, strict=True)]
        served = tuple(_mean(each) for each in times)
        way = Way(steps=tuple(steps), tolls=tolls, served=served)
        phases = [
            Phase(seconds=time.seconds, lateness=0.0, headroom=time.headroom / time.margin)
            for each in times
            for time in each
            if time.seconds >= PHASE_S_MIN
        ]
        if abandoned := self._abandoned(steps):
            return replace(way, refused=f"{', '.join(abandoned)} would have no replica meanwhile")
        ahead_s = max(move.lasts_s, OUTLOOK * way.seconds)
        before = Phase(seconds=ahead_s, lateness=0.0, headroom=move.kept.headroom)
        after = Phase(seconds=ahead_s, lateness=0.0, headroom=move.choice.headroom)
        if strains(phases, before=before, after=after):
            least = min(served)
            return replace(
                way,
                refused=f"while switching for {way.seconds:.0f} s only {least:.3g} times the "
                "demand is served, and what waits then is not worked off in time",
            )
        sums = self.summed(way)
        pays = sums.gain > sums.cost or not move.must_pay
        return replace(way, sums=sums, refused="" if pays else "does not pay back")

    def summed(self, way: Way) -> Payback:
        """What the way gains and costs in lateness."""
        move = self._move
        phases = [
            Phase(seconds=time.seconds, lateness=self._late(time), headroom=time.headroom)
            for step, each in zip(way.steps, way.tolls, strict=True)
            for time in self._times(step, each)
        ]
        return payback(
            phases,
            before=move.kept.lateness,
            after=move.choice.lateness,
            horizon_s=move.lasts_s,
        )

    def _abandoned(self, steps: Sequence[Change]) -> list[str]:
        """Models that have a replica before and after all steps, and none between two."""
        kept = {spec.model_id for spec in self._move.before} & {
            spec.model_id for spec in self._move.after
        }
        between = [{spec.model_id for spec in step.after} for step in steps[:-1]]
        return sorted({model_id for there in between for model_id in kept - there})

    def _toll(self, step: Change) -> Toll:
        judge = self._move.judge
        models = {
            spec.replica_id: judge.model(self._columns[spec.replica_id])
            for spec in (*step.coming, *step.going)
            if spec.replica_id in self._columns
        }
        offers, requests = judge.problem.offers, self._move.running
        if self._move.switch_s is None and is_live(step, offers, models):
            return live_toll(step, offers, models, running=requests)
        found = toll(step, offers, models, running=requests)
        if self._move.switch_s is not None and (step.coming or step.going):
            return replace(found, seconds=self._move.switch_s)
        return found

    def _counts(self, specs: Iterable[ReplicaSpec]) -> Counter[Column]:
        return Counter(
            self._columns[spec.replica_id] for spec in specs if spec.replica_id in self._columns
        )

    def _headroom(self, specs: Iterable[ReplicaSpec]) -> float:
        counts = self._counts(specs)
        key = tuple(sorted(counts.items()))
        if key not in self._headrooms:
            flow = best_flow(self._table.instance(counts), "headroom") if counts else None
            self._headrooms[key] = flow.headroom if flow else 0.0
        return self._headrooms[key]

    def _times(self, step: Change, toll: Toll) -> list[_Time]:
        """Who serves for how long while the step is made."""
        staying = self._headroom(step.staying)
        if toll.pause_s is None:
            return [_Time(toll.seconds, step.staying, staying)]
        standing = (*step.going, *step.staying)
        ready_s = toll.seconds - toll.pause_s
        serve = _Time(ready_s, standing, self._headroom(standing), margin=1.0)
        if set(standing) == set(self._move.before):
            serve = replace(serve, headroom=self._move.kept.headroom, known=self._move.kept)
        return [serve, _Time(toll.pause_s, step.staying, staying)]

    def _late(self, time: _Time) -> float:
        if time.known is not None:
            return time.known.lateness
        counts = self._counts(time.specs)
        during = self._move.judge.within(max(PHASE_S_MIN, time.seconds))
        if counts:
            return self._move.scale * during.dispatched(counts).lateness
        return self._move.scale * during.lateness({}, np.zeros_like(self._table.rates))


def _mean(times: Sequence[_Time]) -> float:
    """Times the demand that is served, over the whole of them."""
    seconds = sum(time.seconds for time in times)
    if seconds <= 0.0:
        return times[-1].headroom
    return sum(time.seconds * time.headroom for time in times) / seconds
