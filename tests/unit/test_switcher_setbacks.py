"""What goes wrong with one replica of a live switch, and what the others have of it: nothing."""

from typing import Any

import msgspec
import pytest

from services.switcher.events import PhaseDeadline, TransferPlanned
from services.switcher.refusals import Refusals
from shared.core import SetTimer
from shared.hardware import Parallelism
from shared.messages.plans import SwitchEnded, SwitchStarted
from shared.messages.replicas import HostedReplica, ReplicaFailed
from shared.placement.sheets import Rank, cache_token_bytes
from tests.unit.switcher_runs import CONFIG, SHAPE, Run, hosted, plan, replica

TWO = plan("TWO", replica("r0", "g0"), replica("r1", "g1"))
SPARE = plan("SPARE", replica("r2", "g2"))
ONE = plan("ONE", TWO.replicas[0])
STAGED = TransferPlanned(epoch=2, stages=((0, 2), (2, 3), (3, 4)))


def ready(**more: Any) -> HostedReplica:
    """r2 on g2, prepared."""
    return msgspec.structs.replace(hosted("r2", 2, "prepared"), **{"prepared": 2, **more})


def pausing(planned: TransferPlanned | None = None) -> Run:
    """r0 and r1 are to stand still for r2, which is ready on a GPU of its own."""
    run = Run(live=True).in_force(TWO, 1, "g2")
    run.adopt(SPARE, 1)
    run.write()
    run.planned(planned)
    run.report("g2", ready())
    assert run.commands == ["pause r0@g0 e2", "pause r1@g1 e2"]
    return run


def taking() -> Run:
    run = pausing()
    run.paused("r0@g0", 2)
    run.paused("r1@g1", 2)
    assert run.commands == ["take r2@g2 e2 of r0,r1"]
    return run


def staying_taker() -> Run:
    """r1 goes without a successor, and r0, which stays, is to take its requests over."""
    run = Run(live=True).in_force(TWO, 1)
    run.adopt(ONE, 1)
    run.write()
    run.planned()
    run.prepared("r0@g0", 2)
    run.paused("r1@g1", 2)
    assert run.commands == ["take r0@g0 e2 of r1"]
    return run


def refused(run: Run, part: str, epoch: int, detail: str = "cannot") -> None:
    replica_id, worker_id = part.split("@")
    event = ReplicaFailed(
        epoch=epoch, worker_id=worker_id, replica_id=replica_id, detail=detail, refused=True
    )
    run.step(event)


def notes(run: Run) -> tuple[str, ...]:
    (ended,) = run.said(SwitchEnded)
    assert ended.report is not None
    return ended.report.notes


def finish(run: Run) -> None:
    """From the commit on all goes well."""
    run.write()
    run.started("r2@g2", 2)
    run.stopped("r0@g0", 2)
    run.stopped("r1@g1", 2)


class TestRefusals:
    def test_a_staying_taker_that_cannot_take_is_not_stopped(self) -> None:
        """Otherwise a replica that serves would be read from disk since it could not do more."""
        run = staying_taker()
        refused(run, "r0@g0", 2, "cannot take requests over: no answer")
        run.write()
        assert run.core.state == "rolling_back"
        assert sorted(run.commands) == ["resume r1@g1 e3", "start r0@g0 e3"]
        run.started("r0@g0", 3)
        run.started("r1@g1", 3)
        run.write()
        (ended,) = run.said(SwitchEnded)
        assert (ended.succeeded, ended.detail) == (
            False,
            "r0 failed on g0: cannot take requests over: no answer",
        )
        run.later()
        assert run.commands == []

    def test_one_that_broke_is_stopped_all_the_same(self) -> None:
        """Otherwise a broken replica would be left in force."""
        run = staying_taker()
        run.failed("r0@g0", 2)
        run.write()
        assert sorted(run.commands) == ["resume r1@g1 e3", "stop r0@g0 e3"]

    @pytest.mark.parametrize("why", ["draining", "leaving", "refused", "failed"])
    def test_one_that_will_not_stand_still_does_not_hold_up_the_others(self, why: str) -> None:
        """Otherwise requests of replicas that stand would wait for the time of the phase, for
        nothing, and the switch be rolled back."""
        run = pausing()
        run.paused("r0@g0", 2)
        assert run.core.state == "pausing"
        match why:
            case "draining":
                run.report("g1", hosted("r1", 1, "draining"))
            case "leaving":
                run.report("g1", hosted("r1", 1), leaving=True)
            case "refused":
                refused(run, "r1@g1", 2, "cannot stand still: it is prepared")
            case _:
                run.failed("r1@g1", 1)
        assert run.commands == ["take r2@g2 e2 of r0"]
        run.taken("r2@g2", 2)
        finish(run)
        lost = "was lost: its requests are replayed"
        drains = "drains: its requests end there, or are handed back"
        assert notes(run) == (f"r1 {lost if why == 'failed' else drains}",)

    def test_one_that_stood_still_before_its_worker_left_is_taken_from(self) -> None:
        """Otherwise its requests, which wait already, would be replayed for nothing."""
        run = pausing()
        run.report("g1", hosted("r1", 2, "paused"), leaving=True)
        run.paused("r0@g0", 2)
        assert run.commands == ["take r2@g2 e2 of r0,r1"]
        run.taken("r2@g2", 2)
        finish(run)
        assert notes(run) == ()

    def test_one_that_broke_does_not_stand(self) -> None:
        """Otherwise requests would be asked of a replica that has lost them, and whoever asks
        fail the switch for all."""
        run = pausing()
        run.failed("r1@g1", 1)
        run.paused("r1@g1", 2)
        run.paused("r0@g0", 2)
        assert run.commands == ["take r2@g2 e2 of r0"]

    @pytest.mark.parametrize("why", ["failed", "gone"])
    def test_one_that_dies_in_the_taking_does_not_stop_the_switch(self, why: str) -> None:
        """Otherwise one dying GPU would send the requests of all others back."""
        run = taking()
        if why == "failed":
            run.failed("r1@g1", 2)
        for _ in range(5):
            run.later()
            run.report("g0", hosted("r0", 2, "paused"))
            run.report("g2", ready())
        run.later()
        assert run.commands == ["take r2@g2 e2 of r0"]
        run.taken("r2@g2", 2)
        assert run.core.state == "committing"

    def test_one_that_drains_and_is_to_free_layers_is_stopped(self) -> None:
        """Otherwise nobody would have it free them, and the switch wait for its deadline."""
        run = pausing(STAGED)
        run.paused("r0@g0", 2)
        run.report("g1", hosted("r1", 1, "draining"))
        assert run.commands == ["stop r1@g1 e2"]
        run.stopped("r1@g1", 2)
        assert run.commands == ["stage 1 r0@g0 e2"]


class TestStages:
    def test_each_has_the_time_of_the_phase(self) -> None:
        """Otherwise weights that take longer than one stage may would always be rolled back, and
        the old replicas, which have given layers up, be read from disk."""
        run = pausing(STAGED)
        run.paused("r0@g0", 2)
        run.paused("r1@g1", 2)
        first = _timer(run)
        assert (first.state, first.stage) == ("taking", 0)
        run.now_s += CONFIG.take_timeout_s - 1
        stage(run, 1)
        second = _timer(run)
        assert (second.stage, run.deadlines) == (1, [("taking", CONFIG.take_timeout_s)])
        run.step(first)
        assert run.core.state == "taking", "the first stage was in time"
        run.later()
        assert run.deadlines == [], "once for each stage"
        run.step(second)
        assert run.core.state == "storing_target"

    def test_the_requests_have_it_too(self) -> None:
        """Otherwise weights that came in time would leave none for the requests."""
        run = pausing(STAGED)
        run.paused("r0@g0", 2)
        run.paused("r1@g1", 2)
        stage(run, 1)
        stage(run, 2)
        assert (_timer(run).stage, run.commands) == (2, ["take r2@g2 e2 of r0,r1"])


def stage(run: Run, done: int) -> None:
    """All have done this stage."""
    for rank in (0, 1):
        old = msgspec.structs.replace(hosted(f"r{rank}", 2, "paused"), stage=done)
        run.report(f"g{rank}", old)
    run.report("g2", ready(stage=done))


def _timer(run: Run) -> PhaseDeadline:
    (timer,) = [
        effect.event
        for effect in run.effects
        if isinstance(effect, SetTimer) and isinstance(effect.event, PhaseDeadline)
    ]
    return timer


class TestTriesAgain:
    def test_a_plan_that_failed_live_is_tried_live_again(self) -> None:
        """Otherwise one late message would cost an outage, 5 s later, that nobody needs."""
        run = Run(live=True).in_force(TWO, 1, "g2")
        told: list[tuple[str, str]] = []
        for _ in range(Refusals.LIVE_MAX + 1):
            run.now_s += CONFIG.refusal_s_max
            assert run.core.stored is not None
            for worker_id in ("g0", "g1"):
                run.report(worker_id, hosted(f"r{worker_id[1]}", run.core.stored.epoch))
            run.report("g2")
            run.adopt(SPARE, run.core.stored.epoch)
            run.write()
            (started,) = run.said(SwitchStarted)
            told.append((started.way, started.why))
            if started.way == "live":
                fail(run, started.epoch)
        late = "preparing did not end within its time"
        assert told == [
            ("live", ""),
            *[("live", f"live once more, for it failed: {late}")] * (Refusals.LIVE_MAX - 1),
            ("reload", f"live, it failed before: {late}"),
        ]

    def test_one_that_came_into_force_counts_anew(self) -> None:
        """Otherwise three failures in a month would end live switches to a plan for good."""
        refusals = Refusals(1.0, 2.0)
        for _ in range(Refusals.LIVE_MAX):
            refusals.failed_live("p", "late", for_good=False)
        assert refusals.way_to("p")[0] == "reload"
        refusals.forget("p")
        assert refusals.way_to("p") == ("live", "")


def fail(run: Run, epoch: int) -> None:
    """The switch is late, and what was in force is again."""
    run.deadline("preparing", epoch)
    run.write()
    for rank in (0, 1):
        run.started(f"r{rank}@g{rank}", epoch + 1)
    run.stopped("r2@g2", epoch + 1)
    run.write()
    assert run.core.state == "settled"


TOKEN_BYTES = cache_token_bytes(SHAPE, Rank.of(0, Parallelism.parse("tp1pp1")))


@pytest.mark.parametrize(("full", "short"), [(500, True), (1000, False), (0, False)])
def test_a_taker_with_less_cache_than_its_sources_is_noted(*, full: int, short: bool) -> None:
    """Otherwise nobody could tell why a long request fails right after a switch."""
    run = taking()
    held = msgspec.structs.replace(hosted("r0", 2, "paused"), cache_bytes=1000 * TOKEN_BYTES)
    run.report("g0", held)
    run.report(
        "g2",
        ready(
            cache_bytes=min(full, 100) * TOKEN_BYTES, cache_bytes_full=full * TOKEN_BYTES, taken=2
        ),
    )
    assert ("switch.note" in run.logged()) == short
    finish(run)
    said = [note for note in notes(run) if note.startswith("r2 has KV cache for 500 tokens")]
    assert bool(said) == short
