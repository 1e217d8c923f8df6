"""How a plan would fare: a short simulation of the forecast, inside the scheduler.

    scene = Scene(table=..., model_of=..., limits=..., goals=...)
    drawn = requests(table, seconds=120.0, seed=1)       # once for a decision
    rehearse(scene, counts, shares, drawn)               # for each plan, with the same requests

Requests come as ``rehearsal_requests`` draws them: Poisson, lengths spread about the types' means.
They are dispatched as routers do under a plan: smooth weighted round robin by the plan's shares,
each divided by 1 + ``LOAD_GAIN`` times the square of the replica's pressure, which is known from
reports ten times a second and from what was sent since. Replicas run them by their step
times (``rehearsal_replica``). So queues, bursts, batches, and types in each other's way are as
they would be, and what is left to chance is the same for every plan compared.

Requests that arrive after the warm-up count, and are followed to their end, at most ``DRAINS``
times the rehearsal's length beyond it. Those that have not ended then, that no replica is there
for, or that are too long for the one they came to count as ended at that bound, and as late.

To bound the work only some replicas of a column are rehearsed where there are many, with as
large a part of its requests: identical replicas fare alike. What is told of types and of the
whole weighs each request by how many it stands for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array
from services.scheduler.policies.history import Pattern
from services.scheduler.policies.rehearsal_outcome import Fared, Goals, Seen, fared
from services.scheduler.policies.rehearsal_replica import NONE, Log, Replica
from services.scheduler.policies.rehearsal_requests import Drawn, draw
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel

REQUESTS_MAX = 8_000  # of a rehearsal, about: some 30 us each
REPLICAS_MAX = 64  # about: each is looked at for every request
COPIES_MIN = 3  # of a column, where it has as many
LOAD_GAIN = 4.0  # routers' own: router.load_gain
REPORT_S = 0.1  # between reports of a replica's load
DRAINS = 4.0  # lengths of the rehearsal for which the last requests are followed
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What all plans of a decision have in common."""

    table: Table
    model_of: Callable[[Column], CostModel]
    limits: EngineLimits
    goals: Goals


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """``types`` in the table's order; ``columns``: those that replicas were rehearsed of.
    ``requests``: how many were simulated, those of the warm-up included."""

    types: tuple[Fared, ...]
    columns: Mapping[Column, Fared]
    whole: Fared
    requests: int


def requests(
    table: Table,
    *,
    seconds: float,
    seed: int,
    backlog: Mapping[int, int] | None = None,
    pattern: Pattern | None = None,
) -> Drawn:
    """What ``table`` expects. ``backlog``: by index of a type, requests that wait already;
    ``pattern``: how the types' rates change, if they do."""
    return draw(table.types, seconds=seconds, seed=seed, backlog=backlog, pattern=pattern)


def rehearse(scene: Scene, counts: Mapping[Column, int], shares: Array, drawn: Drawn) -> Rehearsed:
    """``drawn`` served by ``counts`` with ``shares`` [S, J] of each type by column; what they leave
    of 1 finds no replica. Same arguments, same answer."""
    columns, types = scene.table.columns, scene.table.types
    copies = _copies(columns, counts, shares, len(drawn))
    part = np.zeros((len(copies) + 1, len(types)))  # of each type, by home; the last is none
    for home, (s, copy) in enumerate(copies):
        part[home] = shares[s] * copy / counts[columns[s]]
    part[-1] = np.clip(1.0 - sum(shares[s] for s, _ in copies), 0.0, 1.0)
    kept = np.minimum(part.sum(axis=0), 1.0)
    rows = np.flatnonzero(drawn.lots < kept[drawn.taken_for])
    kinds, taken_for = drawn.kinds[rows], drawn.taken_for[rows]
    log = Log(
        drawn.at_s[rows].tolist(),
        drawn.input_tokens[rows].tolist(),
        drawn.output_tokens[rows].tolist(),
    )
    homes = [home for home, (_, copy) in enumerate(copies) for _ in range(copy)]
    replicas = [
        Replica(scene.model_of(columns[copies[home][0]]), scene.limits, log) for home in homes
    ]
    each = np.array([part[home] / copies[home][1] for home in homes] + [part[-1]])
    sent = _serve(log, taken_for.tolist(), replicas, _Dispatch(each, len(replicas)))
    bound_s = (1.0 + DRAINS) * drawn.seconds
    for replica in replicas:
        replica.advance(bound_s)
    homes_of = np.array([*homes, NONE])[sent]
    seen = Seen.of(log, kinds, homes_of, weights=1.0 / kept[taken_for], bound_s=bound_s)
    seen = seen.only(seen.at_s >= drawn.warm_s)
    return Rehearsed(
        types=tuple(fared(seen.only(seen.kinds == j), scene.goals) for j in range(len(types))),
        columns={
            columns[s]: fared(seen.only(seen.homes == home), scene.goals)
            for home, (s, _) in enumerate(copies)
        },
        whole=fared(seen, scene.goals),
        requests=len(rows),
    )


class _Dispatch:
    """Smooth weighted round robin over the options of each type, corrected by load. An option is a
    replica's number, or ``nobody``'s."""

    def __init__(self, each: Array, nobody: int) -> None:
        """``each`` [R + 1, J]: of each type, what each replica is to get, and nobody."""
        self.pressures = [0.0] * (nobody + 1)
        self._options = [
            [(int(r), float(each[r, j])) for r in np.flatnonzero(each[:, j])]
            for j in range(each.shape[1])
        ]
        # Phases spread evenly, so that types do not go round the replicas in step.
        self._credits = [
            [(GOLDEN * (j + 1) * (k + 1)) % 1.0 - 0.5 for k in range(len(options))]
            for j, options in enumerate(self._options)
        ]

    def choose(self, kind: int) -> int:
        options, credits_ = self._options[kind], self._credits[kind]
        if len(options) == 1:
            return options[0][0]
        pressures = self.pressures
        incomes = [share / (1.0 + LOAD_GAIN * pressures[r] ** 2) for r, share in options]
        total = sum(incomes)
        best, richest = 0, float("-inf")
        for k, income in enumerate(incomes):
            credit = credits_[k] = credits_[k] + income / total
            if credit > richest:
                best, richest = k, credit
        credits_[best] -= 1.0
        return options[best][0]


def _serve(
    log: Log, kinds: Sequence[int], replicas: Sequence[Replica], dispatch: _Dispatch
) -> npt.NDArray[np.intp]:
    """Send every request somewhere; the replica's number of each, or of nobody."""
    sent: list[int] = []
    pressures, nobody, report_s = dispatch.pressures, len(replicas), 0.0
    for i, (at_s, kind) in enumerate(zip(log.at_s, kinds, strict=True)):
        if at_s >= report_s:
            report_s = at_s + REPORT_S
            for r, replica in enumerate(replicas):
                replica.advance(at_s)
                pressures[r] = replica.pressure()
        r = dispatch.choose(kind)
        if r != nobody:
            replica = replicas[r]
            if log.input_tokens[i] + log.output_tokens[i] - 1 > replica.tokens_max:
                r = nobody
            else:
                replica.send(i)
                pressures[r] += replica.seat
        sent.append(r)
    return np.array(sent, np.intp)


def _copies(
    columns: Sequence[Column], counts: Mapping[Column, int], shares: Array, drawn: int
) -> list[tuple[int, int]]:
    """Which columns are rehearsed, by index, and how many replicas of each: all that get anything,
    thinned alike where that would be too much work."""
    used = {
        s: counts[column]
        for s, column in enumerate(columns)
        if counts.get(column, 0) > 0 and shares[s].any()
    }
    part = min(1.0, REQUESTS_MAX / max(drawn, 1), REPLICAS_MAX / max(sum(used.values()), 1))
    return [(s, min(count, max(COPIES_MIN, ceil(count * part)))) for s, count in used.items()]
