# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# (the client's overloads cannot be told apart when keywords come from a dict)
"""OpenAI's own client against the mesh as real processes: what its users rely on."""

import asyncio
import hashlib
import statistics
from collections.abc import AsyncIterator, Iterator
from time import monotonic
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from deploy.state import read_mesh_file
from shared.bus import BusConfig, Delivery, NatsBus
from shared.messages.base import decode
from shared.messages.replicas import ReplicaReport
from shared.subjects import REPLICA_REPORT
from shared.text import byte_tokenizer
from tests.support.up import Up, write_topology

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

MODEL = "modelled"
ABORT_S_MAX = 0.150  # a client that leaves frees its engine within that time
TRIES = 7
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "seed": 7}
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL of the HTTP edge, and of the broker."""
    folder = tmp_path_factory.mktemp("openai")
    keys = folder / "keys.toml"
    entries = [("main", ""), ("slow", "requests_per_s = 0.01\nburst = 1\n")]
    keys.write_text("".join(
        f'[[keys]]\nid = "{name}"\ntenant = "t"\n{limits}'
        f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
        for name, limits in entries
    ))  # fmt: skip
    ingress = f'[ingress]\nkeys_file = "{keys}"\nopen_requests_max = 64\n'
    with Up(write_topology(folder, ingress)) as up:
        url = up.url()
        state = read_mesh_file(folder / "data")
        assert state is not None
        yield url, state.bus_url
        up.interrupt()
        assert up.exit_code() == 0, up.output


@pytest.fixture
def client(mesh: tuple[str, str]) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{mesh[0]}/v1", api_key="main", max_retries=0) as one:
        yield one


@pytest.fixture
async def aclient(mesh: tuple[str, str]) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{mesh[0]}/v1", api_key="main", max_retries=0) as one:
        yield one


class TestModels:
    def test_list_and_retrieve(self, client: OpenAI) -> None:
        """Clients that choose from the list would find nothing to choose."""
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve("vendor/other")
        assert raised.value.code == "model_not_found"


class TestCompletions:
    def test_whole(self, client: OpenAI) -> None:
        """The simplest call of all would fail."""
        answer = client.completions.create(prompt="hello", max_tokens=12, user="me", **GREEDY)
        assert answer.object == "text_completion"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)
        assert answer.usage.total_tokens == 18

    def test_streamed_says_the_same(self, client: OpenAI) -> None:
        """A user interface would show another text than a batch job stores."""
        whole = client.completions.create(prompt="hello", max_tokens=12, **GREEDY)
        stream = client.completions.create(
            prompt="hello", max_tokens=12, stream=True,
            stream_options={"include_usage": True}, **GREEDY,
        )  # fmt: skip
        events = list(stream)
        text = "".join(event.choices[0].text for event in events if event.choices)
        assert text == whole.choices[0].text
        assert len({event.id for event in events}) == 1
        assert events[-2].choices[0].finish_reason == "length"
        assert events[-1].choices == []
        assert events[-1].usage == whole.usage

    def test_token_ids_and_several_prompts(self, client: OpenAI) -> None:
        """Whoever tokenises by themselves would get answers to another prompt."""
        ids = byte_tokenizer().encode("hello", add_special_tokens=True)
        text = client.completions.create(prompt="hello", max_tokens=8, **GREEDY)
        same = client.completions.create(prompt=ids, max_tokens=8, **GREEDY)
        assert text.usage == same.usage
        many = client.completions.create(prompt=[ids, ids, [1, 2]], max_tokens=4, **GREEDY)
        assert [choice.index for choice in many.choices] == [0, 1, 2]
        assert many.usage is not None
        assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (14, 12)

    def test_n_seed_and_stop(self, client: OpenAI) -> None:
        """Samples would not differ, not repeat, or not end where they were told to."""
        options: dict[str, Any] = {"model": MODEL, "prompt": "hello", "max_tokens": 24}
        first = client.completions.create(n=3, seed=5, **options)
        again = client.completions.create(n=3, seed=5, **options)
        texts = [choice.text for choice in first.choices]
        assert len(set(texts)) == 3
        assert texts == [choice.text for choice in again.choices]
        stop = texts[0][6:9]
        ended = client.completions.create(seed=5, stop=stop, **options).choices[0]
        assert ended.finish_reason == "stop"
        assert ended.text == texts[0][: texts[0].index(stop)]
        streamed = list(client.completions.create(seed=5, stop=[stop], stream=True, **options))
        assert "".join(event.choices[0].text for event in streamed) == ended.text
        assert streamed[-1].choices[0].finish_reason == "stop"

    def test_logprobs(self, client: OpenAI) -> None:
        """Evaluations that score answers would read nothing."""
        answer = client.completions.create(prompt="hello", max_tokens=6, logprobs=2, **GREEDY)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 6
        assert all(value <= 0 for value in logprobs.token_logprobs)
        assert "".join(logprobs.tokens) == answer.choices[0].text


class TestChat:
    def test_whole_and_streamed(self, client: OpenAI) -> None:
        """Chat programs would not work, or show another text than they store."""
        whole = client.chat.completions.create(
            messages=HELLO, max_completion_tokens=12, user="me", **GREEDY
        )
        assert whole.object == "chat.completion"
        assert whole.choices[0].message.role == "assistant"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        events = list(client.chat.completions.create(
            messages=HELLO, max_completion_tokens=12, stream=True,
            stream_options={"include_usage": True}, **GREEDY,
        ))  # fmt: skip
        assert events[0].choices[0].delta.role == "assistant"
        text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
        assert text == whole.choices[0].message.content
        assert events[-1].usage == whole.usage

    def test_n_in_one_stream(self, client: OpenAI) -> None:
        """Several answers in one stream would be mixed up."""
        options: dict[str, Any] = {"messages": HELLO, "max_tokens": 16, "n": 3} | GREEDY
        options["temperature"] = 1.0
        whole = client.chat.completions.create(**options)
        texts = ["", "", ""]
        finished: list[int] = []
        for event in client.chat.completions.create(stream=True, **options):
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    finished.append(choice.index)
        assert texts == [choice.message.content for choice in whole.choices]
        assert sorted(finished) == [0, 1, 2]

    def test_logprobs(self, client: OpenAI) -> None:
        """Evaluations that score answers would read nothing."""
        options: dict[str, Any] = {"messages": HELLO, "max_tokens": 5} | GREEDY
        answer = client.chat.completions.create(logprobs=True, top_logprobs=3, **options)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content) == 5
        assert all(len(token.top_logprobs) == 3 for token in logprobs.content)
        assert "".join(t.token for t in logprobs.content) == answer.choices[0].message.content
        events = client.chat.completions.create(
            logprobs=True, top_logprobs=3, stream=True, **options
        )
        streamed = [
            token
            for event in events
            for choice in event.choices
            if choice.logprobs is not None
            for token in choice.logprobs.content or ()
        ]
        assert streamed == logprobs.content

    async def test_many_at_once(self, aclient: AsyncOpenAI) -> None:
        """Answers would get mixed up between clients."""

        async def ask(number: int) -> str:
            answer = await aclient.chat.completions.create(
                messages=[{"role": "user", "content": f"{number}"}], max_tokens=8, **GREEDY
            )
            return answer.choices[0].message.content or ""

        alone = [await ask(number) for number in range(12)]
        assert await asyncio.gather(*map(ask, range(12))) == alone

    async def test_headers(self, aclient: AsyncOpenAI) -> None:
        """Nobody could tell which replica served a request, or find it in the logs."""
        raw = await aclient.chat.completions.with_raw_response.create(
            messages=HELLO, max_tokens=4, extra_headers={"x-oserve-slo-class": "batch"}, **GREEDY
        )
        assert raw.headers["x-request-id"] == raw.parse().id
        assert raw.headers["x-oserve-replica"] in ("r0", "r1")
        assert 0 <= float(raw.headers["x-oserve-overhead-ms"]) < 10_000


class TestErrors:
    def test_bad_requests_name_their_field(self, client: OpenAI) -> None:
        """A user could not tell what to change."""
        cases: list[tuple[dict[str, Any], str]] = [
            ({"temperature": 3.0}, "temperature"),
            ({"presence_penalty": 1.0}, "presence_penalty"),
            ({"extra_body": {"nonsense": 1}}, "nonsense"),
            ({"stop": ["a"] * 5}, "stop"),
            ({"extra_headers": {"x-oserve-slo-class": "interactive"}}, "x-oserve-slo-class"),
        ]
        for options, param in cases:
            asked: dict[str, Any] = {"model": MODEL, "prompt": "x"}
            asked.update(options)
            with pytest.raises(openai.BadRequestError) as raised:
                client.completions.create(**asked)
            assert raised.value.param == param
            assert param in raised.value.message

    def test_wrong_keys(self, mesh: tuple[str, str]) -> None:
        """A stranger would be served."""
        with (
            OpenAI(base_url=f"{mesh[0]}/v1", api_key="wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError) as raised,
        ):
            stranger.models.list()
        assert raised.value.code == "invalid_api_key"

    def test_rate_limits(self, mesh: tuple[str, str]) -> None:
        """One tenant could starve the others."""
        with OpenAI(base_url=f"{mesh[0]}/v1", api_key="slow", max_retries=0) as slow:
            slow.completions.create(prompt="x", max_tokens=1, **GREEDY)
            with pytest.raises(openai.RateLimitError) as raised:
                slow.completions.create(prompt="x", max_tokens=1, **GREEDY)
        assert int(raised.value.response.headers["retry-after"]) >= 1

    def test_unknown_model(self, client: OpenAI) -> None:
        """A typing error would be answered by another model."""
        with pytest.raises(openai.NotFoundError) as raised:
            client.completions.create(model="gpt-9", prompt="x")
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")

    def test_too_long_is_413(self, client: OpenAI) -> None:
        """A client could not tell "send less" from "send something else"."""
        cases: list[dict[str, Any]] = [
            {"prompt": "x" * 20_000},
            {"prompt": "x", "max_tokens": 100_000},
        ]
        for options in cases:
            with pytest.raises(openai.APIStatusError) as raised:
                client.completions.create(**options, model=MODEL)
            assert raised.value.status_code == 413
            assert raised.value.code == "context_length_exceeded"
        with pytest.raises(openai.APIStatusError) as raised:
            client.completions.create(model=MODEL, prompt="x" * (5 << 20))
        assert (raised.value.status_code, raised.value.code) == (413, "request_too_large")

    def test_too_much_at_once_is_503(self, client: OpenAI) -> None:
        """A client would not know that coming later helps."""
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model=MODEL, prompt=["x"] * 64, n=2, max_tokens=1)
        assert (raised.value.status_code, raised.value.code) == (503, "overloaded")
        assert int(raised.value.response.headers["retry-after"]) >= 1


async def test_a_client_that_leaves_frees_its_engine_at_once(
    mesh: tuple[str, str], aclient: AsyncOpenAI
) -> None:
    """Abandoned requests would go on burning GPU time. The engine is watched by its replica's
    reports, so up to a report's period (0.1 s) of what is measured is ours."""
    running: dict[str, int] = {}
    changed = asyncio.Event()

    def on_report(delivery: Delivery) -> None:
        report = decode(delivery.payload, ReplicaReport)
        running[report.replica_id] = report.running + report.waiting
        changed.set()

    async def until(count: int) -> None:
        async with asyncio.timeout(10):
            while sum(running.values()) != count or len(running) < 2:
                changed.clear()
                await changed.wait()

    bus = NatsBus(BusConfig(url=mesh[1]))
    await bus.connect(name="watch")
    try:
        await bus.subscribe(REPLICA_REPORT.wildcard, on_report)
        took_s: list[float] = []
        for attempt in range(TRIES):
            await until(0)
            stream = await aclient.completions.create(
                prompt="hello", max_tokens=2000, stream=True, **GREEDY
            )
            await anext(aiter(stream))
            await until(1)
            await asyncio.sleep(0.1 * attempt / TRIES)  # not in step with the reports
            left_s = monotonic()
            await stream.close()
            await until(0)
            took_s.append(monotonic() - left_s)
    finally:
        await bus.close()
    print("abort seen after", [f"{1e3 * value:.0f} ms" for value in took_s])  # noqa: T201
    assert statistics.median(took_s) <= ABORT_S_MAX
