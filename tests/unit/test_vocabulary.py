"""Hardware, ids, SLOs, subjects, errors, clocks: the small words everything else uses."""

import time
from typing import Any, cast

import pytest

from shared import subjects
from shared.clock import ManualClock, SystemClock
from shared.errors import ConfigInvalid, OServeError, PayloadTooLarge, Rejected, Transient
from shared.hardware import Parallelism
from shared.ids import CountedIds, RandomIds, checked_id
from shared.messages.plans import PlanInForce
from shared.slo import DEFAULT_TARGETS, SLO_CLASSES, SloTarget, meets, tpot_s


def _every_subject() -> list[subjects.Subject[Any]]:
    values = list(vars(subjects).values())
    return [cast("subjects.Subject[Any]", v) for v in values if isinstance(v, subjects.Subject)]


TARGET = SloTarget(ttft_s=1.0, tpot_s=0.1)


@pytest.mark.parametrize(
    ("text", "tp", "pp"), [("tp1", 1, 1), ("tp4pp2", 4, 2), ("tp8", 8, 1), ("tp16pp10", 16, 10)]
)
def test_parallelism_reads_what_it_writes(text: str, tp: int, pp: int) -> None:
    """Two services would understand one shape differently."""
    shape = Parallelism.parse(text)
    assert shape == Parallelism(tp=tp, pp=pp)
    assert shape.gpus == tp * pp
    assert Parallelism.parse(str(shape)) == shape


@pytest.mark.parametrize(
    "text",
    ["", "tp", "tp0", "tp2pp0", "TP2", "tp2pp", "pp2", "2", "tp-1", " tp1", "tp1\n", "tp1.0",
     "tp\N{ARABIC-INDIC DIGIT TWO}", "tp" + "9" * 5000],
)  # fmt: skip
def test_a_malformed_parallelism_is_refused(text: str) -> None:
    """A typing error in a topology would become another shape, or a stack trace."""
    with pytest.raises(ConfigInvalid, match='write it as "tp4"'):
        Parallelism.parse(text)


@pytest.mark.parametrize("value", ["a", "n0-g0", "A_b-9", "x" * 64])
def test_good_ids_pass(value: str) -> None:
    """A proper id would be refused."""
    assert checked_id("f", value) == value


@pytest.mark.parametrize("value", ["", "a.b", "a b", "*", ">", "a\n", "ä", "x" * 65, "a/b"])
def test_an_id_that_is_no_subject_token_is_refused(value: str) -> None:
    """A dot in an id would publish on another subject, or break the protocol line."""
    with pytest.raises(ConfigInvalid, match="letters, digits") as caught:
        checked_id("mesh.nodes.node_id", value)
    assert caught.value.field == "mesh.nodes.node_id"


def test_random_ids_never_meet_and_are_tokens() -> None:
    """Two ingresses would mix up their requests."""
    sources = [RandomIds() for _ in range(20)]
    made = [source.next("req") for source in sources for _ in range(50)]
    assert len(set(made)) == len(made)
    assert all(checked_id("id", value).startswith("req-") for value in made)


def test_counted_ids_are_the_same_each_run() -> None:
    """A simulated seed could not be replayed."""
    first, second = CountedIds(), CountedIds()
    made = [first.next(prefix) for prefix in "aab"]
    assert made == ["a-1", "a-2", "b-3"]
    assert made == [second.next(prefix) for prefix in "aab"]


def test_tpot_is_the_mean_after_the_first_token() -> None:
    """Every report and every SLO decision would be off by one token."""
    assert tpot_s(ttft_s=1.0, e2e_s=3.0, output_tokens=5) == pytest.approx(0.5)
    assert tpot_s(ttft_s=1.0, e2e_s=1.0, output_tokens=1) is None
    assert tpot_s(ttft_s=1.0, e2e_s=1.0, output_tokens=0) is None
    assert tpot_s(ttft_s=1.0, e2e_s=0.5, output_tokens=2) == 0.0


@pytest.mark.parametrize(
    ("ttft", "tpot", "met"),
    [
        (1.0, 0.1, True), (1.01, 0.1, False), (1.0, 0.11, False), (0.5, None, True),
        (None, None, False), (None, 0.01, False),
    ],
)  # fmt: skip
def test_goodput_counts_requests_that_meet_both_targets(
    ttft: float | None, tpot: float | None, met: bool
) -> None:
    """SLO attainment would count requests that missed a target, or never answered."""
    assert meets(TARGET, ttft_s=ttft, tpot_s=tpot) is met


def test_every_class_has_targets() -> None:
    """A tenant's class would have no meaning."""
    assert set(DEFAULT_TARGETS) == set(SLO_CLASSES)


def test_subject_tokens_fill_in_and_wildcards_stand_for_the_rest() -> None:
    """A worker would hear the commands of another."""
    submit = subjects.SUBMIT_REQUEST
    mine = submit.of(worker_id="n0-g0")
    assert mine.pattern == submit.pattern.replace("{worker_id}", "n0-g0") == mine.wildcard
    assert submit.wildcard == submit.pattern.replace("{worker_id}", "*")
    report = subjects.WORKER_REPORT.of(worker_id="n0-g0")
    assert report.snapshot


def test_every_subject_is_well_formed_and_unlike_the_others() -> None:
    """Two message types would arrive on one subject and not decode."""
    every = _every_subject()
    wildcards = [subject.wildcard for subject in every]
    assert len(set(wildcards)) == len(wildcards) > 15
    for subject in every:
        kind = subject.pattern.split(".")[2]
        assert kind in ("cmd", "evt", "rpc", "data"), subject.pattern
        assert not subject.snapshot or kind == "data", f"{subject.pattern}: only data coalesces"
    events = subjects.EVENTS.removesuffix(">")
    assert any(wildcard.startswith(events) for wildcard in wildcards)


def test_a_snapshot_holds_all_there_is_to_know() -> None:
    """Coalescing anything but a full snapshot loses messages: replies, chunks, events."""
    snapshots = {subject.message.__name__ for subject in _every_subject() if subject.snapshot}
    whole = {"ReplicaReport", "WorkerReport", "SwitchProgress", PlanInForce.__name__}
    assert snapshots == whole


def test_errors_keep_their_fields() -> None:
    """Callers would have to parse texts to know what to do."""
    rejected = Rejected("overloaded", "queue full", retry_after_s=2.0)
    assert (rejected.code, rejected.detail, rejected.retry_after_s) == (
        "overloaded",
        "queue full",
        2.0,
    )
    large = PayloadTooLarge(subject="s", size_bytes=9, limit_bytes=8)
    assert isinstance(large, OServeError)
    assert not isinstance(large, Transient)
    invalid = ConfigInvalid(field="a.b", value=3, remedy="write 4")
    assert str(invalid) == "a.b = 3: write 4"


def test_clocks() -> None:
    """Deadlines would run in another time than the one they were set in."""
    clock = ManualClock(5.0)
    assert (clock.now_s(), clock.unix_s()) == (5.0, 5.0)
    clock.time_s = 6.0
    assert clock.now_s() == 6.0
    before_s = time.monotonic()
    assert before_s <= SystemClock().now_s() <= time.monotonic()
    assert abs(SystemClock().unix_s() - time.time()) < 60.0
