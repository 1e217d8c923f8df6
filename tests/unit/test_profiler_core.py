"""The profiler's core: windows, types, reports, state."""

from typing import Any

import pytest

from services.profiler.config import ProfilerConfig
from services.profiler.core import Profiler, WindowDeadline
from shared import subjects
from shared.core import (
    Draining,
    Effect,
    Load,
    Loaded,
    Log,
    Publish,
    Query,
    SetTimer,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.errors import ConfigInvalid
from shared.messages.demand import DemandReport, ModelTypes, ProfilerState, TypeCentroid
from shared.messages.requests import Outcome, RequestCompleted, RequestsCompleted


def done(id_: str, outcome: Outcome = "completed", **fields: Any) -> RequestCompleted:
    known: dict[str, Any] = {"model_id": "m", "input_tokens": 100, "output_tokens": 50}
    return RequestCompleted(request_id=id_, outcome=outcome, **(known | fields))


def batch(*completed: RequestCompleted) -> RequestsCompleted:
    return RequestsCompleted(ingress_id="i", completed=completed)


def profiler_of(**config: Any) -> Profiler:
    """A profiler at time 0 that found nothing stored."""
    profiler = Profiler(ProfilerConfig(**config), models=("m",), unix_offset_s=1000.0)
    profiler.step(Started(), 0.0)
    profiler.step(Loaded(key="profiler"), 0.0)
    return profiler


def reports(effects: list[Effect]) -> list[DemandReport]:
    messages = [e.message for e in effects if isinstance(e, Publish)]
    return [m for m in messages if isinstance(m, DemandReport)]


def end_window(profiler: Profiler, now_s: float) -> DemandReport:
    """End the window and let the store succeed; the one report."""
    profiler.check()
    effects = profiler.step(WindowDeadline(), now_s)
    profiler.step(Stored(key="profiler", revision=1), now_s)
    profiler.check()
    (report,) = reports(effects)
    return report


def test_start_reads_the_state_and_opens_a_window() -> None:
    """A restart would forget the types, or never report."""
    profiler = Profiler(ProfilerConfig(window_s=10.0), models=("m",), unix_offset_s=0.0)
    assert profiler.step(Started(), 5.0) == [
        Load("profiler", ProfilerState),
        SetTimer(15.0, WindowDeadline()),
    ]


def test_an_empty_window_is_reported() -> None:
    """The forecaster could not tell no traffic from no profiler."""
    assert end_window(profiler_of(), 10.0) == DemandReport(
        model_id="m", window_start_s=1000.0, window_s=10.0
    )


def test_counts_rates_and_means_by_type() -> None:
    """The scheduler would plan for a demand that did not exist."""
    profiler = profiler_of(types_max=2)
    short = [
        done(f"s{i}", output_tokens=10 * (i + 1), ttft_s=0.1 * (i + 1), tpot_s=None)
        for i in range(4)
    ]
    long = [done("l0", input_tokens=8000, ttft_s=2.0, tpot_s=0.05)]
    profiler.step(batch(*short, *long), 1.0)
    report = end_window(profiler, 10.0)
    first, second = report.types
    assert (report.completed, first.request_type, second.request_type) == (5, 0, 1)
    assert (first.requests, first.arrivals_rps) == (4, 0.4)
    assert (first.input_tokens_mean, first.output_tokens_mean) == (100.0, 25.0)
    assert first.ttft_s_mean == pytest.approx(0.25)
    assert first.tpot_s_mean is None
    assert (second.requests, second.input_tokens_mean, second.tpot_s_mean) == (1, 8000.0, 0.05)
    assert second.input_tokens_centroid == pytest.approx(8000.0)


def test_classes_are_counted_by_type() -> None:
    """Types would be planned by a target that few of their requests have."""
    profiler = profiler_of()
    profiler.step(
        batch(
            *(done(f"s{i}", input_tokens=100, output_tokens=10) for i in range(6)),
            *(
                done(f"i{i}", input_tokens=100, output_tokens=10, slo_class="interactive")
                for i in range(2)
            ),
        ),
        0.0,
    )
    (kind,) = end_window(profiler, 10.0).types
    assert kind.class_shares == {"interactive": 0.25, "standard": 0.75}


def test_one_usual_class_is_not_told() -> None:
    """Every report would carry what goes without saying."""
    profiler = profiler_of()
    profiler.step(batch(*(done(f"s{i}", input_tokens=9, output_tokens=9) for i in range(8))), 0.0)
    (kind,) = end_window(profiler, 10.0).types
    assert kind.class_shares == {}


def test_a_burst_is_told_in_the_window_in_which_it_arrived() -> None:
    """Counted as it is worked off, a burst never looks higher than what the replicas can serve."""
    profiler = profiler_of(settle_windows=2)
    for window in range(4):  # 40 requests arrive in the first second; 10 of them end in each window
        ends_s = 10.0 * window + 9.0
        ended = [done(f"{window}-{i}", e2e_s=ends_s - 1.0) for i in range(10)]
        profiler.step(batch(*ended), ends_s)
        report = end_window(profiler, 10.0 * (window + 1))
        assert sum(kind.arrivals_rps for kind in report.types) == pytest.approx(1.0)
        if window < 2:
            assert report.settled_s == 0.0
        if window == 2:
            assert (report.settled_start_s, report.settled_s) == (1000.0, 10.0)
            assert sum(kind.arrivals_rps for kind in report.settled) == pytest.approx(3.0)
        if window == 3:  # what ends later than that counts in the oldest window that is left
            assert (report.settled_start_s, report.settled_s) == (1010.0, 10.0)
            assert sum(kind.arrivals_rps for kind in report.settled) == pytest.approx(1.0)


def test_a_known_type_without_requests_is_reported_as_zero() -> None:
    """A type that stopped would keep its last forecast for ever."""
    profiler = profiler_of(types_max=1)
    profiler.step(batch(done("a")), 1.0)
    end_window(profiler, 10.0)
    report = end_window(profiler, 20.0)
    (demand,) = report.types
    assert (demand.requests, demand.arrivals_rps) == (0, 0.0)
    assert demand.input_tokens_mean == pytest.approx(100.0)
    assert (report.window_start_s, report.window_s) == (1010.0, 10.0)


def test_a_late_timer_makes_a_longer_window() -> None:
    """A profiler that was stopped for a while would report a burst that never was."""
    profiler = profiler_of(types_max=1)
    profiler.step(batch(*(done(f"q{i}") for i in range(50))), 49.0)
    report = end_window(profiler, 50.0)
    assert (report.window_s, report.types[0].arrivals_rps) == (50.0, 1.0)


def test_requests_that_did_not_complete_are_demand_too() -> None:
    """An overloaded mesh would see its demand shrink by what it rejects, and never grow."""
    profiler = profiler_of(types_max=2)
    profiler.step(batch(done("a"), done("b", input_tokens=9000)), 1.0)
    end_window(profiler, 10.0)
    others: tuple[Outcome, ...] = ("aborted", "rejected", "failed")
    ended = [done(f"x{o}", o, input_tokens=7000, output_tokens=0) for o in others]
    profiler.step(batch(*ended, done("invalid", "rejected", input_tokens=0)), 11.0)
    report = end_window(profiler, 20.0)
    assert (report.aborted, report.rejected, report.failed) == (1, 2, 1)
    assert [t.arrivals_rps for t in report.types] == [0.0, pytest.approx(0.3)]
    assert [t.requests for t in report.types] == [0, 0]


def test_a_repeated_message_counts_once() -> None:
    """Each repeat on the network would be demand."""
    profiler = profiler_of(types_max=1)
    message = batch(done("a"), done("b"))
    profiler.step(message, 1.0)
    profiler.step(message, 2.0)
    assert end_window(profiler, 10.0).completed == 2
    profiler.step(message, 11.0)
    assert end_window(profiler, 20.0).completed == 0


def test_a_window_is_bounded_and_says_so() -> None:
    """A storm of requests would take the profiler's memory, or be cut without a word."""
    profiler = profiler_of(requests_max=10, types_max=1)
    profiler.step(batch(*(done(f"q{i}") for i in range(25))), 1.0)
    profiler.check()
    effects = profiler.step(WindowDeadline(), 10.0)
    assert reports(effects)[0].completed == 10
    fields = {"model_id": "m", "dropped": 15}
    assert Log("profiler.requests_dropped", fields, "warning") in effects


def test_models_named_by_clients_take_no_memory() -> None:
    """Requests for made-up models would grow the profiler without end."""
    profiler = profiler_of(models_max=2)
    for i in range(20):
        profiler.step(batch(done(f"q{i}", "rejected", model_id=f"fake-{i}")), 1.0)
        profiler.step(batch(done(f"r{i}", model_id=f"real-{i}")), 1.0)
        profiler.check()
    effects = profiler.step(WindowDeadline(), 10.0)
    assert [r.model_id for r in reports(effects)] == ["m", "real-0"]


def test_types_survive_a_restart_with_their_numbers() -> None:
    """Routes made for type 1 would be used for another type after a restart."""
    first = profiler_of(types_max=2)
    first.step(batch(done("a"), done("b", input_tokens=9000)), 1.0)
    effects = first.step(WindowDeadline(), 10.0)
    (store,) = [e for e in effects if isinstance(e, Store)]
    assert (store.key, store.revision) == ("profiler", 0)
    second = Profiler(ProfilerConfig(types_max=2), models=("m",), unix_offset_s=0.0)
    second.step(Started(), 0.0)
    second.step(batch(done("early", input_tokens=9100)), 0.1)
    second.step(Loaded(key="profiler", message=store.message, revision=4), 0.2)
    report = end_window(second, 10.0)
    assert [t.requests for t in report.types] == [0, 1]
    assert report.types[1].input_tokens_mean == 9100.0


def test_stored_types_that_no_longer_fit_are_left_out() -> None:
    """A smaller types_max would crash the profiler on its own past."""
    types = tuple(
        TypeCentroid(request_type=i, input_ln=float(i), output_ln=0.0, weight=1.0) for i in range(4)
    )
    profiler = Profiler(ProfilerConfig(types_max=2), models=("m",), unix_offset_s=0.0)
    profiler.step(Started(), 0.0)
    state = ProfilerState(models=(ModelTypes(model_id="m", types=types),))
    profiler.step(Loaded(key="profiler", message=state, revision=1), 0.0)
    assert [t.request_type for t in end_window(profiler, 10.0).types] == [0, 1]


def test_one_write_at_a_time_with_the_last_revision() -> None:
    """Two writes under way would conflict with each other for ever."""
    profiler = profiler_of()

    def stores(now_s: float) -> list[int]:
        effects = profiler.step(WindowDeadline(), now_s)
        return [e.revision for e in effects if isinstance(e, Store)]

    assert stores(10.0) == [0]
    assert stores(20.0) == []
    profiler.step(Stored(key="profiler", revision=7), 21.0)
    assert stores(30.0) == [7]
    warning, load = profiler.step(StoreConflict(key="profiler"), 31.0)
    assert isinstance(warning, Log)
    assert load == Load("profiler", ProfilerState)
    profiler.step(Loaded(key="profiler", message=None, revision=9), 32.0)
    assert stores(40.0) == [9]


def test_nothing_is_stored_before_the_state_was_read() -> None:
    """A profiler whose read is delayed would overwrite the types it is about to read."""
    profiler = Profiler(ProfilerConfig(), models=("m",), unix_offset_s=0.0)
    profiler.step(Started(), 0.0)
    profiler.step(batch(*(done(f"q{i}") for i in range(200))), 1.0)
    effects = profiler.step(WindowDeadline(), 10.0)
    profiler.check()
    assert not [e for e in effects if isinstance(e, Store)]
    assert reports(effects)[0].types == ()


def test_draining_keeps_the_types_but_reports_no_stump() -> None:
    """One request in the first tenth of a second would be reported as ten a second."""
    profiler = profiler_of()
    profiler.step(batch(done("a")), 0.05)
    assert [type(e) for e in profiler.step(Draining(), 0.1)] == [Store]


def test_a_stray_question_is_said_and_survived() -> None:
    """One message with a reply address would end the profiler."""
    effects = profiler_of().step(Query(batch(done("a")), "x"), 0.0)
    assert [type(e) for e in effects] == [Log]


def test_report_goes_to_its_subject() -> None:
    """Nobody would hear the report."""
    (publish,) = [e for e in profiler_of().step(WindowDeadline(), 10.0) if isinstance(e, Publish)]
    assert publish.subject == subjects.DEMAND_REPORT.pattern


@pytest.mark.parametrize("setting", [{"window_s": 0.0}, {"types_max": 0}, {"coarsen_ln": 2.0}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    """The profiler would start and never report."""
    with pytest.raises(ConfigInvalid):
        ProfilerConfig(**setting).checked()
