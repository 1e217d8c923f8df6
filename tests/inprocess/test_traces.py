"""One trace from the client's request to the engine, through message headers."""

import aiohttp
import pytest

from tests.inprocess.test_ingress_http import COMPLETION, post
from tests.support.broker import Broker
from tests.support.inprocess import inprocess_mesh, modelled_mesh
from tests.support.otlp import collector

pytestmark = pytest.mark.nats

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


async def test_a_request_is_one_trace_across_the_mesh(shared_nats_server: Broker) -> None:
    """An operator could not follow a slow request from their own service into ours."""
    with collector() as collected:
        async with (
            inprocess_mesh(
                shared_nats_server.url, modelled_mesh(gpus=1), otlp=collected.endpoint
            ) as mesh,
            aiohttp.ClientSession() as session,
        ):
            headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
            assert (await post(session, mesh, COMPLETION, headers=headers))[0] == 200
            for name in ("ingress", "router-0", "worker-n0-g0"):
                await mesh.stop(name)  # which sends what spans it still holds
        ours = [span for span in collected.spans if span.trace_id.hex() == TRACE_ID]
        names = {span.name for span in ours}
        assert {"/v1/completions", "oserve.v1.rpc.route"} <= names
        assert any(name.startswith("oserve.v1.cmd.worker.") for name in names), names
        served = {resource["service.name"] for resource in collected.resources}
        assert {"oserve-ingress", "oserve-router", "oserve-worker"} <= served
