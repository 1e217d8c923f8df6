"""Weights that go over in stages: what a switcher started in the middle does, what is refused."""

from typing import Any

import msgspec

from services.switcher.config import SwitcherConfig
from services.switcher.course import RECOVERED
from services.switcher.events import TransferPlanned
from shared.messages.plans import StoredPlan, SwitchEnded, SwitchStarted
from shared.messages.replicas import AdvanceStage, HostedReplica, PrepareReplica
from shared.placement.sheets import Span
from tests.unit.switcher_runs import Run, hosted, plan, replica

TWO = plan("TWO", replica("r0", "g0"), replica("r1", "g1"))
WIDE = plan("WIDE", replica("r2", "g0", "g1"))
NARROW = plan("NARROW", replica("r0", "g0"), replica("r1", "g1"))
STAGES: tuple[Span, ...] = ((0, 2), (2, 3), (3, 4))
OTHERS: tuple[Span, ...] = ((0, 1), (1, 4))


def old(rank: int, phase: Any = "paused", **more: Any) -> HostedReplica:
    held = hosted(f"r{rank}", 2 if phase == "paused" else 1, phase)
    return msgspec.structs.replace(held, **more)


def new(rank: int, phase: Any = "prepared", **more: Any) -> HostedReplica:
    held = hosted("r2", 2, phase, rank=rank, tp=2)
    done = {} if phase == "preparing" else {"prepared": 2}
    return msgspec.structs.replace(held, **{"stage_layers": STAGES, **done, **more})


def begun(*held: tuple[HostedReplica, HostedReplica]) -> Run:
    """A switcher started while these are what g0 and g1 hold, in a switch from TWO to WIDE."""
    run = Run(live=True)
    run.loaded(StoredPlan(epoch=1, in_force=TWO, target=WIDE, target_epoch=2, way="live"))
    for rank, both in enumerate(held):
        run.report(f"g{rank}", *both)
    return run


def test_the_stages_are_told_with_the_copies() -> None:
    """Whoever goes on with the switch could else not know what may be freed."""
    run = Run(live=True).in_force(TWO, 1)
    run.adopt(WIDE, 1)
    run.write()
    run.planned(TransferPlanned(epoch=2, stages=STAGES))
    assert {m.stage_layers for m in run.said(PrepareReplica)} == {STAGES}


def test_a_switcher_started_in_the_middle_goes_on_with_the_stages_of_the_former() -> None:
    """With stages of its own it would have layers freed that nobody has fetched."""
    run = begun((old(0, stage=1), new(0, stage=1)), (old(1, stage=1), new(1)))
    run.planned(TransferPlanned(epoch=2, stages=OTHERS))
    assert run.core.state == "taking"
    assert run.commands == ["stage 2 r0@g0 e2", "stage 2 r1@g1 e2"]
    assert {m.layers for m in run.said(AdvanceStage)} == {STAGES[1]}


def test_it_does_so_even_if_it_would_not_need_any() -> None:
    """Requests have ended since, and all would fit by now: but part is not fetched yet."""
    run = begun((old(0), new(0)), (old(1), new(1)))
    run.planned(TransferPlanned(epoch=2, failure="no room"))
    assert run.commands == ["stage 1 r0@g0 e2", "stage 1 r1@g1 e2"]


def test_its_report_says_that_figures_are_missing() -> None:
    """Otherwise less would seem to have been moved than can be."""
    run = begun((old(0), new(0, taken=2, stage=2)), (old(1), new(1)))
    run.planned(TransferPlanned(epoch=2, stages=OTHERS))
    run.report("g0", old(0, stage=2), new(0, taken=2, stage=2))
    run.report("g1", old(1, stage=2), new(1))
    run.write()
    run.started("r2@g0", 2)
    run.started("r2@g1", 2)
    run.stopped("r0@g0", 2)
    run.stopped("r1@g1", 2)
    (ended,) = run.said(SwitchEnded)
    assert ended.report is not None
    assert ended.report.notes == (RECOVERED,)


def test_where_not_all_ranks_know_them_it_rolls_back() -> None:
    """The others would be told of other stages."""
    run = begun((old(0, "serving"), new(0)), (old(1, "serving"), new(1, "preparing")))
    run.planned(TransferPlanned(epoch=2, stages=OTHERS))
    assert run.core.state == "storing_target"


def test_too_many_stages_are_refused() -> None:
    """Requests would wait for all of them: to reload is no slower then, and frees all at once."""
    run = Run(SwitcherConfig(stages_max=2), live=True).in_force(TWO, 1)
    run.adopt(WIDE, 1)
    run.write()
    run.planned(TransferPlanned(epoch=2, stages=STAGES))
    assert run.core.state == "storing_target", "it rolls back"
    run.write()
    for rank in (0, 1):
        run.started(f"r{rank}@g{rank}", 3)
        run.stopped(f"r2@g{rank}", 3)
    run.write()
    run.adopt(WIDE, 3)
    run.write()
    (switch,) = run.said(SwitchStarted)
    assert switch.way == "reload"
    assert "3 stages, more than stages_max = 2" in switch.why


def test_ranks_whose_leader_is_lost_are_stopped_first() -> None:
    """They would keep all their layers, and the next stage would not fit."""
    run = Run(live=True).in_force(WIDE, 1)
    run.adopt(NARROW, 1)
    run.write()
    run.planned(TransferPlanned(epoch=2, stages=STAGES))
    wide = hosted("r2", 1, rank=1, tp=2)
    for rank in (0, 1):
        made = msgspec.structs.replace(hosted(f"r{rank}", 2, "prepared"), prepared=2)
        lost = hosted("r2", 1, "failed", tp=2)
        run.report(f"g{rank}", made, wide if rank else lost)
    assert run.core.state == "taking"
    assert run.commands == ["stop r2@g1 e2"]
    run.stopped("r2@g1", 2)
    assert run.commands == ["stage 1 r0@g0 e2", "stage 1 r1@g1 e2"]
