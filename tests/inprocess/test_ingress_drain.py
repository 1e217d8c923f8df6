"""How an ingress ends: what is open is finished or aborted, what is new is sent elsewhere."""

import asyncio
from typing import Any

import aiohttp
import pytest

from services.ingress.connections import affordable
from tests.support.broker import Broker
from tests.support.inprocess import InprocessMesh, inprocess_mesh, modelled_mesh

pytestmark = pytest.mark.nats

BODY: dict[str, Any] = {"model": "modelled", "prompt": "x", "temperature": 0, "seed": 1}


def metric(mesh: InprocessMesh, service: str, name: str, **labels: str) -> float:
    value = mesh.contexts[service].metrics.registry.get_sample_value(f"oserve_{name}", labels)
    return value or 0.0


async def test_open_streams_end_well_and_new_requests_are_sent_away(
    shared_nats_server: Broker,
) -> None:
    """A rolling restart would break answers off, or never end under clients that keep asking."""
    async with (
        inprocess_mesh(shared_nats_server.url, modelled_mesh(base_s=0.01)) as mesh,
        aiohttp.ClientSession(base_url=mesh.url) as session,
        aiohttp.ClientSession(base_url=mesh.url) as other,
    ):
        assert (await (await other.get("/health")).json())["status"] == "alive"
        body = BODY | {"max_tokens": 60, "stream": True}
        async with session.post("/v1/completions", json=body) as answer:
            await answer.content.readany()
            stopping = asyncio.create_task(mesh.stop("ingress"))
            await asyncio.sleep(0.05)
            async with other.post("/v1/completions", json=BODY) as refused:
                assert refused.status == 503
                assert (await refused.json())["error"]["code"] == "overloaded"
                assert refused.headers["Connection"] == "close"
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        await stopping


async def test_what_does_not_end_in_time_is_aborted_in_its_engine(
    shared_nats_server: Broker,
) -> None:
    """Engines would go on for clients of an ingress that is no more."""
    gpu = modelled_mesh(gpus=1, base_s=0.02)
    async with (
        inprocess_mesh(shared_nats_server.url, gpu, drain_timeout_s=0.2) as mesh,
        aiohttp.ClientSession(base_url=mesh.url) as session,
    ):
        body = BODY | {"max_tokens": 2000, "stream": True}
        async with session.post("/v1/completions", json=body) as answer:
            await answer.content.readany()
            await mesh.stop("ingress")
            with pytest.raises(aiohttp.ClientError):
                await answer.read()
        async with asyncio.timeout(5):
            while metric(mesh, "worker-n0-g0", "engine_running", replica_id="r0"):
                await asyncio.sleep(0.02)


def test_connections_fit_the_limit_of_descriptors() -> None:
    """The thousandth client of a default shell would stop the ingress from accepting at all."""
    assert affordable(10) == 10
    assert 1 <= affordable(1 << 40) < 1 << 40
