"""What every engine must do with the requests of another: the contract's second half."""

from collections.abc import Iterator

import pytest

from services.worker.engine.interface import Engine, EngineRequest, Taken
from tests.unit.engine_contract import (
    SOURCE,
    EngineCase,
    EngineLimits,
    Output,
    finish_all,
    request,
    run,
    step,
    stop_strings,
)


class TakeoverContract:
    """Needs a fixture ``case: EngineCase``; skips those without a ``pair``."""

    @pytest.fixture
    def pair(self, case: EngineCase) -> Iterator[tuple[Engine, Engine]]:
        if case.pair is None:
            pytest.skip("this engine takes nothing over")
        engines = case.pair(EngineLimits(), EngineLimits())
        yield engines
        for engine in engines:
            engine.close()

    @pytest.mark.parametrize("steps", [0, 1, 3, 9])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_what_is_taken_over_goes_on_as_if_undisturbed(
        self, case: EngineCase, pair: tuple[Engine, Engine], steps: int, temperature: float
    ) -> None:
        """Otherwise a switch would change a text, repeat some of it, or lose it."""
        source, target = pair
        requests = _mixture(temperature)
        alone = case.make(EngineLimits())
        whole = run(alone, *requests)
        alone.close()
        outputs = {r.key: Output(0) for r in requests}
        for r in requests:
            source.add(r)
        for _ in range(steps):
            step(source, outputs)
        live = sorted(key for key, output in outputs.items() if output.finish is None)
        taken = _hand_over(source, target)
        assert sorted([*taken.moved, *taken.replayed]) == live
        assert not taken.replayed
        assert not target.has_work, "held requests must not run"
        target.release(keep=True)
        finish_all(target, outputs)
        assert {k: o.tokens for k, o in outputs.items()} == {k: o.tokens for k, o in whole.items()}

    def test_kv_cache_that_came_along_is_not_computed_again(
        self, pair: tuple[Engine, Engine]
    ) -> None:
        """Otherwise a switch would cost every request its prefill."""
        source, target = pair
        outputs = {"a": Output(0)}
        source.add(request("a", "x" * 100, output_tokens_max=8))
        while not outputs["a"].tokens:
            step(source, outputs)
        _hand_over(source, target)
        target.release(keep=True)
        made = len(outputs["a"].tokens)
        step(target, outputs)
        assert len(outputs["a"].tokens) == made + 1, "batch_tokens_max = 32 would take four steps"

    def test_states_tell_where_each_request_is(self, pair: tuple[Engine, Engine]) -> None:
        """Otherwise KV cache would be copied that is not there, or of other tokens."""
        source, _ = pair
        requests = [request(f"r{n}", "x" * (5 + 20 * n), output_tokens_max=30) for n in range(6)]
        outputs = {r.key: Output(0) for r in requests}
        for r in requests:
            source.add(r)
        for _ in range(6):
            step(source, outputs)
        states = source.states()
        assert [state.request.key for state in states] == [r.key for r in requests]
        for state in states:
            assert state.output_tokens == outputs[state.request.key].tokens
            known = len(state.request.prompt_tokens) + len(state.output_tokens)
            assert 0 <= state.computed < known
            if state.output_tokens:
                assert state.computed == known - 1, "all but the newest token is computed"
        assert states[-1].computed == 0, "the last of six waits behind four that run"
        assert len({s.admission for s in states if s.computed}) == 4
        load = source.load()
        assert (load.running, load.waiting) == (4, 2)

    def test_forgotten_takeover_leaves_nothing(self, pair: tuple[Engine, Engine]) -> None:
        """Otherwise a switch that was rolled back would cost KV cache for ever, or run twice."""
        source, target = pair
        outputs = {r.key: Output(0) for r in _mixture(0.0)}
        for r in _mixture(0.0):
            source.add(r)
        step(source, outputs)
        target.take(SOURCE, source.states(), final=True)
        assert target.load().kv_blocks_used > 0
        target.release(keep=False)
        target.check()
        assert not target.has_work
        assert target.states() == []
        assert target.load().kv_blocks_used == 0
        finish_all(source, outputs)

    def test_taking_ahead_holds_nothing(self, pair: tuple[Engine, Engine]) -> None:
        """Otherwise a request that ended meanwhile would end again at the new replica."""
        source, target = pair
        outputs = {"short": Output(0), "long": Output(0)}
        source.add(request("short", "x" * 40, output_tokens_max=2))
        source.add(request("long", "y" * 40, output_tokens_max=30))
        while outputs["short"].finish is None:
            target.take(SOURCE, source.states(), final=False)
            step(source, outputs)
            assert not target.has_work
        taken = _hand_over(source, target)
        assert taken.moved == ["long"]
        target.release(keep=True)
        finish_all(target, outputs)
        assert len(outputs["long"].tokens) == 30

    def test_company_at_the_target_is_not_disturbed(
        self, case: EngineCase, pair: tuple[Engine, Engine]
    ) -> None:
        """Otherwise a replica that stays could not take others' requests over."""
        source, target = pair
        mine, theirs = _mixture(0.0)[:2], _mixture(0.0)[2:]
        alone = case.make(EngineLimits())
        whole = run(alone, *mine, *theirs)
        alone.close()
        outputs = {r.key: Output(0) for r in (*mine, *theirs)}
        for r in theirs:
            source.add(r)
        for r in mine:
            target.add(r)
        step(source, outputs)
        for _ in range(2):
            step(target, outputs)
        _hand_over(source, target)
        step(target, outputs)
        assert all(output.finish is None for output in outputs.values())
        target.release(keep=True)
        finish_all(target, outputs)
        assert {k: o.tokens for k, o in outputs.items()} == {k: o.tokens for k, o in whole.items()}

    def test_held_request_can_be_aborted(self, pair: tuple[Engine, Engine]) -> None:
        """Otherwise a client that hangs up in the pause would be served to the end."""
        source, target = pair
        outputs = {r.key: Output(0) for r in _mixture(0.0)}
        for r in _mixture(0.0):
            source.add(r)
        step(source, outputs)
        _hand_over(source, target)
        assert target.abort("r0")
        assert not target.abort("r0")
        target.release(keep=True)
        del outputs["r0"]
        finish_all(target, outputs)

    def test_without_room_requests_are_replayed(self, case: EngineCase) -> None:
        """Otherwise a smaller replica could take nothing over, or would break."""
        if case.pair is None:
            pytest.skip("this engine takes nothing over")
        source, target = case.pair(EngineLimits(), EngineLimits(kv_blocks=10))
        requests = [request(f"r{n}", "z" * (60 + n), output_tokens_max=40) for n in range(4)]
        alone = case.make(EngineLimits())
        whole = run(alone, *requests)
        alone.close()
        outputs = {r.key: Output(0) for r in requests}
        for r in requests:
            source.add(r)
        while not all(output.tokens for output in outputs.values()):
            step(source, outputs)
        taken = _hand_over(source, target)
        assert taken.moved
        assert taken.replayed
        assert taken.detail
        target.release(keep=True)
        finish_all(target, outputs)
        assert {k: o.tokens for k, o in outputs.items()} == {k: o.tokens for k, o in whole.items()}
        source.close()
        target.close()

    def test_stop_string_may_span_a_takeover(
        self, case: EngineCase, pair: tuple[Engine, Engine]
    ) -> None:
        """Otherwise a stop string cut in two by a switch would be missed."""
        source, target = pair
        alone = case.make(EngineLimits())
        whole = run(alone, request(temperature=1.0, output_tokens_max=60))["a"]
        alone.close()
        end, stop = next(stop_strings(case.tokenizer, whole.tokens))
        outputs = {"a": Output(0)}
        source.add(request(temperature=1.0, output_tokens_max=60, stop=(stop,)))
        while len(outputs["a"].tokens) < end - 1:
            step(source, outputs)
        _hand_over(source, target)
        target.release(keep=True)
        finish_all(target, outputs)
        assert outputs["a"].tokens == whole.tokens[:end]
        assert outputs["a"].finish == "stop"

    def test_there_and_back(self, pair: tuple[Engine, Engine]) -> None:
        """Otherwise the second switch would break what the first one moved."""
        source, target = pair
        outputs = {"a": Output(0)}
        source.add(request("a", "x" * 50, output_tokens_max=30))
        for _ in range(4):
            step(source, outputs)
        for giver, taker in ((source, target), (target, source), (source, target)):
            _hand_over(giver, taker)
            taker.release(keep=True)
            for _ in range(3):
                step(taker, outputs)
        finish_all(target, outputs)
        assert len(outputs["a"].tokens) == 30


def _mixture(temperature: float) -> list[EngineRequest]:
    """More than run at once; some prefill while others decode."""
    return [
        request(f"r{n}", "y" * (3 + 23 * n), temperature=temperature, output_tokens_max=12 + n)
        for n in range(6)
    ]


def _hand_over(source: Engine, target: Engine) -> Taken:
    """As a switch does: what runs here is held there, and no longer here."""
    taken = target.take(SOURCE, source.states(), final=True)
    source.drop_all()
    source.check()
    target.check()
    assert not source.has_work
    assert source.load().kv_blocks_used == 0
    return taken
