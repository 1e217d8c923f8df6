"""The ingress's core, rule by rule."""

import pytest

from services.ingress.core import BACKOFF_S_MAX, FREE_MOVES, IngressCore
from services.ingress.events import (
    Arrived,
    ClientGone,
    Finished,
    LossReason,
    Reconnected,
    ReplicaRestarted,
    StaleChunk,
)
from services.ingress.journey import EXCLUDED_MAX
from shared import subjects
from shared.core import Ask, Publish
from shared.messages.requests import FailureCode
from tests.support.ingress_driver import INGRESS, DrivenIngress, journey


@pytest.fixture
def ingress() -> DrivenIngress:
    return DrivenIngress()


class TestRouting:
    def test_a_new_request_is_asked_for_with_its_lengths(self, ingress: DrivenIngress) -> None:
        """Routers could not judge what a request costs, or would answer to nobody."""
        ingress.arrive(output_tokens_max=8)
        (effect,) = ingress.effects
        assert isinstance(effect, Ask)
        assert effect.subject == subjects.ROUTE.pattern
        assert effect.reply_to == subjects.ROUTE_REPLY.of(ingress_id=INGRESS).pattern
        (question,) = ingress.asked
        assert (question.input_tokens, question.output_tokens_max) == (3, 8)

    def test_an_unanswered_question_is_asked_again(self, ingress: DrivenIngress) -> None:
        """A lost question would leave its client waiting for ever."""
        ingress.arrive()
        assert ingress.sweep(after_s=0.4) == []
        ingress.sweep(after_s=0.2)
        assert [question.attempt for question in ingress.asked] == [0]

    def test_the_reply_leads_to_a_submission(self, ingress: DrivenIngress) -> None:
        """The request would never reach its replica, or not with what the engine needs."""
        one = ingress.arrive()
        ingress.route(one)
        (effect,) = ingress.effects
        assert isinstance(effect, Publish)
        assert effect.subject == subjects.SUBMIT_REQUEST.of(worker_id="leader-r0").pattern
        (submit,) = ingress.submitted
        assert (submit.request_id, submit.attempt, submit.replica_id) == ("a", 0, "r0")
        assert (submit.ingress_id, submit.epoch) == (INGRESS, 3)
        assert (submit.prompt_tokens, submit.output_tokens) == ([1, 2, 3], [])

    def test_a_second_reply_is_ignored(self, ingress: DrivenIngress) -> None:
        """Two replicas would work on one request, and its tokens come twice."""
        one = ingress.arrive()
        ingress.route(one, replica_id="r0")
        assert ingress.route(one, replica_id="r1") == []
        assert one.replica_id == "r0"

    def test_replies_to_former_attempts_and_to_strangers_are_ignored(
        self, ingress: DrivenIngress
    ) -> None:
        """A late reply would send the request back to the replica that it left."""
        one = ingress.streaming()
        ingress.lose(one, "stalled")
        assert ingress.route(one, attempt=0) == []
        assert ingress.route(journey("stranger")) == []

    def test_no_router_at_all_is_told_after_a_while(self) -> None:
        """A mesh without routers would hold its clients until they give up."""
        ingress = DrivenIngress(first_route_s=3.0)
        ingress.arrive()
        for _ in range(5):
            ingress.sweep(after_s=0.55)
            assert len(ingress.asked) == 1
        ingress.sweep(after_s=0.55)
        (failure,) = ingress.failed
        assert failure.code == "no_replica"
        assert "router" in failure.detail

    @pytest.mark.parametrize("code", ["unknown_model", "too_long", "invalid", "overloaded"])
    def test_what_no_replica_will_ever_take_fails_at_once(
        self, ingress: DrivenIngress, code: FailureCode
    ) -> None:
        """A client would wait for an answer that is known already."""
        one = ingress.arrive()
        ingress.no_route(one, code, retry_after_s=2.5)
        (failure,) = ingress.failed
        assert (failure.code, failure.detail) == (code, f"because {code}")
        assert failure.retry_after_s == 2.5
        assert ingress.core.open_requests == 0
        assert one.finish == "failed"

    def test_no_replica_yet_is_waited_for(self, ingress: DrivenIngress) -> None:
        """A switch of plans would turn away every request that arrives during it."""
        one = ingress.arrive()
        assert ingress.no_route(one, "no_replica") == []
        assert ingress.sweep(after_s=0.01) == []
        ingress.sweep(after_s=0.02)
        assert len(ingress.asked) == 1
        ingress.route(one)
        assert len(ingress.submitted) == 1

    def test_patience_for_a_first_replica_ends(self) -> None:
        """A client of a dead mesh would wait ten minutes for its 503."""
        ingress = DrivenIngress(first_route_s=2.0)
        one = ingress.arrive()
        ingress.now_s = 2.1
        ingress.no_route(one, "no_replica")
        assert [failure.code for failure in ingress.failed] == ["no_replica"]

    def test_waiting_in_a_queue_is_no_lack_of_patience(self) -> None:
        """A switch would turn away everybody who had waited for the replicas that it stops."""
        ingress = DrivenIngress(first_route_s=2.0)
        one = ingress.streaming()
        ingress.now_s = 60.0
        ingress.lose(one, "stalled")
        ingress.now_s = 61.0
        assert ingress.no_route(one, "no_replica") == []
        assert ingress.failed == []
        ingress.sweep(after_s=1.5)
        assert [failure.code for failure in ingress.failed] == ["no_replica"]

    @pytest.mark.parametrize("code", ["no_replica", "overloaded", "draining"])
    def test_a_stream_that_has_begun_is_more_patient(
        self, ingress: DrivenIngress, code: FailureCode
    ) -> None:
        """An answer half shown would break off, although replicas return seconds later."""
        one = ingress.streaming()
        one.tokens += [7, 7]
        ingress.lose(one, "stalled")
        ingress.now_s = 100.0
        assert ingress.no_route(one, code) == []
        ingress.sweep(after_s=BACKOFF_S_MAX + 0.1)
        (question,) = ingress.asked
        assert (question.input_tokens, question.output_tokens_max) == (5, 6)


class TestBackOff:
    def test_it_grows_and_is_bounded(self) -> None:
        """Thousands of waiting requests would flood the routers, or a returning replica wait."""
        ingress = DrivenIngress(first_route_s=1000.0)
        one = ingress.arrive()
        pauses: list[float] = []
        while ingress.now_s < 30.0:
            ingress.no_route(one, "no_replica")
            pauses.append(round(one.due_s - ingress.now_s, 6))
            ingress.now_s = one.due_s
            ingress.sweep(after_s=0.0)
            assert len(ingress.asked) == 1
        assert pauses == sorted(pauses)
        assert min(pauses) >= 0.02
        assert max(pauses) == BACKOFF_S_MAX
        assert len(pauses) < 80

    def test_a_reply_that_comes_during_it_waits_for_the_next_question(
        self, ingress: DrivenIngress
    ) -> None:
        """A request would be submitted twice: now, and when its pause is over."""
        one = ingress.arrive()
        ingress.no_route(one, "no_replica")
        assert ingress.route(one) == []


class TestSubmitted:
    def test_an_acknowledgement_starts_the_stream(self, ingress: DrivenIngress) -> None:
        """An accepted request would be submitted again and again."""
        one = ingress.streaming()
        assert (one.phase, one.incarnation, one.accepted_s) == ("streaming", "i0", 0.0)

    def test_without_one_it_goes_elsewhere(self, ingress: DrivenIngress) -> None:
        """A dead worker would keep every request that is sent to it."""
        one = ingress.arrive()
        ingress.route(one)
        assert ingress.sweep(after_s=0.9) == []
        ingress.sweep(after_s=0.2)
        assert ingress.moved == ["unacknowledged"]
        assert [(abort.attempt, abort.replica_id) for abort in ingress.aborted] == [(0, "r0")]
        (question,) = ingress.asked
        assert (question.attempt, question.excluded) == (1, ("r0",))

    def test_the_first_acknowledgement_sets_the_overhead(self, ingress: DrivenIngress) -> None:
        """Moves of a running request would be counted as time before its start."""
        one = ingress.arrive()
        ingress.now_s = 0.25
        ingress.route(one)
        ingress.now_s = 0.5
        ingress.acknowledge(one)
        ingress.lose(one, "stalled")
        ingress.now_s = 5.0
        ingress.route(one, replica_id="r1")
        ingress.acknowledge(one, incarnation="i1")
        assert one.accepted_s == 0.5
        assert one.overhead_s(now_s=9.0) == 0.25


class TestLost:
    def test_the_next_attempt_goes_on_with_the_tokens_so_far(self, ingress: DrivenIngress) -> None:
        """The client would see its answer begin again."""
        one = ingress.streaming(output_tokens_max=8)
        one.tokens += [5, 6, 7]
        ingress.lose(one, "failed", "engine")
        assert ingress.moved == ["failed"]
        (question,) = ingress.asked
        assert (question.attempt, question.output_tokens_max) == (1, 5)
        ingress.route(one, replica_id="r1")
        (submit,) = ingress.submitted
        assert (submit.attempt, submit.output_tokens) == (1, [5, 6, 7])
        assert submit.sampling.output_tokens_max == 8

    @pytest.mark.parametrize(
        ("reason", "aborts", "excludes"),
        [
            ("refused", False, True),
            ("failed", False, True),
            ("stalled", True, True),
            ("incarnation", True, True),
            ("unacknowledged", True, True),
            ("gap", True, False),
        ],
    )
    def test_what_is_said_to_and_of_the_replica_that_is_left(
        self, ingress: DrivenIngress, reason: LossReason, aborts: bool, excludes: bool
    ) -> None:
        """A replica would go on for nobody, or one lost message would shut out a healthy one."""
        one = ingress.streaming()
        ingress.lose(one, reason)
        assert bool(ingress.aborted) == aborts
        assert one.excluded == (("r0",) if excludes else ())

    def test_a_former_attempt_cannot_be_lost_again(self, ingress: DrivenIngress) -> None:
        """A repeated failure would end the attempt that has replaced the failed one."""
        one = ingress.streaming()
        ingress.lose(one, "failed", "engine")
        ingress.route(one, replica_id="r1")
        assert ingress.lose(one, "failed", "engine", attempt=0) == []
        assert one.phase == "submitted"

    def test_a_refused_attempt_is_moved_once(self, ingress: DrivenIngress) -> None:
        """A repeated refusal would use up the attempts of a request that nobody has tried."""
        one = ingress.arrive()
        ingress.route(one)
        ingress.lose(one, "refused", "draining")
        assert ingress.lose(one, "refused", "draining") == []
        assert one.moves == 1

    @pytest.mark.parametrize("code", ["too_long", "invalid"])
    def test_what_an_engine_calls_impossible_is_not_tried_elsewhere(
        self, ingress: DrivenIngress, code: FailureCode
    ) -> None:
        """A bad request would visit every replica before its client hears of it."""
        one = ingress.arrive()
        ingress.route(one)
        ingress.lose(one, "refused", code)
        assert [failure.code for failure in ingress.failed] == [code]
        assert ingress.aborted == []

    def test_overload_is_told_after_the_free_moves(self, ingress: DrivenIngress) -> None:
        """Under overload requests would wander instead of telling clients to come later."""
        one = ingress.arrive()
        for move in range(FREE_MOVES):
            ingress.route(one, replica_id=f"r{move}")
            ingress.lose(one, "refused", "overloaded")
            assert len(ingress.asked) == 1
        ingress.route(one, replica_id="r9")
        ingress.lose(one, "refused", "overloaded")
        (failure,) = ingress.failed
        assert failure.code == "overloaded"
        assert failure.retry_after_s > 0

    def test_overload_does_not_end_a_stream_that_has_begun(self, ingress: DrivenIngress) -> None:
        """An answer half shown would break off because the others are busy for a moment."""
        one = ingress.streaming()
        one.tokens.append(5)
        for _ in range(FREE_MOVES + 3):
            ingress.lose(one, "refused", "overloaded")
            assert ingress.failed == []
            ingress.sweep(after_s=1.1)
            ingress.route(one)

    def test_moves_are_free_twice_and_then_paused(self, ingress: DrivenIngress) -> None:
        """A replica that fails at once would be tried thousands of times a second."""
        one = ingress.arrive()
        for _ in range(FREE_MOVES):
            ingress.route(one)
            ingress.lose(one, "failed", "engine")
            assert len(ingress.asked) == 1
        ingress.route(one)
        ingress.lose(one, "failed", "engine")
        assert ingress.asked == []
        assert one.phase == "backing_off"

    def test_attempts_are_bounded(self) -> None:
        """A request that breaks every engine would break them all, for ever."""
        ingress = DrivenIngress(attempts_max=3)
        one = ingress.arrive()
        for _ in range(2):
            ingress.route(one)
            ingress.lose(one, "failed", "engine")
        ingress.route(one)
        ingress.lose(one, "failed", "engine")
        (failure,) = ingress.failed
        assert failure.code == "engine"
        assert ingress.core.open_requests == 0
        assert ingress.aborted == []

    def test_with_every_token_known_it_just_ends(self, ingress: DrivenIngress) -> None:
        """An answer that is complete would be sent to an engine that has nothing to add."""
        one = ingress.streaming(output_tokens_max=2)
        one.tokens += [5, 6]
        ingress.lose(one, "stalled")
        assert ingress.of(Finished) == [Finished("a", "length")]
        assert ingress.asked == []

    def test_exclusions_are_bounded_and_the_oldest_is_forgiven(
        self, ingress: DrivenIngress
    ) -> None:
        """A long request would carry ever more exclusions, until no replica is left."""
        one = ingress.arrive()
        for move in range(EXCLUDED_MAX + 3):
            ingress.sweep(after_s=1.1)
            ingress.route(one, replica_id=f"r{move}")
            ingress.lose(one, "failed", "engine")
        assert one.excluded == tuple(f"r{move}" for move in range(3, EXCLUDED_MAX + 3))


class TestIncarnation:
    def test_another_one_in_a_chunk_moves_its_request(self, ingress: DrivenIngress) -> None:
        """A worker that was restarted would be waited for, although it knows nothing any more."""
        one = ingress.streaming()
        ingress.acknowledge(one, incarnation="i1")
        assert ingress.moved == ["incarnation"]
        assert one.attempt == 1

    def test_another_one_on_the_replica_moves_all_that_the_former_had(
        self, ingress: DrivenIngress
    ) -> None:
        """The new run's heartbeats would keep alive requests that died with the former one."""
        old = ingress.streaming("old")
        elsewhere = ingress.streaming("elsewhere", replica_id="r1")
        new = ingress.arrive("new")
        ingress.route(new)
        ingress.acknowledge(new, incarnation="i1")
        waiting = ingress.arrive("waiting")
        ingress.route(waiting)
        ingress.feed(ReplicaRestarted("r0", "i1"))
        assert [question.request_id for question in ingress.asked] == ["old"]
        assert [one.attempt for one in (old, elsewhere, new, waiting)] == [1, 0, 0, 0]


class TestSilence:
    def test_a_silent_replica_is_left(self, ingress: DrivenIngress) -> None:
        """A stream would hang with the replica that died under it."""
        ingress.streaming()
        assert ingress.sweep(after_s=1.9) == []
        ingress.sweep(after_s=0.2)
        assert ingress.moved == ["stalled"]

    def test_heartbeats_of_the_replica_count(self, ingress: DrivenIngress) -> None:
        """A request that waits for its prefill would be thrown out of the queue."""
        ingress.streaming()
        for _ in range(4):
            ingress.heard["r0"] = ingress.now_s
            assert ingress.sweep(after_s=1.0) == []

    def test_heartbeats_of_another_replica_do_not(self, ingress: DrivenIngress) -> None:
        """One live replica would hide the death of all others."""
        ingress.streaming()
        ingress.heard["r1"] = 10.0
        ingress.sweep(after_s=2.1)
        assert ingress.moved == ["stalled"]


class TestProbe:
    @pytest.fixture
    def silent(self, ingress: DrivenIngress) -> DrivenIngress:
        """A replica that lives, and a request it says nothing about."""
        one = ingress.streaming()
        one.tokens += [5, 6]
        for _ in range(4):
            ingress.heard["r0"] = ingress.now_s
            ingress.sweep(after_s=1.0)
        ingress.heard["r0"] = 4.9
        ingress.sweep(after_s=1.0)
        return ingress

    def test_it_submits_the_same_attempt_again(self, silent: DrivenIngress) -> None:
        """A lost last chunk would leave the request open until its deadline."""
        (submit,) = silent.submitted
        assert (submit.attempt, submit.output_tokens) == (0, [5, 6])
        assert silent.aborted == []

    def test_acknowledged_it_waits_on_and_asks_less_often(self, silent: DrivenIngress) -> None:
        """A request in a long queue would be moved, and lose its place."""
        one = silent.core.journey("a")
        assert one is not None
        silent.acknowledge(one)
        times: list[float] = []
        while silent.now_s < 40.0:
            silent.heard["r0"] = silent.now_s
            if any(silent.sweep(after_s=0.5)):
                assert len(silent.submitted) == 1
                times.append(silent.now_s)
                silent.acknowledge(one)
        assert times == [10.0, 20.0, 40.0]
        assert one.attempt == 0

    def test_unacknowledged_it_moves(self, silent: DrivenIngress) -> None:
        """The replica has settled the attempt, and nobody would ever say so again."""
        silent.heard["r0"] = silent.now_s
        silent.sweep(after_s=1.1)
        assert silent.moved == ["unacknowledged"]
        assert [question.attempt for question in silent.asked] == [1]

    def test_after_an_outage_of_the_broker_it_comes_soon(self, ingress: DrivenIngress) -> None:
        """Whose last chunk was lost with the broker would hang for as long as a quiet stream may
        be quiet, although everybody knows that messages were lost."""
        ingress.streaming()
        ingress.now_s = 1.0
        ingress.feed(Reconnected())
        ingress.heard["r0"] = 1.4
        assert ingress.sweep(after_s=0.4) == [], "its worker may still be away"
        ingress.sweep(after_s=0.2)
        assert [submit.attempt for submit in ingress.submitted] == [0]

    def test_after_an_outage_a_lively_stream_gets_none(self, ingress: DrivenIngress) -> None:
        """Each restart of the broker would send every prompt once more."""
        one = ingress.streaming()
        ingress.feed(Reconnected())
        for _ in range(10):
            one.heard_s = ingress.now_s
            assert ingress.sweep(after_s=0.3) == []


class TestEnd:
    def test_finished(self, ingress: DrivenIngress) -> None:
        """A finished request would be kept, and moved when its replica falls silent."""
        one = ingress.streaming()
        assert ingress.feed(Finished("a", "length")) == []
        assert (one.phase, one.finish, ingress.core.open_requests) == ("ended", "length", 0)
        assert ingress.feed(Finished("a", "stop")) == []
        assert one.finish == "length"

    @pytest.mark.parametrize("phase", ["routing", "submitted", "streaming"])
    def test_a_client_that_leaves_stops_the_engine(
        self, ingress: DrivenIngress, phase: str
    ) -> None:
        """A GPU would go on for nobody."""
        one = ingress.arrive()
        if phase != "routing":
            ingress.route(one)
        if phase == "streaming":
            ingress.acknowledge(one)
        ingress.feed(ClientGone("a"))
        assert len(ingress.aborted) == (phase != "routing")
        assert (one.finish, ingress.core.open_requests) == ("abort", 0)
        assert ingress.feed(ClientGone("a")) == []

    @pytest.mark.parametrize("phase", ["routing", "streaming"])
    def test_the_deadline_ends_everything(self, phase: str) -> None:
        """A request could stay open for ever."""
        ingress = DrivenIngress(request_s=600.0)
        one = ingress.arrive() if phase == "routing" else ingress.streaming()
        one.tokens.append(5)
        ingress.heard["r0"] = 599.9
        ingress.sweep(after_s=600.0)
        assert [failure.code for failure in ingress.failed] == ["deadline"]
        assert len(ingress.aborted) == (phase == "streaming")
        assert ingress.core.open_requests == 0

    def test_a_stale_chunk_is_answered_with_an_abort(self, ingress: DrivenIngress) -> None:
        """A worker that missed the abort would go on to the request's last token."""
        ingress.streaming()
        ingress.feed(Finished("a", "stop"))
        ingress.feed(StaleChunk("a", 0, "r0"))
        (effect,) = ingress.effects
        assert isinstance(effect, Publish)
        assert effect.subject == subjects.ABORT_REQUEST.of(worker_id="leader-r0").pattern
        assert ingress.feed(StaleChunk("a", 0, "never-heard-of")) == []


def test_known_leaders_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replica ids that come and go would fill the memory, or displace those in use."""
    monkeypatch.setattr("services.ingress.handover.LEADERS_MAX", 2)
    ingress = DrivenIngress()
    for number, replica_id in enumerate(("r0", "r1", "r1", "r1", "r2")):
        ingress.route(ingress.arrive(f"a{number}"), replica_id=replica_id)
    assert ingress.feed(StaleChunk("x", 0, "r1")) != []
    assert ingress.feed(StaleChunk("x", 0, "r0")) == []


def test_two_requests_do_not_touch_each_other() -> None:
    """One client's trouble would be another's."""
    ingress = DrivenIngress()
    one, two = ingress.streaming("one"), ingress.streaming("two")
    ingress.lose(one, "failed", "engine")
    assert (one.attempt, two.attempt, two.phase) == (1, 0, "streaming")
    assert isinstance(ingress.core, IngressCore)
    assert [j.request_id for j in ingress.core.journeys()] == ["one", "two"]
    ingress.feed(Arrived(journey("three")))
    assert ingress.core.open_requests == 3
