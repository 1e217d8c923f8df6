"""What every engine must do, as tests: subclass ``EngineContract`` or extend the cases of
``test_engine_contract.py``.

An engine is described by an ``EngineCase``: how to make one with given limits, and the tokenizer
that it speaks. Nothing here knows which engine runs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from services.worker.engine.interface import Engine, EngineRequest
from shared.errors import Rejected
from shared.messages.requests import FinishReason, SamplingParams, TokenLogprobs
from shared.text import Tokenizer

_STEPS_MAX = 5000
SOURCE = "source"
"""The replica that a pair's first engine is to its second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What a test may ask of an engine."""

    running_max: int = 4
    waiting_max: int = 8
    batch_tokens_max: int = 32
    kv_blocks: int = 64
    block_tokens: int = 16
    context_tokens_max: int = 512


@dataclass(frozen=True, slots=True)
class EngineCase:
    """``pair``: two engines with these limits, of which the second can take over what the first
    runs as replica ``SOURCE``, and the first what the second runs; None where no engine can."""

    make: Callable[[EngineLimits], Engine]
    tokenizer: Tokenizer
    pair: Callable[[EngineLimits, EngineLimits], tuple[Engine, Engine]] | None = None


@dataclass(slots=True)
class Output:
    """What one request yielded, in the order of its chunks."""

    position: int
    tokens: list[int] = field(default_factory=list[int])
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])


def request(  # one knob per rule of the contract
    key: str = "a",
    prompt: str = "Once upon a time",
    *,
    output_tokens_max: int = 12,
    output_tokens: list[int] | None = None,
    temperature: float = 0.0,
    seed: int = 7,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = True,
    logprobs: int | None = None,
) -> EngineRequest:
    return EngineRequest(
        key=key,
        prompt_tokens=list(prompt.encode()),
        output_tokens=output_tokens or [],
        sampling=SamplingParams(
            output_tokens_max=output_tokens_max,
            temperature=temperature,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        ),
    )


def step(engine: Engine, outputs: dict[str, Output]) -> None:
    """One step; asserts what holds for every chunk."""
    for chunk in engine.step().chunks:
        output = outputs[chunk.key]
        assert output.finish is None, f"a chunk follows the end of {chunk.key}"
        assert chunk.position == output.position + len(output.tokens), chunk
        assert chunk.tokens or chunk.finish, f"an empty chunk for {chunk.key}"
        output.tokens += chunk.tokens
        output.logprobs += chunk.logprobs or []
        output.finish = chunk.finish
    engine.check()


def run(engine: Engine, *requests: EngineRequest) -> dict[str, Output]:
    """Add all, and step until nothing is left; every request must have ended once."""
    outputs = {r.key: Output(len(r.output_tokens)) for r in requests}
    for r in requests:
        engine.add(r)
    finish_all(engine, outputs)
    return outputs


def finish_all(engine: Engine, outputs: dict[str, Output]) -> None:
    for _ in range(_STEPS_MAX):
        if not engine.has_work:
            break
        step(engine, outputs)
    assert not engine.has_work, "the engine does not come to an end"
    unfinished = [key for key, output in outputs.items() if output.finish is None]
    assert not unfinished, f"silently dropped: {unfinished}"
    assert engine.load().kv_blocks_used == 0, "KV blocks leaked"


class EngineContract:
    """Needs a fixture ``case: EngineCase``."""

    @pytest.fixture
    def engine(self, case: EngineCase) -> Iterator[Engine]:
        engine = case.make(EngineLimits())
        yield engine
        engine.close()

    def test_request_yields_all_its_tokens_once(self, engine: Engine) -> None:
        """Otherwise a client would get a text with holes or repeats."""
        output = run(engine, request(output_tokens_max=12))["a"]
        assert len(output.tokens) == 12
        assert output.finish == "length"

    def test_many_requests_all_end(self, engine: Engine) -> None:
        """Otherwise requests would get lost under load, beyond what runs at once."""
        requests = [
            request(f"r{n}", "x" * (1 + 17 * n), output_tokens_max=5 + n) for n in range(12)
        ]
        outputs = run(engine, *requests)
        assert [len(outputs[f"r{n}"].tokens) for n in range(12)] == [5 + n for n in range(12)]

    def test_result_does_not_depend_on_company(self, case: EngineCase, engine: Engine) -> None:
        """Otherwise one user's text would change with another's traffic."""
        requests = [request(f"r{n}", "y" * (3 + 9 * n), temperature=n % 2) for n in range(6)]
        together = run(engine, *requests)
        for one in requests:
            alone = case.make(EngineLimits())
            assert run(alone, one)[one.key].tokens == together[one.key].tokens
            alone.close()

    def test_late_arrivals_join_a_running_batch(self, engine: Engine) -> None:
        """Otherwise a short question would wait for the longest answer before it."""
        outputs = {"long": Output(0), "short": Output(0)}
        engine.add(request("long", output_tokens_max=60))
        for _ in range(5):
            step(engine, outputs)
        engine.add(request("short", output_tokens_max=3))
        while outputs["short"].finish is None:
            step(engine, outputs)
        assert outputs["long"].finish is None
        finish_all(engine, outputs)
        assert len(outputs["long"].tokens) == 60

    def test_few_kv_blocks_delay_but_change_nothing(self, case: EngineCase, engine: Engine) -> None:
        """Otherwise a full KV cache would lose requests or corrupt their text."""
        requests = [request(f"r{n}", "z" * (20 + n), output_tokens_max=40) for n in range(4)]
        scarce = case.make(EngineLimits(kv_blocks=6))
        few, many = run(scarce, *requests), run(engine, *requests)
        scarce.close()
        assert {key: o.tokens for key, o in few.items()} == {
            key: o.tokens for key, o in many.items()
        }

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_resumed_request_goes_on_as_if_undisturbed(
        self, engine: Engine, temperature: float
    ) -> None:
        """Otherwise a client would see its stream change course when a replica dies."""
        whole = run(engine, request(temperature=temperature, output_tokens_max=20))["a"]
        for made in (1, 7, 19):
            resumed = request(
                temperature=temperature, output_tokens_max=20, output_tokens=whole.tokens[:made]
            )
            rest = run(engine, resumed)["a"]
            assert rest.position == made
            assert rest.tokens == whole.tokens[made:]
            assert rest.finish == "length"

    def test_seed_decides_random_output(self, engine: Engine) -> None:
        """Otherwise seeds would be ignored, or all requests would get the same text."""
        one = run(engine, request(temperature=1.0, seed=1, output_tokens_max=30))["a"]
        same = run(engine, request(temperature=1.0, seed=1, output_tokens_max=30))["a"]
        other = run(engine, request(temperature=1.0, seed=2, output_tokens_max=30))["a"]
        assert one.tokens == same.tokens
        assert one.tokens != other.tokens

    def test_output_of_earlier_attempts_may_be_complete(self, engine: Engine) -> None:
        """Otherwise a request whose last chunk was lost would make one token too many."""
        whole = run(engine, request(output_tokens_max=5))["a"]
        again = run(engine, request(output_tokens_max=5, output_tokens=whole.tokens))["a"]
        assert again.tokens == []
        assert again.finish == "length"

    def test_stop_string_ends_the_request(self, case: EngineCase, engine: Engine) -> None:
        """Otherwise generation would run on past the client's stop, and be paid for."""
        whole = run(engine, request(temperature=1.0, output_tokens_max=60))["a"]
        end, stop = next(stop_strings(case.tokenizer, whole.tokens))
        stopped = run(engine, request(temperature=1.0, output_tokens_max=60, stop=(stop,)))["a"]
        assert stopped.tokens == whole.tokens[:end]
        assert stopped.finish == "stop"

    def test_stop_string_may_span_a_resume(self, case: EngineCase, engine: Engine) -> None:
        """Otherwise a stop string cut in two by a dying replica would be missed."""
        whole = run(engine, request(temperature=1.0, output_tokens_max=60))["a"]
        end, stop = next(stop_strings(case.tokenizer, whole.tokens))
        made = whole.tokens[: end - 1]
        resumed = request(temperature=1.0, output_tokens_max=60, stop=(stop,), output_tokens=made)
        output = run(engine, resumed)["a"]
        assert output.tokens == whole.tokens[end - 1 : end]
        assert output.finish == "stop"

    def test_end_token_is_included_and_ends_the_request(
        self, case: EngineCase, engine: Engine
    ) -> None:
        """Otherwise answers would never end by themselves, or usage would miss a token."""
        whole = run(engine, request(temperature=1.5, output_tokens_max=100))["a"]
        ends = [n for n, token in enumerate(whole.tokens) if token in case.tokenizer.eos_ids]
        if not ends:
            pytest.skip("this engine made no end token in 100 tokens")
        ended = run(engine, request(temperature=1.5, output_tokens_max=100, ignore_eos=False))["a"]
        assert ended.tokens == whole.tokens[: ends[0] + 1]
        assert ended.finish == "stop"

    def test_logprobs_come_with_each_token(self, engine: Engine) -> None:
        """Otherwise OpenAI clients that ask for logprobs would get none, or misaligned ones."""
        outputs = run(engine, request("with", logprobs=3), request("bare", logprobs=None))
        assert outputs["bare"].logprobs == []
        assert len(outputs["with"].logprobs) == len(outputs["with"].tokens)
        for token, entry in zip(outputs["with"].tokens, outputs["with"].logprobs, strict=True):
            assert len(entry.top_tokens) == len(entry.top_logprobs) == 3
            assert sorted(entry.top_logprobs, reverse=True) == entry.top_logprobs
            assert entry.top_tokens[0] == token  # greedy
            assert entry.logprob == pytest.approx(entry.top_logprobs[0])
            assert entry.logprob <= 0.0

    def test_abort_frees_everything_at_once(self, engine: Engine) -> None:
        """Otherwise clients that hang up would leave the KV cache full."""
        outputs = {"a": Output(0), "b": Output(0)}
        engine.add(request("a", output_tokens_max=100))
        engine.add(request("b", output_tokens_max=10))
        for _ in range(3):
            step(engine, outputs)
        tokens = list(outputs["a"].tokens)
        assert engine.abort("a")
        assert not engine.abort("a")
        assert not engine.abort("unknown")
        engine.check()
        gone = outputs.pop("a")
        finish_all(engine, outputs)
        assert gone.tokens == tokens

    def test_aborted_key_may_come_back(self, engine: Engine) -> None:
        """Otherwise a repeated submission would meet the remains of the former one."""
        engine.add(request("a", output_tokens_max=50))
        engine.step()
        engine.abort("a")
        assert len(run(engine, request("a"))["a"].tokens) == 12

    def test_drop_all_names_what_was_live(self, engine: Engine) -> None:
        """Otherwise a retiring replica would lose requests that nobody tries elsewhere."""
        for n in range(7):
            engine.add(request(f"r{n}"))
        engine.step()
        assert sorted(engine.drop_all()) == [f"r{n}" for n in range(7)]
        engine.check()
        assert not engine.has_work
        assert engine.load().kv_blocks_used == 0
        assert engine.drop_all() == []

    def test_overload_is_refused_and_passes(self, case: EngineCase) -> None:
        """Otherwise the queue would grow without bound, or stay shut once it was full."""
        engine = case.make(EngineLimits(running_max=2, waiting_max=3))
        outputs: dict[str, Output] = {}

        def add_one_too_many() -> None:
            for n in range(2 + 3 + 1):
                engine.add(request(f"r{n}"))
                outputs[f"r{n}"] = Output(0)

        with pytest.raises(Rejected, match="overloaded"):
            add_one_too_many()
        assert len(outputs) >= 3
        finish_all(engine, outputs)
        assert run(engine, request("later"))["later"].finish == "length"
        engine.close()

    def test_too_long_is_refused(self, case: EngineCase) -> None:
        """Otherwise a request that can never fit would block the queue for ever."""
        context = case.make(EngineLimits(context_tokens_max=64))
        blocks = case.make(EngineLimits(context_tokens_max=512, kv_blocks=4))
        for engine in (context, blocks):
            with pytest.raises(Rejected) as refused:
                engine.add(request(prompt="x" * 60, output_tokens_max=30))
            assert refused.value.code == "too_long"
            assert not engine.has_work
            assert run(engine, request(prompt="x" * 30, output_tokens_max=30))["a"].finish
            engine.close()

    def test_invalid_tokens_are_refused(self, case: EngineCase, engine: Engine) -> None:
        """Otherwise one bad request would crash the replica under all the others."""
        sampling = SamplingParams(output_tokens_max=4)
        for tokens in ([10**9], [-1], []):
            with pytest.raises(Rejected) as refused:
                engine.add(EngineRequest(key="bad", prompt_tokens=tokens, sampling=sampling))
            assert refused.value.code == "invalid"
        assert not engine.has_work

    def test_load_tells_what_is_pending(self, engine: Engine) -> None:
        """Otherwise routers would send requests to the busiest replica."""
        idle = engine.load()
        assert (idle.running, idle.waiting, idle.tokens_pending, idle.kv_blocks_used) == (
            0,
            0,
            0,
            0,
        )
        assert idle.kv_blocks_total > 0
        for n in range(6):
            engine.add(request(f"r{n}", "x" * 40, output_tokens_max=10))
        queued = engine.load()
        assert queued.running + queued.waiting == 6
        assert queued.tokens_pending == 6 * (40 + 10)
        outputs = {f"r{n}": Output(0) for n in range(6)}
        step(engine, outputs)
        busy = engine.load()
        assert 0 < busy.running <= 4
        assert busy.running + busy.waiting == 6
        assert busy.tokens_pending < queued.tokens_pending
        assert 0 < busy.kv_blocks_used <= busy.kv_blocks_total
        finish_all(engine, outputs)
        assert engine.load() == idle

    def test_step_without_work_does_nothing(self, engine: Engine) -> None:
        """Otherwise an idle worker's loop could fail or invent tokens."""
        assert not engine.has_work
        assert engine.step().chunks == []


def stop_strings(tokenizer: Tokenizer, tokens: list[int]) -> Iterator[tuple[int, str]]:
    """Two-character texts that tokens complete, with the number of tokens at which each first
    shows."""
    detokenizer = tokenizer.detokenizer()
    text = ""
    for end, token in enumerate(tokens, start=1):
        new = detokenizer.feed([token])
        before, text = text, text + new
        pair = text[-2:]
        if end > 20 and len(new) == 1 and len(pair) == 2 and pair not in before:
            yield end, pair
