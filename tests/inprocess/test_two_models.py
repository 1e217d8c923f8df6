"""Two models on one mesh: each request reaches a replica of the model that it names."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from shared import subjects
from shared.bus import BusConfig, Delivery, NatsBus
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.messages.base import decode
from shared.messages.plans import StoredPlan
from shared.messages.requests import RequestCompleted, RequestsCompleted
from shared.models import ModelSpec
from shared.text import byte_tokenizer, load_tokenizer
from tests.checkpoints import LLAMA3_TEMPLATE, byte_level, with_bos, write_folder
from tests.support.broker import Broker
from tests.support.inprocess import InprocessMesh, inprocess_mesh

pytestmark = pytest.mark.nats

SMALL, LARGE = "small", "org/large"
REPLICAS = {SMALL: {"s0", "s1"}, LARGE: {"l0"}}
TEXT = "the the the a naïve question"


def two_models(folder: Path) -> MeshConfig:
    """``small`` speaks bytes on two single-GPU replicas, ``org/large`` has a tokenizer and chat
    template of its own and one replica of two GPUs."""
    path = write_folder(folder, with_bos(byte_level()), chat_template=LLAMA3_TEMPLATE)
    return MeshConfig(
        name="test",
        model=ModelSpec(model_id=SMALL, context_tokens_max=512),
        more_models=(ModelSpec(model_id=LARGE, path=path, context_tokens_max=2048),),
        engine=EngineSpec(modelled=ModelledEngineSettings(start_s=0.01, base_s=0.002)),
        nodes=(NodeSpec(node_id="n0", gpus=4),),
        replicas=(
            ReplicaWish(replica_id="s0"),
            ReplicaWish(replica_id="s1", model_id=SMALL),
            ReplicaWish(replica_id="l0", model_id=LARGE, parallelism="tp2"),
        ),
    ).checked()


async def post(
    session: aiohttp.ClientSession, mesh: InprocessMesh, body: Any, *, path: str = "completions"
) -> tuple[int, dict[str, Any], str]:
    """Status, body, and the replica that served it."""
    async with session.post(f"{mesh.url}/v1/{path}", json=body) as answer:
        return answer.status, await answer.json(), answer.headers["x-oserve-replica"]


async def test_each_request_reaches_its_model(nats_server: Broker, tmp_path: Path) -> None:
    """A client would get the answer of another model, in another vocabulary."""
    mesh_config = two_models(tmp_path)
    encoded = {
        SMALL: len(byte_tokenizer().encode(TEXT, add_special_tokens=True)),
        LARGE: len(load_tokenizer(str(tmp_path)).encode(TEXT, add_special_tokens=True)),
    }
    assert encoded[SMALL] != encoded[LARGE]
    async with (
        inprocess_mesh(nats_server.url, mesh_config, routers=2) as mesh,
        aiohttp.ClientSession() as session,
    ):
        asked = [SMALL, LARGE] * 30
        answers = await asyncio.gather(
            *(
                post(session, mesh, {"model": model, "prompt": TEXT, "max_tokens": 8})
                for model in asked
            )
        )
        used: dict[str, set[str]] = {SMALL: set(), LARGE: set()}
        for model, (status, body, replica_id) in zip(asked, answers, strict=True):
            assert (status, body["model"]) == (200, model)
            assert body["usage"]["prompt_tokens"] == encoded[model]
            used[model].add(replica_id)
        assert used == REPLICAS
        messages = [{"role": "user", "content": "Hello"}]
        for model in (SMALL, LARGE):
            chat = {"model": model, "messages": messages, "max_tokens": 4}
            status, body, replica_id = await post(session, mesh, chat, path="chat/completions")
            assert (status, body["model"]) == (200, model)
            assert body["choices"][0]["message"]["content"]
            assert replica_id in REPLICAS[model]
        async with session.get(f"{mesh.url}/metrics") as answer:
            metrics = (await answer.text()).splitlines()
        labels = 'outcome="completed",slo_class="standard"'
        for model in (SMALL, LARGE):
            assert f'oserve_requests_total{{model="{model}",{labels}}} 31.0' in metrics


async def test_each_model_has_its_own_context_and_entry(
    nats_server: Broker, tmp_path: Path
) -> None:
    """Tools would not find the second model, or long prompts be held to the first one's limit."""
    async with (
        inprocess_mesh(nats_server.url, two_models(tmp_path)) as mesh,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{mesh.url}/v1/models") as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == [SMALL, LARGE]
        async with session.get(f"{mesh.url}/v1/models/{LARGE}") as answer:
            assert (await answer.json())["id"] == LARGE
        async with session.get(f"{mesh.url}/v1/models/none") as answer:
            assert answer.status == 404
        body = {"prompt": [5] * 600, "max_tokens": 2}
        status, refusal, _ = await post(session, mesh, body | {"model": SMALL})
        assert (status, refusal["error"]["code"]) == (413, "context_length_exceeded")
        assert (await post(session, mesh, body | {"model": LARGE}))[0] == 200
        status, refusal, _ = await post(session, mesh, body | {"model": "large"})
        assert (status, refusal["error"]["code"]) == (404, "model_not_found")
        assert refusal["error"]["message"].endswith(f"Served: {SMALL}, {LARGE}.")


async def test_a_request_that_moves_stays_with_its_model(
    nats_server: Broker, tmp_path: Path
) -> None:
    """After a crash a stream would go on in another model's words."""
    ended: list[RequestCompleted] = []
    bus = NatsBus(BusConfig(url=nats_server.url))
    await bus.connect(name="test")

    def on_completed(delivery: Delivery) -> None:
        ended.extend(decode(delivery.payload, RequestsCompleted).completed)

    await bus.subscribe(subjects.REQUESTS_COMPLETED.wildcard, on_completed)
    try:
        async with (
            inprocess_mesh(nats_server.url, two_models(tmp_path), stall_s=1.0) as mesh,
            aiohttp.ClientSession() as session,
        ):
            body = {"model": SMALL, "prompt": [1, 2, 3], "max_tokens": 400, "stream": True}
            async with session.post(f"{mesh.url}/v1/completions", json=body) as answer:
                first = answer.headers["x-oserve-replica"]
                for _ in range(10):
                    await answer.content.readline()
                await mesh.kill(f"worker-{await _gpu_of(bus, first)}")
                rest = (await answer.content.read()).decode()
            assert rest.rstrip().endswith("data: [DONE]")
            async with asyncio.timeout(10):
                while not ended:  # a callback fills it
                    await asyncio.sleep(0.02)
    finally:
        await bus.close()
    (record,) = ended
    assert (record.model_id, record.outcome, record.output_tokens) == (SMALL, "completed", 400)
    assert record.attempts > 1
    assert {record.replica_id, first} == REPLICAS[SMALL]


async def _gpu_of(bus: NatsBus, replica_id: str) -> str:
    """The GPU that hosts a replica, as the plan in force says."""
    value, _ = await bus.load("plan")
    assert value is not None
    plan = decode(value, StoredPlan).in_force
    (spec,) = [spec for spec in plan.replicas if spec.replica_id == replica_id]
    return spec.gpus[0]
