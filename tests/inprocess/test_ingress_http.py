"""The HTTP edge with the whole mesh behind it, in one event loop on a real broker."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.support.broker import Broker
from tests.support.inprocess import InprocessMesh, inprocess_mesh, modelled_mesh

pytestmark = pytest.mark.nats

COMPLETION: dict[str, Any] = {
    "model": "modelled", "prompt": [1, 2, 3], "max_tokens": 12, "temperature": 0, "seed": 7,
}  # fmt: skip


async def post(
    session: aiohttp.ClientSession, mesh: InprocessMesh, body: Any, **options: Any
) -> tuple[int, dict[str, Any], Any]:
    path = options.pop("path", "/v1/completions")
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    async with session.post(mesh.url + path, data=data, **options) as answer:
        return answer.status, await answer.json(), answer.headers


async def stream_events(answer: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    raw = (await answer.read()).decode()
    lines = [line.removeprefix("data: ") for line in raw.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [msgspec.json.decode(line) for line in lines[:-1]]


async def test_streamed_and_whole_answers_say_the_same(shared_nats_server: Broker) -> None:
    """A client that streams would get another text than one that does not."""
    async with (
        inprocess_mesh(shared_nats_server.url, modelled_mesh()) as mesh,
        aiohttp.ClientSession() as session,
    ):
        status, whole, headers = await post(session, mesh, COMPLETION)
        assert status == 200
        assert headers["x-request-id"] == whole["id"]
        assert headers["x-oserve-replica"] in ("r0", "r1")
        assert float(headers["x-oserve-overhead-ms"]) >= 0
        body = COMPLETION | {
            "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
        }  # fmt: skip
        async with session.post(mesh.url + "/v1/completions", json=body) as answer:
            assert answer.headers["x-oserve-replica"] in ("r0", "r1")
            events = await stream_events(answer)
        choices = [choice for event in events for choice in event["choices"]]
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
        tokens: list[int] = []
        for choice in choices:
            if choice.get("token_ids"):
                assert choice["position"] == len(tokens)
                tokens += choice["token_ids"]
        assert len(tokens) == 12
        assert choices[-1]["finish_reason"] == "length"
        assert events[-1]["usage"] == whole["usage"]


async def test_n_choices_differ_and_a_seed_repeats_them(shared_nats_server: Broker) -> None:
    """n would return the same text n times, or a seed would not reproduce an answer."""
    async with (
        inprocess_mesh(shared_nats_server.url, modelled_mesh()) as mesh,
        aiohttp.ClientSession() as session,
    ):
        body = COMPLETION | {"n": 3, "temperature": 1.0}
        first = (await post(session, mesh, body))[1]
        again = (await post(session, mesh, body))[1]
        texts = [choice["text"] for choice in first["choices"]]
        assert len(set(texts)) == 3
        assert texts == [choice["text"] for choice in again["choices"]]
        assert first["usage"] == {"prompt_tokens": 3, "completion_tokens": 36, "total_tokens": 39}


async def test_a_stop_string_ends_the_text_before_it(shared_nats_server: Broker) -> None:
    """The stop string, or text after it, would reach the client."""
    async with (
        inprocess_mesh(shared_nats_server.url, modelled_mesh()) as mesh,
        aiohttp.ClientSession() as session,
    ):
        whole = (await post(session, mesh, COMPLETION))[1]["choices"][0]["text"]
        stop = whole[5:8]
        body = COMPLETION | {"stop": [stop]}
        choice = (await post(session, mesh, body))[1]["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"


async def test_errors_are_openais_and_name_the_field(shared_nats_server: Broker) -> None:
    """A client could not tell what to change."""
    async with (
        inprocess_mesh(shared_nats_server.url, modelled_mesh()) as mesh,
        aiohttp.ClientSession() as session,
    ):
        cases: list[tuple[Any, int, str | None, str | None]] = [
            (COMPLETION | {"model": "gpt-9"}, 404, "model", "model_not_found"),
            (COMPLETION | {"temperature": 3}, 400, "temperature", None),
            (COMPLETION | {"nonsense": 1}, 400, "nonsense", None),
            (COMPLETION | {"max_tokens": 4000}, 413, "prompt", "context_length_exceeded"),
            (COMPLETION | {"prompt": [1, 5000]}, 400, "prompt", None),
            (b'{"model": "modelled", "prompt": "trunc', 400, None, None),
            (b"", 400, None, None),
        ]
        for body, status, param, code in cases:
            got, answer, headers = await post(session, mesh, body)
            assert got == status, (body, answer)
            assert answer["error"]["param"] == param, answer
            assert code is None or answer["error"]["code"] == code
            assert headers["x-request-id"]
        async with session.get(mesh.url + "/v2/nothing") as answer:
            assert answer.status == 404
        async with session.get(mesh.url + "/v1/completions") as answer:
            assert answer.status == 405


async def test_keys_decide_who_may_ask_and_how_often(
    shared_nats_server: Broker, tmp_path: Path
) -> None:
    """A stranger would be served, or one tenant could starve the others."""
    digest = hashlib.sha256(b"secret").hexdigest()
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'[[keys]]\nid = "k1"\nsha256 = "{digest}"\ntenant = "t1"\nslo_class = "standard"\n'
        "requests_per_s = 0.5\nburst = 2\n"
    )
    async with (
        inprocess_mesh(shared_nats_server.url, modelled_mesh(), keys_file=str(keys)) as mesh,
        aiohttp.ClientSession() as session,
    ):
        assert (await post(session, mesh, COMPLETION))[0] == 401
        wrong = {"Authorization": "Bearer wrong"}
        assert (await post(session, mesh, COMPLETION, headers=wrong))[0] == 401
        right = {"Authorization": "Bearer secret"}
        urgent = right | {"x-oserve-slo-class": "interactive"}
        assert (await post(session, mesh, COMPLETION, headers=urgent))[0] == 400
        assert (await post(session, mesh, COMPLETION, headers=right))[0] == 200
        assert (await post(session, mesh, COMPLETION, headers=right))[0] == 200
        status, answer, headers = await post(session, mesh, COMPLETION, headers=right)
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(headers["Retry-After"]) >= 1


async def test_a_client_that_leaves_frees_its_engine(shared_nats_server: Broker) -> None:
    """Abandoned requests would go on burning GPU time."""
    async with (
        inprocess_mesh(shared_nats_server.url, modelled_mesh(gpus=1, base_s=0.02)) as mesh,
        aiohttp.ClientSession() as session,
    ):
        body = COMPLETION | {"max_tokens": 1500, "stream": True}
        async with session.post(mesh.url + "/v1/completions", json=body) as answer:
            await answer.content.readany()
            assert await running(mesh, session) == 1
        async with asyncio.timeout(5):
            while await running(mesh, session):
                await asyncio.sleep(0.02)


async def running(mesh: InprocessMesh, session: aiohttp.ClientSession) -> float:
    registry = mesh.contexts["ingress"].metrics.registry
    return registry.get_sample_value("oserve_ingress_open_requests") or 0.0


async def test_a_killed_replica_does_not_break_its_streams(shared_nats_server: Broker) -> None:
    """A stream would break, repeat or skip tokens when its replica dies."""
    async with (
        inprocess_mesh(shared_nats_server.url, modelled_mesh(base_s=0.01), stall_s=0.8) as mesh,
        aiohttp.ClientSession() as session,
    ):
        body = COMPLETION | {"max_tokens": 100, "return_token_ids": True}
        calm = [
            answer[1]
            for answer in await asyncio.gather(
                *(post(session, mesh, body | {"seed": seed}) for seed in range(4))
            )
        ]
        asks = [
            asyncio.create_task(post(session, mesh, body | {"seed": seed})) for seed in range(4)
        ]
        await asyncio.sleep(0.5)
        await mesh.kill("worker-n0-g0")
        for ask, undisturbed in zip(asks, calm, strict=True):
            status, answer, _ = await ask
            assert status == 200
            assert answer["choices"] == undisturbed["choices"]


async def test_idle_connections_are_closed_and_do_not_stop_service(
    shared_nats_server: Broker,
) -> None:
    """Whoever opens connections and says nothing would use up the ingress."""
    async with inprocess_mesh(
        shared_nats_server.url, modelled_mesh(), first_request_s=0.5, connections_max=64
    ) as mesh:
        port = int(mesh.url.rpartition(":")[2])
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        async with aiohttp.ClientSession() as session:
            assert (await post(session, mesh, COMPLETION))[0] == 200
        async with asyncio.timeout(5):
            assert [await reader.read() for reader, _ in idle] == [b""] * 60
        for _, writer in idle:
            writer.close()
