"""A live switch as the ingress sees it: another replica goes on with an attempt."""

import asyncio

from services.ingress.handover import EARLY_MAX, HANDOVER_S, LEADERS_MAX, Leaders
from shared.messages.base import decode
from shared.messages.requests import (
    AbortRequest,
    SubmitRequest,
    TokenChunk,
)
from tests.support.ingress_driver import DrivenGateway, SeenChoice

NEW = {"replica_id": "r1", "incarnation": "i1", "worker_id": "w1"}


def chunk(position: int = 0, tokens: tuple[int, ...] = (), **fields: object) -> TokenChunk:
    options = {"request_id": "a", "attempt": 0} | fields
    return TokenChunk(position=position, tokens=list(tokens), **options)  # type: ignore[arg-type]


def sent(driven: DrivenGateway) -> list[tuple[str, bytes]]:
    return asyncio.run(driven.settle())


def aborts(driven: DrivenGateway) -> list[tuple[str, str]]:
    """Whom aborts went to since the last look: worker and replica."""
    return [
        (subject.split(".")[4], decode(payload, AbortRequest).replica_id)
        for subject, payload in sent(driven)
        if subject.endswith(".abort")
    ]


def taken_over(**options: object) -> tuple[DrivenGateway, SeenChoice]:
    """A stream of two tokens that r1 has just acknowledged as its own."""
    driven = DrivenGateway(**options)  # type: ignore[arg-type]
    _, choice = driven.streaming()
    driven.chunks(chunk(0, (5, 6)))
    driven.chunks(chunk(), **NEW)
    return driven, choice


def test_another_replica_goes_on_in_the_same_attempt() -> None:
    """A live switch would cost each stream an attempt, and its prompt be computed again."""
    driven, choice = taken_over()
    driven.chunks(chunk(2, (7,), finish="length"), **NEW)
    assert (choice.tokens, choice.ends) == ([5, 6, 7], ["length"])
    assert driven.counted("ingress_moved_live") == 1
    assert not [subject for subject, _ in sent(driven) if subject.endswith((".abort", ".route"))][
        1:
    ]


def test_the_record_names_the_last_home_and_one_attempt() -> None:
    """What learns from completions would credit a replica that is gone."""
    driven, _ = taken_over()
    one = driven.gateway.core.journey("a")
    assert one is not None
    assert (one.replica_id, one.leader_id, one.incarnation) == ("r1", "w1", "i1")
    assert (one.attempt, one.moves, one.handovers) == (0, 0, 1)


def test_only_the_new_home_keeps_a_stream_alive() -> None:
    """A stream on a dead new replica would wait for ever, while the old one's heartbeats go on;
    or one on a live new replica would be given up with the old."""
    driven, _ = taken_over()
    for _ in range(4):
        driven.clock.time_s += 1.0
        driven.chunks(**NEW)
        driven.sweep(after_s=0.0)
    one = driven.gateway.core.journey("a")
    assert one is not None
    assert one.attempt == 0
    for _ in range(3):
        driven.clock.time_s += 1.0
        driven.chunks(replica_id="r0")
        driven.sweep(after_s=0.0)
    assert one.attempt == 1
    assert driven.counted("ingress_moves", reason="stalled") == 1


def test_the_new_home_is_probed() -> None:
    """A last word lost by the new replica would never be noticed: the old one knows nothing."""
    driven, _ = taken_over(probe_s=3.0)
    sent(driven)
    driven.clock.time_s += 3.5
    driven.chunks(**NEW)
    driven.sweep(after_s=0.0)
    ((subject, payload),) = [pair for pair in sent(driven) if pair[0].endswith(".submit")]
    assert ".w1." in subject
    assert decode(payload, SubmitRequest).replica_id == "r1"


def test_an_abort_in_the_handover_reaches_both() -> None:
    """A client's cancel would get lost between two replicas, and one of them go on working."""
    driven, _ = taken_over()
    sent(driven)
    driven.gateway.abort("a")
    assert aborts(driven) == [("w1", "r1"), ("leader-r0", "r0")]


def test_an_abort_later_reaches_the_new_home_alone() -> None:
    """Every cancel would go to replicas that are long gone."""
    driven, _ = taken_over()
    sent(driven)
    driven.clock.time_s += HANDOVER_S
    driven.gateway.abort("a")
    assert aborts(driven) == [("w1", "r1")]


def test_who_comes_late_to_a_stream_that_is_gone_is_told_so() -> None:
    """A cancel that came before the first word of the new home would leave it at work."""
    driven = DrivenGateway()
    driven.streaming()
    driven.gateway.abort("a")
    driven.chunks(chunk(0, (5,)))
    sent(driven)
    driven.chunks(chunk(), **NEW)
    assert aborts(driven) == [("w1", "r1")]


def test_a_leader_that_is_not_named_is_learnt() -> None:
    """Aborts and probes would go to nobody."""
    driven = DrivenGateway(probe_s=1.0)
    driven.streaming()
    driven.chunks(chunk(), replica_id="r1", incarnation="i1")
    driven.sweep(after_s=1.5)
    assert not [subject for subject, _ in sent(driven) if "cmd.worker.." in subject]
    driven.gateway.abort("a")
    assert aborts(driven) == [("leader-r0", "r0")]  # who hands it on

    driven.streaming("b")
    driven.chunks(chunk(request_id="b"), replica_id="r1", incarnation="i1")
    driven.chunks(**NEW)
    driven.clock.time_s += HANDOVER_S
    sent(driven)
    driven.gateway.abort("b")
    assert aborts(driven) == [("w1", "r1")]


def test_an_abort_goes_to_the_last_leader_that_is_known() -> None:
    """Two switches in a row, and it would be published to nobody's subject."""
    driven, _ = taken_over()
    driven.chunks(chunk(2, (7,)), replica_id="r2", incarnation="i2")
    driven.chunks(chunk(3, (8,)), replica_id="r3", incarnation="i3")
    sent(driven)
    driven.gateway.abort("a")
    assert aborts(driven) == [("w1", "r1")]


def test_late_words_of_the_former_home_change_nothing() -> None:
    """Its last chunk, its acknowledgement, its hand-back would each cost an attempt."""
    driven, choice = taken_over()
    driven.chunks(chunk())
    driven.chunks(chunk(0, (5, 6)))
    driven.chunks(chunk(2, (), finish="failed", failure="engine"))
    driven.chunks(chunk(2, (7,)), **NEW)
    one = driven.gateway.core.journey("a")
    assert one is not None
    assert (choice.tokens, one.attempt, one.replica_id) == ([5, 6, 7], 0, "r1")
    assert one.incarnation == "i1"


def test_tokens_that_cross_are_put_in_order() -> None:
    """Two processes send: the new one's first tokens may come before the last of the old one."""
    driven, choice = taken_over()
    driven.chunks(chunk(4, (9,), finish="length"), **NEW)
    driven.chunks(chunk(3, (8,)), **NEW)
    assert (choice.tokens, choice.ends) == ([5, 6], [])
    driven.chunks(chunk(1, (6, 7)))
    assert (choice.tokens, choice.ends) == ([5, 6, 7, 8, 9], ["length"])


def test_a_gap_that_nobody_fills_costs_an_attempt() -> None:
    """A stream would wait for ever for a chunk that was lost in the handover."""
    driven, _ = taken_over()
    driven.chunks(chunk(3, (8,)), **NEW)
    driven.sweep(after_s=HANDOVER_S / 2)
    one = driven.gateway.core.journey("a")
    assert one is not None
    assert one.attempt == 0
    driven.sweep(after_s=HANDOVER_S)
    assert one.attempt == 1
    assert one.excluded == ()
    assert driven.counted("ingress_moves", reason="gap") == 1


def test_what_is_kept_early_is_bounded() -> None:
    """A worker that sends nonsense would fill the memory."""
    driven, _ = taken_over()
    for index in range(EARLY_MAX + 1):
        driven.chunks(chunk(3 + index, (8,)), **NEW)
    one = driven.gateway.core.journey("a")
    assert one is not None
    assert one.attempt == 1


def test_a_switch_back_is_a_handover_too() -> None:
    """After 2 x tp1, tp2 and 2 x tp1 again, a stream may be where it began."""
    driven, choice = taken_over()
    driven.clock.time_s += HANDOVER_S
    driven.chunks(chunk(), replica_id="r0", worker_id="leader-r0")
    driven.chunks(chunk(2, (7,)), replica_id="r0")
    one = driven.gateway.core.journey("a")
    assert one is not None
    assert (one.replica_id, one.attempt, one.handovers, choice.tokens) == ("r0", 0, 2, [5, 6, 7])


def test_a_run_that_is_no_more_takes_nothing_over() -> None:
    """A stream would be given to a process that has died, and wait out its silence."""
    driven = DrivenGateway()
    driven.streaming()
    driven.chunks(**NEW)
    driven.chunks(replica_id="r1", incarnation="i2")
    driven.chunks(chunk(), **NEW)
    one = driven.gateway.core.journey("a")
    assert one is not None
    assert (one.replica_id, one.attempt) == ("r0", 0)


def test_a_taker_that_fails_costs_an_attempt() -> None:
    """The stream would wait for the former home, which has forgotten it."""
    driven = DrivenGateway()
    driven.streaming()
    driven.chunks(chunk(0, (), finish="failed", failure="engine"), **NEW)
    one = driven.gateway.core.journey("a")
    assert one is not None
    assert (one.attempt, one.excluded) == (1, ("r1",))


def test_the_submission_says_the_type() -> None:
    """In a switch, replicas would disagree who takes the request over."""
    driven = DrivenGateway()
    one, _ = driven.open()
    driven.route(one, request_type=3)
    (payload,) = [payload for subject, payload in sent(driven) if subject.endswith(".submit")]
    assert decode(payload, SubmitRequest).request_type == 3


def test_leaders_are_bounded() -> None:
    """Replicas get new ids at each switch: the map would grow for ever."""
    leaders = Leaders()
    for index in range(LEADERS_MAX + 1):
        leaders.learn(f"r{index}", "w")
    assert leaders.of("r0") == ""
    assert leaders.of(f"r{LEADERS_MAX}") == "w"
